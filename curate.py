"""
From web pages to documents worth training on.

    python curate.py                   # all of it, on the notes beside this file
    python curate.py pipeline --input crawl/*.warc.gz --out corpus --workers 8
    python curate.py mix --input web=clean wiki=wiki.jsonl --weights web=0.7 wiki=0.3 --out mixed
    python curate.py train-classifier --input good=wiki.jsonl web=web.jsonl --words 2 --out q.npz

`pipeline` takes the main text out of HTML, keeps --languages (en; none: all; --language_model of
train-classifier), drops text by --filters (of gopher repetition c4 fineweb), --classifiers
(FILE:LABEL:LEAST) and --perplexity (CHECKPOINT:MOST), masks personal data, drops what is in test
sets (--evals) and removes duplicates (--threshold of Jaccard similarity of --ngram words;
--num_hashes in --num_bands; --bloom ERROR_RATE for paragraphs). --out gets .jsonl.gz, report.json:
what each step kept and why. --steps chooses; each is a command. Without --weights `mix` takes
sizes^(1 / temperature); with --tokens (4 bytes each) it repeats. Inputs: .warc .wet .html .pdf .txt
(with <|endoftext|> between documents) .jsonl .ndjson .json, code and notes, also .gz and .zst;
folders. A stopped command given again goes on. --workers and --ray ADDRESS change no output.
"""
import argparse, array, codecs, collections, concurrent.futures, contextlib, csv, functools, glob
import gzip, hashlib, html as html_library, importlib, io, itertools, json, math
import multiprocessing, os, pathlib, re, signal, string, sys, threading, unicodedata, zlib
import numpy as np

# ---- Read WARC (ISO 28500): records of headers and a page; what is damaged is counted and skipped.
MAX_PAGE, CHUNK, GZIP, ZSTD = 16 << 20, 1 << 20, b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[^\r]{0,80}\r\n")  # of a chunked body
Record = collections.namedtuple("Record", "url kind charset body")  # kind: "html" or "text" (WET)
BROWSERS = dict(pair.split("=") for pair in """ascii=cp1252 iso8859-1=cp1252 iso8859-9=cp1254
gb2312=gb18030 gbk=gb18030 gb_2312-80=gb18030 shift_jis=cp932 euc_kr=cp949 windows-874=cp874
iso-8859-8-i=iso8859-8 koi8=koi8-r""".split())  # labels that Python lacks, or reads otherwise
CODECS = re.compile("utf-8|cp|iso8859|iso2022|koi8|gb|big5|euc|shift|tis|mac")  # of text only
META = re.compile(r"""(?i)<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=["'\s]*([\w.:-]+)""")

def unpack(file, counts):  # yields it in pieces, decompressed; skips damaged members
    data, magic, size, limit = file.read(4), GZIP, CHUNK, (CHUNK,)
    new = functools.partial(zlib.decompressobj, 31)  # 31: with the header of gzip
    if data.startswith(ZSTD):  # knows no limit, but a kB of it stands for 32 MB at most
        magic, size, limit = ZSTD, 1 << 10, ()
        new = importlib.import_module("zstandard").ZstdDecompressor().decompressobj
    if not data.startswith(magic):
        yield from itertools.chain([data], iter(functools.partial(file.read, CHUNK), b""))
        return
    while data := (data if len(data) > 3 else data + file.read(size)):  # 4 bytes hold the magic
        data, member = (data[data.find(magic) :], new()) if magic in data else (b"", None)
        try:
            while data and not member.eof:
                yield member.decompress(data, *limit)
                rest = getattr(member, "unconsumed_tail", b"") or member.unused_data
                data = rest or file.read(size)
        except Exception:  # zlib.error or ZstdError
            counts["damaged gzip or zstd"] += 1
            data = data[1:]
            yield b"\r\n\r\n"  # so that what comes next begins a line, or a record
        if member and not member.eof and not data:
            counts["compressed file cut short"] += 1

def read_parts(source, mark, counts, limit=math.inf):
    """Yield the bytes between marks of a path or binary file; count parts far over limit bytes."""
    part, large = bytearray(), 0  # large: 1 within a part that is too large, else 0
    with open(source, "rb") if isinstance(source, (str, os.PathLike)) else source as file:
        for piece in unpack(file, counts):
            part += piece
            if part.find(mark, max(0, len(part) - len(piece) - len(mark))) >= 0:
                *parts, part = part.split(mark)
                yield from map(bytes, parts[large:])
                large = 0
            if len(part) > limit:
                counts["too large"] += 1 - large
                part, large = part[-len(mark) :], 1  # a mark may begin there
    yield from [bytes(part)][large:]

def parse_headers(head):  # {name in lower case: value} of `Name: value` lines; the first counts
    lines = re.findall(r"(?m)^([^\s:]+)[ \t]*:(.*)$", head.decode("utf-8", "replace"))
    return collections.defaultdict(str, ((k.lower(), v.strip()) for k, v in reversed(lines)))

def decode_body(body, coding):  # undoes gzip or deflate; ValueError if damaged, or another coding
    if not coding or re.match(rb"\s*<[^\0-\x08\x0e-\x1f]*\Z", body[:2000]):
        return body  # some crawlers decompress the body, and leave the header
    for wbits in {"gzip": [31], "x-gzip": [31], "deflate": [15, -15]}.get(coding, []):  # -15: raw
        out, rest = b"", body
        with contextlib.suppress(zlib.error):
            for _ in range(64):  # a file may have more members; each costs a copy of the rest
                member = zlib.decompressobj(wbits)
                out += member.decompress(rest, max(1, MAX_PAGE - len(out)))  # (0: no limit)
                rest = member.unused_data
                if member.eof and not rest.startswith(GZIP):
                    return out
    raise ValueError(f"content encoding {coding[:20]}")

def read_warc(source, counts=None):
    """Yield the pages of a path or binary file as `Record`s. counts: a Counter of what it skips."""
    counts = collections.Counter() if counts is None else counts
    for record in read_parts(source, b"\r\n\r\nWARC/", counts, MAX_PAGE):  # as lengths may lie
        head, _, content = record.partition(b"\r\n\r\n")
        headers, chunks, at = parse_headers(head), [], 0  # of a chunked body: those before at
        url, kind, length = (headers[k] for k in ("warc-target-uri", "warc-type", "content-length"))
        try:
            if not re.fullmatch("[0-9]{1,15}", length) or int(length) > len(content):
                raise ValueError("wrong length, or cut short")
            content = content[: int(length)]
            if kind == "response":  # of HTTP
                head, *body = re.split(rb"\r?\n\r?\n", content.lstrip(), maxsplit=1)
                if not body or not re.match(rb"(?i)HTTP/\S+\s+200\b", head):
                    raise ValueError("HTTP status not 200")
                headers, content = parse_headers(head), body[0]
                if "chunked" in headers["transfer-encoding"].lower():
                    while (size := CHUNK_SIZE.match(content, at)) and int(size[1], 16):
                        at = size.end() + int(size[1], 16) + 2
                        chunks.append(content[size.end() : at - 2])
                    content = b"".join(chunks) or content  # if it is not chunked after all
                codings = re.sub(r"identity|none|utf-8|\s", "", headers["content-encoding"].lower())
                for coding in reversed(codings.split(",")):
                    content = decode_body(content, coding)
            mime = headers["content-type"].lower() or "text/html" * (kind == "response")
            charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", mime)
            page = "html" if "html" in mime else "text" if "text/plain" in mime else None
            if not page or kind not in ("response", "conversion", "resource"):
                raise ValueError("no page")
            yield Record(url, page, charset and charset[1], content)
        except ValueError as reason:
            counts[str(reason)] += 1

