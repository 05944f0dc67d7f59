"""
From Common Crawl pages to tokens worth training on.

    python curate.py                   # all of it, on a small crawl made for the purpose
    python curate.py pipeline --input crawl/*.warc.gz --out corpus --workers 8
    python bpe.py train --input corpus/*.jsonl.gz --vocab_size 32000 --out data/web

takes the main text out of HTML, keeps the languages asked for, drops bad text by rules, masks
personal data and removes duplicates. It leaves documents (.jsonl.gz, one per line, with `text`)
and report.json (what every step kept and why) in --out. Each step is a command too:

    python curate.py read         --input crawl/*.warc.gz --out pages
    python curate.py extract      --input pages/*.jsonl.gz page.html --out texts
    python curate.py language     --input texts/*.jsonl.gz --out english --languages en
    python curate.py filter       --input english/*.jsonl.gz --out good
    python curate.py mask         --input good/*.jsonl.gz --out masked
    python curate.py dedup        --input masked/*.jsonl.gz --out unique --threshold 0.8
    python curate.py decontaminate --input unique/*.jsonl.gz --evals arc.jsonl --out clean
    python curate.py mix          --input web=clean/*.jsonl.gz wiki=wiki.jsonl --out mixed \\
        --weights web=0.7 wiki=0.3 --tokens 1e9

Inputs are .warc, .wet, .html, .txt (with <|endoftext|> between documents) and .jsonl, each also
as .gz, and .pdf if pypdf is installed. Classifiers of language, quality or toxicity are trained
in seconds from example texts, one per line of .txt or per document of other files:

    python curate.py train-classifier --examples en=en.txt de=de.txt fr=fr.txt --out langid.npz
    python curate.py train-classifier --examples good=wiki.txt web=web.jsonl --words 2 \\
        --out quality.npz
    python curate.py pipeline --input crawl/*.warc.gz --out corpus --language_model langid.npz \\
        --quality quality.npz:good:0.5

A run that was stopped continues when the same command is given again. The output does not depend
on --workers. Memory does not grow with the corpus, except for one entry per near duplicate:
hashes of everything lie on disk, and are looked at a part at a time.
"""

import argparse
import codecs
import collections
import concurrent.futures
import contextlib
import csv
import functools
import glob
import gzip
import hashlib
import html as html_library
import io
import ipaddress
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
import unicodedata
import zipfile
import zlib

import numpy as np

EOT = "<|endoftext|>"

# -----------------------------------------------------------------------------
# Read. A WARC file (ISO 28500) is a sequence of records: headers, a blank line, and as many bytes
# as Content-Length says. In a .gz file each record is usually a gzip member of its own. Crawls are
# truncated, damaged and wrong about lengths: what cannot be read is counted and skipped.

MAX_PAGE = 16 << 20  # bytes of a page once decompressed; longer ones are skipped
MAX_RATIO = 200  # a gzip member that expands more than this, beyond MAX_PAGE, is a bomb
CHUNK = 1 << 16
RECORD = b"WARC/"  # how a record begins
NEXT = b"\n" + RECORD  # and how another follows: the text of a page may mention WARC/1.0, too
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,8})[ \t]*(?:;[^\r]{0,80})?\r\n")
BLANK_LINE = re.compile(rb"\r?\n\r?\n")

# A page of a WARC file, or a text of a WET file. kind: "html" or "text"; charset: what the HTTP
# header says, or None; body: bytes without HTTP headers, chunks joined and decompressed.
Record = collections.namedtuple("Record", "url kind charset body")


def unpack(file, counts):
    """Yield the bytes of a file in pieces, its gzip members decompressed if it has any. Of a
    damaged member the rest is skipped."""
    raw = file.read(CHUNK)
    if not raw.startswith(b"\x1f\x8b"):
        yield raw
        yield from iter(functools.partial(file.read, CHUNK), b"")
        return
    while raw := raw or file.read(CHUNK):
        at = raw.find(b"\x1f\x8b\x08")
        if at < 0:  # a gzip header may lie across the border of two chunks
            more = file.read(CHUNK)
            raw = raw[-2:] + more if more else b""
            continue
        raw, member, consumed, produced = raw[at:], zlib.decompressobj(31), 0, 0
        while not member.eof:
            raw = raw or file.read(CHUNK)
            if not raw:
                counts["gzip cut short"] += 1
                return
            try:
                piece = member.decompress(raw, 16 * CHUNK)
            except zlib.error:
                counts["damaged gzip member"] += 1
                raw = raw[1:]
                break
            rest = member.unused_data or member.unconsumed_tail
            consumed, produced, raw = consumed + len(raw) - len(rest), produced + len(piece), rest
            yield piece
            if produced > MAX_PAGE and produced > MAX_RATIO * consumed and not member.eof:
                counts["decompression bomb"] += 1
                break
        if not member.eof:
            yield b"\n"  # so that what comes next begins a line


def parse_headers(head):
    """The `Name: value` lines of a header as {name in lower case: value}; the first one counts."""
    lines = re.findall(r"(?m)^([^\s:]+)[ \t]*:(.*)$", head.decode("utf-8", "replace"))
    return {name.lower(): value.strip() for name, value in reversed(lines)}


def unpack_http(content):
    """An HTTP response -> (MIME type, charset, body). ValueError says why it holds no page."""
    head, *body = BLANK_LINE.split(content, 1)
    status = re.match(rb"HTTP/\S+\s+(\d{3})", head)
    if not status or not body:
        raise ValueError("no HTTP response")
    if status.group(1) != b"200":
        raise ValueError("HTTP status not 200")
    headers, body = parse_headers(head), body[0]
    if "chunked" in headers.get("transfer-encoding", "").lower():
        chunks, at = [], 0
        while (size := CHUNK_SIZE.match(body, at)) and int(size.group(1), 16):
            at = size.end() + int(size.group(1), 16) + 2
            chunks.append(body[size.end() : at - 2])
        body = b"".join(chunks) or body  # as it is, if it is not chunked after all
    coding = headers.get("content-encoding", "identity").lower()
    if coding != "identity":
        unpacker = zlib.decompressobj(47)  # of gzip or zlib
        try:
            unpacked = unpacker.decompress(body, MAX_PAGE)
            if unpacker.unconsumed_tail:
                raise ValueError("decompression bomb")
            body = unpacked
        except zlib.error:
            if b"<" not in body[:2000]:  # Common Crawl decompresses, and may leave the header
                raise ValueError(f"content encoding {coding[:20]}") from None
    mime, _, parameters = headers.get("content-type", "").lower().partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters)
    if not mime.strip() and re.search(rb"(?i)<html|<!doctype html", body[:2000]):
        mime = "text/html"
    return mime.strip(), charset and charset.group(1), body


def read_warc(source, counts=None):
    """The pages of a WARC or WET file, one `Record` at a time.

    source: a path or a binary file, gzipped or not. counts: a Counter of what was skipped, by
    reason. Only responses of status 200 with HTML or plain text are yielded. If no record begins
    where Content-Length says that this one ends, it ends where the next one begins.
    """
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

    def take(n):
        """The next n bytes, or as many as there are."""
        out = bytes(buffer[:n])
        del buffer[:n]
        return out

    while fill(1):
        fill(CHUNK)
        start = buffer.find(RECORD, 0, CHUNK)
        if start != 0:  # line ends, or bytes that belong to no record
            if junk := take(start if start > 0 else CHUNK - len(RECORD)).strip(b"\r\n"):
                counts["bytes between records"] += len(junk)
            continue
        blank = BLANK_LINE.search(buffer, 0, CHUNK)
        if not blank:  # skip all of the chunk: a line at a time would be quadratic
            counts["record without headers"] += 1
            last = buffer.rfind(NEXT, 0, CHUNK)
            take(last if last > 0 else CHUNK - len(NEXT))
            continue
        headers = parse_headers(take(blank.end()))
        length = headers.get("content-length", "")
        length = int(length) if re.fullmatch("[0-9]{1,15}", length) else -1
        whole = 0 <= length <= MAX_PAGE and fill(length)
        if whole:
            fill(length + 64)
            after = buffer[length : length + 64].lstrip(b"\r\n")
            whole = RECORD.startswith(bytes(after[: len(RECORD)]))
        if whole:
            content = take(length)
        else:
            goes_on = fill(MAX_PAGE)
            end = 0 if buffer.startswith(RECORD) else buffer.find(NEXT, 0, MAX_PAGE)
            if end < 0:
                too_large = goes_on or length > MAX_PAGE
                counts["page too large" if too_large else "record cut short"] += 1
                take(MAX_PAGE)
                continue
            counts["wrong length"] += 1
            content = take(end).rstrip(b"\r\n")
        counts["records"] += 1
        kind, mime = headers.get("warc-type", "").lower(), headers.get("content-type", "").lower()
        charset = None
        try:
            if kind == "response":
                mime, charset, content = unpack_http(content)
            elif kind not in ("conversion", "resource"):
                raise ValueError(f"type {kind[:20] or 'missing'}")
            page = "html" if "html" in mime else "text" if mime.startswith("text/plain") else None
            if not page:
                raise ValueError("not HTML")
        except ValueError as reason:
            counts[str(reason)] += 1
            continue
        yield Record(headers.get("warc-target-uri", "").strip("<>"), page, charset, content)


CHARSET = re.compile("(?a)(utf-?8|utf-?16|iso|latin|windows|cp|koi|gb|big|euc|shift|sjis|tis|ks_c|"
                     r"mac|us-|ascii)[\w-]*")  # not zlib, idna and other codecs of Python
# Browsers read these charsets as larger ones, and so do we.
WIDER = {"iso8859-1": "cp1252", "ascii": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874",
         "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
         "big5": "big5hkscs"}
BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le",
        codecs.BOM_UTF16_BE: "utf-16-be"}
META = re.compile(
    rb"""(?i)<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*["']?([\w.:-]+)""")


def decode_page(data, charset=None):
    """Bytes of a page as text. In this order: byte order mark, valid UTF-8 (other encodings hardly
    ever are), the HTTP header's charset, <meta>, windows-1252."""
    for mark, name in BOMS.items():
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    declared, names = META.search(data[:4096]), []
    for label in (charset, declared and declared.group(1).decode("ascii", "replace")):
        label = (label or "").lower().removeprefix("x-")
        with contextlib.suppress(LookupError):
            if CHARSET.fullmatch(label):
                names.append(codecs.lookup(label).name)
    name = names[0] if names else "cp1252"
    if not name.startswith(("iso2022", "utf-16")):
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            # With one bad byte, or truncated within a letter, it is UTF-8 all the same.
            text = data.decode("utf-8", "replace")
            good = len(re.findall("[^\0-\x7f\ufffd]", text))
            if good > 10 * text.count("\ufffd") and (not names or name == "utf-8"):
                return text
    return data.decode(WIDER.get(name, name), "replace")


# -----------------------------------------------------------------------------
# Transform: the main text of an HTML page. Three parts. A scanner cuts the page at its block tags
# into runs of text, and notes for each in what elements it lies. A linear classifier, whose
# weights were learned from pages with known main text, says of each run whether it belongs to it.
# What belongs to it is written out.
#
# The scanner is one regular expression that takes a tag and the text after it at a time. It can
# not fail after it has begun to match, so it goes over any page once, however broken; elements are
# kept on a list, not on Python's stack, and only MAX_DEPTH of them.

RAW_START = re.compile(r"<(?:!--|(script|style|svg|template|iframe|select|textarea|object|canvas|"
                       r"title|audio|video|math|datalist)\b)", re.I)
QUOTED_MARKUP = re.compile(r"""=\s*(?:"[^"<>]*[<>][^"]*"|'[^'<>]*[<>][^']*')""")
TOKEN = re.compile(r"<(/?[a-zA-Z][^\s/>]*|[/!?])([^>]*)>?([^<]*(?:<(?![a-zA-Z/!?])[^<]*)*)")
ATTRIBUTE = re.compile(r"""([^\s=>"'/]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'>]+)))?""")
MAX_DEPTH = 256
MAX_BLOCKS = 50_000  # of a page; what comes after them is dropped


# What a tag does: change the link state; break a line; begin and end a block (LEAF); the same, and
# become the place where blocks lie (NODE); separate the cells of a row.
LINK, BREAK, LEAF, NODE, CELL = range(5)
TAG_KINDS = {
    LINK: "a", BREAK: "br", CELL: "td th",
    LEAF: "p h1 h2 h3 h4 h5 h6 dt dd figcaption summary legend label button caption address hr",
    NODE: "div ul ol li table tbody thead tfoot tr section article aside nav header footer main "
          "form blockquote pre figure dl details center body fieldset dialog menu noscript"}
TAGS = {slash + tag: (kind, tag, slash == "/")  # name as in the page: (kind, tag, is an end tag)
        for kind, tags in TAG_KINDS.items() for tag in tags.split() for slash in ("", "/")}
CELL_WALLS = {"table", "tbody", "thead", "tfoot", "tr", "td", "th", "body"}

