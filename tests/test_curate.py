"""curate.py: each step against cases with known answers, and whole runs by command line."""
import gzip, io, json, os, random, signal, subprocess, sys, time, zlib
import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import curate as C

WORDS = ("the of and to in that is was he for it with as his on be at by had not are but from she "
         "they one you were all her there would we him river stone garden window letter paper "
         "morning history water engine teacher market summer kitchen number").split()

def prose(seed, sentences=12):
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(8, 16))).capitalize() + "."
                    for _ in range(sentences))

def page(seed, body=None):
    body = body or "".join(f"<p>{prose(seed * 100 + i, 4)}</p>" for i in range(5))
    return (f"<html><head><title>Page {seed}</title><script>var x = '<p>no</p>';</script></head>"
            "<body><nav class=menu><ul><li><a href=/>Home</a></li><li><a href=/a>About us</a></ul>"
            f"</nav><div class=content><article><h1>Page {seed}</h1>{body}</article></div>"
            "<footer>Copyright 2024 Example. <a href=/p>Privacy policy</a></footer>").encode()

def record(content, kind="response", mime="application/http", length=None):
    head = (f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://x.org/\r\nContent-Type: "
            f"{mime}\r\nContent-Length: {len(content) if length is None else length}\r\n\r\n")
    return head.encode() + content + b"\r\n\r\n"

def http(body, headers="Content-Type: text/html; charset=utf-8", status="HTTP/1.1 200 OK"):
    return f"{status}\r\n{headers}\r\n\r\n".encode() + body

def read(data):
    counts = C.collections.Counter()
    return [r.body for r in C.read_warc(io.BytesIO(data), counts)], counts

def run(*args, code=0, **kw):
    result = subprocess.run([sys.executable, os.path.join(ROOT, "curate.py"), *map(str, args)],
                            capture_output=True, text=True, **kw)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result

def documents(folder):
    return [d for path in sorted(folder.glob("*.jsonl.gz")) for d in C.read_documents(path)]

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl.gz")}

def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    return str(path)

def test_warc_members_plain_and_one_member_give_the_same_pages():
    records = [record(b"software: x", "warcinfo", "application/warc-fields"),
               record(b"GET /", "request"), record(http(b"<p>one</p>")),
               record(http(b"%PDF", "Content-Type: a/pdf")), record(http(b"", status="HTTP/1 404")),
               record("Grüße".encode(), "conversion", "text/plain"), record(http(b"<p>two</p>"))]
    for data in (b"".join(records), gzip.compress(b"".join(records)),
                 b"".join(map(gzip.compress, records)) + b"\n"):
        assert read(data) == ([b"<p>one</p>", "Grüße".encode(), b"<p>two</p>"],
                              {"no page": 3, "HTTP status not 200": 1})

RAW_DEFLATE, MANY = zlib.compress(b"<p>z</p>")[2:-4], gzip.compress(b"") * 50_000

@pytest.mark.parametrize("coding, body, expected", [
    ("gzip", gzip.compress(b"<p>z</p>"), b"<p>z</p>"), ("gzip", b"<p>z</p>", b"<p>z</p>"),
    ("gzip", gzip.compress(b"<p>a") + gzip.compress(b"b</p>"), b"<p>ab</p>"),
    ("deflate", zlib.compress(b"<p>z</p>"), b"<p>z</p>"), ("deflate", RAW_DEFLATE, b"<p>z</p>"),
    ("deflate, gzip", gzip.compress(RAW_DEFLATE), b"<p>z</p>"), ("gzip", b"<p>\x00\x01z</p>", None),
    ("gzip", gzip.compress(b"<p>z</p>" * 99)[:-9] + b"12345", None), ("gzip", MANY, None),
    ("br", b"\x8b\x03\x80<p>z</p>\x03", None), ("gzip", gzip.compress(bytes(40 << 20)), None)])
def test_bodies_that_cannot_be_decoded_are_counted(coding, body, expected):
    head = f"Content-Type: text/html\r\nContent-Encoding: {coding}"
    bodies, counts = read(record(http(body, head)))
    assert bodies == ([expected] if expected else [])
    assert expected or sum(counts.values()) == 1

