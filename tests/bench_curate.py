"""
curate.py beside the tools people use, on the same data. Run by hand:

    pip install trafilatura lxml_html_clean datasketch lingua-language-detector fasttext-wheel ray
    D=../shared/data
    python tests/bench_curate.py extract --wcxb $D/html/wcxb --readability $D/html/mozilla_readability
    python tests/bench_curate.py minhash --documents $D/web/c4_sample.jsonl
    python tests/bench_curate.py language --languages $D/langid
    python tests/bench_curate.py toxicity --davidson $D/toxicity/davidson.csv
    python tests/bench_curate.py pipeline --wcxb $D/html/wcxb
    python tests/bench_curate.py ray --wcxb $D/html/wcxb
    python tests/bench_curate.py experiment --wcxb $D/html/wcxb --wikitext $D/wikitext2

and, to learn the weights of main text anew from pages with known main text (prints the tables for
curate.py, and F1 by 5-fold cross-validation, sites kept together):

    python tests/bench_curate.py fit --wcxb $D/html/wcxb --readability $D/html/mozilla_readability \\
        --segments TRAFILATURA/tests --news ARTICLE-EXTRACTION-BENCHMARK

wcxb and news (github.com/scrapinghub/article-extraction-benchmark) are folders with
ground-truth.json and html/*.html.gz; readability the test pages of Mozilla's Readability; segments
the folder `tests` of trafilatura's repository, pages with texts that must and must not be found:
fit learns from those of one half of the sites, and both measure on the other. News is never learned
from. Speeds are per CPU-second of one thread. Peers that are not installed are skipped.
"""

import argparse
import collections
import csv
import filecmp
import glob
import gzip
import hashlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from urllib.parse import urlparse

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import curate as C

WORD = re.compile(r"\w+")
OTHERS = ["readability", "segments", "news"]  # kinds outside of wcxb


def hash_of(site):
    return int(hashlib.md5(site.encode()).hexdigest(), 16)


def load_pages(args, learn=False):
    """(site, kind, html bytes, gold text) of all pages given; of segments, gold is (texts wanted,
    texts not wanted). learn: those to learn from, of Readability without captions."""
    for kind, folder in (("wcxb", args.wcxb), ("news", not learn and args.news)):
        truth = json.load(open(os.path.join(folder, "ground-truth.json"))) if folder else {}
        for key, entry in truth.items():
            with gzip.open(os.path.join(folder, "html", f"{key}.html.gz")) as file:
                site, html = urlparse(entry["url"]).netloc.removeprefix("www."), file.read()
            if kind == "news":
                yield site, kind, html, entry["articleBody"]
            else:
                yield (site, entry["_internal"]["page_type"]["primary"], html,
                       entry["ground_truth"].get("main_content") or "")
    for folder in sorted(glob.glob(os.path.join(args.readability or "-", "*", ""))):
        with open(folder + "source.html", "rb") as file, open(folder + "expected.html") as gold:
            gold = re.sub(r"(?is)<figcaption.*?</figcaption>", " ", gold.read()) if learn else \
                gold.read()
            yield folder, "readability", file.read(), all_text(gold)
    truth = json.load(open(os.path.join(args.segments, "evaldata.json"))) if args.segments else {}
    for url, entry in truth.items():
        site = urlparse(url).netloc.removeprefix("www.")
        paths = [os.path.join(args.segments, name, entry["file"]) for name in ("eval", "cache")]
        path = next(filter(os.path.exists, paths), None)
        if path and hash_of(site) // 7 % 2 == (not learn):
            with open(path, "rb") as file:
                yield site, "segments", file.read(), (entry["with"], entry["without"])


def blocks_of(html):
    """(blocks, elements, texts) as extract_text has them."""
    blocks, elements = C.scan(html if isinstance(html, str) else C.decode_page(html))
    return blocks, elements, [" ".join(C.clean(b[0]).split()) or "-" for b in blocks]


def all_text(html):
    """All text of a page, a line per block, as a WET file has it."""
    return "\n".join(blocks_of(html)[2])


def score_text(text, gold):
    """F1 of the multisets of words, or of segments the numbers of hits, false hits and misses."""
    if not isinstance(gold, str):
        hits, false_hits = (sum(part in text for part in parts) for parts in gold)
        return np.array([hits, false_hits, len(gold[0]) - hits])
    a, b = (collections.Counter(WORD.findall(t.lower())) for t in (text, gold))
    return 2 * sum((a & b).values()) / max(1, sum(a.values()) + sum(b.values())) if a or b else 1.0


def show_scores(name, scores):
    """Means of lists of what `score_text` gave, by kind."""
    wcxb = [s for kind in scores if kind not in OTHERS for s in scores[kind]]
    rows = {"wcxb": wcxb, **dict(sorted(scores.items()))}
    out = []
    for kind, found in rows.items():
        if found and np.ndim(found[0]):
            hits, false_hits, misses = sum(found)
            found = [2 * hits / (2 * hits + false_hits + misses)]
        out += [f"{kind} {statistics.mean(found):.4f}"] if found else []
    print(f"{name:<28}" + "  ".join(out), flush=True)


