"""bpe.py against naive versions of itself, by hand-made cases, and through its command line."""
import base64, collections, gzip, itertools, json, os, random, signal, subprocess, sys, time
import numpy as np, pytest, regex
import bpe
from bpe import EOT, PATTERNS, Tokenizer

PIECES = (
    " |  |\n|\n\n|\r\n|\t|a|B|don't|'s|'LL|é|ſ|1|234|½|.|,|!|?'|_|(|/|日|本|ا|😀|-|’|<||the|ing|слово|"
    "camelCase|ếch|end.\n|aaaa|日。\n|Ⅷ|٣|ि|ǅ|\0|\x1c|\x85|\u2028|\u3000|\xa0|\u0301|\u200b|\ufeff|"
    "\u1680|\u2002\n").split("|")

def random_text(rng, n=12):  # words, spaces and oddities from all over Unicode
    if rng.random() < 0.2:
        code = lambda: rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])
        return "".join(chr(code()) for _ in range(rng.randrange(n)))
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(n)))

def sample_text(seed=0, documents=40):  # English-like, for training
    rng = random.Random(seed)
    syllables = ["ba", "the", "ing", "to", "re", "aa", "a", "st", "é", "日本", "'s", "12", "x"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(200)]
    weights, ends = [1 / (i + 1) for i in range(200)], [" ", " ", ", ", ".\n", "  ", "\n\n"]
    texts = (rng.choices(words, weights, k=rng.randint(5, 150)) for _ in range(documents))
    return ["".join(word + rng.choice(ends) for word in text) for text in texts]

def naive_encode(tokenizer, text):  # as in a textbook, without special tokens
    rank = {pair: i for i, pair in reversed(list(enumerate(tokenizer.merges)))}
    of = {token: i for i, token in tokenizer.vocab.items()}
    ids = []
    for match in regex.finditer(tokenizer.patterns[0], text):
        word = [bytes([b]) for b in match[0].encode()]
        while pairs := [(rank[p], i) for i, p in enumerate(zip(word, word[1:])) if p in rank]:
            _, i = min(pairs)
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += [of[w] for w in word if w in of]
    return ids

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(EOT.join(sample_text()).encode())
    return path

@pytest.fixture(scope="module")
def tokenizers(corpus):
    names = [name for name in PATTERNS if name != "char"]
    return {n: Tokenizer(*bpe.train_bpe(corpus, 400, [EOT], n), [EOT], n) for n in names}

@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["gpt2"]

def test_simple_tokenizers_round_trip():
    text = "Naïve? 日本 😀\n isn't\t1.5"
    for kind in (bpe.CharTokenizer(), bpe.ByteTokenizer(), bpe.WordTokenizer(text)):
        assert kind.decode(kind.encode(text)) == text and max(kind.encode(text)) < kind.vocab_size
    assert bpe.WordTokenizer("a b").encode("a c") == [1, 0]

