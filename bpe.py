"""Byte-pair encoding, from raw text to token ids: the tokenizer stage.

    python bpe.py                                  # train and encode Python's own standard library
    python bpe.py show "Tokenizers aren't magic."  # one text through four kinds of tokenizer
    python bpe.py train  --input data/ts/train.txt --vocab_size 10000 --out data/ts
    python bpe.py encode --tokenizer data/ts --input data/ts/train.txt --out data/ts
    python bpe.py decode --tokenizer data/ts --input data/ts/val.bin --max_tokens 50

A language model reads integers. One per character or byte makes long sequences, one per word can
not say a new word. Byte-pair encoding (Gage 1994; Sennrich et al. 2016; on bytes: Radford et al.
2019) makes a token of the most frequent pair of neighbours, again and again, from 256 bytes on.
"""
import argparse, base64, codecs, collections, contextlib, ctypes, functools, gc, gzip, heapq
import io, itertools, json, os, pathlib, re, sys, unicodedata

if __name__ == "__main__":  # numpy need not start threads that nobody uses: 0.07 CPU-seconds
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np, regex
utf8 = functools.partial(str.encode, encoding="utf-8", errors="replace")
EOT = "<|endoftext|>"  # stands between documents in .txt files; its id ends every document

# ---- Three simple tokenizers: each has encode(text) -> ids and decode(ids) -> text.
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
        self.vocab_size = len(self.words)
    def encode(self, text):
        ids = {word: i for i, word in enumerate(self.words)}
        return [ids.get(word, 0) for word in regex.findall(PATTERNS["gpt2"], text)]
    def decode(self, ids):
        return "".join(self.words[i] for i in ids)

# ---- Byte-pair encoding as in a textbook.
def merge_pair(word, pair):
    """Join each occurrence of the pair, from left to right: of aaab, the pair aa makes aa a b."""
    out, i = [], 0
    while i < len(word):
        n = 2 if word[i : i + 2] == pair else 1
        out.append(b"".join(word[i : i + n]))
        i += n
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
        # of equally frequent ones the greatest, whatever the order of the text or a dictionary
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return merges

# ---- Pre-tokens: words, numbers, punctuation, white space, which merges never cross.
HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": HEAD + r"|\p{N}{1,3}" + TAIL,  # GPT-4, Llama 3
    "qwen": HEAD + r"|\p{N}" + TAIL,  # Qwen 2 and 3: each digit by itself
    "o200k": "".join(rf"[^\r\n\p{{L}}\p{{N}}]?{word}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"  # GPT-4o:
                     for word in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*"))  # splits camelCase
    + r"\p{N}{1,3}" + TAIL.replace(r"[\r\n]*", r"[\r\n/]*"),
    "char": r"[\s\S]",  # every character by itself, as nanoGPT's character-level models have it
}

def split_by(texts, step):
    """Texts, cut into what a pattern matches and what lies between. Raises TimeoutError."""
    pieces = []
    for text in texts:
        at = 0
        for match in step.finditer(text, timeout=1 + len(text) / 1e5):
            pieces += text[at : match.start()], match[0]
            at = match.end()
        pieces.append(text[at:])
    return [*filter(None, pieces)]

def split(texts, patterns):
    """Texts -> for each the list of its pre-tokens, by the patterns in turn."""
    steps = [*map(regex.compile, patterns)]
    if patterns in [[known] for known in PATTERNS.values()]:  # which match all, and in linear time
        return [*map(steps[0].findall, texts)]
    return [functools.reduce(split_by, steps, [text]) for text in texts]

def find_cuts(block, chunked=True, turn=itertools.count(1)):
    r"""Offsets from 0 on where UTF-8 is cut into chunks: around bytes 255, not in UTF-8, that end a
    text; if `chunked` where each of PATTERNS begins a pre-token: `a| b`, `a|.` (no '), `.\n|a`."""
    if len(block) > 1 << 15 and next(turn) % 32 == 0 and os.name == "posix":
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # else glibc keeps what is free
    a = np.frombuffer(block, np.uint8)
    cut = a == 255
    cut[1:] |= cut[:-1]
    cut[:1] = True
    if not chunked:
        return np.flatnonzero(cut)
    letter = ((a | 32) - np.uint8(97) < 26) | (a - np.uint8(48) < 10)  # what is below wraps around
    visible = a - np.uint8(33) < 94  # ASCII without space and control characters
    # what begins a character that is no white space; C2, E1, E2 and E3 may begin one that is
    solid = visible | (a - np.uint8(0xC3) < 0x1E) | (a - np.uint8(0xE4) < 0x1B)
    cut[1:] |= letter[:-1] & ~letter[1:] & (a[1:] < 128) & (a[1:] != ord("'"))
    cut[:-1] |= (a[:-1] == ord(" ")) & solid[1:]
    n = np.flatnonzero(a[1:-1] == ord("\n")) + 1
    # before it: ASCII, or a character of 3 bytes that ends unlike the white space of that length
    single = visible[n - 1] | (a[n - 3] - np.uint8(0xE3) < 13) & (a[n - 1] > 0x80)
    cut[n[single & solid[n + 1] & (a[n + 1] != ord("/"))] + 1] = True
    return np.flatnonzero(cut)