# Elements, and words in class, id, role and itemprop, that say what kind of place a block lies in.
# Each place is named by its first word and is a bit; an element inherits those of its ancestors.
PLACES = [words.split() for words in """
<nav>; <header>; <footer>; <aside>; <article>; <main>; <form>; <table>; <td>;
<ul> <ol>; <dl>; <figure>; <blockquote>;
nav navbar navigation topnav subnav sidenav mainnav menu menus submenu dropdown megamenu menuitem;
footer foot colophon contentinfo bottombar; header masthead topbar banner;
sidebar aside rail complementary; widget widgets;
comment comments commentlist commenter disqus respond; reply replies; post posts; entry hentry;
article articles story; content contents; main primary; text richtext prose rte;
breadcrumb breadcrumbs crumbs; share sharing social socials sharedaddy shares addthis follow;
related recommended recommendations recirc similar suggested trending popular; author byline bio;
date time published meta metadata; tag tags category categories;
cookie consent gdpr cookies onetrust; newsletter subscribe signup subscription optin;
modal popup overlay dialog lightbox; ad ads advert advertisement sponsor sponsored promo promotion;
copyright legal disclaimer terms privacy; login signin account register; search searchform;
pagination pager paging prev next; toc; card cards; product products;
price prices cart shop checkout buy; review reviews rating ratings; description desc;
summary excerpt teaser intro; item items list listing; button buttons btn;
thread topic message discussion; question answer answers;
docs documentation markdown markdownbody wiki mw; event events;
tab tabs accordion faq; top; blog news; signature sig;
caption captions credit credits attachment figcaption; info infobox box hint;
gallery images image photo photos slideshow carousel slider; cta donate donation support;
headline title heading titles
""".split(";")]
HIDDEN = 1 << len(PLACES)
PLACE_BITS = {name: 1 << i for i, names in enumerate(PLACES) for name in names}
TAG_BITS = {"noscript": HIDDEN} | {
    name.strip("<>"): bit for name, bit in PLACE_BITS.items() if name[0] == "<"}
HIDING = re.compile(r"(?i)display\s*:\s*none|visibility\s*:\s*hidden")
CUE_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@functools.lru_cache(1 << 12)
def place_bits(attributes):
    """The bits of PLACES, and HIDDEN, that the attributes of a tag stand for."""
    bits = 0
    for name, *values in ATTRIBUTE.findall(attributes[:2000]):
        name, value = name.lower(), "".join(values)
        if name in ("class", "id", "role", "itemprop"):
            for word in CUE_WORD.findall(value):
                bits |= PLACE_BITS.get(word.lower(), 0)
        elif (name == "style" and HIDING.search(value) or name == "aria-hidden" and value == "true"
              # React streams visible parts as <div hidden id="S:1">
              or name == "hidden" and 'id="S:' not in attributes):
            bits |= HIDDEN
    return bits


def drop_raw(html):
    """HTML without comments and without the elements whose content is no text (RAW_START). An
    unclosed one is looked for once, not once for every time it is opened."""
    low = html.replace("İ", "I").lower()  # the only letter whose lower case is two
    out, last, unclosed = [], 0, set()
    found = RAW_START.search(html)
    while found:
        name = found.group(1)
        close, at = ("</" + name.lower(), found.end()) if name else ("-->", found.start() + 2)
        end = -1 if close in unclosed else low.find(close, at)
        if end >= 0 or close in ("</script", "</style"):
            out.append(html[last : found.start()])
            last = (low.find(">", end) + 1 if end >= 0 else 0) or len(html)
        else:
            unclosed.add(close)
        found = RAW_START.search(html, max(last, found.end()))
    return " ".join([*out, html[last:]])


def tokens(html):
    """Yield lists of the matches of TOKEN, a megabyte of the page at a time: all at once would
    take too much memory, and one at a time too long."""
    begin = 0
    while begin < len(html):
        end = html.find("<", begin + (1 << 20))
        end = end if end >= 0 else len(html)
        yield TOKEN.findall(html, begin, end)
        begin = end


def scan(html):
    """Cut HTML at its block tags. Returns a namespace of lists. With an entry per block: text
    (raw), tag, places (bits), node (number of the element it lies in), linked (characters of text
    within links). With an entry per element, in the order of the page: parent, first and end (the
    blocks [first, end) lie in it), node_tag."""
    html = QUOTED_MARKUP.sub("", drop_raw(html.replace("\0", "")))
    b = types.SimpleNamespace(text=[], tag=[], places=[], node=[], linked=[],
                              parent=[-1], first=[0], end=[0], node_tag=["body"])
    node_places, is_open, stack = [0], collections.Counter(), [0]
    pieces, linked = [html.partition("<")[0]], 0  # of the block to come
    in_link, link_depth = False, 0
    leaf, leaf_bits = "", 0

    def flush():
        """End a block."""
        nonlocal pieces, linked
        if not pieces:
            return
        text = "".join(pieces)
        if text and not text.isspace():
            node = stack[-1]
            b.text.append(text)
            b.tag.append(leaf or b.node_tag[node])
            b.places.append(node_places[node] | leaf_bits)
            b.node.append(node)
            b.linked.append(linked)
        pieces, linked = [], 0

    def close(depth):
        """Close the elements from depth on."""
        nonlocal in_link
        while len(stack) > depth:
            node = stack.pop()
            b.end[node] = len(b.text)
            is_open[b.node_tag[node]] -= 1
        in_link = in_link and depth >= link_depth

    for name, attributes, text in itertools.chain.from_iterable(tokens(html)):
        if len(b.text) >= MAX_BLOCKS:
            break
        kind, tag, closing = TAGS.get(name.lower(), (None, None, None))
        if kind is None:  # most tags: their text goes on with the block
            pass
        elif kind == LINK:
            in_link, link_depth = not closing, len(stack)
        elif kind == BREAK:
            if pieces and pieces[-1] == "\v":
                flush()
            pieces.append("\v")
            if text.isspace():
                continue
        else:
            if kind != CELL or not closing and sum(map(len, pieces)) > 200:
                flush()
            elif pieces and not closing:
                pieces.append(" | ")
            leaf, leaf_bits = "", 0
            if kind == LEAF:
                if not closing:
                    leaf, leaf_bits = tag, place_bits(attributes) if attributes else 0
            elif closing:
                if is_open[tag]:
                    # An end tag within a cell does not close what is open outside of it.
                    walls = () if tag in CELL_WALLS else ("td", "th")
                    depth = len(stack) - 1
                    while (at := b.node_tag[stack[depth]]) != tag and at not in walls:
                        depth -= 1
                    if at == tag:
                        close(depth)
            else:
                top = b.node_tag[stack[-1]]
                if top == tag in ("li", "tr") or kind == CELL and top in ("td", "th"):
                    close(len(stack) - 1)
                if len(stack) <= MAX_DEPTH:
                    bits = node_places[stack[-1]] | TAG_BITS.get(tag, 0)
                    node_places.append(bits | place_bits(attributes) if attributes else bits)
                    b.parent.append(stack[-1])
                    b.first.append(len(b.text))
                    b.end.append(0)
                    b.node_tag.append(tag)
                    stack.append(len(b.parent) - 1)
                    is_open[tag] += 1
        if text:
            pieces.append(text)
            if in_link:
                linked += len(text)
    flush()
    close(0)
    # A page that hides most of its text shows it later, by script, or has it in <noscript>.
    hidden = sum(len(text) for text, bits in zip(b.text, b.places) if bits & HIDDEN)
    if 5 * hidden > 4 * sum(map(len, b.text)):
        b.places = [bits & ~HIDDEN for bits in b.places]
    return b


# Words in short blocks that tell what they are for, each cue named by its first.
TEXT_CUES = [words.split() for words in """
© copyright rights reserved; cookie cookies privacy terms gdpr consent;
subscribe newsletter signup email e-mail inbox abonnieren abonner suscríbete donate;
more learn see show view all click continue load read;
share facebook twitter linkedin pinterest whatsapp instagram tweet;
comment comments reply replies respond; login log sign account password register;
related recommended popular trending latest also;
posted published updated by min ago author written;
skip menu navigation search close toggle open; add cart stock buy shipping checkout price sale;
next previous prev page back; contact phone address call tel;
advertisement sponsored ad advertise anzeige werbung publicidad reklama;
kommentare kommentar kommentieren commentaires comentarios komentarze antworten;
mehr lesen auch weitere thema themen lire aussi leer también czytaj więcej leggi anche lees ook;
artikel beitrag article articles artículo post eintrag story
""".split(";")]
TEXT_CUE_BITS = {word: 1 << i for i, words in enumerate(TEXT_CUES) for word in words}
BLOCK_TAGS = ("p div li tr td h1 h2 h3 h4 h5 pre blockquote figcaption button label "
              "section").split()
TAG_NUMBER = {tag: i for i, tag in enumerate(BLOCK_TAGS)} | {"h6": 9, "th": 4}


def describe(b, texts):
    """What the classifier is told about blocks: (names of features, (blocks, features) float32).

    texts: of the blocks, entities resolved and spaces made single. Lengths are in UTF-8 bytes, so
    that they mean about the same in Chinese. The blocks in an element are neighbours, so sums over
    any element are differences of running sums.
    """
    n, f = len(texts), {}
    places = np.array(b.places, np.int64)
    length = np.array([len(t.encode("utf-8", "replace")) for t in texts], np.float64)
    length *= (places & HIDDEN) == 0
    words = np.array([t.count(" ") + 1 for t in texts])
    link = np.minimum(np.array(b.linked) / [max(1, len(t)) for t in texts], 1.0)
    tag = np.array([TAG_NUMBER.get(t, -1) for t in b.tag])
    sentence = np.array([t[-1] in ".!?…。！？\"”’'" for t in texts], np.float64)
    cues = [0] * n
    for i, t in enumerate(texts):
        for word in t.lower().split() if len(t) < 250 else ():
            cues[i] |= TEXT_CUE_BITS.get(word, 0)
    cues = np.array(cues)
    f["log length"] = np.log1p(length)
    f |= {f"words <= {k}": words <= k for k in (3, 8)}
    f |= {f"words >= {k}": words >= k for k in (20, 50)}
    f["ends a sentence"], f["ends in a colon"] = sentence, [t[-1] in ":：" for t in texts]
    f["commas"] = [min(5, t.count(",")) for t in texts]
    f["upper case first"] = [t[0].isupper() for t in texts]
    f["digits"] = [sum(map(t[:60].count, "0123456789")) / len(t[:60]) for t in texts]
    f["linked"], f["all linked"] = link, link > 0.9
    f |= {"says " + cue[0]: cues >> i & 1 for i, cue in enumerate(TEXT_CUES)}
    f |= {"tag " + name: tag == i for i, name in enumerate(BLOCK_TAGS)}
    bits = (places >> np.arange(len(PLACES))[:, None] & 1).astype(np.float64)
    inside = {place[0]: bit for place, bit in zip(PLACES, bits)}

    # The elements around: the one the block lies in, the next that holds more than that, ...
    sums = np.zeros((5, n + 1))
    np.cumsum([length, length * link, length * (tag == 0) * (link < 0.5),
               length * sentence * (link < 0.5) * (length > 60), length > 0], 1, out=sums[:, 1:])
    total, total_sentence = sums[0, -1] + 1, sums[3, -1] + 1
    wider = list(range(len(b.parent)))  # the nearest element around each with more blocks
    for i in range(1, len(wider)):
        up = b.parent[i]
        same = b.first[up] == b.first[i] and b.end[up] == b.end[i]
        wider[i] = wider[up] if same else up
    first, end, wider, at = map(np.array, (b.first, b.end, wider, b.node))
    for level in range(4):
        held, links, paragraphs, sentences, count = sums[:, end[at]] - sums[:, first[at]]
        held, count = held + 1, count + 1
        for name, column in (
            ("linked", links / held), ("in <p>", paragraphs / held),
            ("sentences", sentences / held), ("share of text", held / total),
            ("share of sentences", sentences / total_sentence),
            ("log blocks", np.log(count)), ("log text per block", np.log(held / count)),
        ):
            f[f"around: {name} #{level}"] = column
        at = wider[at]
    for name, column in (("log length", f["log length"]), ("linked", link),
                         ("ends a sentence", sentence)):
        padded = np.concatenate([np.zeros(3), column, np.zeros(3)])
        for i, k in enumerate((-3, -2, -1, 1, 2, 3)):
            f[f"at: {name} #{i}"] = padded[3 + k : 3 + k + n]
    index = np.arange(n)
    for level, k in enumerate((3, 10)):
        held, links, _, sentences, _ = (
            sums[:, np.minimum(index + k + 1, n)] - sums[:, np.maximum(index - k, 0)])
        f[f"within: log text #{level}"] = np.log(held + 1)
        f[f"within: linked #{level}"] = links / (held + 1)
        f[f"within: sentences #{level}"] = sentences / (held + 1)
    f["position"], f["blocks to the end"] = index / n, np.minimum(n - index, 50) / 50
    f["text before"], f["sentences before"] = sums[0, :-1] / total, sums[3, :-1] / total_sentence
    h1 = int((tag == 5).argmax()) if (tag == 5).any() else n
    f["before <h1>"] = (index < h1) & (h1 < n)
    f["after <h1>"] = np.clip(index - h1, 0, 50) / 50

    # The page as a whole, and what that means for this block.
    # A place that holds all of the page tells nothing about a block.
    share = dict(zip(inside, bits @ length / total))
    f |= {"in " + name: bit * (1 - share[name]) for name, bit in inside.items()}
    has_main, has_article = share["<main>"] > 0.05, share["<article>"] > 0.05
    articles = b.node_tag.count("article")
    f["outside of <main>"] = has_main * (1 - inside["<main>"])
    f["outside of <article>"] = has_article * (1 - inside["<article>"])
    f["in the only <article>"] = has_article * (articles == 1) * inside["<article>"]
    page = {"log text": np.log(total), "log sentences": np.log(total_sentence),
            "sentences": total_sentence / total, "linked": sums[1, -1] / total,
            "has <main>": has_main, "has <article>": has_article, "<article> > 3": articles > 3}
    page |= {"in " + name: share[name] for name in (
        "comment post product card thread question docs reply".split())}
    f |= {"page: " + name: np.full(n, value) for name, value in page.items()}
    return list(f), np.stack(list(f.values()), 1).astype(np.float32)