def test_mistake_6_bpe_ties_and_overlaps():
    """'aaaa' is two of (a, a), not three merges; equal counts go to the greater pair of bytes."""
    for learn in (bpe.learn_merges, bpe.learn_merges_naive):
        assert learn({b"aaaa": 1}, 2) == [(b"a", b"a"), (b"aa", b"aa")]
        merges = [(b"a", b"a"), (b"aa", b"aa"), (b"aaaa", b"a"), (b"a", b"b")]
        assert learn({b"aaaaa": 3, b"ab": 1}, 9) == merges
        assert learn({b"abab": 1, b"cd": 2}, 1) == [(b"c", b"d")]
        assert learn({b"ab": 1, b"b": 1, b"ac": 1, b"a\xc3": 1}, 1) == [(b"a", b"\xc3")]
        # a longer string is greater than its own beginning: (ab, z) before (a, z)
        assert learn({b"ab": 9, b"abz": 3, b"az": 3}, 3)[1:] == [(b"ab", b"z"), (b"a", b"z")]
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)} | {256: b"aa"}, [(b"a", b"a")])
    for n in (3, 4, 5, 3001):  # the leftmost pair first, in short words and in long ones
        assert tokenizer.encode("a" * n) == [256] * (n // 2) + [97] * (n % 2)

@pytest.mark.parametrize("seed", range(4))
def test_merges_equal_the_naive_ones(seed):
    rng = random.Random(seed)
    for trial in range(28):
        letters = ["ab", "abcde", "aé日", "".join(map(chr, range(97, 123)))][trial % 4]
        words = collections.Counter()
        for _ in range(rng.randint(1, 80)):
            word = "".join(rng.choices(letters, k=rng.randint(1, 14))).encode()
            words[word] += rng.randint(1, 4)
        n = rng.randint(0, 150)
        assert bpe.learn_merges(words, n) == bpe.learn_merges_naive(words, n)
    assert bpe.learn_merges({}, 5) == []

@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\W+", r"(\w)\w*(e)?|\W+"])
def test_training_equals_naive_pretokens_and_merges(corpus, pattern):
    counts = collections.Counter()
    for text in corpus.read_bytes().decode().split(EOT):
        counts.update(m[0].encode() for m in regex.finditer(PATTERNS.get(pattern, pattern), text))
    vocab, merges = bpe.train_bpe(corpus, 360, [EOT], pattern)
    assert merges == bpe.learn_merges_naive(counts, 360 - 257)
    assert vocab[len(vocab) - 1] == EOT.encode() and list(vocab) == list(range(len(vocab)))

def test_training_does_not_depend_on_processes_blocks_or_source(tmp_path, monkeypatch):
    path, texts = tmp_path / "t.txt", sample_text(1, 300)
    path.write_bytes(EOT.join(texts).encode())
    specials = [EOT, "ing st", "ing st e"]
    expected, *same = (bpe.train_bpe(x, 400, specials) for x in (path, texts, iter(texts)))
    assert same == [expected, expected]
    for block, processes in ((1 << 20, 2), (3000, 3), (200, 1)):
        monkeypatch.setattr(bpe, "BLOCK", block)
        assert bpe.train_bpe([path], 400, specials, num_proc=processes) == expected
    end, pipe = os.pipe()
    with open(pipe, "wb") as file:
        file.write(b"low low lower")
    assert len(bpe.train_bpe(f"/dev/fd/{end}", 259, num_proc=2)[1]) == 2  # read once
    vocab, merges = bpe.train_bpe(iter([f"ab{EOT}ab{EOT}" * 50 + "x y " * 50]), 300, [EOT])
    assert merges == [(b"a", b"b"), (b" ", b"y"), (b" ", b"x")]  # and then there are no pairs
    assert bpe.train_bpe(iter(["abcd abcd"]), 300, ["ab", "abcd"])[1] == []  # the longest

@pytest.mark.parametrize("name", PATTERNS)
def test_pretokens_of_the_parts_are_those_of_the_whole(name):
    rng, findall = random.Random(5), regex.compile(PATTERNS[name]).findall
    for _ in range(3000):
        block = (text := random_text(rng, 10)).encode()
        cuts = [*bpe.find_cuts(block).tolist(), len(block)] if block else [0]
        parts = [block[i:j].decode() for i, j in zip(cuts, cuts[1:])]
        assert [p for part in bpe.split(parts, [PATTERNS[name]]) for p in part] == findall(text)

@pytest.mark.parametrize("name", ["gpt2", "cl100k", "qwen", "o200k"])
def test_encode_equals_naive_on_all_of_unicode(tokenizers, name):
    tokenizer, rng = tokenizers[name], random.Random(7)
    texts = [random_text(rng) for _ in range(300)] + sample_text(3, 5) + ["", " ", "\n", "aaaaaaa"]
    for text in texts:
        expected = naive_encode(tokenizer, text)
        assert tokenizer.encode_ordinary(text) == expected
        assert tokenizer.decode(expected) == text
    everything = "".join(texts + sample_text(3, 60)) + "".join(map(chr, range(0xD7FF)))
    assert tokenizer.encode_ordinary(everything) == naive_encode(tokenizer, everything)

def test_lists_of_merges_made_by_hand():
    rng = random.Random(8)
    for trial in range(60):
        tokens, merges = [b"a", b"b", b"c"], []
        for _ in range(rng.randint(0, 25)):
            merges.append((rng.choice(tokens), rng.choice(tokens)))
            tokens = [*dict.fromkeys([*tokens, b"".join(merges[-1])])]
        rng.shuffle(merges)  # out of order, double, of parts made later; and bytes without id
        tokenizer = Tokenizer(dict(enumerate(tokens)), merges, [], r"[\s\S]+")
        for k in (3, 8, 40, 1500):
            text = "".join(rng.choices("abcé", k=k))
            known = text.replace("é", "")  # has no ids: the letters around it are neighbours
            assert tokenizer.encode(text) == naive_encode(tokenizer, known)
    vocab = dict(enumerate([b"a", b"b", b"ab", b"ba"]))
    tokenizer = Tokenizer(vocab, [(b"a", b"b")], ignore_merges=True)
    assert tokenizer.encode("ba ab xba") == [3, 2, 1, 0]  # " ab" and "xba" are no tokens

def test_a_long_word_takes_linear_time(tokenizer):
    rng, seconds = random.Random(9), []
    for n in (50_000, 200_000):
        word = "".join(rng.choices("theingaxst", k=n))
        start = time.process_time()
        ids = tokenizer.encode(word)
        seconds.append(time.process_time() - start)
        assert tokenizer.decode(ids) == word
    assert seconds[1] < 12 * seconds[0]  # if quadratic: 16
    tiny = b"".join(b"%x\xff" % i for i in range(400_000))  # which could fill a table
    own = [len(b) for b, _ in bpe.cut_stream([b"a" * 5_000_000 + b"\xff", tiny], [], False)]
    gap = b"".join(b" %x" % i for i in range(70_000)) + b"1" * 70_000  # no cut in the last 64 KB
    for sizes in (own, [len(b) for b, _ in bpe.cut_stream([gap] * 14, [], True)]):
        assert sum(sizes[1:]) > 1_000_000 and max(sizes[1:]) < 4 * bpe.BLOCK

def test_special_tokens_surrogates_and_ids_beyond_the_vocabulary(tokenizer):
    both = Tokenizer(tokenizer.vocab, tokenizer.merges, ["<|a|>", "<|a|><|b|>", EOT, "<|b|>"])
    a, ab, eot, b = (both.special_tokens[s] for s in ("<|a|>", "<|a|><|b|>", EOT, "<|b|>"))
    assert eot == tokenizer.eot_id == both.eot_id and both.vocab_size == 403
    assert both.encode("<|a|><|b|><|a|>") == [ab, a]  # the longest wins
    assert both.encode(f"<|b|>x{EOT}") == [b, ord("x"), eot]
    ordinary = both.encode_ordinary(f"<|a|>{EOT}")
    assert not {a, ab, eot, b} & set(ordinary) and both.decode(ordinary) == f"<|a|>{EOT}"
    for bad in ({"<|a|>": 97}, {"<|a|>": 500, "<|b|>": 500}, [""]):
        with pytest.raises(ValueError, match="special token"):
            Tokenizer(tokenizer.vocab, tokenizer.merges, bad)
    with pytest.raises(ValueError, match="stands for a byte"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, ["é"]).to_json()
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a?b"
    assert tokenizer.decode([0xE6, 0x97]) == "\ufffd"
    assert tokenizer.decode(np.array([104, 400, 105, 10**12, -1])) == "hi"

@pytest.mark.parametrize("size, block", [(1, 50), (7, 64), (100, 1 << 19), (5000, 300)])
def test_encode_iterable_equals_encode(tokenizer, monkeypatch, size, block):
    both = Tokenizer(tokenizer.vocab, tokenizer.merges, [EOT, "the ing", " x"])
    own = Tokenizer(tokenizer.vocab, tokenizer.merges, [EOT], r"\w+|\W+")  # can not be cut
    rng = random.Random(size)
    text = EOT.join([*sample_text(4, 9), *(random_text(rng, 30) for _ in range(40))])
    text = (text + " \n  x  the in \n\n " + EOT + "the ing") * 2
    expected = both.encode(text), own.encode(text)
    monkeypatch.setattr(bpe, "BLOCK", block)
    for one, ids in zip((both, own), expected):
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        assert list(one.encode_iterable(pieces)) == one.encode(text) == ids

def test_encode_iterable_is_lazy_and_forgets(tokenizer):
    ids = tokenizer.encode_iterable(itertools.cycle(["the thing is, ", "a stone\n"]))
    assert tokenizer.decode(itertools.islice(ids, 40)).startswith("the thing is, a stone\nthe")
    fresh = Tokenizer(tokenizer.vocab, tokenizer.merges)
    words = [f" w\0{'x' * (i % 23)}{i:x}" for i in range(300_000)]  # alike in 8 or 16 bytes
    ids = fresh.encode("".join(words))
    assert fresh.table.count < 1 << 19 and fresh.decode(ids) == "".join(words)

def added(i, content, **flags):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | flags
    return {"id": i, "content": content, "special": True, **flags}

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

def hf_json(*steps, **changes):  # a small tokenizer.json such as Hugging Face writes
    vocab = {c: i for i, c in enumerate(bpe.BYTES)}
    vocab |= {token: 256 + i for i, token in enumerate(["th", "the", "Ġthe", "12", "ab"])}
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h", "th e", "Ġ the", "1 2", "a b"]}
    model |= changes.pop("model", {})
    steps = {"type": "Sequence", "pretokenizers": [*steps, LEVEL]}
    parts = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": steps}
    return json.dumps({**parts, "decoder": LEVEL, "model": model, **changes})

def split(pattern, behavior="Isolated"):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}

