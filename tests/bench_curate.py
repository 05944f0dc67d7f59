"""
curate.py beside the tools people use, on the same data. Run by hand:

    pip install trafilatura resiliparse readability-lxml datasketch lingua-language-detector \\
        fasttext-wheel psutil
    D=../shared/data
    python tests/bench_curate.py extract --wcxb $D/html/wcxb \\
        --readability $D/html/mozilla_readability
    python tests/bench_curate.py minhash --documents $D/web/c4_sample.jsonl
    python tests/bench_curate.py language --languages $D/langid
    python tests/bench_curate.py toxicity --davidson $D/toxicity/davidson.csv
    python tests/bench_curate.py pipeline --wcxb $D/html/wcxb
    python tests/bench_curate.py experiment --wcxb $D/html/wcxb --wikitext $D/wikitext2 \\
        --readability $D/html/mozilla_readability

and, to learn the weights of the block classifier anew from pages with known main text (prints the
table for curate.py, and F1 by cross-validation, sites kept together):

    python tests/bench_curate.py fit_blocks --wcxb $D/html/wcxb --more DIR \\
        --readability $D/html/mozilla_readability --segments DIR --newspaper DIR

wcxb and news are folders with ground-truth.json and html/*.html.gz (news: scrapinghub's
article-extraction-benchmark); readability the test pages of Mozilla's Readability; segments the
folder `tests` of trafilatura's repository, pages with texts that must and must not be found:
fit_blocks learns from those of one half of the sites, extract measures on the other. more is the
repository of WCXB (of its dev pages those that wcxb has not), newspaper the folder tests/data of
that of newspaper. Speeds are per CPU-second of one thread. Peers that are not installed are
skipped.
"""

import argparse
import collections
import csv
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
OTHERS = ["readability", "segments", "news", "more", "newspaper"]  # kinds outside of wcxb


def token_f1(text, gold):
    """F1 of the multisets of words."""
    a, b = (collections.Counter(WORD.findall(t.lower())) for t in (text, gold))
    if not a or not b:
        return float(not a and not b)
    return 2 * sum((a & b).values()) / (sum(a.values()) + sum(b.values()))


def load_pages(args):
    """(site, kind, html bytes, gold text) of all pages given."""
    truth = {}
    if args.wcxb:
        with open(os.path.join(args.wcxb, "ground-truth.json"), encoding="utf-8") as file:
            truth = json.load(file)
        for key, entry in truth.items():
            with gzip.open(os.path.join(args.wcxb, "html", f"{key}.html.gz")) as file:
                yield (urlparse(entry["url"]).netloc.removeprefix("www."),
                       entry["_internal"]["page_type"]["primary"], file.read(),
                       entry["ground_truth"].get("main_content") or "")
    if args.more:
        with open(os.path.join(args.more, "metadata.json"), encoding="utf-8") as file:
            pages = json.load(file)["files"]
        for path in sorted(glob.glob(os.path.join(args.more, "dev", "ground-truth", "*.json"))):
            key = os.path.basename(path).removesuffix(".json")
            html = os.path.join(args.more, "dev", "html", f"{key}.html.gz")
            if key not in truth and os.path.exists(html):
                with open(path, encoding="utf-8") as gold, gzip.open(html) as file:
                    yield (pages[key]["domain"] or key, "more", file.read(),
                           json.load(gold)["ground_truth"].get("main_content") or "")
    for path in sorted(glob.glob(os.path.join(args.newspaper or "", "html", "*.html"))):
        name = os.path.basename(path).removesuffix(".html")
        text = os.path.join(args.newspaper or "", "text", f"{name}.txt")
        if args.newspaper and os.path.exists(text):
            with open(path, "rb") as file, open(text, encoding="utf-8", errors="replace") as gold:
                yield name.rstrip("0123456789"), "newspaper", file.read(), gold.read()
    for folder in sorted(glob.glob(os.path.join(args.readability or "", "*", ""))):
        if args.readability:
            with open(folder + "source.html", "rb") as file, \
                    open(folder + "expected.html", encoding="utf-8") as gold:
                yield folder, "readability", file.read(), all_text(gold.read())
    if args.segments:
        with open(os.path.join(args.segments, "evaldata.json"), encoding="utf-8") as file:
            truth = json.load(file)
        for url, entry in truth.items():
            site = urlparse(url).netloc.removeprefix("www.")
            paths = [os.path.join(args.segments, folder, entry["file"])
                     for folder in ("eval", "cache")]
            path = next(filter(os.path.exists, paths), None)
            if path and hash_of(site) // 7 % 2 == (args.what == "extract"):
                with open(path, "rb") as file:
                    yield site, "segments", file.read(), (entry["with"], entry["without"])
    if args.news:
        with open(os.path.join(args.news, "ground-truth.json"), encoding="utf-8") as file:
            truth = json.load(file)
        for key, entry in truth.items():
            with gzip.open(os.path.join(args.news, "html", f"{key}.html.gz")) as file:
                yield (urlparse(entry["url"]).netloc.removeprefix("www."), "news", file.read(),
                       entry["articleBody"])


