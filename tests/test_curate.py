"""curate.py: each step against cases with known answers, and whole runs by command line."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import curate as C

WORDS = ("the of and to in that is was he for it with as his on be at by had not are but from or "
         "have they which one you were all her she there would their we him been has when who "
         "river stone garden window letter morning history water paper green engine mountain "
         "teacher market yellow quiet summer kitchen travel number silver village bridge").split()


def prose(seed, sentences=12):
    rng = random.Random(seed)
    out = []
    for _ in range(sentences):
        words = [rng.choice(WORDS) for _ in range(rng.randint(8, 16))]
        out.append(" ".join(words).capitalize() + ".")
    return " ".join(out)


def page(seed, body=None, language="en"):
    paragraphs = "".join(f"<p>{prose(seed * 100 + i, 4)}</p>" for i in range(5))
    return (f"<html lang={language}><head><title>Page {seed}</title><script>var x = '<p>no</p>';"
            f"</script></head><body><nav class=menu><ul><li><a href=/>Home</a></li><li><a href=/a>"
            f"About us</a></li></ul></nav><div class=content><article><h1>Page {seed}</h1>"
            f"{body or paragraphs}</article></div><footer class=footer>Copyright 2024 Example. "
            f"<a href=/p>Privacy policy</a></footer></body></html>").encode()


def record(content, kind="response", mime="application/http; msgtype=response", length=None,
           url="http://example.org/", version="1.0"):
    length = len(content) if length is None else length
    head = (f"WARC/{version}\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
            f"Content-Type: {mime}\r\n"
            f"Content-Length: {length}\r\n\r\n")
    return head.encode() + content + b"\r\n\r\n"


def http(body, headers="Content-Type: text/html; charset=utf-8", status="200 OK"):
    return f"HTTP/1.1 {status}\r\n{headers}\r\n\r\n".encode() + body


def read(data):
    counts = C.collections.Counter()
    return [r.body for r in C.read_warc(io.BytesIO(data), counts)], counts


def run(*args, ok=True, **kw):
    result = subprocess.run([sys.executable, os.path.join(ROOT, "curate.py"), *map(str, args)],
                            capture_output=True, text=True, **kw)
    if ok:
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
    return result


def documents(folder):
    return [d for name in sorted(os.listdir(folder)) if name.endswith(".jsonl.gz")
            for d in C.read_documents(os.path.join(folder, name))]


def write_jsonl(path, texts):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    return str(path)


# ---- read


def test_warc_members_plain_and_one_member_give_the_same_pages():
    records = [record(b"software: x", "warcinfo", "application/warc-fields"),
               record(b"GET /", "request", "application/http; msgtype=request"),
               record(http(b"<p>one</p>")), record(http(b""), "revisit"),
               record(http(b"%PDF", "Content-Type: application/pdf")),
               record(http(b"gone", status="404 Not Found")), record(http(b"<p>two</p>"))]
    for data in (b"".join(records), gzip.compress(b"".join(records)),
                 b"".join(map(gzip.compress, records))):
        bodies, counts = read(data)
        assert bodies == [b"<p>one</p>", b"<p>two</p>"]
        assert counts["type revisit"] == counts["not HTML"] == counts["HTTP status not 200"] == 1
        assert counts["records"] == 7


def test_wet_and_resource_records():
    data = record("Grüße".encode(), "conversion", "text/plain") + \
        record(b"<p>r</p>", "resource", "text/html")
    found = list(C.read_warc(io.BytesIO(data)))
    assert [(r.kind, r.body) for r in found] == [("text", "Grüße".encode()), ("html", b"<p>r</p>")]


def test_chunked_and_packed_bodies():
    chunked = b"4\r\n<p>a\r\n6;x=y\r\nb</p>\n\r\n0\r\n\r\n"
    head = "Content-Type: text/html\r\nTransfer-Encoding: chunked"
    assert read(record(http(chunked, head)))[0] == [b"<p>ab</p>\n"]
    assert read(record(http(b"<p>not chunked</p>", head)))[0] == [b"<p>not chunked</p>"]
    for packed in (gzip.compress(b"<p>z</p>"), b"<p>z</p>"):
        head = "Content-Type: text/html\r\nContent-Encoding: gzip"
        assert read(record(http(packed, head)))[0] == [b"<p>z</p>"]


@pytest.mark.parametrize("lie", [-7, 5, 60, 10**6, 10**12])
def test_a_length_that_lies_costs_one_record_at_most(lie):
    good = record(http(b"<p>good</p>"))
    content = http(b"<p>bad</p>" + b"x" * 100)
    data = good + record(content, length=max(0, len(content) + lie)) + good + good
    for packed in (data, gzip.compress(data)):
        bodies, counts = read(packed)
        assert [b for b in bodies if b == b"<p>good</p>"] == [b"<p>good</p>"] * 3
        assert counts["wrong length"] == 1


def test_a_page_that_speaks_of_warc_is_one_page():
    body = b"<p>Records begin with WARC/1.0 and headers.</p><p>More</p>"
    bodies, counts = read(record(http(body), length=9999) + record(http(b"b"), version="0.18"))
    assert bodies == [body, b"b"] and counts == {"wrong length": 1, "records": 2}
    bodies, counts = read(record(http(b"a"), version="0.18") + record(http(body))[:-30])
    assert bodies == [b"a"] and counts == {"records": 1, "record cut short": 1}


@pytest.mark.parametrize("unit", [b"WARC/1.0\r\n", b"WARC/1.0 ", b"\n"])
def test_hostile_warc_takes_linear_time(unit):
    start = time.process_time()
    bodies, _ = read(unit * (10_000_000 // len(unit)) + b"\r\n" + record(http(b"<p>after</p>")))
    assert bodies == [b"<p>after</p>"] or unit == b"WARC/1.0\r\n"  # its headers go on
    assert time.process_time() - start < 2


def test_damage_is_counted_and_the_rest_is_read():
    members = [gzip.compress(record(http(b"<p>%d</p>" % i + os.urandom(2000)))) for i in range(5)]
    broken = bytearray(members[2])
    broken[40:900] = bytes(860)
    bodies, counts = read(members[0] + members[1] + bytes(broken) + members[3] + members[4])
    assert [b[:8] for b in bodies if b[3:4] != b"2"] == [b"<p>%d</p>" % i for i in (0, 1, 3, 4)]
    assert counts["damaged gzip member"] >= 1
    bodies, counts = read(b"".join(members)[:-500])
    assert len(bodies) == 4 and counts["gzip cut short"] == 1 and counts["record cut short"] == 1
    for junk in (b"", b"\0" * 5000, b"WARC/1.0\r\n", b"WARC/1.0\r\nContent-Length: x\r\n\r\n",
                 os.urandom(3000), b"\x1f\x8b\x08" * 1000):
        bodies, _ = read(junk + record(http(b"<p>after</p>")))
        if not junk.startswith(b"\x1f"):  # plain bytes after gzip's magic are not looked at
            assert bodies == [b"<p>after</p>"]


def test_bombs_are_capped():
    bomb = gzip.compress(record(http(b"\0" * (80 << 20))), 9)
    bodies, counts = read(bomb + gzip.compress(record(http(b"<p>after</p>"))))
    assert bodies == [b"<p>after</p>"] and counts["decompression bomb"] == 1
    inner = http(gzip.compress(b"\0" * (40 << 20)), "Content-Type: text/html\r\n"
                 "Content-Encoding: gzip")
    bodies, counts = read(record(inner) + record(http(b"<p>after</p>")))
    assert bodies == [b"<p>after</p>"] and counts["decompression bomb"] == 1
    bodies, counts = read(record(http(b"x" * (C.MAX_PAGE + 9))) + record(http(b"<p>after</p>")))
    assert bodies == [b"<p>after</p>"] and counts["page too large"] == 1


@pytest.mark.parametrize("data, header, expected", [
    ("Grüße".encode(), None, "Grüße"),
    ("Grüße".encode("cp1252"), None, "Grüße"),
    ("Привет мир".encode("cp1251"), "windows-1251", "Привет мир"),
    (b'<meta charset="shift_jis">' + "日本語".encode("shift_jis"), None, "日本語"),
    (b'<meta http-equiv=x content="text/html; charset=gb2312">' + "中文".encode("gbk"), None, "中文"),
    ("\ufeffé".encode("utf-16"), None, "é"),
    ("é".encode(), "no-such-charset", "é"),
    ("é".encode("latin-1"), "zlib_codec", "é"),
    ("“x”".encode("cp1252"), "iso-8859-1", "“x”"),
    ("naïve café ".encode() * 50 + b"\xff", None, "naïve café"),
])
def test_encodings(data, header, expected):
    assert expected in C.decode_page(data, header)


# ---- transform


RICH = """<h1>Growing beans</h1><p>Beans are easy to grow, and they improve the soil &amp; the
kitchen at the same time, which few other plants do.</p><h2>What you need</h2><ul><li>A pot with
holes</li><li>Soil, about <b>ten</b> litres</li></ul><p>Put the seeds in the soil two fingers deep,
water them well and wait for a week until the first leaves appear.</p><table><tr><th>Month</th>
<th>Work</th></tr><tr><td>May</td><td>Sow the seeds</td></tr></table><pre>def grow(bean):
    return bean &lt;&lt; 1</pre><p>A line<br>and another, without a paragraph between.</p>