def test_chunks_and_status_lines():
    head = "Content-Type: text/html\r\nTransfer-Encoding: chunked"
    chunks = b"4\r\n<p>a\r\n6;x=y\r\nb</p>\n\r\n0\r\n\r\n"
    assert read(record(http(chunks, head)) + record(http(b"-", head)))[0] == [b"<p>ab</p>\n", b"-"]
    for status in ("http/1.1 200 OK", "\r\nHTTP/1.1 200 OK", "HTTP/2 200"):
        assert read(record(http(b"<p>x</p>", status=status)))[0] == [b"<p>x</p>"]

@pytest.mark.parametrize("lie", [-7, 5, 60, 10**6, 10**12])
def test_a_length_that_lies_costs_one_record_at_most(lie):
    good, content = record(http(b"<p>good</p>")), http(b"<p>bad</p>" + b"x" * 100)
    data = good + record(content, length=max(0, len(content) + lie)) + good + good
    for packed in (data, gzip.compress(data)):
        found, n = read(packed)
        assert found.count(b"<p>good</p>") == 3 and n["wrong length, or cut short"] == (lie > 0)
    body = b"<p>Records begin with\nWARC/1.0 and headers.</p><p>More</p>"
    assert read(record(http(body)) + record(http(b"b")))[0] == [body, b"b"]

def test_damage_is_counted_and_the_rest_is_read():
    members = [gzip.compress(record(http(b"<p>%d</p>" % i + random.Random(i).randbytes(2000))))
               for i in range(5)]
    broken = members[2][:40] + bytes(860) + members[2][900:]
    bodies, counts = read(members[0] + members[1] + broken + members[3] + members[4][:-500])
    assert [b[3:4] for b in bodies if b[3:4] != b"2"] == [b"0", b"1", b"3"]
    assert counts["damaged gzip or zstd"] >= 1 and counts["compressed file cut short"] == 1
    good, bomb = record(http(b"<p>x</p>")), gzip.compress(record(http(bytes(40 << 20))))
    for junk in (b"\0" * 5000, b"WARC/1.0\r\n\r\n", b"WARC/1.0\r\nContent-Length: x\r\n\r\n"):
        assert read(junk + b"\r\n\r\n" + good)[0] == [b"<p>x</p>"]
    assert read(bomb + gzip.compress(good)) == ([b"<p>x</p>"], {"too large": 1})
    data = io.BytesIO(b"one|" + bytes(5 << 20) + b"|two")
    assert list(C.read_parts(data, b"|", {"too large": 0}, 1 << 20)) == [b"one", b"two"]

@pytest.mark.parametrize("data, header, text", [
    ("Grüße".encode(), None, "Grüße"), ("Grüße".encode("cp1252"), None, "Grüße"),
    ("Привет".encode("cp1251"), "windows-1251", "Привет"), ("é".encode(), "no-such-charset", "é"),
    (b'<meta charset="shift_jis">' + "日本語".encode("shift_jis"), None, "日本語"),
    (b'<meta http-equiv=x content="text/html; charset=gb2312">' + "中".encode("gbk"), None, "中"),
    ("é".encode("latin-1"), "zlib_codec", "é"), ("“x”".encode("cp1252"), "iso-8859-1", "“x”"),
    ("ภาษา".encode("cp874"), "windows-874", "ภาษา"), ("中文".encode("big5"), "x-x-big5", "中文"),
    ("שלום".encode("iso8859-8"), "iso-8859-8-i", "שלום"), ("Да".encode("koi8-r"), "koi8", "Да"),
    ("한국".encode("cp949"), "ks_c_5601-1987", "한국"), ("中文".encode("gbk"), "gb_2312-80", "中文"),
    ("\ufeffé".encode("utf-16"), None, "é"), ("naïve ".encode() * 50 + b"\xff", None, "naïve")])
def test_encodings_have_the_labels_of_the_web(data, header, text):
    assert text in C.decode_page(data, header)

RICH = """<h1>Growing beans</h1><p>Beans are easy to grow, and they improve the soil &amp; the
kitchen, which few other plants do.</p><h2>What you need</h2><ul><li>A pot with holes</li><li>Soil,
about <b>ten</b> litres</li></ul><table><tr><th>Month</th><th>Work</th></tr><tr><td>May</td><td>Sow
the seeds</td></tr></table><pre>def grow(bean):
    return bean &lt;&lt; 1</pre><p>A line<br>and another, all in one paragraph.</p>
<div hidden>Hidden</div><p style="display: none">Hidden</p><script>alert(1)</script><!-- <p>
comment--><style>p {color: red}</style>"""