def hash_of(site):
    return int(hashlib.md5(site.encode()).hexdigest(), 16)


def score_text(text, gold):
    """Token F1, or if gold is (texts wanted, texts not wanted) the numbers of hits, false hits and
    misses."""
    if isinstance(gold, str):
        return token_f1(text, gold)
    hits, false_hits = (sum(part in text for part in parts) for parts in gold)
    return np.array([hits, false_hits, len(gold[0]) - hits])


def mean_score(scores):
    """Of what `score_text` gave for some pages."""
    if np.ndim(scores[0]) == 0:
        return statistics.mean(scores)
    hits, false_hits, misses = sum(scores)
    return 2 * hits / (2 * hits + false_hits + misses)


def all_text(html):
    """All visible text of a page, a line per block, as a WET file has it."""
    b, texts = C.page_blocks(html)
    return "\n".join(t for t, places in zip(texts, b.places) if not places & C.HIDDEN)


def peers(names):
    """{name: function from HTML bytes to text}, of those that are installed."""
    found = {"curate.py": C.extract_text}
    try:
        import trafilatura
        found["trafilatura"] = lambda h: trafilatura.extract(h, include_comments=False) or ""
        found["trafilatura, fast"] = lambda h: trafilatura.extract(h, fast=True,
                                                                   include_comments=False) or ""
    except ImportError:
        print("trafilatura is not installed")
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
        found["resiliparse"] = lambda h: extract_plain_text(
            bytes_to_str(h, detect_encoding(h)), main_content=True)
    except ImportError:
        print("resiliparse is not installed")
    try:
        import lxml.html
        import readability
        found["readability-lxml"] = lambda h: " ".join(
            lxml.html.fromstring(readability.Document(h).summary()).itertext())
    except ImportError:
        print("readability-lxml is not installed")
    return {name: f for name, f in found.items() if not names or name in names}


def extract(args):
    import logging
    logging.disable(logging.CRITICAL)
    pages = list(load_pages(args))
    kinds = sorted({kind for _, kind, _, _ in pages} - set(OTHERS))
    print(f"{len(pages)} pages; mean token F1 per kind")
    for name, function in peers(args.peers).items():
        scores, seconds = collections.defaultdict(list), 0.0
        for _, kind, html, gold in pages:
            start = time.process_time()
            try:
                text = function(html)
            except Exception:  # a tool that fails on a page has no text for it
                text = ""
            seconds += time.process_time() - start
            scores[kind].append(score_text(text, gold))
        wcxb = [s for kind in kinds for s in scores[kind]]
        row = {"wcxb": wcxb, **{kind: scores[kind] for kind in kinds + OTHERS}}
        print(f"{name:<18}{len(pages) / seconds:>6.0f} pages/CPU-s  " + "  ".join(
            f"{kind} {mean_score(s):.3f}" for kind, s in row.items() if s), flush=True)