def decode_page(data, charset=None):
    """Bytes as text: by byte order mark, UTF-8 if it nearly is, HTTP header, <meta>, or cp1252."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    bad = (text := data.decode("utf-8-sig", "replace")).count("\ufffd")  # ESC $: ISO-2022-JP
    if b"\x1b$" not in data and (not bad or len(re.findall("[^\0-\x7f]", text)) > 11 * bad):
        return text
    for label in (charset or "", *META.findall(text[:4096]), "cp1252"):
        label = re.sub("^(x-)+", "", label.lower())
        with contextlib.suppress(LookupError):
            name = codecs.lookup(BROWSERS.get(label, label)).name
            if CODECS.match(name):
                return data.decode(BROWSERS.get(name, name), "replace")

# ---- Main text: the blocks of a page that people came to read, by two logistic regressions.
RAW = re.compile(r"(?is)<!--(?:-?>|.*?(?:-->|\Z))|<(script|style)\b([^>]*)>?((?:[^<]+|<(?!/\1\b))*)"
                 r"(?:</\1\b[^>]*>?|\Z)|<math\b([^>]*)>?((?:[^<]+|<(?!/?(?:math|p|div|h\d|ul|ol|"
                 r"table|script)\b))*)|<img\b([^>]*)>?")
ALT = re.compile(r"""(?i)\balt(?:text)?\s*=\s*(?:"([^"]*)"|'([^']*)')""")  # RAW is for `formula`
TEX = re.compile(r"(?i)\\[a-z]{2}|[_^]\{|\w\^\w")
PRE = re.compile(r"(?is)<pre\b[^>]*>?.*?(?:</pre|\Z)")
LINE = re.compile(r"(?i)<br\b[^<>]*>|(?:</?(?:div|p|li)\b[^<>]*>)+")  # below: (?=(x))\1: x, once
QUOTED_MARKUP = re.compile(r"""=\s*(?:"(?=([^"<>]*))\1[<>][^"]*"|'(?=([^'<>]*))\2[<>][^']*')""")
TOKEN = re.compile(r"<(/?)([a-zA-Z][^\s/>]*|[!?])([^>]*)>?([^<]*(?:<(?![a-zA-Z/!?])[^<]*)*)")
NAMES = re.compile(r"""(?i)\b(?:class|id|role)\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+))""")
HIDING = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|aria-hidden\s*=\s*.?true|"
                    r"\shidden(?:[\s=/]|$)(?!\s*id=.s:)")  # React streams <div hidden id="S:1">
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # in names like main-text, mainText and MAIN_TEXT
INVISIBLE = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff]")
# Tags of elements around blocks, of those with nothing to read, and of those that are a block.
NODES = set("""div ul ol li table tbody thead tfoot tr td th section article aside nav header footer
main form blockquote pre figure dl details center body fieldset dialog menu""".split())
UNSHOWN = set("noscript svg template iframe select textarea object title audio video".split())
LEAVES = set("p h1 h2 h3 h4 h5 h6 dt dd figcaption summary legend label button caption hr".split())
# Weights by `bench_curate.py fit`. First: tags, words in class, id, role; looks. Second: context.
PLACES = """<footer> -2.36; <aside> -1.35; <main> 0.01; <article> 0.47; <form> <label> <button>
-1.54; <table> 1.72; <ul> <ol> 0.57; <blockquote> 1.37; nav navbar navigation menu submenu dropdown
-0.83; footer contentinfo -3.38; header masthead topbar banner -0.81; sidebar aside rail
complementary -2.30; widget -1.62; comment disqu respond -3.95; post -0.20; entry hentry 0.66; share
sharing social follow -2.08; related recommended recommendation recommend similar trending popular
-3.63; author byline bio -3.22; cookie consent gdpr -3.29; newsletter subscribe signup subscription
-3.97; modal popup overlay dialog -2.35; copyright legal disclaimer term privacy -8.02; login signin
account -4.45; pagination prev next -1.30; toc 2.75; product 0.83; doc markdown wiki 0.73;
<figcaption> <caption> caption credit -2.64; info box -1.47; date time published meta metadata
timestamp -0.69; ad advertisement sponsored promo -0.65; card teaser -0.68; gallery image photo
slideshow -0.96; article story -0.76; headline title heading -0.46; price cart shop buy -0.96"""
LOOKS = """words <= 8 -0.40; words >= 20 0.98; ends 0.67; linked -0.90; before -0.71; after -0.64;
heading 1.38; above <h1> -1.90; p 1.23; li 1.87; div 0.65; pre 1.12; sentences 1.56; sentences above
-1.26; text above -0.77; outside <main> -0.46; outside <article> -0.94; bias 0.60"""
CONTEXT = """odds 0.58; element 1.03; page -0.85; in best 0.45; in 50% 0.75; in 70% 0.72; in 90%
0.03; stretch 0.33; news odds 0.26; news element -0.29; news page -0.07; news in best 0.25; news in
50% 0.01; news in 70% -0.02; news in 90% -0.61; news stretch 0.53; news -0.35; bias -1.98"""
PLACES, LOOKS, CONTEXT = ({" ".join(words): float(weight) for *words, weight in map(
    str.split, table.split(";"))} for table in (PLACES, LOOKS, CONTEXT))  # {names: weight}
LOOKS |= {"in " + names: weight for names, weight in PLACES.items()}
BITS = {word: 1 << i for i, names in enumerate(PLACES) for word in names.split()}
HIDDEN, DECLARED = 1 << len(PLACES), 2 << len(PLACES)  # the page says that it is an article
ARTICLE = (re.compile(r'"@type"\s*:\s*(?:\[\s*)?"\w*(?:Article|BlogPosting)"'),
           re.compile(r"""og:type["'][^>]{0,99}content\s*=\s*["']article"""))

@functools.lru_cache(1 << 12)
def place_bits(tag, attributes):  # the bits of the places that a tag opens, and HIDDEN
    hidden = tag in UNSHOWN or bool(HIDING.search(attributes.lower()))
    names = " ".join(map("".join, NAMES.findall(attributes[:2000])))
    bits = {BITS.get(word.lower().rstrip("s"), 0) for word in WORD.findall(names)}  # no plural s
    return functools.reduce(int.__or__, bits, BITS.get(f"<{tag}>", 0) | HIDDEN * hidden)

def formula(match):  # in place of a match of RAW: the TeX of a formula, or nothing
    _, kind, script, math_alt, inside, image = match.groups(default="")
    alt = "".join((ALT.findall(math_alt + image) or [""])[0])  # in one of two groups
    if image:
        return alt if TEX.search(alt) else ""
    inside = re.sub(r"(?s)^.*?<annotation[^<>]*>|(?:(?<!\s)\s+)?<[^<>]*>\s*", "", inside)
    return html_library.escape(script) if "math/tex" in kind else alt or inside

def scan(html):
    """HTML, cut at block tags -> (blocks: (text, tag, element, characters in links, bits);
    elements: [parent, first block, end, tag, bits])."""
    declared = DECLARED * any(sign.search(html) for sign in ARTICLE)
    html = QUOTED_MARKUP.sub("", RAW.sub(formula, html.replace("\0", "")))
    html = PRE.sub(lambda match: LINE.sub("\n", match.group()), html)
    blocks, elements, stack, tags = [], [[0, 0, 0, "body", declared]], [0], ["body"]
    pieces, linked, in_link, leaf, leaf_bits = [html.partition("<")[0]], 0, False, "", 0
    for closing, tag, attributes, text in TOKEN.findall(html) + [("", "hr", "", "")]:  # flush last
        tag = tag.lower()
        inline = tag not in NODES and tag not in LEAVES and tag not in UNSHOWN
        if tag in ("td", "th") and sum(map(len, pieces)) < 200:  # small cells: a row is a block
            inline, pieces = False, pieces + [" | "] if pieces and not closing else pieces
        elif not inline or tag == "br" and pieces[-1:] == ["\v"]:  # two <br> end a block
            if (whole := "".join(pieces)).strip():
                blocks.append((whole, leaf or tags[-1], stack[-1], linked, leaf_bits))
            pieces, linked = [], 0
        if tag == "a":
            in_link = not closing
        elif tag == "br":
            pieces.append("\v")  # a line break within a block
        elif not inline:
            opens = tag in LEAVES and not closing
            leaf, leaf_bits = (tag, place_bits(tag, attributes)) if opens else ("", 0)
            if tag not in LEAVES:
                depth = len(stack)  # elements from here on end
                if closing and tag in tags[1:]:
                    depth, in_link = depth - tags[::-1].index(tag) - 1, False
                elif not closing and tag == tags[-1] and tag in ("li", "tr", "td", "th"):
                    depth -= 1
                for i in stack[depth:]:
                    elements[i][2] = len(blocks)
                del stack[depth:], tags[depth:]
                if not closing and depth < 256:  # what is deeper counts to its ancestor
                    elements.append([stack[-1], len(blocks), 0, tag, place_bits(tag, attributes)])
                    stack.append(len(elements) - 1)
                    tags.append(tag)
        if text and not (tag == "br" and text.isspace()):
            pieces.append(text)
            linked += in_link * len(text)
    for i in stack:
        elements[i][2] = len(blocks)
    return blocks, elements