def test_extract_keeps_structure_and_drops_the_rest():
    text = C.extract_text(page(1, RICH))
    for part in ("soil & the kitchen", "What you need", "- A pot with holes\n- Soil, about ten",
                 "Month | Work\nMay | Sow", "bean):\n    return bean << 1", "A line\nand another"):
        assert part in text, part
    assert not C.re.search("Hidden|alert|color|comment|Home|About us|Privacy|<p|var x", text)

@pytest.mark.parametrize("html, expected", [
    ("", ""), ("   ", ""), ("just text", "just text"), ("<P>Upper</P>", "Upper"),
    ("<p>a < b and 3 <4</p>", "a < b and 3 <4"), ("<p>cut <a href='", "cut"), ("<p>x\0y", "xy"),
    ("<div data-x='<p>no</p>'>yes it is</div>", "yes it is"), ("<p>a<!--b-->c</p>", "ac"),
    ("<p>&eacute;&#233;&#xe9;&nbsp;x</p>", "ééé x"), ("<p>kept</p><script>dropped", "kept"),
    ("<p>so&shy;ft zero\u200bwidth \ufeffm\u2060ark\x07 e\u0301</p>", "soft zerowidth mark é"),
    ('<p>The energy is <math alttext="E=mc^2"><mi>E</mi></math> for a body',
     "The energy is E=mc^2 for a body"),
    ('<p>if <script type="math/tex">a < b</script><script>x</script>, so', "if a < b, so"),
    (r'<p>where <img class="x" alt="\frac{a}{b}"> is<img alt="A house">', r"where \frac{a}{b} is"),
    ("<p>a <math><mi>x</mi><annotation>x_1</annotation></math> b", "a x_1 b"),
    ("<table><tr><td>a<td>b<tr><td>c<td>d</table>", "a | b\nc | d"),
    ("<pre>a<br>  b\nc</pre>", "a\n  b\nc"), ("<pre><div>a</div><div>  b</div></pre>", "a\n  b")])
def test_extract_small(html, expected):
    assert C.extract_text(html) == expected

def test_names_of_what_holds_the_article_do_not_count_against_it():
    long = f"<p>{prose(1)}</p><p>{prose(2)}</p>"
    for html in (f"<p>Loading</p><noscript>{long}", f"<div style='visibility:hidden'>{long}</div>",
                 f"<div class='newsletter cookie related'><div class=sidebar>{long}"):
        assert prose(1) in C.extract_text(html) and prose(2) in C.extract_text(html.encode())

@pytest.mark.parametrize("unit", ["<div>", '<a x="<', "<!--", "<svg>", "<td>x", "&#", "<script",
                                  "<math>", "<pre>", "<pre", "<img", "<br>", "<p>\ud800</p>",
                                  "<pre>|<br ", "<math>|<mi ", "<math>| ", '"@type":| '])
def test_hostile_html_takes_linear_time(unit):
    start, (first, _, unit) = time.process_time(), unit.rpartition("|")
    C.extract_text(first + unit * 80_000 + f"</pre><div>{prose(3) * 8}</div>")
    assert time.process_time() - start < 5  # minutes, were it quadratic

@pytest.mark.parametrize("text, code", [
    ("This is a short note that we wrote for you.", "en"), ("欢迎来到我们的网站", "zh"), ("123 !", "und"),
    ("これは日本語の文章です", "ja"), ("한국어 문장입니다", "ko"), ("Это просто русский текст", "ru"),
    (C.unicodedata.normalize("NFD", "한국어 문장입니다"), "ko"), ("Це їхній дім", "uk"), ("هذا نص", "ar"),
    ("Das ist ein kurzer Text, den wir geschrieben haben.", "de"), ("Αυτό είναι", "el"),
    ("Ceci est un texte que nous avons écrit pour vous.", "fr"),
    ("Esto es un texto que hemos escrito para los niños.", "es")])
def test_language_without_a_model(text, code):
    found, score = C.identify_language(text)
    assert found == code and (0 < score <= 1 or code == "und")