def test_same_ids_as_hugging_face(tokenizers, tmp_path):
    hf = pytest.importorskip("tokenizers", reason="the tokenizers package is not installed")
    rng = random.Random(11)
    texts = [random_text(rng) + rng.choice(["", EOT, "<n>"]) + random_text(rng) for _ in range(300)]
    digits = {"type": "Digits", "individual_digits": True}
    files = [t.to_json() for t in tokenizers.values()]
    one = tokenizers["gpt2"]
    chars = dict(enumerate(c.encode() for c in "abé日 "))
    files += [Tokenizer(one.vocab, one.merges, [EOT], r"\w+|[.,]").to_json(), hf_json(digits),
              Tokenizer(chars, [], [EOT], "char", ignore_merges=True).to_json(), hf_json(),
              hf_json(pre_tokenizer={**LEVEL, "use_regex": False}),
              hf_json(split(r"\s+|e"), digits, model={"ignore_merges": True, "merges": ["a b"]}),
              hf_json(added_tokens=[added(261, EOT), added(262, "<n>", normalized=True)],
                      normalizer={"type": "NFC"})]
    for text in files:
        ours, theirs = Tokenizer.from_json(text), hf.Tokenizer.from_str(text)
        for text in texts:
            known = "".join(c for c in text if c < "\u0250" or c in "".join(PIECES))  # to both
            assert ours.encode(known) == theirs.encode(known).ids, (ours.patterns, known)