def describe(blocks, elements, texts):
    """Features of blocks by looks, {name: (blocks,)}, and their bytes (blocks,), 0 if hidden."""
    tags, at, linked, bits = map(np.array, list(zip(*blocks))[1:])  # (texts as array: gigabytes)
    first, end = np.array([element[1:3] for element in elements]).T
    link = np.minimum(linked / [len(text) for text in texts], 1)
    length = np.array([len(t.encode("utf-8", "replace")) for t in texts])
    plain = np.append(0, np.cumsum(length * (link < 0.5)))  # an element has [end] - [first]
    large, inherited = plain[end] - plain[first] > 0.7 * plain[-1], []  # large: names do not count
    for (up, _, _, _, own), most in zip(elements, large.tolist()):
        own = own & (BITS["<main>"] | BITS["<article>"]) if most else own
        inherited.append(own | inherited[up] if inherited else own)
    bits = bits | np.array(inherited)[at]
    length *= (bits & HIDDEN) == 0
    words = np.array([text.count(" ") + 1 for text in texts])
    ends = np.array([text[-1] in ".!?…。！？\"”’'" for text in texts])
    f = {"words <= 8": words <= 8, "words >= 20": words >= 20, "ends": ends,
         "linked": link, "before": np.append(0, link[:-1]), "after": np.append(link[1:], 0),
         "heading": np.isin(tags, ["h2", "h3", "h4", "h5", "h6"]),
         "above <h1>": (tags == "h1").any() & (np.cumsum(tags == "h1") == 0)}
    f |= {tag: tags == tag for tag in ("p", "li", "div", "pre")}
    sentences = np.append(0, np.cumsum(length * (ends & (link < 0.5) & (length > 60))))
    f["sentences"] = (sentences[end] - sentences[first])[at] / (sentences[-1] + 1)
    f["sentences above"] = sentences[:-1] / (sentences[-1] + 1)
    f["text above"] = (np.cumsum(length) - length) / (length.sum() + 1)
    for i, name in enumerate(PLACES):
        inside = bits >> i & 1
        share = inside @ length / (length.sum() + 1)
        f["in " + name] = inside * (1 - share)  # where all of the page is tells nothing
        if name in ("<main>", "<article>"):
            f["outside " + name] = (share > 0.05) & (inside == 0)
    return f, length

def context(odds, blocks, elements, length):
    """Features by likely blocks around, {name: (blocks,)}: a line within a story is part of it."""
    first, end = np.array([element[1:3] for element in elements]).T
    odds = np.clip(odds, -6, 6)
    p = (length > 0) / (1 + np.exp(-odds))
    sums = np.concatenate([np.zeros((2, 1)), np.cumsum([p * length, length], 1)], 1)
    total, index = sums[0, -1] + 1, np.arange(len(blocks))
    likely, text = sums[:, end] - sums[:, first]  # in each element
    f = {"odds": odds, "element": (likely / (text + 1))[[block[2] for block in blocks]],
         "page": np.full(len(blocks), total / (length.sum() + 1))}
    chosen = {"best": np.argmax(likely / (text + total))}  # by F1 / 2; smallest (= last) with k %
    chosen |= {f"{k}%": np.flatnonzero(likely >= k / 100 * likely[0])[-1] for k in (50, 70, 90)}
    for name, i in chosen.items():
        f["in " + name] = (index >= first[i]) & (index < end[i])
    hits = np.flatnonzero((p > 0.5) & (length > 60))  # a stretch ends where 500 unlikely bytes are
    number = np.append(0, np.cumsum(np.diff(np.cumsum((1 - p) * length)[hits]) > 500))
    stretch = number[np.minimum(np.searchsorted(hits, index), len(number) - 1)]
    f["stretch"] = np.bincount(stretch, p * length)[stretch] / total
    declared = elements[0][4] > 0  # such pages have weights of their own
    f |= {"news " + name: declared * column for name, column in f.items()}
    return f | {"news": np.full(len(p), declared)}

def main_blocks(blocks, elements, texts, looks=LOOKS, others=CONTEXT):
    """Which blocks are main text: (blocks,) bool."""
    features, length = describe(blocks, elements, texts)
    odds = looks["bias"] + sum(looks[name] * column for name, column in features.items())
    features = context(odds, blocks, elements, length)
    odds = others["bias"] + sum(others[name] * column for name, column in features.items())
    p = 1 / (1 + np.exp(-odds))
    order = np.argsort(-p, kind="stable")  # cut off where F1, 2 hits / (size + all hits), is best
    hits, size = np.cumsum((p * length)[order]), np.cumsum(length[order])
    keep = (p >= p[order[np.argmax(hits / (size + hits[-1] + 1))]]) & (length > 0)
    count = collections.Counter((up, tag) for up, begin, end, tag, _ in elements if end - begin > 1)
    repeated = [False]  # by element: comments or other stories, three or more beside an article
    for up, begin, end, tag, _ in elements[1:]:
        many = tag in ("li", "article") and end - begin > 1 and count[up, tag] > 2
        repeated.append(many or repeated[up])
    own = keep & ~np.array([repeated[block[2]] for block in blocks])
    return own if elements[0][4] and own @ length > 0.1 * (keep @ length) else keep

def extract_text(html):
    """The main text of a page, str or bytes, with empty lines between its blocks."""
    blocks, elements = scan(decode_page(html) if isinstance(html, bytes) else html)
    raw = [INVISIBLE.sub("", html_library.unescape(block[0])) for block in blocks]
    texts = [" ".join(text.split()) or "-" for text in raw]
    out, last = [], ""
    for i in np.flatnonzero(main_blocks(blocks, elements, texts)).tolist() if blocks else ():
        text, tag = raw[i].strip("\n"), blocks[i][1]
        if tag != "pre":
            text = "\n".join(filter(None, (" ".join(s.split()) for s in text.split("\v"))))
        text, tag = (text.strip(" |"), "tr") if tag in ("tr", "td", "th") else (text, tag)
        if text.strip(" -"):
            gap = "\n" if last == tag and tag in ("li", "tr") else "\n\n" * bool(out)
            out.append(gap + "- " * (tag == "li") + text)
            last = tag
    return unicodedata.normalize("NFC", "".join(out))

# ---- Classifiers: softmax regression on hashed n-grams (Joulin et al. 2016, without hidden layer).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # arithmetic is modulo 2^64
POWERS = np.cumprod(np.full(1 << 16, MULTIPLIER))
INVERSES = np.cumprod(np.full(1 << 16, pow(int(MULTIPLIER), -1, 1 << 64), np.uint64))