@pytest.mark.parametrize("how", [{}, {"chars": (0, 0), "words": 2}, {"prior": 0, "rate": 0.5}])
def test_classifier_learns_saves_and_loads(tmp_path, how):
    rng, path = random.Random(0), str(tmp_path / "m.npz")
    kinds = {"aa": "ka lo mi tu", "bb": "sch ung ein tz", "cc": "zzy pfu qua"}
    pairs = [(" ".join("".join(rng.choices(s.split(), k=2)) for _ in range(6)), label)
             for label, s in kinds.items() for _ in range(60)]
    rng.shuffle(pairs)
    model = C.LinearClassifier.train(*zip(*pairs[:140]), bits=12, **how)
    right = np.mean([model.predict(t)[0] == label for t, label in pairs[140:]])
    assert right >= (0.95 if "words" not in how else 0.8)
    model.save(path)
    loaded = C.LinearClassifier.load(path)
    for t in ("kalo schung", pairs[0][0], ""):  # the last one without n-grams
        np.testing.assert_allclose(loaded.probabilities(t), model.probabilities(t), atol=0.01)
        assert loaded.score(t, "aa") == loaded.probabilities(t)[0]
    good = dict(np.load(path))
    for change in ({"table": good["table"][:, :2]}, {"labels": np.array(["a"])},
                   {"chars": np.array([1, 99])}, {"labels": np.array([{}, 1, 2], dtype=object)}):
        np.savez(path, **{**good, **change})
        pytest.raises(ValueError, C.LinearClassifier.load, path)

LINES = [prose(i, 1) for i in range(6)]
TEXT, CHINESE = "\n".join(LINES), "这是一个关于河流和石头的故事，" * 10

@pytest.mark.parametrize("rule, text, reason", [
    ("gopher", prose(1), None), ("gopher", "The string you read is text. " * 5, "under 50 words"),
    ("gopher", "the of cat " * 33_334, "over 100000 words"), ("c4", TEXT, None),
    ("gopher", "to be it " * 99, "mean word length"), ("fineweb", TEXT, None),
    ("gopher", "\n".join(["The line with an..."] * 40 + ["It is the end."] * 60), "ellipses"),
    ("gopher", "- the green garden of morning\n" * 50, "bullets"),
    ("gopher", "the of and " * 20 + "1234 " * 20, "words without letters"),
    ("gopher", "# the river of them " * 30, "symbols to words"), ("fineweb", "", "empty"),
    ("gopher", "lorem ipsum dolor amet " * 30, "stop words"), ("repetition", "", None),
    ("gopher", CHINESE, None), ("repetition", "\n\n".join(prose(i, 3) for i in range(5)), None),
    ("repetition", "\n\n".join([prose(1), prose(2)] + [prose(3)] * 3), "repeated paragraphs"),
    ("repetition", "\n".join(LINES + LINES[:1] * 5), "repeated lines"),
    ("repetition", " ".join(f"blue house w{i}" for i in range(60)), "most frequent 2-gram"),
    ("repetition", " ".join(f"w{i % 100}" for i in range(125)), "repeated 5-grams"),
    ("c4", "\n".join(LINES[:2]), "under 3 sentences"), ("c4", TEXT + "\nif {", "curly bracket"),
    ("c4", TEXT + "\nLorem ipsum.", "lorem ipsum"), ("c4", "ይህ አንድ ታሪክ ነው ረጅም ታሪክ።\n" * 3, None),
    ("c4", "یہ ایک کہانی ہے جو لمبی ہے۔\n" * 3, None), ("c4", "(It was all of it.)\n" * 3, None),
    ("fineweb", "\n".join(f"one that never ends in a full stop {i}" for i in range(20)),
     "lines without punctuation"),
    ("fineweb", "\n".join(LINES + LINES[:2]), "characters in repeated lines"),
    ("fineweb", "\n".join(f"Short {i}." for i in range(9)), "short lines")])
def test_filters_name_the_rule(rule, text, reason):
    assert C.FILTERS[rule](text) == reason
    named = C.gopher_quality_filter, C.gopher_repetition_filter, C.c4_filter, C.fineweb_filter
    assert dict(zip(C.FILTERS, named))[rule](text) is (reason is None)

@pytest.mark.parametrize("text, masked", [
    ("Write to jane.doe+news@mail.example.co.uk.", "Write to |||."), ("me@münchen.de", "|||"),
    ("a@b.org and c_d@e-f.com", "||| and |||"), ("메일은 abc@naver.com으로", "메일은 |||으로"),
    ("联系邮箱abc@qq.com谢谢大家的支持", "联系邮箱|||谢谢大家的支持"), ("@x, a @ b, x@localhost", None)])
def test_mask_emails(text, masked):
    masked = (masked or text).replace("|||", "|||EMAIL_ADDRESS|||")
    assert C.mask_emails(text) == (masked, masked.count("|||EMAIL_ADDRESS|||"))