# ---- Chunks: of 2.5 million in 11 MB of stories 13,000 are distinct, and these cost the work.
LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # masks of the n low bytes
ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)

class Table:
    """A hash table, never to be full, from two uint64, not both 0, to numbers: linear probing."""
    def __init__(self, bits, default):
        self.head, self.tail = np.zeros((2, 1 << bits), np.uint64)
        self.value, self.count, self.shift = np.full(1 << bits, default), 0, np.uint64(64 - bits)

    def find(self, head, tail, add=False):
        """-> (slot of each key, or a free one; indices of new keys, which `add` puts there)."""
        slot = ((head + tail * ODD[1]) * ODD[0] >> self.shift).view(np.int64)
        miss = np.flatnonzero((self.head.take(slot) != head) | (self.tail.take(slot) != tail))
        new = [miss[:0]]
        while len(miss):
            at = slot[miss]
            free = (self.head[at] | self.tail[at]) == 0
            if add:  # all write into the free slots: the last to write into one has it
                claim, to = miss[free], at[free]
                self.head[to], self.tail[to], self.value[to] = head[claim], tail[claim], claim
                new.append(claim[self.value[to] == claim])
                free[:] = False
            miss = miss[~free & ((self.head[at] != head[miss]) | (self.tail[at] != tail[miss]))]
            slot[miss] = (slot[miss] + 1) & (len(self.head) - 1)
        self.count += sum(map(len, new))
        return slot, np.concatenate(new)

    def enter(self, block, start):
        """Chunks of a block, by offsets -> (slot of each, slots of new ones, these as bytes)."""
        end, text = np.append(start[1:], len(block)), block + bytes(23)
        words = np.ndarray(len(block) + 16, np.uint64, text, strides=1)  # 8 bytes from each place
        length = end - start  # a key is up to 15 bytes, and how many they are
        long = np.flatnonzero(length > 8)
        head = words.take(start) & LOW_BYTES.take(length, mode="clip")
        tail = length.view(np.uint64) << np.uint64(56)
        tail[long] |= words.take(start[long] + 8) & LOW_BYTES.take(length[long] - 8, mode="clip")
        long = long[length[long] > 15]  # of these a hash, which Python keys at random, and 7 bytes
        hashes = [hash(block[i:j]) for i, j in zip(start[long].tolist(), end[long].tolist())]
        head[long] = np.array(hashes, np.int64).view(np.uint64)
        slot, new = self.find(head, tail, add=True)
        chunks = [block[i:j] for i, j in zip(start[new].tolist(), end[new].tolist())]
        return slot, slot[new].tolist(), chunks

# ---- Reading documents, and worker processes.
BLOCK = 1 << 19  # bytes of text that are worked on at a time; larger ones cost page faults
NOT_TEXT = tuple(".parquet .arrow .bz2 .xz .zst .lz4 .zip .7z .tar .tgz .bin .npy .npz .pt".split())

def cut_stream(pieces, specials, chunked):
    """UTF-8 in pieces -> (blocks of about BLOCK bytes that can be tokenized alone, the byte 255 in
    place of special tokens, of which the longest wins; those found). 64 MB without a cut fail."""
    longest, buffer, enough = max(map(len, specials), default=0) + 1, bytearray(), BLOCK
    words = map(re.escape, sorted(specials, key=len, reverse=True))
    # a byte 255 that comes after a special token ends the same text; the second pattern is nowhere
    special = re.compile(b"(?:%s)\xff?" % b"|".join(words) if specials else b"\xff\xff")
    pieces = (p[i : i + BLOCK] for p in pieces for i in range(0, len(p), BLOCK))
    for piece in itertools.chain(pieces, [b""]):  # the empty one is the end
        buffer += piece
        # what follows a long text must not come into its block, whose chunks could fill a table
        ends = len(buffer) >= BLOCK and not chunked and (b"\xff" in piece or special.search(piece))
        if piece and len(buffer) < enough and not ends:
            continue
        text, size = bytes(buffer), len(buffer)
        end = max(0, size - longest) if piece else size  # what begins later may be incomplete
        found = [match for match in special.finditer(text) if match.start() <= end]
        at = found[-1].end() if found else 0
        cut = max(at, text.rfind(b"\xff", at) + 1) if piece else size
        if chunked and piece:
            low = max(cut, end - (1 << 16 if size < 3 * BLOCK else 4 * BLOCK))  # or all that is new
            places = find_cuts(text[low:end], True)
            cut = low + int(places[-1]) if (places > 3).any() else cut  # it must see what is before
        if cut:
            yield special.sub(b"\xff", text[:at]) + text[at:cut], [match[0] for match in found]
        elif chunked and size > 1 << 26:
            raise ValueError("64 MB of text without a place where it may be cut")
        del buffer[:cut]
        enough = len(buffer) + max(BLOCK, 0 if chunked else len(buffer))

