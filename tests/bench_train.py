"""
train.py beside nanoGPT, on the same machine and text. Run by hand:

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_train.py --nanogpt nanoGPT --text tinyshakespeare/input.txt --repeat 3

1. The CPU demonstration of nanoGPT's README (character-level tiny Shakespeare, 4 layers, 4 heads,
   width 128, block 64, batch 12, 2,000 iterations, no dropout: validation loss 1.88), and train.py
   at the same size, with a short and a long recipe: seconds from the start of the process to its end, and losses.
2. The same architecture (GPT-2's), batch and precision, step for step in turn: time and memory.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
SIZES = "--block_size={} --batch_size={} --n_layer=4 --n_head=4 --n_embd=128".format(64, 12).split()
MUON = "--optimizer muon --weight_decay 0.0 --eval_interval 5000 --log_interval 50 "
RECIPES = {  # as little time as 1.88 takes; and about as much as nanoGPT takes
    "short": MUON + "--batch_size 16 --max_iters 155 --learning_rate 2e-2 --momentum 0.85 "
             "--warmup_iters 0 --decay_fraction 0.8",
    "long": MUON + "--batch_size 24 --max_iters 650 --learning_rate 1e-2 --decay_fraction 0.6"}


def timed(command, **options):
    """Run a command -> (seconds, what it printed). Stops with its error if it fails."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, **options)
    seconds = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stderr}")
    return seconds, result.stdout


def race(nanogpt, text, repeat):
    """Part 1."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(nanogpt, os.path.join(folder, "nanoGPT"))
        data = os.path.join(copy, "data", "shakespeare_char")
        shutil.copy(text, os.path.join(data, "input.txt"))
        # its prepare.py needs the network's `requests` only to download what is already there
        pathlib.Path(folder, "requests.py").write_text("")
        environment = os.environ | {"PYTHONPATH": folder}
        timed([sys.executable, "prepare.py"], cwd=data, env=environment)
        script = [sys.executable, os.path.join(ROOT, "bpe.py")]
        shakespeare = os.path.join(folder, "shakespeare")
        timed([*script, "train", "--pattern", "char", "--input", text, "--out", shakespeare])
        timed([*script, "encode", "--tokenizer", shakespeare, "--input", text, "--out", shakespeare,
               "--val_fraction", "0.1"])
        theirs = [sys.executable, "train.py", "config/train_shakespeare_char.py", *SIZES, "--device=cpu",
                  "--compile=False", "--eval_iters=20", "--log_interval=100", "--max_iters=2000",
                  "--lr_decay_iters=2000", "--dropout=0.0", f"--out_dir={folder}/theirs"]
        rows = []
        for seed in range(1, repeat + 1):
            a, printed = timed(theirs, cwd=copy)
            their_loss = min(map(float, re.findall(r"val loss ([\d.]+)", printed)))
            print(f"  nanoGPT  {a:6.1f} s, val loss {their_loss:.4f}", flush=True)
            for name, recipe in RECIPES.items():
                ours = [sys.executable, os.path.join(ROOT, "train.py"), *SIZES, *recipe.split(),
                        "--device=cpu", f"--data={shakespeare}", f"--out_dir={folder}/ours", f"--seed={seed}"]
                b, printed = timed(ours)
                loss = float(re.search(r"^val_loss: ([\d.]+)", printed, re.M)[1])
                rows.append((name, b / a, loss, their_loss))
                print(f"    train.py, {name:5} {b:6.1f} s, val loss {loss:.4f}    {b / a:.2f} of the time",
                      flush=True)
        for name in RECIPES:
            share, loss, their_loss = (statistics.median(r[i] for r in rows if r[0] == name) for i in (1, 2, 3))
            print(f"  {name}: median share of nanoGPT's time {share:.2f}, val loss {loss:.4f} for {their_loss:.4f}")


def steps(kind, nanogpt):
    """-> a function that does one training step of the model `kind`."""
    import torch

    torch.manual_seed(0)
    data = torch.randint(0, 65, (12, 65))
    x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    if kind == "nanoGPT":
        spec = importlib.util.spec_from_file_location("their_model", os.path.join(nanogpt, "model.py"))
        theirs = sys.modules["their_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        config = theirs.GPTConfig(64, 65, 4, 4, 128, 0.0, False)
        model = theirs.GPT(config)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

        def step():
            model(x, y)[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    else:
        import model as M
        import train as T

        gpt2 = dict(activation="gelu", norm="layernorm", position="learned", tie_embeddings=True)
        config = M.TransformerConfig(vocab_size=65, block_size=64, n_layer=4, n_head=4, n_embd=128,
                                     **(gpt2 if kind == "train.py" else {}))
        model = M.Transformer(config)
        optimizer = T.AdamW(T.parameter_groups(model, 0.1), lr=1e-3, betas=(0.9, 0.99))

        def step():
            T.backward(model, [(x, y)], lambda: torch.autocast("cpu", enabled=False))
            T.clip_grad_norm(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def compare_steps(nanogpt):
    """Part 2."""
    kinds = ("nanoGPT", "train.py", "train.py, default parts")
    contestants = {kind: steps(kind, nanogpt) for kind in kinds}
    times = {kind: [] for kind in kinds}
    for i in range(220):
        for kind, step in contestants.items():
            start = time.perf_counter()
            step()
            if i >= 20:
                times[kind].append(time.perf_counter() - start)
    for kind in kinds:
        ratio = statistics.median(a / b for a, b in zip(times["nanoGPT"], times[kind]))
        command = [sys.executable, __file__, "--nanogpt", nanogpt, "--memory", kind]
        megabytes = json.loads(timed(command)[1].splitlines()[-1])
        print(f"  {kind:24} {1e3 * statistics.median(times[kind]):6.1f} ms a step, {ratio:.2f} x nanoGPT's "
              f"speed, peak {megabytes:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--nanogpt", required=True, metavar="DIR")
    parser.add_argument("--text", metavar="FILE", help="tiny Shakespeare; without it, part 2 only")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        step = steps(args.memory, args.nanogpt)
        for _ in range(30):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10)))
        return
    print("the same architecture, batch and precision")
    compare_steps(args.nanogpt)
    if args.text:
        print("character-level tiny Shakespeare to a validation loss of 1.88")
        race(args.nanogpt, args.text, args.repeat)


if __name__ == "__main__":
    main()