@pytest.mark.parametrize("text", [
    *(f"Feel free to contact me at <{number}> if you have any questions." for number in (
        "2831823829", "(283)-182-3829", "(283) 182 3829", "283-182-3829", "+1 283 182 3829",
        "1-800-555-0199", "+44 20 7946 0958", "+49 (30) 1234567", "020 7946 0958", "555-1234")),
    "Tel: <030 / 901820>", "a:<283.182.3829>", "电话：<13812345678>", "请拨打电话<13812345678>谢谢",
    "In 2023-10-15 or 15.10.2023, at 12:30:45", "version 3.11.4 and 1.2.3", "12,345,678 people",
    "It was 1234567890 in all, 3.14159265358979", "ISBN 978-3-16-148410-0", "pages 123-4567",
    "4111 1111 1111 1111", "order 2831823829 was sent", "$283 182 3829", "call on 2023-10-15"])
def test_mask_phone_numbers(text):
    masked = C.re.sub("<.*>", "|||PHONE_NUMBER|||", text)
    assert C.mask_phone_numbers(C.re.sub("[<>]", "", text)) == (masked, "<" in text)

def test_mask_ips():
    text = "Servers 192.0.2.146, 10.0.0.1:80 and 2001:db8::8a2e:370:7334 are up. At 8.8.8.8."
    assert C.mask_ips(text) == ("Servers |||IP_ADDRESS|||, |||IP_ADDRESS|||:80 and "
                                "|||IP_ADDRESS||| are up. At |||IP_ADDRESS|||.", 4)
    assert C.mask_ips("IP地址是192.168.1.1的机器") == ("IP地址是|||IP_ADDRESS|||的机器", 1)
    for text in ("version 1.2.3.4", "v1.2.3.4", "Chrome 91.0.4472.124", "256.1.1.1", "1.2.3",
                 "1.2.3.4.5", "std::vector and 12:30:45", "section 2.1.1.3", "a::b"):
        assert C.mask_ips(text) == (text, 0)

def test_exact_line_dedup(tmp_path):
    files = {"a.txt": b"one\ntwo\nme\n", "b.txt": b"me\nthree\n\n\ntwo", "c.txt": b"\xe9\r\n"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    C.exact_line_dedup([tmp_path / name for name in files], tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a.txt": b"one\n", "b.txt": b"three\n", "c.txt": b"\xe9\r\n"}
    for function in (C.exact_line_dedup, C.minhash_dedup):
        pytest.raises(FileExistsError, function, [tmp_path / "a.txt"], tmp_path)  # the input

def test_bloom_filter():
    bloom = C.BloomFilter(5000, 0.01)
    assert sum(bloom.add(f"in {i}") for i in range(5000)) < 50 and bloom.add(b"in 5")
    assert all(f"in {i}" in bloom for i in range(5000)) and abs(bloom.size / 5000 - 9.585) < 0.01
    assert 40 < sum(f"out {i}" in bloom for i in range(10_000)) < 160 and bloom.num_hashes == 7

def test_normalizing_keeps_vowel_signs():
    assert C.normalize("Señor  O’Neil, 3.5%! e\u0301\u00a0x 中文。").decode().split() == [
        "senor", "oneil", "35", "e", "x", "中", "文"]
    assert all(C.normalize(a) != C.normalize(b) for a, b in (("की", "का"), ("ガ", "カ")))
    a, b, c, d = (C.shingles(text, 2) for text in ("a b c d", "B, c  D e", "one", "..."))
    assert list(map(len, (a, b, c, d))) == [3, 3, 1, 0]
    assert C.jaccard(a, b) == 2 / 4 and C.jaccard(a, d) == 0

def near_copy(text, every=40):
    return " ".join(w if i % every else "changed" for i, w in enumerate(text.split()))

def test_minhash_dedup_of_files(tmp_path):
    texts = {f"{i}.txt": prose(i, 60) for i in range(6)}
    texts |= {"copy of 2.txt": texts["2.txt"], "near 4.txt": near_copy(texts["4.txt"].upper(), 150),
              "empty.txt": "", "empty too.txt": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths, (o1, o2, o3) = [tmp_path / name for name in texts], (tmp_path / o for o in "abc")
    C.minhash_dedup(paths, o1, num_hashes=100, num_bands=20, ngram=3, threshold=0.8)
    assert {path.name for path in o1.iterdir()} == set(texts) - {"copy of 2.txt", "near 4.txt"}
    C.minhash_dedup(paths[::-1], o2, 100, 20, 3, 0.8)  # the first is kept
    C.minhash_dedup(paths, o3, 100, 20, 3, 0.99)  # candidates are compared
    assert (o2 / "copy of 2.txt").exists() and (o3 / "near 4.txt").exists()

def test_mistake_9_deduplication_depends_on_no_process(tmp_path, monkeypatch):
    """Nor on workers or cuts of the shuffle; six bands of one hash pair texts that are not near."""
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", [near_copy(prose(i % 7, 40), 12 + i)
                                                   for i in range(k, k + 12)]) for k in range(3)]
    args = ["dedup", "--input", *paths, "--ngram", "2", "--num_hashes", "6", "--num_bands", "6",
            "--threshold", "0.7", "--out"]
    for seed, n in (("0", 1), ("random", 3)):
        run(*args, tmp_path / seed, "--workers", n, env={**os.environ, "PYTHONHASHSEED": seed})
    monkeypatch.setattr(C, "RANGE", 7)
    monkeypatch.setattr(sys, "argv", ["", *args, str(tmp_path / "7"), "--workers", "1"])
    monkeypatch.setattr(signal, "signal", print)
    C.main()
    assert contents(tmp_path / "0") == contents(tmp_path / "random") == contents(tmp_path / "7")
    assert len(documents(tmp_path / "0")) == 7 and C.stable_hash("x") % 10**6 == 258058