# Weights of the features, learned by `tests/bench_curate.py fit_blocks` (logistic regression).
# Several numbers are the weights of `name #0`, `name #1` and so on.
BLOCK_BIAS = 3.421
BLOCK_WEIGHTS = """
log length -0.07; words <= 3 -0.40; words <= 8 -0.51; words >= 20 0.71; words >= 50 0.16;
ends a sentence 0.35; ends in a colon 0.19; commas 0.05; upper case first -0.03; digits -0.69;
linked -0.72; all linked 0.30; says © -2.46; says cookie -0.79; says subscribe -1.81;
says more -0.27; says share -0.27; says comment -0.65; says login -0.75; says related -0.16;
says posted -0.29; says skip -0.35; says add -0.29; says next -0.44; says contact -0.06;
says advertisement -1.20; says kommentare -8.43; says mehr -0.89; says artikel -1.51; tag p 0.85;
tag div 0.21; tag li 0.91; tag tr 0.75; tag td 1.10; tag h1 -0.58; tag h2 1.05; tag h3 0.87;
tag h4 0.45; tag h5 0.70; tag pre 1.01; tag blockquote 0.30; tag figcaption -0.70;
tag button -0.38; tag label -0.94; tag section -2.21; around: linked -0.25 -0.13 0.28 -0.10;
around: in <p> 0.02 -0.13 0.67 -0.76; around: sentences 0.25 -0.35 0.34 0.49;
around: share of text 1.02 0.42 0.59 0.15; around: share of sentences 0.95 -0.26 -0.15 0.14;
around: log blocks -0.05 -0.09 -0.11 -0.06; around: log text per block -0.02 -0.02 -0.28 -0.04;
at: log length 0.12 0.05 0.08 0.06 0.06 0.06; at: linked -0.16 -0.17 -0.28 -0.37 -0.19 -0.09;
at: ends a sentence -0.19 0.00 0.01 0.16 -0.05 -0.11; within: log text -0.22 -0.21;
within: linked 0.19 -0.21; within: sentences 0.32 0.12; position 1.20; blocks to the end 1.16;
text before -1.76; sentences before -0.48; before <h1> -1.68; after <h1> 0.12; in <nav> 0.34;
in <header> -0.40; in <footer> -1.92; in <aside> -1.25; in <article> -0.33; in <main> -0.28;
in <form> -1.98; in <table> 0.68; in <td> 0.18; in <ul> 0.76; in <dl> -0.09; in <figure> -0.55;
in <blockquote> 0.94; in nav -0.78; in footer -2.60; in header -0.75; in sidebar -1.46;
in widget -1.89; in comment -2.27; in reply 0.44; in post 0.81; in entry 0.96; in article -0.40;
in content 0.03; in main 0.29; in text 0.18; in breadcrumb -0.86; in share -1.93;
in related -2.60; in author -2.67; in date -0.75; in tag -0.25; in cookie -7.36;
in newsletter -3.05; in modal -2.68; in ad -0.10; in copyright -4.63; in login -2.66;
in search -0.35; in pagination -0.94; in toc 1.81; in card -0.30; in product 0.55; in price -0.92;
in review -1.54; in description -0.23; in summary -0.65; in item -0.28; in button -0.48;
in thread -1.26; in question -0.27; in docs -0.64; in event -0.68; in tab 0.07; in top -0.12;
in blog -0.34; in signature -1.71; in caption -2.11; in info -0.95; in gallery -0.66;
in cta -1.20; in headline -0.25; outside of <main> -1.03; outside of <article> -0.68;
in the only <article> 0.62; page: log text 0.14; page: log sentences -0.19; page: sentences -0.60;
page: linked 0.39; page: has <main> 0.28; page: has <article> -0.23; page: <article> > 3 0.26;
page: in comment -0.32; page: in post 0.00; page: in product -0.11; page: in card 0.84;
page: in thread 0.62; page: in question 0.07; page: in docs 1.05; page: in reply -0.25
"""
BLOCK_WEIGHTS = {f"{name} #{i}" if len(weights.split()) > 1 else name: float(weight)
                 for name, weights in re.findall(r"(\S.*?)((?: -?\d+\.\d+)+)(?:;|$)",
                                                 BLOCK_WEIGHTS, re.M)
                 for i, weight in enumerate(weights.split())}


def page_blocks(html):
    """HTML, str or bytes -> (blocks as by `scan`, their texts, of at least one character each)."""
    if isinstance(html, (bytes, bytearray, memoryview)):
        html = decode_page(bytes(html))
    b = scan(html)
    texts = (html_library.unescape(t) if "&" in t else t for t in b.text)
    return b, [" ".join(t.split()) or "-" for t in texts]


def keep_blocks(b, texts, weights=BLOCK_WEIGHTS, bias=BLOCK_BIAS):
    """Which blocks are main text: a sequence of bools."""
    if not texts:
        return []
    names, x = describe(b, texts)
    score = x @ np.array([weights[name] for name in names], np.float32) + bias
    return (score > 0) & ((np.array(b.places) & HIDDEN) == 0)


def extract_text(html: bytes | str) -> str:
    """The main text of a web page: paragraphs, headings, lists, tables and code, an empty line
    between them; without navigation, scripts, hidden parts and the like. "" if there is none.

    <li> become lines that begin with "- ", rows of tables lines with " | " between the cells, and
    <pre> keeps its lines. Any bytes and any broken HTML will do; the time is linear in their
    length.
    """
    b, texts = page_blocks(html)
    out, last = [], ""
    for i in np.flatnonzero(keep_blocks(b, texts)).tolist():
        text, tag = html_library.unescape(b.text[i]), b.tag[i]
        if tag == "pre":
            text = "\n".join(map(str.rstrip, text.strip("\n").expandtabs(4).split("\n")))
        else:
            lines = (" ".join(line.split()) for line in text.split("\v"))
            text = "\n".join(filter(None, lines))
        if tag in ("tr", "td", "th"):
            text, tag = text.strip(" |"), "tr"
        elif tag == "li":
            text = "- " + text
        if text:
            out += "\n" if last == tag and tag in ("li", "tr") else "\n\n", text
            last = tag
    return "".join(out[1:])


# -----------------------------------------------------------------------------
# Classifiers. A text is the set of its n-grams, hashed to rows of a table with a column per class;
# the score of a class is the sum of its column over those rows. This is fastText's bag of hashed
# n-grams (Joulin et al. 2016) without the hidden layer: a row holds how much its n-gram speaks for
# each class. Python's `hash` would not do: it differs from process to process.

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MAX_CLASSIFIED = 20_000  # characters of a text that a classifier looks at
SPACES = bytes(32 if i < 33 else i for i in range(256))
WINDOW = 1 << 16
POWERS = np.cumprod(np.full(WINDOW + 2, MULTIPLIER))  # modulo 2^64, like all that follows
INVERSES = np.cumprod(np.full(WINDOW + 2, pow(int(MULTIPLIER), -1, 1 << 64), np.uint64))


def hash_words(data):
    """Hash the words of bytes, that is, what lies between spaces: (hashes uint64, lengths int64).

    The hash of a word is a polynomial in its bytes. So the hashes of all words are differences of
    one running sum, without a Python step per word. A word longer than WINDOW is cut.
    """
    data, begin = data.translate(SPACES), 0
    hashes, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    while begin < len(data):
        end = begin + WINDOW
        if end < len(data):
            end = data.rfind(b" ", begin, end) + 1 or end
        x = np.frombuffer(b" " + data[begin:end] + b" ", np.uint8)
        total = np.cumsum(x * POWERS[: len(x)], dtype=np.uint64)
        space = np.flatnonzero(x == 32)
        first, last = space[:-1], space[1:] - 1
        word = last > first
        first, last = first[word], last[word]
        hashes.append((total[last] - total[first]) * INVERSES[first])
        lengths.append(last - first)
        begin = end
    h = np.concatenate(hashes) * MULTIPLIER
    return (h ^ (h >> np.uint64(32))) * MULTIPLIER, np.concatenate(lengths)


def ngram_hashes(hashes, n):
    """Hashes of words (words,) uint64 -> of every n words in a row, (max(0, words - n + 1),)."""
    count = max(0, len(hashes) - n + 1)
    out = hashes[:count]
    for i in range(1, n):
        out = out * MULTIPLIER + hashes[i : i + count]
    out = (out ^ (out >> np.uint64(32))) * MULTIPLIER
    return out ^ (out >> np.uint64(29))


def softmax(x):
    """Scores -> probabilities. (n,) -> (n,)"""
    x = np.exp(x - x.max())
    return x / x.sum()