def label_blocks(texts, length, gold):
    """For each block, whether most of its 3-grams of words (or it, if shorter) are in the gold;
    and how much it counts, 1 in all for a page. If gold is (texts wanted, texts not wanted), only
    the blocks that hold one of these count, 2 in all: there are as many errors to learn from."""
    if not isinstance(gold, str):
        labels, weight = np.zeros(len(texts), bool), np.zeros(len(texts))
        for label, parts in enumerate(gold[::-1]):
            for part in parts:
                part = " ".join(part.split())
                found = [i for i, text in enumerate(texts) if part in text]
                for i in found if len(found) <= 3 else ():
                    labels[i] = label
                    weight[i] += 2 / len(found) / sum(map(len, gold))
        return labels, weight
    words = WORD.findall(gold.lower())
    trigrams, whole = set(zip(words, words[1:], words[2:])), f" {' '.join(words)} "
    labels = []
    for text in texts:
        own = WORD.findall(text.lower())
        grams = list(zip(own, own[1:], own[2:]))
        labels.append(sum(g in trigrams for g in grams) / len(grams) if len(grams) > 1 else
                      float(bool(own) and f" {' '.join(own)} " in whole))
    return np.array(labels) > 0.5, length / (length.sum() + 1)


def logistic_regression(x, y, weight, strength, steps=12):
    """Newton's method; weights of standardized features -> (weights of raw features, bias)."""
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-3)
    z = np.concatenate([(x - mean) / scale, np.ones((len(x), 1), np.float32)], 1)
    ridge = np.append(np.full(x.shape[1], strength), 1e-6)
    w = np.zeros(z.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(z @ w, -30, 30)))
        gradient = z.T @ (weight * (p - y)) + ridge * w
        curvature = (z * (weight * np.maximum(p * (1 - p), 1e-6))[:, None]).T @ z
        w -= np.linalg.solve(curvature + np.diag(ridge), gradient)
    return w[:-1] / scale, w[-1] - (w[:-1] / scale * mean).sum()


def fit_blocks(args):
    rows = []
    for site, kind, html, gold in load_pages(args):
        b, texts = C.page_blocks(html)
        if texts and gold:
            names, x = C.describe(b, texts)
            shown = np.array([not places & C.HIDDEN for places in b.places])
            length = np.array([len(t.encode()) for t in texts]) * shown
            labels, weight = label_blocks(texts, length, gold)
            if kind == "newspaper":
                weight = weight / 2  # its gold texts are a tool's output
            rows.append((site, kind, b, texts, x, labels, weight, gold))

    sentences = names.index("page: sentences")

    def fit(rows):
        x, y, w = (np.concatenate([r[i] for r in rows]) for i in (4, 5, 6))
        x, y, w = x[w > 0].astype(np.float32), y[w > 0], w[w > 0]  # a page counts 1 in all
        weights, bias = logistic_regression(x, y, w / w.mean(), args.strength)
        # Where there is much running text, what is doubtful had better go; where little, stay.
        weights[sentences] -= args.margin
        return weights, bias + 0.5 * args.margin

    scores = collections.defaultdict(list)
    fold = lambda site: hash_of(site) % 5
    for k in range(5):
        weights, bias = fit([r for r in rows if fold(r[0]) != k])
        model = dict(zip(names, weights))
        for site, kind, b, texts, x, _, _, gold in rows:
            if fold(site) == k:
                keep = C.keep_blocks(b, texts, model, bias)
                text = "\n".join(t for t, one in zip(texts, keep) if one)
                scores[kind].append(score_text(text, gold))
                if kind not in OTHERS:
                    scores["wcxb"].append(scores[kind][-1])
    print("cross-validated F1: " + "  ".join(f"{k} {mean_score(s):.4f}"
                                             for k, s in sorted(scores.items())))
    weights, bias = fit(rows)
    print(f"BLOCK_BIAS = {bias:.3f}\n")
    groups = collections.defaultdict(list)  # "linked #0", "linked #1" ... are one item
    for name, weight in zip(names, weights):
        groups[name.partition(" #")[0]].append(f"{weight:.2f}")
    line = ""
    for name, numbers in groups.items():
        item = f"{name} {' '.join(numbers)};"
        if len(line) + len(item) > 97:
            print(line)
            line = ""
        line = f"{line} {item}".strip()
    print(line)


