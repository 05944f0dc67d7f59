"""
bpe.py beside rustbpe, Hugging Face's tokenizers and tiktoken, on the same bytes. Run by hand:

    pip install rustbpe==0.1.0 tokenizers tiktoken
    python tests/bench_bpe.py --train code.txt --encode prose.txt --gpt2 DIR --cl100k FILE

--train   text to learn a vocabulary of 32,000 from, 50 MB or more
--encode  text to encode; --gpt2 is a folder with GPT-2's vocab.json and merges.txt, and --cl100k
          the file cl100k_base.tiktoken
--big GB  also train on and encode the --encode text repeated to so many GB, for memory

Every measurement is a process of its own; contestants take turns, --repeat times; medians are
printed, and ratios are medians of the ratios of runs that stood side by side.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import bpe


def cpu():
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def documents(path):
    with open(path, encoding="utf-8", newline="") as file:
        return file.read().split(bpe.EOT)


def job_train_ours(a):
    start = time.perf_counter()
    vocab, merges = bpe.train_bpe(a.file, a.vocab, [bpe.EOT], num_proc=a.procs)
    return time.perf_counter() - start, len(vocab)


def job_train_rustbpe(a):
    import rustbpe

    start = time.perf_counter()
    tokenizer = rustbpe.Tokenizer()
    texts = iter(documents(a.file))
    tokenizer.train_from_iterator(texts, vocab_size=a.vocab - 1, pattern=bpe.PATTERNS["gpt2"])
    return time.perf_counter() - start, tokenizer.vocab_size + 1


def job_train_hf(a):
    import tokenizers

    start = time.perf_counter()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=a.vocab,
        special_tokens=[bpe.EOT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(documents(a.file)), trainer)
    return time.perf_counter() - start, tokenizer.get_vocab_size()


def job_encode_ours(a):
    tokenizer = bpe.Tokenizer.from_file(a.tokenizer)
    with tempfile.TemporaryDirectory() as out:
        sys.stdout = open(os.devnull, "w")
        before, start = cpu(), time.perf_counter()
        bpe.encode_files(tokenizer, [a.file], out, 0, num_proc=a.procs)
        wall, used = time.perf_counter() - start, cpu() - before
        sys.stdout = sys.__stdout__
        ids, _ = bpe.read_bin(os.path.join(out, "train.bin"))
        if a.procs == 1 and not a.big:
            return wall, used, hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()[:16]
    return wall, used, ""


def job_encode_tiktoken(a):
    import numpy as np
    import tiktoken

    ours = bpe.Tokenizer.from_file(a.tokenizer)  # for its vocabulary
    ranks = {t: i for i, t in ours.vocab.items() if i not in ours.special_tokens.values()}
    encoding = tiktoken.Encoding(
        "x", pat_str=ours.pattern, mergeable_ranks=ranks, special_tokens=ours.special_tokens
    )
    encoding.encode("warm up")
    with tempfile.NamedTemporaryFile() as out:
        before, start = cpu(), time.perf_counter()
        with open(a.file, encoding="utf-8", newline="") as file:
            text = file.read()
        if not text.endswith(bpe.EOT):
            text += bpe.EOT
        ids = encoding.encode_to_numpy(text, allowed_special="all")
        ids.astype(np.uint16 if encoding.n_vocab <= 1 << 16 else np.uint32).tofile(out)
        wall, used = time.perf_counter() - start, cpu() - before
    return wall, used, hashlib.sha256(ids.astype("<u4").tobytes()).hexdigest()[:16]


def run(job, **options):
    """Run one job in a process of its own -> (its results, peak RSS in MB of it or a child)."""
    args = [x for k, v in options.items() for x in (f"--{k}", str(v))]
    command = [sys.executable, __file__, "--job", job, *args]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1]
        print(f"  {job}: not measured ({last})")
        return None
    return json.loads(result.stdout.strip().splitlines()[-1])


def compare(repeat, contestants):
    """Run contestants {name: (job, options)} in turn -> {name: list of results}."""
    results = {name: [] for name in contestants}
    for _ in range(repeat):
        for name, (job, options) in list(contestants.items()):
            result = run(job, **options)
            if result is None:
                del contestants[name], results[name]
            else:
                results[name].append(result)
    return results


def median(values):
    return statistics.median(values)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--train")
    parser.add_argument("--encode")
    parser.add_argument("--gpt2")
    parser.add_argument("--cl100k")
    parser.add_argument("--big", type=float, default=0)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--job")
    parser.add_argument("--file")
    parser.add_argument("--tokenizer")
    parser.add_argument("--procs", type=int, default=1)
    a = parser.parse_args()
    if a.job:
        result = globals()["job_" + a.job](a)
        usage = [
            resource.getrusage(w).ru_maxrss
            for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        print(json.dumps([*result, max(usage) / (1 << (20 if sys.platform == "darwin" else 10))]))
        return
    os.environ.setdefault("RAYON_NUM_THREADS", "2")
    if a.train:
        size = os.path.getsize(a.train) / 1e6
        print(f"training, {size:.0f} MB, vocabulary {a.vocab:,}, 2 processes or threads")
        options = {"file": a.train, "vocab": a.vocab, "procs": 2}
        results = compare(
            a.repeat,
            {
                "bpe.py": ("train_ours", options),
                "rustbpe": ("train_rustbpe", options),
                "tokenizers": ("train_hf", options),
            },
        )
        for name, rows in results.items():
            ratio = median([r[0] / o[0] for r, o in zip(rows, results["bpe.py"])])
            print(
                f"  {name:12} {median([r[0] for r in rows]):7.2f} s   {ratio:5.2f} x bpe.py   "
                f"{median([r[-1] for r in rows]):7.0f} MB in one process"
            )
    kinds = {"GPT-2": a.gpt2 and os.path.join(a.gpt2, "vocab.json"), "cl100k": a.cl100k}
    for kind, tokenizer in kinds.items():
        if not (a.encode and tokenizer):
            continue
        size = os.path.getsize(a.encode) / 1e6
        print(f"encoding to .bin, {size:.0f} MB, {kind}'s vocabulary, one process")
        options = {"file": a.encode, "tokenizer": tokenizer}
        results = compare(
            a.repeat,
            {
                "bpe.py": ("encode_ours", options),
                "tiktoken": ("encode_tiktoken", options),
                "two": ("encode_ours", options | {"procs": 2}),
            },
        )
        two = results.pop("two")
        for name, rows in results.items():
            ratio = median([r[1] / o[1] for r, o in zip(rows, results["bpe.py"])])
            print(
                f"  {name:12} {size / median([r[1] for r in rows]):7.1f} MB per CPU-second   "
                f"{1 / ratio:5.2f} x bpe.py   ids {rows[0][2]}"
            )
        ratio = median([o[0] / t[0] for o, t in zip(results["bpe.py"], two)])
        print(f"  two processes are {ratio:.2f} x as fast as one")
    if a.big:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "big.txt")
            with open(a.encode, "rb") as source, open(path, "wb") as file:
                text = source.read()
                while file.tell() < a.big * 1e9:
                    file.write(text)
            size = os.path.getsize(path) / 1e6
            result = run("train_ours", file=path, vocab=a.vocab, procs=2)
            print(
                f"training on {size:,.0f} MB: {result[0]:.1f} s, "
                f"peak {result[-1]:.0f} MB per process"
            )
            for procs in (1, 2):
                result = run(
                    "encode_ours", file=path, tokenizer=kinds["GPT-2"], procs=procs, big=1
                )
                print(
                    f"encoding {size:,.0f} MB, {procs} process(es): {size / result[0]:.0f} MB/s, "
                    f"peak {result[-1]:.0f} MB per process"
                )


if __name__ == "__main__":
    main()