class LinearClassifier:
    """Softmax regression on hashed n-grams of characters and words.

    labels: list of str; table: (2**bits, len(labels)) float32; chars: (shortest, longest) n-gram
    of characters, or (0, 0) for none; words: longest n-gram of words, or 0; scale: of the scores.
    """

    def __init__(self, labels, table, chars=(1, 4), words=0, scale=1.0):
        self.labels, self.table, self.scale = list(labels), table, float(scale)
        self.chars, self.words = tuple(chars), words
        self.shift = np.uint64(65 - len(table).bit_length())  # from hashes to rows of the table

    def rows(self, text):
        """The rows of the table for a text: (n-grams,) int64."""
        text, out = " ".join(text[:MAX_CLASSIFIED].lower().split()), [np.zeros(0, np.uint64)]
        if self.chars[1]:
            codes = np.frombuffer(f" {text} ".encode("utf-32-le", "replace"), "<u4")
            codes = codes.astype(np.uint64)
            h = np.zeros(len(codes), np.uint64)
            for n in range(1, min(self.chars[1], len(codes)) + 1):
                h = (h[: len(codes) - n + 1] + codes[n - 1 :] + np.uint64(n)) * MULTIPLIER
                h ^= h >> np.uint64(29)
                if n >= self.chars[0]:
                    out.append(h * MULTIPLIER)
        if self.words:
            words = " ".join(re.findall(r"[^\W_]+|[^\w\s]", text))
            hashes, _ = hash_words(words.encode("utf-8", "replace"))
            out += [ngram_hashes(hashes, n) for n in range(1, self.words + 1)]
        return (np.concatenate(out) >> self.shift).astype(np.int64)

    @classmethod
    def train(cls, texts, labels, chars=(1, 4), words=0, bits=17, epochs=2, rate=0.02, scale=3.0,
              prior=1.0, seed=0):
        """Learn from texts and their labels: start from `prior` times the logarithms of naive
        Bayes, and continue with stochastic gradient descent, one text at a time, the rate falling
        to 0. Scores are divided by the root of the number of n-grams, lest long texts rule."""
        names = sorted(set(labels))
        if len(names) < 2:
            raise ValueError("a classifier needs examples of two labels or more")
        if not 0 < chars[1] >= chars[0] and not words:
            raise ValueError("a classifier needs n-grams of characters or of words")
        table = np.zeros((1 << bits, len(names)), np.float32)
        model = cls(names, table, chars, words, scale)
        pairs = [(model.rows(text), names.index(label)) for text, label in zip(texts, labels)]
        pairs = [(rows, y) for rows, y in pairs if len(rows)]
        for y in range(len(names)):
            rows = [rows for rows, own in pairs if own == y] or [np.zeros(0, np.int64)]
            table[:, y] = np.bincount(np.concatenate(rows), minlength=len(table))
        table += 0.1
        np.log(table / table.sum(0), out=table)
        table -= table.mean(1, keepdims=True)
        table *= prior
        order, total, done = np.random.RandomState(seed), epochs * len(pairs), 0
        for _ in range(epochs):
            for k in order.permutation(len(pairs)):
                rows, y = pairs[k]
                factor = scale / math.sqrt(len(rows))
                error = softmax(table[rows].sum(0) * factor)
                error[y] -= 1
                table[rows] -= rate * (1 - done / total) * factor * error
                done += 1
        return model

    def probabilities(self, text):
        """(labels,) float32."""
        rows = self.rows(text)
        return softmax(self.table[rows].sum(0, dtype=np.float32) * self.scale
                       / math.sqrt(max(1, len(rows))))

    def predict(self, text):
        """(label, probability) of the likeliest."""
        p = self.probabilities(text)
        best = int(p.argmax())
        return self.labels[best], float(p[best])

    def score(self, text, label):
        """Probability of a label."""
        if label not in self.labels:
            raise ValueError(f"the classifier has no label {label}, but {', '.join(self.labels)}")
        return float(self.probabilities(text)[self.labels.index(label)])

    def save(self, path):
        """One .npz file, with the table in 8 bits."""
        step = max(float(np.abs(self.table).max()), 1e-9) / 127
        table = np.round(self.table / step).astype(np.int8)
        with replacing(path) as file:
            np.savez(file, labels=np.array(self.labels), table=table, chars=np.array(self.chars),
                     words=np.array(self.words), scale=np.array(self.scale * step))

    @classmethod
    def load(cls, path):
        """What `save` wrote. ValueError if it is something else."""
        try:
            with np.load(path, allow_pickle=False) as f:
                labels, table, chars = f["labels"], f["table"], f["chars"].tolist()
                words, scale = int(f["words"]), float(f["scale"])
            first, last = chars
            if (labels.dtype.kind != "U" or table.dtype != np.int8 or table.ndim != 2
                    or table.shape[1:] != labels.shape or len(table).bit_count() != 1
                    or not 0 <= first <= last <= 16 or not 0 <= words <= 16):
                raise ValueError("shapes and types do not fit")
        except (ValueError, KeyError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as e:
            raise ValueError(f"{path} is no classifier of curate.py: {e}") from None
        return cls(labels.tolist(), table, chars, words, scale)


load_classifier = functools.lru_cache(LinearClassifier.load)  # once per process and file

# -----------------------------------------------------------------------------
# Language without a trained classifier: by script, and where languages share one, by letters of
# their own or by stop words. That is enough to keep English, or Chinese, and drop the rest.

# First word of the Unicode name of letters: the most common language that is written in them.
SCRIPTS = {"CJK": "zh", "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "CYRILLIC": "ru",
           "ARABIC": "ar", "GREEK": "el", "HEBREW": "he", "ARMENIAN": "hy", "GEORGIAN": "ka",
           "DEVANAGARI": "hi", "BENGALI": "bn", "GURMUKHI": "pa", "GUJARATI": "gu", "ORIYA": "or",
           "TAMIL": "ta", "TELUGU": "te", "KANNADA": "kn", "MALAYALAM": "ml", "SINHALA": "si",
           "THAI": "th", "LAO": "lo", "TIBETAN": "bo", "MYANMAR": "my", "ETHIOPIC": "am",
           "KHMER": "km", "MONGOLIAN": "mn", "LATIN": "latin"}
OWN_LETTERS = {"ru": {"mn": "өү", "be": "ў", "uk": "іїєґ", "sr": "ђјљњћџ", "ru": "ыэ", "bg": "ъ"},
               "ar": {"ur": "ٹڈڑےں", "fa": "پچژگیک"}}
STOP_WORDS = {line[:2]: set(line[3:].split()) for line in """
en the be to of and that have with is are was in it for you not this on he as at by from we or an
de der die das und ist nicht ein eine ich zu den mit sich auf für im dem von es sie auch wir haben
fr le la les de des et est un une que qui dans en pour pas sur ce il elle au avec ne par nous du a
es el la los las de que y en un una es por con no para su se del lo como más pero al este hemos
it il lo la i gli le di che e è un una per non con si da in sono come più ma del della nel al ha
pt o a os as de que e em um uma é não para com por se do da no na dos das mais como mas ao foi ele
nl de het een en van is dat die in te niet op met voor zijn er aan ook als bij om naar ik je maar
sv och att det som en på är av för med den till inte om ett men har de jag kan var från så vi
da og at det er en af til på der ikke den med de for som et har jeg kan men om var fra sig eller
pl i w na z do się nie to jest że o jak po co za od przez ale dla są tym czy być tak już tylko
tr ve bir bu da de için ile olarak çok daha olan gibi kadar sonra ne var en ya ama değil mi her
fi ja on ei se että oli hän ovat mutta niin kun myös tai joka jos sen ole mitä kuin vain nyt
cs a se na je v že to s z do o i jako pro by jsem ale jsou tak po které už od jeho nebo být když
ro și de la în a cu pe nu este o un că din se pentru mai care sunt au fost sau dar prin ca al
hu a az és hogy nem is egy ez meg van csak de már volt mint vagy még kell ezt nagyon
vi và của là có không được cho một các những với trong người này để khi đã từ như tôi
id yang dan di ini itu dengan untuk tidak dari dalam akan pada ke juga adalah saya ada bisa
""".strip().split("\n")}


def identify_language(text, classifier=None):
    """(ISO 639-1 code, score in [0, 1]) of a text; ("und", 0.0) if it has no letters.

    classifier: a `LinearClassifier` trained on languages; without it, by script and stop words.
    """
    if classifier is not None:
        return classifier.predict(text)
    text, counts = text[:MAX_CLASSIFIED].lower(), collections.Counter()
    for letter, count in collections.Counter(text).items():
        if letter.isalpha():
            script = SCRIPTS.get(unicodedata.name(letter, "-").partition(" ")[0], "und")
            counts[script] += count * (3 if script in ("zh", "ja") else 1)  # as much as 3 letters
    if counts["ja"] > 0.1 * (counts["ja"] + counts["zh"]):  # kana, between Chinese characters
        counts["ja"], counts["zh"] = counts["ja"] + counts["zh"], 0
    letters = sum(counts.values())
    if not letters:
        return "und", 0.0
    script = max(counts, key=counts.get)
    share = counts[script] / letters
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


# -----------------------------------------------------------------------------
# Filter. Each `_reason` function names the rule that a text breaks, or returns None; the function
# of the same name with `_filter` says only whether the text is kept.

GOPHER_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
NO_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f]")
TERMINAL = (".", "!", "?", '"', "'", "”", "’", "。", "！", "？", "…", "」", "؟", "।")
BULLETS = ("- ", "* ", "• ", "‣", "·", "– ", "●", "○", "■", "▪", "►")


def lines_of(text):
    """The lines of a text that are not empty, without the spaces around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]


def first_broken(rules):
    """The name of the first broken rule, or None. rules: {name: whether it is broken}."""
    return next((name for name, broken in rules.items() if broken), None)


def gopher_quality_reason(text, language="en"):
    """The first of Gopher's quality rules (Rae et al. 2021, appendix A) that a text breaks. The
    stop words are for English only. In scripts without spaces a character counts as a word."""
    words, lines = text.split(), lines_of(text)
    dense = len(NO_SPACES.findall(text))
    spaced = dense <= 0.3 * (len(text) - text.count(" "))
    count = len(words) if spaced else dense
    with_letters = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    return first_broken({
        "under 50 words": count < 50,
        "over 100,000 words": count > 100_000,
        "mean word length": spaced and not 3 <= sum(map(len, words)) / max(1, count) <= 10,
        "symbols to words": max(text.count("#"), text.count("...") + text.count("…")) > count / 10,
        "bullets": sum(line.startswith(BULLETS) for line in lines) > 0.9 * len(lines),
        "ellipses": sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines),
        "words without letters": spaced and with_letters < 0.8 * count,
        "stop words": spaced and language == "en" and len(
            GOPHER_STOP_WORDS.intersection(text.lower().split())) < 2,
    })


def gopher_quality_filter(text) -> bool:
    """Whether an English text passes Gopher's quality rules."""
    return gopher_quality_reason(text) is None


def repeated_share(parts):
    """(share of parts that are repetitions of an earlier one, and of their characters)."""
    once, chars = set(parts), sum(map(len, parts))
    return ((len(parts) - len(once)) / max(1, len(parts)),
            (chars - sum(map(len, once))) / max(1, chars))


# Most that may be in the most frequent n-gram (n of 2 to 4), and in repeated ones (n of 5 to 10).
NGRAM_LIMITS = {2: 0.2, 3: 0.18, 4: 0.16, 5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}


def gopher_repetition_reason(text):
    """The first of Gopher's repetition rules (Rae et al. 2021, table A1) that a text breaks, or
    None: shares of lines and paragraphs that repeat an earlier one (0.3, and 0.2 of their
    characters), of characters in the most frequent n-gram of 2 to 4 words (0.2, 0.18, 0.16), and
    in n-grams of 5 to 10 words that occur before (0.15 falling to 0.1)."""
    for name, parts in (("paragraphs", re.split(r"\n\s*\n", text)), ("lines", text.split("\n"))):
        share, chars = repeated_share([part for part in map(str.strip, parts) if part])
        if share > 0.3:
            return f"repeated {name}"
        if chars > 0.2:
            return f"characters in repeated {name}"
    hashes, lengths = hash_words(NO_SPACES.sub(r" \g<0> ", text).encode("utf-8", "replace"))
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for n, limit in NGRAM_LIMITS.items():
        grams = ngram_hashes(hashes, n)
        if not len(grams):
            break
        _, first, *counts = np.unique(grams, return_index=True, return_counts=n < 5)
        if n < 5 and (most := counts[0].max()) > 1:
            # of those that occur most often the one with the most characters
            top = first[counts[0] == most]
            if most * (ends[top + n] - ends[top]).max() > limit * ends[-1]:
                return f"most frequent {n}-gram"
        elif n >= 5:
            # words that lie in any n-gram that is not new, each counted once
            again = np.delete(np.arange(len(grams)), first)
            edges = np.bincount(again, None, len(ends)) - np.bincount(again + n, None, len(ends))
            if lengths[np.cumsum(edges[:-1]) > 0].sum() > limit * ends[-1]:
                return f"repeated {n}-grams"


def gopher_repetition_filter(text) -> bool:
    """Whether a text passes Gopher's repetition rules."""
    return gopher_repetition_reason(text) is None


C4_POLICY = re.compile("javascript|terms of use|(privacy|cookie) policy|uses? cookies|"
                       "use of cookies")


def c4_lines(text):
    """The lines of a text that C4 keeps (Raffel et al. 2020), by the numbers of its released code:
    at least five words, none over 1,000 characters, punctuation at the end, nothing about
    JavaScript, cookies and terms of use. Marks of citations ([1], [edit]) are taken out."""
    def long_enough(line):
        words = line.split()
        return len(words) >= 5 and max(map(len, words)) <= 1000 or \
            len(NO_SPACES.findall(line)) >= 10

    text = re.sub(r"\[(?:\d*|edit|citation needed)\]", "", text)
    return [line for line in lines_of(text) if long_enough(line)
            and line.endswith(TERMINAL) and not line.endswith(("...", "…"))
            and not C4_POLICY.search(line.lower())]


def c4_reason(text):
    """The first of C4's rules for pages that a text breaks, or None. Sentences are counted in the
    lines that C4 keeps."""
    sentences = re.findall(r"[.!?](?=[\s\"'”’)\]]|$)|[。！？।؟]", "\n".join(c4_lines(text)))
    return first_broken({"curly bracket": "{" in text,
                         "lorem ipsum": "lorem ipsum" in text.lower(),
                         "under 3 sentences": len(sentences) < 3})


def c4_filter(text) -> bool:
    """Whether C4's rules keep a page; `c4_lines` gives the lines that they keep of it."""
    return c4_reason(text) is None


def fineweb_reason(text):
    """The first of FineWeb's own rules (Penedo et al. 2024) that a text breaks, or None."""
    lines = lines_of(text)
    short = 12 if NO_SPACES.search(text[:200]) else 30
    return first_broken({
        "empty": not lines,
        "lines without punctuation": sum(x.endswith(TERMINAL) for x in lines) < 0.12 * len(lines),
        "characters in repeated lines": repeated_share(lines)[1] > 0.1,
        "short lines": sum(len(line) < short for line in lines) >= 0.67 * len(lines),
    })


FILTERS = {"gopher": gopher_quality_reason, "repetition": gopher_repetition_reason,
           "c4": c4_reason, "fineweb": fineweb_reason}


@functools.lru_cache
def load_perplexity(path):
    """A checkpoint of train.py -> a function that gives a text's perplexity per token under it,
    over its first block."""
    import torch  # only here: everything else in this file runs without

    from bpe import Tokenizer
    from model import load_checkpoint

    model, checkpoint = load_checkpoint(path)
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{path} has no tokenizer in it")
    tokenizer, size = Tokenizer.from_json(checkpoint["tokenizer"]), model.config.block_size
    model.eval()

    @torch.no_grad()
    def perplexity(text):
        ids = torch.tensor([tokenizer.encode(text[: 20 * size])[: size + 1]])
        if ids.shape[1] < 2:
            return math.inf
        logits = model(ids[:, :-1]).float()
        return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).exp().item()

    return perplexity


# -----------------------------------------------------------------------------
# Mask personal data. A number is masked where its form, or a word before it, says what it is:
# versions, dates, prices, and numbers in prose stay.

EMAIL = re.compile(r"(?<![\w.+%-])[\w][\w.+%'-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
                   r"[^\W\d_]{2,24}(?![\w@])")