<p style="display: none">Hidden words here</p><div hidden>Hidden too</div><script>alert(1)</script>
<style>p {color: red}</style><!-- <p>comment</p> --><p>In the end you will have so many that your
neighbours will pretend not to be at home when you ring.</p>"""


def test_extract_keeps_structure_and_drops_the_rest():
    text = C.extract_text(page(1, RICH))
    for part in ("soil & the kitchen", "What you need", "- A pot with holes", "about ten litres",
                 "Month | Work", "May | Sow the seeds", "def grow(bean):\n    return bean << 1",
                 "A line\nand another", "neighbours will pretend"):
        assert part in text, part
    for part in ("Hidden", "alert", "color", "comment", "Home", "About us", "Privacy", "Copyright",
                 "<", "var x"):
        assert part not in text.replace("<<", ""), part
    assert C.extract_text(page(1, RICH).decode()) == text


@pytest.mark.parametrize("html, expected", [
    ("", ""), ("   ", ""), ("just text", "just text"), ("<p>Hello world</p>", "Hello world"),
    ("<P>Upper</P>", "Upper"), ("<p>a < b and 3 <4</p>", "a < b and 3 <4"),
    ("<div data-x='<p>no</p>'>yes it is</div>", "yes it is"),
    ("<p>&eacute;&#233;&#xe9;&nbsp;x</p>", "ééé x"), ("<p>x\0y</p>", "xy"),
    ("<p>cut <a href='", "cut"), ("<p>kept</p><script>dropped", "kept"),
    ("<p>kept <!-- not closed</p>", "kept"), ("İ<script>a</script><p>ok it is</p>", None),
])
def test_extract_small(html, expected):
    text = C.extract_text(html)
    assert "dropped" not in text and "a</script" not in text
    if expected is not None:
        assert text == expected


def test_end_tags_in_cells_close_nothing_outside():
    b = C.scan("<div class=comment><table><tr><td></div>one</td></tr></table>two</div>three")
    comment = C.PLACE_BITS["comment"]
    assert [text for text, places in zip(b.text, b.places) if places & comment] == ["one", "two"]


def test_text_in_noscript_or_shown_by_script_later():
    long = f"<p>{prose(1)}</p><p>{prose(2)}</p>"
    for html in (f"<body><p>Loading</p><noscript>{long}</noscript></body>",
                 f"<body><div style='visibility:hidden'>{long}</div></body>"):
        assert prose(1) in C.extract_text(html)
    assert "Enable" not in C.extract_text(f"{long}<noscript>Enable it</noscript>")


def test_text_that_is_no_utf_8():
    assert C.extract_text("<p>a\ud800b</p>") == "a\ud800b"
    assert C.text_size({"text": "\ud800"}) == 1
    assert not C.BloomFilter(9).add("\ud800")


@pytest.mark.parametrize("unit", ["<div>", "<a<a", '<a x="<', "<!--", "<svg>", "<", "<li>x",
                                  "<td>x", "<p>x", "&#", "=\"", "<div><td></div>", "<br>"])
def test_hostile_html_takes_linear_time(unit):
    C.extract_text(unit * 1000)
    seconds = []
    for n in (10_000, 80_000):
        start = time.process_time()
        C.extract_text(unit * n)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 30 * max(seconds[0], 0.02)  # 64 were it quadratic
    assert seconds[1] < 3


def test_deep_nesting_keeps_the_text():
    text = prose(3)
    assert text in C.extract_text("<div>" * 5000 + f"<p>{text}</p>" + "</div>" * 5000)


# ---- language and classifiers


@pytest.mark.parametrize("text, code", [
    ("This is a short note that we wrote for you.", "en"), ("欢迎来到我们的网站", "zh"),
    ("これは日本語の文章です", "ja"), ("한국어 문장입니다", "ko"), ("Это просто русский текст", "ru"),
    ("Das ist ein kurzer Text, den wir geschrieben haben.", "de"), ("Це їхній дім", "uk"),
    ("Ceci est un texte que nous avons écrit pour vous.", "fr"), ("هذا نص قصير", "ar"),
    ("Esto es un texto que hemos escrito para los niños.", "es"), ("Αυτό είναι", "el"),
])
def test_language_without_a_model(text, code):
    found, score = C.identify_language(text)
    assert found == code and 0 < score <= 1
    assert C.identify_language("123 !?") == ("und", 0.0) == C.identify_language("")


def samples():
    rng = random.Random(0)
    def word(syllables):
        return "".join(rng.choice(syllables) for _ in range(rng.randint(2, 4)))
    kinds = {"aa": "ka lo mi tu", "bb": "sch ung ein tz", "cc": "zzy pfu qua"}
    return [(" ".join(word(s.split()) for _ in range(6)), label) for label, s in kinds.items()
            for _ in range(60)]


@pytest.mark.parametrize("how", [{}, {"chars": (0, 0), "words": 2}, {"prior": 0, "rate": 0.5}])
def test_classifier_learns_saves_and_loads(tmp_path, how):
    pairs = samples()
    random.Random(1).shuffle(pairs)
    train, test = pairs[:140], pairs[140:]
    model = C.LinearClassifier.train(*zip(*train), bits=12, **how)
    right = sum(model.predict(t)[0] == label for t, label in test)
    assert right >= (0.95 if "words" not in how else 0.5) * len(test)
    path = str(tmp_path / "m.npz")
    model.save(path)
    loaded = C.LinearClassifier.load(path)
    for t, _ in test[:10]:
        np.testing.assert_allclose(loaded.probabilities(t), model.probabilities(t), atol=0.05)
        assert abs(loaded.probabilities(t).sum() - 1) < 1e-5
    assert loaded.score(test[0][0], "aa") == pytest.approx(loaded.probabilities(test[0][0])[0])
    model.predict("")  # no n-gram at all


def test_classifier_refuses_other_files(tmp_path):
    path = str(tmp_path / "x.npz")
    table = np.zeros((8, 2), np.int8)
    good = dict(labels=np.array(["a", "b"]), table=table, chars=np.array([1, 2]), words=0,
                scale=1.0)
    np.savez(path, **good)
    C.LinearClassifier.load(path)
    for change in ({"table": table[:7]}, {"table": table.astype(float)},
                   {"labels": np.array(["a"])}, {"chars": np.array([1, 99])},
                   {"labels": np.array([{}, 1], dtype=object)}):
        np.savez(path, **{**good, **change})
        with pytest.raises(ValueError, match="no classifier"):
            C.LinearClassifier.load(path)
    for junk in (b"", b"PK\x03\x04 junk", b"no"):
        with open(path, "wb") as file:
            file.write(junk)
        with pytest.raises(ValueError, match="no classifier"):
            C.LinearClassifier.load(path)
    with pytest.raises(ValueError, match="two labels"):
        C.LinearClassifier.train(["x"], ["a"])
    with pytest.raises(ValueError, match="needs n-grams"):
        C.LinearClassifier.train(["x", "y"], ["a", "b"], chars=(0, 0))
    C.LinearClassifier.train(["x", "y"], ["a", "b"], chars=(6, 7), bits=8).predict("z")


# ---- filter


def test_gopher_quality():
    keep, reason = C.gopher_quality_filter, C.gopher_quality_reason
    assert keep(prose(1)) is True
    assert reason("The string you read is of text. " * 5) == "under 50 words"
    assert reason("the of cat " * 33_334) == "over 100,000 words"
    assert keep("the with cat sat " * 25_000) is True
    assert reason("to be it " * 100) == "mean word length"
    assert reason("the and " + "extraordinarily " * 100) == "mean word length"
    dots = ["The line here is one of those with an ellipsis..."] * 40
    assert reason("\n".join(dots + ["This is the end of it."] * 60)) == "ellipses"
    assert keep("\n".join(dots[:25] + ["This is the end of it."] * 75)) is True
    assert reason("- the green garden of morning\n" * 50) == "bullets"
    assert reason("the of and " * 20 + "1234 " * 20) == "words without letters"
    assert reason("# the river of them " * 30) == "symbols to words"
    assert reason("lorem ipsum dolor amet " * 30) == "stop words"
    assert reason("lorem ipsum dolor amet " * 30, "la") is None
    assert reason("这是一个关于河流和石头的故事，" * 10, "zh") is None


def test_gopher_repetition():
    keep, reason = C.gopher_repetition_filter, C.gopher_repetition_reason
    assert keep("\n\n".join(prose(i, 3) for i in range(5))) is True
    assert reason("\n\n".join([prose(1), prose(2)] + [prose(3)] * 3)) == "repeated paragraphs"
    lines = [f"line {prose(i, 1)}" for i in range(6)]
    assert reason("\n".join(lines + lines[:1] * 5)) == "repeated lines"
    unique = [f"w{i}" for i in range(200)]
    assert reason(" ".join(x for w in unique[:60] for x in ("blue house", w))) == \
        "most frequent 2-gram"
    five = "alpha beta gamma delta epsilon"
    many = " ".join(unique[:100]) + f" {five} " + " ".join(unique[100:110]) + f" {five}"
    assert reason(many) is None
    many = " ".join(unique[:100] + unique[30:55])
    assert reason(many) == "repeated 5-grams"
    assert keep("") is True


def test_c4_and_fineweb():
    good = "\n".join(prose(i, 1) for i in range(6))
    assert C.c4_filter(good) is True
    assert C.c4_filter("\n".join(good.split("\n")[:3])) is True
    assert C.c4_reason("\n".join(good.split("\n")[:2])) == "under 3 sentences"
    assert C.c4_reason(good + "\nif (x) { y }") == "curly bracket"
    assert C.c4_reason(good + "\nLorem ipsum dolor.") == "lorem ipsum"
    lines = C.c4_lines("Home\nRead our cookie policy before you go.\nToo short this.\n"
                       f"One of its words is {'o' * 1001}.\n" + good.replace(".", "[12][edit]."))
    assert lines == good.split("\n")
    assert C.fineweb_reason(good) is None
    assert C.fineweb_reason("\n".join("a line that never ends in a full stop %d" % i
                                      for i in range(20))) == "lines without punctuation"
    assert C.fineweb_reason("\n".join([good] + good.split("\n")[:2])) == \
        "characters in repeated lines"
    assert C.fineweb_reason("\n".join("Short %d." % i for i in range(9))) == "short lines"


# ---- mask


@pytest.mark.parametrize("text, count", [
    ("Write to jane.doe+news@mail.example.co.uk.", 1), ("a@b.org and c_d@e-f.com", 2),
    ("|||EMAIL_ADDRESS||| x@y.de", 1), ("@twitter and a @ b, x@localhost", 0),
    ("me@münchen.de", 1),
])
def test_mask_emails(text, count):
    masked, n = C.mask_emails(text)
    assert n == count and masked.count("|||EMAIL_ADDRESS|||") == count + text.count("|||E")
    assert not count or "@" not in masked


@pytest.mark.parametrize("number", [
    "2831823829", "(283)-182-3829", "(283) 182 3829", "283-182-3829", "283.182.3829",
    "+1 283 182 3829", "1-800-555-0199", "+44 20 7946 0958", "+49 (30) 1234567", "020 7946 0958"])
def test_mask_phone_numbers(number):
    text = f"Feel free to contact me at {number} if you have any questions."
    assert C.mask_phone_numbers(text) == (text.replace(number, "|||PHONE_NUMBER|||"), 1)


@pytest.mark.parametrize("text", ["Phone:555-123-4567", "Tel:+1 283 182 3829", "tel:2831823829",
                                  "Fax:(283) 182-3829", "a:283.182.3829"])
def test_phone_numbers_right_after_a_colon(text):
    assert C.mask_phone_numbers(text) == (text[: text.index(":") + 1] + "|||PHONE_NUMBER|||", 1)


@pytest.mark.parametrize("text", [
    "In 2023-10-15 or 15.10.2023, at 12:30:45", "version 3.11.4 and 1.2.3", "12,345,678 people",
    "It was 1234567890 in all, 3.14159265358979", "ISBN 978-3-16-148410-0", "pages 123-4567",
    "from 1914-1918 to 1939-1945", "4111 1111 1111 1111", "order 2831823829 was sent",
    "doi 10.1234/567.8901", "odds of 1:555-123-4567", "at 1700000000 seconds", "$283 182 3829",
    "100 000 000 stars"])
def test_numbers_in_prose_are_no_phone_numbers(text):
    assert C.mask_phone_numbers(text) == (text, 0)


def test_mask_ips():
    text = "Servers 192.0.2.146, 10.0.0.1:80 and 2001:db8::8a2e:370:7334 are up. At 8.8.8.8."
    masked, n = C.mask_ips(text)
    assert n == 4 and masked == ("Servers |||IP_ADDRESS|||, |||IP_ADDRESS|||:80 and "
                                 "|||IP_ADDRESS||| are up. At |||IP_ADDRESS|||.")
    for text in ("version 1.2.3.4", "v1.2.3.4", "Chrome 91.0.4472.124", "Python 3.10.0.1",
                 "256.1.1.1",
                 "1.2.3", "1.2.3.4.5", "std::vector and 12:30:45", "section 2.1.1.3", "a::b"):
        assert C.mask_ips(text) == (text, 0)


# ---- deduplicate


def test_exact_line_dedup(tmp_path):
    files = {"a.txt": b"one\ntwo\nmenu\n", "b.txt": b"menu\nthree\n\n\ntwo",
             "c.txt": b"caf\xe9\r\n"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    out = tmp_path / "out"
    C.exact_line_dedup([tmp_path / name for name in files], out)
    found = {name: (out / name).read_bytes() for name in os.listdir(out)}
    assert found == {"a.txt": b"one\n", "b.txt": b"three\n", "c.txt": b"caf\xe9\r\n"}
    path = write_jsonl(tmp_path / "d.jsonl", ["x\ny", "y\nz", "y"])
    C.exact_line_dedup([path], out)
    assert [d["text"] for d in C.read_documents(str(out / "d.jsonl"))] == ["x", "z"]


@pytest.mark.parametrize("name, data, message", [
    ("x.txt.gz", gzip.compress(os.urandom(5000).hex().encode())[:-2000], "damaged gzip member"),
    ("x.txt", b"a\n" + b"x" * (4 * C.MAX_PAGE) + b"\nb\n", "line of more than"),
])
def test_what_can_not_be_read_is_said(tmp_path, capsys, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    C.exact_line_dedup([path], tmp_path / "o")
    assert f"{path}: {message}" in capsys.readouterr().err


def test_equal_hashes_in_parts_equal_those_at_once(tmp_path, monkeypatch):
    values = np.random.RandomState(0).randint(0, 300, 1200).astype("<u8") * C.MULTIPLIER
    values.tofile(tmp_path / "x")
    expected = {tuple(np.flatnonzero(values == v)) for v in values if (values == v).sum() > 1}
    for part, batch in ((10**6, 10**6), (100, 333), (7, 64)):
        monkeypatch.setattr(C, "PART", part)
        monkeypatch.setattr(C, "BATCH", batch)
        found = [tuple(ids[a:b]) for ids, s in C.equal_hashes(tmp_path / "x")
                 for a, b in zip(s, s[1:])]
        assert set(found) == expected and len(found) == len(expected)


def test_bloom_filter():
    rate, n = 0.01, 5000
    bloom = C.BloomFilter(n, rate)
    assert not any(bloom.add(f"in {i}") for i in range(100))
    assert all(f"in {i}" in bloom for i in range(100)) and bloom.add("in 5")
    hashes = np.random.RandomState(0).randint(0, 2**63, n - 100).astype(np.uint64)
    seen = bloom.add_hashes(np.concatenate([hashes, hashes[:50]]))
    assert seen[-50:].all() and seen[:-50].mean() < rate
    assert bloom.add_hashes(hashes).all()  # what it holds it never denies
    wrong = sum(f"out {i}" in bloom for i in range(10_000)) / 10_000
    assert 0.4 * rate < wrong < 1.6 * rate
    assert abs(bloom.size / n - 9.585) < 0.01 and bloom.num_hashes == 7
    with pytest.raises(ValueError):
        C.BloomFilter(0, 0.1)
    assert b"in 5" in bloom and not bloom.add(7) and 7 in bloom and "7" in bloom
    assert bloom.add_hashes([1, 1]).tolist() == [False, True]
    assert bloom.add_hashes(np.array([1, 2])).tolist() == [True, False]


def test_signatures_estimate_similarity_and_recall_follows_the_curve():
    rng = np.random.RandomState(0)
    for similarity in (0.3, 0.5, 0.7, 0.9):
        equal, hits, bands, rows, pairs = [], 0, 10, 4, 300
        for _ in range(pairs):
            x = rng.randint(0, 2**63, 400).astype(np.uint64)
            k = round(400 * (1 - similarity) / 2)  # J = (n - 2k) / n
            a, b = (C.minhash_signature(part, 40) for part in (x[: 400 - k], x[k:]))
            equal.append((a == b).mean())
            hits += (C.band_keys(a, bands) == C.band_keys(b, bands)).any()
        assert abs(np.mean(equal) - similarity) < 0.02
        expected = 1 - (1 - similarity**rows) ** bands
        assert abs(hits / pairs - expected) < 4 * (expected * (1 - expected) / pairs) ** 0.5 + 0.01


def test_jaccard_and_shingles():
    assert C.normalize("Señor  O’Neil, 3.5%! Straße").decode().split() == \
        ["senor", "oneil", "35", "straße"]
    assert C.normalize("e\u0301\u00a0x 中文。").decode().split() == ["e", "x", "中", "文"]
    a, b = C.shingles("a b c d", 2), C.shingles("B, c  D e", 2)
    assert len(a) == 3 and C.jaccard(a, b) == 2 / 4 and C.jaccard(a, a[:0]) == 0
    assert len(C.shingles("one two", 5)) == 1 and len(C.shingles("...", 5)) == 0


def test_hashes_of_words():
    words = ["a", "bb", "ccc", "a", "x" * 70_000, "ä", "bb"] + [f"w{i}" for i in range(30_000)]
    hashes, lengths = C.hash_words(("\t " + "  \n".join(words)).encode())
    assert hashes[0] == hashes[3] and hashes[1] == hashes[-30_001]
    assert lengths[:4].tolist() == [1, 2, 3, 1] and lengths.sum() == len("".join(words)) + 1
    assert len(np.unique(hashes[-30_000:])) == 30_000
    assert hashes[0] == C.hash_words(b"b a")[0][1] and len(C.hash_words(b"")[0]) == 0


def near_copy(text, every=40):
    words = text.split()
    words[::every] = ["changed"] * len(words[::every])
    return " ".join(words)


def test_minhash_dedup_of_files(tmp_path):
    texts = {f"{i}.txt": prose(i, 60) for i in range(6)}
    texts["copy of 2.txt"] = texts["2.txt"]
    texts["near 4.txt"] = near_copy(texts["4.txt"].upper(), 150)
    texts["empty.txt"] = texts["empty too.txt"] = ""
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    out = tmp_path / "out"
    paths = [str(tmp_path / name) for name in texts]
    result = C.minhash_dedup(paths, str(out), num_hashes=100, num_bands=20, ngram=3, threshold=0.8)
    assert sorted(os.listdir(out)) == sorted(set(texts) - {"copy of 2.txt", "near 4.txt"})
    assert all((out / name).read_text() == texts[name] for name in os.listdir(out))
    assert result["documents"] == 10 and result["duplicates"] == 2
    # the first of the input is kept, and a candidate that is not similar enough stays
    C.minhash_dedup(paths[::-1], str(tmp_path / "o2"), 100, 20, 3, 0.8)
    assert "copy of 2.txt" in os.listdir(tmp_path / "o2")
    C.minhash_dedup(paths, str(tmp_path / "o3"), 100, 20, 3, 0.99)
    assert "near 4.txt" in os.listdir(tmp_path / "o3")
    for bad in (dict(num_hashes=100, num_bands=30), dict(threshold=2), dict(ngram=0)):
        with pytest.raises(ValueError):
            C.minhash_dedup(paths, str(tmp_path / "o4"), **bad)
    with pytest.raises(ValueError, match="overwritten"):
        C.minhash_dedup(paths, str(tmp_path))


def test_minhash_clusters_are_chains(tmp_path):
    words = prose(1, 60).split()
    chain = [" ".join(words[i * 20 :] + [f"new{j}" for j in range(i * 20)]) for i in range(4)]
    sets = [C.shingles(t, 2) for t in chain]
    t = min(C.jaccard(a, b) for a, b in zip(sets, sets[1:])) - 0.01
    assert C.jaccard(sets[0], sets[3]) < t
    path = write_jsonl(tmp_path / "x.jsonl", ["unrelated " + prose(9)] + chain[::-1])
    C.minhash_dedup([path], str(tmp_path / "o"), 120, 60, 2, t)
    kept = [d["text"] for d in C.read_documents(str(tmp_path / "o" / "x.jsonl"))]
    assert len(kept) == 2 and kept[1] == chain[3]


def test_a_large_cluster_takes_linear_time(tmp_path, monkeypatch):
    """Documents of a cluster are not walked one by one for every other."""
    lookups, find = [], C.find
    monkeypatch.setattr(C, "find", lambda parent, x: lookups.append(x) or find(parent, x))
    text = prose(1, 20)
    path = write_jsonl(tmp_path / "x.jsonl", [f"{text} x{i}" for i in range(400)])
    result = C.minhash_dedup([path], str(tmp_path / "o"))
    assert result["duplicates"] == result["compared"] == 399
    assert len(lookups) < 100 * 400  # over a million were it quadratic


def test_no_process_of_others_is_ended(tmp_path):
    """minhash_dedup with workers, called by a program that has a child of its own."""
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [prose(i)]) for i in range(2)]
    own = C.multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    own.start()
    C.minhash_dedup(paths, str(tmp_path / "o"), workers=2)
    own.join(0.3)
    assert own.is_alive()
    own.kill()
    own.join()


def test_mistake_9_deduplication_depends_on_no_process(tmp_path):
    """Not on PYTHONHASHSEED, not on the number of workers. With two hashes in one band only some
    of the near copies are found: which, is up to the hashes."""
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", [near_copy(prose(i % 7, 40), 12 + i)
                                                   for i in range(k, k + 12)]) for k in range(3)]
    results = []
    for seed, workers in (("0", 1), ("123", 3)):
        out = tmp_path / f"out{seed}"
        run("dedup", "--input", *paths, "--out", out, "--workers", workers, "--ngram", "2",
            "--num_hashes", "2", "--num_bands", "1", "--threshold", "0.3",
            env={**os.environ, "PYTHONHASHSEED": seed})
        results.append([(name, (out / name).read_bytes()) for name in sorted(os.listdir(out))
                        if name.endswith(".gz")])
    assert results[0] == results[1]
    assert 7 < len(documents(out)) < 36  # some found, some not


@pytest.mark.parametrize("part", [C.PART, 8])
def test_dedup_documents(tmp_path, monkeypatch, part):
    monkeypatch.setattr(C, "PART", part)
    menu = "Home About Contact Subscribe"
    quote = "A long paragraph that somebody has quoted from elsewhere. " * 3
    texts = [f"{menu}\n{prose(i)}" for i in range(7)]
    texts += [texts[0], f"{prose(20)}\n{quote.strip()}\nA short line.",
              f"{prose(21)}\n{quote.strip()}\nA short line."]
    path = write_jsonl(tmp_path / "x.jsonl", texts)
    C.dedup_documents([path], str(tmp_path / "o"))
    found = [d["text"] for d in C.read_documents(str(tmp_path / "o" / "x.jsonl"))]
    assert found[:7] == [prose(i) for i in range(7)]
    assert found[7:] == [texts[8], f"{prose(21)}\nA short line."]


def test_documents_out_are_those_written(tmp_path):
    alone = ["\n" * i + "a" + "\n" * (7 - i) for i in range(8)]
    for i, texts in enumerate((["", " ", prose(1)], ["a\n" + prose(1), *alone])):
        path = write_jsonl(tmp_path / f"{i}.jsonl", texts)
        tally = C.dedup_documents([path], str(tmp_path / "o"), min_words=0)
        found = list(C.read_documents(str(tmp_path / "o" / f"{i}.jsonl")))
        assert len(found) == 1 == tally["repeated paragraphs"]["documents_out"]
        assert tally["repeated lines"]["reasons"]["empty"] == len(texts) - 1


# ---- decontaminate, mix


def test_decontaminate(tmp_path):
    question = "which of these rivers runs through more countries than any other in the world"
    (tmp_path / "e.jsonl").write_text(json.dumps({"q": {"stem": question}, "choices": ["yes"]}))
    (tmp_path / "e.csv").write_text('"What colour is the sky on a clear day","blue"\n')
    tests = tuple(str(tmp_path / name) for name in ("e.jsonl", "e.csv"))
    ngrams = C.test_ngrams(tests, 13)
    assert C.contaminated(f"{prose(1)} {question.upper()}! {prose(2)}", ngrams)
    assert C.contaminated("Q: what colour is the sky, on a clear day?", ngrams)
    assert not C.contaminated(f"{prose(1)} yes blue rivers runs through more", ngrams)
    path = write_jsonl(tmp_path / "d.jsonl", [prose(1), prose(2) + question])
    run("decontaminate", "--input", path, "--evals", *tests, "--out", tmp_path / "o")
    assert [d["text"] for d in documents(tmp_path / "o")] == [prose(1)]
    (tmp_path / "bad.jsonl").write_text("{}\n{")
    result = run("decontaminate", "--input", path, "--evals", tmp_path / "bad.jsonl", "--out",
                 tmp_path / "o2", ok=False)
    assert result.returncode == 1 and "bad.jsonl:2" in result.stderr


def test_mix(tmp_path):
    sources = {"a": [write_jsonl(tmp_path / "a.jsonl", [prose(i) for i in range(40)])],
               "b": [write_jsonl(tmp_path / "b.jsonl", [prose(i) for i in range(40, 60)])]}
    given = C.mix(sources, str(tmp_path / "o"), {"a": 0.25, "b": 0.75}, budget=30_000)
    assert abs(given["b"]["bytes"] / (given["a"]["bytes"] + given["b"]["bytes"]) - 0.75) < 0.03
    found = documents(tmp_path / "o")
    size = sum(len(d["text"]) for d in found)
    assert 30_000 <= size < 31_500 and given["b"]["epochs"] == 2
    assert {d["source"] for d in found} == {"a", "b"}
    given = C.mix(sources, str(tmp_path / "o2"), {"a": 1, "b": 1})
    assert os.listdir(tmp_path / "o2") == ["mixed.jsonl.gz"]
    assert given["b"]["documents"] == 20 and given["b"]["epochs"] == 1
    with pytest.raises(ValueError, match="name all sources"):
        C.mix(sources, str(tmp_path / "o3"), {"a": 1})


def test_mixing_weights_by_temperature_and_learned(tmp_path):
    """Sources of 16 times the bytes have 4 times the weight at temperature 2; the proxy run finds
    the shares that a target is made of."""
    german = "der kleine Hund läuft über die Wiese und sucht den Ball. "
    code = "def f(x):\n    return x + 1\n\nclass A:\n    pass\n"
    small = write_jsonl(tmp_path / "s.jsonl", ["x" * 100] * 4)
    large = write_jsonl(tmp_path / "l.jsonl", ["y" * 100] * 64)
    result = run("mix", "--input", f"s={small}", f"l={large}", "--out", tmp_path / "o",
                 "--temperature", "2")
    assert "weight 0.2000" in result.stdout and "weight 0.8000" in result.stdout
    sources = {name: [write_jsonl(tmp_path / name, texts)] for name, texts in {
        "en.jsonl": [prose(i) for i in range(20)], "de.jsonl": [german * 200],
        "code.jsonl": [code * 200]}.items()}
    target = [write_jsonl(tmp_path / "t.jsonl", [prose(50, 30)[:1500], code * 10])]
    weights = C.learn_weights(sources, target)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["de.jsonl"] < 0.1 and weights["en.jsonl"] > 0.5
    assert 0.1 < weights["code.jsonl"] < 0.4


def test_mixing_sources_that_are_empty_or_alone(tmp_path):
    a, none = write_jsonl(tmp_path / "a.jsonl", [prose(1)]), write_jsonl(tmp_path / "n.jsonl", [])
    assert C.learn_weights({"a": [a]}, [a]) == {"a": 1}
    for sources, target in (({"a": [a], "n": [none]}, a), ({"a": [a]}, none), ({"n": [none]}, a)):
        with pytest.raises(ValueError, match="--target, or a source, has no text"):
            C.learn_weights(sources, [target])
    with pytest.raises(ValueError, match="weights must be"):
        C.mix({"a": [a], "b": [a]}, str(tmp_path / "o"), {"a": float("inf"), "b": 1})
    result = run("mix", "--input", f"a={a}", f"n={none}", "--out", tmp_path / "o", "--temperature",
                 "0.001")
    assert "weight 1.0000" in result.stdout


# ---- whole runs


@pytest.fixture(scope="module")
def crawl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crawl")
    for k in range(4):
        records = [gzip.compress(record(http(page(10 * k + i)), url=f"http://e.org/{k}/{i}"))
                   for i in range(6)]
        records.append(gzip.compress(record(http(page(0)))))
        german = "<p>" + "Das ist ein Text, den wir nicht behalten und der so bleibt. " * 12
        records.append(gzip.compress(record(http(page(90 + k, german, "de")))))
        (folder / f"{k}.warc.gz").write_bytes(b"".join(records))
    (folder / "broken.warc.gz").write_bytes(records[0] + records[1][:400])
    (folder / "list.jsonl").write_text('{"text": 1}\n[]\nnot json\n' + json.dumps(
        {"text": prose(500) + " Mail me: jo@example.org, 283-182-3829."}) + "\n")
    (folder / "t.txt").write_text("<|endoftext|>".join(
        [prose(600), "This is but a short one of them.", prose(601)]))
    (folder / "p.html").write_bytes(page(700))
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)
            if name.endswith(".jsonl.gz")}


def test_pipeline(crawl, tmp_path):
    one = run("pipeline", "--input", crawl, "--out", tmp_path / "1", "--workers", "1")
    run("pipeline", "--input", crawl, "--out", tmp_path / "3", "--workers", "3")
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    found = documents(tmp_path / "1")
    assert len(found) == len({d["text"] for d in found}) == 24 + 1 + 2 + 1
    assert all(d["language"] == "en" and "Privacy" not in d["text"] for d in found)
    masked = next(d for d in found if "masked" in d)
    assert "|||EMAIL_ADDRESS|||, |||PHONE_NUMBER|||" in masked["text"]
    report = json.loads((tmp_path / "1" / "report.json").read_text())
    assert report["read"]["bad line"] == 3 and report["read"]["gzip cut short"] == 1
    assert report["documents"] == len(found)
    steps = report["steps"]
    assert steps["language"]["reasons"] == {"language de": 4}
    assert steps["gopher"]["reasons"] == {"under 50 words": 1}
    assert steps["exact duplicates"]["documents_in"] - \
        steps["exact duplicates"]["documents_out"] == 5
    assert len(steps["extract"]["kept"]) == 5 and steps["language"]["dropped"][0]["reason"]
    for before, after in zip(list(steps.values()), list(steps.values())[1:]):
        assert after["documents_in"] == before["documents_out"]
    assert "100,000 files" in one.stdout and "list.jsonl:1" in one.stderr
    assert "complete" in run("pipeline", "--input", crawl, "--out", tmp_path / "1").stdout
    other = run("pipeline", "--input", crawl, "--out", tmp_path / "1", "--threshold", "0.5",
                ok=False)
    assert other.returncode == 1 and "other inputs or settings" in other.stderr


def test_steps_one_by_one_equal_the_pipeline(crawl, tmp_path):
    inputs = sorted(crawl.glob("*.warc.gz"))
    run("pipeline", "--input", *inputs, "--out", tmp_path / "p", "--workers", "1")
    flow = ("read", "extract", "language", "filter", "mask", "dedup")
    for i, step in enumerate(flow):
        source = inputs if i == 0 else [tmp_path / flow[i - 1]]
        run(step, "--input", *source, "--out", tmp_path / step, "--workers", "1")
    assert [d["text"] for d in documents(tmp_path / "p")] == \
        [d["text"] for d in documents(tmp_path / "dedup")]
    assert "html" in documents(tmp_path / "read")[0]


def test_masking_again_counts_what_is_new(tmp_path):
    documents_in = [{"text": "|||EMAIL_ADDRESS||| was one", "masked": {"email": 1}},
                    {"text": "a@b.org and 192.0.2.1", "masked": 3}, {"text": "x", "masked": "y"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, documents_in)))
    run("mask", "--input", tmp_path / "x.jsonl", "--out", tmp_path / "o")
    assert [d["masked"] for d in documents(tmp_path / "o")] == \
        [{"email": 1}, {"email": 1, "ip": 1}, "y"]
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["steps"]["mask"]["reasons"] == {"email": 1, "ip": 1}


def test_killed_run_goes_on(crawl, tmp_path):
    out = tmp_path / "out"
    inputs = []
    for i in range(12):  # enough work that a kill comes in the middle
        data = (crawl / f"{i % 4}.warc.gz").read_bytes() * 8
        path = tmp_path / f"{i}.warc.gz"
        path.write_bytes(data)
        inputs.append(path)
    command = [sys.executable, os.path.join(ROOT, "curate.py"), "pipeline", "--input",
               *map(str, inputs), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = out / ".work" / "documents"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None and (
            not first.is_dir() or len(list(first.glob("*.tally.json"))) < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its workers see that it is gone
    done = {p: p.stat().st_mtime_ns for p in first.glob("*.tally.json")}
    assert 3 <= len(done) < 12 and not (out / "report.json").exists()
    assert not list(out.glob("*.jsonl.gz"))
    resumed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while resumed.poll() is None and len(list(first.glob("*.tally.json"))) < 12:
        time.sleep(0.01)
    again = [p for p, t in done.items() if p.exists() and p.stat().st_mtime_ns != t]
    assert resumed.wait() == 0 and not again
    run("pipeline", "--input", *inputs, "--out", tmp_path / "whole", "--workers", "1")
    assert contents(out) == contents(tmp_path / "whole")


def test_interrupt_leaves_no_half_file(crawl, tmp_path):
    out = tmp_path / "out"
    path = tmp_path / "big.warc.gz"
    path.write_bytes((crawl / "0.warc.gz").read_bytes() * 200)
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "curate.py"), "pipeline",
                                "--input", str(path), "--out", str(out)], stderr=subprocess.PIPE,
                               text=True)
    while not list((out / ".work").glob("documents/*.tmp")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in error and "stopped" in error
    assert not list(out.rglob("*.jsonl.gz"))


def test_classifiers_on_the_command_line(crawl, tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [prose(i, 3) for i in range(60)])
    (tmp_path / "b.txt").write_text("\n".join("buy cheap pills now %d online casino" % i
                                             for i in range(60)))
    model = tmp_path / "q.npz"
    result = run("train-classifier", "--examples", f"good={a}", f"bad={tmp_path / 'b.txt'}",
                 "--out", model, "--words", "2", "--bits", "12")
    assert "accuracy: 1.0" in result.stdout
    texts = write_jsonl(tmp_path / "x.jsonl", [prose(99), "buy cheap pills online casino now"])
    run("filter", "--input", texts, "--out", tmp_path / "o", "--filters", "--quality",
        f"{model}:good:0.5")
    assert [d["text"] for d in documents(tmp_path / "o")] == [prose(99)]
    wrong = run("filter", "--input", texts, "--out", tmp_path / "o2", "--quality",
                f"{model}:nice:0.5", ok=False)
    assert wrong.returncode == 1 and "bad, good" in wrong.stderr


def test_perplexity_filter(tmp_path):
    import bpe
    import model as M

    (tmp_path / "t.txt").write_text(prose(1, 50))
    vocab, merges = bpe.train_bpe(str(tmp_path / "t.txt"), 300, [bpe.EOT])
    bpe.Tokenizer(vocab, merges, [bpe.EOT]).save(str(tmp_path))
    net = M.Transformer(M.TransformerConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2,
                                            n_embd=16))
    ckpt = str(tmp_path / "ckpt.pt")
    M.save_checkpoint(ckpt, net, [], 0, 0.0, {}, {}, (tmp_path / "tokenizer.json").read_text())
    value = C.load_perplexity(ckpt)(prose(2))
    assert 100 < value < 1000  # an untrained model knows nothing: about the vocabulary
    options = {"steps": ["filter"], "filters": [], "quality": None, "toxicity": None, "nsfw": None,
               "perplexity": (ckpt, 10 * value)}
    assert list(C.apply_steps({"text": prose(2)}, options))[1] == ("perplexity", None)
    path = write_jsonl(tmp_path / "x.jsonl", [prose(2)])
    run("filter", "--input", path, "--out", tmp_path / "o", "--filters", "--perplexity",
        f"{ckpt}:{value / 10}")
    assert documents(tmp_path / "o") == []


@pytest.mark.parametrize("args, code, message", [
    (("pipeline", "--input", "nothing.warc", "--out", "o"), 1, "no file nothing.warc"),
    (("dedup", "--input", "x.jsonl", "--out", "o", "--num_bands", "13"), 2, "equal bands"),
    (("pipeline", "--input", "x.jsonl", "--out", "o", "--workers", "0"), 2, "--workers"),
    (("filter", "--input", "x.jsonl", "--out", "o", "--quality", "q.npz"), 2, "FILE:LABEL:NUMBER"),
    (("filter", "--input", "x.jsonl", "--out", "o", "--quality", "q.npz:a:0.5"), 1, "q.npz"),
    (("extract", "--input", "x.jsonl", "--out", "x.jsonl"), 1, "x.jsonl"),
    (("mix", "--input", "a=x.jsonl", "--out", "o", "--weights", "a=b"), 2, "NAME=NUMBER"),
    (("decontaminate", "--input", "x.jsonl", "--out", "o"), 2, "--evals"),
    (("decontaminate", "--input", "x.jsonl", "--out", "o", "--evals"), 2, "--evals"),
    (("mix", "--input", "a=x.jsonl", "--out", "o", "--weights", "a=inf"), 2, "not between"),
    (("filter", "--input", "x.jsonl", "--out", "o", "--quality", "q:a:5"), 2, "between 0 and 1"),
    (("filter", "--input", "x.jsonl", "--out", "o", "--nsfw", "q:a:nan"), 2, "between 0 and 1"),
    (("train-classifier", "--examples", "a=e.txt", "b=e.txt", "--out", "o"), 1, "no examples"),
])
def test_mistakes_of_users_are_one_line(tmp_path, args, code, message):
    write_jsonl(tmp_path / "x.jsonl", [prose(1)])
    (tmp_path / "e.txt").touch()
    result = run(*args, ok=False, cwd=tmp_path)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert message in result.stderr.strip().splitlines()[-1]


def test_pdf_without_pypdf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdf", None)
    (tmp_path / "x.pdf").write_bytes(b"%PDF-1.4")
    with pytest.raises(ValueError, match="pip install pypdf"):
        list(C.read_documents(str(tmp_path / "x.pdf")))


def test_output_is_what_bpe_reads(crawl, tmp_path):
    run("pipeline", "--input", crawl / "0.warc.gz", "--out", tmp_path / "o", "--workers", "1")
    import bpe
    path = next(str(p) for p in (tmp_path / "o").glob("*.jsonl.gz"))
    vocab, _ = bpe.train_bpe(path, 300, [bpe.EOT])
    assert len(vocab) == 300
