"""Byte-pair encoding, from raw text to token ids: the tokenizer stage.

    python bpe.py                                  # train and encode Python's own standard library
    python bpe.py show "Tokenizers aren't magic."  # one text through four kinds of tokenizer
    python bpe.py train  --input data/ts/train.txt --vocab_size 10000 --out data/ts
    python bpe.py encode --tokenizer data/ts --input data/ts/train.txt --out data/ts
    python bpe.py decode --tokenizer data/ts --input data/ts/val.bin --max_tokens 50

A language model reads integers. How should text become integers? One per character needs a
vocabulary of a hundred thousand and still makes long sequences; one per byte makes even longer
ones; one per word can not say a new word. Byte-pair encoding (Gage 1994; Sennrich et al. 2016;
on bytes: Radford et al. 2019) starts from the 256 bytes, so nothing is ever unknown, and adds
one token at a time: the most frequent pair of neighbours becomes a token of its own.

Python takes its time for each object, numpy does not: after the textbook's version (section 2)
this file works on thousands of words at a time.
"""
import argparse, base64, codecs, collections, contextlib, ctypes, functools, gc, glob, gzip
import heapq, io, itertools, json, os, sys, time, unicodedata, zlib

if __name__ == "__main__":  # numpy need not start threads that nobody uses: 0.07 CPU-seconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
import regex

STDLIB = os.path.join("data", "stdlib")  # where a bare `python bpe.py` leaves its data
EOT = "<|endoftext|>"  # stands between documents in .txt files; its id ends every document

# 1. Three simple tokenizers. Each has encode(text) -> ids and decode(ids) -> text.

class CharTokenizer:
    """One token per character, its Unicode code point: "hé" is [104, 233]."""
    vocab_size = 0x110000  # 1.1 million: most of the embedding table would never be trained

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