def test_decontaminate(tmp_path):
    question = "which of these rivers runs through more countries than any other in the world"
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(json.dumps([{"q": question}]).encode()))
    (tmp_path / "e.txt").write_text("What colour is the sky on a clear day\nblue\n")
    (tmp_path / "e.csv").write_text('"What is 2\nand 2, if I may ask you",3,4,5,6,B')
    tests = [str(tmp_path / name) for name in ("e.jsonl.gz", "e.txt", "e.csv")]
    texts = [prose(1), f"{prose(1)} {question.upper()}! {prose(2)}", prose(2) + " yes blue rivers",
             "Q: what colour is the sky, on a clear day?", "What is 2 and 2 if I may ask you?"]
    path = write_jsonl(tmp_path / "d.jsonl", texts)
    run("decontaminate", "--input", path, "--evals", *tests, "--out", tmp_path / "o")
    assert [d["text"] for d in documents(tmp_path / "o")] == texts[:4:2]
    start, large = time.process_time(), {13: np.arange(10**6, dtype=np.uint64)}
    assert not any(C.contaminated(prose(i), large) for i in range(100))
    assert time.process_time() - start < 1  # 100 s, were the test set sorted for each

def test_mix_reaches_what_it_is_asked_for(tmp_path):
    sources = {"a": [write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(40)])],
               "b": [write_jsonl(tmp_path / "b.jsonl", [prose(i) for i in range(40, 60)])]}
    given = C.mix(sources, tmp_path / "1", {"a": 0.25, "b": 0.75}, budget=30_000)
    assert abs(given["b"]["reached"] - 0.75) < 0.03 and given["b"]["epochs"] == 2
    assert 30_000 <= sum(len(d["text"]) for d in documents(tmp_path / "1")) < 31_500
    pytest.raises(ValueError, C.mix, sources, tmp_path / "3", {"a": float("inf"), "b": 1})
    sources["c"] = [write_jsonl(tmp_path / "c.jsonl", ["\n\n".join(map(prose, range(500)))])]
    given = C.mix(sources, tmp_path / "4", {"a": 0.4, "b": 0.2, "c": 0.4}, budget=20_000)
    assert abs(given["c"]["reached"] - 0.4) < 0.05  # one document, of 400 kB
    small, large = (write_jsonl(tmp_path / f"{n}.jsonl", ["x" * 100] * n) for n in (4, 64))
    for args, said in ((("--temperature", "2"), "asked 0.8000"),
                       (("--weights", "s=0.99", "l=0.01", "--tokens", 9e4), "more than a tenth")):
        out = tmp_path / args[0]
        assert said in run("mix", "--input", f"s={small}", f"l={large}", "--out", out, *args).stdout

