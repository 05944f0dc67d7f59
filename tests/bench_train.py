"""
train.py beside nanoGPT, on the same machine and text, and beside itself. By hand:

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_train.py race --nanogpt nanoGPT --text tinyshakespeare/input.txt --repeat 5
    python tests/bench_train.py steps --nanogpt nanoGPT
    python tests/bench_train.py ablations --data data/ts --repeat 2

race: the CPU demonstration of nanoGPT's README (character-level tiny Shakespeare, 4 layers and
heads, width 128, block 64, batch 12, 2,000 iterations, no dropout: loss 1.88) and train.py at that
size with a short recipe: seconds from the start of the process to its end, and losses.
steps: a training step of nanoGPT's model, of the same architecture here, and of our default parts,
in turn. ablations: one change at a time from the default, at an equal number of tokens.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model as M
import train as T

SIZES = "--block_size=64 --n_layer=4 --n_head=4 --n_embd=128 --device=cpu".split()
RECIPE = ("--optimizer muon --weight_decay 0.0 --eval_interval 5000 --log_interval 50 --batch_size "
          "16 --max_iters 165 --learning_rate 2e-2 --momentum 0.85 --warmup_iters 0 "
          "--decay_fraction 0.8").split()
BUDGET = ("--n_layer 4 --n_head 4 --n_embd 128 --block_size 256 --batch_size 8 --max_iters 500 "
          "--eval_interval 5000 --log_interval 50 --device cpu --learning_rate 6e-3").split()
ABLATIONS = {
    "default": "", "no norm": "--norm none", "layernorm": "--norm layernorm",
    "norms after the parts": "--norm_place post", "no positions": "--position none",
    "learned positions": "--position learned", "sinusoidal positions": "--position sinusoidal",
    "relu": "--activation relu", "gelu": "--activation gelu", "relu2": "--activation relu2",
    "8 experts, 2 active": "--activation moe", "window of 64": "--attention sliding",
    "window of 64, every third full": "--attention sliding,sliding,full",
    "linear attention": "--attention linear", "latent attention": "--attention latent",
    "Hyena": "--attention hyena", "one head of keys and values": "--n_kv_head 1",
    "normalised queries and keys": "--qk_norm", "tied embeddings": "--tie_embeddings",
    "logits capped at 15": "--logit_cap 15", "z-loss 1e-4": "--z_loss 1e-4",
    "cosine": "--schedule cosine", "AdamW at 3e-3": "--learning_rate 3e-3",
    "AdamW at 1.2e-2": "--learning_rate 1.2e-2",
    "Muon at 1e-2": "--optimizer muon --learning_rate 1e-2",
    "SOAP at 1e-2": "--optimizer soap --learning_rate 1e-2",
    "SGD at 0.2": "--optimizer sgd --learning_rate 0.2 --weight_decay 0"}

def timed(command, **options):
    """Run a command -> (seconds, what it printed). Stops with its error if it fails."""
    start = time.perf_counter()
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}")
    return time.perf_counter() - start, result.stdout

def ours(out_dir, *flags, **options):
    """A run of train.py as a process -> (seconds, its last validation loss)."""
    script = [sys.executable, f"{ROOT}/train.py", "--out_dir", out_dir]
    seconds, printed = timed([*script, *flags], **options)
    return seconds, float(re.findall(r"val loss ([\d.]+)", printed)[-1])

def race(args):
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(args.nanogpt, os.path.join(folder, "nanoGPT"))
        data = os.path.join(copy, "data", "shakespeare_char")
        shutil.copy(args.text, os.path.join(data, "input.txt"))
        # its prepare.py needs `requests` only to download what is already there; and nanoGPT draws
        # no plot, so neither shall train.py
        pathlib.Path(folder, "requests.py").write_text("")
        pathlib.Path(folder, "matplotlib.py").write_text("raise ImportError")
        environment, bins = os.environ | {"PYTHONPATH": folder}, os.path.join(folder, "bins")
        timed([sys.executable, "prepare.py"], cwd=data, env=environment)
        bpe = [sys.executable, f"{ROOT}/bpe.py"]
        timed([*bpe, "train", "--pattern", "char", "--input", args.text, "--out", bins])
        text = pathlib.Path(args.text).read_text()  # one document: cut it where nanoGPT does
        n = len(text) * 9 // 10
        pathlib.Path(folder, "a.txt").write_text(text[:n])
        pathlib.Path(folder, "b.txt").write_text(text[n:])
        timed([*bpe, "encode", "--tokenizer", bins, "--input", f"{folder}/a.txt", "--val_input",
               f"{folder}/b.txt", "--out", bins])
        theirs = [sys.executable, "train.py", "config/train_shakespeare_char.py", *SIZES,
                  "--batch_size=12", "--compile=False", "--eval_iters=20", "--log_interval=100",
                  "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
                  f"--out_dir={folder}/a"]
        rows = []
        for seed in range(1, args.repeat + 1):
            a, printed = timed(theirs, cwd=copy, env=environment)
            their_loss = min(map(float, re.findall(r"val loss ([\d.]+)", printed)))
            b, loss = ours(f"{folder}/b", *SIZES, *RECIPE, "--data", bins, "--seed", seed,
                           env=environment)
            rows.append((b / a, loss, their_loss))
            print(f"  nanoGPT {a:6.1f} s, {their_loss:.4f}; train.py {b:6.1f} s, {loss:.4f}: "
                  f"{b / a:.3f} of the time", flush=True)
        share, loss, their_loss = map(statistics.median, zip(*rows))
        print(f"medians: {share:.3f} of nanoGPT's time, val loss {loss:.4f} for {their_loss:.4f}")

def stepper(kind, nanogpt):
    """-> a function that does one training step of the model `kind`."""
    torch.manual_seed(0)
    x, y = torch.randint(65, (2, 12, 64))
    if kind == "nanoGPT":
        spec = importlib.util.spec_from_file_location("theirs", os.path.join(nanogpt, "model.py"))
        theirs = sys.modules["theirs"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        model = theirs.GPT(theirs.GPTConfig(64, 65, 4, 4, 128, 0.0, False))
        optimizers = [model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")]
        clip = torch.nn.utils.clip_grad_norm_
    else:
        gpt2 = dict(activation="gelu", norm="layernorm", position="learned", tie_embeddings=True)
        config = M.TransformerConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128,
                                     **(gpt2 if kind == "the same here" else {}))
        model, clip = M.Transformer(config), T.clip_grad_norm
        optimizers = T.make_optimizers(model, "adamw", 1e-3, 0.1, (0.9, 0.99), 0.95)

    def step():
        loss = model(x, y)[1] if kind == "nanoGPT" else T.cross_entropy(model(x), y)
        loss.backward()
        clip(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return step

def steps(args):
    kinds = ("nanoGPT", "the same here", "our default parts")
    contestants = {kind: stepper(kind, args.nanogpt) for kind in kinds}
    times = {kind: [] for kind in kinds}
    for i in range(220):
        for kind, step in contestants.items():
            start = time.perf_counter()
            step()
            if i >= 20:
                times[kind].append(time.perf_counter() - start)
    for kind in kinds:
        ratio = statistics.median(b / a for a, b in zip(times["nanoGPT"], times[kind]))
        print(f"  {kind:18} {1e3 * statistics.median(times[kind]):6.1f} ms, {ratio:.2f} of "
              "nanoGPT's")

def ablations(args):
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in ABLATIONS.items():
            flags = [*BUDGET, *flags.split(), "--data", args.data]
            found = [ours(f"{folder}/{seed}", *flags, "--seed", seed)
                     for seed in range(args.repeat)]
            seconds, loss = map(statistics.mean, zip(*found))
            print(f"  {name:32} {loss:.4f} nats {seconds:6.0f} s", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("race", "steps", "ablations"))
    parser.add_argument("--nanogpt", help="folder of its repository")
    parser.add_argument("--text", help="tiny Shakespeare")
    parser.add_argument("--data", help="folder of .bin files")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    {"race": race, "steps": steps, "ablations": ablations}[args.part](args)

if __name__ == "__main__":
    main()