def read_blocks(paths, specials, chunked, text_key):
    """Files -> blocks of `cut_stream`. What is no Unicode becomes U+FFFD; JSON lines (.jsonl,
    .ndjson, .json) have no special tokens. OSError, ValueError."""
    for path in paths:
        size, name = os.path.getsize(path), os.fspath(path).lower()
        stem, known = name.removesuffix(".gz"), specials
        try:
            if stem.endswith(NOT_TEXT):
                raise ValueError("neither text nor JSON lines, nor a .gz of them")
            with open(path, "rb") if name == stem else gzip.open(path) as raw:
                wide = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                file = io.TextIOWrapper(raw, "utf-16" if wide else "utf-8", "replace", newline="\n")
                pieces = itertools.chain(map(utf8, iter(lambda: file.read(BLOCK), "")), [b"\xff"])
                if stem.endswith((".jsonl", ".ndjson", ".json")):
                    lines = (json.loads(line.lstrip("\ufeff")) for line in file if line.strip())
                    pieces = (utf8(line[text_key]) + b"\xff" for line in lines if line[text_key])
                    known = ()
                for n, (block, _) in enumerate(cut_stream(pieces, known, chunked)):
                    if n % 32 == 31 and sys.stderr.isatty():  # the next line replaces it
                        print(f"{n * BLOCK >> 20} MB read", end="\r", file=sys.stderr, flush=True)
                    yield block
            if os.path.getsize(path) < size:
                raise ValueError("it became shorter while it was read")
        except Exception as error:
            raise ValueError(f"{path}: {error!r}") from None

def parallel(job, items, num_proc):
    """map(job, items), by `num_proc` processes, which get at most 2 * num_proc items ahead."""
    if num_proc < 2:
        yield from map(job, items)
        return
    import concurrent.futures, multiprocessing
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with concurrent.futures.ProcessPoolExecutor(num_proc, context, start_worker, (job,)) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(do_job, item))
            if len(waiting) == 2 * num_proc:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)

def start_worker(job):  # leave Ctrl-C to the parent, and end when it ends
    import multiprocessing, signal, threading
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, do_job.job = multiprocessing.parent_process(), job
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()

def do_job(item):
    return do_job.job(item)

@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the name `path` only once it is whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)