def minhash(args):
    texts = [d["text"] for path in args.documents for d in C.read_documents(path)]
    rng = np.random.RandomState(0)
    pairs = []  # texts with some words changed: pairs of many similarities
    for text in texts[: args.pairs] * 4:
        words = text.split()
        change = rng.rand(len(words)) < rng.choice([0.002, 0.005, 0.01, 0.02, 0.04])
        pairs.append((text, " ".join("changed" if c else w for w, c in zip(words, change))))
    everything = texts + [b for _, b in pairs]
    print(f"{len(everything)} documents, 112 hashes in 14 bands of 8, 5-grams of words")
    results, times = {}, {}

    def ours():
        return [C.band_keys(C.minhash_signature(C.shingles(t, 5), 112), 14) for t in everything]

    def datasketch_keys():
        from datasketch import MinHash
        keys = []
        for text in everything:
            words = C.normalize(text).decode().split()
            grams = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
            m = MinHash(num_perm=112)
            m.update_batch(grams)
            keys.append(m.hashvalues.reshape(14, 8))
        return keys

    for name, function in (("curate.py", ours), ("datasketch", datasketch_keys)):
        try:
            rates = []
            for _ in range(args.repeat):
                start = time.process_time()
                keys = function()
                rates.append(len(everything) / (time.process_time() - start))
            results[name], times[name] = keys, statistics.median(rates)
        except ImportError:
            print(f"{name} is not installed")
    similarity = np.array([C.jaccard(C.shingles(a, 5), C.shingles(b, 5)) for a, b in pairs])
    expected = 1 - (1 - similarity**8) ** 14
    for name, keys in results.items():
        keys = np.array(keys).reshape(len(everything), 14, -1)
        base = min(args.pairs, len(texts))
        first, second = keys[np.arange(len(pairs)) % base], keys[len(texts) :]
        found = (first == second).all(2).any(1)
        print(f"{name:<12}{times[name]:>8.0f} documents/CPU-s   recall " + "; ".join(
            f"{what} {found[mask].mean():.3f}, expected {expected[mask].mean():.3f}"
            for what, mask in (("J >= 0.8", similarity >= 0.8), ("J < 0.8", similarity < 0.8))))
    if len(times) == 2:
        print(f"ratio {times['curate.py'] / times['datasketch']:.1f}")


def language(args):
    train, test = [], []
    for path in sorted(glob.glob(os.path.join(args.languages, "??.txt"))):
        with open(path, encoding="utf-8") as file:
            lines = list(dict.fromkeys(line.strip() for line in file if line.strip()))
        code = os.path.basename(path)[:2]
        for i, line in enumerate(lines):
            (test if i % 5 == 0 else train).append((line, code))
    short = [(" ".join(t.split()[:6]) if " " in t else t[:15], code) for t, code in test]
    start = time.process_time()
    model = C.LinearClassifier.train(*zip(*train))
    spent = time.process_time() - start
    model.save("/tmp/langid.npz")
    start = time.perf_counter()
    model = C.LinearClassifier.load("/tmp/langid.npz")
    print(f"{len(train)} training lines of {len(model.labels)} languages, {spent:.1f} CPU-s; "
          f"{os.path.getsize('/tmp/langid.npz') / 1e6:.1f} MB, loaded in "
          f"{1000 * (time.perf_counter() - start):.0f} ms")
    contestants = {"curate.py": lambda t: model.predict(t)[0]}
    try:
        from lingua import LanguageDetectorBuilder
        detector = LanguageDetectorBuilder.from_all_languages().with_preloaded_language_models()
        detector = detector.build()
        def lingua(text):
            found = detector.detect_language_of(text)
            return found and found.iso_code_639_1.name.lower()
        contestants["lingua"] = lingua
    except ImportError:
        print("lingua is not installed")
    for name, function in contestants.items():
        for what, lines in (("held-out sentences", test), ("their first six words", short)):
            start = time.process_time()
            right = statistics.mean(function(t) == code for t, code in lines)
            print(f"{name:<12}{what:<24}{right:.4f}  "
                  f"{len(lines) / (time.process_time() - start):.0f} per CPU-s", flush=True)


