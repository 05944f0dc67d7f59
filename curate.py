"""
From web pages to documents worth training on.

    python curate.py                   # all of it, on a small crawl made for the purpose
    python curate.py pipeline --input crawl/*.warc.gz --out corpus --workers 8
    python bpe.py train --input corpus/*.jsonl.gz --vocab_size 32000 --out data/web

`pipeline` takes the main text out of HTML, keeps the languages asked for, drops bad text by rules,
masks personal data and removes duplicates. --out gets documents (.jsonl.gz, one per line, with
`text`) and report.json (what each step kept and why). --steps chooses; each step is a command, too:

    python curate.py extract --input crawl page.html paper.pdf --out texts
    python curate.py filter --input texts --out good --filters gopher repetition c4
    python curate.py decontaminate --input good --evals arc.jsonl --out clean
    python curate.py pipeline --input ~/notes src --out own --steps mask dedup
    python curate.py mix --input web=clean wiki=wiki.jsonl --weights web=0.7 wiki=0.3 --out mixed
    python curate.py train-classifier --input good=wiki.txt web=web.jsonl --words 2 --out q.npz
    python curate.py pipeline --input crawl --out corpus --quality q.npz:good:0.5

Inputs: .warc, .wet, .html, .txt (with <|endoftext|> between documents), JSON lines (.jsonl .ndjson
.json), code and notes (a file is a document), each also as .gz and, with the package zstandard,
.zst; .pdf with pypdf; folders of these. Given again, a command that was stopped continues. Neither
--workers nor --ray ADDRESS, a Ray cluster that shares the folders, changes the output.
"""

import argparse, collections, concurrent.futures, contextlib, csv, functools, glob, gzip, hashlib
import html as html_library, importlib, importlib.util, ipaddress, itertools, json, math
import multiprocessing, os, re, shutil, signal, sys, tempfile, threading, time, unicodedata, zlib

import numpy as np

EOT = "<|endoftext|>"

# Read. A WARC file (ISO 28500) is a sequence of records: headers, a blank line, and as many bytes
# as Content-Length says, each record usually a gzip member of its own. Crawls are truncated,
# damaged and wrong about lengths: what cannot be read is counted and skipped.

MAX_PAGE, CHUNK = 16 << 20, 1 << 16  # bytes: longer pages are skipped; of a read
NEXT = b"\nWARC/"  # how a record follows another: the text of a page may mention WARC/1.0, too
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
GZIP, ZSTD = (re.compile(magic) for magic in (rb"\x1f\x8b\x08", rb"\x28\xb5\x2f\xfd"))
# kind: "html" or "text" (WET); charset: by the HTTP header, or None; body: bytes, decompressed
Record = collections.namedtuple("Record", "url kind charset body")

def unpack(file, counts):
    """Yield the bytes of a binary file in pieces, decompressed if they are gzip or zstd. The rest
    of a damaged member is skipped, and the next one is looked for."""
    raw, size, limit = file.read(1024), CHUNK, [16 * CHUNK]
    magic, new = GZIP, functools.partial(zlib.decompressobj, 31)
    if ZSTD.match(raw):  # its decompressor takes no limit, but a kB stands for 32 MB at most
        magic, size, limit = ZSTD, 1024, []
        new = importlib.import_module("zstandard").ZstdDecompressor().decompressobj
    elif not GZIP.match(raw):
        yield from itertools.chain([raw], iter(functools.partial(file.read, CHUNK), b""))
        return
    while raw := raw or file.read(size):
        start = magic.search(raw)
        if not start:  # a magic number may lie across the border of two reads
            more = file.read(size)
            raw = raw[-3:] + more if more else b""
            continue
        raw, member = raw[start.start() :], new()
        while not member.eof:
            if not (raw := raw or file.read(size)):
                counts["compressed file cut short"] += 1
                return
            try:
                yield member.decompress(raw, *limit)
            except Exception:  # zlib.error or zstandard.ZstdError
                counts["damaged gzip or zstd"] += 1
                raw = raw[1:]
                yield b"\n"  # so that what comes next begins a line
                break
            raw = member.unused_data or getattr(member, "unconsumed_tail", b"")

def parse_headers(head):
    """The `Name: value` lines of a header as {name in lower case: value}; the first one counts."""
    lines = re.findall(r"(?m)^([^\s:]+)[ \t]*:(.*)$", head.decode("utf-8", "replace"))
    return {name.lower(): value.strip() for name, value in reversed(lines)}

def decode_body(body, coding):
    """Undo gzip, of any number of members, or deflate, with or without zlib's header. ValueError
    for other encodings of HTTP, for damage and for more than MAX_PAGE bytes."""
    for wbits in {"gzip": [31], "x-gzip": [31], "deflate": [15, -15]}.get(coding, []):
        out, rest = b"", body
        with contextlib.suppress(zlib.error):
            for _ in range(99):
                member = zlib.decompressobj(wbits)
                out += member.decompress(rest, MAX_PAGE)
                if len(out) > MAX_PAGE or member.unconsumed_tail:
                    raise ValueError("decompression bomb")
                rest = member.unused_data
                if member.eof and not GZIP.match(rest):
                    return out
    if re.match(rb"\s*<[^\0-\x08\x0e-\x1f]*\Z", body[:2000]):
        return body  # some crawlers decompress the body, and leave the header
    raise ValueError(f"content encoding {coding[:20]}")

def unpack_http(content):
    """An HTTP response -> (MIME type, charset, body). ValueError says why it holds no page."""
    head, *body = BLANK_LINE.split(content.lstrip(), 1)
    status = re.match(rb"(?i)HTTP/\S+\s+(\d{3})", head)
    if not status or not body:
        raise ValueError("no HTTP response")
    if status.group(1) != b"200":
        raise ValueError("HTTP status not 200")
    headers, body = parse_headers(head), body[0]
    if "chunked" in headers.get("transfer-encoding", "").lower():
        chunks, at = [], 0
        size = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r]{0,80})?\r\n")
        while (length := size.match(body, at)) and int(length.group(1), 16):
            at = length.end() + int(length.group(1), 16) + 2
            chunks.append(body[length.end() : at - 2])
        body = b"".join(chunks) or body  # as it is, if it is not chunked after all
    for coding in headers.get("content-encoding", "").lower().split(",")[::-1]:
        if coding.strip() not in ("", "identity", "none", "utf-8"):
            body = decode_body(body, coding.strip())
    mime, _, parameters = headers.get("content-type", "").lower().partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters)
    if not mime.strip() and re.search(rb"(?i)<html|<!doctype html", body[:2000]):
        mime = "text/html"
    return mime.strip(), charset and charset.group(1), body

def read_warc(source, counts=None):
    """The pages of a WARC or WET file, one `Record` at a time: responses of status 200 with HTML or
    plain text. source: a path or a binary file, compressed or not; counts: a Counter of what was
    skipped, by reason. If no record begins where Content-Length says that this one ends, it ends
    where the next one begins."""
    counts = collections.Counter() if counts is None else counts
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield from read_warc(file, counts)
        return
    pieces, buffer = unpack(source, counts), bytearray()

    def fill(n):
        """Read until the buffer has n bytes; False if the file ends before."""
        while len(buffer) < n and (piece := next(pieces, None)) is not None:
            buffer.extend(piece)
        return len(buffer) >= n

    while fill(1):
        fill(CHUNK)
        start = buffer.find(NEXT[1:], 0, CHUNK)
        blank = BLANK_LINE.search(buffer, 0, CHUNK) if start == 0 else None
        if not blank:  # line ends, and what is no record: skipped to the last line that may be one
            skip = start if start > 0 else buffer.rfind(NEXT, 0, CHUNK)
            skip = skip if skip > 0 else CHUNK - len(NEXT)
            junk = len(buffer[:skip].strip(b"\r\n"))
            counts.update({"bytes between records": junk} if junk else {})
            del buffer[:skip]
            continue
        headers = parse_headers(buffer[: blank.end()])
        del buffer[: blank.end()]
        length = headers.get("content-length", "")
        length = end = int(length) if re.fullmatch("[0-9]{1,15}", length) else -1
        whole = 0 <= length <= MAX_PAGE and fill(length)
        if whole:
            fill(length + 64)
            after = bytes(buffer[length : length + 64]).lstrip(b"\r\n")
            whole = NEXT[1:].startswith(after[: len(NEXT) - 1])
        if not whole:
            what = "page too large" if fill(MAX_PAGE) or length > MAX_PAGE else "record cut short"
            end = 0 if buffer.startswith(NEXT[1:]) else buffer.find(NEXT, 0, MAX_PAGE)
            counts["wrong length" if end >= 0 else what] += 1
        content = bytes(buffer[: max(0, end)])
        del buffer[: end if end >= 0 else MAX_PAGE]
        if end < 0:
            continue
        counts["records"] += 1
        kind, mime = headers.get("warc-type", "").lower(), headers.get("content-type", "").lower()
        charset = None
        try:
            if kind == "response":
                mime, charset, content = unpack_http(content if whole else content.rstrip(b"\r\n"))
            elif kind not in ("conversion", "resource"):
                raise ValueError(f"type {kind[:20] or 'missing'}")
            page = "html" if "html" in mime else "text" if mime.startswith("text/plain") else None
            if not page:
                raise ValueError("not HTML")
            yield Record(headers.get("warc-target-uri", "").strip("<>"), page, charset, content)
        except ValueError as reason:
            counts[str(reason)] += 1

# Codecs of Python that read charsets as browsers do, with the labels that the WHATWG's Encoding
# Standard has for each: letters and digits only, without "x-", "cs" and years.
CHARSETS = {label: line.split()[0] for line in re.split("[;\n] *", """\
utf-8 utf8 unicode11utf8 unicode20utf8; utf-16-be utf16be unicodefffe; koi8-u koi8u koi8ru
utf-16-le utf16 utf16le unicode unicodefeff ucs2 iso10646ucs2; koi8-r koi koi8 koi8r
cp1252 iso88591 isolatin1 latin1 l1 isoir100 ascii usascii ansix341968 cp819 ibm819
cp1254 iso88599 isolatin5 latin5 l5 isoir148; cp874 windows874 dos874 tis620 iso885911
cp866 866 cp866 ibm866; iso8859-2 isolatin2 latin2 l2 isoir101; iso8859-15 isolatin9 latin9 l9
iso8859-3 isolatin3 latin3 l3 isoir109; iso8859-4 isolatin4 latin4 l4 isoir110
iso8859-5 isolatincyrillic cyrillic isoir144; iso8859-10 isolatin6 latin6 l6 isoir157
iso8859-6 iso88596e iso88596i isolatinarabic arabic asmo708 ecma114 isoir127
iso8859-7 isolatingreek greek greek8 ecma118 elot928 suneugreek isoir126
iso8859-8 iso88598e iso88598i isolatinhebrew hebrew visual logical isoir138
mac-roman mac macintosh macroman; mac-cyrillic maccyrillic macukrainian
gb18030 gb18030 gbk gb2312 gb231280 iso58gb231280 chinese isoir58; big5hkscs big5 big5hkscs cnbig5
euc_jp eucjp eucpkdfmtjapanese; iso2022_jp iso2022jp; cp932 shiftjis sjis ms932 mskanji windows31j
cp949 euckr korean ksc5601 ksc56011987 ksc56011989 windows949 isoir149""")
            for label in line.split()[1:]}
CHARSETS = {f"iso8859{n}": f"iso8859-{n}" for n in (*range(2, 9), 10, 13, 14, 15, 16)} | {
    f"{name}125{n}": f"cp125{n}" for n in range(9) for name in ("windows", "cp")} | CHARSETS
META = re.compile(rb"""(?i)<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=["'\s]*([\w.:-]+)""")