def extract(args):
    import logging
    logging.disable(logging.CRITICAL)
    pages, found = list(load_pages(args)), {"curate.py": C.extract_text}
    try:
        import trafilatura
        found["trafilatura"] = lambda h: trafilatura.extract(h, include_comments=False) or ""
    except ImportError:
        print("trafilatura is not installed")
    for name, function in found.items():
        scores, seconds = collections.defaultdict(list), 0.0
        for _, kind, html, gold in pages:
            start = time.process_time()
            text = function(html)
            seconds += time.process_time() - start
            scores[kind].append(score_text(text, gold))
        show_scores(f"{name} {len(pages) / seconds:.0f} pages/CPU-s", scores)


def label_blocks(texts, length, gold):
    """For each block, whether most of its 3-grams of words (or it, if shorter) are in the gold;
    and how much it counts, 1 in all for a page. Of segments only blocks that hold one count."""
    if not isinstance(gold, str):
        labels, weight = np.zeros(len(texts), bool), np.zeros(len(texts))
        for label, part in [(1 - i, p) for i in (1, 0) for p in gold[i]]:
            found = [i for i, text in enumerate(texts) if " ".join(part.split()) in text]
            if len(found) <= 3:
                labels[found] = label
                weight[found] += 2 / max(1, len(found)) / sum(map(len, gold))
        return labels, weight
    words, labels = WORD.findall(gold.lower()), []
    trigrams, whole = set(zip(words, words[1:], words[2:])), f" {' '.join(words)} "
    for own in (WORD.findall(text.lower()) for text in texts):
        grams = list(zip(own, own[1:], own[2:]))
        labels.append(sum(g in trigrams for g in grams) / len(grams) if len(grams) > 1 else
                      float(bool(own) and f" {' '.join(own)} " in whole))
    return np.array(labels) > 0.5, length / (length.sum() + 1)


def regress(rows, strength=100.0):
    """Logistic regression by Newton's method, features standardized, with a ridge penalty. rows:
    dicts with columns x, labels y, weights w. Returns {feature: weight}, with "bias"."""
    names = list(rows[0]["x"])
    x = np.concatenate([np.stack([np.asarray(c, float) for c in r["x"].values()], 1) for r in rows])
    y, w = (np.concatenate([r[key] for r in rows]) for key in "yw")
    x, y, w = x[w > 0], y[w > 0], w[w > 0] / w[w > 0].mean()
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-3)
    z = np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], 1)
    ridge, v = np.append(np.full(x.shape[1], strength), 1e-6), np.zeros(z.shape[1])
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(z @ v, -30, 30)))
        curvature = (z * (w * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ z
        v -= np.linalg.solve(curvature + np.diag(ridge), z.T @ (w * (p - y)) + ridge * v)
    raw = v[:-1] / scale
    return dict(zip([*names, "bias"], [*raw, v[-1] - raw @ mean]))


def fit_both(rows, margin=0.5):
    """Weights of looks and of context. The second regression sees odds from first ones fitted
    without the page's site; its bias is lowered by margin: precision is worth more than recall."""
    looks, fold = regress(rows), [hash_of(r["site"]) // 5 % 4 for r in rows]
    second = []
    for k in range(4):
        others = regress([r for r, f in zip(rows, fold) if f != k])
        for r in (r for r, f in zip(rows, fold) if f == k):
            odds = others["bias"] + sum(others[name] * c for name, c in r["x"].items())
            second.append({**r, "x": C.context(odds, r["blocks"], r["elements"], r["length"])})
    context = regress(second)
    context["bias"] -= margin
    return looks, context


def fit(args):
    rows = []
    for site, kind, html, gold in load_pages(args, learn=True):
        blocks, elements, texts = blocks_of(html)
        if blocks and gold:
            x, length = C.describe(blocks, elements, texts)
            y, w = label_blocks(texts, length, gold)
            rows.append({"site": site, "kind": kind, "blocks": blocks, "elements": elements,
                         "texts": texts, "gold": gold, "x": x, "length": length, "y": y, "w": w})
    scores = collections.defaultdict(list)
    for k in range(5):
        weights = fit_both([r for r in rows if hash_of(r["site"]) % 5 != k])
        for r in (r for r in rows if hash_of(r["site"]) % 5 == k):
            keep = C.main_blocks(r["blocks"], r["elements"], r["texts"], *weights)
            text = "\n".join(t for t, one in zip(r["texts"], keep) if one)
            scores[r["kind"]].append(score_text(text, r["gold"]))
    show_scores("5-fold", scores)
    looks, context = weights = fit_both(rows)
    args.wcxb, args.readability, scores = None, None, collections.defaultdict(list)
    for _, kind, html, gold in load_pages(args):
        blocks, elements, texts = blocks_of(html)
        keep = C.main_blocks(blocks, elements, texts, *weights)
        text = "\n".join(t for t, one in zip(texts, keep) if one)
        scores[kind].append(score_text(text, gold))
    if scores:
        show_scores("unseen", scores)
    print("PLACES:", "; ".join(f"{' '.join(words)} {looks.pop('in ' + words[0]):.2f}"
                               for words in C.PLACES))
    for name, table in (("LOOKS", looks), ("CONTEXT", context)):
        print(f"{name}:", "; ".join(f"{feature} {weight:.2f}" for feature, weight in table.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("what")
    for name in ("--wcxb", "--readability", "--segments", "--news"):
        parser.add_argument(name)
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