BROKEN = [
    *("", "{", "[]", "5", '{"model": 3}', '{"model": {"type": "WordPiece", "vocab": {}}}'),
    *(hf_json()[:-40], "[" * 100_000, hf_json(model={"merges": [["t"]]})),
    *(hf_json(model={"vocab": v}) for v in (3, [], *({"a": i} for i in ("x", -1, 10**15, 1.5)))),
    *(hf_json(model={"merges": [merge]}) for merge in ("t", "t q q", "t zz")),
    *(hf_json(pre_tokenizer=part) for part in (None, {"type": "Whitespace"})),
    *(hf_json(pre_tokenizer={**LEVEL, "add_prefix_space": flag}) for flag in (True, 10**9)),
    *(hf_json(normalizer={"type": kind}) for kind in ("Precompiled", "Lowercase")),
    *(hf_json(added_tokens=[t]) for t in (7, added(97, "<|x|>"), added(300, ""), added(300, "é"))),
    *(hf_json(added_tokens=[added(300, "<x>", **{f: 10**9})]) for f in ("lstrip", "rstrip")),
    *(hf_json(step) for step in (split("("), split("a", "Removed"), {"type": "Metaspace"}))]

@pytest.mark.parametrize("broken", BROKEN)
def test_hostile_tokenizer_files_are_refused_in_one_line(tmp_path, broken):
    (tmp_path / "tokenizer.json").write_text(broken)
    with pytest.raises((ValueError, OSError)) as error:
        Tokenizer.from_file(tmp_path)
    assert "\n" not in str(error.value)