PHONE_CUE = re.compile(
    r"(?i)(?:\b(?:phone|telephone|tel|tél|fax|call|contact|mobile|cell|whatsapp|hotline|dial|sms|"
    r"text|ring|toll[- ]free|reach (?:me|us|him|her|them)|(?:my|our|your|his|her|their) (?:\w+ )?"
    r"number)\b|☎|📞|电话|電話|手机)[^\d\n]{0,24}$")
PHONE = re.compile(r"""(?mx)
    (?<![\w.,/$€£\#+-]) (?<!\d[ :=]) (?:
        (?P<world> \+ \d{1,3} (?:[ .-]?\(\d{1,4}\))? (?:[ .-]?\d{1,5}){1,6} )
      | (?P<american> (?:1[ .-]?)? (?: \(\d{3}\)[ -]{0,2} | \d{3}(?P<sep>[ .-]) )
                      \d{3} (?(sep)(?P=sep)|[ .-]?) \d{4} | ^\d{10}$ )
      | \d{10} | \(?0\d{1,4}\)? (?:[ -]?\d{2,8}){1,4} | \d{3}[-.]\d{4} | \d{3,4}[ -]\d{4}
    ) (?! [\w%] | [.,:/-]\d | [ ]\d{3,} | @ )""")
IPV4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}(?:[0-9a-fA-F]{1,4}|(?<=::))(?![\w:]|\.\d)")
VERSION_CUE = re.compile(
    r"(?i)(?:\b(?:v|vers?|versions?|release|build|firmware|revision|rev|update|patch|section|"
    r"chapter|clause|figure|table|appendix|upgrade to|upgraded to|updated to)|§)[.:]?\s*$")
NETWORK_CUE = re.compile(r"(?i)ips?|ipv4|dns|servers?|hosts?|address(es)?|gateway|ping|subnet|"
                         r"router|the|at|from|to|on|via|use|and|or|google|cloudflare|quad9")
PRODUCT_CUE = re.compile(r"\b([A-Z][\w+#.-]*)[ /-]$")


def mask_where(pattern, text, name, is_meant):
    """Replace the matches of pattern that is_meant(match) is true of: (text, how many)."""
    masked = pattern.sub(lambda match: name if is_meant(match) else match.group(), text)
    return masked, masked.count(name) - text.count(name)


def mask_emails(text):
    """(text with e-mail addresses replaced by |||EMAIL_ADDRESS|||, how many)."""
    return EMAIL.subn("|||EMAIL_ADDRESS|||", text) if "@" in text else (text, 0)


def mask_phone_numbers(text):
    """(text with telephone numbers replaced by |||PHONE_NUMBER|||, how many).

    International numbers begin with +, American ones have the form 3-3-4, or are a line of ten
    digits. Ten digits in a row elsewhere, and numbers of other national forms, count only after a
    word such as "call" or "tel".
    """
    def is_phone(match):
        before = text[max(0, match.start() - 60) : match.start()]
        digits = sum(map(str.isdigit, match.group()))
        return 7 <= digits <= (15 if match["world"] else 12) and (
            match["world"] or match["american"] or PHONE_CUE.search(before))

    return mask_where(PHONE, text, "|||PHONE_NUMBER|||", is_phone)


def mask_ips(text):
    """(text with IPv4 and IPv6 addresses replaced by |||IP_ADDRESS|||, how many). Numbers above
    255 are no address; four numbers after "version" and the like, or small ones right after the
    name of a product, are a version."""
    def is_ip(match):
        address, before = match.group(), match.string[max(0, match.start() - 40) : match.start()]
        try:
            ipaddress.ip_address(address)
        except ValueError:
            return False
        if ":" in address:
            return len(address) >= 6 and any(map(str.isdigit, address))
        product = PRODUCT_CUE.search(before)
        version = (product and int(address.split(".")[0]) < 30
                   and not NETWORK_CUE.fullmatch(product.group(1)))
        return not version and not VERSION_CUE.search(before)

    text, v4 = mask_where(IPV4, text, "|||IP_ADDRESS|||", is_ip)
    if "::" not in text and text.count(":") < 7:  # most texts
        return text, v4
    text, v6 = mask_where(IPV6, text, "|||IP_ADDRESS|||", is_ip)
    return text, v4 + v6


# -----------------------------------------------------------------------------
# Documents in files, and work on many files at once.


@contextlib.contextmanager
def replacing(path):
    """A binary file, gzipped if path ends in .gz, that takes the name `path` when it is complete:
    a killed run leaves no half file. Its bytes depend on nothing but what is written."""
    temporary = os.fspath(path) + ".tmp"
    try:
        with open(temporary, "wb") as file:
            if temporary.endswith(".gz.tmp"):
                with (gzip.GzipFile("", "wb", 5, file, mtime=0) as packed,
                      io.BufferedWriter(packed, 1 << 18) as out):
                    yield out
            else:
                yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def to_json(value, indent=None):
    """JSON as bytes, on one line unless indented. Halves of surrogate pairs, which UTF-8 does not
    have, become "?"."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "replace") + b"\n"


def suffix(path):
    """The kind of a file by its name, without .gz: ".jsonl" for a.jsonl.gz."""
    return os.path.splitext(os.path.basename(path).lower().removesuffix(".gz"))[1]


@contextlib.contextmanager
def opened(path, counts):
    """A binary file to read, decompressed if it begins like gzip. Damage ends the block that
    reads, and is counted."""
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if gzipped else open(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile):
            counts["damaged gzip member"] += 1
            warn(f"{path}: damaged gzip member; the rest is skipped")


def read_lines(path, counts, limit=4 * MAX_PAGE):
    """Lines (bytes, with their ends) of a file, but for those longer than limit."""
    with opened(path, counts) as file:
        while line := file.readline(limit):
            if len(line) < limit or line.endswith(b"\n"):
                yield line
                continue
            counts["line too long"] += 1
            warn(f"{path}: line of more than {limit:,} bytes; skipped")
            while line and not line.endswith(b"\n"):
                line = file.readline(limit)


def read_documents(path, counts=None):
    """The documents of a file: dicts with "text" or, if the text is yet to be extracted, "html",
    and "url" where it is known. counts: a Counter for what is skipped, by reason."""
    counts = collections.Counter() if counts is None else counts
    kind = suffix(path)
    if kind in (".warc", ".wet"):
        for record in read_warc(path, counts):
            yield {record.kind: decode_page(record.body, record.charset), "url": record.url}
    elif kind == ".jsonl":
        for number, line in enumerate(read_lines(path, counts), 1):
            document = None
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(line)
            if isinstance(document, dict) and {str} == {
                    type(document[key]) for key in ("text", "html") if key in document}:
                yield document
            elif line.strip():
                counts["bad line"] += 1
                if counts["bad line"] <= 3:
                    warn(f"{path}:{number}: is no JSON object with a text; skipped")
    elif kind in (".html", ".htm", ".xhtml"):
        with opened(path, counts) as file:
            data = file.read(MAX_PAGE + 1)
            if len(data) <= MAX_PAGE:
                yield {"html": decode_page(data), "url": path}
            else:
                counts["page too large"] += 1
    elif kind == ".pdf":
        try:
            import pypdf
        except ImportError:
            raise ValueError(f"{path}: reading .pdf needs pypdf: pip install pypdf") from None
        try:
            pages = [page.extract_text() or "" for page in pypdf.PdfReader(path).pages]
            yield {"text": "\n\n".join(pages), "url": path}
        except Exception as error:  # pypdf raises all kinds of exceptions for damaged files
            counts["damaged PDF"] += 1
            warn(f"{path}: {error}; skipped")
    else:  # .txt and everything else
        parts = []  # of a document
        for line in itertools.chain(read_lines(path, counts), [EOT.encode()]):
            first, *rest = line.decode("utf-8", "replace").replace("\r\n", "\n").split(EOT)
            parts.append(first)
            for part in rest:
                if text := "".join(parts).strip():
                    yield {"text": text}
                parts = [part]


@functools.cache
def warn(message):
    """A line on stderr, the first time."""
    print(f"curate.py: {message}", file=sys.stderr, flush=True)


def start_worker():
    """In a new worker: leave Ctrl-C to the parent, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(function, jobs, workers, what):
    """[function(*job) for job in jobs], over processes, with a progress line on a terminal."""
    start, results = time.monotonic(), []

    def collect(iterator):
        for result in iterator:
            results.append(result)
            if sys.stderr.isatty():
                left = (time.monotonic() - start) * (len(jobs) / len(results) - 1)
                print(f"\r{what}: {len(results):,} of {len(jobs):,}, {left:.0f} s left \x1b[K",
                      file=sys.stderr, end="" if left else "\n", flush=True)
        return results

    if workers <= 1 or len(jobs) <= 1:
        return collect(itertools.starmap(function, jobs))
    context, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(jobs)), context, start_worker)
    try:
        return collect(pool.map(function, *zip(*jobs)))
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError("a worker process was killed: out of memory? The same command continues "
                         "where it was; fewer --workers need less memory") from None
    finally:
        for process in set(multiprocessing.active_children()).difference(others):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


# -----------------------------------------------------------------------------
# Report: what each step kept and why.

EXAMPLES = 5


def text_size(document):
    """UTF-8 bytes of a document's text or, if that is yet to be extracted, HTML."""
    text = document.get("text") or document.get("html") or ""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


class Tally(dict):
    """{step: {documents_in, documents_out, bytes_in, bytes_out, seconds, reasons, kept, dropped}},
    plain values that JSON takes; kept and dropped are examples."""

    def step(self, name):
        """The numbers of a step, zeros at first."""
        return self.setdefault(name, {
            "documents_in": 0, "documents_out": 0, "bytes_in": 0, "bytes_out": 0, "seconds": 0.0,
            "reasons": collections.Counter(), "kept": [], "dropped": []})

    def add(self, name, document, reason=None, after=None, seconds=0.0):
        """Count a document that a step drops for a reason, or keeps, as `after` if it changes."""
        s, size = self.step(name), text_size(document)
        s["documents_in"] += 1
        s["bytes_in"] += size
        s["seconds"] += seconds
        if reason is None:
            s["documents_out"] += 1
            s["bytes_out"] += text_size(after) if after else size
        else:
            s["reasons"][reason] += 1
        examples = s["kept" if reason is None else "dropped"]
        if len(examples) < EXAMPLES:
            text = (after or document).get("text") or document.get("html") or ""
            examples.append({"url": document.get("url", ""), "reason": reason,
                             "text": " ".join(text[:600].split())[:200]})

    @classmethod
    def merge(cls, tallies):
        """The steps of several files as one, with examples from the first files."""
        merged = cls()
        for tally in tallies:
            for name, numbers in tally.items():
                s = merged.step(name)
                s["reasons"].update(numbers["reasons"])
                for key in ("documents_in", "documents_out", "bytes_in", "bytes_out", "seconds"):
                    s[key] += numbers[key]
                for key in ("kept", "dropped"):
                    s[key] = (s[key] + numbers[key])[:EXAMPLES]
        return merged


def write_report(path, inputs, steps, seconds):
    """Write report.json, and print a table."""
    size, last, more = sum(map(os.path.getsize, inputs)), [*steps.values()][-1], 1e5 / len(inputs)
    documents, text_bytes = last["documents_out"], last["bytes_out"]
    at = {"documents": round(documents * more), "text_bytes": round(text_bytes * more),
          "tokens_at_4_bytes": round(text_bytes * more / 4),
          "cpu_hours": round(sum(s["seconds"] for s in steps.values()) * more / 3600, 2)}
    report = {"files": len(inputs), "bytes": size, "seconds": round(seconds, 3),
              "read": steps["read"]["reasons"], "steps": steps, "documents": documents,
              "text_bytes": text_bytes, "at_100000_files": at}
    with replacing(path) as file:
        file.write(to_json(report, indent=1))
    print(f"{'step':<22}{'documents in':>13}{'out':>10}{'kept':>7}{'MB in':>10}{'out':>9}"
          f"{'CPU s':>8}  most frequent reasons")
    for name, s in steps.items():
        most = collections.Counter(s["reasons"]).most_common(3)
        print(f"{name:<22}{s['documents_in']:>13,}{s['documents_out']:>10,}"
              f"{s['documents_out'] / max(1, s['documents_in']):>7.1%}{s['bytes_in'] / 1e6:>10.2f}"
              f"{s['bytes_out'] / 1e6:>9.2f}{s['seconds']:>8.2f}  "
              + ", ".join(f"{reason} {n:,}" for reason, n in most))
    print(f"{len(inputs):,} files, {size / 1e6:,.1f} MB, {seconds:.1f} s; 100,000 files like "
          f"these: {at['documents']:,} documents, {at['text_bytes'] / 1e9:,.1f} GB, "
          f"{at['tokens_at_4_bytes'] / 1e9:,.2f} billion tokens, {at['cpu_hours']:,.1f} CPU hours"
          f"\n{path}: examples of what each step kept and dropped")