class ByteTokenizer:
    """One token per byte of UTF-8: "hé" is [104, 195, 169]."""
    vocab_size = 256  # tiny, but the sequences are the longest

    def encode(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")

class WordTokenizer:
    """One token per word of a training text; every other word becomes <UNK>."""
    def __init__(self, corpus):
        self.words = ["<UNK>", *dict.fromkeys(regex.findall(PATTERNS["gpt2"], corpus))]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    def encode(self, text):
        return [self.ids.get(word, 0) for word in regex.findall(PATTERNS["gpt2"], text)]

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

def utf8(text):
    """str -> UTF-8 bytes. Python strings may hold halves of surrogate pairs, which UTF-8 can not
    say: pairs are joined, and a half alone becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()

# 2. Byte-pair encoding as in a textbook.

def merge_pair(word, pair):
    """Join each occurrence of the pair, from left to right: of aaab, the pair aa makes aa a b."""
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)

def learn_merges_naive(words, n_merges):
    """{word as bytes: how often it occurs} -> the merges in order, as pairs of bytes. Every merge
    looks at every word again: hours for what `learn_merges` does in a second, and the same."""
    words, merges = {tuple(bytes([b]) for b in word): n for word, n in words.items()}, []
    while len(merges) < n_merges:
        counts = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += n
        if not counts:
            break  # every word is a single token
        # the most frequent pair; of equally frequent ones the lexicographically greatest, so
        # that the outcome does not depend on the order of the text or of a dictionary
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return merges

# 3. Pre-tokens: a regular expression first cuts text into words, numbers, punctuation and white
# space, and merges never cross these cuts. Otherwise "dog." and "dog!" would become tokens.

HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": HEAD + r"|\p{N}{1,3}" + TAIL,  # GPT-4, Llama 3
    "qwen": HEAD + r"|\p{N}" + TAIL,  # Qwen 2 and 3: each digit by itself
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SUFFIX}"  # GPT-4o: splits camelCase
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "char": r"[\s\S]",  # every character by itself, as nanoGPT's character-level models have it
}

def find_cuts(block):
    r"""Offsets at which each of PATTERNS starts a new pre-token whatever else the text holds.

    block: UTF-8, in which the byte 255 (never part of UTF-8) stands for the end of a document.
    Returns increasing offsets, int64, the first of them 0. A cut goes
      - before a space, if no white space follows: `two| words`
      - between a letter or digit and ASCII that is neither, nor a ': `word|.` but `don't`
      - after a single newline, if neither white space nor a / follows: `end.\n|Next`
    No pattern matches across such a place, and none looks further ahead than one character.
    """
    a = np.frombuffer(block, np.uint8)
    letter = (a | 32) - np.uint8(97) < 26  # unsigned: what lies below wraps around to above
    letter |= a - np.uint8(48) < 10
    visible = a - np.uint8(33) < 94  # ASCII without space and control characters
    # what begins a character that can not be white space; C2, E1, E2 and E3 can
    solid = visible | (a - np.uint8(0xC3) < 0x1E) | (a - np.uint8(0xE4) < 0x1B)
    cut = a == 255
    cut[1:] |= cut[:-1] | (letter[:-1] & ~letter[1:] & (a[1:] < 128) & (a[1:] != ord("'")))
    cut[:-1] |= (a[:-1] == ord(" ")) & solid[1:]
    n = np.flatnonzero(a[1:-1] == ord("\n")) + 1
    # before it: ASCII, or a character of 3 bytes that ends unlike the white space of that length
    single = visible[n - 1] | (a[n - 3] - np.uint8(0xE3) < 13) & (a[n - 1] > 0x80)
    cut[n[single & solid[n + 1] & (a[n + 1] != ord("/"))] + 1] = True
    cut[:1] = True
    return np.flatnonzero(cut)

# 4. The chunk table. Text repeats itself: 11 MB of children's stories hold 2.5 million chunks
# between cuts, of which 13,000 are distinct. So all work is done once per distinct chunk, and
# what is left is to look chunks up, thousands at once, without making a Python object of any.

LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # masks of the n low bytes
ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)

class Table:
    """A hash table from keys of two uint64, not both 0, to an int32, for thousands of keys at
    once: open addressing with linear probing (Knuth, vol. 3, 6.4). It must never be full."""

    def __init__(self, bits, default):
        self.head, self.tail = np.zeros((2, 1 << bits), np.uint64)
        self.value, self.shift = np.full(1 << bits, default, np.int32), np.uint64(64 - bits)

    def find(self, head, tail, add=False):
        """-> (slot of each key, or a free one if it is not there; indices of the new keys, which
        are put there if `add`)."""
        slot = ((head + tail * ODD[1]) * ODD[0] >> self.shift).view(np.int64)
        miss = np.flatnonzero((self.head.take(slot) != head) | (self.tail.take(slot) != tail))
        new = [miss[:0]]
        while len(miss):
            at = slot[miss]
            free = (self.head[at] | self.tail[at]) == 0
            if add:  # all write into the free slots: the last to write into one has it
                claim, where = miss[free], at[free]
                self.head[where], self.tail[where] = head[claim], tail[claim]
                self.value[where] = claim
                new.append(claim[self.value[where] == claim])
                free[:] = False
            miss = miss[~free & ((self.head[at] != head[miss]) | (self.tail[at] != tail[miss]))]
            slot[miss] = (slot[miss] + 1) & (len(self.head) - 1)
        return slot, np.concatenate(new)

def keys(block, start, length):
    """Chunks of a block, in order -> keys for a `Table`: up to 15 bytes, and how many they are."""
    low = start[0]
    text = block[low : start[-1] + 16] + bytes(23)
    words = np.ndarray(len(text) - 7, np.uint64, text, strides=1).copy()  # 8 bytes from each place
    place, long = start - low, np.flatnonzero(length > 8)
    head = words.take(place) & LOW_BYTES.take(length, mode="clip")
    tail = length.view(np.uint64) << np.uint64(56)
    tail[long] |= words.take(place[long] + 8) & LOW_BYTES.take(length[long] - 8, mode="clip")
    long = long[length[long] > 15]  # these by 128 bits of SipHash, which Python keys at random
    chunks = [block[i : i + n] for i, n in zip(start[long].tolist(), length[long].tolist())]
    head[long] = np.array([*map(hash, chunks)], np.int64).view(np.uint64)
    tail[long] = np.array([hash(chunk + b"+") for chunk in chunks], np.int64).view(np.uint64)
    return head, tail

def spans(start, n):
    """start[0], start[0] + 1, ... of which there are n[0], then start[1], ..."""
    index = np.repeat(start - np.cumsum(n) + n, n)
    index += np.arange(len(index))
    return index

class Chunks:
    """Numbers the distinct chunks in blocks of at most `room` bytes, in order of first sight."""

    def __init__(self, room=0):
        self.room = max(room, 1 << 19)
        self.table = Table((self.room + (1 << 18)).bit_length(), 0)
        self.count, self.new = 0, []  # (numbers, slots, lengths, bytes) of those not taken yet

    def lookup(self, block, start, length, batch=1 << 14):  # so few stay in the processor's cache
        """Chunks of a block -> for each the table's value, which is ~number for new ones."""
        out = np.empty(len(start), np.int32)
        for i in range(0, len(start), batch):
            at, n = start[i : i + batch], length[i : i + batch]
            slot, new = self.table.find(*keys(block, at, n), add=True)
            if len(new):
                number = np.arange(self.count, self.count + len(new))
                self.table.value[slot[new]] = ~number
                text = np.frombuffer(block, np.uint8)[spans(at[new], n[new])]
                self.new.append((number, slot[new], n[new], text))
                self.count += len(new)
            out[i : i + batch] = self.table.value.take(slot)
        return out

    def take_new(self):  # each in one array
        new, self.new = map(np.concatenate, zip(*self.new)), []
        return new

# 5. Merging many words at once.

class Merger:
    """The merges of a vocabulary.
    triples: int64 (n, 3), ids of left, right and merged token, the most urgent first. tied:
        neighbours among them that make the same token are equally urgent (tiktoken's rule).
    byte_id: ids of the 256 bytes, -1 for those without one, which are left out
    whole: {bytes: id} of words that are a token whatever the merges say
    """

    def __init__(self, triples, byte_id, whole, tied):
        merged = triples[:, 2]
        fresh = np.diff(merged, prepend=-1) != 0 if tied else np.ones(len(merged), bool)
        rank, self.merged, self.whole = np.cumsum(fresh) - 1, merged[fresh].astype(np.int32), whole
        self.never = len(self.merged)  # the rank of pairs that do not merge
        if self.never >= 1 << 21:  # ranks share an int32 with places in a word
            raise ValueError("more than 2 million merges")
        self.pairs = Table(max(8, (2 * len(merged)).bit_length()), self.never)
        slot, _ = self.pairs.find(*(triples.T[:2] + 1).astype(np.uint64), add=True)
        self.pairs.value[slot[::-1]] = rank[::-1]  # a pair that is there twice has its first rank
        self.byte_id = byte_id.astype(np.int32)
        self.first = self.rank(byte_id.repeat(256), np.tile(byte_id, 256))  # of pairs of bytes

    def rank(self, left, right):
        """Ranks of the merges of pairs of ids, int32."""
        pairs = ((ids + 1).astype(np.uint64) for ids in (left, right))
        return self.pairs.value.take(self.pairs.find(*pairs)[0])

    def merge(self, text, length):
        """BPE of words, end to end as uint8 -> (ids of all, int32, and how many each has)."""
        end, raw = np.cumsum(length), text.tobytes() if self.whole else b""
        words = zip((end - length).tolist(), end.tolist()) if self.whole else ()
        whole = np.array([self.whole.get(raw[i:j], -1) for i, j in words], np.int32)
        keep = self.byte_id[text] >= 0
        if len(whole):
            keep |= np.repeat(whole >= 0, length)
        if not keep.all():
            total = np.append(0, np.cumsum(keep))
            text, length = text[keep], total[end] - total[end - length]
        start, order = np.cumsum(length) - length, np.argsort(length)
        out = np.full(len(text), -1, np.int32)  # each id at the place of its first byte
        if len(whole):
            out[start[whole >= 0]] = whole[whole >= 0]
            order = order[whole[order] < 0]
        order = order[length[order] > 0]
        while len(order):  # words of similar lengths together
            longest = int(length[order[-1]])
            n, merge = (1 << 17) // longest, self.merge_short
            if longest > 1000:
                n, merge = 1, self.merge_long
            word, order = order[-n:], order[:-n]
            merge(text, start[word], length[word], out)
        total = np.append(0, np.cumsum(out >= 0))
        return out[out >= 0], total[start + length] - total[start]

    def merge_short(self, text, start, length, out):
        """`merge` for words of up to 1000 bytes, each a column of an array. In a round each word
        makes its merge of lowest rank, of several the leftmost. Where no token is, the id is -1."""
        n, rows, never = len(start), int(length.max()), self.never << 10
        row = np.arange(rows + 1, dtype=np.int32)[:, None]  # the last one is empty
        place = (row + start).reshape(-1)
        byte = text.take(place, mode="clip").astype(np.int32)
        ids = np.where(row < length, self.byte_id[byte].reshape(-1, n), -1).reshape(-1)
        rank = np.append(self.first[byte[:-n] << 8 | byte[n:]], byte[:n]).reshape(-1, n)
        rank[row + 1 >= length] = self.never
        rank = rank << 10 | row
        flat, at = rank.reshape(-1), np.arange(len(ids))
        after, before = np.roll(at, -n), np.roll(at, n)
        while len(word := np.flatnonzero((lowest := rank.min(0)) < never)):
            lowest = lowest[word]
            left = (lowest & 1023) * n + word
            gone = after[left]
            ids[left], ids[gone], flat[gone] = self.merged[lowest >> 10], -1, never
            after[left] = right = after[gone]
            before[right] = left
            at = np.append(left, before[left])  # the pairs that are new begin here
            flat[at] = self.rank(ids[at], ids[after[at]]) << 10 | at // n
        out[place[ids >= 0]] = ids[ids >= 0]

    def merge_long(self, text, start, length, out):
        """`merge` for a single word of any length: a heap of the pairs that merge, by rank and
        then place, and two lists that say where the next and the previous token begin."""
        ids = np.append(self.byte_id[text[start[0] : start[0] + length[0]]], -1)
        rank = self.rank(ids[:-1], ids[1:]).astype(np.int64)
        place = np.flatnonzero(rank < self.never)
        heap, rank_of = sorted((rank[place] << 40 | place).tolist()), self.rank_of
        ids, after, before = ids.tolist(), [*range(1, len(ids)), 0], [*range(-1, len(ids) - 1)]
        while heap:
            rank, i = divmod(heapq.heappop(heap), 1 << 40)
            j = after[i]
            if ids[i] < 0 or rank_of.get(ids[i] << 32 | ids[j]) != rank:
                continue  # one of the two has been merged meanwhile
            ids[i], ids[j], after[i] = int(self.merged[rank]), -1, after[j]
            before[after[j]] = i
            for i in (i, before[i]):
                if (rank := rank_of.get(ids[i] << 32 | ids[after[i]])) is not None:
                    heapq.heappush(heap, rank << 40 | i)
        out[start[0] : start[0] + length[0]] = ids[:-1]

    @functools.cached_property
    def rank_of(self):
        """For `merge_long`: {left << 32 | right: rank}."""
        at = np.flatnonzero(self.pairs.head)
        pairs = (self.pairs.head[at] - 1 << np.uint64(32)) + self.pairs.tail[at] - 1
        return dict(zip(pairs.tolist(), self.pairs.value[at].tolist()))

# 6. Reading documents, and worker processes.

BLOCK = 1 << 19  # bytes of text that are worked on at a time; larger ones cost page faults
NOT_TEXT = tuple(".parquet .arrow .bz2 .xz .zst .lz4 .zip .7z .tar .tgz .bin .npy .npz .pt".split())

def mark(separators, text):
    """A text with the byte 255 in place of the separators. Of several that match the longest wins.
    """
    found = sorted((s for s in separators if s in text), key=len, reverse=True)
    if len(found) < 2:
        return text.replace(found[0], b"\xff") if found else text
    return regex.sub(b"|".join(map(regex.escape, found)), b"\xff", text)

def cut_stream(pieces, separators, chunked, ending=b""):
    """UTF-8 in pieces of any size -> the same in pieces of about BLOCK bytes, each of which can
    be tokenized alone: cut after one of the separators (UTF-8) or, if `chunked`, between them
    where `find_cuts` says so. What does not end with `ending` gets it. Raises ValueError for 64 MB
    without a place to cut."""
    longest, waiting, size, enough = max(map(len, separators), default=0), [], 0, BLOCK
    prefixes = any(a != b and b.startswith(a) for a in separators for b in separators)
    for piece in (p[i : i + BLOCK] for p in pieces for i in range(0, len(p), BLOCK)):
        waiting.append(piece)
        size += len(piece)
        if size < enough:
            continue
        text = b"".join(waiting)
        valid = text if b"\xff" in separators else text.replace(b"\xff", b"\xfe")  # ends nothing
        cut = size - len(mark(separators, valid).rpartition(b"\xff")[2])
        if prefixes and cut > size - longest:  # what ends there may begin a longer separator
            waiting, enough = [text], size + longest
            continue
        end = size - longest  # a separator that begins later may be incomplete
        for low in (max(cut, end - 4096), cut) if chunked else ():  # the last cut is near the end
            places = find_cuts(valid[low:end])
            if len(places) and places[-1] > 3:  # so that it has seen what comes before
                cut = low + int(places[-1])
                break
        if cut:
            yield text[:cut]
        elif chunked and size > 1 << 26:
            raise ValueError("64 MB of text without a place where it may be cut")
        waiting, size = [text[cut:]], size - cut
        enough = max(BLOCK, 2 * size)
    rest = b"".join(waiting)
    yield rest if rest.endswith(ending) else rest + ending

def read_blocks(paths, separators=(EOT.encode(),), chunked=True):
    """Yield (path, whether it holds JSON lines, UTF-8) of about BLOCK bytes each, cut where
    `cut_stream` cuts. Text that does not end with EOT gets one. Raises OSError, ValueError."""
    for path in map(os.fspath, paths):
        name = path.lower().removesuffix(".gz")
        is_json = name.endswith((".jsonl", ".ndjson", ".json"))
        with open(path, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            file = gzip.GzipFile(fileobj=raw) if path.lower().endswith(".gz") else raw
            try:
                head, pieces = file.peek(16), iter(lambda: file.read(BLOCK), b"")
                if name.endswith(NOT_TEXT) or head.startswith((b"PAR1", b"BZh9", b"(\xb5/\xfd")):
                    raise ValueError(f"{path} is neither text nor JSON lines, nor a .gz of them")
                if not head:
                    raise ValueError(f"{path} is empty")
                if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    text = io.TextIOWrapper(file, "utf-16", "replace", newline="")
                    pieces = map(utf8, iter(lambda: text.read(BLOCK), ""))
                ending = EOT.encode() if EOT.encode() in separators else b""
                parts = ([b"\n"], False) if is_json else (separators, chunked, ending)
                for block in cut_stream(pieces, *parts):
                    yield path, is_json, block
                if raw.seekable() and raw.tell() < size:
                    raise ValueError(f"{path} became shorter while it was read")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path} is no gzip file, or a damaged one: {error}") from None

def to_text(block, separators=(EOT.encode(),), text_key="text"):
    """A block of `read_blocks` -> (UTF-8 with the byte 255 between documents; how many bytes were
    invalid: each run of them becomes U+FFFD). Its last document goes on in the next block.
    Raises ValueError for a line of JSON that is not an object with a text."""
    (path, is_json, raw), invalid = block, 0
    try:
        raw.decode()
    except UnicodeDecodeError:
        invalid = len(regex.findall("[\udc80-\udcff]", raw.decode("utf-8", "surrogateescape")))
        raw = raw.decode("utf-8", "replace").encode()
    if not is_json:
        return mark(separators, raw), invalid
    lines = [line for line in raw.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    for i, line in enumerate(lines):
        try:
            lines[i] = utf8(json.loads(line)[text_key])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{path}: no JSON object with a {text_key!r}: {line[:60]}") from None
    return b"\xff".join([*filter(None, lines), b""]), invalid

def parallel(job, items, num_proc):
    """map(job, items), by `num_proc` processes, which get at most 2 * num_proc items ahead."""
    if num_proc < 2:
        yield from map(job, items)
        return
    import concurrent.futures, multiprocessing
    # fork starts in no time and needs no importable __main__; elsewhere than on Linux it is unsafe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (job,))
    try:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(do_job, item))
            if len(waiting) == 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

def start_worker(job):
    """In a process of `parallel`: leave Ctrl-C to the parent, and end when it ends."""
    import multiprocessing, signal, threading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, do_job.job = multiprocessing.parent_process(), job
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()

def do_job(item):
    return do_job.job(item)

def text_size(paths):
    """Bytes of text in files, about: a .gz is taken for a fifth of what it holds."""
    return sum(os.path.getsize(p) * (5 if os.fspath(p).endswith(".gz") else 1) for p in paths)

def progress(what, done, total, start):
    """A line on a terminal that says how far a step of more than two seconds is, and how fast."""
    spent = time.monotonic() - start
    if spent > 2 and sys.stderr.isatty():
        left = max(0, total - done) * spent / max(done, 1)
        print(f"\r{what}: {done:,} of {total:,}, {done / spent:,.0f} a second, {left:.0f} s left "
              "\x1b[K", end="" if left else "\n", file=sys.stderr, flush=True)

@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the name `path` only once it is whole. What processes that were
    killed have left of it is removed."""
    for old in glob.glob(glob.escape(path) + ".*.tmp") if os.name == "posix" else ():
        with contextlib.suppress(OSError, ValueError):
            try:
                os.kill(int(old.split(".")[-2]), 0)  # only asks whether there is such a process
            except ProcessLookupError:
                os.remove(old)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)

# 7. Training.

def learn_merges(words, n_merges):
    """What `learn_merges_naive` learns, thousands of times faster. {bytes: count} -> merges.

    All distinct words lie end to end in one array of tokens, a doubly linked list: a merge
    touches only the places where its pair is. A pair comes into being when its younger token
    does, with all its places at once; from then on its count only falls. Merges are done many at
    a time: the next most frequent pairs can go together as long as none begins with the token
    that another ends with, so that they do not change each other's counts, and none creates a
    pair as frequent as a later one of them, which would have to come first."""
    words = {word: n for word, n in words.items() if len(word) > 1}
    text = b"\xff" + b"\xff".join([*words, b""])
    token = np.frombuffer(text, np.uint8).astype(np.int32)
    token[token == 255] = -1  # between words; -2 is what was merged into the one before
    size = len(token)
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    weight = np.fromiter(words.values(), np.int64, len(words))
    weight = np.append(0, np.repeat(weight, lengths + 1))  # of each place: how often its word is
    next_, prev = np.arange(1, size + 1, dtype=np.int32), np.arange(-1, size - 1, dtype=np.int32)
    pair = np.full(size, -1, np.int32)  # number of the pair that begins at a place, or -1
    count = np.zeros(3 * size, np.int64)  # of pairs, by number: each merge enters up to two more
    key, where = [], []  # left << 32 | right, and the places where it was when it came into being

    def enter(places):
        """Number the pairs that begin at these places, all of them new."""
        keys = token[places].astype(np.int64) << 32 | token[next_[places]]
        small = keys if key else (keys >> 24 | keys & 255).astype(np.uint16)  # sorted faster
        order = np.argsort(small, kind="stable")
        keys, places = keys[order], places[order]
        edge = np.flatnonzero(np.diff(keys, prepend=-1))
        new = np.arange(len(key), len(key) + len(edge))
        if len(edge):
            count[new] = np.add.reduceat(weight[places], edge)
        end = np.append(edge[1:], len(keys))
        pair[places] = np.repeat(new, end[: len(edge)] - edge)
        key.extend(keys[edge].tolist())
        where.extend([places[i:j] for i, j in zip(edge.tolist(), end.tolist())])
        return new

    enter(np.flatnonzero((token[:-1] >= 0) & (token[1:] >= 0)))
    names, merges, start = [bytes([b]) for b in range(256)], [], time.monotonic()
    frequent, threshold, width = np.zeros(0, int), int(count.max(initial=0)) + 1, 1
    while len(merges) < n_merges:
        # candidates: the `width` most frequent pairs, and those as frequent as the last of them;
        # only pairs of at least `threshold` are looked at, which is lowered when they run out
        frequent = frequent[count[frequent] >= threshold]
        while len(frequent) < width and threshold > 1:
            threshold = max(1, threshold * 9 // 10)
            frequent = np.flatnonzero(count[: len(key)] >= threshold)
        if not len(frequent):
            break
        n = count[frequent]
        top = frequent[n >= np.partition(n, -width)[-width]] if len(n) > width else frequent
        top = [(n, names[key[i] >> 32], names[key[i] & 0xFFFFFFFF], i)
               for n, i in zip(count[top].tolist(), top.tolist())]
        batch, lefts, rights = [], set(), set()
        for entry in sorted(top, reverse=True)[: min(width, n_merges - len(merges))]:
            if entry[1] in rights or entry[2] in lefts:
                break
            lefts.add(entry[1])
            rights.add(entry[2])
            batch.append(entry)
        numbers = np.array([entry[3] for entry in batch])
        places = [where[i] for i in numbers.tolist()]
        owner, at = np.repeat(np.arange(len(batch)), [*map(len, places)]), np.concatenate(places)
        valid = pair[at] == numbers[owner]
        at, owner = at[valid], owner[valid]
        # a bound on the count of pairs that each creates: the weights of its neighbours are
        # added up in 256 heaps by their low byte, as fast as it is rough
        bound = np.zeros(len(batch))
        for side in token[prev[at]], token[next_[next_[at]]]:
            heap = np.bincount(owner << 8 | side & 255, weight[at] * (side >= 0), len(batch) << 8)
            bound = np.maximum(bound, heap.reshape(-1, 256).max(1))
        bound = np.maximum.accumulate(bound)
        k = next((k for k in range(1, len(batch)) if bound[k - 1] >= batch[k][0]), len(batch))
        batch, at, owner = batch[:k], at[owner < k], owner[owner < k]
        width = min(2 * k + 2, 256)  # about as many as went well this time
        if any(left == right for _, left, right, _ in batch):  # of a run aaaaa every second
            at, owner = at[order := np.argsort(at)], owner[order]
            index, begins = np.arange(len(at)), np.append(True, next_[at[:-1]] != at[1:])
            even = (index - np.maximum.accumulate(np.where(begins, index, 0))) % 2 == 0
            at, owner = at[even], owner[even]
        second = next_[at]
        before, after = prev[at], next_[second]
        token[second] = -2
        before = before[token[before] >= 0]  # else a word's start, or a merge: counted as `after`
        lost = np.concatenate((before, second))
        lost = lost[pair[lost] >= 0]
        np.subtract.at(count, pair[lost], weight[lost])
        count[numbers[:k]] = 0
        pair[at] = pair[second] = -1
        token[at], next_[at], prev[after] = owner + len(names), after, at
        new = enter(np.concatenate((before, at[token[after] >= 0])))
        frequent = np.concatenate((frequent, new[count[new] >= threshold]))
        merges += [entry[1:3] for entry in batch]
        names += [left + right for _, left, right, _ in batch]
        progress("merges", len(merges), n_merges, start)
    return merges

def count_pretokens(first, step, source, pattern, separators, text_key):
    """Count the pre-tokens in each `step`-th block of the files (or texts), so that `step`
    processes share the work: all read everything, which is cheaper than to send blocks about.
    Each distinct chunk is split once, and its pre-tokens are counted as often as it occurred.
    Returns ({str: count}, number of invalid bytes)."""
    split, chunked = regex.compile(pattern), pattern in PATTERNS.values()
    counts, bad, done, start = collections.defaultdict(int), 0, 0, time.monotonic()
    chunks, seen = Chunks(), np.zeros(1 << 20, np.int64)

    def count_chunks():
        *_, length, text = chunks.take_new()
        text, end = text.tobytes(), np.cumsum(length)
        for i, j, n in zip((end - length).tolist(), end.tolist(), seen.tolist()):
            for pretoken in split.findall(text[i:j].decode("utf-8", "ignore")):  # 255 is no text
                counts[pretoken] += n

    files, total = isinstance(source, list), 0
    if files:
        blocks, total = read_blocks(source, separators, chunked), text_size(source)
    else:
        texts, separators = (utf8(t) + b"\xff" for t in source), [*separators, b"\xff"]
        blocks = (("", False, block) for block in cut_stream(texts, separators, chunked))
    for block in itertools.islice(blocks, first, None, step):
        text, invalid = to_text(block, separators, text_key) if files else (
            mark(separators, block[2]), 0)
        bad, done = bad + invalid, done + step * len(block[2])
        if chunked and text:
            at = find_cuts(text)
            np.add.at(seen, ~chunks.lookup(text, at, np.diff(at, append=len(text))), 1)
            if chunks.count > 1 << 18:  # bounds the memory
                count_chunks()
                chunks, seen = Chunks(), np.zeros(1 << 20, np.int64)
        for document in () if chunked else text.split(b"\xff"):
            for match in split.finditer(document.decode()):
                counts[match[0]] += 1
        if first == 0:  # one process tells how far all are
            progress("bytes counted", done, total, start)
    if chunks.count:
        count_chunks()
    return counts, bad

def train_bpe(input, vocab_size, special_tokens=(EOT,), pattern="gpt2", num_proc=None,
              text_key="text"):
    """Learn a byte-level BPE vocabulary.

    input: a file or a list of files (see `read_blocks`), or an iterable of texts
    vocab_size: how many tokens at most: 256 bytes, the merges, the special tokens
    special_tokens: strings that separate texts; they are counted in no pair
    pattern: a name from PATTERNS, or a regular expression; merges stay within its matches
    num_proc: processes, None: by the size of the input. The result does not depend on it.

    Returns (vocab, merges): {id: bytes}, with the bytes at 0 to 255, then the merges in order,
    then the special tokens; and the list of merged pairs of bytes. Fewer merges than asked for
    if the text has no more pairs. Raises ValueError or OSError.
    >>> train_bpe(["low low lower"], 259)[1]
    [(b'o', b'w'), (b'l', b'ow')]
    """
    source = [input] if isinstance(input, (str, os.PathLike)) else input
    if isinstance(source, (list, tuple)):  # texts, if no file has such a name and one has a space
        words = any(len(os.fspath(x).split()) > 1 for x in source)
        source = iter(source) if words and not any(map(os.path.exists, source)) else list(source)
    special_tokens = list(dict.fromkeys(special_tokens))
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0 or "" in special_tokens:
        raise ValueError(f"vocab_size {vocab_size} is below 256 bytes + {len(special_tokens)} "
                         "special tokens, or one of these is empty")
    files = source if isinstance(source, list) else []
    num_proc = num_proc or max(1, min(os.cpu_count(), text_size(files) >> 23)) if files else 1
    job = functools.partial(count_pretokens, step=num_proc, source=source, text_key=text_key,
                            pattern=PATTERNS.get(pattern, pattern),
                            separators=[*map(utf8, special_tokens)])
    words, bad = collections.Counter(), 0
    for counts, invalid in parallel(job, range(num_proc), num_proc):
        words.update(counts)
        bad += invalid
    if bad:
        print(f"{bad:,} bytes were not UTF-8 and became U+FFFD", file=sys.stderr)
    merges = learn_merges({utf8(word): n for word, n in words.items()}, n_merges)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return dict(enumerate([*tokens, *map(utf8, special_tokens)])), merges

# 8. The tokenizer.

# Byte-level BPE writes bytes in JSON as characters: printable Latin-1 stands for itself, the other
# bytes are U+0100, U+0101, ... These are the characters of all bytes, in order.
OTHERS = itertools.count(256)
BYTES = "".join(chr(b if b in {*range(33, 127), *range(161, 173), *range(174, 256)}
                    else next(OTHERS)) for b in range(256))
# what reading damaged JSON, or JSON of something else, raises besides ValueError
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, RecursionError, regex.error)
TIKTOKEN = {  # OpenAI's .tiktoken files, by the beginning of their names: pattern, special tokens
    "gpt2": ("gpt2", {EOT: 50256}), "r50k": ("gpt2", {EOT: 50256}), "p50k": ("gpt2", {EOT: 50256}),
    "cl100k": ("cl100k", {EOT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                          "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k": ("o200k", {EOT: 199999, "<|endofprompt|>": 200018}),
}

class Tokenizer:
    """Byte-level BPE: encode text by the merges of a vocabulary, decode ids to text.
    vocab: {id: bytes}
    merges: list[tuple[bytes, bytes]], the most urgent first (or `Merger`'s triples)
    special_tokens: list of strings, or {string: id}. In the text given to `encode` they become a
        single id; of overlapping ones the longest wins. Strings not in vocab get the next ids.
    pattern: a name from PATTERNS, a regular expression, or a list of those, applied in turn
    ignore_merges: a pre-token that is in the vocabulary becomes that token, merges or not
    tied: see `Merger`. forms: Unicode normal forms that text is brought into
    Raises ValueError or KeyError for a vocabulary that does not fit together.
    >>> vocab = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    >>> t = Tokenizer(vocab, [(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])
    >>> t.encode("then<|endoftext|>")
    [257, 110, 258]
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern="gpt2", *, ignore_merges=False,
                 tied=False, forms=()):
        self.vocab, self.ignore_merges, self.forms = dict(vocab), ignore_merges, forms
        id_of = {token: i for i, token in reversed(self.vocab.items())}
        self.special_tokens, self.text, self.chunks = {}, None, None
        for token in special_tokens or ():
            i = id_of.get(utf8(token), max(self.vocab, default=-1) + 1)
            i = special_tokens[token] if isinstance(special_tokens, dict) else i
            if not token or self.vocab.get(i, utf8(token)) != utf8(token):
                raise ValueError(f"special token {token!r} is empty, or has the id {i} of another")
            self.special_tokens[token], self.vocab[i] = i, utf8(token)
        ids = np.array([*self.vocab])
        if len(ids) and (ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= 1 << 24):
            raise ValueError("an id is not a whole number from 0 to 2**24 - 1")
        self.vocab_size = int(ids.max(initial=-1)) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")  # of ids in a .bin
        ends = (EOT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")
        self.eot_id = next((self.special_tokens[s] for s in ends if s in self.special_tokens), None)
        if not isinstance(merges, np.ndarray):
            merges = [[id_of[token] for token in (a, b, a + b)] for a, b in merges]
        self.triples = np.array(merges, np.int64).reshape(-1, 3)
        specials = {*self.special_tokens.values()}
        whole = {t: i for t, i in id_of.items() if i not in specials} if ignore_merges else {}
        byte_id = np.array([id_of.get(bytes([b]), -1) for b in range(256)])
        self.merger = Merger(self.triples, byte_id, whole, tied)
        self.steps = [pattern] if isinstance(pattern, str) else pattern
        self.steps = [PATTERNS.get(step, step) for step in self.steps]
        self.pattern = self.steps[0] if len(self.steps) == 1 else None
        self.compiled = [*map(regex.compile, self.steps)]
        self.chunked = self.pattern in PATTERNS.values()  # may text be cut by `find_cuts`?

    @functools.cached_property
    def merges(self):
        return [(self.vocab[a], self.vocab[b]) for a, b, _ in self.triples.tolist()]

    def encode(self, text):
        """str -> list of ids. Special tokens in the text are recognised: for text from a
        stranger use `encode_ordinary`."""
        return list(self.encode_iterable([text]))

    def encode_ordinary(self, text):
        """str -> list of ids, special tokens being text like any other."""
        pieces = cut_stream([utf8(text)], (), self.chunked)
        return [i for piece in pieces for i in self.encode_text(piece).tolist()]

    def encode_iterable(self, iterable):
        """Ids of the concatenation of an iterable of strings, such as an open file, lazily: the
        same as of `encode` on the whole text, in constant memory. (With a pattern that is not in
        PATTERNS: in memory for the longest text between two special tokens.)"""
        specials = {utf8(token): i for token, i in self.special_tokens.items()}
        for piece in cut_stream(map(utf8, iterable), specials, self.chunked):
            text, at, found = mark(specials, piece), 0, []
            for part in text.split(b"\xff")[:-1]:
                at += len(part)
                token = max((s for s in specials if piece.startswith(s, at)), key=len)
                at += len(token)
                found.append(specials[token])
            ids = self.encode_text(text)
            ids[ids == self.vocab_size] = found
            yield from ids.tolist()

    def encode_text(self, block):
        """UTF-8, the byte 255 between texts -> ids, int32, with `vocab_size` between texts."""
        for form in self.forms if not block.isascii() else ():
            texts = (unicodedata.normalize(form, part.decode()) for part in block.split(b"\xff"))
            block = b"\xff".join(map(str.encode, texts))
        if self.chunked:
            start = find_cuts(block)
            length = np.diff(start, append=len(block))
        else:
            texts = block.split(b"\xff")
            pieces = [p for text in texts for p in (*self.split(text.decode()), b"\xff")][:-1]
            block, length = b"".join(pieces), np.array([*map(len, pieces)], np.int64)
            start = np.cumsum(length) - length
        if not block:
            return np.zeros(0, np.int32)
        if not self.chunks or self.chunks.count > 1 << 18 or len(block) > self.chunks.room:
            self.forget(len(block))
        values = self.chunks.lookup(block, start, length)
        if self.chunks.new:
            self.learn()
        return self.expand(values)[0]

    def split(self, text):
        """A text -> list of pre-tokens, UTF-8, by the steps of a tokenizer.json: what a pattern
        matches is a piece, and so is what lies between. Raises TimeoutError."""
        pieces, limit = [text], 1 + len(text) / 1e5  # a stranger's pattern may take for ever
        for step, pattern in zip(self.steps, self.compiled):
            texts, pieces, end = pieces, [], time.monotonic() + limit
            for text in texts:
                at = 0
                for match in pattern.finditer(text, timeout=limit):
                    pieces += text[at : match.start()], match[0]
                    at = match.end()
                    if time.monotonic() > end:
                        raise TimeoutError(f"the pattern {step!r} takes too long")
                pieces.append(text[at:])
        return [piece.encode() for piece in pieces if piece]

    def is_word(self, text, start):
        """Which chunks are certainly one pre-token? Letters after at most one space are, to all
        of PATTERNS but o200k, which splits camelCase, and char."""
        if not self.chunked or self.pattern == PATTERNS["char"]:
            return np.full(len(start), not self.chunked)
        letter = (text | (0 if self.pattern == PATTERNS["o200k"] else 32)) - np.uint8(97) < 26
        letter[start] |= text[start] == ord(" ")
        return np.logical_and.reduceat(letter, start)

    def forget(self, room):
        """Empty the table of chunks, but for the byte that stands between texts."""
        self.chunks = Chunks(room)
        slot, _ = self.chunks.table.find(*keys(b"\xff", np.array([0]), np.array([1])), add=True)
        self.chunks.table.value[slot] = self.vocab_size
        # of chunks with several ids, or none, by number: where in `ids` they are
        self.start, self.length = np.zeros((2, len(self.chunks.table.value)), np.int32)
        self.ids = np.zeros(0, np.int32)

    def learn(self):
        """Encode the new chunks: words are merged; others are split into pre-tokens, which are
        looked up, and merged if they are new in their turn. A chunk with one id has it as its
        value in the table, others keep ~number."""
        number, slot, n, text = self.chunks.take_new()
        start, parts = np.cumsum(n) - n, np.ones(len(n), np.int64)
        hard = np.flatnonzero(~self.is_word(text, start))
        rest, split = text[spans(start[hard], n[hard])].tobytes(), self.compiled[0].findall
        ends = np.cumsum(n[hard]).tolist()
        found = [split(rest[i:j].decode()) for i, j in zip([0, *ends], ends)]
        parts[hard] = [*map(len, found)]
        length = [*map(len, map(str.encode, itertools.chain.from_iterable(found)))]
        length, one = np.array(length, np.int64), parts == 1
        several = np.repeat(parts[hard] > 1, parts[hard])
        self.chunks.new.append((number[one], slot[one], n[one], text[spans(start[one], n[one])]))
        values = self.chunks.lookup(rest, (np.cumsum(length) - length)[several], length[several])
        word, slot, n, text = self.chunks.take_new()
        ids, n = self.merger.merge(text, n)
        self.store(word, ids, n)
        self.chunks.table.value[slot[n == 1]] = ids[np.cumsum(n)[n == 1] - 1]
        if not one.all():
            ids, n = self.expand(values)
            self.store(number[~one], ids, np.add.reduceat(n, np.cumsum(parts[~one]) - parts[~one]))

    def store(self, number, ids, n):  # the ids of these numbers, each of which has n
        self.start[number], self.length[number] = len(self.ids) + np.cumsum(n) - n, n
        self.ids = np.append(self.ids, ids)

    def expand(self, values):
        """Ids or ~numbers -> (ids, how many each has)."""
        several = np.flatnonzero(values < 0)
        number, n = ~values[several], np.ones(len(values), np.int64)
        n[several] = many = self.length[number]
        ids = np.repeat(values, n)
        place = several + np.cumsum(many - 1) - many + 1
        ids[spans(place, many)] = self.ids.take(spans(self.start[number], many))
        return ids, n

    def decode_bytes(self, ids):
        """Ids (a list, an array or a tensor) -> bytes, special tokens included. Ids outside the
        vocabulary, which a model with a padded one may say, are nothing."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return b"".join([self.vocab.get(i, b"") for i in ids])

    def decode(self, ids):
        """Ids -> str; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self):
        """The text of a tokenizer.json, which `tokenizers` and `transformers` read."""
        if self.text:
            return self.text  # as it was read
        name = {t: codecs.charmap_decode(t, "strict", BYTES)[0] for t in self.vocab.values()}
        name |= {utf8(token): token for token in self.special_tokens}
        if len({*name.values()}) < len(name):
            raise ValueError("a special token looks like other bytes do in a tokenizer.json, where "
                             "characters that stand for bytes are é or Ġ, for instance")
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": False}
        steps = [{"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated",
                  "invert": False} for step in self.steps]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        parts = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
                 "added_tokens": [{"id": i, "content": token, **flags, "special": True}
                                  for token, i in self.special_tokens.items()],
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
                 "post_processor": None, "decoder": level, "model": {
                     "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                     "continuing_subword_prefix": "", "end_of_word_suffix": "",
                     "byte_fallback": False, "ignore_merges": self.ignore_merges,
                     "vocab": {name[token]: i for i, token in sorted(self.vocab.items())},
                     "merges": [f"{name[a]} {name[b]}" for a, b in self.merges]}}
        return json.dumps(parts, ensure_ascii=False, indent=1)

    def save(self, path):
        """Write tokenizer.json to `path`, or into it if it is a folder."""
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else os.fspath(path)
        with replacing(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def from_json(cls, text):
        """The text of a tokenizer.json -> Tokenizer. Raises ValueError for one that is broken or
        that is something else than byte-level BPE."""
        try:
            data = json.loads(text)
            model, added = data["model"], data.get("added_tokens") or []
            form = data.get("normalizer")
            forms = [part["type"] for part in form.get("normalizers", [form])] if form else []
            odd = {*forms, model.get("type", "BPE")} - {"NFC", "NFD", "NFKC", "NFKD", "BPE"}
            odd |= {f for f in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(f)}
            odd |= {flag for token in added for flag in ("single_word", "lstrip", "rstrip")
                    if token.get(flag, False) is not False}
            if odd or '"ByteLevel"' not in json.dumps(data["pre_tokenizer"]):
                raise ValueError(f"it is no plain byte-level BPE ({', '.join(map(str, odd))})")
            vocab, triples = from_names(model["vocab"], model["merges"])
            specials = {token["content"]: token["id"] for token in added}
            vocab |= {i: utf8(token) for token, i in specials.items() if token in model["vocab"]}
            tokenizer = cls(vocab, triples, specials, read_steps(data["pre_tokenizer"]),
                            forms=forms, ignore_merges=bool(model.get("ignore_merges")))
        except MALFORMED as error:
            raise ValueError(f"{type(error).__name__} {error}") from None
        tokenizer.text = text
        return tokenizer

    @classmethod
    def from_file(cls, path, special_tokens=None, pattern=None):
        """Read a tokenizer.json, GPT-2's vocab.json with merges.txt beside it, a folder that holds
        either, or a .tiktoken file of ranks. For those without them, `special_tokens` and
        `pattern` (as of the constructor) are known if they are GPT-2's or OpenAI's. Raises
        ValueError or OSError."""
        path = os.fspath(path)
        if os.path.isdir(path):
            names = [os.path.join(path, name) for name in ("tokenizer.json", "vocab.json")]
            path = names[os.path.exists(names[1]) and not os.path.exists(names[0])]
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            if path.endswith(".tiktoken"):
                family = pattern or regex.split(r"[_.]", os.path.basename(path))[0]
                if not pattern and family not in TIKTOKEN:
                    raise ValueError(f"its name is none of {', '.join(TIKTOKEN)}: give its pattern")
                known, tokens = TIKTOKEN.get(family, (family, [EOT]))
                return cls(*from_ranks(text), tokens if special_tokens is None else special_tokens,
                           known, ignore_merges=True, tied=True)
            names = json.loads(text)
            if isinstance(names.get("model"), dict):
                return cls.from_json(text)
            with open(os.path.join(os.path.dirname(path), "merges.txt"), encoding="utf-8") as file:
                lines = file.read().split("\n")
            vocab = from_names(names, [*filter(None, lines[lines[0].startswith("#version") :])])
            specials = [EOT] if special_tokens is None and EOT in names else special_tokens
            return cls(*vocab, specials, pattern or "gpt2")
        except (ValueError, *MALFORMED) as error:
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from None

def from_names(names, merges):
    """The vocabulary and merges of a tokenizer.json or of vocab.json and merges.txt
    -> ({id: bytes}, `Merger`'s triples). Names that are not made of BYTES are text."""
    table, vocab = codecs.charmap_build(BYTES), {}
    for name, i in names.items():
        try:
            vocab[i] = codecs.charmap_encode(name, "strict", table)[0]
        except UnicodeEncodeError:
            vocab[i] = utf8(name)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    pairs = [*map(names.__getitem__, itertools.chain.from_iterable(merges))]
    merged = [*map(names.__getitem__, map("".join, merges))]
    return vocab, np.column_stack([np.array(pairs, np.int64).reshape(len(merged), 2), merged])

def from_ranks(text):
    """A .tiktoken file: in each line a token in base64 and its rank -> as `from_names`.
    It has no list of merges: any two tokens merge whose bytes together are a token, and those
    that make the token of the lowest rank merge first."""
    lines = (line.split() for line in text.split("\n") if line.strip())
    rank = {base64.b64decode(token, validate=True): int(number) for token, number in lines}
    lengths = sorted({*map(len, rank)})  # only these are tried, since a token may be very long
    triples = [(rank[token[:i]], rank[token[i:]], rank[token])
               for token in sorted(rank, key=rank.get) for i in lengths
               if i < len(token) and token[:i] in rank and token[i:] in rank]
    return {i: token for token, i in rank.items()}, np.array(triples, np.int64)

def read_steps(part):
    """The "pre_tokenizer" of a tokenizer.json -> list of patterns, each of which isolates what
    it matches. Raises ValueError for others."""
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in read_steps(inner)]
    if part["type"] == "ByteLevel" and part["add_prefix_space"] is False:
        return [PATTERNS["gpt2"]] if part.get("use_regex", True) else []
    if part["type"] == "Digits":
        return [r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    if part["type"] == "Split" and part["behavior"] == "Isolated":
        return [part["pattern"].get("Regex") or regex.escape(part["pattern"]["String"])]
    raise ValueError(f"the pre-tokenizer {json.dumps(part)[:99]} is not supported")

# 9. .bin files: a header of 256 int32, then token ids. [0] 20240520 and [1] 1 for uint16, or
# 20240801 and 7 for uint32 if the vocabulary needs it (as in llm.c); [2] number of tokens, at most
# 2^31 - 1 (the size of the file is the truth); [3] vocabulary size; [4] id of the end-of-text
# token; [5], [6] low and high half of the number of bytes of text that the tokens stand for.

def read_bin(path):
    """A .bin -> (memory-mapped array of ids, header as int32 or None). A file without a header is
    nanoGPT's: uint16 from the first byte on. Raises ValueError for what is no .bin, OSError."""
    header, size = np.fromfile(path, "<i4", 256), os.path.getsize(path)
    dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get(tuple(header[:2].tolist()))
    if dtype and len(header) == 256:
        n = int(header[2])  # 2^31 - 1: that many, or more
        return np.memmap(path, dtype, "r", 1024, (n,) if n < 2**31 - 1 else None), header
    ids = np.memmap(path, "<u2", "r", shape=size // 2)
    head = ids[:500].tobytes()
    text = not {"\0", "\ufffd"} & {*head.decode("utf-8", "replace").rstrip("\ufffd")}
    wide = len(ids) > 3 and not all(ids[i : 1 << 20 : 2].any() for i in (0, 1))  # 4 or 8 bytes each
    if size % 2 or text or wide or head.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path} is no .bin: no header, and no uint16 ids as nanoGPT's")
    return ids, None

BLOCKS_DONE = itertools.count(1)

def encode_block(block, tokenizer, text_key):
    """A block of `read_blocks` -> (array of ids, bytes of the file, of text, and invalid ones)."""
    text, invalid = to_text(block, text_key=text_key)
    ids = tokenizer.encode_text(text)
    if next(BLOCKS_DONE) % 32 == 0 and sys.platform == "linux":  # else glibc keeps what is free
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    ids[ids == tokenizer.vocab_size] = tokenizer.eot_id
    return ids.astype(tokenizer.dtype), len(block[2]), len(text) - text.count(b"\xff"), invalid

def encode_files(tokenizer, paths, out, val_fraction=0.01, val_paths=(), num_proc=None,
                 text_key="text"):
    """Encode documents into out/train.bin and out/val.bin, each ended by the end-of-text id.

    Every 1/val_fraction-th document goes to val.bin, or that is made of val_paths. Prints what it
    wrote, and leaves nothing behind if it fails. Raises ValueError or OSError."""
    if tokenizer.eot_id is None:
        raise ValueError(f"the tokenizer has no {EOT} to end documents with")
    sizes = np.zeros(tokenizer.vocab_size, np.int32)  # bytes of text that an id stands for
    sizes[[*tokenizer.vocab]] = [*map(len, tokenizer.vocab.values())]
    sizes[tokenizer.eot_id] = 0
    os.makedirs(out, exist_ok=True)
    names = ("train.bin", "val.bin") if val_paths or val_fraction else ("train.bin",)
    names = [os.path.join(out, name) for name in names]
    tokens, text_bytes, lost, bad, start = [0, 0], [0, 0], 0, 0, time.monotonic()
    job = functools.partial(encode_block, tokenizer=tokenizer, text_key=text_key)
    with contextlib.ExitStack() as stack:
        bins = [stack.enter_context(replacing(name)) for name in names]
        for file in bins:
            file.write(bytes(1024))
        for files, fraction in ((paths, 0 if val_paths else val_fraction), (val_paths, 1)):
            blocks, seen, done = read_blocks(files, chunked=tokenizer.chunked), 0, 0
            total = text_size(files)
            results = parallel(job, blocks, num_proc or min(os.cpu_count(), total >> 26))
            stack.callback(results.close)  # ends the processes whatever happens
            for ids, size, decoded, invalid in results:
                # number the documents; the part after the last end goes on in the next block
                ends = np.flatnonzero(ids == tokenizer.eot_id) + 1
                share = np.floor((seen + np.arange(len(ends) + 2)) * fraction)
                seen += len(ends)
                to_val = np.repeat(np.diff(share) > 0, np.diff(ends, prepend=0, append=len(ids)))
                for i, file in enumerate(bins):
                    mine = ids[to_val == i]
                    file.write(mine)
                    tokens[i] += len(mine)
                    text_bytes[i] += int(sizes.take(mine).sum())
                done, lost, bad = done + size, lost + decoded, bad + invalid
                progress("bytes encoded", done, total, start)
        if not all(tokens[: len(bins)]):
            raise ValueError("too few documents for train.bin and val.bin both: --val_fraction 0, "
                             "or a larger one, or --val_input")
        for file, n, size in zip(bins, tokens, text_bytes):
            magic = (20240520, 1) if tokenizer.dtype.itemsize == 2 else (20240801, 7)
            header = [*magic, min(n, 2**31 - 1), tokenizer.vocab_size, tokenizer.eot_id]
            file.seek(0)
            file.write(np.array(header, "<i4").tobytes() + np.array([size], "<u8").tobytes())
    if bad:
        print(f"{bad:,} bytes were not UTF-8 and became U+FFFD", file=sys.stderr)
    if lost > sum(text_bytes) and not tokenizer.forms:
        print(f"{lost - sum(text_bytes):,} bytes are in no token of this vocabulary and were left "
              "out", file=sys.stderr)
    for name, n, size in zip(names, tokens, text_bytes):
        print(f"{name}: {n:,} tokens, {size:,} bytes of text, {size / n:.2f} bytes per token")

# 10. The command line.

def stdlib_files():
    """The Python standard library's own source, which comes with every Python: a corpus of
    several MB that needs no download."""
    import sysconfig
    root, skip = sysconfig.get_paths()["stdlib"], regex.compile(r"-packages|\btests?\b|idle_test")
    files = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path for path in files if path.endswith((".py", ".txt"))
                  and os.path.getsize(path) and not skip.search(path[len(root) :]))

def show(text, tokenizer):
    """Print a text as each kind of tokenizer cuts it."""
    for kind in CharTokenizer(), ByteTokenizer(), WordTokenizer(text), tokenizer:
        ids = kind.encode(text)
        pieces = [kind.decode([i]).replace("\n", "\\n") for i in ids]
        if sys.stdout.isatty():
            pieces = [f"\x1b[30;{42 + i % 5}m{p}\x1b[0m" for i, p in enumerate(pieces)]
        ratio = len(utf8(text)) / max(1, len(ids))
        print(f"{type(kind).__name__}, vocabulary of {kind.vocab_size:,}: {len(ids):,} tokens, "
              f"{ratio:.2f} bytes per token\n  {'|'.join(pieces)}\n  {ids}\n")

def parse_args():
    """The arguments of the command line. Exits with code 2 for wrong ones."""
    parser = argparse.ArgumentParser(
        description="Byte-level BPE: train a tokenizer, encode text files to .bin, and back. "
        "Without arguments: all of it, on Python's standard library, into data/stdlib.")
    parser.error = lambda message: parser.exit(2, f"bpe.py: error: {message} (see --help)\n")
    add = parser.add_argument
    add("command", nargs="?", choices=["train", "encode", "decode", "show"])
    add("text", nargs="?", default="Tokenizers aren't magic.", help="for show")
    add("--input", nargs="+", metavar="FILE", help="text with <|endoftext|> between documents, or "
        "JSON lines (.jsonl .ndjson .json), any as .gz; for decode: a .bin")
    add("--text_key", default="text", help="what holds the text in JSON lines (text)")
    add("--out", metavar="DIR", help="where to leave tokenizer.json, train.bin and val.bin")
    add("--tokenizer", default=STDLIB, help="tokenizer.json, vocab.json with merges.txt beside it, "
        f"a folder of these, or .tiktoken ({STDLIB})")
    add("--vocab_size", type=int, default=10000, help="tokens to learn (10000)")
    add("--pattern", help=f"where to cut text before merging: {', '.join(PATTERNS)} (one token per "
        "character) or a regular expression (gpt2); also of a .tiktoken of unknown name")
    add("--special_tokens", nargs="*", default=[EOT], help=f"strings, one token each ({EOT})")
    add("--val_fraction", type=float, default=0.01, help="of the documents, for val.bin (0.01)")
    add("--val_input", default=(), nargs="+", metavar="FILE", help="make val.bin of these instead")
    add("--max_tokens", type=int, help="decode so many (all)")
    add("--num_proc", type=int, help="processes (one per 8 MB, at most one per core)")
    args = parser.parse_args()
    if not 0 <= args.val_fraction < 1:
        parser.error("--val_fraction must be at least 0 and below 1")
    for flag, commands in ("input", ("train", "encode", "decode")), ("out", ("train", "encode")):
        if args.command in commands and not getattr(args, flag):
            parser.error(f"{args.command} needs --{flag}")
    return args

def run(args):
    """Do what the command line asks for."""
    fresh = args.command == "show" and args.tokenizer == STDLIB and not os.path.exists(
        os.path.join(STDLIB, "tokenizer.json"))
    if args.command is None or fresh:
        print("from Python's standard library", file=sys.stderr if fresh else sys.stdout)
        args.input, args.out, args.vocab_size = stdlib_files(), STDLIB, 4096
    pattern = args.pattern or "gpt2"
    if args.command in ("encode", "decode", "show") and not fresh:
        tokenizer = Tokenizer.from_file(args.tokenizer, pattern=args.pattern)
    elif pattern == "char":  # the vocabulary is the characters of the text
        texts = (to_text(b, text_key=args.text_key)[0] for b in read_blocks(args.input))
        chars = sorted({c for text in texts for c in text.decode("utf-8", "ignore")})
        tokenizer = Tokenizer(dict(enumerate(map(utf8, chars))), [], args.special_tokens, pattern,
                              ignore_merges=True)
    else:
        Tokenizer({i: bytes([i]) for i in range(256)}, [], args.special_tokens).to_json()  # can it?
        learned = train_bpe(args.input, args.vocab_size, args.special_tokens, pattern,
                            args.num_proc, args.text_key)
        tokenizer = Tokenizer(*learned, args.special_tokens, pattern)
    if args.command in (None, "train"):
        os.makedirs(args.out, exist_ok=True)
        tokenizer.save(args.out)
        print(f"{args.out}: tokenizer.json of {len(tokenizer.vocab):,} tokens")
    if args.command in (None, "encode"):
        encode_files(tokenizer, args.input, args.out, args.val_fraction, args.val_input,
                     args.num_proc, args.text_key)
        tokenizer.save(args.out)  # beside the .bin files, where the next stage looks for it
    if args.command == "show":
        show(args.text, tokenizer)
    if args.command == "decode":
        ids = read_bin(args.input[0])[0][: args.max_tokens]
        if len(ids) and ids.max() >= tokenizer.vocab_size:
            raise ValueError(f"id {ids.max()} of {args.input[0]} is not in the vocabulary")
        raw = (tokenizer.decode_bytes(ids[i : i + BLOCK]) for i in range(0, len(ids), BLOCK))
        for text in codecs.iterdecode(raw, "utf-8", "replace"):
            sys.stdout.buffer.write(utf8(text))
    sys.stdout.flush()

def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    gc.disable()  # nothing here makes cycles, and many small objects are made
    args = parse_args()
    try:
        run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, KeyError, RuntimeError, MemoryError, regex.error) as error:
        print(f"bpe.py: error: {str(error) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)

if __name__ == "__main__":
    main()
