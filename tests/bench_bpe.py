"""bpe.py beside rustbpe, Hugging Face's tokenizers and tiktoken. Run by hand:

    pip install rustbpe tokenizers tiktoken
    python tests/bench_bpe.py --train code.txt --encode prose.txt --gpt2 DIR [--big 1]

--train   text to learn a vocabulary of 32,000 from, 50 MB or more
--encode  texts to encode; --gpt2 is a folder with GPT-2's vocab.json and merges.txt
--big GB  also encode the first of them, repeated to so many GB, for memory; and one word of 1 MB

Every figure is of whole processes, which start, load (the vocabulary, the text), work and write:
tokenizer.json or uint16 ids. Contestants take turns, --repeat times; medians are printed, and the
ratios are medians of the ratios of runs that stood side by side.
"""

import argparse
import base64
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import bpe

PATTERN = bpe.PATTERNS["gpt2"]
TRAIN = {  # arguments: text, vocabulary size
    "rustbpe": """
import sys, rustbpe
texts = open(sys.argv[1], encoding="utf-8", newline="").read().split("<|endoftext|>")
t = rustbpe.Tokenizer()
t.train_from_iterator(iter(texts), vocab_size=int(sys.argv[2]) - 1, pattern=PATTERN)
""",
    "tokenizers": """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
texts = open(sys.argv[1], encoding="utf-8", newline="").read().split("<|endoftext|>")
t = Tokenizer(models.BPE())
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
t.train_from_iterator(iter(texts), trainers.BpeTrainer(vocab_size=int(sys.argv[2]),
    special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
""",
}
TIKTOKEN = """
import sys, base64, tiktoken
ranks = {base64.b64decode(a): int(b) for a, b in (l.split() for l in open(sys.argv[1]))}
t = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                      special_tokens={"<|endoftext|>": 50256})
text = open(sys.argv[2], encoding="utf-8", newline="").read()
t.encode_to_numpy(text, allowed_special="all").astype("uint16").tofile(sys.argv[3])
"""


def run(*command):
    """Run a process -> (wall seconds, CPU-seconds, peak MB of it or a child so far), or None."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        print(f"  not measured: {done.stderr.strip().splitlines()[-1]}")
        return None
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used, after.ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def compare(commands, repeat, what, unit):
    """Run {name: command} in turn; print medians of wall time (what = 0) or CPU time (1)."""
    results = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            if (result := run(*command)) is not None:
                results[name].append(result[what])
    ours = next(iter(results.values()))
    for name, values in results.items():
        if values:
            ratio = statistics.median(b / a for a, b in zip(ours, values))
            print(f"  {name:12} {statistics.median(values):7.2f} {unit}   {ratio:5.2f} x bpe.py")


def peak(*command):
    """Peak memory in MB, wall seconds of a process, measured by a process in between."""
    code = ("import subprocess, sys, resource, time; start = time.perf_counter(); "
            "subprocess.run([sys.executable, *sys.argv[1:]], check=True, capture_output=True); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, "
            "time.perf_counter() - start)")
    done = subprocess.run([sys.executable, "-c", code, *map(str, command)], check=True,
                          capture_output=True, text=True)
    memory, seconds = map(float, done.stdout.split())
    return memory / (1 << (20 if sys.platform == "darwin" else 10)), seconds


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train")
    parser.add_argument("--encode", nargs="*", default=[])
    parser.add_argument("--gpt2")
    parser.add_argument("--big", type=float, default=0)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--repeat", type=int, default=3)
    a = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "2"
    script, folder = os.path.join(ROOT, "bpe.py"), tempfile.mkdtemp()
    path = lambda name: os.path.join(folder, name)
    compare({"import bpe": ("-c", f"import sys; sys.path.insert(0, {ROOT!r}); import bpe")},
            a.repeat, 1, "CPU-seconds")
    if a.train:
        size = os.path.getsize(a.train) / 1e6
        print(f"training, {size:.0f} MB, vocabulary {a.vocab:,}, 2 processes or threads")
        commands = {"bpe.py": (script, "train", "--input", a.train, "--vocab_size", a.vocab,
                               "--num_proc", 2, "--out", folder)}
        for name, code in TRAIN.items():
            commands[name] = "-c", code.replace("PATTERN", repr(PATTERN)), a.train, a.vocab
        compare(commands, a.repeat, 0, "s of wall time")
    if a.gpt2:
        tokenizer = bpe.Tokenizer.from_file(a.gpt2)
        tokenizer.save(folder)
        with open(path("gpt2.tiktoken"), "w") as file:
            file.writelines(f"{base64.b64encode(token).decode()} {i}\n"
                            for i, token in sorted(tokenizer.vocab.items()) if i != 50256)
    for text in a.encode:
        print(f"{text} to uint16, {os.path.getsize(text) / 1e6:.1f} MB, one process")
        ours = (script, "encode", "--tokenizer", folder, "--input", text, "--out", path("o"),
                "--val_fraction", 0, "--num_proc")
        theirs = "-c", TIKTOKEN.replace("PATTERN", repr(PATTERN)), path("gpt2.tiktoken"), text
        compare({"bpe.py": (*ours, 1), "tiktoken": (*theirs, path("t.bin"))}, a.repeat, 1,
                "CPU-seconds")
        compare({"1 process": (*ours, 1), "2 processes": (*ours, 2)}, a.repeat, 0, "s of wall time")
        ids, expected = bpe.read_bin(path("o/train.bin"))[0], np.fromfile(path("t.bin"), np.uint16)
        same = len(ids) - len(expected) in (0, 1) and (ids[: len(expected)] == expected).all()
        print(f"  the same ids: {bool(same)}")
    if a.big and a.encode:
        with open(a.encode[0], "rb") as file:
            text = file.read()
        for gb in (a.big / 2, a.big):
            with open(path("big.txt"), "wb") as file:
                while file.tell() < gb * 1e9:
                    file.write(text)
            for processes in (1, 2):
                memory, seconds = peak(script, "encode", "--tokenizer", folder, "--input",
                                       path("big.txt"), "--out", path("o"), "--num_proc", processes)
                print(f"encoding {gb} GB, {processes} process(es): {seconds:.0f} s, peak "
                      f"{memory:.0f} MB per process")
        for size in (500_000, 1_000_000):
            rng = np.random.default_rng(0)
            start, word = time.process_time(), rng.integers(97, 123, size, np.uint8).tobytes()
            tokenizer.encode(word.decode())
            print(f"one word of {size:,} letters: {time.process_time() - start:.2f} CPU-seconds")


if __name__ == "__main__":
    main()
