"""
curate.py beside the tools people use, on the same data. Run by hand:

    pip install trafilatura lxml_html_clean datasketch lingua-language-detector fasttext-wheel ray
    D=../shared/data
    R=$D/html/mozilla_readability
    python tests/bench_curate.py extract --wcxb $D/html/wcxb --readability $R
    python tests/bench_curate.py minhash --documents $D/web/c4_sample.jsonl
    python tests/bench_curate.py language --languages $D/langid
    python tests/bench_curate.py toxicity --davidson $D/toxicity/davidson.csv
    python tests/bench_curate.py pipeline --wcxb $D/html/wcxb
    python tests/bench_curate.py ray --wcxb $D/html/wcxb

and, to learn the weights of main text anew from pages with known main text (prints the tables for
curate.py, and F1 by 5-fold cross-validation, sites kept together):

    python tests/bench_curate.py fit --wcxb $D/html/wcxb --readability $R \\
        --segments TRAFILATURA/tests --news ARTICLE-EXTRACTION-BENCHMARK

wcxb and news (github.com/scrapinghub/article-extraction-benchmark) are folders with
ground-truth.json and html/*.html.gz; readability the test pages of Mozilla's Readability; segments
the folder `tests` of trafilatura's repository, pages with texts that must and must not be found:
fit learns from those of one half of the sites, and both measure on the other. News is never learned
from. Speeds are per CPU-second of one thread. Peers that are not installed are skipped.
"""
import argparse, collections, csv, filecmp, glob, gzip, hashlib, json, os, re, resource
import statistics, subprocess, sys, time
from importlib.util import find_spec
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
            yield folder, "readability", file.read(), "\n".join(blocks_of(gold)[2])
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
    return blocks, elements, [
        " ".join(C.INVISIBLE.sub("", C.html_library.unescape(b[0])).split()) or "-" for b in blocks]

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
    if find_spec("trafilatura"):
        import trafilatura
        found["trafilatura"] = lambda h: trafilatura.extract(h, include_comments=False) or ""
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
    print("PLACES:", "; ".join(f"{name} {looks.pop('in ' + name):.2f}" for name in C.PLACES))
    for name, table in (("LOOKS", looks), ("CONTEXT", context)):
        print(f"{name}:", "; ".join(f"{feature} {weight:.2f}" for feature, weight in table.items()))

