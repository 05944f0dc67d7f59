"""
Byte-pair encoding, from raw text to token ids: the tokenizer stage.

    python bpe.py                                  # train and encode Python's own standard library
    python bpe.py show "Tokenizers aren't magic."  # one text through four kinds of tokenizer
    python bpe.py train  --input data/ts/train.txt --vocab_size 10000 --out data/ts
    python bpe.py encode --tokenizer data/ts/tokenizer.json --input data/ts/train.txt --out data/ts
    python bpe.py decode --tokenizer data/ts/tokenizer.json --input data/ts/val.bin --max_tokens 50

A language model reads integers. How should text become integers? One per character needs a
vocabulary of a hundred thousand and still makes long sequences; one per byte makes even longer
ones; one per word can not say a new word. Byte-pair encoding (Gage 1994; Sennrich et al. 2016;
on bytes: Radford et al. 2019) starts from the 256 bytes, so nothing is ever unknown, and adds
one token at a time: the most frequent pair of neighbours becomes a token of its own.

Files: tokenizer.json is Hugging Face's format for byte-level BPE. A .bin is a header of 256 int32
followed by the token ids as uint16 or uint32 (see `BinWriter`).
"""

import argparse
import array
import base64
import codecs
import collections
import contextlib
import functools
import gzip
import heapq
import itertools
import json
import multiprocessing
import os
import signal
import sys
import sysconfig
import time
import unicodedata
import zlib

import numpy as np
import regex

EOT = "<|endoftext|>"  # stands between documents in .txt files; its id ends every document

# -----------------------------------------------------------------------------
# 1. Three simple tokenizers. Each has encode(text) -> ids and decode(ids) -> text.


class CharTokenizer:
    """One token per character: its Unicode code point.

    >>> CharTokenizer().encode("hé")
    [104, 233]
    """

    vocab_size = 0x110000  # 1.1 million: most of the embedding table would never be trained

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class ByteTokenizer:
    """One token per byte of UTF-8: a tiny vocabulary, but the longest sequences.

    >>> ByteTokenizer().encode("hé")
    [104, 195, 169]
    """

    vocab_size = 256

    def encode(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class WordTokenizer:
    """One token per word of a training text; every other word becomes UNK.

    >>> t = WordTokenizer("to be or not to be")
    >>> t.decode(t.encode("to be or bee"))
    'to be or<UNK>'
    """

    UNK = "<UNK>"

    def __init__(self, corpus):
        self.words = [self.UNK, *dict.fromkeys(regex.findall(PATTERNS["gpt2"], corpus))]
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
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


# -----------------------------------------------------------------------------
# 2. Byte-pair encoding as in a textbook.


def count_pairs(words):
    """How often each pair of neighbouring tokens occurs.

    words: {tuple of tokens: how often that word occurs in the corpus}
    >>> sorted(count_pairs({(b"a", b"a", b"a"): 1, (b"a", b"b"): 5}).items())
    [((b'a', b'a'), 2), ((b'a', b'b'), 5)]
    """
    counts = collections.Counter()
    for word, n in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] += n
    return counts


def merge_pair(word, pair):
    """Replace each occurrence of the pair by their concatenation, from left to right.

    >>> merge_pair((b"a", b"a", b"a", b"b"), (b"a", b"a"))
    (b'aa', b'a', b'b')
    """
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
    """The whole algorithm. Every merge looks at every word again, so it is slow: hours for what
    `learn_merges` does in a second, with equal results.

    words: {bytes: count}. Returns the merges in order, list[tuple[bytes, bytes]].
    """
    words = {tuple(bytes([b]) for b in word): n for word, n in words.items()}
    merges = []
    while len(merges) < n_merges and (counts := count_pairs(words)):
        # the most frequent pair; of equally frequent ones the lexicographically greatest, so
        # that the outcome does not depend on the order of the text or of a dictionary
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return merges


# -----------------------------------------------------------------------------
# 3. Pre-tokens: a regular expression first cuts text into words, numbers, punctuation and white
# space, and merges never cross these cuts. Otherwise "dog." and "dog!" would become tokens.

_CL100K_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_CL100K_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _CL100K_HEAD + r"|\p{N}{1,3}" + _CL100K_TAIL,  # GPT-4, Llama 3
    "qwen": _CL100K_HEAD + r"|\p{N}" + _CL100K_TAIL,  # Qwen 2 and 3: each digit by itself
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}"  # GPT-4o: splits camelCase
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CHAR_PATTERN = r"[\s\S]"  # every character by itself: see `train_char`


def find_cuts(block):
    r"""Offsets at which each of PATTERNS starts a new pre-token whatever else the text holds.

    block: UTF-8 bytes, in which the byte 255 (never part of UTF-8) stands for the end of a
    document. Returns increasing offsets, int64, the first of them 0. Three rules, all of them
    about ASCII, so that they can be seen in the bytes without decoding:
      - a space before a character that is not white space: `two| words`
      - what follows a letter or digit and is neither: `word|.`, but not the ' of `don't`
      - a letter or digit after a single newline: `end.\n|Next`
    Any document may be cut there and its parts tokenized alone, because no pattern matches
    across such a place and none looks further ahead than one character. That is all the regular
    expression is needed for less than a hundredth of the text: each distinct chunk once.
    """
    a = np.frombuffer(block, np.uint8)
    alnum = (a | 32) - np.uint8(97) < 26  # unsigned: what lies below wraps around to above
    alnum |= a - np.uint8(48) < 10
    visible = a - np.uint8(33) < 94  # ASCII without space and control characters
    # a word may also begin with a multi-byte character, if it can not be white space: that is
    # U+0085 and U+00A0 (first byte C2), U+1680 (E1), U+2000.. (E2) and U+3000 (E3)
    word = visible | ((a >= 0xC3) & ((a < 0xE1) | (a > 0xE3)) & (a < 255))
    end = a == 255
    cut = end.copy()
    cut[:1] = True
    cut[1:] |= end[:-1]
    cut[1:] |= alnum[:-1] & ~alnum[1:] & (a[1:] < 128) & (a[1:] != ord("'"))
    cut[:-1] |= (a[:-1] == ord(" ")) & word[1:]
    cut[2:] |= (a[1:-1] == ord("\n")) & visible[:-2] & alnum[2:]
    return np.flatnonzero(cut)


# -----------------------------------------------------------------------------
# 4. The chunk table. Text repeats itself: 11 MB of children's stories hold 2.5 million chunks,
# of which 13,000 are distinct. So chunks are numbered, all work is done once per distinct chunk,
# and what is left is to look up the number of each chunk, for many at once.

_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # masks of the n low bytes
_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
MAX_CHUNKS = 1 << 20  # a larger table is thrown away and begun anew, which bounds the memory