def decode_page(data, charset=None):
    """Bytes of a page as text, by byte order mark; as UTF-8 if it is (other encodings hardly ever
    are); by the HTTP header's charset; by <meta>; or as windows-1252."""
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"),
                       (b"\xfe\xff", "utf-16-be")):
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    declared, names = META.search(data[:4096]), []
    for label in (charset, declared and declared.group(1).decode("ascii", "replace")):
        label = re.sub(r":19\d\d$|^(x-)+|^cs|[^a-z0-9]", "", (label or "").lower())
        names += [CHARSETS[label]] if label in CHARSETS else []
    name = names[0] if names else "cp1252"
    if name.startswith("utf-16") and b"\0" not in data[:200]:
        name = "utf-8"  # it says that it is UTF-16, in bytes that are not
    if not name.startswith(("iso2022", "utf-16")):
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode()
        text = data.decode("utf-8", "replace")
        good, bad = len(re.findall("[^\0-\x7f\ufffd]", text)), text.count("\ufffd")
        if good > 10 * bad and (not names or name == "utf-8"):
            return text  # with one bad byte, or truncated within a letter, it is UTF-8 all the same
    return data.decode(name, "replace")

# Main text: what people came to a page to read, without menus, captions and other stories. `scan`
# cuts the page at its block tags into runs of text, and notes in what elements each of these blocks
# lies. `describe` tells how a block looks: length, links, tag, words in the names of the elements
# around it. Logistic regression makes log odds of that. `context` describes it once more, by the
# odds of the others: a short line in the middle of a story belongs to it, the same line below it
# does not. A second regression makes the final odds; the threshold has the best expected F1.
# `tests/bench_curate.py fit` learns the weights from pages with known main text.

RAW = re.compile(r"(?is)<!--(?:-?>|.*?(?:-->|\Z))|"
                 r"<(script|style)\b([^>]*)>?(.*?)(?:</\1\b[^>]*>?|\Z)"
                 r"|<(math)\b([^>]*)>?((?:[^<]+|<(?!/?(?:math|p|div|h\d|ul|ol|table|script)\b))*)"
                 r"(?:</math\s*>)?|<(img)\b([^>]*)>?")
ALT = re.compile(r"""(?i)\balt(?:text)?\s*=\s*(?:"([^"]*)"|'([^']*)')""")
ANNOTATION = re.compile(r"(?is)<annotation[^>]*tex[^>]*>()(.*?)</annotation")
TEX = re.compile(r"""(?is)\\[a-z]{2}|[_^]\{|\w\^\w|\balt=.\$|class\s*=["'\s][^"']*\b(?:la)?tex\b""")
PRE = re.compile(r"(?is)<pre\b[^>]*>?.*?(?:</pre|\Z)")
QUOTED_MARKUP = re.compile(r"""=\s*(?:"[^"<>]*[<>][^"]*"|'[^'<>]*[<>][^']*')""")
TOKEN = re.compile(r"<(/?)([a-zA-Z][^\s/>]*|[!?])([^>]*)>?([^<]*(?:<(?![a-zA-Z/!?])[^<]*)*)")
NAMES = re.compile(r"""(?i)\b(?:class|id|role)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+))""")
HIDING = re.compile(r"(?i)display\s*:\s*none|visibility\s*:\s*hidden|aria-hidden\s*=\s*.?true|"
                    r"\shidden(?:[\s=/]|$)(?!\s*id=.S:)")  # React streams <div hidden id="S:1">
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # in names like main-text, mainText and MAIN_TEXT
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff]")
# Tags of elements that blocks lie in, of those with nothing to read, and of those that are a block.
NODES = set("""div ul ol li table tbody thead tfoot tr td th section article aside nav header footer
main form blockquote pre figure dl details center body fieldset dialog menu""".split())
UNSHOWN = set("noscript svg template iframe select textarea object title audio video".split())
LEAVES = set("p h1 h2 h3 h4 h5 h6 dt dd figcaption summary legend label button caption hr".split())
BLOCKS, ROWS = NODES | UNSHOWN | LEAVES, set("table tbody thead tfoot tr td th".split())
# Places: tags of elements around a block, and words in their class, id or role; with the weights
# of lying there. Then the weights of the other features in `describe`, and of those in `context`.
PLACES = """<footer> -2.36; <aside> -1.35; <main> 0.01; <article> 0.47; <form> <label> <button>
-1.54; <table> 1.72; <ul> <ol> 0.57; <blockquote> 1.37; nav navbar navigation menu menus submenu
dropdown -0.83; footer foot colophon contentinfo -3.38; header masthead topbar banner -0.81;
sidebar aside rail complementary -2.30; widget widgets -1.62; comment comments commentlist disqus
respond -3.95; post posts -0.20; entry hentry 0.66; share sharing social socials addthis follow
-2.08; related recommended recommendations recommend recirc similar suggested trending popular
-3.63; author byline bio -3.22; tag tags category categories topics 0.08; cookie consent gdpr
cookies -3.29; newsletter subscribe signup subscription -3.97; modal popup overlay dialog -2.35;
copyright legal disclaimer terms privacy -8.02; login signin account -4.45; pagination pager paging
prev next -1.30; toc 2.75; product products 0.83; docs documentation markdown wiki 0.73;
<figcaption> <caption> caption captions credit credits -2.64; info infobox box hint -1.47; date
time published meta metadata timestamp -0.69; ad ads advert advertisement sponsored promo -0.65;
card cards teaser teasers -0.68; gallery images image photo photos slideshow -0.96; article
articles story -0.76; headline title heading -0.46; price prices cart shop buy -0.96"""
LOOKS = """words <= 8 -0.40; words >= 20 0.98; ends a sentence 0.67; linked -0.90; before -0.71;
after -0.64; heading 1.38; above <h1> -1.90; p 1.23; li 1.87; div 0.65; pre 1.12; share of
sentences 1.56; sentences above -1.26; text above -0.77; outside of <main> -0.46; outside of
<article> -0.94; bias 0.60"""
CONTEXT = """odds 0.58; in the element 1.03; in the page -0.85; in best 0.45; in 50% 0.75; in 70%
0.72; in 90% 0.03; stretch 0.33; article: odds 0.26; article: in the element -0.29; article: in the
page -0.07; article: in best 0.25; article: in 50% 0.01; article: in 70% -0.02; article: in 90%
-0.61; article: stretch 0.53; article -0.35; bias -1.98"""
PLACES, LOOKS, CONTEXT = (
    {name: float(weight) for name, _, weight in (
        item.rpartition(" ") for item in " ".join(table.split()).split("; "))}
    for table in (PLACES, LOOKS, CONTEXT))
LOOKS |= {"in " + names.split()[0]: weight for names, weight in PLACES.items()}
PLACES = [names.split() for names in PLACES]
BITS = {word: 1 << i for i, words in enumerate(PLACES) for word in words}
HIDDEN = 1 << len(PLACES)
GOOD = BITS["<main>"] | BITS["<article>"]
DECLARED = HIDDEN << 1  # a bit of the page: it says that it is an article
ARTICLE = [re.compile(r'"@type"\s*:\s*\[?\s*"\w*(?:Article|BlogPosting)"'),
           re.compile(r"""og:type["'][^>]{0,99}content\s*=\s*["']article""")]
FORGIVEN = 0.7  # of a page's text: the names of an element with as much of it say nothing bad

@functools.lru_cache(1 << 12)
def place_bits(tag, attributes):
    """The bits of the places that a tag opens, and HIDDEN."""
    low = attributes.lower()
    hiding = ("none" in low or "hid" in low) and HIDING.search(low)
    bits = BITS.get(f"<{tag}>", 0) | HIDDEN * (tag in UNSHOWN or bool(hiding))
    for values in NAMES.findall(attributes[:2000]):
        for word in WORD.findall("".join(values)):
            bits |= BITS.get(word.lower(), 0)
    return bits

def drop_raw(html):
    """HTML without comments, scripts and styles, with the TeX of formulas in place of them."""
    last = ""

    def tex(match):
        nonlocal last
        _, kind, script, math, alt, inside, image, alt_2 = match.groups(default="")
        if "math/tex" in kind.lower():
            return html_library.escape(script)
        if not math and not (image and TEX.search(alt_2)):
            return match.group() if image else ""
        found = ALT.search(alt + alt_2) or ANNOTATION.search(inside)
        formula = (found[1] or found[2] or "") if found else re.sub("<[^>]*>|\\s", "", inside)
        before, last = last, formula.strip()
        return "" if image and before == last else last  # the picture of the formula before it

    def lines(match):
        if not match.group().endswith("</pre"):
            return match.group()
        text = re.sub(r"(?i)<br\b[^>]*>", "\n", match.group())
        return re.sub(r"(?i)(?:\n?</?(?:div|p|li|ol|ul)\b[^>]*>)+\n?", "\n", text)

    html = RAW.sub(tex, html.replace("\0", ""))
    return PRE.sub(lines, QUOTED_MARKUP.sub("", html))

def scan(html):
    """Cut HTML at its block tags -> (blocks, elements). A block: (text, tag, number of its element,
    characters in links, bits of its tag). An element: [number of its parent, first block, end, tag,
    bits]."""
    declared, html = DECLARED * any(p.search(html) for p in ARTICLE), drop_raw(html)
    blocks, elements, stack, tags = [], [[0, 0, 0, "body", declared]], [0], ["body"]
    pieces, linked, in_link = [html.partition("<")[0]], 0, False  # of the block to come
    leaf, leaf_bits, muted = "", 0, 0
    for closing, tag, attributes, text in TOKEN.findall(html) + [("", "hr", "", "")]:
        tag = tag.lower()
        inline = tag not in BLOCKS
        if not inline:
            muted = 0
        elif tag == "span" and (muted or "katex-html" in attributes):  # a formula again, in letters
            muted += -1 if closing else 1
        if tag in ("td", "th") and sum(map(len, pieces)) < 200:  # small cells: a row is a block
            pieces += [" | "] if pieces and not closing else []
        elif not inline or tag == "br" and pieces[-1:] == ["\v"]:
            whole = "".join(pieces)
            if whole.strip():
                blocks.append((whole, leaf or tags[-1], stack[-1], linked, leaf_bits))
            pieces, linked = [], 0
        if tag == "a":
            in_link = not closing
        elif tag == "br":
            pieces.append("\v")
        elif not inline:
            leaf, leaf_bits = "", 0
            if tag in LEAVES and not closing:
                leaf, leaf_bits = tag, place_bits(tag, attributes)
            elif tag not in LEAVES:
                depth = len(stack)  # elements from here on end
                if closing and tag in tags[1:]:
                    at = depth - tags[::-1].index(tag) - 1
                    # An end tag within a cell does not close what is open outside of it.
                    if tag in ROWS or not ROWS.intersection(tags[at:]):
                        depth, in_link = at, False
                elif not closing and tag == tags[-1] and tag in ("li", "tr", "td", "th"):
                    depth -= 1
                for i in stack[depth:]:
                    elements[i][2] = len(blocks)
                del stack[depth:], tags[depth:]
                if not closing and depth < 256:
                    elements.append([stack[-1], len(blocks), 0, tag, place_bits(tag, attributes)])
                    stack.append(len(elements) - 1)
                    tags.append(tag)
        if text and not muted and not (tag == "br" and text.isspace()):
            pieces.append(text)
            linked += in_link * len(text)
    for i in stack:
        elements[i][2] = len(blocks)
    return blocks, elements