def auc(score, positive):
    """Area under the ROC curve; ties count half."""
    values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    n = positive.sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n))


def toxicity(args):
    with open(args.davidson, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [" ".join(row["tweet"].split()) for row in rows]
    test = np.arange(len(texts)) % 5 == 0
    for task, positive in (("hate or offence against neither", [r["class"] != "2" for r in rows]),
                           ("hate against the rest", [r["class"] == "0" for r in rows])):
        positive = np.array(positive)
        labels = np.where(positive, "toxic", "fine")
        train = [(t, str(y)) for t, y, held in zip(texts, labels, test) if not held]
        start = time.process_time()
        model = C.LinearClassifier.train(*zip(*train), chars=(3, 5), words=2, bits=18, epochs=4,
                                         rate=args.rate, scale=args.scale, prior=args.prior)
        spent = time.process_time() - start
        score = np.array([model.score(t, "toxic") for t, held in zip(texts, test) if held])
        print(f"{task}: curate.py AUC {auc(score, positive[test]):.4f}, {spent:.1f} CPU-s")
        try:
            import fasttext
        except ImportError:
            print("fasttext is not installed")
            continue
        with open("/tmp/fasttext.txt", "w", encoding="utf-8") as file:
            file.writelines(f"__label__{y} {t}\n" for t, y in train)
        for how in ({}, {"wordNgrams": 2, "epoch": 10},
                    {"wordNgrams": 2, "minn": 3, "maxn": 5, "epoch": 10}):
            start = time.process_time()
            peer = fasttext.train_supervised("/tmp/fasttext.txt", thread=1, verbose=0, **how)
            spent = time.process_time() - start
            score = []
            for t, held in zip(texts, test):
                if held:  # its Python wrapper's predict does not work with numpy 2
                    found = dict((b, a) for a, b in peer.f.predict(t + "\n", 2, 0.0, "strict"))
                    score.append(found.get("__label__toxic", 0.0))
            area = auc(np.array(score), positive[test])
            print(f"  fastText {how or 'defaults'}: AUC {area:.4f}, {spent:.1f} CPU-s", flush=True)


def write_crawl(args, folder, copies=1, files=4):
    """Pages as .warc.gz files. With copies, each further one has other words in it."""
    os.makedirs(folder, exist_ok=True)
    pages, size = list(load_pages(args)), 0
    for k in range(files):
        with open(os.path.join(folder, f"{k}.warc.gz"), "wb") as file:
            for copy in range(copies):
                for i in range(k, len(pages), files):
                    html = pages[i][2]
                    if copy:  # near duplicates of each other would not test the index
                        html = re.sub(rb"(?<=[a-z ]{4})([a-z]{3})(?=[a-z])", lambda m: m.group()
                                      if hash_byte(m.start(), copy) else b"q%d" % copy, html)
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"
                    body = head + html
                    record = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://{i}."
                              f"org/\r\nContent-Type: application/http; msgtype=response\r\n"
                              f"Content-Length: {len(body)}\r\n\r\n").encode() + body + b"\r\n\r\n"
                    size += len(record)
                    file.write(gzip.compress(record, 6))
    return size


def hash_byte(at, copy):
    return (at * 2654435761 + copy * 40503) >> 7 & 31