def hash_words(data):  # what lies between spaces in bytes -> (hashes uint64, lengths)
    if len(data) > len(POWERS) - 2:
        half = data.rfind(b" ", 0, len(data) // 2) + 1 or len(data) // 2
        return tuple(map(np.concatenate, zip(hash_words(data[:half]), hash_words(data[half:]))))
    x = np.frombuffer(b" " + data + b" ", np.uint8)
    edges = np.flatnonzero(np.diff(x > 32))  # in turn before a word, and at its last byte
    first, last, total = edges[::2], edges[1::2], np.cumsum(x * POWERS[: len(x)], dtype=np.uint64)
    h = (total[last] - total[first]) * INVERSES[first] * MULTIPLIER  # polynomial in a word's bytes
    return (h ^ (h >> np.uint64(32))) * MULTIPLIER, last - first

def ngram_hashes(hashes, n):  # of words (words,) -> of every n in a row, uint64
    out = hashes[: max(0, len(hashes) - n + 1)]
    for i in range(1, n):
        out = out * MULTIPLIER + hashes[i : i + len(out)]
    out = (out ^ (out >> np.uint64(32))) * MULTIPLIER
    return out ^ (out >> np.uint64(29))

class LinearClassifier:
    """On n-grams of characters, chars = (shortest, longest): best for languages and odd spelling.
    Or, with chars = (0, 0), of up to `words` words: better if each class has its own sources."""
    def __init__(self, labels, table, chars=(1, 4), words=0):
        self.labels, self.table = list(map(str, labels)), np.asarray(table, np.float32)
        self.chars, self.words = tuple(chars), int(words)
    def rows(self, text):  # of the table: the top bits of hashes of n-grams of a text's start
        text = " ".join(text[:20_000].lower().split())
        codes = np.frombuffer(f" {text} ".encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
        words = " ".join(re.findall(r"[^\W_]+|[^\w\s]", text)).encode("utf-8", "replace")
        out = [ngram_hashes(codes, n) for n in range(self.chars[0], self.chars[1] + 1) if n]
        out += [ngram_hashes(hash_words(words)[0], n) for n in range(1, self.words + 1)]
        return (np.concatenate(out) >> np.uint64(65 - len(self.table).bit_length())).astype(int)
    @classmethod
    def train(cls, texts, labels, chars=(1, 4), words=0, bits=17, epochs=2, rate=0.02, prior=1.0):
        """SGD from `prior` times naive Bayes, the rate falling to 0; 2^bits rows of weights."""
        names, rng = sorted(set(labels)), np.random.RandomState(0)
        table = np.full((1 << bits, len(names)), 0.1, np.float32)
        model = cls(names, table, chars, words)  # of this table, not a copy
        pairs = [(model.rows(text), names.index(label)) for text, label in zip(texts, labels)]
        for rows, y in pairs:
            np.add.at(table[:, y], rows, 1)
        table[:] = np.log(table / table.sum(0))
        table[:] = prior * (table - table.mean(1, keepdims=True))
        order = np.concatenate([rng.permutation(len(pairs)) for _ in range(epochs)])
        for done, (rows, y) in enumerate(pairs[k] for k in order):
            error = model.probabilities(rows)
            error[y] -= 1
            table[rows] -= rate * (1 - done / len(order)) * 3 / max(1, len(rows)) ** 0.5 * error
        return model
    def probabilities(self, text):  # of a text, or its rows of the table: (labels,) float32
        rows = self.rows(text) if isinstance(text, str) else text
        scores = self.table[rows].sum(0) * np.float32(3 / max(1, len(rows)) ** 0.5)
        return (p := np.exp(scores - scores.max())) / p.sum()
    def predict(self, text):  # (label, probability) of the likeliest
        return max(zip(self.labels, self.probabilities(text).tolist()), key=lambda pair: pair[1])
    def score(self, text, label):  # probability of a label
        return float(self.probabilities(text)[self.labels.index(label)])
    def save(self, path):  # one .npz file, with 16 bits per weight
        with replacing(path) as file:
            np.savez(file, **{**vars(self), "table": self.table.astype(np.float16)})
    @classmethod
    def load(cls, path):  # what `save` wrote; ValueError and others if it is something else
        with np.load(path, allow_pickle=False) as file:
            model = cls(**file)  # names in it are those of __init__
        if model.table.shape[1:] != (len(model.labels),) or max(*model.chars, model.words) > 16:
            raise ValueError(f"{path} is no classifier of curate.py")
        return model

@functools.lru_cache
def load_model(path):  # a checkpoint of train.py -> (Transformer, Tokenizer)
    import bpe, model, torch  # which takes seconds
    torch.set_num_threads(1)  # the other cores have workers of their own
    network, saved = model.load_checkpoint(path)
    return network.requires_grad_(False), bpe.Tokenizer.from_json(saved["tokenizer"])

def perplexity(text, path):
    """exp of the mean loss per token of the start of a text under a checkpoint, in windows of
    block_size: low if it is like the texts of training (CCNet, Wenzek et al. 2020)."""
    import torch
    network, tokenizer = load_model(path)
    eot, loss = [tokenizer.eot_id], 0.0
    ids = torch.tensor(eot + tokenizer.encode_ordinary(text[:20_000]) + eot)
    for x, y in zip(*(part.split(network.config.block_size) for part in (ids[:-1], ids[1:]))):
        logits = network(x[None])[0].float()
        loss += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
    return math.exp(min(99, loss / (len(ids) - 1)))

# ---- Language: by script (first word of the Unicode name of letters), own letters, stop words.
SCRIPTS = dict(pair.split("=") for pair in """CJK=zh HIRAGANA=ja KATAKANA=ja HANGUL=ko CYRILLIC=ru
ARABIC=ar GREEK=el HEBREW=he ARMENIAN=hy GEORGIAN=ka DEVANAGARI=hi BENGALI=bn GURMUKHI=pa
GUJARATI=gu TAMIL=ta TELUGU=te THAI=th MYANMAR=my ETHIOPIC=am KHMER=km LATIN=latin""".split())
OWN_LETTERS = {"ru": {"uk": "іїєґ", "ru": "ыэ", "bg": "ъ"}, "ar": {"ur": "ٹڈڑےں", "fa": "پچژگیک"}}
STOP_WORDS = {words[:2]: set(words[3:].split()) for words in re.split(r"[;\n]\s*", """\
en the be to of and that have with is are was in it for you not this on he as at by from we or an
de der die das und ist nicht ein ich zu den mit sich auf; sv och att det som en på är av för inte om
fr le la les de des et est un une que dans en pour pas; da og at det er en af til på der ikke med de
es el la los de que y en un una es por con no se del; pl i w na z do się nie to jest że jak po za
it il lo la i gli di che e è un una per non con si da; tr ve bir bu da de için ile olarak çok daha
pt o a os as de que e em um uma é não para com do da; id yang dan di ini itu dengan untuk tidak
nl de het een en van is dat die in te niet op met; cs a se na je že s z do jako; ro și de la în cu
hu a az és hogy nem is egy ez meg; fi ja on ei se että oli; vi là và có không được cho một các""")}

def identify_language(text, classifier=None):
    """(ISO 639-1 code, score in [0, 1]) of a text. classifier: a `LinearClassifier`, or None."""
    text, counts = unicodedata.normalize("NFC", text[:20_000]).lower(), collections.Counter(und=0)
    if classifier:
        return classifier.predict(text)
    for letter, count in collections.Counter(filter(str.isalpha, text)).items():
        script = SCRIPTS.get(unicodedata.name(letter, "-").partition(" ")[0], "und")
        counts[script] += count * (3 if script in ("zh", "ja") else 1)  # as much as 3 letters
    if counts["ja"] > 0.1 * counts["zh"]:  # kana, between Chinese characters
        counts["ja"] += counts.pop("zh", 0)
    script, most = counts.most_common(1)[0]
    share, own = most / max(1, sum(counts.values())), OWN_LETTERS.get(script, {})
    if script != "latin":
        return next((c for c in own if sum(map(text.count, own[c])) > 0.01 * most), script), share
    words = re.findall(r"[^\W\d_]+", text)
    hits = collections.Counter({c: sum(map(s.__contains__, words)) for c, s in STOP_WORDS.items()})
    (best, most), (_, second) = hits.most_common(2)  # (English, if all are 0)
    certain = min(1.0, 3 * most / len(words)) * most / max(1, most + second)  # 1 in 3 is usual
    return (best if most or text.isascii() else "und"), share * (0.3 + 0.7 * certain)

# ---- Filters: each function names the rule that a text breaks, or returns None.
DENSE = "\u3040-\u30ff\u3400-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\U00020000-\U0003ffff"
NO_SPACES = re.compile(f"[{DENSE}]")  # scripts: kana, Chinese, Thai, Lao, Burmese, Khmer
ENDS = "…。！？｡؟۔।॥։።"  # of sentences, besides . ! and ?
ENDED = re.compile(f"[.!?{ENDS}][\"'”’»)\\]）」』]*$|[\"'”’」』]$")
SENTENCE = re.compile(f"[.!?](?=[\\s\"'”’»)\\]]|$)|[{ENDS[1:]}]")
ELLIPSES, BULLETS = ("...", "…"), ("- ", "* ", "• ", "‣", "·", "– ", "●", "○", "■", "▪", "►")
POLICY = re.compile("javascript|terms of use|(privacy|cookie) policy|uses? cookies|use of cookies")

def parts_of(text, end="\n"):  # what lies between ends, stripped, if not empty
    return list(filter(None, map(str.strip, text.split(end))))

def first_true(**rules):  # the name of the first rule that is broken, or None
    return next((name.replace("_", " ") for name, broken in rules.items() if broken), None)

def gopher_quality_reason(text, language="en"):
    """The first of Gopher's rules for quality (Rae et al. 2021) that a text breaks, or None."""
    words, lines, dense = text.split(), parts_of(text), len(NO_SPACES.findall(text))
    letters = sum(map(len, words))
    spaced, count = (True, len(words)) if dense <= 0.3 * letters else (False, dense)  # each a word
    symbols = max(text.count("#"), text.count("...") + text.count("…"))
    lettered = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    stop_words = {"the", "be", "to", "of", "and", "that", "have", "with"} & {*text.lower().split()}
    return first_true(
        under_50_words=count < 50, over_100000_words=count > 100_000,
        mean_word_length=spaced and not 3 <= letters / max(1, count) <= 10,
        symbols_to_words=symbols > 0.1 * count,
        bullets=sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines),
        ellipses=sum(line.endswith(ELLIPSES) for line in lines) > 0.3 * len(lines),
        words_without_letters=spaced and lettered < 0.8 * count,
        stop_words=spaced and language == "en" and len(stop_words) < 2)

def repeated_share(parts):  # (share of parts that repeat an earlier one, and of their characters)
    every, once = (np.array([len(some), sum(map(len, some))]) for some in (parts, set(parts)))
    return (every - once) / np.maximum(every, 1)

def gopher_repetition_reason(text):
    """The first of Gopher's limits to repeated lines and n-grams of words, or None."""
    for name, end in (("paragraphs", "\n\n"), ("lines", "\n")):
        if any(repeated_share(parts_of(text, end)) > (0.3, 0.2)):
            return f"repeated {name}"
    words, lengths = hash_words(NO_SPACES.sub(r" \g<0> ", text).encode("utf-8", "replace"))
    ends = np.append(0, np.cumsum(lengths))
    for n, limit in enumerate((0.2, 0.18, 0.16, 0.15, 0.14, 0.13, 0.12, 0.11, 0.1), 2):
        _, first, counts = np.unique(ngram_hashes(words, n), return_index=True, return_counts=True)
        share = 0
        if n < 5 and (counts > 1).any():  # of the most frequent the one with the most characters
            top = first[counts == counts.max()]
            share = counts.max() * (ends[top + n] - ends[top]).max()
        elif n >= 5:  # words that lie in any n-gram that is not new, each counted once
            again = np.delete(np.arange(max(0, len(words) - n + 1)), first)
            edges = np.bincount(again, None, len(ends)) - np.bincount(again + n, None, len(ends))
            share = lengths[np.cumsum(edges[:-1]) > 0].sum()
        if share > limit * ends[-1]:
            return f"most frequent {n}-gram" if n < 5 else f"repeated {n}-grams"

def c4_reason(text):
    """The first of C4's rules (Raffel et al. 2020) that a text, less bad lines, breaks, or None."""
    lines = [line for line in parts_of(re.sub(r"\[(?:\d*|edit|citation needed)\]", "", text))
             if ENDED.search(line) and not (line.endswith(ELLIPSES) or POLICY.search(line.lower()))
             and (len(line.split()) >= 5 or len(NO_SPACES.findall(line)) >= 10)]
    return first_true(curly_bracket="{" in text, lorem_ipsum="lorem ipsum" in text.lower(),
                      under_3_sentences=len(SENTENCE.findall("\n".join(lines))) < 3)

def fineweb_reason(text):
    """The first of FineWeb's own rules (Penedo et al. 2024) that a text breaks, or None."""
    lines, short = parts_of(text), 12 if NO_SPACES.search(text[:200]) else 30
    return first_true(empty=not lines, characters_in_repeated_lines=repeated_share(lines)[1] > 0.1,
        lines_without_punctuation=sum(map(bool, map(ENDED.search, lines))) < 0.12 * len(lines),
        short_lines=sum(len(line) < short for line in lines) >= 0.67 * len(lines))

FILTERS = {"gopher": gopher_quality_reason, "repetition": gopher_repetition_reason,
           "c4": c4_reason, "fineweb": fineweb_reason}
gopher_quality_filter, gopher_repetition_filter, c4_filter, fineweb_filter = (  # True: keep it
    lambda text, reason=reason: reason(text) is None for reason in FILTERS.values())

# ---- Mask personal data: text -> (masked text, how many); numbers by form, or a word before.
LETTER = rf"[^\W{DENSE}\uac00-\ud7af]"  # Chinese, Korean etc. may touch an address
EMAIL = re.compile(rf"(?<![.+%-])(?<!{LETTER}){LETTER}(?:{LETTER}|[.+%'-]){{0,63}}@"
    rf"(?:(?!_){LETTER}(?:{LETTER}|-){{0,62}}\.){{1,8}}(?:(?![\d_]){LETTER}){{2,24}}(?!{LETTER}|@)")
PHONE_CUE = re.compile(r"""(?ix) (?:\b(?: (?:tele)?(?:ph|f)one?|tel|fax|call|contact|mobile|cell|
    sms|text|ring|whatsapp|hotline|dial | reach[ ](?:me|us) | (?:my|our|your|his|her|their)[ ]
    (?:\w+[ ])?number )\b | ☎|📞|电话|電話|手机|手機|전화 ) [^\d\n]{0,24}$""")
PHONE = re.compile(rf"""(?mx) (?=[+(\d]) (?<![.,/$€£\#+-]) (?<!{LETTER}) (?<!\d[ :=]) (?:
        (?P<world>\+\d{{1,3}} (?:[ .-]?\(\d{{1,4}}\))? (?:[ .-]?(?:\d{{5}}|\d{{1,4}}(?!\d))){{1,6}})
      | (?P<american> (?:1[ .-]?)? (?: \(\d{{3}}\)[ -]{{0,2}} | \d{{3}}(?P<sep>[ .-]) )
                      \d{{3}} (?(sep)(?P=sep)|[ .-]?) \d{{4}} | ^\d{{10}}$ )
      | (?!(?:19|20)\d\d[ /.-]) \(?\d{{2,5}}\)? (?:[ ]?[ /-]?[ ]?\d{{2,8}}){{1,4}} | \d{{7,12}}
    ) (?! {LETTER} | % | [.,:/-]\d | [ ]\d{{3,}} | @ )""")
BYTE, HEX = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)", r"[\da-fA-F]{1,4}"
IP = re.compile(rf"(?=[\da-fA-F]{{1,4}}[.:])(?<![.:-])(?<!{LETTER})(?:(?:{BYTE}\.){{3}}{BYTE}(?!-)|"
                rf"(?=[\da-fA-F:]{{6}})(?:(?:{HEX}:){{7}}{HEX}|(?:{HEX}:){{1,6}}(?::{HEX}){{1,6}}"
                rf"(?!:)))(?!{LETTER}|\.\d)")