# -----------------------------------------------------------------------------
# Deduplicate. Always in three passes: (1) by processes, the units (documents, lines, n-grams) of
# every file become 64-bit hashes, which are spilled to disk; (2) one process finds equal hashes
# and marks units to drop; (3) by processes, the files are written anew without them. A unit's
# number is its place in the corpus, so the first of equals is kept whatever the processes did.
# Pass 2 looks at a range of the hash values at a time, as many as fit into PART numbers: reading
# the spilled file again for every range bounds the memory. Marks are memory-mapped files.

PART = 1 << 24  # hashes held in memory at a time: 128 MB, and three times that while sorting
BATCH = 1 << 16  # numbers read from disk at a time


def stable_hash(data):
    """Bytes, or the str() of anything else -> 64 bits, the same in every process (`hash` of a str
    is not)."""
    data = data if isinstance(data, bytes) else str(data).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def spill_file(path, prefix, names, units, *args):
    """Write the columns of integers that units(path, *args) yields, each to its own file."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(prefix + name, "wb")) for name in names]
        for columns in units(path, *args):
            for file, column in zip(files, columns):
                file.write(np.asarray(column, "<u8").tobytes())


def spill(files, work, workers, names, units, *args):
    """Pass 1. units(path, *args) yields tuples of named columns of integers; the file work/name
    gets that column of all files. Returns where each file's begin: {name: (files + 1,) ints}."""
    prefixes = [os.path.join(work, f"{i}.") for i in range(len(files))]
    jobs = [(path, prefix, names, units, *args) for path, prefix in zip(files, prefixes)]
    run_all(spill_file, jobs, workers, "hash files")
    starts = {name: [0] for name in names}
    for name in names:
        with open(os.path.join(work, name), "wb") as whole:
            for prefix in prefixes:
                with open(prefix + name, "rb") as part:
                    shutil.copyfileobj(part, whole, 1 << 20)
                os.remove(prefix + name)
                starts[name].append(whole.tell() // 8)
    return starts


def hash_ranges(path):
    """Cut the values of the hashes in a file into ranges with about PART of them in each. Per
    range: an iterator of (ids, hashes), arrays in the order of the file; ids are places in it."""
    total = os.path.getsize(path) // 8
    ranges = np.uint64(math.ceil(1.1 * total / PART))

    def hashes_in(r):
        for begin in range(0, total, BATCH):
            x = np.fromfile(path, "<u8", BATCH, offset=8 * begin)
            mine = np.flatnonzero((x >> np.uint64(32)) * ranges >> np.uint64(32) == r)
            yield begin + mine, x[mine]

    return map(hashes_in, range(int(ranges)))


def equal_hashes(path):
    """Find equal hashes in a file. Yields (ids, starts): ids of those that occur more than once,
    equal ones together and in order; starts: where each group begins, with len(ids) at the end."""
    for part in hash_ranges(path):
        ids, values = map(np.concatenate, zip(*part))
        order = np.argsort(values, kind="stable")
        values, ids = values[order], ids[order]
        new = np.ones(len(ids) + 1, bool)  # where a group begins, or the array ends
        new[1:-1] = values[1:] != values[:-1]
        several = ~(new[:-1] & new[1:])
        ids, new = ids[several], new[:-1][several]
        if len(ids):
            yield ids, np.append(np.flatnonzero(new), len(ids))


def running_sums(path):
    """Turn the numbers of a file into their running sums: memory-mapped, (numbers,) int64."""
    if not os.path.getsize(path):
        return np.zeros(0, np.int64)
    sums = np.memmap(path, "<i8", "r+")
    return np.cumsum(sums, out=sums)


class BloomFilter:
    """A set that holds bits only (Bloom 1970): up to `capacity` items, it wrongly claims to hold
    another with probability error_rate. It takes m = -capacity ln error_rate / (ln 2)^2 bits, of
    which an item sets k = m / capacity ln 2: h1 + i h2 mod m (Kirsch and Mitzenmacher 2006)."""

    def __init__(self, capacity, error_rate=0.001):
        if capacity < 1 or not 0 < error_rate < 1:
            raise ValueError("a Bloom filter needs capacity >= 1 and 0 < error_rate < 1")
        self.size = max(64, math.ceil(-capacity * math.log(error_rate) / math.log(2) ** 2))
        self.num_hashes = max(1, round(self.size / capacity * math.log(2)))
        self.bits = np.zeros((self.size + 7) // 8, np.uint8)

    def find(self, hashes):
        """64-bit hashes of items (items,) -> places of their bits: bytes and masks in them, both
        (num_hashes, items), and whether all bits of each are set (items,)."""
        step = ((hashes ^ (hashes >> np.uint64(31))) * MULTIPLIER) >> np.uint64(20) | np.uint64(1)
        size, i = np.uint64(self.size), np.arange(self.num_hashes, dtype=np.uint64)[:, None]
        at = (hashes % size + i * (step % size)) % size
        at, masks = at >> np.uint64(3), np.uint8(1) << (at & np.uint64(7)).astype(np.uint8)
        return at, masks, (self.bits[at] & masks != 0).all(0)

    def add_hashes(self, hashes):
        """Add items by their 64-bit hashes (items,) -> for each whether it was there before, or
        earlier in the same array."""
        hashes = np.asarray(hashes, np.uint64)
        at, masks, seen = self.find(hashes)
        seen[np.delete(np.arange(len(hashes)), np.unique(hashes, return_index=True)[1])] = True
        np.bitwise_or.at(self.bits, at, masks)
        return seen

    def add(self, item):
        """Add a str or bytes -> whether it was there before."""
        return bool(self.add_hashes([stable_hash(item)])[0])

    def __contains__(self, item):
        return bool(self.find(np.array([stable_hash(item)], np.uint64))[2][0])


def output_paths(input_files, output_dir):
    """(inputs, outputs): paths of the same names in output_dir, which is made."""
    input_files = [os.fspath(path) for path in input_files]
    outputs = [os.path.join(output_dir, os.path.basename(path)) for path in input_files]
    if len(set(outputs)) < len(outputs):
        raise ValueError("two inputs have the same name, and so would their outputs")
    if {*map(os.path.abspath, input_files)} & {*map(os.path.abspath, outputs)}:
        raise ValueError(f"{output_dir} is where the inputs are: they would be overwritten")
    os.makedirs(output_dir, exist_ok=True)
    return input_files, outputs


def line_hashes(path):
    """Pass 1 of exact_line_dedup: hashes of the lines of a text file, or of a .jsonl's texts."""
    if suffix(path) == ".jsonl":
        for document in read_documents(path):
            yield ([stable_hash(x) for x in document.get("text", "").split("\n")],)
    else:
        for line in read_lines(path, collections.Counter()):
            yield ([stable_hash(line.rstrip(b"\r\n"))],)


def write_unique_lines(path, out, cut):
    """Pass 3 of exact_line_dedup: the lines that are not marked in cut."""
    kept = (mark == 0 for mark in cut)
    with replacing(out) as file:
        if suffix(path) == ".jsonl":
            for document in read_documents(path):
                lines = document.get("text", "").split("\n")
                lines = [line for line, keep in zip(lines, kept) if keep]
                if lines:
                    file.write(to_json({**document, "text": "\n".join(lines)}))
        else:
            file.writelines(itertools.compress(read_lines(path, collections.Counter()), kept))


def exact_line_dedup(input_files, output_dir, workers=1):
    """Drop every line that occurs more than once in all input files together, each time it occurs,
    and write what is left under the same names to output_dir. Of text files the bytes of lines are
    compared, without their ends; of .jsonl the lines of texts. Memory does not grow with them."""
    inputs, outputs = output_paths(input_files, output_dir)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".lines-") as work:
        starts = spill(inputs, work, workers, ["lines"], line_hashes)["lines"]
        cut = np.memmap(os.path.join(work, "marks"), np.uint8, "w+", shape=max(1, starts[-1]))
        for ids, _ in equal_hashes(os.path.join(work, "lines")):
            cut[ids] = 1
        jobs = list(zip(inputs, outputs, np.split(cut, starts[1:-1])))
        run_all(write_unique_lines, jobs, workers, "write lines")


# Near duplicates (Broder 1997). Two texts are as similar as the sets of their n-grams of words:
# J(A, B) = |A and B| / |A or B|. Of a random order of all n-grams, the first in A and the first in
# B are the same with probability J, so `num_hashes` random orders give a signature that estimates
# it. Cut into b bands of r, two signatures agree in some band with probability 1 - (1 - J^r)^b: an
# S-shaped curve. Pairs that agree are candidates, whose true similarity is computed.

PUNCTUATION = bytes(i for i in range(33, 128) if not chr(i).isalnum())
FOLD = bytes(i + 32 if 65 <= i <= 90 else i for i in range(256))  # lower case, in ASCII
NOT_ASCII = re.compile(r"[^\0-\x7f]+")
NO_WORD = re.compile(r"[^\w\s]")  # accents, too, once they are taken off their letters
MAX_COMPARED = 50  # documents before it in a bucket, that a document is compared with


@functools.lru_cache(1 << 14)
def fold(letters):
    """`normalize` for letters beyond ASCII. In scripts without spaces each is a word."""
    letters = NO_WORD.sub("", unicodedata.normalize("NFD", letters.lower()))
    return NO_SPACES.sub(r" \g<0> ", re.sub(r"\s+", " ", letters))


def normalize(text):
    """Lower case, no accents, no punctuation: UTF-8.

    >>> normalize("Señor  O'Neil, 3.5%!").split()
    [b'senor', b'oneil', b'35']
    """
    if not text.isascii():
        text = NOT_ASCII.sub(lambda match: fold(match.group()), text)
    return text.encode("utf-8", "replace").translate(FOLD, PUNCTUATION)


def shingles(text, n):
    """Hashes of the n-grams of a text's words, (distinct n-grams,) uint64, sorted. A text of fewer
    than n words is one n-gram; one without words has none."""
    words, _ = hash_words(normalize(text))
    hashes = ngram_hashes(words, min(n, max(1, len(words))))
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes


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
    key = (key ^ (key >> np.uint64(31))) * MULTIPLIER
    return key ^ (key >> np.uint64(29))


def jaccard(a, b):
    """Similarity of two sets, sorted arrays of distinct numbers; 0 if one of them is empty."""
    if not len(a) or not len(b):
        return 0.0
    both = np.concatenate([a, b])
    both.sort()
    common = int((both[1:] == both[:-1]).sum())
    return common / (len(both) - common)


def document_grams(path, num_hashes, num_bands, ngram):
    """Pass 1 of minhash_dedup, of each document: keys of bands, hashes of n-grams, how many."""
    if suffix(path) == ".jsonl":
        texts = (document.get("text", "") for document in read_documents(path))
    else:
        texts = [b"".join(read_lines(path, collections.Counter())).decode("utf-8", "replace")]
    for number, text in enumerate(texts):
        grams = shingles(text, ngram)
        if len(grams):
            keys = band_keys(minhash_signature(grams, num_hashes), num_bands)
        else:  # similar to nothing: a key that no other document has
            keys = [stable_hash(f"{path} {number}")] * num_bands
        yield keys, grams, [len(grams)]


def find(parent, x):
    """The least number of the cluster that x is in (union-find). parent: {number: a lesser one of
    the same cluster}, of all that are not the least of theirs."""
    root = x
    while root in parent:
        root = parent[root]
    while x != root:  # so that the way is short the next time
        parent[x], x = root, parent[x]
    return root


def near_duplicates(work, num_bands, threshold):
    """Pass 2 of minhash_dedup: ({document: a similar one before it}, pairs compared)."""
    parent, compared = {}, 0
    ends = running_sums(os.path.join(work, "counts"))

    @functools.lru_cache(256)
    def grams(document):
        begin, end = int(ends[document - 1]) if document else 0, int(ends[document])
        return np.fromfile(os.path.join(work, "sets"), "<u8", end - begin, offset=8 * begin)

    for ids, groups in equal_hashes(os.path.join(work, "keys")):
        documents = (ids // num_bands).tolist()
        for begin, end in zip(groups[:-1].tolist(), groups[1:].tolist()):
            one_cluster = True  # so far, all documents of this bucket are
            for i in range(begin, end):
                root = find(parent, documents[i])
                for other in documents[max(begin, i - MAX_COMPARED) : i]:
                    other_root = find(parent, other)
                    if other_root != root:
                        compared += 1
                        if jaccard(grams(other), grams(documents[i])) >= threshold:
                            root, later = sorted((root, other_root))
                            parent[later] = other_root = root
                    if one_cluster and other_root == root:
                        break
                one_cluster = one_cluster and root == find(parent, documents[begin])
    return parent, compared


def write_kept(path, out, drop):
    """Pass 3 of minhash_dedup: the documents that are not marked in drop. Returns a Tally."""
    tally = Tally()
    if suffix(path) == ".jsonl":
        with replacing(out) as file:
            for document, dropped in zip(read_documents(path), drop.tolist()):
                tally.add("near duplicates", document, "near duplicate" if dropped else None)
                if not dropped:
                    file.write(to_json(document))
    elif not drop[0]:
        shutil.copyfile(path, out)
    return tally


def minhash_dedup(input_files, output_dir, num_hashes=112, num_bands=14, ngram=5, threshold=0.8,
                  workers=1):
    """Keep one of each cluster of near duplicates: the first, in the order of input_files.

    A .jsonl has a document per line, any other file is one. What is kept is written under the same
    name to output_dir. Texts whose sets of `ngram` words have a Jaccard similarity of `threshold`
    or more, truly and not by estimate, are in one cluster, as are those that a chain of such pairs
    connects. Returns {"documents", "duplicates", "compared", "steps": a Tally}.
    """
    if min(num_bands, num_hashes) < 1 or num_hashes % num_bands:
        raise ValueError(f"{num_hashes} hashes can not be cut into {num_bands} equal bands")
    if ngram < 1 or not 0 <= threshold <= 1:
        raise ValueError("MinHash needs ngram >= 1 and 0 <= threshold <= 1")
    inputs, outputs = output_paths(input_files, output_dir)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".minhash-") as work:
        starts = spill(inputs, work, workers, ["keys", "sets", "counts"], document_grams,
                       num_hashes, num_bands, ngram)["counts"]
        duplicates, compared = near_duplicates(work, num_bands, threshold)
        drop = np.memmap(os.path.join(work, "marks"), np.uint8, "w+", shape=max(1, starts[-1]))
        drop[list(duplicates)] = 1
        jobs = list(zip(inputs, outputs, np.split(drop, starts[1:-1])))
        steps = Tally.merge(run_all(write_kept, jobs, workers, "near duplicates"))
    return {"documents": starts[-1], "duplicates": len(duplicates), "compared": compared,
            "steps": steps}


LINE, PARAGRAPH, DOCUMENT = 1, 2, 3  # marks of lines: why each is cut


def document_hashes(path, min_paragraph=100):
    """Pass 1 of dedup_documents, of each document: its hash, the number of its lines, and their
    hashes. The last bit of a line's hash says whether it is a paragraph: min_paragraph bytes long.
    """
    for document in read_documents(path):
        data = document.get("text", "").encode("utf-8", "replace")
        lines = data.split(b"\n")
        yield ([stable_hash(data)], [len(lines)],
               [stable_hash(line) >> 1 << 1 | (len(line) >= min_paragraph) for line in lines])


def write_units(path, out, cut, min_words):
    """Pass 3 of dedup_documents: what is not marked in cut, a mark per line. Returns a Tally."""
    tally, at = Tally(), 0
    with replacing(out) as file:
        for document in read_documents(path):
            lines = document.get("text", "").split("\n")
            lines = list(zip(lines, cut[at : at + len(lines)].tolist()))
            at += len(lines)
            reason = "duplicate" if lines[0][1] == DOCUMENT else None
            tally.add("exact duplicates", document, reason)
            for step, mark in (("repeated lines", LINE), ("repeated paragraphs", PARAGRAPH)):
                if reason:
                    break
                kept = [(line, m) for line, m in lines if m != mark or not line.strip()]
                text = "\n".join(line for line, _ in kept).strip()
                if len(kept) < len(lines) and len(text.split()) < min_words:
                    reason = "too little left"
                elif not text:
                    reason = "empty"
                tally.add(step, document, reason, {**document, "text": text})
                tally[step]["reasons"].update(["lines"] * (len(lines) - len(kept)))
                lines, document = kept, {**document, "text": text}
            if not reason:
                document["text"] = re.sub(r"\n{3,}", "\n\n", document["text"])
                file.write(to_json(document))
    return tally


def dedup_documents(files, output_dir, workers=1, max_line_repeats=5, paragraph_error_rate=0.001,
                    min_words=50):
    """Drop documents that occurred before; lines that occur in more than max_line_repeats places
    (menus, licences: each time; 0: keep them); and paragraphs, which are lines of 100 bytes or
    more, that a Bloom filter of paragraph_error_rate says have occurred before (0: keep them).

    files: .jsonl or .jsonl.gz, written under the same names. Documents that lose lines and have
    fewer than min_words words left go, too. Returns a Tally of these steps.
    """
    inputs, outputs = output_paths(files, output_dir)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".dedup-") as work:
        names = ["documents", "counts", "lines"]
        starts = spill(inputs, work, workers, names, document_hashes)["lines"]
        documents, counts, lines = (os.path.join(work, name) for name in names)
        total, ends = starts[-1], running_sums(counts)
        cut = np.memmap(os.path.join(work, "marks"), np.uint8, "w+", shape=max(1, total))
        for ids, groups in equal_hashes(documents):
            for i in np.delete(ids, groups[:-1]):  # their lines do not count in what follows
                cut[ends[i - 1] if i else 0 : ends[i]] = DOCUMENT
        for ids, groups in equal_hashes(lines) if max_line_repeats else ():
            alive = cut[ids] == 0
            often = np.add.reduceat(alive, groups[:-1], dtype=np.int64) > max_line_repeats
            cut[ids[np.repeat(often, np.diff(groups)) & alive]] = LINE
        for part in hash_ranges(lines) if paragraph_error_rate else ():
            seen = BloomFilter(min(PART, total), paragraph_error_rate)
            for ids, hashes in part:
                mine = (hashes & np.uint64(1) == 1) & (cut[ids] == 0)
                cut[ids[mine][seen.add_hashes(hashes[mine] >> np.uint64(1))]] = PARAGRAPH
        jobs = [(*job, min_words) for job in zip(inputs, outputs, np.split(cut, starts[1:-1]))]
        return Tally.merge(run_all(write_units, jobs, workers, "unique"))