def curate(*args):
    """Run curate.py -> (CPU seconds, peak memory in MB) of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = ("import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "
            "file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, "curate.py"), *args],
                            stderr=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, float(result.stderr.split()[-1])


def pipeline(args):
    for copies in args.copies:
        folder = os.path.join(args.work, f"crawl{copies}")
        size = write_crawl(args, folder, copies)
        out = os.path.join(args.work, f"out{copies}-{os.getpid()}")
        spent, memory = curate("pipeline", "--input", folder, "--out", out, "--workers", "1")
        print(f"{size / 1e6:.0f} MB of WARC: {spent:.1f} CPU-s, {size / 1e6 / spent:.1f} MB per "
              f"CPU-second, peak memory {memory:.0f} MB", flush=True)


def experiment(args):
    """A model trained on curated text against one trained on all text of the same pages."""
    crawl, out = os.path.join(args.work, "crawl"), os.path.join(args.work, "curated")
    write_crawl(args, crawl)
    curate("pipeline", "--input", crawl, "--out", out, "--workers", "2")
    raw = os.path.join(args.work, "raw.jsonl")
    with open(raw, "w", encoding="utf-8") as file:
        for _, _, html, _ in load_pages(args):
            file.write(json.dumps({"text": all_text(html)}) + "\n")
    python = lambda script, *rest: subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *map(str, rest)], check=True,
        capture_output=True, text=True).stdout
    data = {"uncurated": [raw], "curated": sorted(glob.glob(os.path.join(out, "*.jsonl.gz")))}
    tokenizer = os.path.join(args.work, "tokenizer")  # of the uncurated text, for both
    python("bpe.py", "train", "--input", raw, "--vocab_size", 4096, "--out", tokenizer)
    held_out = os.path.join(args.wikitext, "valid.txt")
    rows = collections.defaultdict(list)
    for name, files in data.items():
        folder = os.path.join(args.work, name + "-bin")
        python("bpe.py", "encode", "--tokenizer", tokenizer, "--input", *files, "--val_input",
               held_out, "--out", folder)
        for seed in range(2):
            text = python("train.py", "--data", folder, "--out_dir", os.path.join(
                args.work, f"{name}{seed}"), "--seed", seed, "--max_iters", args.steps,
                "--batch_size", 8, "--block_size", 256, "--n_layer", 4, "--n_head", 4,
                "--n_embd", 128, "--learning_rate", 6e-3, "--eval_interval", args.steps)
            loss = float(re.search(r"final_val_loss: *([\d.]+)|val_loss: *([\d.]+)", text).group(0)
                         .split()[-1])
            rows[name].append(loss)
            tokens = re.search(r"([\d,]+) training tokens", text).group(1)
            print(f"{name:<10} seed {seed}: {tokens} tokens of text, {args.steps * 2048:,} "
                  f"trained on, loss on wikitext2 {loss:.4f}", flush=True)
    difference = [a - b for a, b in zip(rows["curated"], rows["uncurated"])]
    print("curated - uncurated: " + ", ".join(f"{d:+.4f}" for d in difference))


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("what", choices=["extract", "fit_blocks", "minhash", "language",
                                         "toxicity", "pipeline", "experiment"])
    parser.add_argument("--wcxb", metavar="DIR")
    parser.add_argument("--readability", metavar="DIR")
    for name in ("--segments", "--more", "--newspaper"):
        parser.add_argument(name, metavar="DIR")
    parser.add_argument("--news", metavar="DIR")
    parser.add_argument("--peers", nargs="*", help="only these")
    parser.add_argument("--strength", type=float, default=300.0, help="of the penalty on weights")
    parser.add_argument("--margin", type=float, default=0.7, help="see fit_blocks")
    parser.add_argument("--documents", nargs="+", metavar="FILE")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--languages", metavar="DIR")
    parser.add_argument("--davidson", metavar="FILE")
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--scale", type=float, default=3.0)
    parser.add_argument("--prior", type=float, default=0.05)
    parser.add_argument("--copies", type=int, nargs="*", default=[1, 4], help="sizes of the crawl")
    parser.add_argument("--wikitext", metavar="DIR")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--work", default="/tmp/bench_curate", metavar="DIR")
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
