"""
train.py beside nanoGPT, on the same machine and text, and beside itself. Run by hand:

    git clone https://github.com/karpathy/nanoGPT
    python tests/bench_train.py --nanogpt nanoGPT --text tinyshakespeare/input.txt --repeat 5
    python tests/bench_train.py --nanogpt nanoGPT --bins data/ts
    python tests/bench_train.py --ablations data/ts --results ablations.jsonl --repeat 2
    python tests/bench_train.py --machine

1. The same architecture (GPT-2's), batch and precision, step for step in turn: time and memory.
2. The CPU demonstration of nanoGPT's README (character-level tiny Shakespeare, 4 layers, 4 heads,
   width 128, block 64, batch 12, 2,000 iterations, no dropout: validation loss 1.88), as published
   and with another learning rate, and train.py at the same size, with a short and a long recipe:
   seconds from the start of the process to its end, and losses.
3. nanoGPT's model and train.py's on the same bins (of bpe.py) for the same wall time.
4. One change at a time from the default model and optimizer, at an equal number of tokens.
5. What bfloat16, --compile and --activation_checkpointing do on this machine.
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import pickle
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
SIZES = "--block_size={} --batch_size={} --n_layer=4 --n_head=4 --n_embd=128".format(
    64, 12
).split()
MUON = "--optimizer muon --weight_decay 0.0 --eval_interval 5000 --log_interval 50 "
RECIPES = {  # as little time as 1.88 takes; and about as much as nanoGPT takes
    "short": MUON + "--batch_size 16 --max_iters 165 --learning_rate 2e-2 --momentum 0.85 "
    "--warmup_iters 0 --decay_fraction 0.8",
    "long": MUON + "--batch_size 24 --max_iters 650 --learning_rate 1e-2 --decay_fraction 0.6",
}


# part 4: {what is changed: flags}. The best of a few learning rates is in each optimizer's line.
BUDGET = (
    "--n_layer 4 --n_head 4 --n_embd 128 --block_size 256 --batch_size 8 --max_iters 500 "
    "--eval_interval 5000 --log_interval 50 --device cpu"
)
DEFAULT = "--learning_rate 6e-3"
ABLATIONS = {
    "default": "",
    "no norm": "--norm none",
    "layernorm": "--norm layernorm",
    "norms after the parts": "--norm_place post",
    "no positions": "--position none",
    "learned positions": "--position learned",
    "sinusoidal positions": "--position sinusoidal",
    "relu": "--activation relu",
    "gelu": "--activation gelu",
    "relu2": "--activation relu2",
    "silu": "--activation silu",
    "8 experts, 2 active": "--activation moe",
    "the same, balanced by bias": "--activation moe --balance bias --balance_weight 0.001",
    "the same, not balanced": "--activation moe --balance none",
    "window of 64": "--attention sliding",
    "window of 64, every third full": "--attention sliding,sliding,full",
    "linear attention": "--attention linear",
    "latent attention": "--attention latent",
    "Hyena": "--attention hyena",
    "one head of keys and values": "--n_kv_head 1",
    "normalised queries and keys": "--qk_norm",
    "tied embeddings": "--tie_embeddings",
    "logits capped at 15": "--logit_cap 15",
    "z-loss 1e-4": "--z_loss 1e-4",
    "cosine": "--schedule cosine",
    "constant": "--schedule constant",
    "wsd, half of it down": "--decay_fraction 0.5",
    "AdamW at 3e-3": "--learning_rate 3e-3",
    "AdamW at 1.2e-2": "--learning_rate 1.2e-2",
    "Muon at 5e-3": "--optimizer muon --learning_rate 5e-3",
    "Muon at 1e-2": "--optimizer muon --learning_rate 1e-2",
    "SOAP at 6e-3": "--optimizer soap --learning_rate 6e-3",
    "SOAP at 1e-2": "--optimizer soap --learning_rate 1e-2",
    "SGD at 0.1": "--optimizer sgd --learning_rate 0.1 --weight_decay 0",
    "SGD at 0.2": "--optimizer sgd --learning_rate 0.2 --weight_decay 0",
}


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
        # nanoGPT draws no plot, so neither shall train.py
        pathlib.Path(folder, "matplotlib.py").write_text("raise ImportError")
        timed([sys.executable, "prepare.py"], cwd=data, env=environment)
        script = [sys.executable, os.path.join(ROOT, "bpe.py")]
        shakespeare = os.path.join(folder, "shakespeare")
        timed([*script, "train", "--pattern", "char", "--input", text, "--out", shakespeare])
        timed(
            [
                *script,
                "encode",
                "--tokenizer",
                shakespeare,
                "--input",
                text,
                "--out",
                shakespeare,
                "--val_fraction",
                "0.1",
            ]
        )
        theirs = [
            sys.executable,
            "train.py",
            "config/train_shakespeare_char.py",
            *SIZES,
            "--device=cpu",
            "--compile=False",
            "--eval_iters=20",
            "--log_interval=100",
            "--max_iters=2000",
            "--lr_decay_iters=2000",
            "--dropout=0.0",
            f"--out_dir={folder}/theirs",
        ]
        rows = []
        for rate in (2e-3, 4e-3):  # 1e-3 is the published one
            a, printed = timed(
                [*theirs, f"--learning_rate={rate}", f"--min_lr={rate / 10}"], cwd=copy
            )
            losses = map(float, re.findall(r"val loss ([\d.]+)", printed))
            print(
                f"  nanoGPT at a learning rate of {rate:g}: {a:6.1f} s, "
                f"val loss {min(losses):.4f}",
                flush=True,
            )
        for seed in range(1, repeat + 1):
            a, printed = timed(theirs, cwd=copy)
            their_loss = min(map(float, re.findall(r"val loss ([\d.]+)", printed)))
            print(f"  nanoGPT  {a:6.1f} s, val loss {their_loss:.4f}", flush=True)
            for name, recipe in RECIPES.items():
                ours = [
                    sys.executable,
                    os.path.join(ROOT, "train.py"),
                    *SIZES,
                    *recipe.split(),
                    "--device=cpu",
                    f"--data={shakespeare}",
                    f"--out_dir={folder}/ours",
                    f"--seed={seed}",
                ]
                b, printed = timed(ours, env=environment)
                loss = float(re.search(r"^val_loss: ([\d.]+)", printed, re.M)[1])
                rows.append((name, b / a, loss, their_loss))
                print(
                    f"    train.py, {name:5} {b:6.1f} s, val loss {loss:.4f}    "
                    f"{b / a:.2f} of the time",
                    flush=True,
                )
        for name in RECIPES:
            share, loss, their_loss = (
                statistics.median(r[i] for r in rows if r[0] == name) for i in (1, 2, 3)
            )
            print(
                f"  {name}: median share of nanoGPT's time {share:.2f}, val loss {loss:.4f} "
                f"for {their_loss:.4f}"
            )


def steps(kind, nanogpt):
    """-> a function that does one training step of the model `kind`."""
    import torch

    torch.manual_seed(0)
    data = torch.randint(0, 65, (12, 65))
    x, y = data[:, :-1].contiguous(), data[:, 1:].contiguous()
    if kind == "nanoGPT":
        spec = importlib.util.spec_from_file_location(
            "their_model", os.path.join(nanogpt, "model.py")
        )
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
        config = M.TransformerConfig(
            vocab_size=65,
            block_size=64,
            n_layer=4,
            n_head=4,
            n_embd=128,
            **(gpt2 if kind == "train.py" else {}),
        )
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
        print(
            f"  {kind:24} {1e3 * statistics.median(times[kind]):6.1f} ms a step, "
            f"{ratio:.2f} x nanoGPT's "
            f"speed, peak {megabytes:.0f} MB"
        )


def ablations(bins, results, repeat):
    """Part 4. Two runs at a time, of one thread each; `results` keeps what is done."""
    done = {}
    if os.path.exists(results):
        done = {
            (r["flags"], r["seed"]): r for r in map(json.loads, open(results, encoding="utf-8"))
        }

    def one(job):
        name, seed = job
        flags = f"{BUDGET} {DEFAULT} {ABLATIONS[name]}"
        if (flags, seed) in done:
            return
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                os.path.join(ROOT, "train.py"),
                "--data",
                bins,
                "--out_dir",
                folder,
                "--seed",
                str(seed),
                *flags.split(),
            ]
            result = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        found = re.search(r"^val_loss: ([\d.]+)", result.stdout, re.M)  # none: the run failed
        done[flags, seed] = {
            "flags": flags,
            "seed": seed,
            "loss": float(found[1]) if found else None,
            "error": result.stderr[-300:],
        }
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(done[flags, seed]) + "\n")
        print(f"  {name:34} seed {seed}: {done[flags, seed]['loss']}", flush=True)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(one, [(name, seed) for seed in range(1, repeat + 1) for name in ABLATIONS]))

    # speed: a step of each in turn, in one process, so that what else the machine does hits all
    import torch

    import model as M
    import train as T

    steps, times = {}, {name: [] for name in ABLATIONS}
    autocast = T.make_autocast("cpu", "auto")[0]
    for name, flags in ABLATIONS.items():
        args = T.build_parser().parse_args(f"{BUDGET} {DEFAULT} {flags}".split())
        sizes = {k: getattr(args, k) for k in T.ARCHITECTURE if getattr(args, k) is not None}
        model = M.Transformer(M.TransformerConfig(**sizes | {"vocab_size": 2048}))
        optimizers = T.make_optimizers(
            model,
            args.optimizer,
            args.learning_rate,
            args.weight_decay,
            (args.beta1, args.beta2),
            args.momentum,
        )
        steps[name] = model, optimizers
    for i in range(14):
        x, y = torch.randint(0, 2048, (2, 8, 256))
        for name, (model, optimizers) in steps.items():
            start = time.perf_counter()
            T.backward(model, [(x, y)], autocast)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    print(
        "\n| change | validation loss | beside the default | spread of seeds | speed |\n"
        "|---|---|---|---|---|"
    )
    losses = {
        name: [done[f"{BUDGET} {DEFAULT} {flags}", seed]["loss"] for seed in range(1, repeat + 1)]
        for name, flags in ABLATIONS.items()
    }
    for name, found in losses.items():
        speed = statistics.median(a / b for a, b in zip(times["default"], times[name]))
        if None in found:
            print(f"| {name} | diverges | | | {speed:.2f} |")
            continue
        mean, default = statistics.mean(found), statistics.mean(losses["default"])
        print(
            f"| {name} | {mean:.3f} | {mean - default:+.3f} | {max(found) - min(found):.3f} "
            f"| {speed:.2f} |"
        )


def tinystories(nanogpt, bins, repeat, steps):
    """Part 3. Both are judged on all of val.bin, each window from its own beginning."""
    import torch

    import model as M
    import train as T

    header = T.open_bin(os.path.join(bins, "val.bin"))[1]
    vocab, text_bytes = int(header[3]), int(header[5])
    sizes = "--n_layer=4 --n_head=4 --n_embd=256 --block_size=256 --batch_size=8".split()
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(nanogpt, os.path.join(folder, "nanoGPT"))
        data = os.path.join(copy, "data", "stories")
        os.makedirs(data)
        for name in ("train.bin", "val.bin"):  # its format has no header
            pathlib.Path(data, name).write_bytes(pathlib.Path(bins, name).read_bytes()[1024:])
        pathlib.Path(data, "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab}))
        spec = importlib.util.spec_from_file_location(
            "their_model", os.path.join(nanogpt, "model.py")
        )
        theirs = sys.modules["their_model"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)

        def judge(model):
            val = T.open_bin(os.path.join(bins, "val.bin"))[0]
            loss = T.evaluate(model, val, 8, 256, "cpu", T.make_autocast("cpu", "float32")[0])
            return loss / 0.6931471805599453 * len(val) / text_bytes

        def their_run(rate, steps, seed):
            pathlib.Path(copy, "train.py").write_text(
                pathlib.Path(nanogpt, "train.py")
                .read_text()
                .replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
            )
            command = [
                sys.executable,
                "train.py",
                *sizes,
                "--dataset=stories",
                "--device=cpu",
                "--compile=False",
                "--eval_iters=1",
                "--eval_interval=100000",
                "--always_save_checkpoint=True",
                "--gradient_accumulation_steps=1",
                "--dropout=0.0",
                f"--max_iters={steps}",
                f"--eval_interval={steps}",
                f"--lr_decay_iters={steps}",
                "--warmup_iters=50",
                "--beta2=0.99",
                f"--learning_rate={rate}",
                f"--min_lr={rate / 10}",
                f"--out_dir={folder}/theirs",
            ]
            seconds, _ = timed(command, cwd=copy)
            checkpoint = torch.load(f"{folder}/theirs/ckpt.pt", weights_only=True)
            model = theirs.GPT(theirs.GPTConfig(**checkpoint["model_args"]))
            model.load_state_dict(checkpoint["model"])

            class All(torch.nn.Module):  # nanoGPT gives all logits only where it is given targets
                def forward(self, ids):
                    return model(ids, ids.contiguous())[0]

            return seconds, judge(All())

        def our_run(steps, seed):
            command = [
                sys.executable,
                os.path.join(ROOT, "train.py"),
                *sizes,
                "--data",
                bins,
                "--device=cpu",
                f"--max_iters={steps}",
                "--optimizer=muon",
                "--learning_rate=1e-2",
                "--decay_fraction=0.6",
                "--eval_interval=100000",
                f"--out_dir={folder}/ours",
                f"--seed={seed}",
            ]
            seconds, _ = timed(command)
            return seconds, judge(M.load_checkpoint(f"{folder}/ours/ckpt.pt")[0])

        rates = 1e-3, 3e-3
        tuned = {rate: their_run(rate, steps, 1) for rate in rates}
        for rate, (seconds, bits) in tuned.items():
            print(
                f"  nanoGPT, {steps} steps at {rate:g}: {seconds:.0f} s, {bits:.4f} bits per byte",
                flush=True,
            )
        best = min(rates, key=lambda rate: tuned[rate][1])
        pace = our_run(100, 1)[0], our_run(200, 1)[0]
        for seed in range(1, repeat + 1):
            seconds, bits = tuned[best] if seed == 1 else their_run(best, steps, seed)
            n = int(100 + (0.97 * seconds - pace[0]) / (pace[1] - pace[0]) * 100)
            our_seconds, our_bits = our_run(n, seed)
            print(
                f"  seed {seed}: nanoGPT at {best:g} {seconds:.0f} s, {bits:.4f} bits per byte; "
                f"train.py, {n} steps, "
                f"{our_seconds:.0f} s, {our_bits:.4f} ({our_bits - bits:+.4f})",
                flush=True,
            )


def machine():
    """Part 5."""
    import torch

    import model as M
    import train as T

    print(
        "| 4 layers, batch | float32 | bfloat16 | float32, compiled | bfloat16, compiled |\n"
        "|---|---|---|---|---|"
    )
    for width, batch, T_, vocab in (
        (128, 12, 64, 65),
        (128, 32, 64, 65),
        (256, 8, 256, 2048),
        (512, 8, 256, 2048),
    ):
        steps, times = [], []
        x, y = torch.randint(0, vocab, (2, batch, T_))
        for compiled in (False, True):
            for dtype in ("float32", "bfloat16"):
                config = M.TransformerConfig(vocab_size=vocab, block_size=T_, n_embd=width)
                model = M.Transformer(config)
                optimizer = T.AdamW(T.parameter_groups(model, 0.1))
                steps.append(
                    (
                        torch.compile(model) if compiled else model,
                        optimizer,
                        T.make_autocast("cpu", dtype)[0],
                    )
                )
                times.append([])
        for i in range(13):
            for (model, optimizer, autocast), found in zip(steps, times):
                start = time.perf_counter()
                T.backward(model, [(x, y)], autocast)
                optimizer.step()
                optimizer.zero_grad()
                if i >= 3:
                    found.append(1e3 * (time.perf_counter() - start))
        print(
            f"| width {width}, {batch} x {T_}, vocabulary {vocab:,} | "
            + " | ".join(f"{statistics.median(found):.0f}" for found in times)
            + " |",
            flush=True,
        )
    for kind in ("kept", "checkpointed"):
        megabytes = json.loads(
            timed([sys.executable, __file__, "--memory", kind])[1].splitlines()[-1]
        )
        print(
            f"activations {kind}: {megabytes[0]:.0f} MB above the model, "
            f"{megabytes[1]:.2f} s a step"
        )


def activations(kind):
    """Peak memory above what is there before the first step, and seconds of a step: 12 layers, width
    256, 8 sequences of 512, bfloat16 where it is fast."""
    import torch

    import model as M
    import train as T

    model = M.Transformer(M.TransformerConfig(vocab_size=2048, block_size=512, n_layer=12))
    model.activation_checkpointing = kind == "checkpointed"
    x, y = torch.randint(0, 2048, (2, 8, 512))
    autocast = T.make_autocast("cpu", "auto")[0]
    unit = 1 << (20 if sys.platform == "darwin" else 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    times = []
    for _ in range(4):
        start = time.perf_counter()
        T.backward(model, [(x, y)], autocast)
        times.append(time.perf_counter() - start)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit - before, statistics.median(
        times[1:]
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nanogpt", metavar="DIR")
    parser.add_argument("--text", metavar="FILE", help="tiny Shakespeare: parts 1 and 2")
    parser.add_argument("--bins", metavar="DIR", help="train.bin and val.bin: part 3")
    parser.add_argument("--ablations", metavar="DIR", help="train.bin and val.bin: part 4")
    parser.add_argument("--results", default="ablations.jsonl", metavar="FILE", help="of part 4")
    parser.add_argument("--steps", type=int, default=400, help="of nanoGPT, with --bins")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--machine", action="store_true", help="part 5")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory in ("kept", "checkpointed"):
        print(json.dumps(activations(args.memory)))
        return
    if args.memory:
        step = steps(args.memory, args.nanogpt)
        for _ in range(30):
            step()
        print(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (1 << (20 if sys.platform == "darwin" else 10))
        )
        return
    if args.machine:
        machine()
    if args.bins:
        tinystories(args.nanogpt, args.bins, args.repeat, args.steps)
    if args.ablations:
        ablations(args.ablations, args.results, args.repeat)
    if args.text:
        print("the same architecture, batch and precision")
        compare_steps(args.nanogpt)
        print("character-level tiny Shakespeare to a validation loss of 1.88")
        race(args.nanogpt, args.text, args.repeat)


if __name__ == "__main__":
    main()