def describe(blocks, elements, texts):
    """What blocks look like -> ({feature: column}, their lengths in bytes, 0 if hidden)."""
    _, tags, at, linked, bits = map(np.array, zip(*blocks))
    first, end = np.array([element[1:3] for element in elements]).T
    link = np.minimum(linked / [len(text) for text in texts], 1)
    length = np.array([len(t.encode("utf-8", "replace")) for t in texts])
    plain = np.append(0, np.cumsum(length * (link < 0.5)))
    large = plain[end] - plain[first] > FORGIVEN * plain[-1]
    inherited = []
    for (up, _, _, _, own), forgiven in zip(elements, large.tolist()):
        own = own & GOOD if forgiven else own
        inherited.append(own | inherited[up] if inherited else own)
    bits = bits | np.array(inherited)[at]
    length *= bits & HIDDEN == 0
    words = np.array([text.count(" ") + 1 for text in texts])
    ends = np.array([text[-1] in ".!?…。！？\"”’'" for text in texts])
    f = {"words <= 8": words <= 8, "words >= 20": words >= 20, "ends a sentence": ends,
         "linked": link, "before": np.append(0, link[:-1]), "after": np.append(link[1:], 0),
         "heading": np.isin(tags, ["h2", "h3", "h4", "h5", "h6"]),
         "above <h1>": (tags == "h1").any() & (np.cumsum(tags == "h1") == 0)}
    f |= {tag: tags == tag for tag in ("p", "li", "div", "pre")}
    sentences = np.append(0, np.cumsum(length * (ends & (link < 0.5) & (length > 60))))
    f["share of sentences"] = (sentences[end] - sentences[first])[at] / (sentences[-1] + 1)
    f["sentences above"] = sentences[:-1] / (sentences[-1] + 1)
    f["text above"] = (np.cumsum(length) - length) / (length.sum() + 1)
    for i, (name, *_) in enumerate(PLACES):
        inside = bits >> i & 1
        share = inside @ length / (length.sum() + 1)
        f["in " + name] = inside * (1 - share)  # where all of the page is tells nothing
        if name in ("<main>", "<article>"):
            f["outside of " + name] = (share > 0.05) & (inside == 0)
    return f, length

def context(odds, blocks, elements, length):
    """What blocks look like among the others. odds: log odds of each. -> {feature: column}"""
    at = np.array([block[2] for block in blocks])
    first, end = np.array([element[1:3] for element in elements]).T
    odds = np.clip(odds, -6, 6)
    p = (length > 0) / (1 + np.exp(-odds))
    sums = np.concatenate([np.zeros((2, 1)), np.cumsum([p * length, length], 1)], 1)
    total, index = sums[0, -1] + 1, np.arange(len(blocks))
    likely, text = sums[:, end] - sums[:, first]  # in each element
    f = {"odds": odds, "in the element": (likely / (text + 1))[at],
         "in the page": np.full(len(blocks), total / (length.sum() + 1))}
    chosen = {"best": np.argmax(likely / (text + total))}  # of which element F1 would be highest
    for k in (50, 70, 90):  # the smallest element with that part of the likely text
        chosen[f"{k}%"] = np.flatnonzero(likely >= k / 100 * likely[0])[-1]
    for name, i in chosen.items():
        f["in " + name] = (index >= first[i]) & (index < end[i])
    hits = np.flatnonzero((p > 0.5) & (length > 60))  # a stretch ends where 500 unlikely bytes are
    number = np.append(0, np.cumsum(np.diff(np.cumsum((1 - p) * length)[hits]) > 500))
    stretch = number[np.minimum(np.searchsorted(hits, index), len(number) - 1)]
    f["stretch"] = np.bincount(stretch, p * length)[stretch] / total
    declared = elements[0][4] > 0
    f |= {"article: " + name: declared * column for name, column in f.items()}
    return f | {"article": np.full(len(p), declared)}

def main_blocks(blocks, elements, texts, looks=LOOKS, others=CONTEXT):
    """Which blocks are main text: (blocks,) bool."""
    features, length = describe(blocks, elements, texts)
    odds = looks["bias"] + sum(looks[name] * column for name, column in features.items())
    features = context(odds, blocks, elements, length)
    odds = others["bias"] + sum(others[name] * column for name, column in features.items())
    p = 1 / (1 + np.exp(-odds))
    order = np.argsort(-p, kind="stable")
    hits, size = np.cumsum((p * length)[order]), np.cumsum(length[order])
    least = p[order[np.argmax(hits / (size + hits[-1] + 1))]]  # F1 is twice that
    keep = (p >= least) & (length > 0)
    # What there is three times or more beside an article are comments, or other stories.
    count = collections.Counter((up, tag) for up, begin, end, tag, _ in elements if end - begin > 1)
    repeated = [False]  # for each element
    for up, begin, end, tag, _ in elements[1:]:
        many = tag in ("li", "article") and end - begin > 1 and count[up, tag] > 2
        repeated.append(many or repeated[up])
    own = keep & ~np.array([repeated[block[2]] for block in blocks])
    return own if elements[0][4] and own @ length > 0.1 * (keep @ length) else keep

def clean(text):
    return INVISIBLE.sub("", html_library.unescape(text))

def extract_text(html):
    """The main text of a page, str or bytes; "" if there is none: blocks with an empty line between
    them, items of lists as "- ..." and rows of tables as "... | ..." on lines of their own, <pre>
    as it is."""
    if isinstance(html, (bytes, bytearray, memoryview)):
        html = decode_page(bytes(html))
    blocks, elements = scan(html)
    raw = [clean(block[0]) for block in blocks]
    texts = [" ".join(text.split()) or "-" for text in raw]
    out = last = ""
    for i in np.flatnonzero(main_blocks(blocks, elements, texts)).tolist() if blocks else ():
        text, tag = raw[i].strip("\n"), blocks[i][1]
        if tag != "pre":
            text = "\n".join(filter(None, (" ".join(s.split()) for s in text.split("\v"))))
        if tag in ("tr", "td", "th"):
            text, tag = text.strip(" |"), "tr"
        text = "- " * (tag == "li") + text
        if text.strip(" -"):
            gap = "\n" if last == tag and tag in ("li", "tr") else "\n\n" * bool(out)
            out += gap + text
            last = tag
    return unicodedata.normalize("NFC", out)

# Classifiers. A text is the set of its n-grams, hashed to rows of a table with a column per class;
# the score of a class is the sum of its column over those rows: fastText's bag of hashed n-grams
# (Joulin et al. 2016) without the hidden layer. Python's `hash` differs from process to process.

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MAX_CLASSIFIED = 20_000  # characters of a text that a classifier looks at

WINDOW = 1 << 16
SPACES = bytes(32 if i < 33 else i for i in range(256))
POWERS = np.cumprod(np.full(WINDOW + 2, MULTIPLIER))  # modulo 2^64, like all that follows
INVERSES = np.cumprod(np.full(WINDOW + 2, pow(int(MULTIPLIER), -1, 1 << 64), np.uint64))

def hash_words(data):
    """Hash what lies between spaces in bytes: (hashes uint64, lengths int64). A hash is a
    polynomial in the bytes of the word, so all are differences of one running sum: no Python step
    per word. A word longer than WINDOW is cut."""
    data, found, begin = data.translate(SPACES), [], 0
    while begin < len(data) or not found:
        end = begin + WINDOW
        end = end if end >= len(data) else data.rfind(b" ", begin, end) + 1 or end
        x = np.frombuffer(b" " + data[begin:end] + b" ", np.uint8)
        total, space = np.cumsum(x * POWERS[: len(x)], dtype=np.uint64), np.flatnonzero(x == 32)
        word = np.diff(space) > 1
        first, last = space[:-1][word], space[1:][word] - 1
        found.append(((total[last] - total[first]) * INVERSES[first], last - first))
        begin = end
    h, lengths = map(np.concatenate, zip(*found))
    h = h * MULTIPLIER
    return (h ^ (h >> np.uint64(32))) * MULTIPLIER, lengths

def ngram_hashes(hashes, n):
    """Hashes of words (words,) -> of every n in a row, (max(0, words - n + 1),) uint64."""
    count = max(0, len(hashes) - n + 1)
    out = hashes[:count]
    for i in range(1, n):
        out = out * MULTIPLIER + hashes[i : i + count]
    out = (out ^ (out >> np.uint64(32))) * MULTIPLIER
    return out ^ (out >> np.uint64(29))