VERSION = re.compile(r"(?i)(?:\b(?:v|vers?|versions?|release|build|firmware|revision|rev|update|"
                     r"patch|section|chapter|clause|figure|table)|§|版本)[.:：]?\s*$")

def mask_where(pattern, name, is_meant, text, sign=""):
    """Replace matches, which have `sign`, if is_meant(match, text before) -> (text, how many)."""
    masked = text if sign not in text else pattern.sub(lambda match: name if is_meant(
        match, text[max(0, match.start() - 60) : match.start()]) else match[0], text)
    return masked, masked.count(name) - text.count(name)

mask_emails = functools.partial(mask_where, EMAIL, "|||EMAIL_ADDRESS|||", lambda *_: True, sign="@")
mask_phone_numbers = functools.partial(mask_where, PHONE, "|||PHONE_NUMBER|||", lambda m, before:
    7 <= sum(map(str.isdigit, m[0])) <= (15 if m["world"] else 12)
    and (m["world"] or m["american"] or PHONE_CUE.search(before)))
mask_ips = functools.partial(mask_where, IP, "|||IP_ADDRESS|||", lambda _, t: not VERSION.search(t))

# ---- Files and workers: documents by kind of file, writing, and maps over files by processes.
WARC, JSON_LINES = (".warc", ".wet"), (".jsonl", ".ndjson", ".json")
KINDS = (*WARC, *JSON_LINES, *""".html .htm .xhtml .txt .pdf .py .md .rst .tex .org .c .h .cc .cpp
.hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .sh .sql .jl .lua .hs .kt .cs""".split())

