"""bpe.py against naive versions of itself, by hand-made cases, and through its command line."""

import base64
import collections
import contextlib
import doctest
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import regex

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import bpe
from bpe import EOT, PATTERNS, Tokenizer

# fmt: off
PIECES = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "a", "B", "don't", "'s", "'LL", "é", "ſ", "1", "234",
    "½", ".", ",", "!", "?'", "_", "(", "/", "日", "本", "\u3000", "\xa0", "\u0301", "ا", "😀",
    "\0",
    "\x1c", "ǅ", "’", "-", "\u200b", "\u2028", "Ⅷ", "٣", "ि", "<|", "the", "ing", "\x85", "aaaa",
    "camelCase", "\ufeff", "слово", "\u1680", "ếch", "end.\n",
]
# fmt: on


def random_text(rng, n=12):
    """Words, spaces and oddities from all over Unicode."""
    if rng.random() < 0.2:
        code = lambda: rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        return "".join(chr(code()) for _ in range(rng.randrange(n)))
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(n)))


def sample_text(seed=0, documents=40):
    """English-like text with documents, for training."""
    rng = random.Random(seed)
    syllables = ["ba", "the", "ing", "to", "re", "aa", "a", "st", "é", "日本", "'s", "12", "x"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    texts = []
    for _ in range(documents):
        chosen = rng.choices(
            words, weights=[1 / (i + 1) for i in range(200)], k=rng.randint(5, 150)
        )
        texts.append(
            "".join(w + rng.choice([" ", " ", ", ", ".\n", "  ", "\n\n"]) for w in chosen)
        )
    return texts


def naive_pretokens(text, pattern, specials=(EOT,)):
    counts = collections.Counter()
    for part in regex.split("|".join(map(regex.escape, specials)), text) if specials else [text]:
        counts.update(m[0].encode() for m in regex.finditer(pattern, part))
    return counts


def naive_encode(tokenizer, text, pattern=None):
    """Textbook encoding without special tokens."""
    rank = {pair: i for i, pair in reversed(list(enumerate(tokenizer.merges)))}
    of = {token: i for i, token in tokenizer.vocab.items()}
    ids = []
    for match in regex.finditer(pattern or tokenizer.pattern, text):
        word = [bytes([b]) for b in match[0].encode()]
        while pairs := [(rank[p], i) for i, p in enumerate(zip(word, word[1:])) if p in rank]:
            _, i = min(pairs)
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += [of[w] for w in word]
    return ids


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(EOT.join(sample_text()).encode())
    return path


@pytest.fixture(scope="module")
def tokenizers(corpus):
    return {
        name: Tokenizer(*bpe.train_bpe(corpus, 400, [EOT], name), [EOT], name) for name in PATTERNS
    }


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["gpt2"]


# ---- the simple tokenizers and the docstrings


def test_simple_tokenizers_round_trip():
    text = "Naïve? 日本 😀\n isn't\t1.5"
    for kind in (bpe.CharTokenizer(), bpe.ByteTokenizer(), bpe.WordTokenizer(text)):
        ids = kind.encode(text)
        assert kind.decode(ids) == text
        assert all(0 <= i < kind.vocab_size for i in ids)
        assert kind.decode(kind.encode("")) == ""
    assert bpe.WordTokenizer("a b").encode("a c") == [1, 0]
    assert bpe.ByteTokenizer().decode([0xFF]) == "\ufffd"


def test_docstring_examples():
    assert doctest.testmod(bpe).failed == 0


# ---- training


def test_mistake_6_bpe_ties_and_overlaps():
    """'aaaa' is two of (a, a), not three merges; equal counts go to the greater pair of bytes."""
    assert bpe.learn_merges({b"aaaa": 1}, 2) == [(b"a", b"a"), (b"aa", b"aa")]
    merges = [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a"), (b"a", b"b")]
    assert bpe.learn_merges({b"aaaaa": 3, b"ab": 1}, 9) == merges
    assert bpe.learn_merges({b"abab": 1, b"cd": 2}, 1) == [(b"c", b"d")]
    words = {b"ab": 1, b"b": 1, b"ac": 1, b"a\xc3": 1}
    assert bpe.learn_merges(words, 2) == [(b"a", b"\xc3"), (b"a", b"c")]
    # a longer string is greater than its own beginning: (ab, z) before (a, z)
    words = {b"ab": 9, b"abz": 3, b"az": 3}
    assert bpe.learn_merges(words, 3) == [(b"a", b"b"), (b"ab", b"z"), (b"a", b"z")]


@pytest.mark.parametrize("seed", range(4))
def test_merges_equal_the_naive_ones(seed):
    rng = random.Random(seed)
    for trial in range(28):
        letters = ["ab", "abcde", "aé日", "".join(map(chr, range(97, 123)))][trial % 4]
        words = collections.Counter()
        for _ in range(rng.randint(1, 80)):
            words["".join(rng.choices(letters, k=rng.randint(1, 14))).encode()] += rng.randint(
                1, 4
            )
        n = rng.randint(0, 150)
        assert bpe.learn_merges(words, n) == bpe.learn_merges_naive(words, n)


@pytest.mark.parametrize("name", PATTERNS)
def test_training_equals_naive_pretokens_and_merges(corpus, tokenizers, name):
    text = corpus.read_bytes().decode()
    counts = naive_pretokens(text, PATTERNS[name])
    assert tokenizers[name].merges == bpe.learn_merges_naive(counts, 400 - 257)
    ours, _ = next(bpe.count_pretokens(0, 1, [corpus], PATTERNS[name], [EOT]))
    assert ours == {word.decode(): n for word, n in counts.items()}


def test_training_does_not_depend_on_processes_or_blocks(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes(EOT.join(sample_text(1, 300)).encode())
    specials = [EOT, "ing st", "ing st e"]
    expected = bpe.train_bpe(path, 400, specials, num_proc=1)
    for block, processes in ((1 << 20, 2), (3000, 3), (200, 1)):
        monkeypatch.setattr(bpe, "BLOCK", block)
        assert bpe.train_bpe(path, 400, specials, num_proc=processes) == expected
    counts = naive_pretokens(
        path.read_bytes().decode(), PATTERNS["gpt2"], sorted(specials, key=len, reverse=True)
    )
    assert expected[1] == bpe.learn_merges_naive(counts, 400 - 259)


def test_spaces_before_a_separator_stay_together(monkeypatch):
    """Alone, "b " and " |" would make two pre-tokens of what is one."""
    monkeypatch.setattr(bpe, "BLOCK", 8)
    text = b"a b  |s| c  |s|" * 9
    for size in range(1, 20):
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        for piece in bpe.cut_stream(pieces, ["|s|", "s|"], True):
            assert not piece.startswith(b" |") and not piece.endswith(b"|s")


def test_no_merge_crosses_a_special_token_or_pretoken(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(f"ab{EOT}ab{EOT}" * 50 + "x y " * 50, encoding="utf-8")
    vocab, merges = bpe.train_bpe(path, 300, [EOT])
    assert merges == [(b"a", b"b"), (b" ", b"y"), (b" ", b"x")]  # and then there are no pairs
    assert list(vocab) == list(range(256 + 3 + 1)) and vocab[259] == EOT.encode()
    assert [vocab[i] for i in range(256)] == [bytes([i]) for i in range(256)]


def test_the_longest_special_token_wins_in_training(tmp_path):
    (tmp_path / "t.txt").write_text("abcd abcd")
    assert bpe.train_bpe(tmp_path / "t.txt", 300, ["ab", "abcd"])[1] == []


def test_training_with_a_pattern_of_ones_own(corpus):
    text = corpus.read_bytes().decode()
    for pattern in (r"\w+|\W+", r"(\w)\w*(e)?|\W+"):  # with groups, too
        vocab, merges = bpe.train_bpe(corpus, 300, [EOT], pattern)
        assert merges == bpe.learn_merges_naive(naive_pretokens(text, pattern), 300 - 257)
    own = Tokenizer(vocab, merges, [EOT], r"(\w)\w*")  # what lies between matches is kept
    assert own.decode(own.encode(text)) == text


def test_training_a_small_corpus_is_quick(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("".join(sample_text(2, 400))[:130_000], encoding="utf-8")
    start = time.perf_counter()
    vocab, _ = bpe.train_bpe(path, 500, [EOT])
    assert len(vocab) == 500 and time.perf_counter() - start < 1.5


# ---- cutting, and the chunk table


@pytest.mark.parametrize("name", PATTERNS)
def test_pretokens_of_the_parts_are_those_of_the_whole(name):
    rng = random.Random(5)
    findall = regex.compile(PATTERNS[name]).findall
    for _ in range(4000):
        text = random_text(rng, 10)
        block = text.encode()
        cuts = [*bpe.find_cuts(block).tolist(), len(block)] if block else [0]
        parts = [block[i:j].decode() for i, j in zip(cuts, cuts[1:])]
        assert [p for part in parts for p in findall(part)] == findall(text)


def test_cuts_are_where_they_should_be():
    block = b"Two words, don't; x1.5\n\nyes \n no\nnew\xffdoc"
    cuts = [*bpe.find_cuts(block).tolist(), len(block)]
    expected = "Two| words|,| don't|;| x1|.5|\n\nyes| \n| no|\n|new|\xff|doc".split("|")
    assert [block[i:j].decode("latin-1") for i, j in zip(cuts, cuts[1:])] == expected
    assert bpe.find_cuts(b"end.\nNext").tolist() == [0, 3, 5]  # end, .\n, Next


@pytest.mark.parametrize("zeros", [False, True])
def test_chunk_table_numbers_chunks(zeros):
    rng = random.Random(6)
    table, seen = bpe.ChunkTable(), {b"\xff": 0}
    for size in (0, 1, 5, 300, 70_000, 200_000):
        text = "".join(rng.choice(PIECES) * rng.choice([1, 1, 1, 9]) for _ in range(size))
        block = text.encode() if zeros else text.replace("\0", "").encode()
        known = list(table)
        numbers = table.lookup(block)
        chunks = list(table)
        assert b"".join(chunks[i] for i in numbers.tolist()) == block
        assert chunks[: len(known)] == known
        cuts = [*bpe.find_cuts(block).tolist(), len(block)] if block else []
        for i, j in zip(cuts, cuts[1:]):
            seen.setdefault(block[i:j], len(seen))
        assert seen.keys() == table.keys()


def test_chunk_table_compares_whole_chunks():
    """Many chunks alike in their first 8 or 16 bytes, of which some share a slot."""
    rng = random.Random(6)
    words = [b" prefix_"[: 1 + i % 8] + b"x" * (i % 23) + b"%d" % i for i in range(60_000)] * 2
    rng.shuffle(words)
    words = [b" " + w.replace(b"_", b"x").replace(b" ", b"x") for w in words]
    table = bpe.ChunkTable()
    numbers = table.lookup(b"".join(words))
    chunks = list(table)
    assert [chunks[i] for i in numbers.tolist()] == words


# ---- encoding


@pytest.mark.parametrize("name", PATTERNS)
def test_encode_equals_naive(tokenizers, name):
    tokenizer, rng = tokenizers[name], random.Random(7)
    texts = [random_text(rng) for _ in range(300)] + sample_text(3, 5) + ["", " ", "\n", "aaaaaaa"]
    for text in texts:
        expected = naive_encode(tokenizer, text)
        assert tokenizer.encode_ordinary(text) == expected
        assert tokenizer.decode(expected) == text
    everything = "".join(texts + sample_text(3, 60))
    assert tokenizer.chunked and len(everything) > 1 << 14  # the fast way
    assert tokenizer.encode_ordinary(everything) == naive_encode(tokenizer, everything)


def test_ways_to_merge_are_equal(tokenizer):
    rng = random.Random(8)
    words = {
        "".join(rng.choices(["a", "the", "ing", "é", "日本", "x", "st"], k=rng.randint(2, 9)))
        for _ in range(3000)
    }
    words = sorted(words) + ["aaaa" * 24, "", "x"]
    naive = [naive_encode(tokenizer, word, r"[\s\S]+") for word in words]
    assert [tokenizer._bpe(word) for word in words] == naive
    for batch in (words, words[:99], words[::7], [*words, "the" * 99]):  # arrays or one by one
        ids, lengths = tokenizer._bpe_many(batch)
        ids, ends = ids.tolist(), np.cumsum(lengths).tolist()
        assert [ids[i:j] for i, j in zip([0, *ends], ends)] == [tokenizer._bpe(w) for w in batch]
    long = "aaaaingtheing" * 5000
    start = time.perf_counter()
    ids = tokenizer._bpe(long)
    assert time.perf_counter() - start < 5  # not quadratic
    assert tokenizer.decode(ids) == long
    assert ids[:30] == tokenizer._bpe(long[:90])[:30]


def test_whole_pretokens_win_among_many():
    """ignore_merges, and bytes that the vocabulary lacks, one by one and in arrays."""
    vocab = {i: bytes([97 + i]) for i in range(9)} | {9: b"ab", 10: b"abc", 11: b"bca"}
    words = ["".join(w) for n in (1, 2, 3, 4) for w in itertools.product("abcx", repeat=n)]
    for ignore in (False, True):
        tokenizer = Tokenizer(vocab, [(b"a", b"b")], ignore_merges=ignore)
        assert tokenizer._bpe("abc") == ([10] if ignore else [9, 2])
        assert tokenizer._bpe("xbcax") == [1, 2, 0] and tokenizer._bpe("x") == []
        ids, lengths = tokenizer._bpe_many(words)
        assert len(words) > 100 and len(lengths) == len(words)
        assert ids.tolist() == [i for w in words for i in tokenizer._bpe(w)]


def test_special_tokens(tokenizer):
    merged = Tokenizer(tokenizer.vocab, tokenizer.merges, ["<|a|>", "<|a|><|b|>", EOT, "<|b|>"])
    a, ab, eot, b = (merged.special_tokens[s] for s in ("<|a|>", "<|a|><|b|>", EOT, "<|b|>"))
    assert eot == tokenizer.eot_id == merged.eot_id and merged.vocab_size == 403
    assert merged.encode("<|a|><|b|><|a|>") == [ab, a]  # the longest wins
    assert merged.encode(f"<|b|>x{EOT}") == [b, ord("x"), eot]
    assert merged.decode([ab, eot]) == "<|a|><|b|>" + EOT
    ordinary = merged.encode_ordinary(f"<|a|>{EOT}")
    assert not {a, ab, eot, b} & set(ordinary) and merged.decode(ordinary) == f"<|a|>{EOT}"
    # white space before a special token is at the end of its text
    assert merged.encode("a \n <|a|>")[-1] == a
    assert merged.encode("a \n ") + [a] == merged.encode("a \n <|a|>")
    assert Tokenizer(tokenizer.vocab, tokenizer.merges).encode(EOT) != [eot]
    for bad in ({"<|a|>": 97}, {"<|a|>": 500, "<|b|>": 500}, [""]):
        with pytest.raises(ValueError, match="special token"):
            Tokenizer(tokenizer.vocab, tokenizer.merges, bad)


def test_lone_surrogates_and_pairs(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_decode_invalid_utf8_and_unknown_ids(tokenizer):
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(np.array([104, 105])) == "hi"
    import torch

    assert tokenizer.decode(torch.tensor([104, 105])) == "hi"
    for bad in (400, -1, 10**12):
        with pytest.raises(ValueError, match="not in the vocabulary"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_encode_iterable_equals_encode(tokenizer, size):
    both = Tokenizer(tokenizer.vocab, tokenizer.merges, [EOT, "the ing", " x"])
    text = (EOT.join(sample_text(4, 60)) + " \n  x  the in \n\n " + EOT + "the ing") * 3
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    assert list(both.encode_iterable(pieces)) == both.encode(text)
    own = Tokenizer(tokenizer.vocab, tokenizer.merges, [EOT], r"\w+|\W+")  # can not be cut
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    assert list(own.encode_iterable(pieces)) == own.encode(text)


def test_encode_iterable_is_lazy_and_takes_constant_memory(tokenizer):
    endless = itertools.cycle(["the thing is, ", "a stone\n"])
    ids = tokenizer.encode_iterable(endless)
    first = list(itertools.islice(ids, 300_000))  # would never return if it were not lazy
    assert (
        tokenizer.decode(first[:5])
        == tokenizer.decode(tokenizer.encode("the thing is, "))[: len(tokenizer.decode(first[:5]))]
    )


def test_caches_are_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "MAX_CHUNKS", 1 << 16)
    monkeypatch.setattr(bpe, "MAX_WORDS", 1 << 15)
    fresh = Tokenizer(tokenizer.vocab, tokenizer.merges)
    words = [f" w{i:x}" for i in range(80_000)]
    ids = fresh.encode_iterable("".join(words[i : i + 9000]) for i in range(0, len(words), 9000))
    count = sum(1 for _ in ids)
    assert len(fresh._table) < (1 << 16) + 20_000 and len(fresh._cache) < (1 << 15) + 20_000
    assert count == len(fresh.encode_ordinary("".join(words)))


# ---- files of other tools


def hf_json(**changes):
    """A small tokenizer.json such as Hugging Face writes."""
    char = bpe.byte_characters()
    vocab = {c: i for i, c in enumerate(char)}
    for i, token in enumerate(["th", "the", "Ġthe", "12", "ab", "Ċ"]):
        vocab.setdefault(token, 256 + i)
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e", ["Ġ", "the"], "1 2", "a b"]}
    model |= changes.pop("model", {})
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    parts = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level}
    return json.dumps({**parts, "decoder": level, "model": model, **changes})


def added(i, content, **flags):
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **off, "special": True, **flags}


def texts_of(tokenizer, text):
    return [tokenizer.decode([i]) for i in tokenizer.encode(text)]


def test_hf_byte_level_and_save(tmp_path):
    tokenizer = Tokenizer.from_json(hf_json())
    assert texts_of(tokenizer, "the the 12") == ["the", " the", " ", "12"]
    assert tokenizer.chunked
    tokenizer.save(tmp_path)
    again = Tokenizer.from_file(tmp_path)
    assert again.encode("the the ab\n") == tokenizer.encode("the the ab\n")
    assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)


def test_hf_splits():
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    sequence = lambda *steps: {"type": "Sequence", "pretokenizers": [*steps, level]}
    tokenizer = Tokenizer.from_json(hf_json(pre_tokenizer=sequence(digits)))
    assert texts_of(tokenizer, "the 12  1") == ["the", " ", "1", "2", " ", " ", "1"]
    assert not tokenizer.chunked

    def split(pattern, behavior, invert=False):
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior}
        step["invert"] = invert
        parts = {"type": "Sequence", "pretokenizers": [step, {**level, "use_regex": False}]}
        return bpe.split_text(bpe.pre_tokenizer(parts), "ab 12c3")

    assert split(r"\d", "Isolated") == ["ab ", "1", "2", "c", "3"]
    assert split(r"\d", "Removed") == ["ab ", "c"]
    assert split(r"\d", "Removed", True) == ["1", "2", "3"]
    assert split(r"\d", "Contiguous") == ["ab ", "12", "c", "3"] == split(r"\d", "Contiguous", 1)
    assert split(r"\d", "MergedWithPrevious") == ["ab 1", "2", "c3"]
    assert split(r"\d", "MergedWithPrevious", True) == ["ab ", "1", "2c", "3"]
    assert split(r"\d", "MergedWithNext") == ["ab ", "1", "2c", "3"]
    assert split(r" |(?=3)", "MergedWithNext") == ["ab", " 12c", "3"]
    with pytest.raises(ValueError, match="behavior Merged of"):
        split(r"\d", "Merged")
    falcon = {"type": "Punctuation", "behavior": "Contiguous"}, level, digits
    falcon = {"type": "Sequence", "pretokenizers": falcon}
    tokenizer = Tokenizer.from_json(hf_json(pre_tokenizer=falcon))
    # digits are split off after the bytes became characters, and the bytes of "о" are "Ð¾"
    assert tokenizer._split("а+=(1) о") == ["а", "+=(", "1", ")", " \udcd0", "\udcbe"]
    assert tokenizer.decode(tokenizer.encode("а+=(1) о")) == "а+=(1) о"
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    assert texts_of(Tokenizer.from_json(hf_json(pre_tokenizer=prefix)), "the") == [" the"]


def test_hf_splits_equal_theirs():
    hf = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    rng = random.Random(12)
    texts = ["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(100)]
    digits = {"type": "Digits", "individual_digits": False}
    level = {**LEVEL, "trim_offsets": True, "use_regex": True}
    for behavior in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        mark = {"type": "Punctuation", "behavior": behavior}
        split = {"type": "Split", "pattern": {"Regex": r"\s+|e"}, "behavior": behavior}
        last = {**split, "pattern": {"String": "2"}, "invert": False}
        for steps in ([mark, level], [{**split, "invert": False}, level],
                      [{**split, "invert": True}, level], [mark, level, digits, last]):
            data = json.loads(hf_json(pre_tokenizer={"type": "Sequence", "pretokenizers": steps}))
            data["decoder"] = level
            data["model"]["merges"] = ["t h", "th e", "Ġ the", "1 2", "a b"]
            theirs = hf.Tokenizer.from_str(json.dumps(data))
            tokenizer = Tokenizer.from_json(json.dumps(data))
            for text in texts:
                assert tokenizer.encode(text) == theirs.encode(text).ids, (steps, text)


def test_hf_ignore_merges_takes_whole_pretokens():
    model = {"merges": ["a b"], "ignore_merges": True}
    assert texts_of(Tokenizer.from_json(hf_json(model=model)), "the ab") == ["the", " ", "ab"]
    model["ignore_merges"] = False
    assert texts_of(Tokenizer.from_json(hf_json(model=model)), "the")[0] == "t"


def test_hf_added_tokens_and_normalizer(monkeypatch):
    tokens = [
        added(300, "<|x|>"),
        added(301, "<m>", lstrip=True),
        added(302, "ab", single_word=True),
        added(303, "é<n>", normalized=True),
        added(304, "<r>", rstrip=True),
    ]
    tokenizer = Tokenizer.from_json(hf_json(added_tokens=tokens, normalizer={"type": "NFC"}))
    assert tokenizer.encode("the  <m>") == [257, 301]
    assert tokenizer.encode("<r> \n<|x|>") == [304, 300]
    assert tokenizer.encode("ab<|x|>") == [302, 300] and tokenizer.encode("cab")[1:] == [260]
    assert tokenizer.encode("e\u0301<n>") == [303]
    assert tokenizer.encode("e\u0301") == list("é".encode())
    text = "the  <m> ab<r> \n<|x|>" * 5
    monkeypatch.setattr(bpe, "BLOCK", 8)
    assert list(tokenizer.encode_iterable(text)) == tokenizer.encode(text)
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.encode("ab  <m>e\u0301<n>") == tokenizer.encode("ab  <m>e\u0301<n>")


def test_vocab_and_merges_files(tokenizer, tmp_path):
    char = bpe.byte_characters()
    name = lambda b: "".join(char[i] for i in b)
    vocab = {name(t): i for i, t in tokenizer.vocab.items()} | {"model": 401}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2"] + [f"{name(a)} {name(b)}" for a, b in tokenizer.merges]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    read = Tokenizer.from_file(tmp_path / "vocab.json")
    text = EOT.join(sample_text(9, 3))
    assert read.encode(text) == tokenizer.encode(text) and read.eot_id == tokenizer.eot_id


def test_tiktoken_ranks(tokenizer, tmp_path):
    ordinary = [t for t in tokenizer.vocab.values() if t != EOT.encode()]
    lines = [f"{base64.b64encode(t).decode()} {i}" for i, t in enumerate(ordinary)]
    (tmp_path / "own.tiktoken").write_text("\n".join(lines))
    read = Tokenizer.from_file(tmp_path / "own.tiktoken")
    text = EOT.join(sample_text(10, 3))
    assert read.encode(text) == tokenizer.encode(text)
    named = Tokenizer.from_file(
        tmp_path / "own.tiktoken", pattern="cl100k", special_tokens=["<s>"]
    )
    assert named.pattern == PATTERNS["cl100k"] and named.special_tokens == {"<s>": 399}


def test_same_ids_as_hugging_face(tokenizers, tmp_path):
    hf = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    rng = random.Random(11)
    texts = [random_text(rng) + rng.choice(["", EOT]) + random_text(rng) for _ in range(300)]
    vocab = {i: c.encode() for i, c in enumerate("abé日 ")}
    char = Tokenizer(vocab, [], [EOT], bpe.CHAR_PATTERN, ignore_merges=True)
    own = Tokenizer(tokenizers["gpt2"].vocab, tokenizers["gpt2"].merges, [EOT], r"\w+|[.,]")
    for name, tokenizer in {**tokenizers, "char": char, "own": own}.items():
        tokenizer.save(tmp_path / f"{name}.json")
        theirs = hf.Tokenizer.from_file(str(tmp_path / f"{name}.json"))
        for text in texts:
            assert tokenizer.encode(text) == theirs.encode(text).ids, (name, text)
        if name != "char":
            assert theirs.decode(tokenizer.encode("the é 日本")) == "the é 日本"


BAD_REGEX = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
BROKEN = [
    *("", "{", "[]", "5", '{"model": 3}', '{"model": {"type": "WordPiece", "vocab": {}}}'),
    *(hf_json()[:-40], "[" * 100_000),
    *(hf_json(model={"vocab": v}) for v in ({"a": "x"}, {"a": -1}, {"a": 10**15}, 3, [])),
    *(hf_json(model={"merges": [merge]}) for merge in ("t", "t q q", "t zz")),
    *(hf_json(pre_tokenizer=part) for part in (None, {"type": "Whitespace"})),
    *(hf_json(normalizer={"type": kind}) for kind in ("Precompiled", "Lowercase")),
    *(hf_json(added_tokens=[token]) for token in ({"id": 1}, 7)),
    hf_json(pre_tokenizer={"type": "Sequence", "pretokenizers": [BAD_REGEX, LEVEL]}),
    hf_json(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Metaspace"}, LEVEL]}),
    hf_json(added_tokens=[added(97, "<|x|>")]),
    hf_json(added_tokens=[added(300, "")]),
]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_tokenizer_files_are_refused_in_one_line(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises(ValueError) as error:
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


# ---- .bin files


def run(*args, cwd, **options):
    command = [sys.executable, os.path.join(ROOT, "bpe.py"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=120, **options
    )


@pytest.fixture
def trained(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path


def test_encode_files_documents_and_header(trained, tokenizer):
    texts = [t for t in sample_text(12, 90) if t.strip()]
    half = len(texts) // 2
    (trained / "a.txt").write_bytes(EOT.join(texts[:half]).encode())  # gets its last EOT
    with gzip.open(trained / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        for t in texts[half:]:
            file.write(json.dumps({"text": t, "id": 5}) + '\n\n{"text": ""}\n')
    bpe.encode_files(tokenizer, [trained / "a.txt", trained / "b.jsonl.gz"], trained, 0.1)
    chosen = {"train.bin": [], "val.bin": []}
    for i, text in enumerate(texts):
        chosen["val.bin" if (i + 1) // 10 > i // 10 else "train.bin"].append(text)
    for name, documents in chosen.items():
        ids, header = bpe.read_bin(trained / name)
        expected = [i for d in documents for i in [*tokenizer.encode(d), tokenizer.eot_id]]
        assert ids.tolist() == expected and ids.dtype == np.uint16
        size = sum(len(d.encode()) for d in documents)
        assert header[:7].tolist() == [20240520, 1, len(expected), 400, tokenizer.eot_id, size, 0]
        assert os.path.getsize(trained / name) == 1024 + 2 * len(expected)
    assert not list(trained.glob("*.tmp"))


def test_encoding_does_not_depend_on_processes_or_blocks(trained, tokenizer, monkeypatch):
    (trained / "a.txt").write_bytes(EOT.join(sample_text(13, 200)).encode())
    results = set()
    for block, processes in ((1 << 20, 1), (1 << 20, 2), (500, 3), (61, 1)):
        monkeypatch.setattr(bpe, "BLOCK", block)
        bpe.encode_files(tokenizer, [trained / "a.txt"], trained, 0.05, num_proc=processes)
        results.add((trained / "train.bin").read_bytes() + (trained / "val.bin").read_bytes())
    assert len(results) == 1


def test_one_document_is_split_at_its_tail(trained, tokenizer):
    text = "a stone. " * 500
    (trained / "a.txt").write_text(text)
    bpe.encode_files(tokenizer, [trained / "a.txt"], trained, 0.1)
    train, val = (bpe.read_bin(trained / n) for n in ("train.bin", "val.bin"))
    expected = [*tokenizer.encode(text), tokenizer.eot_id]
    assert [*train[0].tolist(), *val[0].tolist()] == expected
    assert len(val[0]) == len(expected) // 10
    assert train[1][5] + val[1][5] == len(text)


def test_literal_eot_in_jsonl_is_text(trained, tokenizer):
    (trained / "a.jsonl").write_text(json.dumps({"text": f"x{EOT}y"}) + "\n")
    bpe.encode_files(tokenizer, [trained / "a.jsonl"], trained, 0)
    ids = bpe.read_bin(trained / "train.bin")[0].tolist()
    assert ids.count(tokenizer.eot_id) == 1 and tokenizer.decode(ids) == f"x{EOT}y{EOT}"
    assert not (trained / "val.bin").exists()


def test_large_vocabulary_makes_uint32(tmp_path):
    vocab = {i: bytes([i]) for i in range(256)} | {
        65_535 + i: bytes([65, 66 + i]) for i in range(2)
    }
    tokenizer = Tokenizer(vocab, [(b"A", b"B"), (b"A", b"C")], [EOT])
    assert tokenizer.vocab_size == 65_538
    (tmp_path / "a.txt").write_text("ABAC")
    bpe.encode_files(tokenizer, [tmp_path / "a.txt"], tmp_path, 0)
    ids, header = bpe.read_bin(tmp_path / "train.bin")
    assert ids.dtype == np.uint32 and ids.tolist() == [65_535, 65_536, 65_537]
    assert header[:6].tolist() == [20240801, 7, 3, 65_538, 65_537, 4]


def test_read_bin_of_nanogpt(tmp_path):
    np.arange(700, dtype=np.uint16).tofile(tmp_path / "raw.bin")
    ids, header = bpe.read_bin(tmp_path / "raw.bin")
    assert header is None and ids.tolist() == list(range(700))
    (tmp_path / "odd.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="whole tokens"):
        bpe.read_bin(tmp_path / "odd.bin")


# ---- the command line


def test_command_line_without_arguments(tmp_path):
    (tmp_path / "data/stdlib").mkdir(parents=True)
    result = run("show", "hi", cwd=tmp_path)  # there is a folder, but no tokenizer in it yet
    assert result.returncode == 0 and "learning" in result.stderr
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # quiet when piped
    out = tmp_path / "data" / "stdlib"
    assert sorted(p.name for p in out.iterdir()) == ["tokenizer.json", "train.bin", "val.bin"]
    tokenizer = Tokenizer.from_file(out)
    ids, header = bpe.read_bin(out / "train.bin")
    assert tokenizer.vocab_size == header[3] == 4096 and int(ids.max()) < 4096
    assert len(ids) > 1_000_000 and header[5] > 3 * len(ids)
    assert "import" in tokenizer.decode(ids[:20_000].tolist())
    result = run("decode", "--tokenizer", out, "--input", out / "val.bin", cwd=tmp_path)
    ids, _ = bpe.read_bin(out / "val.bin")
    assert result.stdout == tokenizer.decode(ids.tolist())


def test_command_line_train_encode_decode_show(tmp_path):
    text = EOT.join(sample_text(14, 30)).encode() + b"\r\n caf\xff\xfe \xe6\x97"
    (tmp_path / "a.txt").write_bytes(text)
    result = run("train", "--input", "a.txt", "--vocab_size", 300, "--out", "o", cwd=tmp_path)
    assert result.returncode == 0 and "300 tokens" in result.stdout
    assert "4 bytes were not UTF-8" in result.stderr
    args = ("encode", "--tokenizer", "o/tokenizer.json", "--input", "a.txt", "--out", "bins")
    result = run(*args, "--val_input", "a.txt", "--num_proc", 2, cwd=tmp_path)
    assert result.returncode == 0 and "bytes per token" in result.stdout
    assert (tmp_path / "bins/train.bin").read_bytes() == (tmp_path / "bins/val.bin").read_bytes()
    assert (tmp_path / "bins/tokenizer.json").read_bytes() == (
        tmp_path / "o/tokenizer.json"
    ).read_bytes()
    result = run("decode", "--tokenizer", "bins", "--input", "bins/train.bin", cwd=tmp_path)
    assert result.stdout == (text + EOT.encode()).decode("utf-8", "replace").replace("\r\n", "\n")
    result = run("show", "the stone: é", "--tokenizer", "o", cwd=tmp_path)
    assert result.returncode == 0
    for row in ("characters", "bytes", "words", "BPE"):
        assert row in result.stdout
    assert f"{len('the stone: é'.encode()) / len('the stone: é'):.2f}" in result.stdout


def test_character_level_as_for_nanogpt(tmp_path):
    text = "To be, or not to bé.\n" * 40
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    args = ("train", "--pattern", "char", "--input", "a.txt", "--out", "o")
    assert run(*args, cwd=tmp_path).returncode == 0
    args = ("encode", "--tokenizer", "o", "--input", "a.txt", "--out", "o", "--val_fraction", 0.1)
    assert run(*args, cwd=tmp_path).returncode == 0
    ids = np.concatenate([bpe.read_bin(tmp_path / "o" / n)[0] for n in ("train.bin", "val.bin")])
    chars = sorted(set(text))
    assert ids.tolist() == [chars.index(c) for c in text] + [len(chars)]
    (tmp_path / "b.txt").write_text("To bee!! ñ")
    result = run("encode", "--tokenizer", "o", "--input", "b.txt", "--out", "p", cwd=tmp_path)
    assert "4 bytes are in no token" in result.stderr and result.returncode == 0


TRAIN, ENCODE = "train --out o --input ", "encode --out o --tokenizer t.json --input "
BAD_INPUT = [
    (TRAIN + "no.txt", 1, "no.txt"),
    (TRAIN + "empty.txt", 1, "is empty"),
    (TRAIN + "bad.jsonl", 1, "bad.jsonl:2"),
    (TRAIN + "cut.txt.gz", 1, "cut.txt.gz"),
    (TRAIN + "no.gz", 1, "no.gz"),
    (TRAIN + "bad.gz --num_proc 2", 1, "bad.gz"),
    (TRAIN + "a.txt --special_tokens=", 1, "empty"),
    (TRAIN + "a.txt --vocab_size 256", 1, "256 bytes"),
    (TRAIN + "a.txt --pattern (", 1, "pattern"),
    (TRAIN + "a.txt --out a.txt", 1, "a.txt"),
    (ENCODE + "a.txt --tokenizer bad.json", 1, "bad.json"),
    (ENCODE + "a.txt --tokenizer no.json", 1, "no.json"),
    (ENCODE + "a.txt bad.jsonl", 1, "bad.jsonl:2"),
    (ENCODE + "a.txt bad.jsonl --num_proc 2", 1, "bad.jsonl:2"),
    (ENCODE + "cut.txt.gz --num_proc 2", 1, "gzip"),
    (ENCODE + "blank.jsonl", 1, "no text"),
    (ENCODE + "a.txt --val_fraction 2", 2, "val_fraction"),
    ("decode --tokenizer t.json --input wild.bin", 1, "not in the vocabulary"),
    ("decode --tokenizer t.json --input no.bin", 1, "no.bin"),
    ("decode --tokenizer t.json --input wild.bin --max_tokens -5", 2, "max_tokens"),
    ("shine", 2, "shine"),
]


@pytest.mark.parametrize("args, code, message", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing(tokenizer, tmp_path, args, code, message):
    tokenizer.save(tmp_path / "t.json")
    (tmp_path / "a.txt").write_text("some text, and more of it")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 5}\n')
    (tmp_path / "bad.json").write_text('{"model": {"vocab": {"a": 1')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:30])
    (tmp_path / "no.gz").write_bytes(b"this is not gzip at all")
    (tmp_path / "bad.gz").write_bytes(gzip.compress(b"")[:10] + b"not deflated")
    np.full(9, 60_000, np.uint16).tofile(tmp_path / "wild.bin")
    result = run(*args.split(), cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code and message in last and "error" in last
    assert "Traceback" not in result.stderr
    assert code == 2 or len(result.stderr.strip().splitlines()) == 1
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".tmp",) or p.name == "train.bin"]


def test_interrupted_run_keeps_the_old_files(trained):
    (trained / "a.txt").write_text("".join(f"w{i:x} " for i in range(1_500_000)))
    (trained / "train.bin").write_bytes(b"old")
    args = f"encode --tokenizer {trained} --input {trained}/a.txt --out {trained} --num_proc 2"
    command = [sys.executable, os.path.join(ROOT, "bpe.py"), *args.split()]
    for how in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(600):
            if (trained / "train.bin.tmp").exists():
                break
            time.sleep(0.05)
        for _ in range(9):  # only once works, too, but `timeout` sends each signal twice
            process.send_signal(how)
            time.sleep(0.003)
        _, error = process.communicate(timeout=60)
        # or killed by one that came when Python was already on its way out
        assert process.returncode in (130, -how) and b"Traceback" not in error
        assert b"stopped" in error
        assert (trained / "train.bin").read_bytes() == b"old"
        assert not list(trained.glob("*.tmp"))


def test_a_killed_worker_is_reported(trained, tokenizer, monkeypatch):
    (trained / "a.txt").write_text("text " * 1000)
    monkeypatch.setattr(bpe, "encode_blocks", lambda *_, **__: os._exit(9))
    with pytest.raises(ValueError, match="worker process was killed"):
        bpe.encode_files(tokenizer, [trained / "a.txt"], trained, num_proc=2)
    assert not (trained / "train.bin").exists() and not list(trained.glob("*.tmp"))


def endless(first, step):
    """For `parallel`: numbers, of which each is put into a file as it is made."""
    for i in itertools.count(first, step):
        with open("made", "a") as file:
            file.write(f"{i}\n")
        yield b"x" * (1 << 20)


def test_parallel_reads_only_a_little_ahead_and_ends_at_once(tmp_path, monkeypatch):
    """However slow the reader of the results is."""
    monkeypatch.chdir(tmp_path)
    results = bpe.parallel(endless, 2)
    for _ in range(3):
        next(results)
        time.sleep(0.2)
    assert len((tmp_path / "made").read_text().split()) <= 3 + 2
    start = time.perf_counter()
    results.close()
    assert time.perf_counter() - start < 5 and not multiprocessing.active_children()


def test_parallel_gives_results_and_errors_in_order():
    def work(items, first, step):
        return map(int, items[first::step])

    items = [str(i) for i in range(100)]
    for n in (1, 2, 3):
        assert list(bpe.parallel(functools.partial(work, items), n)) == list(range(100))
        results = bpe.parallel(functools.partial(work, ["1", "2", "x", "y", "3"]), n)
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(ValueError, match="'x'"):
            next(results)