def minhash(args):
    """Documents per CPU-second, and recall beside what the bands promise."""
    texts = [d["text"] for d in C.read_documents(args.documents)]
    rng, pairs = np.random.RandomState(0), []
    for text in texts[:1000] * 4:  # with some words changed: pairs of many similarities
        words = text.split()
        change = rng.rand(len(words)) < rng.choice([0.002, 0.005, 0.01, 0.02, 0.04])
        pairs.append((text, " ".join("changed" if c else w for w, c in zip(words, change))))
    everything = texts + [b for _, b in pairs]

    def ours(text):
        return C.band_keys(C.shingles(text, 5), 112, 14)

    def datasketch(text):
        from datasketch import MinHash
        words = C.normalize(text).split()
        m = MinHash(num_perm=112)
        m.update_batch({b" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
        return m.hashvalues.reshape(14, 8)

    similarity = np.array([C.jaccard(C.shingles(a, 5), C.shingles(b, 5)) for a, b in pairs])
    expected, rates = 1 - (1 - similarity**8) ** 14, {}
    for function in (ours, datasketch) * 3:  # in turn
        start = time.process_time()
        keys = np.array([function(text) for text in everything]).reshape(len(everything), 14, -1)
        rates.setdefault(function, []).append(len(keys) / (time.process_time() - start))
        base = np.arange(len(pairs)) % min(1000, len(texts))
        found = (keys[base] == keys[len(texts) :]).all(2).any(1)
        if len(rates[function]) == 3:
            print(f"{function.__name__:<12}{statistics.median(rates[function]):>8.0f} texts/CPU-s"
                  "  recall " + "; ".join(
                      f"{what} {found[mask].mean():.3f}, expected {expected[mask].mean():.3f}"
                      for what, mask in (("J >= 0.8", similarity >= 0.8),
                                         ("below", similarity < 0.8))))
    print(f"ratio {statistics.median(a / b for a, b in zip(*rates.values())):.1f}")

def language(args):
    """Identification of the languages of a folder of ??.txt, a fifth of the lines held out."""
    train, test = [], []
    for path in sorted(glob.glob(os.path.join(args.languages, "??.txt"))):
        lines = dict.fromkeys(map(str.strip, open(path, encoding="utf-8")))
        for i, line in enumerate(filter(None, lines)):
            (test if i % 5 == 0 else train).append((line, os.path.basename(path)[:2]))
    start = time.process_time()
    model = C.LinearClassifier.train(*zip(*train))
    print(f"{len(train)} lines, {len(model.labels)} languages, {time.process_time() - start:.1f} s")
    model.save("/tmp/langid.npz")
    model = C.LinearClassifier.load("/tmp/langid.npz")
    own = [(t, code) for t, code in test if code in {*C.STOP_WORDS, *C.SCRIPTS.values()}]
    functions = {"curate.py": (lambda t: model.predict(t)[0], test),
                 "without a model": (lambda t: C.identify_language(t)[0], own)}
    if find_spec("lingua"):
        from lingua import LanguageDetectorBuilder
        detector = LanguageDetectorBuilder.from_all_languages().build()
        functions["lingua"] = (lambda t: getattr(getattr(detector.detect_language_of(
            t), "iso_code_639_1", None), "name", "").lower(), test)
    for name, (function, lines) in functions.items():
        short = [(" ".join(t.split()[:6]) if " " in t else t[:15], code) for t, code in lines]
        for what, some in (("held-out sentences", lines), ("their first six words", short)):
            start = time.process_time()
            right = statistics.mean(function(t) == code for t, code in some)
            rate = len(some) / (time.process_time() - start)
            print(f"{name:<16}{what:<24}{right:.4f}  {rate:.0f} per CPU-s", flush=True)

def toxicity(args):
    """Area under the ROC curve on the tweets of Davidson et al., beside fastText."""
    rows = list(csv.DictReader(open(args.davidson, encoding="utf-8")))
    texts, test = [" ".join(row["tweet"].split()) for row in rows], np.arange(len(rows)) % 5 == 0

    def auc(score, positive):
        values, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        n = positive.sum()
        return (rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n))

    for task, fine in (("hate or offence against neither", "2"), ("hate against the rest", "12")):
        positive = np.array([row["class"] not in fine for row in rows])
        train = [(t, str(y)) for t, y, held in zip(texts, positive, test) if not held]
        start = time.process_time()
        model = C.LinearClassifier.train(*zip(*train), chars=(3, 5), words=2, bits=18, epochs=4,
                                         rate=0.1, prior=0.05)
        spent = time.process_time() - start
        score = np.array([model.score(t, "True") for t, held in zip(texts, test) if held])
        print(f"{task}: curate.py AUC {auc(score, positive[test]):.4f}, {spent:.1f} CPU-s")
        if not find_spec("fasttext"):
            continue
        import fasttext
        with open("/tmp/fasttext.txt", "w", encoding="utf-8") as file:
            file.writelines(f"__label__{y} {t}\n" for t, y in train)
        for how in ({}, {"wordNgrams": 2, "minn": 3, "maxn": 5, "epoch": 10}):
            peer = fasttext.train_supervised("/tmp/fasttext.txt", thread=1, verbose=0, **how)
            found = [dict((b, a) for a, b in peer.f.predict(t + "\n", 2, 0.0, "strict"))
                     for t, held in zip(texts, test) if held]
            area = auc(np.array([f.get("__label__True", 0.0) for f in found]), positive[test])
            print(f"  fastText {how or 'defaults'}: AUC {area:.4f}", flush=True)

def write_crawl(args, folder, copies=1, files=4):
    """Pages as .warc.gz files; further copies have other words. Returns bytes of WARC."""
    os.makedirs(folder, exist_ok=True)
    pages, size = list(load_pages(args)), 0
    for k in range(files):
        with open(os.path.join(folder, f"{k}.warc.gz"), "wb") as file:
            for copy, i in ((c, i) for c in range(copies) for i in range(k, len(pages), files)):
                html = re.sub(rb"(?<=[a-z ]{4})([a-z]{3})(?=[a-z])", lambda m: m.group() if (
                    m.start() * 2654435761 + copy * 40503) >> 7 & 31 else b"q%d" % copy,
                              pages[i][2]) if copy else pages[i][2]
                body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html
                record = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://{i}.org/\r\n"
                          f"Content-Length: {len(body)}\r\n\r\n").encode() + body + b"\r\n\r\n"
                size += len(record)
                file.write(gzip.compress(record, 6))
    return size

def curate(*args):
    """Run curate.py -> (CPU seconds, peak memory in MB) of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = ("import runpy, sys\nsys.argv = sys.argv[1:]\n"  # (ru_maxrss would count ours, too)
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) "
            "/ 1024, file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, "curate.py"), *args],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            float(result.stderr.split()[-1]))

def pipeline(args):
    """MB of WARC per CPU-second, and peak memory, of crawls of several sizes."""
    for copies in (1, 3, 4):
        folder, out = f"{args.work}/crawl{copies}", f"{args.work}/out{copies}-{os.getpid()}"
        size = write_crawl(args, folder, copies)
        spent, memory = curate("pipeline", "--input", folder, "--out", out, "--workers", "1")
        print(f"{size / 1e6:.0f} MB of WARC: {spent:.1f} CPU-s, {size / 1e6 / spent:.1f} MB per "
              f"CPU-second, peak memory {memory:.0f} MB", flush=True)

def ray(args):
    """Whether one process, three and a local Ray write the same bytes."""
    folder = f"{args.work}/crawl1"
    outs = [f"{args.work}/{x}-{os.getpid()}" for x in ("1", "3", "ray")]
    write_crawl(args, folder)
    for out, how in zip(outs, (["--workers", "1"], ["--workers", "3"], ["--ray", "local"])):
        subprocess.run([sys.executable, os.path.join(ROOT, "curate.py"), "pipeline", "--input",
                        folder, "--out", out, *how], check=True, stdout=subprocess.PIPE)
        names = [os.path.basename(path) for path in glob.glob(f"{outs[0]}/*.gz")]
        same, *_ = filecmp.cmpfiles(outs[0], out, names, shallow=False)
        print(f"{' '.join(how)}: {len(same)} of {len(names)} files are the same", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("what", choices=["extract", "fit", "minhash", "language", "toxicity",
                                         "pipeline", "ray"])
    for name in ("wcxb", "readability", "segments", "news", "documents", "languages", "davidson"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--work", default="/tmp/bench_curate")
    args = parser.parse_args()
    globals()[args.what](args)

if __name__ == "__main__":
    main()