# ---- Training.
def learn_merges(words, n_merges):
    """What `learn_merges_naive` learns, thousands of times faster. {bytes: count} -> merges. All
    words lie end to end in one array, a doubly linked list; a merge touches only the places of its
    pair, known since its younger token came into being, after which counts only fall. Many merges
    go together, if none begins with the end of another, or makes a pair as frequent as a later."""
    words = {word: n for word, n in words.items() if len(word) > 1}
    token = np.frombuffer(b"\xff" + b"\xff".join([*words, b""]), np.uint8).astype(np.int32)
    token[token == 255] = -1  # between words; -2 is what was merged into the one before
    weight = np.repeat(np.array([0, *words.values()]), [1, *(len(word) + 1 for word in words)])
    size = len(token)  # weight: how often the word of a place is there
    next_, prev = np.arange(1, size + 1, dtype=np.int32), np.arange(-1, size - 1, dtype=np.int32)
    pair = np.full(size, -1, np.int32)  # number of the pair that begins at a place, or -1
    count, key = np.zeros((2, 3 * size + 1), np.int64)  # of pairs, by number; left << 32 | right
    where, names, merges = [], [bytes([b]) for b in range(256)], []  # where: the places of each
    def enter(places):  # number the pairs that begin at these places, all of them new
        keys = token[places].astype(np.int64) << 32 | token[next_[places]]
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        edge = np.flatnonzero(np.diff(keys, prepend=-1))
        end, new = np.append(edge[1:], len(keys)), np.arange(len(where), len(where) + len(edge))
        count[new] = np.add.reduceat(weight[places], edge) if len(edge) else 0
        key[new], pair[places] = keys[edge], np.repeat(new, end[: len(edge)] - edge)
        where.extend([places[i:j] for i, j in zip(edge.tolist(), end.tolist())])
        return new
    enter(np.flatnonzero((token[:-1] >= 0) & (token[1:] >= 0)))
    frequent, threshold, width = np.zeros(0, int), int(count.max()) + 1, 1
    while len(merges) < n_merges:
        frequent = frequent[count[frequent] >= threshold]
        while len(frequent) < width and threshold > 1:
            threshold = max(1, threshold * 9 // 10)
            frequent = np.flatnonzero(count[: len(where)] >= threshold)
        if not len(frequent):
            break
        n = count[frequent]
        top = frequent[n >= np.partition(n, -width)[-width]] if len(n) > width else frequent
        top = zip(*(values[top].tolist() for values in (count, key)), top.tolist())
        top = [(n, names[k >> 32], names[k & 0xFFFFFFFF], i) for n, k, i in top]
        top = np.array([i for *_, i in sorted(top, reverse=True)[: n_merges - len(merges)]][:width])
        left, right = key[top] >> 32, key[top] & 0xFFFFFFFF
        clash = np.tril((left[:, None] == right) | (right[:, None] == left), -1).any(1)
        top = top[: clash.argmax()] if clash.any() else top
        places = [where[i] for i in top.tolist()]
        at, owner = np.concatenate(places), np.repeat(np.arange(len(top)), [*map(len, places)])
        valid = pair[at] == top[owner]
        at, owner = at[valid], owner[valid]
        # a bound on counts of pairs that each creates: weights of neighbours, by their low byte
        bound = np.zeros(len(top))
        for side in token[prev[at]], token[next_[next_[at]]]:
            heap = np.bincount(owner << 8 | side & 255, weight[at] * (side >= 0), len(top) << 8)
            bound = np.maximum(bound, heap.reshape(-1, 256).max(1))
        late = np.append(np.maximum.accumulate(bound)[:-1] >= count[top[1:]], True)
        k = int(late.argmax()) + 1
        at, owner, left, right = at[owner < k], owner[owner < k], left[:k], right[:k]
        width = min(2 * k + 2, 256)  # about as many as went well this time
        if (left == right).any():  # of a run aaaaa every second
            at, owner = at[order := np.argsort(at)], owner[order]
            index, begins = np.arange(len(at)), np.append(True, next_[at[:-1]] != at[1:])
            odd = (index - np.maximum.accumulate(np.where(begins, index, 0))) % 2
            at, owner = at[odd == 0], owner[odd == 0]
        second = next_[at]
        before, after = prev[at], next_[second]
        token[second] = -2
        before = before[token[before] >= 0]  # else a word's start, or a merge: counted as `after`
        lost = np.append(before, second)  # where no pair begins, its number is -1, of no pair
        np.subtract.at(count, pair[lost], weight[lost])
        count[top[:k]], pair[at], pair[second] = 0, -1, -1
        token[at], next_[at], prev[after] = owner + len(names), after, at
        frequent = np.append(frequent, enter(np.append(before, at[token[after] >= 0])))
        merges += [(names[a], names[b]) for a, b in zip(left.tolist(), right.tolist())]
        names += [a + b for a, b in merges[len(names) - 256 :]]
    return merges

def count_pretokens(step, source, pattern, specials, text_key, first):
    """{pre-token: how often} of each `step`-th block. All processes read all: that is cheapest."""
    chunked = pattern in PATTERNS.values()
    blocks = (read_blocks(source, specials, chunked, text_key) if hasattr(source, "__len__") else
              (b for b, _ in cut_stream((utf8(t) + b"\xff" for t in source), specials, chunked)))
    table, slots, chunks, counts = Table(20, 0), [], [], collections.defaultdict(int)
    for block in itertools.chain(itertools.islice(blocks, first, None, step), [b"\xff"]):
        at, new_slots, new_chunks = table.enter(block, find_cuts(block, chunked))
        table.value[new_slots] = 0
        np.add.at(table.value, at, 1)
        slots += new_slots
        chunks += [chunk.decode("utf-8", "ignore") for chunk in new_chunks]  # 255 is no text
        if table.count > 1 << 18 or not chunked or block == b"\xff":  # to bound memory; the end
            for pretokens, n in zip(split(chunks, [pattern]), table.value[slots].tolist()):
                for pretoken in pretokens:
                    counts[pretoken] += n
            table, slots, chunks = Table(20, 0), [], []
    return counts

def train_bpe(input, vocab_size, special_tokens=(EOT,), pattern="gpt2", num_proc=1,
              text_key="text"):
    """A file, a list of files (if one exists), or texts; a name from PATTERNS or a regex -> ({id:
    bytes}: 256 bytes, merges, special tokens; merges in order, as pairs). ValueError, OSError."""
    source = [input] if isinstance(input, (str, os.PathLike)) else input
    texts = source is input and not (hasattr(input, "__len__") and any(map(os.path.exists, input)))
    if texts or not all(map(os.path.isfile, source)):
        source, num_proc = iter(input) if texts else source, 1  # a pipe can be read once, too
    specials, pattern = [*map(utf8, dict.fromkeys(special_tokens))], PATTERNS.get(pattern, pattern)
    n_merges = vocab_size - 256 - len(specials)
    if n_merges < 0 or b"" in specials:
        raise ValueError(f"vocab_size {vocab_size} is too small, or a special token is empty")
    job = functools.partial(count_pretokens, num_proc, source, pattern, specials, text_key)
    words = collections.Counter()
    for counts in parallel(job, range(num_proc), num_proc):
        words.update(counts)
    merges = learn_merges({utf8(word): n for word, n in words.items()}, n_merges)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return dict(enumerate(tokens + specials)), merges

# ---- The tokenizer. In its JSON bytes are characters: printable Latin-1 itself, others U+0100...
SAME = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTES = "".join(chr(b if b in SAME else 256 + len({*range(b)} - SAME)) for b in range(256))
TIKTOKEN = {  # OpenAI's .tiktoken files, by the beginning of their names: pattern, special tokens
    **dict.fromkeys(("gpt2", "r50k", "p50k"), ("gpt2", {EOT: 50256})),
    "cl100k": ("cl100k", {EOT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                          "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
    "o200k": ("o200k", {EOT: 199999, "<|endofprompt|>": 200018})}
ENDS = (EOT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")  # the first of these is eot_id

class Tokenizer:
    """Byte-level BPE: encode text by the merges of a vocabulary, decode ids to text.
    vocab: {id: bytes}; merges: list of pairs of bytes, the most urgent first; None: any two tokens
        that make a third one merge, that of the lowest id first (OpenAI's rule)
    special_tokens: list of strings, of which new ones get the next ids, or {string: id}
    pattern: a name from PATTERNS, a regular expression, or a list of those, applied in turn
    ignore_merges: a pre-token in the vocabulary is that token. nfc: text is brought into NFC"""
    def __init__(self, vocab, merges, special_tokens=(), pattern="gpt2", ignore_merges=False,
                 nfc=False):
        self.vocab, self.special_tokens, tied = dict(vocab), {}, merges is None
        self.ignore_merges, self.nfc, self.text, self.table = ignore_merges, nfc, None, None
        id_of = {token: i for i, token in reversed(self.vocab.items())}
        lengths = sorted({*map(len, id_of)})  # only these are tried, since a token may be very long
        self.merges = merges = [
            (token[:n], token[n:]) for token in sorted(id_of, key=id_of.get) for n in lengths
            if n < len(token) and token[:n] in id_of and token[n:] in id_of] if tied else merges
        for token in special_tokens or ():
            i = id_of.get(utf8(token), max(self.vocab, default=-1) + 1)
            i = special_tokens[token] if isinstance(special_tokens, dict) else i
            if not token or self.vocab.setdefault(i, utf8(token)) != utf8(token):
                raise ValueError(f"special token {token!r} is empty, or has the id {i} of another")
            self.special_tokens[token] = i
        self.vocab_size, least = max(self.vocab, default=-1) + 1, min(self.vocab, default=0)
        if {*map(type, self.vocab)} - {int} or least < 0 or self.vocab_size > 1 << 21:
            raise ValueError("an id is not a whole number from 0 to 2**21 - 1")
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")  # of ids in a .bin
        self.eot_id = next((self.special_tokens[s] for s in ENDS if s in self.special_tokens), None)
        patterns = [pattern] if isinstance(pattern, str) else pattern
        self.patterns = [PATTERNS.get(name, name) for name in patterns]
        split([], self.patterns)  # raises regex.error
        self.chunked = self.patterns in [[known] for known in PATTERNS.values()]
        # of merging: ids of bytes (255 stands between texts), ranks of pairs, the first if twice
        id_of[b"\xff"] = self.end = self.vocab_size if self.eot_id is None else self.eot_id
        specials = {*map(utf8, self.special_tokens)}
        self.whole = {t: i for t, i in id_of.items() if t not in specials} if ignore_merges else {}
        self.byte_id = np.array([id_of.get(bytes([b]), -1) for b in range(256)], np.int32)
        merged, rank = np.array([id_of[a + b] for a, b in merges], np.int32), np.arange(len(merges))
        if tied:  # pairs that make the same token are equally urgent
            merged, rank = np.unique(merged, return_inverse=True)
        self.merged, self.never = merged, len(merged)
        pairs = [(id_of[a], id_of[b]) for a, b in merges]
        self.ranks = dict(zip(reversed(pairs), rank[::-1].tolist()))
        self.pairs = Table((4 * len(pairs) + 255).bit_length(), np.int32(self.never))
        keys = np.array([*self.ranks], np.uint64).reshape(-1, 2).T + np.uint64(1)
        self.pairs.value[self.pairs.find(*keys, add=True)[0]] = [*self.ranks.values()]

    def encode(self, text, special=True):
        """str -> ids; bytes without one are left out. special: see special tokens in the text."""
        return list(self.encode_iterable([text], special))
    encode_ordinary = functools.partialmethod(encode, special=False)

    def encode_iterable(self, iterable, special=True):
        """Ids of the concatenation of strings, lazily; with PATTERNS in constant memory."""
        specials = {utf8(token): i for token, i in self.special_tokens.items() if special}
        for block, found in cut_stream(map(utf8, iterable), specials, self.chunked):
            ids = self.encode_block(block)
            ids[ids == self.end] = [specials[token] for token in found]
            yield from ids.tolist()

    def encode_block(self, block):
        """UTF-8, the byte 255 between texts -> ids, int32, with `end` between texts."""
        start, table, self.table = find_cuts(block, self.chunked), self.table, None
        if not table or table.count + len(start) > 1 << 19 or len(self.ids) > 1 << 22:
            table, self.ids = Table(20, 0), np.zeros(0, np.int32)  # bounds the memory
        slots, new_slots, chunks = table.enter(block, start)
        if chunks:
            texts = [chunk.decode("utf-8", "surrogateescape") for chunk in chunks]
            texts = [unicodedata.normalize("NFC", text) for text in texts] if self.nfc else texts
            found = split(texts, self.patterns)
            words = itertools.chain.from_iterable(found)
            ids, n = self.merge([word.encode("utf-8", "surrogateescape") for word in words])
            # a chunk's value is where its ids begin in self.ids, and how many it has
            n = np.add.reduceat(n, np.cumsum([0, *map(len, found[:-1])]))
            table.value[new_slots] = len(self.ids) + np.cumsum(n) - n << 32 | n
            self.ids = np.append(self.ids, ids)
        value, self.table = table.value.take(slots), table  # (after an error it would be half full)
        first, n = value >> 32, value & 0xFFFFFFFF
        place = np.repeat(first - np.cumsum(n) + n, n)
        return self.ids.take(place + np.arange(len(place)))

    def rank(self, left, right):  # of the merges of pairs of ids, int32; -1 merges with nothing
        pairs = ((ids + 1).astype(np.uint64) for ids in (left, right))
        return self.pairs.value.take(self.pairs.find(*pairs)[0])

    def merge(self, words):
        """BPE of a list of words as bytes -> (ids of all, int32, and how many each has)."""
        length = np.array([*map(len, words)])
        start = np.cumsum(length) - length
        ids = self.byte_id[np.frombuffer(b"".join(words), np.uint8)]  # -1: no token begins here
        if self.whole:
            whole = np.array([self.whole.get(word, -1) for word in words])
            ids[np.repeat(whole >= 0, length)] = -1
            ids[start[whole >= 0]] = whole[whole >= 0]
        total = np.append(0, np.cumsum(ids >= 0))
        start, length, ids = total[start], total[start + length] - total[start], ids[ids >= 0]
        order = np.argsort(length)[(length < 2).sum() : (length <= 1000).sum()]
        for i in range(0, len(order), 1 << 13):  # words of similar lengths together
            word = order[i : i + (1 << 13)]
            self.merge_short(ids, start[word], length[word])
        for word in np.flatnonzero(length > 1000):
            self.merge_long(ids, slice(start[word], start[word] + length[word]))
        total = np.append(0, np.cumsum(ids >= 0))
        return ids[ids >= 0], total[start + length] - total[start]

    def merge_short(self, out, start, length):
        """`merge` for words of up to 1000 tokens, each a column of an array. In a round each word
        makes its merge of lowest rank, of several the leftmost."""
        n, never = len(start), self.never << 10
        row = np.arange(length.max() + 1, dtype=np.int32)[:, None]  # the last one is empty
        place = row + start
        ids = np.where(row < length, out.take(place, mode="clip"), np.int32(-1)).reshape(-1)
        rank = self.rank(ids, np.roll(ids, -n)).reshape(-1, n) << 10 | row
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
        out[place[row < length]] = ids.reshape(-1, n)[row < length]

    def merge_long(self, out, place):
        """`merge` for a word of any length: a heap of pairs, and lists that link the tokens."""
        ids, rank_of = [*out[place].tolist(), -1], self.ranks.get
        after, before = [*range(1, len(ids)), 0], [*range(-1, len(ids) - 1)]
        heap = sorted((rank_of(pair, self.never), i) for i, pair in enumerate(zip(ids, ids[1:])))
        while heap[0][0] < self.never:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if rank_of((ids[i], ids[j])) == rank:  # else one of the two has been merged meanwhile
                ids[i], ids[j], after[i] = int(self.merged[rank]), -1, after[j]
                before[after[j]] = i
                for k in (before[i], i):
                    heapq.heappush(heap, (rank_of((ids[k], ids[after[k]]), self.never), k))
        out[place] = ids[:-1]

    def decode_bytes(self, ids):
        """Ids (a list, an array or a tensor) -> bytes; ids outside the vocabulary are nothing."""
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
            raise ValueError("a special token is a character that stands for a byte, as é does")
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        steps = [dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
                 for pattern in self.patterns]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [dict(flags, id=i, content=s, special=True) for s, i in self.special_tokens.items()]
        model = {"type": "BPE", "ignore_merges": self.ignore_merges,
                 "vocab": {name[token]: i for i, token in sorted(self.vocab.items())},
                 "merges": [f"{name[a]} {name[b]}" for a, b in self.merges]}
        parts = {"version": "1.0", "added_tokens": added, "decoder": level, "model": model,
                 "normalizer": {"type": "NFC"} if self.nfc else None,
                 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]}}
        return json.dumps(parts, ensure_ascii=False, indent=1)

    def save(self, path):
        """Write tokenizer.json to `path`, or into it if it is a folder."""
        with replacing(f"{path}/tokenizer.json" if os.path.isdir(path) else path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def from_json(cls, text):
        """The text of a tokenizer.json -> Tokenizer. Raises ValueError if it is none."""
        try:
            data = json.loads(text)
            model, steps, added = data["model"], data["pre_tokenizer"], data["added_tokens"]
            flags = [t.get(f, False) for t in added for f in ("single_word", "lstrip", "rstrip")]
            if (any(flag is not False for flag in flags) or '"ByteLevel"' not in json.dumps(steps)
                    or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
                    or data.get("normalizer") not in (None, {"type": "NFC"})):
                raise ValueError("it is no plain byte-level BPE")
            specials = {token["content"]: token["id"] for token in added}
            self = cls(*read_names(model["vocab"], model["merges"], specials), specials,
                       read_steps(steps), model.get("ignore_merges", False), data.get("normalizer"))
        except Exception as error:
            raise ValueError(f"no tokenizer.json that can be read: {error!r}") from None
        self.text = text
        return self

    @classmethod
    def from_file(cls, path, special_tokens=None, pattern=None):
        """Read a tokenizer.json, vocab.json with merges.txt beside it, a folder of either, or
        .tiktoken ranks; these need special tokens and pattern, if not GPT-2's or OpenAI's."""
        path = pathlib.Path(path)
        if path.is_dir():
            path /= "tokenizer.json" if (path / "tokenizer.json").exists() else "vocab.json"
        text, family = path.read_text("utf-8"), re.split("[_.]", path.name)[0]
        if path.suffix == ".tiktoken":
            if not pattern and family not in TIKTOKEN:
                raise ValueError(f"{path} is none of {', '.join(TIKTOKEN)}: give its pattern")
            known, specials = TIKTOKEN.get(family, (pattern, [EOT]))
            lines = (line.split() for line in text.splitlines() if line.strip())
            vocab = {int(i): base64.b64decode(token) for token, i in lines}
            return cls(vocab, None, special_tokens or specials, pattern or known, True)
        if path.name != "vocab.json":
            if pattern or special_tokens:
                raise ValueError(f"{path} has its own pattern and special tokens: give none")
            return cls.from_json(text)
        lines, names = path.with_name("merges.txt").read_text("utf-8").split("\n"), json.loads(text)
        merges = [line for line in lines if line and line[:9] != "#version:"]
        specials = [s for s in ENDS if s in names] if special_tokens is None else special_tokens
        return cls(*read_names(names, merges, specials), specials, pattern or "gpt2")

def read_names(names, merges, specials):
    """Names (of BYTES, but special tokens are text) -> ({id: bytes}, merges as pairs of bytes)."""
    table, encode = codecs.charmap_build(BYTES), codecs.charmap_encode
    if clash := [n for n in specials if n in names and n in BYTES and not n.isascii()]:
        raise ValueError(f"the special token {clash[0]!r} is a character that stands for a byte")
    token = {n: utf8(n) if n in specials else encode(n, "strict", table)[0] for n in names}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return {i: token[name] for name, i in names.items()}, [(token[a], token[b]) for a, b in pairs]

def read_steps(part):
    """The "pre_tokenizer" of a tokenizer.json -> patterns, which isolate what they match."""
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in read_steps(inner)]
    if part["type"] == "ByteLevel" and part["add_prefix_space"] is False:
        return [PATTERNS["gpt2"]] if part.get("use_regex", True) else []
    if part["type"] == "Digits":
        return [r"\p{N}" if part["individual_digits"] else r"\p{N}+"]
    if part["type"] == "Split" and part["behavior"] == "Isolated":
        return [part["pattern"].get("Regex") or regex.escape(part["pattern"]["String"])]
    raise ValueError(f"the pre-tokenizer {json.dumps(part)[:99]} is not supported")

# ---- .bin files: a header of 256 int32, then ids.
def read_bin(path):
    """A .bin -> (memory-mapped ids, header; None: nanoGPT's plain uint16): [0], [1] 20240520, 1 for
    uint16 or 20240801, 7 for uint32; [2] tokens, at most 2^31 - 1; [3] vocabulary size; [4] id of
    EOT; [5] + 2^32 [6] bytes of text. Raises ValueError for what is none, OSError."""
    header, size = np.fromfile(path, "<i4", 256), os.path.getsize(path)
    dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get((*header[:2].tolist(),))
    if dtype and len(header) == 256:
        n = int(header[2]) if 0 < header[2] < 2**31 - 1 else (size - 1024) // int(dtype[2])
        return np.memmap(path, dtype, "r", 1024, (n,)) if n else np.zeros(0, dtype), header
    ids = np.memmap(path, "<u2", "r", shape=size // 2)
    text = ids[:500].tobytes().decode("utf-8", "replace").rstrip("\ufffd")  # ids have zero bytes
    wide = len(ids) > 3 and not all(ids[i : 1 << 20 : 2].any() for i in (0, 1))  # 4 or 8 bytes each
    if size % 2 or wide or not {"\0", "\ufffd"} & {*text} or ids[0] == 0x4E93:  # (.npy: "\x93N")
        raise ValueError(f"{path} is no .bin: no header, and no uint16 ids as nanoGPT's")
    return ids, None

def encode_files(tokenizer, paths, out, val_fraction=0.01, val_paths=(), num_proc=1,
                 text_key="text"):
    """Encode files into out/train.bin and out/val.bin, each document ended by the end-of-text id.
    Every 1/val_fraction-th goes to val.bin, or that is made of val_paths. ValueError, OSError."""
    if tokenizer.eot_id is None:
        raise ValueError(f"the tokenizer has no {EOT} to end documents with")
    sizes = np.array([len(tokenizer.vocab.get(i, b"")) for i in range(tokenizer.vocab_size)])
    sizes[tokenizer.eot_id] = 0  # of an id: how many bytes of text it stands for
    names = ["train.bin", "val.bin"] if val_paths or val_fraction else ["train.bin"]
    total, given = np.zeros((len(names), 2), np.int64), 0  # tokens, bytes of text; those read
    with contextlib.ExitStack() as stack:
        bins = [stack.enter_context(replacing(os.path.join(out, name))) for name in names]
        for file in bins:
            file.write(bytes(1024))
        for files, fraction in ((paths, 0 if val_paths else val_fraction), (val_paths, 1)):
            seen, blocks = 0, read_blocks(files, [EOT.encode()], tokenizer.chunked, text_key)
            blocks, same = itertools.tee(blocks)
            for ids, block in zip(parallel(tokenizer.encode_block, blocks, num_proc), same):
                ends = np.flatnonzero(ids == tokenizer.eot_id) + 1
                share = np.floor((seen + np.arange(len(ends) + 2)) * fraction)
                to_val = np.repeat(np.diff(share) > 0, np.diff(ends, prepend=0, append=len(ids)))
                seen, given = seen + len(ends), given + len(block) - len(ends)
                for i, file in enumerate(bins):
                    mine = ids[to_val == i].astype(tokenizer.dtype)
                    file.write(mine)
                    total[i] += len(mine), sizes.take(mine).sum()
        if not total[:, 0].all():
            raise ValueError("too few documents for train.bin and val.bin both")
        for name, file, (n, size) in zip(names, bins, total.tolist()):
            magic = (20240520, 1) if tokenizer.dtype.itemsize == 2 else (20240801, 7)
            header = [*magic, min(n, 2**31 - 1), tokenizer.vocab_size, tokenizer.eot_id]
            file.seek(0)
            file.write(np.array([*header, size & 0xFFFFFFFF, size >> 32], "<u4"))
            print(f"{out}/{name}: {n:,} tokens, {size:,} bytes of text, {size / n:.2f} per token")
    if (lost := given - total[:, 1].sum()) and not tokenizer.nfc:  # (which changes how many)
        print(f"{lost:,} bytes of text are left out: they have no tokens", file=sys.stderr)

# ---- The command line.
def main():  # errors become one line, and exit code 1 or, for usage, 2
    parser = argparse.ArgumentParser(description="Byte-level BPE. Alone: an example in data/stdlib")
    parser.error = lambda message: parser.exit(2, f"bpe.py: error: {message} (see --help)\n")
    add = parser.add_argument
    add("command", nargs="?", choices=["train", "encode", "decode", "show"])
    add("text", nargs="?", default="Tokenizers aren't magic.", help="for show")
    add("--input", nargs="+", help=".txt with <|endoftext|> between documents, .jsonl, .gz; a .bin")
    add("--text_key", default="text", help="what holds the text in JSON lines (text)")
    add("--out", help="folder for tokenizer.json, train.bin and val.bin")
    add("--tokenizer", default="data/stdlib", help="tokenizer.json or vocab.json, or their folder")
    add("--vocab_size", type=int, default=10000, help="tokens to learn (10000)")
    add("--pattern", help=f"{', '.join(PATTERNS)} or a regular expression (gpt2)")
    add("--special_tokens", nargs="*", default=[EOT], help=f"strings, one token each ({EOT})")
    add("--val_fraction", type=float, default=0.01, help="of the documents, for val.bin (0.01)")
    add("--val_input", default=(), nargs="+", help="files of which to make val.bin instead")
    add("--max_tokens", type=int, help="decode so many (all)")
    add("--num_proc", type=int, help="processes (by the size of the input)")
    args = parser.parse_args()
    command, specials, pattern = args.command, args.special_tokens, args.pattern or "gpt2"
    if command is None:
        root, odd = pathlib.Path(os.__file__).parent, r"-packages|\btests?\b|idle_test"
        files = (str(path.relative_to(root)) for path in sorted(root.rglob("*.py")))
        args.input = [root / name for name in files if not re.search(odd, name)]
        args.out, args.vocab_size = "data/stdlib", 4096
    if command != "show" and not (args.input and (args.out or command == "decode")):
        parser.error("--input is missing, or --out")
    gc.disable()  # nothing here makes cycles, and many small objects are made
    try:
        size = sum(map(os.path.getsize, args.input or ())) >> (23 if command == "train" else 26)
        more = args.num_proc or max(1, min(os.cpu_count(), size)), args.text_key
        if command in ("encode", "decode", "show"):
            tokenizer = Tokenizer.from_file(args.tokenizer, pattern=args.pattern)
        elif pattern == "char":  # the vocabulary is the characters of the text
            blocks = read_blocks(args.input, [EOT.encode()], True, args.text_key)
            chars = sorted({c for block in blocks for c in block.decode("utf-8", "ignore")})
            tokenizer = Tokenizer(dict(enumerate(map(utf8, chars))), [], specials, "char", True)
        else:
            learned = train_bpe(args.input, args.vocab_size, specials, pattern, *more)
            tokenizer = Tokenizer(*learned, specials, pattern)
        if command in (None, "encode"):
            encode_files(tokenizer, args.input, args.out, args.val_fraction, args.val_input, *more)
        if command in (None, "train", "encode"):
            tokenizer.save(f"{args.out}/tokenizer.json")  # beside the .bin files
            print(f"{args.out}/tokenizer.json: {len(tokenizer.vocab):,} tokens")
        if command == "decode":
            for ids in (read_bin(path)[0][: args.max_tokens] for path in args.input):
                if ids.max(initial=0) >= tokenizer.vocab_size:
                    raise ValueError(f"id {ids.max()} is not in the vocabulary")
                for i in range(0, len(ids), BLOCK):
                    sys.stdout.buffer.write(tokenizer.decode_bytes(ids[i : i + BLOCK]))
        kinds = CharTokenizer(), ByteTokenizer(), WordTokenizer(args.text), tokenizer
        for kind in kinds if command == "show" else ():
            ids = kind.encode(args.text)
            print(f"{type(kind).__name__}, {kind.vocab_size:,} tokens: {len(ids)} ids\n  {ids}\n  "
                  + "|".join(kind.decode([i]) for i in ids))
        sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError):  # or `| head` has seen enough
        os._exit(130)
    except Exception as error:  # (what a stranger's file can raise varies)
        sys.exit(f"bpe.py: error: {error}")

if __name__ == "__main__":
    main()