def kind_of(path, kinds=KINDS):  # ".jsonl" for a.jsonl.gz; ValueError if nobody knows it
    kind = os.path.splitext(re.sub(r"\.(gz|zst)$", "", os.fspath(path).lower()))[1]
    if kind not in kinds:
        raise ValueError(f"{path}: not there, or not of {' '.join(kinds)}, or .gz, .zst of them")
    return kind

def find_inputs(patterns):
    """Paths of files, also by pattern, and of known kinds in folders, but of no report.json."""
    paths, known = [], tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".zst"))
    for path in (path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]):
        found = sorted(glob.glob(glob.escape(path) + "/**/*.*", recursive=True)) if path else []
        paths += [p for p in found if p.lower().endswith(known) and os.path.isfile(p)] or [path]
    return [path for path in paths if kind_of(path) and os.path.basename(path) != "report.json"]

def read_documents(path, counts=None):
    """Yield the documents of a file: {"text" (main text of HTML), "url" or "path"; all of JSON}."""
    kind, counts = kind_of(path), collections.Counter() if counts is None else counts
    pypdf = importlib.import_module("pypdf") if kind == ".pdf" else None
    mark = b"\n" if kind in JSON_LINES else b"<|endoftext|>"
    parts = read_parts(path, mark, counts, math.inf if kind == ".txt" else 4 * MAX_PAGE)
    for part in read_warc(path, counts) if kind in WARC else filter(bytes.strip, parts):
        try:
            if kind in WARC:
                document = {part.kind: decode_page(part.body, part.charset), "url": part.url}
            elif kind in JSON_LINES:
                document = json.loads(part)
            elif pypdf:
                pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(part)).pages]
                document = {"text": "\n\n".join(pages), "path": str(path)}
            else:
                text = decode_page(part).strip().replace("\r\n", "\n")
                document = {"html" if "htm" in kind else "text": text, "path": str(path)}
            if "html" in document:
                document["text"] = extract_text(document.pop("html"))
            document["text"].isascii()  # raises if there is no string
            yield document
        except Exception:  # json and pypdf have all kinds of them for what strangers write
            counts["bad document"] += 1

@contextlib.contextmanager
def replacing(path):  # a binary file, gzipped if path says so, that is renamed when complete
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.{os.getpid()}.tmp", "wb") as file:
        packed = str(path).endswith(".gz") and gzip.GzipFile("", "wb", 5, file, mtime=0)
        with packed or contextlib.nullcontext(file) as out:
            yield out
    os.replace(file.name, path)

def to_json(value, indent=None):  # on one line unless indented; half surrogates become "?"
    return json.dumps(value, ensure_ascii=False, indent=indent).encode("utf-8", "replace") + b"\n"

def start_worker():  # it leaves Ctrl-C to its parent, and ends when that has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

def run_job(function, arguments, path):  # result of the function, from path if it was done before
    if not os.path.exists(path):
        with replacing(path) as file:
            file.write(to_json(globals()[function](*arguments)))
    return json.loads(pathlib.Path(path).read_bytes())

def run_all(function, jobs, work, workers, ray):  # [function(*job) for job in jobs], by its name
    jobs = [(function, job, f"{work}-{function}-{i}.json") for i, job in enumerate(jobs)]
    if ray:
        from ray.util.multiprocessing import Pool
        here = importlib.import_module("curate")  # Ray's workers find this file by its name
        return Pool(ray_address=ray).starmap(here.run_job, jobs, chunksize=1)
    if min(workers, len(jobs)) < 2:
        return list(itertools.starmap(run_job, jobs))
    with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)), multiprocessing.get_context("spawn"), start_worker) as pool:
        return list(pool.map(run_job, *zip(*jobs)))

# ---- Duplicates: documents, lines, paragraphs and near duplicates, by one shuffle. o: options
UNITS = EXACT, LINES, NEAR = "exact duplicates", "repeated lines", "near duplicates"
RANGE = 1 << 22  # so many keys are sorted at a time
ORDERS = np.random.RandomState(0).randint(1 << 32, size=4096, dtype=np.uint32) | np.uint32(1)

def stable_hash(data):  # bytes or str -> 64 bits, unlike Python's the same in every process
    data = data if isinstance(data, bytes) else data.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

class BloomFilter:
    """A set in bits: claims to hold what it does not with probability error_rate (Bloom 1970)."""
    def __init__(self, capacity, error_rate=0.001):
        self.size = math.ceil(-capacity * math.log(error_rate) / math.log(2) ** 2)
        self.num_hashes = max(1, round(self.size / capacity * math.log(2)))
        self.bits = bytearray(self.size // 8 + 1)
    def places(self, item):  # (byte, bit) of each: h1 + i h2 (Kirsch, Mitzenmacher 2006)
        h = stable_hash(item)
        return [divmod((h + i * (h >> 32 | 1)) % self.size, 8) for i in range(self.num_hashes)]
    def __contains__(self, item):
        return all(self.bits[byte] >> bit & 1 for byte, bit in self.places(item))
    def add(self, item):  # a str or bytes -> whether it was there before
        seen = item in self
        for byte, bit in self.places(item):
            self.bits[byte] |= 1 << bit
        return seen

@functools.lru_cache(1 << 14)
def fold(letters):  # `normalize` for letters beyond ASCII. In scripts without spaces each is a word
    letters = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFD", letters.lower()))
    letters = (" " * c.isspace() or c for c in letters if unicodedata.category(c)[0] not in "PSC")
    return NO_SPACES.sub(r" \g<0> ", unicodedata.normalize("NFC", "".join(letters)))

def normalize(text):  # lower case, without accents and punctuation, with vowel signs: UTF-8
    text = text if text.isascii() else re.sub(r"[^\0-\x7f]+", lambda match: fold(match[0]), text)
    return text.encode("utf-8", "replace").lower().translate(None, string.punctuation.encode())

def shingles(text, n):  # sorted distinct hashes of n-grams of words (of all words, if fewer)
    words, _ = hash_words(normalize(text))
    hashes = np.sort(ngram_hashes(words, min(n, max(1, len(words)))))  # (np.unique is slower)
    return hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]

def jaccard(a, b):  # |A and B| / |A or B| of sorted arrays of distinct numbers
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(1, len(a) + len(b) - common)