class LinearClassifier:
    """Softmax regression on hashed n-grams of characters and words.

    labels: list of str; table: (2**bits, len(labels)) float32; chars: (shortest, longest) n-gram
    of characters, (0, 0) for none; words: longest n-gram of words, 0 for none; scale: of scores.
    Characters are best for languages and misspelt words. Words alone, chars=(0, 0) and words=2, are
    better where classes come from different sources, as good pages from Wikipedia and bad ones from
    the web: characters learn how the sources write quotation marks and spaces.
    """

    def __init__(self, labels, table, chars=(1, 4), words=0, scale=1.0):
        self.labels, self.table, self.scale = list(labels), table, float(scale)
        self.chars, self.words = tuple(chars), words
        self.shift = np.uint64(65 - len(table).bit_length())  # from hashes to rows of the table

    def rows(self, text):
        """The rows of the table for a text: (n-grams,) int64."""
        text, out = " ".join(text[:MAX_CLASSIFIED].lower().split()), [np.zeros(0, np.uint64)]
        codes = np.frombuffer(f" {text} ".encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
        h = np.zeros(len(codes), np.uint64)
        for n in range(1, min(self.chars[1], len(codes)) + 1):
            h = (h[: len(codes) - n + 1] + codes[n - 1 :] + np.uint64(n)) * MULTIPLIER
            h ^= h >> np.uint64(29)
            out += [h * MULTIPLIER] if n >= self.chars[0] else []
        words = " ".join(re.findall(r"[^\W_]+|[^\w\s]", text) if self.words else [])
        words, _ = hash_words(words.encode("utf-8", "replace"))
        out += [ngram_hashes(words, n) for n in range(1, self.words + 1)]
        return (np.concatenate(out) >> self.shift).astype(np.int64)

    @classmethod
    def train(cls, texts, labels, chars=(1, 4), words=0, bits=17, epochs=2, rate=0.02, scale=3.0,
              prior=1.0, seed=0):
        """Learn from texts and their labels: start from `prior` times the logarithms of naive
        Bayes, and continue with stochastic gradient descent, one text at a time, the rate falling
        to 0. Scores are divided by the root of the number of n-grams, lest long texts rule."""
        names = sorted(set(labels))
        if len(names) < 2 or not 0 < chars[1] >= chars[0] and not words:
            raise ValueError("a classifier needs examples of two labels or more, and n-grams")
        table = np.full((1 << bits, len(names)), 0.1, np.float32)
        model = cls(names, table, chars, words, scale)
        pairs = [(model.rows(text), names.index(label)) for text, label in zip(texts, labels)]
        for rows, y in pairs:
            np.add.at(table[:, y], rows, 1)
        table[:] = np.log(table / table.sum(0))
        table -= table.mean(1, keepdims=True)
        table *= prior
        order = np.random.RandomState(seed)
        order = np.concatenate([order.permutation(len(pairs)) for _ in range(epochs)])
        for done, k in enumerate(order):
            rows, y = pairs[k]
            error = model.probabilities(rows)
            error[y] -= 1
            falling = rate * (1 - done / len(order))
            table[rows] -= falling * scale / math.sqrt(max(1, len(rows))) * error
        return model

    def probabilities(self, text):
        """Of a text, or its rows of the table: (labels,) float32."""
        rows = self.rows(text) if isinstance(text, str) else text
        p = self.table[rows].sum(0) * np.float32(self.scale / math.sqrt(max(1, len(rows))))
        p = np.exp(p - p.max())
        return p / p.sum()

    def predict(self, text):
        """(label, probability) of the likeliest."""
        p = self.probabilities(text)
        return self.labels[int(p.argmax())], float(p.max())

    def score(self, text, label):
        """Probability of a label. ValueError if there is none of this name."""
        return float(self.probabilities(text)[self.labels.index(label)])

    def save(self, path):
        """One .npz file, with the table in 8 bits."""
        step = max(float(np.abs(self.table).max()), 1e-9) / 127
        with replacing(path) as file:
            np.savez(file, labels=self.labels, table=np.round(self.table / step).astype(np.int8),
                     chars=self.chars, words=self.words, scale=self.scale * step)

    @classmethod
    def load(cls, path):
        """What `save` wrote. ValueError if it is something else."""
        try:
            with np.load(path, allow_pickle=False) as f:
                labels, table, chars, words, scale = (
                    f[name] for name in ("labels", "table", "chars", "words", "scale"))
            model = cls(labels.tolist(), table, chars.tolist(), int(words), scale)
            if (table.dtype != np.int8 or table.shape != (1 << 64 - int(model.shift), len(labels))
                    or len(chars) != 2 or max(*model.chars, model.words) > 16):
                raise ValueError("shapes and types do not fit")
        except Exception as error:  # numpy and zipfile have many for files of other kinds
            raise ValueError(f"{path} is no classifier of curate.py: {error}") from None
        return model

load_classifier = functools.lru_cache(LinearClassifier.load)  # once per process and file

# Language without a trained classifier: by script, and where languages share one, by letters of
# their own or by stop words. That is enough to keep English, or Chinese, and drop the rest.

# First word of the Unicode name of letters: the most common language that is written in them.
SCRIPTS = dict(pair.split("=") for pair in """
CJK=zh HIRAGANA=ja KATAKANA=ja HANGUL=ko CYRILLIC=ru ARABIC=ar GREEK=el HEBREW=he ARMENIAN=hy
GEORGIAN=ka DEVANAGARI=hi BENGALI=bn GURMUKHI=pa GUJARATI=gu ORIYA=or TAMIL=ta TELUGU=te KANNADA=kn
MALAYALAM=ml SINHALA=si THAI=th LAO=lo TIBETAN=bo MYANMAR=my ETHIOPIC=am KHMER=km MONGOLIAN=mn
LATIN=latin""".split())
OWN_LETTERS = {"ru": {"mn": "өү", "be": "ў", "uk": "іїєґ", "sr": "ђјљњћџ", "ru": "ыэ", "bg": "ъ"},
               "ar": {"ur": "ٹڈڑےں", "fa": "پچژگیک"}}
STOP_WORDS = {words[:2]: set(words[3:].split()) for words in re.split(r"[;\n]\s*", """\
en the be to of and that have with is are was in it for you not this on he as at by from we or an
de der die das und ist nicht ein eine ich zu den mit sich auf für im dem von es sie auch wir haben
fr le la les de des et est un une que qui dans en pour pas sur ce il elle au avec ne par nous du a
es el la los las de que y en un una es por con no para su se del lo como más pero al este hemos
it il lo la i gli le di che e è un una per non con si da in sono come più ma del della nel al ha
pt o a os as de que e em um uma é não para com por se do da no na dos das mais como mas ao foi ele
nl de het een en van is dat die in te niet op met voor zijn er aan ook als bij om naar ik je maar
sv och att det som en på är av för med den till inte om ett har de jag kan var från så vi
da og at det er en af til på der ikke den med de for som et har jeg kan men om var fra sig
pl i w na z do się nie to jest że jak po co za od przez ale są tym być; cs a se na je že s z do jako
tr ve bir bu da de için ile olarak çok daha olan gibi ama; fi ja on ei se että oli hän ovat kun
ro și de la în a cu pe nu este un că din se pentru mai care; hu a az és hogy nem is egy ez meg van
vi và là có không được cho một các những với trong; id yang dan di ini itu dengan untuk tidak""")}

def identify_language(text, classifier=None):
    """(ISO 639-1 code, score in [0, 1]) of a text; ("und", 0.0) if it has no letters.

    classifier: a `LinearClassifier` trained on languages; without it, by script and stop words.
    """
    text, counts = unicodedata.normalize("NFC", text[:MAX_CLASSIFIED]), collections.Counter()
    if classifier is not None:
        return classifier.predict(text)
    text = text.lower()
    for letter, count in collections.Counter(text).items():
        if letter.isalpha():
            script = SCRIPTS.get(unicodedata.name(letter, "-").partition(" ")[0], "und")
            counts[script] += count * (3 if script in ("zh", "ja") else 1)  # as much as 3 letters
    if counts["ja"] > 0.1 * (counts["ja"] + counts["zh"]):  # kana, between Chinese characters
        counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
    script = max(counts, key=counts.get, default="")
    if not counts[script]:
        return "und", 0.0
    share = counts[script] / sum(counts.values())
    for code, own in OWN_LETTERS.get(script, {}).items():
        if sum(map(text.count, own)) > 0.01 * counts[script]:
            return code, 0.9 * share
    if script != "latin":
        return script, (0.9 if script in OWN_LETTERS else 1.0) * share
    words = re.findall(r"[^\W\d_]+", text)
    hits = {code: sum(map(stop.__contains__, words)) for code, stop in STOP_WORDS.items()}
    best = max(hits, key=hits.get)
    second, most = sorted(hits.values())[-2:]
    if not most:  # names and headings: most of the web is English, but this is a guess
        return ("en", 0.2 * share) if text.isascii() else ("und", 0.1)
    # Running text has a stop word in three. A language that has as many hits is as likely.
    certain = min(1.0, 3 * most / len(words)) * most / (most + second)
    return best, min(1.0, share * (0.3 + 0.7 * certain))

# Filter. Each `_reason` function names the rule that a text breaks, or returns None; the function
# of the same name with `_filter` says only whether the text is kept.

GOPHER_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
# Letters of scripts without spaces between words: kana, Chinese, Thai, Lao, Burmese, Khmer.
DENSE = ("\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
         "\U00020000-\U0003ffff")
NO_SPACES = re.compile(f"[{DENSE}]")
ENDS = "…。！？｡؟۔।॥։።။។"  # of sentences, besides . ! and ?
ENDED = re.compile(f"[.!?{ENDS}][\"'”’»)\\]）」』]*$|[\"'”’」』]$")
SENTENCE = re.compile(f"[.!?](?=[\\s\"'”’»)\\]]|$)|[{ENDS[1:]}]")
ELLIPSES, BULLETS = ("...", "…"), ("- ", "* ", "• ", "‣", "·", "– ", "●", "○", "■", "▪", "►")
# Most that may be in the most frequent n-gram (n of 2 to 4), and in repeated ones (n of 5 to 10).
NGRAM_LIMITS = {2: 0.2, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
POLICY = re.compile("javascript|terms of use|(privacy|cookie) policy|uses? cookies|use of cookies")

def lines_of(text):
    """The lines of a text that are not empty, without the spaces around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]

def first_true(rules):
    """The first key of a dict whose value is true, or None."""
    return next((name for name, broken in rules.items() if broken), None)

def gopher_quality_reason(text, language="en"):
    """The first of Gopher's quality rules (Rae et al. 2021, appendix A) that a text breaks. The
    stop words are for English only. In scripts without spaces a character counts as a word."""
    words, lines, dense = text.split(), lines_of(text), len(NO_SPACES.findall(text))
    letters = sum(map(len, words))
    spaced = dense <= 0.3 * letters
    count = len(words) if spaced else dense
    return first_true({
        "under 50 words": count < 50,
        "over 100,000 words": count > 100_000,
        "mean word length": spaced and not 3 <= letters / max(1, count) <= 10,
        "symbols to words": max(text.count("#"), text.count("...") + text.count("…")) > count / 10,
        "bullets": sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines),
        "ellipses": sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines),
        "words without letters": spaced and sum(
            word.isalpha() or any(map(str.isalpha, word)) for word in words) < 0.8 * count,
        "stop words": spaced and language == "en" and len(
            GOPHER_STOP_WORDS.intersection(text.lower().split())) < 2})

def repeated_share(parts):
    """(share of parts that are repetitions of an earlier one, and of their characters)."""
    once, chars = set(parts), sum(map(len, parts))
    return ((len(parts) - len(once)) / max(1, len(parts)),
            (chars - sum(map(len, once))) / max(1, chars))

def gopher_repetition_reason(text):
    """The first of Gopher's repetition rules (Rae et al. 2021, table A1) that a text breaks, or
    None: shares of lines and paragraphs that repeat an earlier one (0.3, and 0.2 of their
    characters), and of characters in frequent or repeated n-grams of words (NGRAM_LIMITS)."""
    for name, parts in (("paragraphs", re.split(r"\n\s*\n", text)), ("lines", text.split("\n"))):
        share, chars = repeated_share([part for part in map(str.strip, parts) if part])
        if share > 0.3 or chars > 0.2:
            return f"repeated {name}" if share > 0.3 else f"characters in repeated {name}"
    words, lengths = hash_words(NO_SPACES.sub(r" \g<0> ", text).encode("utf-8", "replace"))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for n, limit in NGRAM_LIMITS.items():
        grams = ngram_hashes(words, n)
        if not len(grams):
            break
        _, first, counts = np.unique(grams, return_index=True, return_counts=True)
        if n < 5 and counts.max() > 1:
            # of those that occur most often the one with the most characters
            top = first[counts == counts.max()]
            if counts.max() * (ends[top + n] - ends[top]).max() > limit * ends[-1]:
                return f"most frequent {n}-gram"
        elif n >= 5:
            # words that lie in any n-gram that is not new, each counted once
            again = np.delete(np.arange(len(grams)), first)
            edges = np.bincount(again, None, len(ends)) - np.bincount(again + n, None, len(ends))
            if lengths[np.cumsum(edges[:-1]) > 0].sum() > limit * ends[-1]:
                return f"repeated {n}-grams"

def c4_lines(text):
    """The lines of a text that C4 keeps (Raffel et al. 2020), by the numbers of its released code:
    at least five words, none over 1,000 characters, punctuation at the end, nothing about
    JavaScript, cookies and terms of use. Marks of citations ([1], [edit]) are taken out."""
    return [line for line in lines_of(re.sub(r"\[(?:\d*|edit|citation needed)\]", "", text))
            if ENDED.search(line) and not line.endswith(ELLIPSES)
            and (len(line.split()) >= 5 or len(NO_SPACES.findall(line)) >= 10)
            and max(map(len, NO_SPACES.sub(" ", line).split()), default=0) <= 1000
            and not POLICY.search(line.lower())]

def c4_reason(text):
    """The first of C4's rules for pages that a text breaks, or None. Sentences are counted in the
    lines that C4 keeps."""
    return first_true({"curly bracket": "{" in text, "lorem ipsum": "lorem ipsum" in text.lower(),
                         "under 3 sentences": len(SENTENCE.findall("\n".join(c4_lines(text)))) < 3})

def fineweb_reason(text):
    """The first of FineWeb's own rules (Penedo et al. 2024) that a text breaks, or None."""
    lines = lines_of(text)
    short = 12 if NO_SPACES.search(text[:200]) else 30
    return first_true({
        "empty": not lines,
        "lines without punctuation": sum(map(bool, map(ENDED.search, lines))) < 0.12 * len(lines),
        "characters in repeated lines": repeated_share(lines)[1] > 0.1,
        "short lines": sum(len(line) < short for line in lines) >= 0.67 * len(lines)})

FILTERS = {"gopher": gopher_quality_reason, "repetition": gopher_repetition_reason,
           "c4": c4_reason, "fineweb": fineweb_reason}

gopher_quality_filter, gopher_repetition_filter, c4_filter = (  # text -> whether it is kept
    lambda text, name=name: FILTERS[name](text) is None for name in ("gopher", "repetition", "c4"))

@functools.lru_cache
def load_perplexity(path):
    """A checkpoint of train.py -> a function that gives a text's perplexity per token under it,
    over its first block."""
    import torch  # only here: everything else in this file runs without
    from bpe import Tokenizer
    from model import load_checkpoint
    model, checkpoint = load_checkpoint(path)
    tokenizer, size = Tokenizer.from_json(checkpoint["tokenizer"]), model.config.block_size

    @torch.no_grad()
    def perplexity(text):
        ids = torch.tensor(tokenizer.encode(text[: 20 * size])[: size + 1])
        if len(ids) < 2:
            return math.inf
        logits = model(ids[None, :-1])[0].float()
        return torch.nn.functional.cross_entropy(logits, ids[1:]).exp().item()

    return perplexity

# Mask personal data. A number is masked where its form, or a word before it, says what it is:
# versions, dates, prices, and numbers in prose stay. Letters of scripts without spaces, and of
# Korean, may touch an address; other letters would be a part of it.

LETTER = rf"[^\W{DENSE}\uac00-\ud7af]"
EMAIL = re.compile(rf"(?<![.+%-])(?<!{LETTER}){LETTER}(?:{LETTER}|[.+%'-]){{0,63}}@"
                   rf"(?:(?!_){LETTER}(?:{LETTER}|-){{0,62}}\.){{1,8}}"
                   rf"(?:(?![\d_]){LETTER}){{2,24}}(?!{LETTER}|@)")
PHONE_CUE = re.compile(
    r"(?i)(?:\b(?:(?:tele)?(?:ph|f)one?|tel|tél|fax|call|contact|mobile|cell|whatsapp|hotline|dial|"
    r"sms|text|ring|toll[- ]free|reach (?:me|us|him|her|them)|(?:my|our|your|his|her|their) "
    r"(?:\w+ )?number)\b|☎|📞|电话|電話|手机|手機|전화)[^\d\n]{0,24}$")
PHONE = re.compile(rf"""(?mx) (?<![.,/$€£\#+-]) (?<!{LETTER}) (?<!\d[ :=]) (?:
        (?P<world> \+ \d{{1,3}} (?:[ .-]?\(\d{{1,4}}\))? (?:[ .-]?\d{{1,5}}){{1,6}} )
      | (?P<american> (?:1[ .-]?)? (?: \(\d{{3}}\)[ -]{{0,2}} | \d{{3}}(?P<sep>[ .-]) )
                      \d{{3}} (?(sep)(?P=sep)|[ .-]?) \d{{4}} | ^\d{{10}}$ )
      | (?!(?:19|20)\d\d[ /.-]) \(?\d{{2,5}}\)? (?:[ ]?[ /-]?[ ]?\d{{2,8}}){{1,4}} | \d{{7,12}}
    ) (?! {LETTER} | % | [.,:/-]\d | [ ]\d{{3,}} | @ )""")
IPV4 = re.compile(rf"(?<![.-])(?<!{LETTER})(?:\d{{1,3}}\.){{3}}\d{{1,3}}(?!{LETTER}|-|\.\d)")
IPV6 = re.compile(rf"(?<![:.])(?<!{LETTER})(?:[0-9a-fA-F]{{0,4}}:){{2,7}}"
                  rf"(?:[0-9a-fA-F]{{1,4}}|(?<=::))(?!{LETTER}|:|\.\d)")
# What is before a version: "release", or a small number after the name of a product.
VERSION = re.compile(
    r"(?i:\b(?:v|vers?|versions?|release|build|firmware|revision|rev|update|patch|section|"
    r"chapter|clause|figure|table|appendix|(?:upgraded?|updated) to)|§|版本)[.:：]?\s*$")
PRODUCT = re.compile(
    r"\b(?!(?i:ips?|ipv4|dns|servers?|hosts?|address(es)?|gateway|ping|subnet|router|the|at|from|"
    r"to|on|via|use|and|or|google|cloudflare|quad9)\b)[A-Z][\w+#.-]*[ /-]$")

def mask_where(pattern, text, name, is_meant):
    """Replace the matches of pattern that is_meant(match) is true of: (text, how many)."""
    masked = pattern.sub(lambda match: name if is_meant(match) else match.group(), text)
    return masked, masked.count(name) - text.count(name)

def mask_emails(text):
    """(text with e-mail addresses replaced by |||EMAIL_ADDRESS|||, how many)."""
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)

def mask_phone_numbers(text):
    """(text with telephone numbers replaced by |||PHONE_NUMBER|||, how many). International ones
    begin with +, American ones have the form 3-3-4, or are a line of ten digits. Others, of 7 to 12
    digits, count only after a word such as "call" or "tel"."""
    def is_phone(match):
        before = text[max(0, match.start() - 60) : match.start()]
        return 7 <= sum(map(str.isdigit, match.group())) <= (15 if match["world"] else 12) and (
            match["world"] or match["american"] or PHONE_CUE.search(before))

    return mask_where(PHONE, text, "|||PHONE_NUMBER|||", is_phone)

def mask_ips(text):
    """(text with IPv4 and IPv6 addresses replaced by |||IP_ADDRESS|||, how many). Four numbers
    after "version" and the like, or small ones after the name of a product, are a version."""
    def is_ip(match):
        address, before = match.group(), match.string[max(0, match.start() - 40) : match.start()]
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(address).version == 6:
                return len(address) >= 6 and any(map(str.isdigit, address))
            small = int(address.split(".")[0]) < 30
            return not (VERSION.search(before) or small and PRODUCT.search(before))

    text, v4 = mask_where(IPV4, text, "|||IP_ADDRESS|||", is_ip)
    if text.count(":") < 2:  # most texts
        return text, v4
    text, v6 = mask_where(IPV6, text, "|||IP_ADDRESS|||", is_ip)
    return text, v4 + v6

MASKS = {"email": mask_emails, "phone": mask_phone_numbers, "ip": mask_ips}

# Documents in files, work on many files at once, and a report of what each step kept and why.

JSON_LINES, PAGES = (".jsonl", ".ndjson", ".json"), (".html", ".htm", ".xhtml")
KINDS = (".warc", ".wet", ".txt", ".pdf", *JSON_LINES, *PAGES, *""".py .pyi .md .rst .tex .org .c .h
.cc .cpp .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .sh .sql .jl .lua .hs .ml .scala .swift
.kt .r .m .pl .cs .css .toml .yaml .yml""".split())

def kind_of(path):
    """What a file holds, by its name: ".jsonl" for a.jsonl.gz. ValueError if nobody knows."""
    name = os.path.basename(path).lower()
    kind = os.path.splitext(re.sub(r"\.(gz|zst)$", "", name))[1]
    package = "pypdf" if kind == ".pdf" else "zstandard" if name.endswith(".zst") else "re"
    if kind not in KINDS:
        raise ValueError(f"{path}: no known kind of file: {' '.join(KINDS)}, and .gz, .zst of them")
    if not importlib.util.find_spec(package):
        raise ValueError(f"{path} needs the package {package}: pip install {package}")
    return kind

def find_inputs(patterns):
    """Paths for files, patterns, and folders: these stand for all files of known kinds in them."""
    paths = []
    for path in [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]:
        if not os.path.isdir(path):
            kind_of(path)
            os.stat(path)  # raises if there is none
            paths.append(path)
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if name[0] != ".")
            for name in sorted(set(names) - {"report.json"}):
                with contextlib.suppress(ValueError):
                    kind_of(name)
                    paths.append(os.path.join(folder, name))
    if not paths:
        raise ValueError(f"no file of a known kind in {', '.join(patterns)}")
    return paths