# -----------------------------------------------------------------------------
# Decontaminate: what a model will be tested on must not be in its training text. A document is
# dropped if it shares an n-gram of words with a test (Brown et al. 2020, with n = 13). A test of
# fewer words, but at least 8, is looked for as a whole.


def strings_in(value):
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def read_tests(path):
    """The strings of a test set: of .jsonl or .json values, .csv cells, or lines of text."""
    text = b"".join(read_lines(path, collections.Counter())).decode("utf-8", "replace")
    kind, number = suffix(path), 0
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(text)) if kind == ".csv" else \
        [text] if kind == ".json" else text.splitlines()
    try:
        for number, row in enumerate(rows, 1):
            is_json = kind in (".json", ".jsonl") and row.strip()
            yield from strings_in(json.loads(row) if is_json else row)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}:{number}: {error}") from None


@functools.lru_cache(1)
def test_ngrams(paths, n, least=8):
    """{length: sorted hashes of n-grams of that many words} of test sets."""
    found = collections.defaultdict(list)
    for text in itertools.chain.from_iterable(map(read_tests, paths)):
        words, _ = hash_words(normalize(text))
        length = min(n, len(words))
        if length >= min(n, least):
            found[length].append(ngram_hashes(words, length))
    return {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}


def contaminated(text, ngrams):
    """Whether a text has one of the n-grams of `test_ngrams`."""
    words, _ = hash_words(normalize(text))
    return any(np.isin(ngram_hashes(words, length), known).any()
               for length, known in ngrams.items())


# -----------------------------------------------------------------------------
# Mix sources.


def learn_weights(sources, target, pieces=2000, rounds=100):
    """Weights of sources for text like `target`, by a small proxy run: a classifier learns to tell
    pieces of the sources apart, and the weights are the mixture of sources that makes its verdicts
    on pieces of target likeliest (expectation maximization: Saerens et al. 2002).

    sources: {name: [paths]}; target: [paths]; pieces: of 50 words each. Returns {name: weight}.
    """
    def cut(paths):
        """The first pieces of documents."""
        words = (d.get("text", "").split() for path in paths for d in read_documents(path))
        parts = (" ".join(w[i : i + 50]) for w in words for i in range(0, len(w), 50))
        return list(itertools.islice(parts, pieces))

    examples, aim = {name: cut(sources[name]) for name in sorted(sources)}, cut(target)
    if not all([aim, *examples.values()]):
        raise ValueError("--target, or a source, has no text")
    if len(sources) == 1:
        return dict.fromkeys(sources, 1.0)
    pairs = [(text, name) for name, texts in examples.items() for text in texts]
    model = LinearClassifier.train(*zip(*pairs))
    p = np.array([model.probabilities(text) for text in aim])
    weights = np.full(len(model.labels), 1 / len(model.labels))
    for _ in range(rounds):
        share = weights * p
        weights = (share / share.sum(1, keepdims=True)).mean(0)
    return dict(zip(model.labels, weights.tolist()))


def mix(sources, output_dir, weights, budget=None, max_epochs=4):
    """Write mixed.jsonl.gz: documents from sources in turn, so that bytes of text are at any time
    as weights say. Returns {name: {"weight", "bytes", "documents", "epochs"}}.

    sources: {name: [paths]}; weights: {name: share}; budget: bytes of text. Without it, one source
    is used up; with it, sources are repeated, max_epochs times at most (after four, repetition is
    worth little: Muennighoff et al. 2023), and one that is used up leaves its share to the others.
    """
    total = sum(weights.values())
    if set(weights) != set(sources) or min(weights.values()) < 0 or not 0 < total < math.inf:
        raise ValueError("weights must be finite, 0 or more, not all of them 0, and name all "
                         "sources: " + ", ".join(sorted(sources)))
    given = {name: {"weight": weights[name] / total, "bytes": 0, "documents": 0, "epochs": 0}
             for name in sources if weights[name] / total > 0}

    def stream(name):
        for epoch in range(1, 1 + (max_epochs if budget else 1)):
            given[name]["epochs"] = epoch
            for path in sources[name]:
                yield from (d for d in read_documents(path) if d.get("text"))

    def behind(name):  # least for the source that is furthest behind its share
        return given[name]["bytes"] / given[name]["weight"], -given[name]["weight"], name

    streams, written = {name: stream(name) for name in given}, 0
    os.makedirs(output_dir, exist_ok=True)
    with replacing(os.path.join(output_dir, "mixed.jsonl.gz")) as file:
        while streams and (budget is None or written < budget):
            name = min(streams, key=behind)
            document = next(streams[name], None)
            if document is None and budget is None:
                break
            if document is None:
                del streams[name]
                continue
            file.write(to_json({**document, "source": name}))
            given[name]["bytes"] += text_size(document)
            given[name]["documents"] += 1
            written += text_size(document)
    if not written:
        raise ValueError("there is nothing to mix: the sources have no documents")
    return given


# -----------------------------------------------------------------------------
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
        reason = None
        if o["languages"] and code not in o["languages"]:
            reason = f"language {code}"
        elif o["languages"] and score < o["min_language_score"]:
            reason = "language unsure"
        yield "language", reason

    if "filter" in o["steps"]:
        for name in o["filters"]:
            rest = [document.get("language", "en")] if name == "gopher" else []
            yield name, FILTERS[name](document["text"], *rest)
        for name in ("quality", "toxicity", "nsfw"):
            if o[name]:
                path, label, limit = o[name]
                score = load_classifier(path).score(document["text"], label)
                document[name] = score = round(score, 4)
                good = score >= limit if name == "quality" else score <= limit
                yield name, None if good else name
        if o["perplexity"]:
            path, limit = o["perplexity"]
            document["perplexity"] = round(load_perplexity(path)(document["text"]), 2)
            yield "perplexity", None if document["perplexity"] <= limit else "perplexity"

    if "mask" in o["steps"]:
        found = {}
        for kind, function in (("email", mask_emails), ("phone", mask_phone_numbers),
                               ("ip", mask_ips)):
            document["text"], count = function(document["text"])
            if count:
                found[kind] = count
                document["masked"] = found
        yield "mask", None

    if "decontaminate" in o["steps"] and o["evals"]:
        ngrams = test_ngrams(tuple(o["evals"]), o["eval_ngram"])
        yield "decontaminate", "in a test set" if contaminated(document["text"], ngrams) else None


def process_file(path, out, o):
    """All steps on single documents, for a file. Returns a Tally, from `out`.tally.json if it was
    done before."""
    done = out + ".tally.json"
    if not os.path.exists(done):
        tally, counts = Tally(), collections.Counter()
        with replacing(out) as file:
            last = time.process_time()
            for document in read_documents(path, counts):
                before = dict(document)
                for name, reason in apply_steps(document, o):
                    now = time.process_time()
                    after = document if document != before else None
                    tally.add(name, before, reason, after, now - last)
                    if document.get("masked") is not before.get("masked"):
                        tally[name]["reasons"].update(document["masked"])
                    if reason is not None:
                        break
                    before, last = dict(document), now
                else:
                    file.write(to_json(document))
        tally.step("read")["reasons"].update(counts)
        with replacing(done) as file:
            file.write(to_json(tally))
    with open(done, "rb") as file:
        return json.load(file)


def find_inputs(patterns):
    """Paths for arguments that may be files, patterns or folders (all files in them)."""
    paths = []
    for pattern in patterns:
        folder = os.path.join(glob.escape(pattern), "*")
        found = [pattern] if os.path.isfile(pattern) else sorted(
            glob.glob(folder if os.path.isdir(pattern) else pattern))
        found = [p for p in found if os.path.isfile(p) and not p.endswith((".tmp", "report.json"))]
        if not found:
            raise ValueError(f"there is no file {pattern}")
        paths += found
    return paths