class ChunkTable(dict):
    r"""{chunk: its number}: numbers chunks from 1 on in order of first sight; b"\xff" is 0.

    The dictionary alone would do, at some 300 ns a chunk. In front of it stands what a processor
    has in front of its memory, a direct-mapped cache, which numpy can search for many chunks at
    once: a chunk of up to 16 bytes, as two integers, is hashed to a slot (Knuth, vol. 3, 6.4),
    which holds the last chunk that was seen there and its number. If that is another chunk, or
    for a longer one, the dictionary is asked.
    """

    def __init__(self):
        self[b"\xff"] = 0
        self.slots = [np.zeros(1 << 18, dtype) for dtype in (np.uint64, np.uint64, np.int64)]

    def lookup(self, block):
        """Numbers of the chunks of a block (bytes, see `find_cuts`), int64, in order."""
        starts = find_cuts(block)
        lengths = np.diff(starts, append=len(block))
        # the 8 bytes from each offset on, as an integer
        words = np.ndarray(len(block) + 8, np.uint64, block + bytes(15), strides=1)
        # shorter chunks are padded with zeros, so text that has zeros in it can not be cached
        longest = 0 if b"\0" in block else 16
        out = np.empty(len(starts), np.int64)
        for i in range(0, len(starts), 1 << 14):  # so few stay in the processor's own cache
            start, length = starts[i : i + (1 << 14)], lengths[i : i + (1 << 14)]
            head = words[start] & _LOW_BYTES.take(length, mode="clip")
            tail, more = np.zeros_like(head), np.flatnonzero(length > 8)
            tail[more] = words[start[more] + 8] & _LOW_BYTES.take(length[more] - 8, mode="clip")
            slot = ((head + tail * _ODD[1]) * _ODD[0] >> np.uint64(64 - 18)).view(np.int64)
            heads, tails, numbers = self.slots
            number = numbers.take(slot)
            miss = (heads.take(slot) != head) | (tails.take(slot) != tail) | (length > longest)
            miss = np.flatnonzero(miss)
            ends = (start + length)[miss].tolist()
            number_of = self.setdefault
            number[miss] = [number_of(block[i:j], len(self))
                            for i, j in zip(start[miss].tolist(), ends)]
            miss = miss[length[miss] <= longest]
            for slots, new in zip(self.slots, (head, tail, number)):
                slots[slot[miss]] = new[miss]
            out[i : i + (1 << 14)] = number
        return out


# -----------------------------------------------------------------------------
# 5. Reading documents, and worker processes.

BLOCK = 1 << 19  # bytes of text that are worked on at a time; larger ones cost page faults


def any_of(strings):
    """A compiled pattern for any of the strings, in UTF-8; where several match, the longest."""
    longest_first = sorted(map(utf8, strings), key=len, reverse=True)
    return regex.compile(b"|".join(map(regex.escape, longest_first)) or rb"(?!)")


def cut_stream(pieces, separators, chunked, ending=b""):
    """UTF-8 in pieces of any size -> the same in pieces of about BLOCK bytes, each of which can
    be tokenized alone: cut after a separator or, if `chunked`, between separators where
    `find_cuts` says so. What does not end with `ending` gets it."""
    separator, longest = any_of(separators), max(map(len, map(utf8, separators)), default=0)
    waiting, size, enough = [], 0, BLOCK
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size < enough:
            continue
        text, cut = b"".join(waiting), 0
        end = max(0, size - longest)  # a separator that begins later may be incomplete
        for low in (max(0, end - 4096), 0):  # the last cut is nearly always close to the end
            if low and separator.search(text, max(0, low - longest), low + longest):
                continue  # low may lie within a separator
            cut = low
            for match in separator.finditer(text, low):
                if match.start() >= end:
                    break
                cut = match.end()
            if chunked and cut < end:
                cut += int(find_cuts(text[cut:end])[-1])
            if cut > low:
                break
        if cut:
            yield text[:cut]
        waiting, size = [text[cut:]], size - cut
        enough = max(BLOCK, 2 * size)
    rest = b"".join(waiting)
    yield rest if rest.endswith(ending) else rest + ending


def read_blocks(paths, separators=(EOT,), chunked=True):
    """Yield (path, line, bytes) of about BLOCK bytes each, which together are the files: whole
    lines of a .jsonl, of which `line` is the number of the first, or a piece of `cut_stream` and
    0. Text that does not end with EOT gets one. Raises OSError, or ValueError for an empty file.
    """
    ending = utf8(EOT) if EOT in separators else b""
    for path in map(os.fspath, paths):
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            try:
                if not file.peek(1):
                    raise ValueError(f"{path} is empty")
                if path.removesuffix(".gz").endswith(".jsonl"):
                    line = 1
                    while lines := file.readlines(BLOCK):
                        yield path, line, b"".join(lines)
                        line += len(lines)
                else:
                    pieces = iter(lambda: file.read(BLOCK), b"")
                    for piece in cut_stream(pieces, separators, chunked, ending):
                        yield path, 0, piece
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is no gzip file, or a damaged one: {error}") from None


def to_documents(block, separators=(EOT,)):
    """A block of `read_blocks` -> (list of the documents in it, as UTF-8; the number of bytes
    that were invalid: each run of them becomes U+FFFD). The last document is the part after the
    last separator. Raises ValueError for a line of a .jsonl that is not an object with a text.
    """
    path, line, raw = block
    documents, invalid = [], 0
    parts = raw.split(b"\n") if line else any_of(separators).split(raw)
    for number, document in enumerate(parts, line):
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError:
            escaped = document.decode("utf-8", "surrogateescape")
            invalid += len(regex.findall("[\udc80-\udcff]", escaped))
            text = document.decode("utf-8", "replace")
            document = text.encode("utf-8")
        if line:
            try:
                document = utf8(json.loads(text)["text"]) if text.strip() else b""
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f'{path}:{number}: not a JSON object with a "text"') from None
        if document or not line:
            documents.append(document)
    return [*documents, b""] if line else documents, invalid


def parallel(work, num_proc):
    """Run the generators work(0, num_proc), ..., work(num_proc - 1, num_proc), each in a process
    of its own, and yield what they yield in turn, until the first has no more. Raises what they
    raise, and ValueError if a process is killed.

    A process that is ahead of its turn waits, since pipes hold little.
    """
    if num_proc == 1:
        yield from work(0, 1)
        return
    # fork starts in no time and needs no importable __main__; elsewhere than on Linux it is unsafe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    processes, links = [], []
    try:
        hold_signals("SIG_BLOCK")  # Python drops an interrupt that arrives in the middle of a fork
        for first in range(num_proc):
            link, far = context.Pipe(duplex=False)
            args = work, first, num_proc, link, far
            processes.append(context.Process(target=serve, args=args, daemon=True))
            processes[-1].start()
            far.close()
            links.append(link)
        hold_signals("SIG_UNBLOCK")
        for link in itertools.cycle(links):
            try:
                result, error = link.recv()
            except (EOFError, OSError):
                raise ValueError("a worker process was killed (out of memory?)") from None
            if error:
                raise error
            if result is None:
                return
            yield result
    finally:
        for process in processes:
            process.kill()  # they hold nothing that others wait for
        for process in processes:
            process.join()


def serve(work, first, step, link, far):
    """The life of a process of `parallel`: send (result, None) for each result, and in the end
    (None, the error that was raised or None)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hold_signals("SIG_UNBLOCK")
    link.close()  # the parent's end, of which fork made a copy: without it we see the parent die
    error = None
    with contextlib.suppress(BrokenPipeError):
        try:
            for result in work(first, step):
                far.send((result, None))
        except Exception as caught:
            error = caught
        far.send((None, error))


def hold_signals(how):
    """Hold Ctrl-C and SIGTERM back for a while, or let them through."""
    if hasattr(signal, "pthread_sigmask"):  # Windows has none
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT, signal.SIGTERM})


def text_size(paths):
    """Bytes of text in files, about: a .gz is taken for a fifth of what it holds."""
    return sum(os.path.getsize(p) * (5 if os.fspath(p).endswith(".gz") else 1) for p in paths)


def default_processes(paths):
    """As many processes as are worth starting: one for each 8 MB, at most one for each core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, text_size(paths) >> 23))