def read_lines(path, counts, limit=4 * MAX_PAGE):
    """Lines of a file, bytes without their ends, but for those of more than limit bytes."""
    line = bytearray()
    with open(path, "rb") as file:
        for piece in unpack(file, counts):
            *ended, rest = piece.split(b"\n")
            for end in ended:
                line += end
                if len(line) <= limit:
                    yield bytes(line)
                counts["line too long"] += len(line) > limit
                line = bytearray()
            line += rest[: max(0, limit + 1 - len(line))]
    if line:
        yield bytes(line)

def read_documents(path, counts=None):
    """The documents of a file: dicts with "text" or, if it is yet to be extracted, "html", and with
    "url" or "path". Accents are composed with their letters (NFC). counts: a Counter for what is
    skipped, by reason; without it, that is said."""
    skipped = collections.Counter() if counts is None else counts
    for document in read_kind(path, kind_of(path), skipped):
        if "text" in document:
            document["text"] = unicodedata.normalize("NFC", document["text"])
        yield document
    warn_of(path, skipped if counts is None else {})

def read_kind(path, kind, counts):
    """`read_documents`, for each kind of file."""
    if kind in (".warc", ".wet"):
        for record in read_warc(path, counts):
            yield {record.kind: decode_page(record.body, record.charset), "url": record.url}
    elif kind in JSON_LINES:
        for line in read_lines(path, counts):
            document = None
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(line)
            if isinstance(document, dict) and {str} == {
                    type(document[key]) for key in ("text", "html") if key in document}:
                yield document
            elif line.strip():
                counts["bad line"] += 1
    elif kind == ".txt":
        parts = []  # of a document
        for line in itertools.chain(read_lines(path, counts), [EOT.encode()]):
            first, *rest = line.decode("utf-8", "replace").rstrip("\r").split(EOT)
            parts.append(first)
            for part in rest:
                yield from [{"text": text} for text in ["\n".join(parts).strip()] if text]
                parts = [part]
    elif kind == ".pdf":
        import pypdf
        try:
            pages = [page.extract_text() or "" for page in pypdf.PdfReader(path).pages]
            yield {"text": "\n\n".join(pages), "path": path}
        except Exception:  # pypdf raises all kinds of exceptions for damaged files
            counts["damaged PDF"] += 1
    else:
        with open(path, "rb") as file:
            data, pieces = bytearray(), unpack(file, counts)
            while len(data) <= MAX_PAGE and (piece := next(pieces, None)) is not None:
                data += piece
        if len(data) <= MAX_PAGE:
            yield {"html" if kind in PAGES else "text": decode_page(bytes(data)), "path": path}
        counts["page too large"] += len(data) > MAX_PAGE

@functools.cache
def warn(message):
    """A line on stderr, the first time."""
    print(f"curate.py: {message}", file=sys.stderr, flush=True)

def warn_of(path, skipped):
    """A line for each reason to skip something in a file."""
    for reason, count in skipped.items():
        if count and reason != "records":
            warn(f"{path}: {reason}: {count:,}")

@contextlib.contextmanager
def replacing(path):
    """A binary file, gzipped if path ends in .gz, that takes the name `path` when it is complete:
    a killed run leaves no half file. Its bytes depend on nothing but what is written."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            if str(path).endswith(".gz"):
                with gzip.GzipFile("", "wb", 5, file, mtime=0) as packed:
                    yield packed
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)

def to_json(value, indent=None):
    """JSON as bytes, on one line unless indented. Halves of surrogate pairs become "?"."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace") + b"\n"