def run_pipeline(o, workers):
    """Read the inputs, apply the steps, and leave documents and report.json in o["out"].

    State is files: each stage has a folder in out/.work, with a file per input that takes its name
    when it is complete. A run that was killed finds them, and continues where they end.
    """
    start, out, inputs = time.monotonic(), o["out"], find_inputs(o["input"])
    work, report = os.path.join(out, ".work"), os.path.join(out, "report.json")
    state_path = os.path.join(work, "state.json")
    os.makedirs(work, exist_ok=True)
    state = to_json({**o, "files": [[path, os.path.getsize(path)] for path in inputs]})
    if os.path.exists(state_path):
        with open(state_path, "rb") as file:
            if file.read() != state:
                raise ValueError(f"{out} holds a run with other inputs or settings: give another "
                                 "--out, or delete it")
    elif glob.glob(os.path.join(glob.escape(out), "*.jsonl.gz")):
        raise ValueError(f"{out} already holds documents: give another --out, or delete it")
    if os.path.exists(report):
        print(f"{out} is complete: report.json is there")
        return
    collections.deque(apply_steps({"text": "-"}, o))  # what is wrong with the options comes up now
    with replacing(state_path) as file:
        file.write(state)

    names = []  # of outputs: those of inputs, after a number that keeps equal ones apart
    for i, path in enumerate(inputs):
        stem = re.sub(r"^\d{5}-", "", os.path.basename(path))
        stem = re.sub(r"(?i)(\.(gz|warc|wet|jsonl|x?html?|txt|pdf))+$", "", stem)
        names.append(f"{i:05d}-{stem}.jsonl.gz")
    stages, files, steps = ["documents"], inputs, Tally()
    if "dedup" in o["steps"]:
        stages += ["unique"] if o["threshold"] > 1 else ["unique", "distinct"]
    for stage in stages:
        folder = os.path.join(work, stage)
        outputs = [os.path.join(folder, name) for name in names]
        os.makedirs(folder, exist_ok=True)
        done = os.path.join(folder, "done.json")
        if not os.path.exists(done):
            before = sum(os.times()[:4])  # CPU seconds of this process and its workers
            if stage == "documents":
                jobs = [(path, output, o) for path, output in zip(files, outputs)]
                tally = Tally.merge(run_all(process_file, jobs, workers, stage))
            elif stage == "unique":
                tally = dedup_documents(files, folder, workers, o["max_line_repeats"],
                                        o["paragraph_error_rate"])
            else:
                tally = minhash_dedup(files, folder, o["num_hashes"], o["num_bands"], o["ngram"],
                                      o["threshold"], workers)["steps"]
            if tally and stage != "documents":
                next(iter(tally.values()))["seconds"] = sum(os.times()[:4]) - before
            with replacing(done) as file:
                file.write(to_json(tally))
        with open(done, "rb") as file:
            steps.update(json.load(file))
        files = outputs
    for path in files:  # complete: move the results out of the work folder, and remove it
        if os.path.exists(path):
            os.replace(path, os.path.join(out, os.path.basename(path)))
    write_report(report, inputs, steps, time.monotonic() - start)
    for stage in stages:
        shutil.rmtree(os.path.join(work, stage))


def make_crawl(path):
    """A WARC file to try things on without a network: the language reference that comes with
    Python (pydoc_data), a page for each topic, with a menu and a footer; and a near copy of every
    third page."""
    from pydoc_data.topics import topics

    names = sorted(topics)
    menu = "".join(f'<li><a href="/{name}">{name}</a></li>' for name in names)
    pages = [(name, topics[name]) for name in names]
    pages += [(f"copy/{name}", topics[name] + "\n\nThis is a copy.") for name in names[::3]]
    with replacing(path) as file:
        for name, text in pages:
            parts = (html_library.escape(part) for part in text.split("\n\n"))
            body = "".join(f"<pre>{part}</pre>" if part.startswith("   ") else f"<p>{part}</p>"
                           for part in parts)
            response = ("HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"
                        f"<html lang=en><body><nav>{menu}</nav><main>{body}</main>"
                        "<footer>The Python Software Foundation</footer></body></html>").encode()
            file.write(b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://docs.example/"
                       b"%b\r\nContent-Type: application/http; msgtype=response\r\n"
                       b"Content-Length: %d\r\n\r\n%b\r\n\r\n" % (
                           name.encode(), len(response), response))


def run_classifier(args):
    """`train-classifier`: learn from examples, save, and measure on every twentieth."""
    examples = []  # (text, label)
    for label, pattern in args.examples:
        for path in find_inputs([pattern]):
            if suffix(path) == ".txt":
                lines = read_lines(path, collections.Counter())
                texts = (line.decode("utf-8", "replace") for line in lines)
            else:
                texts = (d["text"] if "text" in d else extract_text(d["html"])
                         for d in read_documents(path))
            examples += [(text, label) for text in texts if text.strip()]
    test = np.random.RandomState(0).rand(len(examples)) < 0.05
    if test.all():
        raise ValueError("there are no examples to learn from")
    start = time.monotonic()
    model = LinearClassifier.train(*zip(*itertools.compress(examples, ~test)), args.chars,
                                   args.words, args.bits, args.epochs)
    spent = time.monotonic() - start
    model.save(args.out)
    model = LinearClassifier.load(args.out)
    print(f"{args.out}: {len(model.labels)} labels, {(~test).sum():,} examples, {spent:.1f} s, "
          f"{os.path.getsize(args.out) / 1e6:.1f} MB")
    right = [model.predict(text)[0] == label for text, label in itertools.compress(examples, test)]
    if right:
        print(f"accuracy: {sum(right) / len(right):.4f} on {len(right):,} held-out examples")


def run_mix(args):
    """`mix`: draw documents from sources by their shares."""
    sources = collections.defaultdict(list)
    for name, pattern in args.input:
        sources[name] += find_inputs([pattern])
    if args.weights:
        weights = dict(args.weights)
    elif args.target:
        weights = learn_weights(sources, find_inputs(args.target))
    else:
        sizes = {name: sum(text_size(d) for path in paths for d in read_documents(path))
                 for name, paths in sources.items()}
        most = max(1, *sizes.values())  # large numbers to large powers are too large for a float
        weights = {name: (size / most) ** (1 / args.temperature) for name, size in sizes.items()}
    budget = args.tokens and 4 * args.tokens  # bytes
    given = mix(sources, args.out, weights, budget, args.max_epochs)
    with replacing(os.path.join(args.out, "report.json")) as file:
        file.write(to_json(given, indent=1))
    for name, g in given.items():
        print(f"{name:<20} weight {g['weight']:.4f}  {g['documents']:>10,} documents  "
              f"{g['bytes'] / 1e6:>10.2f} MB  epoch {g['epochs']}")
    if budget and sum(g["bytes"] for g in given.values()) < budget:
        warn(f"the sources are used up after --max_epochs {args.max_epochs}, before --tokens")


# -----------------------------------------------------------------------------
# The command line.

COMMANDS = {  # what each does, and its steps
    "pipeline": ("all of it", ["extract", "language", "filter", "mask", "decontaminate", "dedup"]),
    "read": ("pages of WARC files to .jsonl.gz with their HTML", []),
    "extract": ("HTML to main text", ["extract"]),
    "language": ("identify it, and keep some", ["language"]),
    "filter": ("drop bad text by rules and classifiers", ["filter"]),
    "mask": ("e-mail addresses, phone numbers, IP addresses", ["mask"]),
    "decontaminate": ("drop what has parts of test sets", ["decontaminate"]),
    "dedup": ("documents, lines, paragraphs, near duplicates", ["dedup"]),
}


def number(kind, low=0, high=math.inf):
    """A type for argparse: an int or a float from low to high, and finite."""
    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # for argparse's own messages
    return read


def fields(form, last=str):
    """A type for argparse: text of a form such as NAME=FILE or FILE:LABEL:NUMBER -> a tuple.
    last: the type of its end."""
    def read(text):
        count = form.count(":")
        parts = text.rsplit(":", count) if count else text.split("=", 1)
        if len(parts) < max(2, count + 1) or not all(parts):
            raise ValueError
        return (*parts[:-1], last(parts[-1]))

    read.__name__ = form  # for argparse's own messages
    return read


def build_parser():
    """The command line: a parser for each step."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name, about):
        help_format = argparse.ArgumentDefaultsHelpFormatter
        return commands.add_parser(name, help=about, formatter_class=help_format).add_argument

    share, count, some = number(float, 0, 1), number(int), number(int, 1)
    for name, (about, steps) in COMMANDS.items():
        add = command(name, about)
        add("--input", nargs="+", required=True, metavar="FILE",
            help=".warc .wet .html .txt .jsonl (also .gz), .pdf, patterns, folders")
        add("--out", required=True, metavar="DIR", help="for .jsonl.gz and report.json")
        add("--workers", type=some, default=os.cpu_count() or 1,
            help="processes; the output does not depend on their number")
        if "language" in steps:
            add("--languages", nargs="*", default=["en"], help="to keep; none given: all")
            add("--min_language_score", type=share, default=0.5, help="drop what is less certain")
            add("--language_model", help="of train-classifier; default: script and stop words")
        if "filter" in steps:
            add("--filters", nargs="*", default=["gopher", "repetition", "fineweb"],
                choices=list(FILTERS), help="rules")
            for model, limit in (("quality", "least"), ("toxicity", "most"), ("nsfw", "most")):
                add(f"--{model}", type=fields("FILE:LABEL:NUMBER", share), metavar="FILE:LABEL:P",
                    help=f"classifier, label, and {limit} probability of it to keep")
            add("--perplexity", type=fields("FILE:NUMBER", number(float)), metavar="CKPT:MAX",
                help="drop what a checkpoint of train.py finds less likely")
        if "decontaminate" in steps:
            needed = name == "decontaminate"
            add("--evals", nargs="+" if needed else "*", default=[], required=needed,
                metavar="FILE", help="test sets: .jsonl .json .csv, or lines of .txt")
            add("--eval_ngram", type=some, default=13, help="words in a row that tell a test")
        if "dedup" in steps:
            add("--max_line_repeats", type=count, default=5, help="of lines kept; 0: any number")
            add("--paragraph_error_rate", type=number(float, 0, 0.5), default=0.001,
                help="of the Bloom filter that drops repeated paragraphs; 0: keep them")
            add("--threshold", type=number(float), default=0.8,
                help="Jaccard similarity of near duplicates; above 1: keep them")
            add("--ngram", type=some, default=5, help="words in a row, for MinHash")
            add("--num_hashes", type=some, default=112, help="of MinHash")
            add("--num_bands", type=some, default=14, help="to cut the hashes into")

    add = command("mix", "sources by weight, temperature or token budget")
    add("--input", nargs="+", type=fields("NAME=FILE"), required=True, metavar="NAME=FILE",
        help="sources; a name may come more than once")
    add("--out", required=True, metavar="DIR", help="for mixed.jsonl.gz and report.json")
    add("--weights", nargs="+", type=fields("NAME=NUMBER", number(float)), metavar="NAME=SHARE",
        help="shares of the bytes")
    add("--target", nargs="+", metavar="FILE", help="learn the weights, for text like this")
    add("--temperature", type=number(float, 1e-3), default=1.0,
        help="T: without weights or target, shares are size^(1/T)")
    add("--tokens", type=number(float, 1), help="in all, of 4 bytes each; sources repeat")
    add("--max_epochs", type=some, default=4, help="of a source")

    add = command("train-classifier", "of languages, quality, toxicity, ...")
    add("--examples", nargs="+", type=fields("LABEL=FILE"), required=True, metavar="LABEL=FILE",
        help="a text per line of .txt, or per document of other files")
    add("--out", required=True, metavar="FILE", help=".npz")
    add("--chars", type=number(int, 0, 16), nargs=2, default=(1, 4), metavar=("MIN", "MAX"),
        help="lengths of n-grams of characters; 0 0: none")
    add("--words", type=number(int, 0, 16), default=0,
        help="longest n-gram of words; 2 is good for quality and toxicity")
    add("--bits", type=number(int, 1, 26), default=17, help="of the hash")
    add("--epochs", type=count, default=2, help="of gradient descent")
    return parser


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    parser = build_parser()
    crawl = os.path.join("data", "crawl.warc.gz")
    args = parser.parse_args(sys.argv[1:] or [
        "pipeline", "--input", crawl, "--out", os.path.join("data", "corpus")])
    if args.command in ("dedup", "pipeline") and args.num_hashes % args.num_bands:
        parser.error(f"--num_hashes {args.num_hashes} can not be cut into {args.num_bands} equal "
                     "bands")
    for signum in (signal.SIGINT, signal.SIGTERM):  # both raise KeyboardInterrupt
        signal.signal(signum, signal.default_int_handler)
    try:
        if len(sys.argv) == 1 and not os.path.exists(crawl):
            os.makedirs("data", exist_ok=True)
            make_crawl(crawl)
        if args.command == "mix":
            run_mix(args)
        elif args.command == "train-classifier":
            run_classifier(args)
        else:
            options = {**vars(args), "steps": COMMANDS[args.command][1]}
            run_pipeline(options, options.pop("workers"))
    except KeyboardInterrupt:
        print("\ncurate.py: stopped; give the same command to go on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"curate.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