class Progress:
    """A line on a terminal that says how far a step of more than two seconds is, and how fast."""

    def __init__(self, what, total, unit):
        self.what, self.total, self.unit, self.start = what, total, unit, time.monotonic()

    def __call__(self, done):
        spent = time.monotonic() - self.start
        if sys.stderr.isatty() and spent > 2:
            rate = max(done, 1e-6) / spent
            print(f"\r{self.what}: {done:,.0f} of {self.total:,.0f} {self.unit}, {rate:,.1f} "
                  f"{self.unit}/s, {max(0, self.total - done) / rate:.0f} s left \x1b[K",
                  file=sys.stderr, end="\n" if done >= self.total else "", flush=True)


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file that takes the name `path` only once it is whole: a killed run leaves no half."""
    temporary = os.fspath(path) + ".tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


# -----------------------------------------------------------------------------
# 6. Training.


def count_pretokens(first, step, paths, pattern, separators):
    """Count the pre-tokens in each `step`-th block of the files, so that `step` processes share
    the work: all read everything, which is cheaper than to send blocks about. Yields, once,
    ({pre-token: count}, number of invalid bytes).

    Regular expressions are slow, so each distinct chunk is split once for many blocks, and its
    pre-tokens are counted as often as the chunk occurred.
    """
    split, chunked = regex.compile(pattern), pattern in PATTERNS.values()
    counts, table, seen = collections.defaultdict(int), ChunkTable(), np.zeros(0, int)
    progress, done, bad = Progress("counting", text_size(paths) / 1e6, "MB"), 0, 0

    def count_chunks():
        for chunk, n in itertools.islice(zip(table, seen.tolist()), 1, None):
            for pretoken in split.findall(chunk.decode("utf-8")):
                counts[pretoken] += n

    blocks = read_blocks(paths, separators, chunked)
    for block in itertools.islice(blocks, first, None, step):
        documents, invalid = to_documents(block, separators)
        bad += invalid
        if chunked:
            numbers = table.lookup(b"\xff".join(documents))
            seen = np.append(seen, np.zeros(len(table) - len(seen), int))
            np.add.at(seen, numbers, 1)  # how often chunk n occurred
            if len(table) > MAX_CHUNKS:
                count_chunks()
                table, seen = ChunkTable(), np.zeros(0, int)
        else:
            for match in itertools.chain(*(split.finditer(d.decode("utf-8")) for d in documents)):
                counts[match[0]] += 1
        done += step * len(block[2])
        if first == 0:  # one process tells how far all are
            progress(done / 1e6)
    count_chunks()
    yield dict(counts), bad


class Corpus:
    """The distinct words end to end in flat arrays, and an index of the pairs in them.

    By position in the text of all words (-1 stands between words, -2 where a token was merged
    into the one before it):
      token   int32  the token that begins here
      next, prev     int32  where the next and the previous token begin: a doubly linked list
      weight  int64  how often the word occurs in the corpus
      pair    int32  number of the pair that this token and the next one form, or -1
    By number of the pair:
      count   int64  weighted occurrences
      left, right    int32  its two tokens
      start   int64  its positions are where[start[i]:start[i + 1]], as of its creation

    A pair comes into being when its younger token does, all its occurrences at once; from then
    on it can only lose some. So its list of positions is written once, a position that is out of
    date is recognised by `pair`, and counts only fall.
    """

    def __init__(self, words):
        words = {word: n for word, n in words.items() if len(word) > 1}
        text = b"\xff" + b"\xff".join([*words, b""])
        self.token = np.frombuffer(text, np.uint8).astype(np.int32)
        self.token[self.token == 255] = -1  # UTF-8 has no byte 255
        size = len(self.token)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        counts = np.fromiter(words.values(), np.int64, len(words))
        self.weight = np.concatenate(([0], np.repeat(counts, lengths + 1)))
        self.next = np.arange(1, size + 1, dtype=np.int32)
        self.prev = np.arange(-1, size - 1, dtype=np.int32)
        self.pair = np.full(size, -1, np.int32)
        # Each merge takes away a position and enters up to two others, so 3 * size are enough.
        # (What is not used takes no memory: the system hands out pages as they are written.)
        self.count, self.start = np.zeros(3 * size, np.int64), np.zeros(3 * size + 1, np.int64)
        self.left, self.right, self.where = (np.zeros(3 * size, np.int32) for _ in range(3))
        self.n_pairs = 0
        self.add_pairs(np.flatnonzero((self.token[:-1] >= 0) & (self.token[1:] >= 0)))

    def add_pairs(self, positions):
        """Enter the pairs that begin at these positions, all of them new -> their numbers."""
        key = self.token[positions].astype(np.int64) << 32 | self.token[self.next[positions]]
        if self.n_pairs:
            order = np.argsort(key)
        else:  # pairs of bytes fit into 16 bits, which numpy sorts by radix, many times faster
            order = np.argsort((key >> 24 | key & 255).astype(np.uint16), kind="stable")
        key, positions = key[order], positions[order]
        edges = np.flatnonzero(np.diff(key, prepend=-1))  # where another pair begins
        new = np.arange(self.n_pairs, self.n_pairs + len(edges))
        first = self.start[self.n_pairs]
        self.n_pairs += len(edges)
        self.where[first : first + len(positions)] = positions
        self.start[new], self.start[self.n_pairs] = first + edges, first + len(positions)
        self.left[new], self.right[new] = key[edges] >> 32, key[edges] & 0xFFFFFFFF
        if len(edges):
            self.count[new] = np.add.reduceat(self.weight[positions], edges)
        self.pair[positions] = np.repeat(new, np.diff(edges, append=len(key)))
        return new

    def occurrences(self, pairs):
        """Positions of these pairs, and for each position which of them it is."""
        listed = [self.where[self.start[i] : self.start[i + 1]] for i in pairs]
        owner = np.repeat(np.arange(len(pairs)), [len(x) for x in listed])
        positions = np.concatenate(listed)
        valid = self.pair[positions] == np.array(pairs)[owner]
        return positions[valid], owner[valid]

    def largest_new_count(self, positions, owner, n):
        """An upper bound, for each of n pairs, on the count of any pair that merging it creates.

        Such a pair is (left neighbour, new token) or (new token, right neighbour). Neighbours
        are added up in 256 buckets by their low byte: as fast as it is rough.
        """
        bound = np.zeros(n)
        for neighbour in (self.prev[positions], self.next[self.next[positions]]):
            token = self.token[neighbour]
            weight = self.weight[positions] * (token >= 0)
            sums = np.bincount(owner << 8 | token & 255, weight, n << 8)
            bound = np.maximum(bound, sums.reshape(n, 256).max(1))
        return bound

    def merge(self, pairs, positions, owner, first_new):
        """Merge pairs at their positions into tokens first_new, first_new + 1, ... No token may
        be the left one of one of the pairs and the right one of another. Returns the numbers of
        the pairs that arise."""
        token, next_, prev, pair = self.token, self.next, self.prev, self.pair
        if any(self.left[i] == self.right[i] for i in pairs):
            # a run 'aaaaa' is (aa)(aa)a: of overlapping occurrences take each second
            order = np.argsort(positions)
            positions, owner = positions[order], owner[order]
            index = np.arange(len(positions))
            starts_run = np.ones(len(positions), bool)
            starts_run[1:] = next_[positions[:-1]] != positions[1:]
            even = (index - np.maximum.accumulate(np.where(starts_run, index, 0))) % 2 == 0
            positions, owner = positions[even], owner[even]
        second = next_[positions]
        before, after = prev[positions], next_[second]
        token[second] = -2
        before = before[token[before] >= 0]  # else a word's start, or a merge: counted as `after`
        lost = np.concatenate((before, second))
        lost = lost[pair[lost] >= 0]
        np.subtract.at(self.count, pair[lost], self.weight[lost])
        self.count[pairs] = 0
        pair[positions] = pair[second] = -1
        token[positions] = owner + first_new
        next_[positions] = after
        prev[after] = positions
        return self.add_pairs(np.concatenate((before, positions[token[after] >= 0])))


def learn_merges(words, n_merges, progress=lambda done: None):
    """What `learn_merges_naive` learns, thousands of times faster.

    words: {bytes: count}. Returns list[tuple[bytes, bytes]].

    Three things make it fast. A merge changes only the words that hold the pair (`Corpus`). Only
    pairs of at least `threshold` occurrences are looked at; it is lowered when they run out. And
    merges are done many at a time, as array operations: the next most frequent pairs b, c, ...
    can be merged together with a if
      - none begins with the token that another ends with, so that they do not overlap and do
        not change each other's counts, and
      - merging the earlier ones creates no pair as frequent as the later ones, which would have
        had to come first.
    """
    corpus, tokens, merges = Corpus(words), [bytes([b]) for b in range(256)], []
    frequent, threshold, width = np.zeros(0, int), int(corpus.count.max()) + 1, 1
    while len(merges) < n_merges:
        frequent = frequent[corpus.count[frequent] >= threshold]
        while len(frequent) < width and threshold > 1:
            threshold = max(1, threshold * 9 // 10)
            frequent = np.flatnonzero(corpus.count[: corpus.n_pairs] >= threshold)
        if not len(frequent):
            break  # every word is a single token
        # the most frequent `width`, and those as frequent as the last of them, in order
        top, count = frequent, corpus.count[frequent]
        if len(top) > width:
            top = top[count >= np.partition(count, -width)[-width]]
        count, left, right = (x[top].tolist() for x in (corpus.count, corpus.left, corpus.right))
        name = tokens.__getitem__
        top = sorted(zip(count, map(name, left), map(name, right), top.tolist()), reverse=True)
        # take them for as long as they do not interfere
        batch, lefts, rights = [], set(), set()
        for entry in top[: min(width, n_merges - len(merges))]:
            if entry[2] in lefts or entry[1] in rights:
                break
            lefts.add(entry[1])
            rights.add(entry[2])
            batch.append(entry)
        pairs = [entry[3] for entry in batch]
        positions, owner = corpus.occurrences(pairs)
        bound = np.maximum.accumulate(corpus.largest_new_count(positions, owner, len(batch)))
        n = 1
        while n < len(batch) and bound[n - 1] < batch[n][0]:
            n += 1
        width = min(2 * n + 2, 256)  # about as many as went well the last time
        fits = owner < n
        new = corpus.merge(pairs[:n], positions[fits], owner[fits], len(tokens))
        frequent = np.concatenate((frequent, new[corpus.count[new] >= threshold]))
        merges += [entry[1:3] for entry in batch[:n]]
        tokens += [entry[1] + entry[2] for entry in batch[:n]]
        progress(len(merges))
    return merges


def train_bpe(input_path, vocab_size, special_tokens=(EOT,), pattern="gpt2", num_proc=None):
    """Learn a byte-level BPE vocabulary.

    input_path: a file or a list of files: .jsonl with a "text", or plain text, either as .gz
    vocab_size: how many tokens at most: 256 bytes, the merges, the special tokens
    special_tokens: strings that separate texts; they are counted in no pair
    pattern: a name from PATTERNS, or a regular expression; merges stay within its matches
    num_proc: processes; the result does not depend on it. None: by the size of the input.

    Returns (vocab, merges): {id: bytes}, with the bytes at 0 to 255, then the merges in order,
    then the special tokens; and the list of merged pairs of bytes. Fewer merges than asked for
    if the text has no more pairs. Raises ValueError or OSError.
    """
    paths = [input_path] if isinstance(input_path, (str, os.PathLike)) else list(input_path)
    special_tokens = list(dict.fromkeys(special_tokens))
    pattern = PATTERNS.get(pattern, pattern)
    if "" in special_tokens:
        raise ValueError("special token '' is empty")
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r}: {error} (names: {', '.join(PATTERNS)})") from None
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is below 256 bytes + {len(special_tokens)} "
                         "special tokens")
    work = functools.partial(count_pretokens, paths=paths, pattern=pattern,
                             separators=special_tokens)
    words, bad = collections.Counter(), 0
    with contextlib.closing(parallel(work, num_proc or default_processes(paths))) as results:
        for counts, invalid in results:
            words.update(counts)
            bad += invalid
    if bad:
        print(f"{bad:,} bytes were not UTF-8 and became U+FFFD", file=sys.stderr)
    words = {utf8(word): n for word, n in words.items()}
    merges = learn_merges(words, n_merges, Progress("merging", n_merges, "merges"))
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return dict(enumerate([*tokens, *map(utf8, special_tokens)])), merges


def train_char(paths):
    """A tokenizer whose vocabulary is the characters of the text, sorted, and EOT."""
    chars = set()
    for block in read_blocks(paths):
        chars.update(*(document.decode("utf-8") for document in to_documents(block)[0]))
    vocab = {i: utf8(c) for i, c in enumerate(sorted(chars))}
    return Tokenizer(vocab, [], [EOT], CHAR_PATTERN, ignore_merges=True)


# -----------------------------------------------------------------------------
# 7. The tokenizer.

MAX_WORDS = 1 << 18  # pre-tokens whose ids are remembered; then all are forgotten
# what reading damaged JSON, or JSON of something else, raises besides ValueError
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, RecursionError, regex.error)
SPECIAL_TOKENS = {  # of OpenAI's .tiktoken files, by the beginning of their names
    "gpt2": [EOT],
    "cl100k": {EOT: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
               "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276},
    "o200k": {EOT: 199999, "<|endofprompt|>": 200018},
}


def byte_characters():
    """GPT-2's way of writing bytes in JSON: a printable character for each of the 256 bytes, in
    order. Printable Latin-1 stands for itself; the other bytes become U+0100, U+0101, ..."""
    itself = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(b if b in itself else next(others)) for b in range(256)]


# The "behavior" of a pre-tokenizer: is a piece of text joined to the one before it? That depends
# on whether the pattern matched the one before and this one. (Matches are dropped if "Removed".)
JOINED = {
    "Isolated": lambda before, match: False,
    "Removed": lambda before, match: False,
    "Contiguous": lambda before, match: before == match,
    "MergedWithPrevious": lambda before, match: match and not before,
    "MergedWithNext": lambda before, match: before and not match,
}


def pre_tokenizer(part):
    """The "pre_tokenizer" of a tokenizer.json -> list of steps for `split_text`: (compiled
    pattern, behavior, invert, whether each text is to begin with a space), or None, after which
    the steps see bytes, written in `byte_characters`. Raises ValueError for unsupported ones."""
    kind, prefix = part["type"], False
    if kind == "Sequence":
        return [step for inner in part["pretokenizers"] for step in pre_tokenizer(inner)]
    if kind == "ByteLevel":
        prefix = part["add_prefix_space"]
        pattern = PATTERNS["gpt2"] if part.get("use_regex", True) else r"[\s\S]+" * prefix
    elif kind == "Digits":
        pattern = r"\p{N}" if part["individual_digits"] else r"\p{N}+"
    elif kind == "Punctuation":
        pattern = r"[\p{P}$+<=>^`|~]"
    elif kind == "Split":
        pattern = part["pattern"].get("Regex") or regex.escape(part["pattern"]["String"])
    else:
        raise ValueError(f"pre-tokenizer {kind} is not supported")
    behavior = part.get("behavior", "Isolated")
    if behavior not in JOINED:
        raise ValueError(f"behavior {behavior} of pre-tokenizers is not supported")
    steps = [(regex.compile(pattern), behavior, part.get("invert", False), prefix)] * bool(pattern)
    return [*steps, None] if kind == "ByteLevel" else steps


def split_text(steps, text):
    """Cut a text by the steps of `pre_tokenizer`, one after the other -> list of str."""
    pieces, characters = [text], None
    for step in steps:
        if step is None:
            characters = byte_characters()
            pieces = [utf8(piece).decode("latin-1").translate(characters) for piece in pieces]
            continue
        (pattern, behavior, invert, prefix), texts, pieces = step, pieces, []
        joined = JOINED[behavior]
        for text in texts:
            if prefix and not text.startswith(" "):
                text = " " + text
            parts, at = [], 0  # each with whether it is a match (or is not one, if `invert`)
            for match in pattern.finditer(text):
                parts += (text[at : match.start()], invert), (match[0], not invert)
                at = match.end()
            before = None
            for part, match in [*parts, (text[at:], invert)]:
                if not part or match and behavior == "Removed":
                    continue
                if before is not None and joined(before, match):
                    pieces[-1] += part
                else:
                    pieces.append(part)
                before = match
    if characters:  # parts of characters, as Falcon makes them, become surrogates: see `_bpe`
        byte = {c: b for b, c in enumerate(characters)}
        pieces = [bytes(map(byte.get, p)).decode("utf-8", "surrogateescape") for p in pieces]
    return pieces


def from_names(names, merges, added=()):
    """The vocabulary and merges of a tokenizer.json or of vocab.json and merges.txt, in
    `byte_characters`, but for added tokens -> ({id: bytes}, list of pairs of bytes)."""
    to_byte = {c: b for b, c in enumerate(byte_characters())}
    token = {name: utf8(name) if name in added or not to_byte.keys() >= {*name}
             else bytes([to_byte[c] for c in name]) for name in names}
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {i: token[name] for name, i in names.items()}, [(token[a], token[b]) for a, b in pairs]


def from_ranks(text):
    """A .tiktoken file: in each line a token in base64 and its rank -> ({id: bytes}, merges).
    It has no list of merges: any two tokens merge whose bytes together are a token, and those
    that make the token of the lowest rank merge first."""
    lines = (line.split() for line in text.split("\n") if line.strip())
    rank = {base64.b64decode(token, validate=True): int(number) for token, number in lines}
    merges = [(token[:i], token[i:]) for token in sorted(rank, key=rank.get)
              for i in range(1, len(token)) if token[:i] in rank and token[i:] in rank]
    return {i: token for token, i in rank.items()}, merges


def added_finder(tokens):
    """Entries of "added_tokens" -> function of a text that cuts them out: list of str, and of
    int, the ids of the tokens between; the longest wins."""
    tokens = sorted(tokens, key=lambda token: len(token["content"]), reverse=True)
    groups = []
    for token in tokens:
        found = regex.escape(token["content"])
        if token["single_word"]:
            found = rf"(?<!\w){found}(?!\w)"
        groups.append("(" + r"\s*" * token["lstrip"] + found + r"\s*" * token["rstrip"] + ")")
    pattern = regex.compile("|".join(groups))
    return functools.partial(cut_out, pattern, [(t["content"], t["id"]) for t in tokens])


def cut_out(pattern, tokens, text):
    """What `added_finder` returns. tokens: list of (string, id), one for each group."""
    parts, at = [], 0
    for match in pattern.finditer(text) if any(string in text for string, _ in tokens) else ():
        parts += text[at : match.start()], tokens[match.lastindex - 1][1]
        at = match.end()
    return [*parts, text[at:]]


class Tokenizer:
    """Byte-level BPE: encode text by the merges of a vocabulary, decode ids to text.

    vocab: {id: bytes}
    merges: list[tuple[bytes, bytes]], the most urgent first
    special_tokens: list of strings, or {string: id}. In the text given to `encode` they become a
        single id; of overlapping ones the longest wins. Strings not in vocab get the next ids.
    pattern: a name from PATTERNS or a regular expression
    ignore_merges: a pre-token that is in the vocabulary becomes that token, merges or not
    parts: "normalizer", "pre_tokenizer", "added_tokens" ... of a tokenizer.json

    Raises ValueError for a vocabulary that does not fit together.

    >>> vocab = {i: bytes([i]) for i in range(256)} | {256: b"th", 257: b"the"}
    >>> t = Tokenizer(vocab, [(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])
    >>> t.encode("then<|endoftext|>")
    [257, 110, 258]
    """

    def __init__(self, vocab, merges, special_tokens=None, pattern="gpt2", *, ignore_merges=False,
                 parts=None):
        self.vocab, self.merges, self.ignore_merges = dict(vocab), list(merges), ignore_merges
        self._id = {token: i for i, token in reversed(self.vocab.items())}
        self.special_tokens = {}
        for token in special_tokens or ():
            if isinstance(special_tokens, dict):
                i = special_tokens[token]
            elif (i := self._id.get(utf8(token))) is None:
                i = max(self.vocab, default=-1) + 1
            if not token or self.vocab.get(i, utf8(token)) != utf8(token):
                raise ValueError(f"special token {token!r} is empty, or has the id {i} of another")
            self.special_tokens[token], self.vocab[i] = i, utf8(token)
        for i in self.vocab:
            if not isinstance(i, (int, np.integer)) or not 0 <= i < 2**31 - 1:
                raise ValueError(f"the id {i!r} is not a whole number from 0 to 2**31 - 2")
        self.vocab_size = max(self.vocab, default=-1) + 1
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")  # of ids in a .bin
        ends = (EOT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>")
        ends = [self.special_tokens[s] for s in ends if s in self.special_tokens]
        self.eot_id = ends[0] if ends else None

        self._rank, self._merged = {}, []  # pair of ids -> rank of its merge -> the merged id
        try:
            for rank, (a, b) in enumerate(self.merges):
                self._rank.setdefault((self._id[a], self._id[b]), rank)
                self._merged.append(self._id[a + b])
        except KeyError as missing:
            raise ValueError(f"merge {a!r} {b!r} needs {missing}, not in the vocabulary") from None
        self._byte_id = [self._id.get(bytes([b]), -1) for b in range(256)]  # -1: left out

        if parts is None:
            pattern = PATTERNS.get(pattern, pattern)
            level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                     "use_regex": pattern == PATTERNS["gpt2"]}
            split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                     "invert": False}
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            parts = {
                "added_tokens": [{"id": i, "content": token, **flags, "special": True}
                                 for token, i in self.special_tokens.items()],
                "normalizer": None, "pre_tokenizer": level if level["use_regex"] else
                {"type": "Sequence", "pretokenizers": [split, level]},
                "post_processor": None, "decoder": level | {"use_regex": True},
            }
        self.parts, added = parts, parts["added_tokens"]
        form = parts["normalizer"] or {"type": "Sequence", "normalizers": []}
        self.forms = [part["type"] for part in form.get("normalizers", [form])]
        if not {*self.forms} <= {"NFC", "NFD", "NFKC", "NFKD"}:
            raise ValueError(f"normalizer {self.forms} is not supported")
        # Hugging Face looks for added tokens in the text as it is, then in the normalized text
        self._added = added_finder([t for t in added if not t["normalized"]])
        self._added_normalized = added_finder([t | {"content": self._normalize(t["content"])}
                                              for t in added if t["normalized"]])
        steps = pre_tokenizer(parts["pre_tokenizer"])
        if steps[-1:] == [None]:
            del steps[-1]
        self.pattern = steps[0][0].pattern if len(steps) == 1 else None
        # whether any token depends on the text around it
        self.context = any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in added)
        # Can any text be cut where `find_cuts` says? Nothing lies between the matches of these
        # patterns, so it does not matter if that is Removed.
        whole = ("Isolated", False, False), ("Isolated", True, False), ("Removed", True, False)
        self.chunked = (self.pattern in PATTERNS.values() and steps[0][1:] in whole
                        and not self.context)
        self._split = steps[0][0].findall if self.chunked else functools.partial(split_text, steps)
        self._forget()

    def _forget(self):
        self._cache = {}  # pre-token -> ids
        # for long texts: the ids of chunk n of the table are _ids[_begin[n]:_begin[n + 1]]
        self._table = ChunkTable()
        self._begin = array.array("q", [0, 1])
        self._ids = array.array("i", [-1 if self.eot_id is None else self.eot_id])

    # ---- text to ids

    def encode(self, text):
        """str -> list of ids. Special tokens in the text are recognised: for text from a
        stranger use `encode_ordinary`."""
        ids = []
        for part in self._added(utf8(text).decode("utf-8")):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in self._added_normalized(self._normalize(part)):
                ids += [piece] if isinstance(piece, int) else self._encode(piece)
        return ids

    def encode_ordinary(self, text):
        """str -> list of ids, special tokens being text like any other."""
        return self._encode(self._normalize(utf8(text).decode("utf-8")))

    def encode_iterable(self, iterable):
        """Ids of the concatenation of an iterable of strings, such as an open file, lazily.

        The same ids as of `encode` on the whole text, in constant memory. (With a pattern that is
        not in PATTERNS: in memory for the longest text between two special tokens. With added
        tokens that depend on the text around them: in memory for all of the text.)
        """
        separators = () if self.context else self.special_tokens
        for piece in cut_stream(map(utf8, iterable), separators, self.chunked):
            yield from self.encode(piece.decode("utf-8"))

    def encode_documents(self, documents):
        """List of UTF-8 documents -> ids, int32, with the end-of-text id between them, and no
        other special token.

        This is the fast way for much text: it takes one look-up per distinct chunk.
        """
        if self.forms and not all(map(bytes.isascii, documents)):
            documents = [utf8(self._normalize(d.decode("utf-8"))) for d in documents]
        if not self.chunked:
            ids = []
            for document in documents:
                ids += [*self._encode(document.decode("utf-8")), self.eot_id]
            return np.array(ids[:-1], np.int32)
        if len(self._table) > MAX_CHUNKS:
            self._forget()
        numbers = self._table.lookup(b"\xff".join(documents))
        n_new = len(self._table) - len(self._begin) + 1
        if n_new:
            new = [*itertools.islice(reversed(self._table), n_new)][::-1]
            pretokens = [self._split(chunk.decode("utf-8")) for chunk in new]
            ids, lengths = self._bpe_many([p for chunk in pretokens for p in chunk])
            chunk = np.repeat(np.arange(n_new), list(map(len, pretokens)))
            ends = len(self._ids) + np.cumsum(np.bincount(chunk, lengths, n_new))
            self._begin.frombytes(ends.astype(np.int64).tobytes())
            self._ids.frombytes(ids.astype(np.int32).tobytes())
        # the ids of all chunks, one after the other: where each begins, and then what follows it
        begin = np.frombuffer(self._begin, np.int64)
        length = begin[1:].take(numbers)
        begin = begin.take(numbers)
        length -= begin
        index = np.repeat(begin - np.cumsum(length) + length, length)
        index += np.arange(len(index))
        return np.frombuffer(self._ids, np.int32).take(index)

    def _normalize(self, text):
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    def _encode(self, text):
        if self.chunked and len(text) > 1 << 14:
            return self.encode_documents([text.encode("utf-8")]).tolist()
        return [i for pretoken in self._split(text) for i in self._bpe(pretoken)]

    def _bpe(self, pretoken):
        """Merge the bytes of one pre-token: of all pairs that can be merged the one of the
        lowest rank first, of several such the leftmost. str -> list of ids

        A heap holds the pairs that can be merged, as (rank, position of the left one); two lists
        say where the next and the previous token begin: n log n for n bytes.
        """
        if pretoken in self._cache:
            return self._cache[pretoken]
        raw, rank, heap = pretoken.encode("utf-8", "surrogateescape"), self._rank.get, []
        ids = [i for i in map(self._byte_id.__getitem__, raw) if i >= 0]
        if self.ignore_merges and raw in self._id:
            ids = [self._id[raw]]
        after, before = list(range(1, len(ids) + 1)), list(range(-1, len(ids)))
        ids.append(None)  # None stands for the end, and for what was merged into the one before

        def push(i):
            if i >= 0 and (r := rank((ids[i], ids[after[i]]))) is not None:
                heapq.heappush(heap, (r, i))

        for i in range(len(ids) - 1):
            push(i)
        while heap:
            lowest, i = heapq.heappop(heap)
            if ids[i] is not None and rank((ids[i], ids[j := after[i]])) == lowest:
                ids[i], ids[j] = self._merged[lowest], None
                after[i] = after[j]
                before[after[j]] = i
                push(i)
                push(before[i])
        ids = [i for i in ids if i is not None]
        if len(pretoken) < 64:
            if len(self._cache) >= MAX_WORDS:
                self._cache.clear()
            self._cache[pretoken] = ids
        return ids

    def _bpe_many(self, pretokens):
        """`_bpe` for a list of pre-tokens -> (their ids end to end, how many each has)."""
        done = []
        for i in range(0, len(pretokens), 4096):
            words = pretokens[i : i + 4096]
            if len(words) < 100 or max(map(len, words)) > 100:  # where arrays do not pay
                found = list(map(self._bpe, words))
                ids = np.array([i for word in found for i in word], np.int64)
                done.append((ids, list(map(len, found))))
            else:
                done.append(self._lockstep([word.encode("utf-8") for word in words]))
        return map(np.concatenate, zip(*done))

    def _lockstep(self, words):
        """`_bpe` for a list of bytes, as array operations on the tokens of all words, which lie
        end to end: in each round every word makes one merge. -> as `_bpe_many`"""
        pairs, ranks, merged, byte_id = self._arrays
        never = len(merged)  # the rank of pairs that do not merge
        length = np.fromiter(map(len, words), np.int64, len(words))
        word = np.repeat(np.arange(len(words)), length)
        ids = byte_id[np.frombuffer(b"".join(words), np.uint8)]
        if self.ignore_merges:
            whole = np.array([self._id.get(w, -1) for w in words])
            first = (np.cumsum(length) - length)[whole >= 0]
            ids[whole[word] >= 0] = -1
            ids[first] = whole[whole >= 0]
        ids, word = ids[ids >= 0], word[ids >= 0]
        rank = np.full(len(ids), never)  # of the merge of the token at this place with the next
        at, done = np.arange(len(ids) - 1), [(word[:0], ids[:0])]
        while len(ids):
            at = at[word[at] == word[at + 1]]  # where a pair begins that is new
            pair = ids[at] << 32 | ids[at + 1]
            place = np.searchsorted(pairs, pair)
            rank[at] = np.where(pairs[place] == pair, ranks[place], never)
            begin = np.flatnonzero(np.diff(word, prepend=-1))
            lowest = np.minimum.reduceat(rank, begin)
            lowest = np.repeat(lowest, np.diff(begin, append=len(ids)))
            going = lowest < never
            done.append((word[~going], ids[~going]))
            hit = np.flatnonzero((rank == lowest) & going)
            hit = hit[np.diff(word[hit], prepend=-1) > 0]  # the leftmost in each word
            ids[hit], rank[hit] = merged[rank[hit]], never
            going[hit + 1] = False  # from here on: what stays
            hit = (np.cumsum(going) - 1)[hit]
            ids, word, rank = ids[going], word[going], rank[going]
            at = np.concatenate((hit, hit - 1))
            at = at[(at >= 0) & (at + 1 < len(ids))]
        word, ids = map(np.concatenate, zip(*done))
        return ids[np.argsort(word, kind="stable")], np.bincount(word, minlength=len(words))

    @functools.cached_property
    def _arrays(self):
        """For `_lockstep`: the pairs that merge, as left << 32 | right, in order; the rank of
        each; the merged token of each rank; the ids of the bytes."""
        pairs = np.array([*self._rank, (1 << 30, 0)], np.int64)
        pairs, ranks = pairs[:, 0] << 32 | pairs[:, 1], np.array([*self._rank.values(), 0])
        order = np.argsort(pairs)
        merged, byte_id = np.array(self._merged, np.int64), np.array(self._byte_id)
        return pairs[order], ranks[order], merged, byte_id

    # ---- ids to text

    def decode_bytes(self, ids):
        """Ids (a list, an array or a tensor) -> bytes, special tokens included. Raises ValueError
        for an id outside the vocabulary."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join([self.vocab[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not in the vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """Ids -> str; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # ---- files

    def to_json(self):
        """The text of a tokenizer.json, which `tokenizers` and `transformers` read."""
        char = byte_characters()
        names = {token: "".join([char[b] for b in token]) for token in self.vocab.values()}
        names |= {utf8(t["content"]): t["content"] for t in self.parts["added_tokens"]}
        model = {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": self.ignore_merges,
            "vocab": {names[token]: i for i, token in sorted(self.vocab.items())},
            "merges": [f"{names[a]} {names[b]}" for a, b in self.merges],
        }
        parts = {"version": "1.0", "truncation": None, "padding": None, **self.parts}
        return json.dumps(parts | {"model": model}, ensure_ascii=False, indent=1)

    def save(self, path):
        """Write tokenizer.json to `path`, or into it if it is a folder."""
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        with replacing(path) as file:
            file.write(self.to_json())

    @classmethod
    def from_json(cls, text):
        """The text of a tokenizer.json -> Tokenizer. Raises ValueError for one that is broken or
        that is something else than byte-level BPE."""
        try:
            data = json.loads(text)
            model = data["model"]
            byte_level = '"ByteLevel"' in json.dumps(data["pre_tokenizer"])
            if model.get("type", "BPE") != "BPE" or not byte_level:
                raise ValueError("it is not byte-level BPE")
            if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
                raise ValueError("prefixes and suffixes of words are not supported")
            parts = {name: data.get(name) for name in
                     ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")}
            parts["added_tokens"] = parts["added_tokens"] or []
            added = {t["content"]: t["id"] for t in parts["added_tokens"]}
            return cls(*from_names(model["vocab"], model["merges"], added), added, parts=parts,
                       ignore_merges=bool(model.get("ignore_merges")))
        except MALFORMED as error:
            raise ValueError(f"{type(error).__name__} {error}") from None

    @classmethod
    def from_file(cls, path, special_tokens=None, pattern=None):
        """Read a tokenizer: a tokenizer.json or a folder that holds one; GPT-2's vocab.json with
        merges.txt beside it; or a .tiktoken file of ranks. For the latter two `special_tokens`
        and `pattern` (as of the constructor) are known if they are GPT-2's or OpenAI's.

        Raises ValueError or OSError.
        """
        path = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            if path.endswith(".tiktoken"):
                family = os.path.basename(path).split("_")[0]
                family = family if family in SPECIAL_TOKENS else "gpt2"
                if special_tokens is None:
                    special_tokens = SPECIAL_TOKENS[family]
                return cls(*from_ranks(text), special_tokens, pattern or family,
                           ignore_merges=True)
            names = json.loads(text)
            if isinstance(names.get("model"), dict):
                return cls.from_json(text)
            merges = os.path.join(os.path.dirname(path), "merges.txt")
            if not os.path.exists(merges):
                raise ValueError(f"there is no model in it, and no {merges}")
            with open(merges, encoding="utf-8") as file:
                lines = file.read().split("\n")
            lines = filter(None, lines[lines[0].startswith("#version") :])
            if special_tokens is None and EOT in names:
                special_tokens = [EOT]
            return cls(*from_names(names, lines), special_tokens, pattern or "gpt2")
        except (ValueError, *MALFORMED) as error:
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from None


# -----------------------------------------------------------------------------
# 8. .bin files: a header of 256 int32, then token ids.


def bin_header(tokenizer, tokens, text_bytes):
    """The header of a .bin: [0] 20240520 and [1] 1 for uint16, or 20240801 and 7 for uint32 if the
    vocabulary needs it (as in llm.c); [2] number of tokens, at most 2^31 - 1 (the size of the
    file is the truth); [3] vocabulary size; [4] id of the end-of-text token; [5], [6] low and
    high half of the number of bytes of text that the tokens stand for."""
    header = np.zeros(256, "<i4")
    header[:2] = (20240520, 1) if tokenizer.dtype.itemsize == 2 else (20240801, 7)
    header[2:5] = min(tokens, 2**31 - 1), tokenizer.vocab_size, tokenizer.eot_id
    header[5:7] = np.array([text_bytes], "<u8").view("<i4")
    return header.tobytes()


def read_bin(path):
    """A .bin -> (memory-mapped array of ids, header as int32 or None). A file without a header
    is nanoGPT's: uint16 from the first byte on. Raises ValueError for an odd size."""
    size = os.path.getsize(path)
    header = np.fromfile(path, "<i4", 256) if size >= 1024 else np.zeros(2)
    dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get(tuple(header[:2].tolist()))
    offset = 1024 if dtype else 0
    dtype = np.dtype(dtype or "<u2")
    if (size - offset) % dtype.itemsize:
        raise ValueError(f"{path} is no .bin: its {size:,} bytes do not fit whole tokens")
    ids = np.memmap(path, dtype, "r", offset) if size > offset else np.zeros(0, dtype)
    return ids, header if offset else None


def encode_blocks(first, step, paths, tokenizer):
    """Encode each `step`-th block of the files (see `parallel`). Yields, for each, (array of ids,
    number of bytes of the file, of text, and of invalid ones)."""
    blocks = read_blocks(paths, chunked=tokenizer.chunked)
    for block in itertools.islice(blocks, first, None, step):
        documents, invalid = to_documents(block)
        ids = tokenizer.encode_documents(documents).astype(tokenizer.dtype)
        yield ids, len(block[2]), sum(map(len, documents)), invalid


def encode_files(tokenizer, paths, out, val_fraction=0.01, val_paths=(), num_proc=None):
    """Encode documents into out/train.bin and out/val.bin, each ended by the end-of-text id.

    Every 1/val_fraction-th document goes to val.bin; if there are too few documents for that,
    the last val_fraction of the tokens does. Or val.bin is made of val_paths. Prints what it
    wrote, and leaves nothing behind if it fails. Raises ValueError or OSError.
    """
    if tokenizer.eot_id is None:
        raise ValueError(f"the tokenizer has no {EOT} to end documents with")
    sizes = np.zeros(tokenizer.vocab_size, np.int32)  # bytes of text that an id stands for
    sizes[[*tokenizer.vocab]] = [len(token) for token in tokenizer.vocab.values()]
    sizes[tokenizer.eot_id] = 0
    os.makedirs(out, exist_ok=True)
    names = ("train.bin", "val.bin") if val_paths or val_fraction else ("train.bin",)
    names = [os.path.join(out, name) for name in names]
    tokens, text_bytes, lost, bad = [0, 0], [0, 0], 0, 0
    with contextlib.ExitStack() as stack:
        bins = [stack.enter_context(replacing(name, "w+b")) for name in names]
        for file in bins:
            file.write(bytes(1024))

        def write(which, ids):
            bins[which].write(ids)
            tokens[which] += len(ids)
            text_bytes[which] += int(sizes.take(ids).sum())

        for files, fraction in ((paths, 0 if val_paths else val_fraction), (val_paths, 1)):
            if not files:
                continue
            progress, done, seen = Progress("encoding", text_size(files) / 1e6, "MB"), 0, 0
            work = functools.partial(encode_blocks, paths=files, tokenizer=tokenizer)
            results = parallel(work, num_proc or default_processes(files))
            stack.callback(results.close)  # ends the processes whatever happens
            for ids, size, decoded, invalid in results:
                # number the documents; the part after the last end goes on in the next block
                ends = np.flatnonzero(ids == tokenizer.eot_id) + 1
                number = seen + np.arange(len(ends) + 1)
                seen += len(ends)
                chosen = np.floor((number + 1) * fraction) > np.floor(number * fraction)
                chosen = np.repeat(chosen, np.diff(ends, prepend=0, append=len(ids)))
                for which, mine in zip(range(len(bins)), (~chosen, chosen)):
                    write(which, ids[mine])
                done, lost, bad = done + size, lost + decoded, bad + invalid
                progress(done / 1e6)
            if not seen:
                raise ValueError("there is no text in " + ", ".join(map(str, files)))
        if len(bins) == 2 and not tokens[1]:  # too few documents
            n = max(1, int(tokens[0] * val_fraction))
            begin = bins[0].seek(-n * tokenizer.dtype.itemsize, os.SEEK_END)
            write(1, np.frombuffer(bins[0].read(), tokenizer.dtype))
            bins[0].truncate(begin)
            tokens[0] -= n
            text_bytes[0] -= text_bytes[1]
        for file, *numbers in zip(bins, tokens, text_bytes):
            file.seek(0)
            file.write(bin_header(tokenizer, *numbers))
    if bad:
        print(f"{bad:,} bytes were not UTF-8 and became U+FFFD", file=sys.stderr)
    lost -= sum(text_bytes)
    if lost > 0 and not tokenizer.forms:
        print(f"{lost:,} bytes are in no token of this vocabulary and were left out",
              file=sys.stderr)
    for name, n, size in zip(names, tokens, text_bytes):
        print(f"{name}: {n:,} tokens, {size:,} bytes of text, {size / max(1, n):.2f} bytes per "
              "token")


# -----------------------------------------------------------------------------
# 9. The command line.


def stdlib_files():
    """The Python standard library's own source, which comes with every Python: a corpus of
    several MB that needs no download. Raises ValueError if it is not there."""
    root = sysconfig.get_paths()["stdlib"]
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skip)
        paths = (os.path.join(folder, n) for n in sorted(names) if n.endswith((".py", ".txt")))
        files += [path for path in paths if os.path.getsize(path)]
    if not files:
        raise ValueError(f"no source of the standard library in {root}: use train --input")
    return files


def show(text, tokenizer):
    """Print a text as each kind of tokenizer cuts it."""
    table = [f"{'':12}{'vocabulary':>12}{'tokens':>10}{'bytes per token':>18}"]
    kinds = {"characters": CharTokenizer(), "bytes": ByteTokenizer(),
             "words": WordTokenizer(text), "BPE": tokenizer}
    for kind, t in kinds.items():
        ids = t.encode(text)
        pieces = [t.decode([i]).replace("\n", "\\n") for i in ids]
        line = "|".join(pieces)
        if sys.stdout.isatty():
            line = "".join(f"\x1b[30;{42 + i % 5}m{p}" for i, p in enumerate(pieces)) + "\x1b[0m"
        print(f"{kind}\n  {line}\n  {ids}\n")
        ratio = len(utf8(text)) / max(1, len(ids))
        table.append(f"{kind:12}{t.vocab_size:12,}{len(ids):10,}{ratio:18.2f}")
    print("\n".join(table))


def train(out, paths, vocab_size=4096, special_tokens=(EOT,), pattern="gpt2", num_proc=None):
    """The command: learn a tokenizer and save it."""
    start = time.monotonic()
    os.makedirs(out, exist_ok=True)
    if pattern == "char":
        tokenizer = train_char(paths)
    else:
        learned = train_bpe(paths, vocab_size, special_tokens, pattern, num_proc)
        tokenizer = Tokenizer(*learned, special_tokens, pattern)
        if len(learned[0]) < vocab_size:
            print(f"the text has pairs for {len(learned[0]):,} tokens only", file=sys.stderr)
    tokenizer.save(out)
    print(f"{os.path.join(out, 'tokenizer.json')}: {len(tokenizer.vocab):,} tokens, "
          f"in {time.monotonic() - start:.1f} s")
    return tokenizer


def decode(tokenizer, path, max_tokens):
    """The command: a .bin as text on the standard output."""
    ids = read_bin(path)[0][:max_tokens]
    raw = (tokenizer.decode_bytes(ids[i : i + 65536]) for i in range(0, len(ids), 65536))
    for text in codecs.iterdecode(raw, "utf-8", "replace"):
        sys.stdout.buffer.write(utf8(text))
    sys.stdout.buffer.flush()


def parse_args():
    """The arguments of the command line. Exits with code 2 for wrong ones."""
    parser = argparse.ArgumentParser(
        description="Byte-level BPE: train a tokenizer, encode text files to .bin, and back. "
        "Without arguments: all of it, on Python's standard library, into data/stdlib.")
    commands = parser.add_subparsers(dest="command", metavar="{train,encode,decode,show}")
    files = {"nargs": "+", "metavar": "FILE", "help": "files: .txt with <|endoftext|> between "
             "documents, or .jsonl with a text, also .gz"}
    processes = {"type": int, "help": "processes (default: one per 8 MB, at most one per core); "
                 "the output does not depend on it"}

    add = commands.add_parser("train", help="learn a vocabulary from text").add_argument
    add("--input", required=True, **files)
    add("--out", required=True, metavar="DIR", help="where to leave tokenizer.json")
    add("--vocab_size", type=int, default=10000, help="tokens (default 10000)")
    add("--pattern", default="gpt2", help="where to cut text before merging: "
        f"{', '.join(PATTERNS)} or a regular expression; char: each character is a token, "
        "nothing is merged (default gpt2)")
    add("--special_tokens", nargs="*", default=[EOT], metavar="TOKEN",
        help=f"strings that are one token each (default {EOT})")
    add("--num_proc", **processes)

    add = commands.add_parser("encode", help="text to train.bin and val.bin").add_argument
    add("--tokenizer", required=True, metavar="FILE",
        help="tokenizer.json, vocab.json with merges.txt beside it, or .tiktoken")
    add("--input", required=True, **files)
    add("--out", required=True, metavar="DIR", help="where to leave the .bin files")
    add("--val_fraction", type=float, default=0.01, metavar="F",
        help="share of the documents that goes to val.bin (default 0.01)")
    add("--val_input", default=(), **files | {"help": "make val.bin of these, and train.bin of "
        "all of --input"})
    add("--num_proc", **processes)

    add = commands.add_parser("decode", help="a .bin to text on the standard output").add_argument
    add("--tokenizer", required=True, metavar="FILE", help="as for encode")
    add("--input", required=True, metavar="FILE", help=".bin")
    add("--max_tokens", type=int, help="stop after so many tokens")

    add = commands.add_parser("show", help="cut a text into coloured tokens").add_argument
    add("text")
    add("--tokenizer", metavar="FILE", help="default: data/stdlib/tokenizer.json, or if there is "
        "none one made of the standard library on the spot")

    args = parser.parse_args()
    for name, least in (("num_proc", 1), ("max_tokens", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}")
    if args.command == "encode" and not 0 <= args.val_fraction < 1:
        parser.error("--val_fraction must be at least 0 and below 1")
    return args


def run(args):
    """Do what the command line asks for."""
    folder = os.path.join("data", "stdlib")
    if args.command is None:
        files = stdlib_files()
        print(f"Python's standard library: {len(files):,} files")
        encode_files(train(folder, files), files, folder)
    elif args.command == "train":
        train(args.out, args.input, args.vocab_size, args.special_tokens, args.pattern,
              args.num_proc)
    elif args.command == "show" and not (
            args.tokenizer or os.path.exists(os.path.join(folder, "tokenizer.json"))):
        print("no tokenizer yet: learning one of the standard library", file=sys.stderr)
        show(args.text, Tokenizer(*train_bpe(stdlib_files(), 4096), [EOT]))
    else:
        tokenizer = Tokenizer.from_file(args.tokenizer or folder)
        if args.command == "show":
            show(args.text, tokenizer)
        elif args.command == "decode":
            decode(tokenizer, args.input, args.max_tokens)
        else:
            encode_files(tokenizer, args.input, args.out, args.val_fraction, args.val_input,
                         args.num_proc)
            tokenizer.save(args.out)  # beside the .bin files, where the next stage looks for it


def interrupted(number, frame):
    """SIGTERM ends a run as Ctrl-C does. More of them change nothing (`timeout` sends two), so
    that the tidying up is not interrupted in its turn."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    args = parse_args()
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup and a shell's & leave them
            signal.signal(signum, interrupted)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nbpe.py: stopped; no file was left half-written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"bpe.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