def start_worker():
    """In a new worker: leave Ctrl-C to the parent, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def run_job(job):
    """job: (name of a function, arguments, file): what the function returns, from the file if it
    was done before. So a map that was killed goes on where it was."""
    name, arguments, done = job
    if not os.path.exists(done):
        with replacing(done) as file:
            file.write(to_json(globals()[name](*arguments)))
    with open(done, "rb") as file:
        return json.load(file)

def run_all(function, jobs, work, name, pool=(1, None)):
    """[function(*job) for job in jobs], by processes. work: a folder for what was done; pool:
    (number of processes, address of a Ray cluster that has this file and the folders, or None)."""
    jobs = [(function.__name__, job, os.path.join(work, f"{name}-{function.__name__}-{i}.json"))
            for i, job in enumerate(jobs)]
    start, results, others = time.monotonic(), [], multiprocessing.active_children()
    with contextlib.ExitStack() as stack:
        found = map(run_job, jobs)
        if pool[1]:
            from ray.util.multiprocessing import Pool
            here = importlib.import_module("curate")  # Ray's workers find this file by its name
            found = stack.enter_context(Pool(ray_address=pool[1])).imap(here.run_job, jobs)
        elif pool[0] > 1 and len(jobs) > 1:
            context = multiprocessing.get_context("spawn")
            executor = concurrent.futures.ProcessPoolExecutor(pool[0], context, start_worker)
            stack.callback(lambda: [child.terminate() for child in multiprocessing.active_children()
                                    if child not in others])  # at once, when Ctrl-C ends this
            found = executor.map(run_job, jobs)
        for result in found:
            results.append(result)
            if sys.stderr.isatty():
                left = (time.monotonic() - start) * (len(jobs) / len(results) - 1)
                print(f"\r{name}: {len(results):,} of {len(jobs):,}, {left:.0f} s left \x1b[K",
                      file=sys.stderr, end="" if left else "\n", flush=True)
    return results

def count_document(report, step, document, reason=None, after=None, seconds=0.0):
    """Count a document that a step drops for a reason or keeps, as `after` if it changes. report:
    {step: {what: number, "examples": {reason: start of a document that was dropped}}}."""
    counts = report.setdefault(step, collections.Counter(examples={}))
    text, now = (d.get("text") or d.get("html") or "" for d in (document, after or document))
    counts.update({"in": 1, "CPU seconds": seconds, reason or "out": 1})
    if not reason:
        counts["bytes out"] += len(now.encode("utf-8", "replace"))
    else:
        counts["examples"].setdefault(reason, f"{document.get('url', '')} {text[:200]}")

def merge_reports(reports):
    """The reports of several files as one."""
    merged = {}
    for step, counts in (item for report in reports for item in report.items()):
        old = merged.setdefault(step, collections.Counter(examples={}))
        old["examples"] = {**counts.pop("examples"), **old["examples"]}
        for key, value in counts.items():
            old[key] += value
    return merged

def write_report(path, report, seconds):
    """Write report.json, and print a table."""
    with replacing(path) as file:
        file.write(to_json({"seconds": round(seconds, 2), "steps": report}, indent=1))
    print(f"{'step':<18}{'documents in':>13}{'out':>10}{'MB out':>10}{'CPU s':>8}  why")
    for name, c in report.items():
        why = [f"{key} {n:,}" for key, n in c.items() if key not in (
            "in", "out", "bytes out", "CPU seconds", "examples")]
        print(f"{name:<18}{c['in']:>13,}{c['out']:>10,}{c['bytes out'] / 1e6:>10.2f}"
              f"{c['CPU seconds']:>8.2f}  {', '.join(why)[:80]}")
    print(f"{seconds:.1f} s; {path} has an example of what was dropped for each reason")

# Duplicates: documents, lines, paragraphs or near ones, by one shuffle in three maps. (1) The units
# of every file become 64-bit hashes, in sorted runs. (2) For each range of the hashes: collect it
# from all runs, sort it, and say what to drop. (3) Every file is written anew without that. A
# unit's id is the number of its file << 40 plus its place in it, so the first of equals is kept
# whatever the processes did; and nobody holds more than about RANGE hashes.

RUN, RANGE, PLACE = 1 << 18, 1 << 20, 40  # hashes in a run, about as many in a range; bits
MAX_COMPARED = 50  # documents before it in a bucket, that a document is compared with
PARAGRAPH = 100  # characters of a line that make it one
KINDS_OF_DUPLICATES = {"document": "exact duplicates", "line": "repeated lines",
                       "near": "near duplicates"}

def stable_hash(data):
    """Bytes or str -> 64 bits, the same in every process (`hash` of a str is not)."""
    data = data if isinstance(data, bytes) else str(data).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

class BloomFilter:
    """A set that holds bits only (Bloom 1970): up to `capacity` items, it wrongly claims to hold
    another with probability error_rate. It takes m = -capacity ln error_rate / (ln 2)^2 bits, of
    which an item sets k = m / capacity ln 2: h1 + i h2 mod m (Kirsch and Mitzenmacher 2006)."""

    def __init__(self, capacity, error_rate=0.001):
        if capacity < 1 or not 0 < error_rate < 1:
            raise ValueError("a Bloom filter needs capacity >= 1 and 0 < error_rate < 1")
        self.size = max(64, math.ceil(-capacity * math.log(error_rate) / math.log(2) ** 2))
        self.num_hashes = max(1, round(self.size / capacity * math.log(2)))
        self.bits = bytearray((self.size + 7) // 8)

    def places(self, item):
        """The numbers of an item's bits."""
        h = stable_hash(item)
        return [(h + i * (h * 0x9E3779B97F4A7C15 >> 20 | 1)) % self.size
                for i in range(self.num_hashes)]

    def add(self, item):
        """Add a str or bytes -> whether it was there before."""
        seen = item in self
        for at in self.places(item):
            self.bits[at >> 3] |= 1 << (at & 7)
        return seen

    def __contains__(self, item):
        return all(self.bits[at >> 3] >> (at & 7) & 1 for at in self.places(item))

# Near duplicates (Broder 1997). Two texts are as similar as the sets of their n-grams of words:
# J(A, B) = |A and B| / |A or B|. Of a random order of all n-grams, the first in A and the first in
# B are the same with probability J, so `num_hashes` random orders give a signature that estimates
# it. Cut into b bands of r, two signatures agree in some band with probability 1 - (1 - J^r)^b: an
# S-shaped curve. Pairs that agree are candidates, whose true similarity is computed.

PUNCTUATION = bytes(i for i in range(33, 128) if not chr(i).isalnum())
LOWER = bytes(i + 32 if 65 <= i <= 90 else i for i in range(256))

@functools.lru_cache(1 << 14)
def fold(letters):
    """`normalize` for letters beyond ASCII. In scripts without spaces each is a word."""
    letters = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", letters.lower()))
    letters = "".join(" " * c.isspace() or c for c in letters
                      if unicodedata.category(c)[0] not in "PSC")
    return NO_SPACES.sub(r" \g<0> ", unicodedata.normalize("NFC", letters))

def normalize(text):
    """A text in lower case, without accents and punctuation, but with vowel signs: UTF-8.

    >>> normalize("Señor  O'Neil, 3.5%!").split()
    [b'senor', b'oneil', b'35']
    """
    if not text.isascii():
        text = re.sub(r"[^\0-\x7f]+", lambda match: fold(match.group()), text)
    return text.encode("utf-8", "replace").translate(LOWER, PUNCTUATION)

def shingles(text, n):
    """Hashes of the n-grams of a text's words, (distinct n-grams,) uint64, sorted. A text of fewer
    than n words is one n-gram; one without words has none."""
    words, _ = hash_words(normalize(text))
    hashes = np.sort(ngram_hashes(words, min(n, max(1, len(words)))))
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]

@functools.lru_cache
def multipliers(n, dtype):
    """n odd numbers, as good as random, the same everywhere: (n,)."""
    return np.array([stable_hash(b"%d" % i) | 1 for i in range(n)], np.uint64).astype(dtype)

def minhash_signature(hashes, num_hashes):
    """The MinHash signature of a set of 64-bit hashes: (num_hashes,) uint32. The orders are those
    of a h mod 2^32: a permutation for odd a, and h is random already."""
    a = multipliers(num_hashes, np.uint32)[:, None]
    low = (hashes >> np.uint64(32)).astype(np.uint32)
    signature = np.full(num_hashes, 0xFFFFFFFF, np.uint32)
    for i in range(0, len(low), 512):  # so that the product stays in the cache
        np.minimum(signature, (a * low[i : i + 512]).min(axis=1), out=signature)
    return signature

def band_keys(signature, num_bands):
    """A 64-bit key per band, with its number mixed in: (num_bands,) uint64."""
    rows = signature.reshape(num_bands, -1).astype(np.uint64)
    key = (rows * multipliers(rows.shape[1], np.uint64)).sum(1, dtype=np.uint64)
    key = (key + np.arange(1, num_bands + 1, dtype=np.uint64)) * MULTIPLIER
    return (key ^ (key >> np.uint64(31))) * MULTIPLIER

def jaccard(a, b):
    """Similarity of two sets, sorted arrays of distinct numbers; 0 if one of them is empty."""
    both = np.sort(np.concatenate([a, b]))
    common = int((both[1:] == both[:-1]).sum())
    return common / max(1, len(both) - common)

def pieces_of(path, unit):
    """What a file is made of: the documents of JSON lines; of other files as they are, 10,000 lines
    at a time, or all of it if near duplicates are looked for."""
    if kind_of(path) in JSON_LINES:
        yield from read_documents(path)
        return
    counts = collections.Counter()
    lines = read_lines(path, counts)
    while part := list(itertools.islice(lines, None if unit == "near" else 10_000)):
        yield {"text": b"\n".join(part).decode("utf-8", "surrogateescape")}
    warn_of(path, counts)

def hash_units(path, out, unit, o):
    """Map 1: write the hashes of a file's units to out, in runs of sorted hashes and then their
    places; for near duplicates also the n-grams of each document (out.sets, where each set ends in
    out.ends). Returns the lengths of the runs."""
    hashes, places, runs, at, end = [], [], [], 0, 0
    with replacing(out) as file, replacing(out + ".sets") as sets, replacing(out + ".ends") as ends:
        for document in itertools.chain(pieces_of(path, unit), [None]):
            if len(hashes) >= RUN or document is None and hashes:
                order = np.argsort(h := np.array(hashes, "<u8"), kind="stable")
                file.write(h[order].tobytes() + np.array(places, "<u8")[order].tobytes())
                runs.append(len(h))
                hashes, places = [], []
            text = (document or {}).get("text", "")
            new = [(at, stable_hash(text))]
            if unit == "line":  # the last bit: is it a paragraph?
                lines = [line.rstrip("\r") for line in text.split("\n")]
                new = [(at + i, stable_hash(line) >> 1 << 1 | (len(line) >= PARAGRAPH))
                       for i, line in enumerate(lines) if line.strip() or o["blank_lines"]]
                at += len(lines) - 1
            elif unit == "near":
                grams = shingles(text, o["ngram"])
                end += len(grams)
                ends.write(end.to_bytes(8, "little"))
                sets.write(grams.tobytes())
                keys = band_keys(minhash_signature(grams, o["num_hashes"]), o["num_bands"])
                new = [(at, key) for key in keys.tolist() if len(grams)]
            hashes += [h for _, h in new]
            places += [place for place, _ in new]
            at += 1
    return runs

def find(parent, x):
    """The least of the cluster that x is in (union-find). parent: {number: a lesser one of the same
    cluster}, of all that are not the least of theirs."""
    while x in parent:
        parent[x] = x = parent.get(parent[x], parent[x])
    return x

def near_pairs(ids, starts, spills, threshold):
    """Of buckets of documents with an equal key: [id, id of a similar one, ...], enough pairs to
    connect all that are similar by threshold. starts: where in ids each bucket begins, and the end.
    """
    @functools.lru_cache(256)
    def grams(document):
        path, at = spills[document >> PLACE][0], document & (1 << PLACE) - 1
        ends = np.fromfile(path + ".ends", "<u8", 1 + (at > 0), offset=8 * max(0, at - 1))
        begin, end = [0, *ends.tolist()][-2:]
        return np.fromfile(path + ".sets", "<u8", end - begin, offset=8 * begin)

    parent, pairs, several = {}, [], np.diff(starts) > 1
    for begin, end in zip(starts[:-1][several].tolist(), starts[1:][several].tolist()):
        bucket = ids[begin:end].tolist()
        for i, document in enumerate(bucket):
            for other in bucket[max(0, i - MAX_COMPARED) : i]:
                low, high = sorted((find(parent, other), find(parent, document)))
                if low != high and jaccard(grams(other), grams(document)) >= threshold:
                    parent[high] = low
                    pairs += [low, high]
    return pairs