def test_a_hostile_pattern_ends():
    tokenizer = Tokenizer.from_json(hf_json(split("(?:a|a)*b|.")))
    with pytest.raises(TimeoutError):
        tokenizer.encode("a" * 60)
    assert tokenizer.encode("ab ab") == [260, 32, 260]  # what it began to learn is gone

def test_vocab_and_merges_files(tokenizer, tmp_path):
    name = lambda token: "".join(bpe.BYTES[b] for b in token)
    vocab = {name(t): i for i, t in tokenizer.vocab.items()} | {"model": 401}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2"] + [f"{name(a)} {name(b)}" for a, b in tokenizer.merges]
    (tmp_path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = EOT.join(sample_text(9, 3))
    read = Tokenizer.from_file(tmp_path)
    assert read.encode(text) == tokenizer.encode(text) and read.eot_id == tokenizer.eot_id

def test_ranks_of_tiktoken(tmp_path):
    own, tokens = tmp_path / "own.tiktoken", [b"bc", b"ab", b"abc", b"x" * 100_000, b"aa", b"aaa"]
    tokens = [*(bytes([b]) for b in range(256)), *tokens]
    own.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    with pytest.raises(ValueError, match="give its pattern"):
        Tokenizer.from_file(own)
    read = Tokenizer.from_file(own, pattern="gpt2")  # a word is that token; else the lowest rank
    assert read.encode("abc zabc aaaaz" + EOT) == [258, 32, 122, 258, 32, 260, 260, 122, 262]

def run(*args, cwd):
    command = [sys.executable, bpe.__file__, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=120)

@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    return tmp_path

def test_encode_files_documents_and_header(folder, tokenizer):
    texts = [t for t in sample_text(12, 90) if t.strip()]
    thirds = [texts[i::3] for i in range(3)]
    (folder / "a.txt").write_bytes(EOT.join(thirds[0]).encode())  # gets its last EOT
    lines = (json.dumps({"content": t, "id": 5}) + '\n\n{"content": ""}\n' for t in thirds[1])
    (folder / "b.json.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "c.txt").write_bytes(EOT.join(thirds[2]).encode("utf-16"))
    paths = [folder / name for name in ("a.txt", "b.json.gz", "c.txt")]
    bpe.encode_files(tokenizer, paths, folder, 0.1, text_key="content")
    chosen = {"train.bin": [], "val.bin": []}
    for i, text in enumerate(itertools.chain(*thirds)):
        chosen["val.bin" if (i + 1) // 10 > i // 10 else "train.bin"].append(text)
    for name, documents in chosen.items():
        (folder / name).write_bytes((folder / name).read_bytes() + b"behind the ids")
        ids, header = bpe.read_bin(folder / name)
        expected = [i for d in documents for i in [*tokenizer.encode(d), tokenizer.eot_id]]
        assert ids.tolist() == expected and ids.dtype == np.uint16
        size = sum(len(d.encode()) for d in documents)
        assert header[:7].tolist() == [20240520, 1, len(expected), 400, tokenizer.eot_id, size, 0]

def test_encoding_does_not_depend_on_processes_or_blocks(folder, tokenizer, monkeypatch):
    (folder / "a.txt").write_bytes(EOT.join(sample_text(13, 200)).encode())
    results = set()
    for block, processes in ((1 << 20, 1), (1 << 20, 2), (500, 3), (61, 1)):
        monkeypatch.setattr(bpe, "BLOCK", block)
        bpe.encode_files(tokenizer, [folder / "a.txt"], folder, 0.05, num_proc=processes)
        results.add((folder / "train.bin").read_bytes() + (folder / "val.bin").read_bytes())
    assert len(results) == 1

def test_literal_eot_in_json_large_ids_and_a_file_that_shrinks(folder, tokenizer):
    (folder / "a.ndjson").write_text(json.dumps({"text": f"x{EOT}y"}) + "\n")
    wide = Tokenizer({**tokenizer.vocab, 65_540: b"xyz"}, tokenizer.merges, [EOT])
    for one, dtype in ((tokenizer, np.uint16), (wide, np.uint32)):
        bpe.encode_files(one, [folder / "a.ndjson"], folder, 0)
        ids = bpe.read_bin(folder / "train.bin")[0]
        assert ids.dtype == dtype and ids.tolist().count(tokenizer.eot_id) == 1
        assert one.decode(ids) == f"x{EOT}y{EOT}" and not (folder / "val.bin").exists()
    (folder / "a.txt").write_text("some text " * 200_000)
    blocks = bpe.read_blocks([folder / "a.txt"], [EOT.encode()], True, "text")
    next(blocks)
    os.truncate(folder / "a.txt", 900_000)
    with pytest.raises(ValueError, match="shorter"):
        list(blocks)

def test_bare_run_makes_the_default_data(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""  # quiet when piped
    out = tmp_path / "data" / "stdlib"
    ids, header = bpe.read_bin(out / "train.bin")
    assert header[3] == 4096 and len(ids) > 1_000_000 and header[5] > 3 * len(ids)
    result = run("decode", "--input", out / "val.bin", "--max_tokens", 5000, cwd=tmp_path)
    ids = bpe.read_bin(out / "val.bin")[0][:5000]
    assert result.stdout == Tokenizer.from_file(out).decode(ids)
    command = f"{sys.executable} {bpe.__file__} decode --input {out}/train.bin | head -c 9"
    assert subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True).stderr == b""
    said = run("show", "hi é", cwd=tmp_path).stdout
    assert all(kind in said for kind in ("CharT", "ByteT", "WordT", "4,096 tokens: "))

def test_command_line_on_bad_bytes_and_characters(tmp_path):
    text = EOT.join(sample_text(14, 30)).encode() + b"\r\n caf\xff\xfe \xe6\x97"
    (tmp_path / "a.txt").write_bytes(text)
    result = run("train", "--input", "a.txt", "--vocab_size", 300, "--out", "o", cwd=tmp_path)
    assert "300 tokens" in result.stdout and not result.stderr
    args = ("encode", "--tokenizer", "o/tokenizer.json", "--input", "a.txt", "--out", "bins")
    result = run(*args, "--val_input", "a.txt", "--num_proc", 2, cwd=tmp_path)
    assert (tmp_path / "bins/train.bin").read_bytes() == (tmp_path / "bins/val.bin").read_bytes()
    assert Tokenizer.from_file(tmp_path / "bins").text == Tokenizer.from_file(tmp_path / "o").text
    result = run("decode", "--tokenizer", "bins", "--input", *["bins/val.bin"] * 2, cwd=tmp_path)
    assert result.stdout == 2 * (text + EOT.encode()).decode(errors="replace").replace("\r\n", "\n")
    (tmp_path / "b.txt").write_text("To be, or not to bé.\n" * 40, encoding="utf-8")
    run("train", "--pattern", "char", "--input", "b.txt", "--out", "c", cwd=tmp_path)
    (tmp_path / "b.txt").write_text("To bee!! ñ")
    args = "encode --tokenizer c --input b.txt --out c --val_fraction 0".split()
    assert run(*args, cwd=tmp_path).stderr == "4 bytes of text are left out: they have no tokens\n"
    chars = sorted({*"To be, or not to bé.\n"})
    expected = [chars.index(c) for c in "To bee "] + [len(chars)]
    assert bpe.read_bin(tmp_path / "c/train.bin")[0].tolist() == expected

TRAIN, ENCODE = "train --out o --input ", "encode --out o --tokenizer t.json --input "
BAD_INPUT = [
    (TRAIN + "no.txt", 1, "no.txt"), (ENCODE + "a.txt --val_fraction 2", 1, "too few doc"),
    (TRAIN + "bad.jsonl", 1, "bad.jsonl"), (TRAIN + "cut.txt.gz", 1, "cut.txt.gz"),
    (TRAIN + "a.txt --special_tokens=", 1, "empty"), (TRAIN + "a.txt --special_tokens é", 1, "é"),
    (TRAIN + "a.txt --vocab_size 256", 1, "256"), (TRAIN + "a.txt --pattern (", 1, "missing )"),
    *((TRAIN + f"a.{kind}", 1, "neither text") for kind in ("parquet", "jsonl.zst", "bz2")),
    (ENCODE + "a.txt --tokenizer bad.json", 1, "no tok"), (ENCODE + "a.txt", 1, "too few doc"),
    (ENCODE + "a.txt bad.jsonl --num_proc 2", 1, "bad.jsonl"), (ENCODE + "no.gz", 1, "gzip"),
    (ENCODE + "a.txt --pattern x", 1, "its own pattern"), ("encode --input a.txt", 2, "--out"),
    ("train --out o", 2, "--input"), ("decode --tokenizer t.json --input wild.bin", 1, "vocabul"),
    ("decode --tokenizer t.json --input a.txt", 1, "no .bin"), ("shine", 2, "shine")]

@pytest.mark.parametrize("args, code, message", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing(tokenizer, tmp_path, args, code, message):
    tokenizer.save(tmp_path / "t.json")
    for name in ("a.txt", "a.parquet", "a.jsonl.zst", "a.bz2", "no.gz"):
        (tmp_path / name).write_text("some text, and more of it")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 5}\n')
    (tmp_path / "bad.json").write_text('{"model": {"vocab": {"a": 1')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:30])
    header = np.array([20240520, 1, 9, *[0] * 253], np.int32).tobytes()
    (tmp_path / "wild.bin").write_bytes(header + np.full(9, 60_000, np.uint16).tobytes())
    result = run(*args.split(), cwd=tmp_path)
    assert result.returncode == code and len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr and "error: " in result.stderr
    assert not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp" or p.name == "train.bin"]

def test_interrupted_and_killed_runs_leave_the_old_files(folder):
    (folder / "a.txt").write_text("".join(f"w{i:x} " for i in range(1_500_000)))
    (folder / "train.bin").write_bytes(b"old")
    args = f"encode --tokenizer {folder} --input {folder}/a.txt --out {folder} --num_proc 2"
    for how, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen([sys.executable, bpe.__file__, *args.split()],
                                   stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while not list(folder.glob("train.bin.*.tmp")):
            time.sleep(0.02)
        process.send_signal(how)
        _, error = process.communicate(timeout=60)  # which ends when the last worker has
        assert process.returncode == code and error == b""
        assert (folder / "train.bin").read_bytes() == b"old"

def test_parallel_reads_only_a_little_ahead_and_ends(tmp_path):
    made = []
    items = (made.append(i) or i for i in itertools.count())
    results = bpe.parallel(str, items, 2)
    assert [next(results) for _ in range(3)] == ["0", "1", "2"] and len(made) <= 3 + 4
    results.close()
    with pytest.raises(ValueError, match="'x'"):
        list(bpe.parallel(int, ["1", "x", "2"], 2))