@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crawl")
    german = b"<p>" + b"Das ist ein Text, den wir nicht behalten und der so bleibt. " * 12
    for k in range(4):
        pages = [*map(page, range(10 * k, 10 * k + 6)), page(0), german]
        records = [gzip.compress(record(http(html))) for html in pages]
        (folder / f"{k}.warc.gz").write_bytes(b"".join(records))
    (folder / "sub").mkdir()
    for name, data in {"broken.warc.gz": records[0] + records[1][:400], "sub/p.html": page(700),
            "list.json": b'{"text": "", "html": 1}\n[]\nnot json\n' + json.dumps(
                {"text": prose(500) + " Mail me: jo@example.org, 283-182-3829."}).encode(),
            "t.txt": "<|endoftext|>".join([prose(600), "It is a short one.", prose(601)]).encode(),
            "sub/notes.md.gz": gzip.compress(prose(800).encode()), "sub/x.png": b"\x89"}.items():
        (folder / name).write_bytes(data)
    return folder

def test_pipeline_is_the_same_for_any_number_of_workers(crawl, tmp_path):
    one = run("pipeline", "--input", crawl, "--out", tmp_path / "1", "--workers", "1")
    run("pipeline", "--input", crawl, "--out", tmp_path / "3", "--workers", "3")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    found = documents(tmp_path / "1")
    assert len(found) == len({d["text"] for d in found}) == 24 + 1 + 2 + 1 + 1
    assert all(d["language"] == "en" and "Privacy" not in d["text"] for d in found)
    assert any("|||EMAIL_ADDRESS|||, |||PHONE_N" in d["text"] and d["phones"] == 1 for d in found)
    counts, examples = json.loads((tmp_path / "1" / "report.json").read_text()).values()
    assert counts["skipped: compressed file cut short"] == 1 == counts["skipped: bad document"] - 2
    assert counts["language: de"] == 4 and counts["exact duplicates: copy"] == 5
    assert counts["near duplicates: kept"] == len(found) and "1  gopher: under 50" in one.stdout
    assert "a short one" in examples["gopher: under 50 words"]
    run("pipeline", "--input", crawl, "--out", tmp_path / "1", "--ngram", "3", code=1)
    run("mix", "--input", f"s={crawl / 'sub'}", "--out", tmp_path / "m")
    assert [d["text"][:8] for d in documents(tmp_path / "m")] == [prose(800)[:8], "Page 700"]

def test_lines_and_paragraphs(tmp_path):
    menu, quote = "Home About Contact Subscribe", "Somebody has quoted this from elsewhere. " * 3
    texts = [f"{menu}\n{prose(i)}" for i in range(7)] + [f"{menu}\n{CHINESE}"]
    texts += [texts[0], *(f"{prose(i)}\n{quote}\nA short line." for i in (20, 21))]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    expected = [*map(prose, range(7)), CHINESE, texts[9].strip(), f"{prose(21)}\nA short line."]
    for rate in ("0", "0.001"):
        run("dedup", "--input", path, "--out", tmp_path / rate, "--threshold", "2", "--bloom", rate)
        assert [d["text"] for d in documents(tmp_path / rate)] == expected

def test_killed_run_goes_on(crawl, tmp_path, monkeypatch):
    out, inputs = tmp_path / "out", [tmp_path / f"{i}.warc.gz" for i in range(12)]
    for i, path in enumerate(inputs):  # enough work that a kill comes in the middle
        path.write_bytes((crawl / f"{i % 4}.warc.gz").read_bytes() * 8)
    command = [sys.executable, os.path.join(ROOT, "curate.py"), "pipeline", "--input",
               *map(str, inputs), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob(".work-*/extract-process*.json"))) < 3:
        time.sleep(0.01)
    process.kill()
    time.sleep(1)  # its workers see that it is gone
    assert 3 <= len(done := list(out.glob(".work-*/extract-process*.json"))) < 12
    for path in done:  # what was done is not done again: it is taken from here
        path.write_text(path.read_text().replace("extract: kept", "extract: kept before"))
    (out / "00000.jsonl.gz.1.tmp").touch()
    subprocess.run(command, check=True, capture_output=True)
    assert f'"extract: kept before": {len(done) * 64},' in (out / "report.json").read_text()
    assert not [*out.glob(".work-*/*"), *out.glob("*.tmp")]  # nor anything half written is left
    run(*command[2:-4], "--out", tmp_path / "whole", "--workers", "1")
    assert contents(out) == contents(tmp_path / "whole")
    monkeypatch.setattr(C, "start_worker", os.abort)  # a worker that is killed ends the run
    pytest.raises(RuntimeError, C.run_all, "hash_units", [(), ()], tmp_path / "x", 2, "")