def find_repeats(spills, r, ranges, out, unit, o):
    """Map 2: write the ids of the units to drop, or pairs of near duplicates, whose hashes lie in
    the r-th of `ranges` equal ranges. spills: of each file (path, lengths of runs) by map 1."""
    low, high = (np.uint64((r + k) * 2**64 // ranges - k) for k in (0, 1))
    hashes, ids = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for number, (path, runs) in enumerate(spills):
        data, at = np.memmap(path, "<u8", "r") if runs else None, 0
        for n in runs:
            run = data[at : at + 2 * n].reshape(2, n)
            part = slice(np.searchsorted(run[0], low), np.searchsorted(run[0], high, "right"))
            hashes.append(np.array(run[0, part]))
            ids.append(run[1, part] + np.uint64(number << PLACE))
            at += 2 * n
    hashes, ids = np.concatenate(hashes), np.concatenate(ids)
    order = np.argsort(hashes, kind="stable")
    hashes, ids = hashes[order], ids[order]
    first = np.append(True, hashes[1:] != hashes[:-1])[: len(ids)]
    starts = np.append(np.flatnonzero(first), len(ids))
    if unit == "near":
        drop = near_pairs(ids, starts, spills, o["threshold"])
    elif unit == "document":
        drop = np.sort(ids[~first])
    else:
        often = np.repeat(np.diff(starts) > (o["max_line_repeats"] or math.inf), np.diff(starts))
        drop = np.sort(ids[often | ~first & (hashes & np.uint64(1) == 1) & o["paragraphs"]])
    with replacing(out) as file:
        file.write(np.array(drop, "<u8").tobytes())

def write_kept(path, number, out, found, unit, o):
    """Map 3: write a file without what map 2 found. Returns a report."""
    drop, report, at, step = set(), {}, 0, KINDS_OF_DUPLICATES[unit]
    for ids in (np.memmap(name, "<u8", "r") for name in found if os.path.getsize(name)):
        a, b = np.searchsorted(ids, np.array([number << PLACE, (number + 1) << PLACE], np.uint64))
        drop.update((ids[a:b] & np.uint64((1 << PLACE) - 1)).tolist())
    as_it_is = kind_of(path) not in JSON_LINES
    if as_it_is and unit == "near":
        if not drop:
            with replacing(out) as file, open(path, "rb") as source:
                file.writelines(unpack(source, collections.Counter()))
        return report
    with replacing(out) as file:
        for document in pieces_of(path, unit):
            text, reason, cut = document.get("text", ""), "duplicate" if at in drop else None, 0
            if unit == "line":
                lines = text.split("\n")
                kept = [line for i, line in enumerate(lines, at) if i not in drop]
                at, cut, text = at + len(lines) - 1, len(lines) - len(kept), "\n".join(kept)
                if as_it_is:
                    file.write((text + "\n" * bool(kept)).encode("utf-8", "surrogateescape"))
                text = re.sub(r"\n{3,}", "\n\n", text.strip()) if cut else text
                short = cut and len(text.split()) < o["min_words"]
                reason = "too little left" if short else None if text else "empty"
            at += 1
            after = {**document, "text": text}
            count_document(report, step, document, reason, after)
            report[step].update({"lines cut": cut} if cut else {})
            if reason is None and not as_it_is:
                file.write(to_json(after))
    return report

def shuffle(files, outputs, work, unit, o, pool=(1, None)):
    """Write files anew to outputs without duplicates of a kind: "document", "line" or "near". work:
    a folder for what lies between. Returns a report."""
    if unit == "near" and (min(o["num_bands"], o["num_hashes"], o["ngram"]) < 1
                           or o["num_hashes"] % o["num_bands"] or not 0 <= o["threshold"] <= 1):
        raise ValueError(f"MinHash needs ngram >= 1, 0 <= threshold <= 1, and {o['num_hashes']} "
                         f"hashes that {o['num_bands']} bands divide")
    spills = [os.path.join(work, f"{unit}-{i}") for i in range(len(files))]
    jobs = [(path, spill, unit, o) for path, spill in zip(files, spills)]
    spills = list(zip(spills, run_all(hash_units, jobs, work, unit, pool)))
    ranges = sum(sum(runs) for _, runs in spills) // RANGE + 1
    found = [os.path.join(work, f"{unit}-range{r}") for r in range(ranges)]
    jobs = [(spills, r, ranges, out, unit, o) for r, out in enumerate(found)]
    run_all(find_repeats, jobs, work, unit, pool)
    if unit == "near":  # connect the clusters of all ranges: all but the least of each are dropped
        parent = {}
        for low, high in (pair for name in found
                          for pair in np.fromfile(name, "<u8").reshape(-1, 2).tolist()):
            low, high = sorted((find(parent, low), find(parent, high)))
            parent.update({high: low} if low != high else {})
        found = [os.path.join(work, "near-clusters")]
        np.array(sorted(parent), "<u8").tofile(found[0])
    jobs = [(path, i, out, found, unit, o) for i, (path, out) in enumerate(zip(files, outputs))]
    return merge_reports(run_all(write_kept, jobs, work, unit, pool))

def dedup_files(files, out, unit, o, workers):
    """`shuffle`, with the names of the files in the folder out."""
    files = [os.fspath(path) for path in files]
    outputs = [os.path.join(out, os.path.basename(path).removesuffix(".zst")) for path in files]
    if len({*map(os.path.abspath, outputs)} - {*map(os.path.abspath, files)}) < len(files):
        raise ValueError(f"{out}: files of the same name, or the inputs, would be overwritten")
    os.makedirs(out, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".dedup-") as work:
        return shuffle(files, outputs, work, unit, o, (workers, None))

def exact_line_dedup(files, out, workers=1):
    """Drop every line that occurs more than once in all files together, each time it occurs, and
    write what is left under the same names to the folder out. Of text files the bytes of lines are
    compared, without their ends; of JSON lines the lines of texts."""
    dedup_files(files, out, "line", {"max_line_repeats": 1, "paragraphs": False, "min_words": 0,
                                     "blank_lines": True}, workers)

def minhash_dedup(files, out, num_hashes=112, num_bands=14, ngram=5, threshold=0.8, workers=1):
    """Keep the first of each cluster of near duplicates, written under the same names to the folder
    out. JSON lines hold a document per line, any other file is one. Texts whose sets of `ngram`
    words have a Jaccard similarity of `threshold` or more, truly and not by estimate, are in one
    cluster, as are those that a chain of such pairs connects."""
    dedup_files(files, out, "near", {"num_hashes": num_hashes, "num_bands": num_bands,
                                     "ngram": ngram, "threshold": threshold}, workers)

def bloom_dedup(files, outputs, error_rate):
    """Drop paragraphs that were seen before by one process in one pass, without a shuffle: a Bloom
    filter holds them, so that a few that are new are dropped, too. Returns a report."""
    bloom = BloomFilter(sum(map(os.path.getsize, files)) // 30 + 1, error_rate)  # gzip: 30 of 100
    report = {}
    for path, out in zip(files, outputs):
        with replacing(out) as file:
            for document in read_documents(path):
                lines = document.get("text", "").split("\n")
                text = "\n".join(x for x in lines if len(x) < PARAGRAPH or not bloom.add(x)).strip()
                after = {**document, "text": text}
                count_document(report, "paragraphs", document, None if text else "empty", after)
                file.write(to_json(after) if text else b"")
    return report

# Decontaminate: what a model will be tested on must not be in its training text. A document is
# dropped if it shares an n-gram of words with a test (Brown et al. 2020, with n = 13). A test of
# fewer words, but at least 8, is looked for as a whole.

def strings_in(value):
    """All strings in a JSON value."""
    if isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)
    elif isinstance(value, str):
        yield value

def read_tests(path):
    """The strings of a test set: of JSON values, .csv cells, or lines of text."""
    lines = [line.decode("utf-8", "replace") for line in read_lines(path, collections.Counter())]
    kind = os.path.splitext(re.sub(r"\.(gz|zst)$", "", path.lower()))[1]
    if kind not in (*JSON_LINES, ".csv", ".txt"):
        raise ValueError(f"{path}: test sets are {' '.join(JSON_LINES)} .csv or .txt")
    csv.field_size_limit(1 << 30)
    if kind not in JSON_LINES:
        return strings_in(list(csv.reader(lines)) if kind == ".csv" else lines)
    with contextlib.suppress(ValueError):  # one JSON value, or one per line
        return strings_in(json.loads("\n".join(lines)))
    return strings_in([json.loads(line) for line in lines if line.strip()])

@functools.lru_cache(1)
def test_ngrams(paths, n, least=8):
    """{length: sorted hashes of n-grams of that many words} of test sets."""
    found = collections.defaultdict(list)
    for text in (text for path in paths for text in read_tests(path)):
        words, _ = hash_words(normalize(text))
        length = min(n, len(words))
        if length >= min(n, least):
            found[length].append(ngram_hashes(words, length))
    return {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}

def contaminated(text, ngrams):
    """Whether a text has one of the n-grams of `test_ngrams`."""
    words, _ = hash_words(normalize(text))
    for length, known in ngrams.items():
        grams = ngram_hashes(words, length)
        if (known[np.minimum(np.searchsorted(known, grams), len(known) - 1)] == grams).any():
            return True
    return False

# Mix sources.

def cut_text(text, limit):
    """Pieces of a text of at most limit characters each, cut at an empty line if there is one in
    the second half of a piece, else at the end of a line, a word, or anywhere."""
    begin = 0
    while len(text) - begin > limit:
        ends = (text.rfind(end, begin + limit // 2, begin + limit) for end in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > 0), begin + limit)
        yield text[begin:end].strip()
        begin = end
    yield text[begin:].strip()

def mix(sources, output_dir, weights=None, budget=None, max_epochs=4, temperature=1.0):
    """Write mixed.jsonl.gz: documents from sources in turn, so that bytes of text are at any time
    as weights say. Returns {name: {"weight" asked for, "reached", "bytes", "documents", "epochs"}}.

    sources: {name: [paths]}; weights: {name: share}, by default size^(1 / temperature); budget:
    bytes of text. Without it, one source is used up; with it, sources are repeated, max_epochs
    times at most (after four, repetition is worth little: Muennighoff et al. 2023), and one that is
    used up leaves its share to the others. Texts of over 64 kB, or a 50th of budget, are cut.
    """
    if not weights:
        sizes = {name: sum(len(d.get("text", "")) for path in paths for d in read_documents(path))
                 for name, paths in sources.items()}
        most = max(1, *sizes.values())  # large numbers to large powers are too large for a float
        weights = {name: (size / most) ** (1 / temperature) for name, size in sizes.items()}
    total = sum(weights.values())
    if set(weights) != set(sources) or min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ValueError("weights must be finite, 0 or more, not all of them 0, and name all "
                         "sources: " + ", ".join(sorted(sources)))
    given = {name: {"weight": weights[name] / total, "reached": 0.0, "bytes": 0, "documents": 0,
                    "epochs": 0} for name in sources if weights[name] > 0}
    limit = int(min(1 << 16, max(1000, (budget or math.inf) / 50)))

    def stream(name):
        for epoch in range(1, 1 + (max_epochs if budget else 1)):
            given[name]["epochs"] = epoch
            for document in itertools.chain.from_iterable(map(read_documents, sources[name])):
                for text in filter(None, cut_text(document.get("text", ""), limit)):
                    yield {**document, "text": text, "source": name}

    streams, written = {name: stream(name) for name in given}, 0
    os.makedirs(output_dir, exist_ok=True)
    with replacing(os.path.join(output_dir, "mixed.jsonl.gz")) as file:
        while streams and written < (budget or math.inf):
            name = min(streams, key=lambda name: (given[name]["bytes"] / given[name]["weight"],
                                                  -given[name]["weight"], name))
            document = next(streams[name], None)
            if document:
                file.write(to_json(document))
                given[name]["documents"] += 1
                given[name]["bytes"] += len(document["text"].encode("utf-8", "replace"))
                written = sum(g["bytes"] for g in given.values())
            elif budget:
                del streams[name]
            else:
                break
        if not written:
            raise ValueError("there is nothing to mix: the sources have no documents")
    for name, g in given.items():
        g["reached"] = g["bytes"] / written
        if abs(g["reached"] - g["weight"]) > 0.1 * g["weight"]:
            warn(f"{name} has a share of {g['reached']:.3f}, and not {g['weight']:.3f}")
    if written < (budget or 0):
        warn(f"the sources are used up after {max_epochs} epochs, before the budget")
    return given

# The steps on a document, on a file, and on all.

def apply_steps(document, o):
    """Apply the steps that the options `o` (a dict) ask for to a document, which they may change.
    After each, yield its name, and the reason to drop the document or None."""
    unread = "html" in document and o["steps"] and "extract" not in o["steps"]
    yield "read", "page without text: run extract first" if unread else None
    if "extract" in o["steps"]:
        if "html" in document:
            document["text"] = extract_text(document.pop("html"))
        yield "extract", None if document.get("text") else "no text"
    if "language" in o["steps"]:
        classifier = load_classifier(o["language_model"]) if o["language_model"] else None
        code, score = identify_language(document["text"], classifier)
        document["language"], document["language_score"] = code, round(score, 4)
        reason = "language unsure" if score < o["min_language_score"] else None
        reason = reason if code in o["languages"] else f"language {code}"
        yield "language", reason if o["languages"] else None
    if "filter" in o["steps"]:
        for name in o["filters"]:
            rest = [document.get("language", "en")] if name == "gopher" else []
            yield name, FILTERS[name](document["text"], *rest)
        for name in ("quality", "toxicity", "nsfw"):
            if o[name]:
                path, label, limit = o[name].rsplit(":", 2)
                score = round(load_classifier(path).score(document["text"], label), 4)
                document[name], above = score, score - float(limit)
                yield name, name if (above < 0 if name == "quality" else above > 0) else None
        if o["perplexity"]:
            path, limit = o["perplexity"].rsplit(":", 1)
            document["perplexity"] = round(load_perplexity(path)(document["text"]), 2)
            yield "perplexity", None if document["perplexity"] <= float(limit) else "perplexity"
    if "mask" in o["steps"]:
        masked = {}
        for name in MASKS:
            document["text"], masked[name] = MASKS[name](document["text"])
        masked = {name: count for name, count in masked.items() if count}
        document.update({"masked": masked} if masked else {})
        yield "mask", None
    if "decontaminate" in o["steps"] and o["evals"]:
        ngrams = test_ngrams(tuple(o["evals"]), o["eval_ngram"])
        yield "decontaminate", "in a test set" if contaminated(document["text"], ngrams) else None

def process_file(path, out, o):
    """All steps on single documents, for a file. Returns a report."""
    report, counts = {}, collections.Counter()
    with replacing(out) as file:
        last = time.process_time()
        for document in read_documents(path, counts):
            before, reason = dict(document), None
            for name, reason in apply_steps(document, o):
                now = time.process_time()
                count_document(report, name, before, reason, document, now - last)
                if document.get("masked") is not before.get("masked"):
                    report[name].update(document["masked"])
                before, last = dict(document), now
                if reason:
                    break
            if not reason:
                file.write(to_json(document))
    report.setdefault("read", collections.Counter(examples={})).update(+counts)
    return report

def run_pipeline(args):
    """Read the inputs, apply the steps, and leave documents and report.json in --out. State is
    files: out/.work has what each job left, which takes its name when it is complete, so a run that
    was killed continues where they end."""
    start, inputs, pool = time.monotonic(), find_inputs(args.input), (args.workers, args.ray)
    work, report_path = (os.path.join(args.out, name) for name in (".work", "report.json"))
    o = {**vars(args), "workers": 0, "ray": None, "blank_lines": False, "min_words": 50,
         "paragraphs": not args.bloom}
    state = to_json({**o, "files": [[path, os.path.getsize(path)] for path in inputs]})
    state_path, same = os.path.join(work, "state.json"), not glob.glob(f"{args.out}/*.jsonl.gz")
    if os.path.exists(state_path):
        with open(state_path, "rb") as file:
            same = file.read() == state
    if not same:
        raise ValueError(f"{args.out} holds other documents, or a run with other inputs or "
                         "settings: give another --out, or delete it")
    if os.path.exists(report_path):
        print(f"{args.out} is complete: report.json is there")
        return
    collections.deque(apply_steps({"text": "-"}, o), 0)  # wrong options come up now
    for folder, _, names in os.walk(args.out):  # half files of a run that was killed
        for name in names:
            if re.search(r"\.\d+\.tmp$", name):
                os.remove(os.path.join(folder, name))
    os.makedirs(work, exist_ok=True)
    with replacing(state_path) as file:
        file.write(state)
    dedup = ["document", "line", *["bloom"] * (o["bloom"] > 0), *["near"] * (o["threshold"] <= 1)]
    files, reports = inputs, []
    for stage in ["read"] + dedup * ("dedup" in o["steps"]):
        folder, before = os.path.join(work, stage), sum(os.times()[:4])
        outputs = [os.path.join(folder, f"{i:05d}.jsonl.gz") for i in range(len(inputs))]
        os.makedirs(folder, exist_ok=True)
        if stage == "read":
            jobs = [(path, output, o) for path, output in zip(files, outputs)]
            reports += run_all(process_file, jobs, work, stage, pool)
        elif stage == "bloom":
            reports += run_all(bloom_dedup, [(files, outputs, o["bloom"])], work, stage)
        else:
            reports.append(shuffle(files, outputs, work, stage, o, pool))
            for counts in reports[-1].values():
                counts["CPU seconds"] = sum(os.times()[:4]) - before
        files = outputs
    for path in filter(os.path.exists, files):  # complete: move the results out of the work folder
        os.replace(path, os.path.join(args.out, os.path.basename(path)))
    report = merge_reports(reports)
    write_report(report_path, report, time.monotonic() - start)
    for path in (os.path.join(work, name) for name in os.listdir(work) if name != "state.json"):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    if not [*report.values()][-1]["out"]:
        raise ValueError(f"no document was kept: {report_path} says why")

def make_crawl(path):
    """A WARC file to try things on without a network: a page for each topic of the language
    reference that comes with Python, with a menu and a footer; and a near copy of every third."""
    from pydoc_data.topics import topics
    pages = sorted(topics.items())
    menu = "".join(f'<li><a href="/{name}">{name}</a></li>' for name, _ in pages)
    pages += [(f"copy/{name}", text + "\n\nThis is a copy.") for name, text in pages[::3]]
    with replacing(path) as file:
        for name, text in pages:
            body = "".join(f"<pre>{part}</pre>" if part.startswith("   ") else f"<p>{part}</p>"
                           for part in html_library.escape(text).split("\n\n"))
            page = (f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html><body>"
                    f"<nav>{menu}</nav><main>{body}</main><footer>The Python Software Foundation"
                    "</footer></body></html>\r\n\r\n").encode()
            file.write(f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://docs.example/"
                       f"{name}\r\nContent-Length: {len(page)}\r\n\r\n".encode() + page)

def train_classifier(sources, args):
    """`train-classifier`: learn from examples, save, and measure on every twentieth."""
    examples = []  # (text, label)
    for label, path in ((label, path) for label, paths in sources.items() for path in paths):
        if kind_of(path) == ".txt":
            lines = read_lines(path, collections.Counter())
            texts = [line.decode("utf-8", "replace") for line in lines]
        else:
            texts = [d["text"] if "text" in d else extract_text(d["html"])
                     for d in read_documents(path)]
        examples += [(text, label) for text in texts if text.strip()]
    test = np.random.RandomState(0).rand(len(examples)) < 0.05
    model = LinearClassifier.train([text for (text, _), held in zip(examples, test) if not held],
                                   [label for (_, label), held in zip(examples, test) if not held],
                                   args.chars, args.words, args.bits, args.epochs)
    model.save(args.out)
    right = [model.predict(text)[0] == label for text, label in itertools.compress(examples, test)]
    print(f"{args.out}: {len(model.labels)} labels, {len(examples) - len(right):,} examples; right "
          f"in {np.mean(right or 0):.4f} of {len(right):,} others")

# The command line.

STEPS = ["extract", "language", "filter", "mask", "decontaminate", "dedup"]

def parse_arguments(words):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[1], usage=argparse.SUPPRESS,  # errors are one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("command", choices=["pipeline", "read", *STEPS, "mix", "train-classifier"])
    add("--input", nargs="+", required=True, help="files, patterns, folders; NAME=FILE for mix and "
        "train-classifier")
    add("--out", required=True, help="folder; a .npz file for train-classifier")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--ray", metavar="ADDRESS", help="of a Ray cluster that shares the folders, or local")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="of pipeline")
    add("--languages", nargs="*", default=["en"], help="to keep; none given: all")
    add("--min_language_score", type=float, default=0.5, help="drop what is less certain")
    add("--language_model", help="of train-classifier; default: script and stop words")
    add("--filters", nargs="*", default=["gopher", "repetition", "fineweb"], choices=list(FILTERS))
    for name, limit in (("quality", "least"), ("toxicity", "most"), ("nsfw", "most")):
        add(f"--{name}", metavar="FILE:LABEL:P", help=f"{limit} probability of a label to keep")
    add("--perplexity", metavar="CKPT:MAX", help="most to keep, under a model of train.py")
    add("--evals", nargs="+", default=[], help="test sets: JSON, .csv, lines of .txt")
    add("--eval_ngram", type=int, default=13, help="words in a row that tell a test")
    add("--max_line_repeats", type=int, default=5, help="of lines kept; 0: any number")
    add("--bloom", type=float, default=0, help="error rate of a Bloom filter for paragraphs")
    add("--threshold", type=float, default=0.8, help="of near duplicates; above 1: keep them")
    add("--ngram", type=int, default=5, help="words in a row, for MinHash")
    add("--num_hashes", type=int, default=112, help="of MinHash")
    add("--num_bands", type=int, default=14, help="to cut the hashes into")
    add("--weights", nargs="+", default=[], help="mix: NAME=SHARE of the bytes")
    add("--temperature", type=float, default=1.0, help="mix: T, shares are size^(1/T)")
    add("--tokens", type=float, default=0, help="mix: in all, of 4 bytes each; sources repeat")
    add("--max_epochs", type=int, default=4, help="mix: of a source")
    add("--chars", type=int, nargs=2, default=(1, 4), help="train-classifier: n-grams; 0 0: none")
    add("--words", type=int, default=0, help="train-classifier: longest n-gram of words")
    add("--bits", type=int, default=17, help="train-classifier: of the hash")
    add("--epochs", type=int, default=2, help="train-classifier: of gradient descent")
    args = parser.parse_args(words)
    if args.command == "decontaminate" and not args.evals:
        parser.error("decontaminate needs --evals")
    return args

def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # both raise KeyboardInterrupt
        signal.signal(signum, signal.default_int_handler)
    crawl = os.path.join("data", "crawl.warc.gz")
    demo = ["pipeline", "--input", crawl, "--out", os.path.join("data", "corpus")]
    args = parse_arguments(sys.argv[1:] or demo)
    try:
        if len(sys.argv) == 1 and not os.path.exists(crawl):
            os.makedirs("data", exist_ok=True)
            make_crawl(crawl)
        if args.command in ("mix", "train-classifier"):
            sources = collections.defaultdict(list)
            for name, _, pattern in (item.partition("=") for item in args.input):
                sources[name] += find_inputs([pattern])
        if args.command == "train-classifier":
            train_classifier(sources, args)
        elif args.command == "mix":
            weights = {name: float(share) for name, share in (w.split("=") for w in args.weights)}
            given = mix(sources, args.out, weights, 4 * args.tokens, args.max_epochs,
                        args.temperature)
            with replacing(os.path.join(args.out, "report.json")) as file:
                file.write(to_json(given, indent=1))
            for name, g in given.items():
                print(f"{name:<20} asked {g['weight']:.4f}, reached {g['reached']:.4f}: "
                      f"{g['documents']:,} documents, {g['bytes']:,} bytes, {g['epochs']} epochs")
        else:
            if args.command != "pipeline":
                args.steps = [args.command] * (args.command in STEPS)
            run_pipeline(args)
    except KeyboardInterrupt:
        print("\ncurate.py: stopped; give the same command to go on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, KeyError, RuntimeError, ArithmeticError, csv.Error) as error:
        print(f"curate.py: error: {error}", file=sys.stderr)
        sys.exit(1)

if __name__ == "__main__":
    main()