def band_keys(hashes, num_hashes, num_bands):
    """MinHash (Broder 1997) of a set -> 64-bit keys (num_bands,). Each odd a orders hashes h by a h
    mod 2^32: sets share the first with chance J, one of b bands of r orders: 1 - (1 - J^r)^b."""
    a, low = ORDERS[:num_hashes, None], (hashes >> np.uint64(32)).astype(np.uint32)
    signature = np.full(num_hashes, 0xFFFFFFFF, np.uint32)
    for i in range(0, len(low), 512):  # so that the product stays in the cache
        np.minimum(signature, (a * low[i : i + 512]).min(axis=1), out=signature)
    rows = signature.reshape(num_bands, -1) * ORDERS[: num_hashes // num_bands].astype("u8")
    key = (rows.sum(1) + np.arange(1, num_bands + 1, dtype=np.uint64)) * MULTIPLIER
    return (key ^ (key >> np.uint64(31))) * MULTIPLIER

def hash_units(paths, unit, o):
    """Write keys (uint64) of units to path.keys. Of equal odd keys one is kept, of even ones all if
    at most 5, of 0 all, of 1 none. NEAR: keys of bands; hashes to path.sets, ends to .ends."""
    bloom = o["bloom"] and BloomFilter(sum(map(os.path.getsize, paths)) // 30 + 1, o["bloom"])
    for path in paths:
        keys, ends = array.array("Q"), array.array("Q", [0])
        with open(path + ".sets", "wb") as sets:
            for text in (document["text"] for document in read_documents(path)):
                if unit == NEAR:
                    grams = shingles(text, o["ngram"])
                    keys.extend(band_keys(grams, o["num_hashes"], o["num_bands"]).tolist())
                    ends.append(ends[-1] + sets.write(grams))
                for line in {EXACT: [text], LINES: text.split("\n")}.get(unit, ()):
                    once = unit == EXACT or len(line) >= 100  # a document, or a paragraph
                    key = stable_hash(line) // 4 * 4 + 2 + once
                    key = bloom.add(line) if bloom and once and unit == LINES else key  # 0 or 1
                    keys.append(key if line.strip() or unit == EXACT else 0)
        np.array(keys).tofile(path + ".keys")
        np.array(ends).tofile(path + ".ends")

def find_repeats(paths, unit, o):
    """Write to path.drop a byte per unit: whether to drop it. Sorts one range of keys at a time."""
    sizes = [os.path.getsize(path + ".keys") // 8 for path in paths]
    starts, size = np.cumsum([0, *sizes]), o["num_bands"] if unit == NEAR else 1  # keys a unit
    drop, ranges = np.zeros(starts[-1], bool), np.uint64(starts[-1] // RANGE + 1)
    @functools.lru_cache(256)
    def grams(document):  # the hashes of a document, by its number in all files
        file = np.searchsorted(starts, document * size, "right") - 1
        at = 8 * (document - int(starts[file]) // size)
        begin, end = np.fromfile(paths[file] + ".ends", np.uint64, 2, offset=at).tolist()
        return np.fromfile(paths[file] + ".sets", np.uint64, (end - begin) // 8, offset=begin)
    for r in range(int(ranges)):
        keys, ids = [], []
        for path, start in zip(paths, starts):
            own = np.fromfile(path + ".keys", np.uint64)
            found = np.flatnonzero((own % ranges == r) & (own > 1))
            keys, ids = [*keys, own[found]], [*ids, found + start]
            drop[start : start + len(own)] |= own == 1
        order = np.argsort(keys := np.concatenate(keys), kind="stable")
        keys, ids = keys[order], np.concatenate(ids)[order]
        first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        count = np.diff(edges := np.append(np.flatnonzero(first), len(keys)))
        if unit != NEAR:
            drop[ids] = np.where(keys & np.uint64(1), ~first, np.repeat(count > 5, count))
            continue
        for begin, end in zip(edges[:-1][count > 1], edges[1:][count > 1]):
            bucket = (ids[begin:end] // size).tolist()
            for i, b in enumerate(bucket):  # dropped if one of 50 before it is near
                near = (jaccard(grams(a), grams(b)) for a in bucket[max(0, i - 50) : i])
                drop[b * size] = drop[b * size] or any(j >= o["threshold"] for j in near)
    for path, part in zip(paths, np.split(drop, starts[1:-1])):
        part[::size].tofile(path + ".drop")

def exact_line_dedup(files, out):
    """Write files to the folder out without the lines that occur more than once in all together."""
    files = {path: pathlib.Path(path).read_bytes().splitlines(True) for path in files}
    counts = collections.Counter(line.rstrip(b"\r\n") for own in files.values() for line in own)
    os.makedirs(out, exist_ok=True)
    for path, own in files.items():
        with open(os.path.join(out, os.path.basename(path)), "xb") as file:  # never over an input
            file.writelines(line for line in own if counts[line.rstrip(b"\r\n")] == 1)

def minhash_dedup(files, out, num_hashes=112, num_bands=14, ngram=5, threshold=0.8):
    """Copy files to the folder out, but for those near (Jaccard >= threshold) an earlier one."""
    buckets = collections.defaultdict(list)  # key of a band: the sets that have it
    os.makedirs(out, exist_ok=True)
    for path in files:
        grams = shingles(decode_page(data := pathlib.Path(path).read_bytes()), ngram)
        own = [buckets[key] for key in band_keys(grams, num_hashes, num_bands).tolist()]
        if not any(jaccard(grams, other) >= threshold for bucket in own for other in bucket):
            with open(os.path.join(out, os.path.basename(path)), "xb") as file:
                file.write(data)
        for bucket in own:
            bucket.append(grams)

# ---- Decontaminate: drop documents that share 13 words in a row with a test (Brown et al. 2020).
@functools.lru_cache(1)
def test_ngrams(paths, n=13):
    """Paths (tuple) -> {n, or string's length from 8: sorted n-gram hashes}. KeyError: damaged."""
    found = collections.defaultdict(list)
    for path in paths:
        strings = [line.decode("utf-8", "replace") for line in read_parts(path, b"\n", {})]
        if (kind := kind_of(path, (*JSON_LINES, ".csv", ".txt"))) == ".csv":
            strings = itertools.chain.from_iterable(csv.reader(line + "\n" for line in strings))
        elif kind != ".txt":
            strings = map(json.loads, re.findall(r'"(?:[^"\\]|\\.)*"', "\n".join(strings)))
        for words in (hash_words(normalize(text))[0] for text in strings):
            if len(words) >= 8:
                found[min(n, len(words))].append(ngram_hashes(words, min(n, len(words))))
    return {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}

def contaminated(text, ngrams):
    """Whether a text has one of the n-grams of `test_ngrams`."""
    words, _ = hash_words(normalize(text))  # (known[:-1], so that no index is beyond the last)
    return any((known[np.searchsorted(known[:-1], grams)] == grams).any() for grams, known in (
        (ngram_hashes(words, length), known) for length, known in ngrams.items()))

# ---- Mix sources: documents in turn, so that bytes of text are at any time as weights say.
def mix(sources, output_dir, weights=None, budget=None, max_epochs=4, temperature=1.0):
    """Write mixed.jsonl.gz. sources: {name: [paths]}; weights: by default size^(1 / temperature);
    budget: bytes of text, for which sources are repeated up to max_epochs times (Muennighoff et al.
    2023): without it, one source is used up."""
    sizes = {name: sum(map(os.path.getsize, paths)) for name, paths in sources.items()}
    weights = weights or {name: sizes[name] ** (1 / temperature) for name in sources}
    total = sum(weights.values())
    if set(weights) != set(sources) or not 0 < min(weights.values()) <= total < math.inf:
        raise ValueError("weights must be positive, and name all sources: " + ", ".join(sources))
    given = {name: {"weight": weights[name] / total, "bytes": 0} for name in sorted(weights)}
    limit = int(min(1 << 16, max(1000, (budget or math.inf) / 50)))  # longer texts are cut
    piece = re.compile(rf"(?s)\S.{{,{limit}}}(?=\n\n|\Z)|\S.{{,{limit}}}")
    def stream(name):
        for epoch in range(1, 1 + (max_epochs if budget else 1)):
            given[name]["epochs"] = epoch
            for document in itertools.chain.from_iterable(map(read_documents, sources[name])):
                for text in piece.findall(document["text"]):
                    yield {**document, "text": text, "source": name}
    streams = {name: stream(name) for name in given}
    with replacing(path := os.path.join(output_dir, "mixed.jsonl.gz")) as file:
        while streams and sum(g["bytes"] for g in given.values()) < (budget or math.inf):
            name = min(streams, key=lambda name: given[name]["bytes"] / given[name]["weight"])
            if document := next(streams[name], None):
                file.write(to_json(document))
                given[name]["bytes"] += len(document["text"].encode("utf-8", "replace"))
            else:  # used up: the end of all, without a budget
                streams = {k: s for k, s in streams.items() if budget and k != name}
    for name, g in given.items():
        g["reached"] = g["bytes"] / max(1, sum(g["bytes"] for g in given.values()))
        warning = "" if abs(g["reached"] / g["weight"] - 1) < 0.1 else ": off by more than a tenth"
        print(f"{path}: {name:<12} asked {g['weight']:.4f}, reached {g['reached']:.4f}{warning}")
    return given

# ---- Pipeline: the steps on a document, on a file, and on all; and the command line.
STEPS = ["extract", "language", "filter", "mask", "decontaminate", "dedup"]
load_classifier = functools.lru_cache(LinearClassifier.load)  # once per process

def apply_steps(document, steps, o, flags):
    """Change a document; yield (step, reason to drop it, or None). flags: of its units, to drop."""
    if "extract" in steps:  # which `read_documents` did
        yield "extract", None if document["text"] else "no text"
    document["text"] = text = unicodedata.normalize("NFC", document["text"])
    if "language" in steps:
        model = o["language_model"] and load_classifier(o["language_model"])
        document["language"], score = identify_language(text, model)
        wanted = not o["languages"] or (document["language"] in o["languages"] and score >= 0.5)
        yield "language", None if wanted else document["language"]
    for name in o["filters"] if "filter" in steps else ():
        language = [document["language"]] if name == "gopher" and "language" in document else []
        yield name, FILTERS[name](text, *language)
    for path, label, p in (c.rsplit(":", 2) for c in o["classifiers"] if "filter" in steps):
        document[label] = round(load_classifier(path).score(text, label), 4)
        yield "classifier", None if document[label] >= float(p) else f"not {label}"
    for path, most in (c.rsplit(":", 1) for c in o["perplexity"] if "filter" in steps):
        document["perplexity"] = round(perplexity(text, path), 2)
        yield "perplexity", None if document["perplexity"] <= float(most) else "too high"
    if "mask" in steps:
        for name, f in ("emails", mask_emails), ("phones", mask_phone_numbers), ("ips", mask_ips):
            text, document[name] = f(text)
        yield "mask", None
    if "decontaminate" in steps and o["evals"]:
        found = contaminated(text, test_ngrams(tuple(o["evals"])))
        yield "decontaminate", "in a test set" if found else None
    for unit in {EXACT, NEAR} & {*steps}:
        yield unit, "copy" if next(flags) else None
    if LINES in steps:
        lines = text.split("\n")
        kept = [line for line in lines if not next(flags)]
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept).strip())
        few = len(kept) < len(lines) and gopher_quality_reason(text) == "under 50 words"
        yield LINES, "too little left" if few else None
    document["text"] = text

def process_file(path, out, steps, o):
    """Write a file of the documents that pass -> counts, and an example for each reason."""
    counts, examples, skipped = collections.Counter(), {}, collections.Counter()
    flags = iter(np.fromfile(path + ".drop", bool).tolist() if steps[0] in UNITS else [])
    with replacing(out) as file:
        for document in read_documents(path, skipped):
            for step, reason in apply_steps(document, steps, o, flags):
                counts[what := f"{step}: {reason or 'kept'}"] += 1
                if reason:
                    examples.setdefault(what, f"{document.get('url')} {document['text'][:200]}")
                    break
            else:
                file.write(to_json(document))
    return counts + collections.Counter({f"skipped: {k}": n for k, n in skipped.items()}), examples

def run_pipeline(o):  # what each job left is in a folder: a killed run goes on
    how, o, out = (o["workers"], o["ray"]), {**o, "workers": 0, "ray": 0}, o["out"]
    files, counts, examples = find_inputs(o["input"]), collections.Counter(), {}
    work = f"{out}/.work-{stable_hash(to_json([o, files, *map(os.path.getsize, files)])):x}"
    stages = [o["steps"], *([unit] for unit in UNITS if "dedup" in o["steps"])]
    if os.path.isdir(out) and os.listdir(out) and not os.path.exists(work):
        raise ValueError(f"{out} is of other inputs or settings: give another --out")
    os.makedirs(work, exist_ok=True)
    for steps in stages:
        base = f"{work}/{steps[0]}"
        if steps[0] in UNITS:  # a Bloom filter sees all files
            groups = [files] if steps[0] == LINES and o["bloom"] else [[path] for path in files]
            run_all("hash_units", [(group, steps[0], o) for group in groups], base, *how)
            find_repeats(files, steps[0], o)
        begin, end = (f"{out}/", ".gz") if steps is stages[-1] else (f"{base}-", "")
        jobs = [(path, f"{begin}{i:05d}.jsonl{end}", steps, o) for i, path in enumerate(files)]
        for own, texts in run_all("process_file", jobs, base, *how):
            counts, examples = counts + collections.Counter(own), {**texts, **examples}
        files = [new for _, new, *_ in jobs]
    with replacing(f"{out}/report.json") as file:
        file.write(to_json({"counts": counts, "examples": examples}, indent=1))
    print(*(f"{n:>12,}  {what}" for what, n in counts.items()), out, sep="\n")
    rest = [*pathlib.Path(work).glob("*"), *pathlib.Path(out).glob("*.tmp")]  # of a killed run
    for path in sorted(rest, key=lambda path: path.suffix != ".json"):  # results first
        os.remove(path)
    if not any(next(read_documents(path), None) for path in files):
        raise ValueError("no document was kept")

def main():  # errors become one line, and exit code 1 or, for usage, 2
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # workers end with their parent
    sys.warnoptions.append("ignore:resource_tracker")  # no warning of what that leaves
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["pipeline", *STEPS, "mix", "train-classifier"])
    options = {"input": [f"{pathlib.Path(__file__).resolve().parent}/*.[mp][dy]"], "steps": STEPS,
               "out": "data/corpus", "workers": os.cpu_count(), "ray": "", "languages": ["en"],
               "language_model": "", "filters": ["gopher", "repetition", "fineweb"],
               "classifiers": [], "perplexity": [], "evals": [], "threshold": 0.8, "ngram": 5,
               "num_hashes": 112, "num_bands": 14, "bloom": 0.0, "words": 0, "weights": [],
               "temperature": 1.0, "tokens": 0.0}
    for name, default in options.items():  # its type is that of the option
        kind, nargs = (str, "*") if isinstance(default, list) else (type(default), None)
        choices = {"steps": STEPS, "filters": list(FILTERS)}.get(name)
        parser.add_argument(f"--{name}", type=kind, nargs=nargs, default=default, choices=choices)
    o, sources = vars(parser.parse_args(sys.argv[1:] or ["pipeline"])), {}
    try:
        if o["command"] not in ("mix", "train-classifier"):
            o["steps"] = [o["command"]] if o["command"] in STEPS else o["steps"]
            return run_pipeline(o)
        for name, _, pattern in (item.partition("=") for item in o["input"]):
            sources[name] = sources.get(name, []) + find_inputs([pattern or name])
        if o["command"] == "mix":
            weights = {name: float(share) for name, share in (w.split("=") for w in o["weights"])}
            return mix(sources, o["out"], weights, 4 * o["tokens"], temperature=o["temperature"])
        pairs = [(document["text"], label) for label, paths in sources.items()
                 for path in paths for document in read_documents(path)]
        held_out, pairs = pairs[9::10], [pair for i, pair in enumerate(pairs) if i % 10 != 9]
        model = LinearClassifier.train(*zip(*pairs), (0, 0) if o["words"] else (1, 4), o["words"])
        right = sum(model.predict(text)[0] == label for text, label in held_out)
        model.save(o["out"])
        print(f"{o['out']}: {len(pairs)} texts learned, {right} of {len(held_out)} others right")
    except Exception as error:  # zipfile and zstandard have their own kinds for damaged files
        sys.exit(f"curate.py: error: {error}")

if __name__ == "__main__":
    main()