def test_classifier_on_the_command_line(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [prose(i, 3) for i in range(60)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"buy cheap pills now {i} casino" for i in range(60)])
    model, texts = tmp_path / "q.npz", [prose(99), "buy cheap pills online casino now"]
    said = run("train-classifier", "--input", f"good={a}", f"bad={b}", "--out", model, "--words", 2)
    assert said.stdout == f"{model}: 108 texts learned, 12 of 12 others right\n"
    filtering = ("filter", "--input", write_jsonl(tmp_path / "x.jsonl", texts), "--filters")
    run(*filtering, "--out", tmp_path / "o", "--classifiers", f"{model}:good:0.5")
    assert [d["text"] for d in documents(tmp_path / "o")] == texts[:1]
    result = run(*filtering, "--out", tmp_path / "o3", "--classifiers", f"{model}:bad:1.1", code=1)
    assert "no document was kept" in result.stderr

def test_perplexity_filter(tmp_path):
    torch, M, bpe = map(pytest.importorskip, ("torch", "model", "bpe"))
    tokenizer = bpe.Tokenizer({i: bytes([i]) for i in range(256)}, [], [bpe.EOT])
    network = M.Transformer(M.TransformerConfig(257, 16, n_layer=1, n_head=1, n_embd=8))
    for name, x in network.state_dict().items():
        x.fill_(name in ("embedding.weight", "final_norm.weight"))
    network.head.weight.data[list(b"ab ")] = 1  # logits of 120 of 121 tokens are 8, of others 0
    M.save_checkpoint(ckpt := str(tmp_path / "ckpt.pt"), network, tokenizer=tokenizer.to_json())
    path, out = write_jsonl(tmp_path / "x.jsonl", ["qx " * 40, "ab ba " * 20, ""]), tmp_path / "o"
    run("filter", "--input", path, "--filters", "--perplexity", f"{ckpt}:9", "--out", out)
    [found], expected = documents(out), (3 * np.exp(8) + 254) * np.exp(-8 * 120 / 121)
    assert found["text"][:2] == "ab" and abs(found["perplexity"] - expected) < 0.01

@pytest.mark.parametrize("args, code, message", [
    (("pipeline", "--input", "nothing.warc"), 1, "nothing.warc"),
    (("dedup", "--input", "x.jsonl", "x.bz2"), 1, "x.bz2: not there, or not of"),
    (("mix", "--input", "x.bz2"), 1, "x.bz2: not there, or not of"),
    (("decontaminate", "--input", "x.jsonl", "--evals", "x.bz2"), 1, "x.bz2: not there, or not of"),
    (("filter", "--input", "x.jsonl", "--classifiers", "q.npz:a:0.5"), 1, "q.npz"),
    (("filter", "--input", "x.jsonl", "--filters", "no"), 2, "invalid choice")])
def test_mistakes_of_users_are_one_line(tmp_path, args, code, message):
    write_jsonl(tmp_path / "x.jsonl", [prose(1)])
    (tmp_path / "x.bz2").touch()
    error = run(*args, "--out", "o", code=code, cwd=tmp_path).stderr
    assert message in error.strip().splitlines()[-1]

PDF = (b"%PDF-1.4\n1 0 obj<</Pages 2 0 R>>endobj 2 0 obj<</Kids[3 0 R]>>endobj 3 0 obj<</Type/Page"
       b"/Contents 4 0 R/Resources<</Font<</F<</Subtype/Type1>>>>>>>>endobj 4 0 obj<</Length 15>>st"
       b"ream\n/F 9 Tf(Text)Tj\nendstream endobj trailer<</Root 1 0 R>>\nstartxref\n0\n%%EOF")

def test_pdf_and_zst(tmp_path):
    zst, pdf, counts = tmp_path / "x.jsonl.zst", tmp_path / "x.pdf", C.collections.Counter()
    compress, _ = pytest.importorskip("zstandard").compress, pytest.importorskip("pypdf")
    for cut, texts in ((None, ["a", "b", "Text"]), (-4, ["a"])):
        pdf.write_bytes(PDF[: cut and 50])
        zst.write_bytes((compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}\n'))[:cut])
        assert [d["text"] for f in (zst, pdf) for d in C.read_documents(f, counts)] == texts
    assert counts["compressed file cut short"] == 1 and counts["bad document"] == 2
