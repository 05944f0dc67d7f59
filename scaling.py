"""
Scaling laws: small runs that predict large ones.

    python scaling.py                         # the whole method: some 30 small runs, laws, a
                                              # prediction at 10 times the compute, and its test
    python scaling.py run --n_layer 2 --n_embd 64 --train_flops 1e11 --learning_rate 1e-2
    python scaling.py sweep --grid learning_rate=3e-3,1e-2,3e-2 n_embd=32,64 --train_flops 1e11
    python scaling.py sweep --random 20 --grid learning_rate=1e-3:1e-1 --train_flops 1e11
    python scaling.py isoflop --budgets 1e11,4e11 --sizes 32x2,64x2,96x3 --learning_rate 1e-2
    python scaling.py fit scaling/runs.jsonl --method isoflop --compute 1e13 --out scaling
    python scaling.py fit chinchilla.csv --method parametric --inference_tokens 1e12

Flags that are not listed here are passed on to train.py. --train_flops C is ours: it sets
--max_iters to as many steps as C floating-point operations pay for. A finished run is a line of
runs.jsonl, and asking for it again costs nothing. `fit` takes such a file, or a table of other
people's runs (.json, .csv) whose columns have the usual names.

Notation: N parameters, without the input embedding (a table look-up, no computation); D training
tokens; C = 6 N D floating-point operations of training (FLOPs); losses in nats per token.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import glob
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from typing import NamedTuple

import numpy as np

ROOT, DATA = os.path.dirname(os.path.abspath(__file__)), os.path.join("data", "scaling")

# ---- Tables of runs.

NAMES = {"N": ("n", "parameters", "params", "model size", "n params"),
         "D": ("d", "tokens", "training tokens", "train tokens"),
         "C": ("c", "compute budget", "compute", "training flop", "training flops", "flops"),
         "loss": ("loss", "final loss", "val loss")}

def columns(runs):
    """Runs, a list of dicts (or a dict of columns) -> {"N", "D", "C", "loss": float64 (n,)}. Names
    are matched without regard to case, spaces and underscores; C or D may be missing, as C = 6 N D.
    Raises ValueError for a missing column and for values that are not positive, which have no
    logarithm."""
    if isinstance(runs, dict):
        runs = [dict(zip(runs, row)) for row in zip(*runs.values(), strict=True)]
    plain = {" ".join(str(key).lower().replace("_", " ").split()): key for key in {**runs[0]}}
    table = {}
    for name, usual in NAMES.items():
        keys = [plain[known] for known in usual if known in plain]
        if keys:  # of several, the first that a run has: the budget it was given, or what it took
            found = [next((run[k] for k in keys if run.get(k) is not None), "") for run in runs]
            table[name] = np.array([float(value or "nan") for value in found])
    if {"N", "D"} <= table.keys():
        table.setdefault("C", 6 * table["N"] * table["D"])
    elif {"N", "C"} <= table.keys():
        table["D"] = table["C"] / (6 * table["N"])
    for name in NAMES:
        if name not in table:
            raise ValueError(f"no column for {name} ({', '.join(NAMES[name])}) in {', '.join(plain)}")
        if not ((table[name] > 0) & (table[name] < math.inf)).all():
            raise ValueError(f"a run's {name} is not positive")
    return table

def load_runs(path):
    """Read a .jsonl, .json or .csv file -> list of dicts. Raises ValueError, OSError."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if str(path).endswith(".jsonl"):
            runs = [json.loads(line) for line in file if line.strip()]
        else:
            runs = json.load(file) if str(path).endswith(".json") else list(csv.DictReader(file))
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path} is no table of runs: a list of objects, one for each run")
    return runs

# ---- Power laws. Over many orders of magnitude losses and optima follow y = a x^b (Kaplan et al.
# 2020): straight lines in logarithms.

class PowerLaw(NamedTuple):
    """y = coefficient * x^exponent"""
    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent

def fit_power_law(x, y):
    """Least squares of log y against log x -> PowerLaw.

        fit_power_law([1, 10, 100], [2, 20, 200]) -> (2.0, 1.0)

    Raises ValueError for fewer than 2 different x, and for what has no logarithm."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(np.unique(x)) < 2 or x.shape != y.shape or not min(x.min(), y.min()) > 0:
        raise ValueError("a power law needs at least 2 different points, of positive numbers")
    x, y = np.log(x), np.log(y)
    d = x - x.mean()
    exponent = float((d @ y) / (d @ d))
    return PowerLaw(float(np.exp(y.mean() - exponent * x.mean())), exponent)

def valley(x, loss, method="parabola"):
    """Where a loss is lowest along x -> (x, loss): at the best run ("minimum"), or at the bottom
    of a parabola in log x through all runs. Raises ValueError if that has no bottom within the
    range of x: then the runs do not say where the best x is."""
    x, loss = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    least = 2 if method == "minimum" else 3
    if len(np.unique(x)) < least:
        raise ValueError(f"a curve needs at least {least} points, not {len(np.unique(x))}")
    if method == "minimum":
        return float(x[loss.argmin()]), float(loss.min())
    parabola = np.polyfit(np.log(x), loss, 2)
    bottom = -parabola[1] / (2 * parabola[0]) if parabola[0] > 0 else math.nan
    if not np.log(x.min()) <= bottom <= np.log(x.max()):
        raise ValueError("the losses have no valley within what was tried")
    return float(np.exp(bottom)), float(np.polyval(parabola, bottom))

def groups_of(values, tolerance=1.1):
    """Group runs whose values are equal up to a factor: runs end at whole steps, so that their
    compute is not quite what was asked for -> list of (geometric mean, indices), ascending."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(values[order][1:] > tolerance * values[order][:-1]) + 1
    return [(float(np.exp(np.log(values[i]).mean())), i) for i in np.split(order, cuts)]

# ---- Chinchilla's three approaches (Hoffmann et al. 2022) to the question: with a given compute,
# how large a model should one train, on how many tokens?

Choice = namedtuple("Choice", "C N D loss")  # a model, its tokens and its loss, for a compute
# PowerLaws of the best N and D by C, and the list of Choices that they were fitted to
ComputeLaws = namedtuple("ComputeLaws", "N D optima")

def compute_laws(optima):
    """Power laws through optima, a list of Choices -> ComputeLaws."""
    C, N, D, _ = np.array(optima).T
    return ComputeLaws(fit_power_law(C, N), fit_power_law(C, D), optima)

def fit_envelope(runs):
    """Approach 1: among runs of all kinds, the optima are those that no run beats with as little
    compute. runs: list of dicts, or columns. -> ComputeLaws. Raises ValueError."""
    table = columns(runs)
    best, lowest = [], math.inf
    for i in np.lexsort((table["loss"], table["C"])):
        if table["loss"][i] < lowest:
            lowest = table["loss"][i]
            best.append(Choice(*(float(table[name][i]) for name in Choice._fields)))
    return compute_laws(best)

def fit_isoflops(runs, method="parabola"):
    """Approach 2: among models trained with the same compute, the small ones lack capacity and the
    large ones see too few tokens. The bottom of each such curve is an optimum. runs: list of dicts,
    or columns; method: parabola or minimum, see `valley`. -> ComputeLaws. Raises ValueError."""
    table, optima = columns(runs), []
    for C, i in groups_of(table["C"]):
        try:
            N, loss = valley(table["N"][i], table["loss"][i], method)
        except ValueError as error:
            raise ValueError(f"at C = {C:.3g}: {error}") from None
        optima.append(Choice(C, N, C / (6 * N), loss))
    return compute_laws(optima)

class Parametric(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta: the loss of the text itself, what a model of finite
    size adds, and what training on finitely many tokens adds."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float  # sum of Huber losses
    left_out: tuple  # indices of runs taken for outliers

    def __call__(self, N, D):
        N, D = np.asarray(N, np.float64), np.asarray(D, np.float64)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

def parametric(theta, objective, left_out):
    """The law of theta, (log E, log A, log B, alpha, beta)."""
    return Parametric(*np.exp(theta[:3]).tolist(), *theta[3:].tolist(), float(objective),
                      tuple(left_out))

def evaluate(theta, x, y, z, weights, delta):
    """How well s candidate laws fit n runs. theta: (s, 5), see `parametric`; x, y, z: log N,
    log D, log loss (n,); weights: (n,) or (s, n).
    -> objectives, sums over runs of weight times Huber loss (r^2 / 2, a straight line beyond
    |r| = delta) (s,); residuals r = log L - log loss (s, n); the share of each term in L, which is
    the derivative of log L by the term's logarithm (3, s, n)."""
    e, a, b, alpha, beta = (column[:, None] for column in theta.T)
    terms = np.stack((e + 0 * x, a - alpha * x, b - beta * y))
    top = terms.max(0)  # taken off before the exponential, as in a softmax
    parts = np.exp(terms - top)
    total = parts.sum(0)
    r = top + np.log(total) - z
    clipped = np.minimum(np.abs(r), delta)
    return (weights * clipped * (np.abs(r) - clipped / 2)).sum(-1), r, parts / total

def minimize_huber(theta, x, y, z, weights, delta, iterations=1000):
    """Minimize the objective of `evaluate` from s starts at once by Levenberg-Marquardt:
    Gauss-Newton steps, damped the more the less they helped before. Arguments as there.
    -> minima (s, 5), their objectives (s,), the largest entry of each one's gradient (s,)."""
    # with N and D centered, a change of alpha or beta turns the curve about the middle of the runs
    # and hardly calls for another A or B: the problem is far better conditioned
    center = np.array([x.mean(), y.mean()])
    x, y, theta = x - center[0], y - center[1], theta.copy()
    theta[:, 1:3] -= theta[:, 3:] * center
    weights = np.broadcast_to(weights, (len(theta), len(x)))
    damping, gradient = np.full(len(theta), 1e-2), np.full(len(theta), np.inf)
    stalled = np.zeros(len(theta), int)  # iterations in a row without gain
    for _ in range(iterations):
        i = np.flatnonzero(stalled < 12)
        if not len(i):
            break
        old, w = theta[i], weights[i]
        before, r, (e, a, b) = evaluate(old, x, y, z, w, delta)
        J = np.stack((e, a, b, -a * x, -b * y), axis=1)  # dr / dtheta (s, 5, n)
        g = J @ (w * np.clip(r, -delta, delta))[:, :, None]  # (s, 5, 1)
        gradient[i] = np.abs(g).max((1, 2))
        # only runs within delta of the law have curvature; the damping's scale counts all runs
        H = (J * (w * (np.abs(r) < delta))[:, None]) @ J.swapaxes(1, 2)
        scale = np.einsum("sn,sjn->sj", w, J * J)
        diagonal = damping[i, None] * scale + 1e-14
        step = np.linalg.solve(H + diagonal[:, :, None] * np.eye(5), g)[:, :, 0]
        new = old - np.clip(step, -5, 5)
        after = evaluate(new, x, y, z, w, delta)[0]
        better = after < before
        theta[i[better]] = new[better]
        damping[i] = np.clip(damping[i] * np.where(better, 0.2, 5), 1e-12, 1e8)
        stalled[i] = np.where(before - after > 1e-13 * before, 0, stalled[i] + 1)
    objective = evaluate(theta, x, y, z, weights, delta)[0]
    theta[:, 1:3] += theta[:, 3:] * center
    return theta, objective, gradient

def fit_parametric(N, D, loss, delta=1e-3, outliers=11.0):
    """Approach 3: fit L(N, D) = E + A / N^alpha + B / D^beta, by the sum over runs of the Huber
    loss of log L - log loss -> Parametric.

    From the best 60 of the published grid's 4,500 starts, in float64, until the gradient vanishes.
    (The first published fit stopped early: it minimized the mean instead of the sum, which fell
    below the optimizer's tolerance; Besiroglu et al. 2024.) Runs more than `outliers` standard
    deviations (estimated by the median) from the law are left out, and the rest is fitted again:
    at 11, these are just the five of Hoffmann et al.'s 245 runs that Besiroglu et al. leave out;
    None keeps all. Raises ValueError where the runs do not determine the law: too few, all at one
    size, a fit that does not converge or ends at a bound."""
    x, y, z = (np.log(np.asarray(column, np.float64)) for column in (N, D, loss))
    if len(x) < 6 or min(len(np.unique(x)), len(np.unique(y))) < 3:
        raise ValueError("too few runs: 5 numbers need at least 6, with 3 values of N and 3 of D")
    if np.corrcoef(x, y)[0, 1] > 0.99999:
        raise ValueError("D is tied to N in all runs: they can not tell which lowers the loss")
    exponents = np.arange(0, 2.5, 0.5)
    grid = np.array(list(itertools.product(exponents - 1, range(0, 30, 5), range(0, 30, 5),
                                           exponents, exponents)))
    kept = np.arange(len(x))
    for _ in range(10):  # two or three are enough
        data = x[kept], y[kept], z[kept], np.ones(len(kept)), delta
        first = np.argsort(evaluate(grid, *data)[0])[:60]
        theta, objective, _ = minimize_huber(grid[first], *data, iterations=300)
        # where the valley is long and bent, that is not enough
        theta, objective, gradient = minimize_huber(theta[np.argsort(objective)[:5]], *data, 10000)
        best = objective.argmin()
        _, r, share = evaluate(theta[best : best + 1], x, y, z, 1, delta)
        spread = max(1.4826 * np.median(np.abs(r[0, kept])), delta)
        near = np.flatnonzero(np.abs(r[0]) <= outliers * spread) if outliers else kept
        if np.array_equal(near, kept) or len(near) < 6:
            break
        kept = near
    if not gradient[best] <= 1e-6 * delta * len(kept):
        raise ValueError(f"the fit did not converge: its gradient is still {gradient[best]:.1e}")
    largest = share[:, 0, kept].max(1)
    at_bound = {"alpha": not 0.01 < theta[best, 3] < 4, "beta": not 0.01 < theta[best, 4] < 4,
                "E": largest[0] < 1e-3, "A": largest[1] < 1e-5, "B": largest[2] < 1e-5}
    if any(at_bound.values()):
        raise ValueError("the runs do not determine the law: the fit ends at the bounds of "
                         f"{' and '.join(name for name in at_bound if at_bound[name])}")
    return parametric(theta[best], objective[best],
                      np.setdiff1d(np.arange(len(x)), kept).tolist())

def predict(fit, x, D=None, inference_tokens=0.0):
    """What a fit says of x. fit a PowerLaw: y there. A Parametric law and D: the loss of N = x on D
    tokens. Otherwise x is a compute: -> Choice of the best N and D for it (its loss NaN if fit is
    ComputeLaws). inference_tokens: how many the model will read or write in use, for 2 N FLOPs each
    out of the same compute (Sardana et al. 2023): the more, the smaller the best model. Raises
    ValueError."""
    if isinstance(fit, PowerLaw):
        return fit(x)
    if D is not None:
        return fit(x, D)
    C = float(x)
    if not 0 <= 2 * inference_tokens < C < math.inf:
        raise ValueError(f"compute {C:g}: not positive, or at most 2 FLOPs per inference token")
    if isinstance(fit, ComputeLaws):
        return Choice(C, float(fit.N(C)), float(fit.D(C)), math.nan)
    # a search on ever finer grids; without inference the answer is N = G (C / 6)^(beta / (alpha +
    # beta)) with G = (alpha A / (beta B))^(1 / (alpha + beta))
    low, high = 1.0, C / max(6.0, 2 * inference_tokens)
    for _ in range(9):
        N = np.geomspace(low, high, 200)[1:-1]
        D = (C / N - 2 * inference_tokens) / 6
        i = fit(N, np.maximum(D, 1e-9)).argmin()
        low, high = N[i] * N[0] / N[1], N[i] * N[1] / N[0]
    return Choice(C, float(N[i]), float(D[i]), float(fit(N[i], D[i])))

# ---- How sure is a fit? The bootstrap (Efron 1979): fit again to runs drawn from the runs, with
# replacement. The fits vary about as much as they would with newly made runs.

def bootstrap(table, fit, n=100, seed=0):
    """n fits to runs drawn from a table (of `columns`), at each compute as many as there are;
    draws that can not be fitted are left out. fit: a function of a table. -> list."""
    rng, groups, fits = np.random.default_rng(seed), groups_of(table["C"]), []
    for _ in range(n):
        rows = np.concatenate([rng.choice(i, len(i)) for _, i in groups])
        with contextlib.suppress(ValueError):
            fits.append(fit({name: values[rows] for name, values in table.items()}))
    return fits

def bootstrap_parametric(fit, N, D, loss, n=100, seed=0, delta=1e-3):
    """The same for a Parametric law, all n at once: how often a run is drawn is its weight."""
    kept = np.setdiff1d(np.arange(len(N)), fit.left_out)
    data = [np.log(np.asarray(column, np.float64))[kept] for column in (N, D, loss)]
    weights = np.random.default_rng(seed).multinomial(len(kept), np.ones(len(kept)) / len(kept), n)
    start = np.append(np.log(fit[:3]), fit[3:5])
    theta, objective, _ = minimize_huber(np.tile(start, (n, 1)), *data, weights, delta)
    return [parametric(row, value, fit.left_out) for row, value in zip(theta, objective)]

def interval(values):
    """The middle of a sample: 80% of it lie between these two."""
    return tuple(np.quantile(np.asarray(values, np.float64), (0.1, 0.9)).tolist())

# ---- Runs: hyperparameters in, loss out. train.py is started as a process.

# a child looks after its parent, and ends when that was killed
WATCH = """import os, runpy, sys, threading, time
def watch():
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
sys.argv.pop(0)
parent = int(sys.argv.pop(0))
threading.Thread(target=watch, daemon=True).start()
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")"""

def start(script, words, threads=1):
    """Run one of the other scripts. Raises ValueError with the last line of its errors."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(os.getpid()), os.path.join(ROOT, script), *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"{script} was stopped").splitlines()[-1]
        raise ValueError(last.removeprefix(f"{script}: error: "))

def parse_flags(words):
    """train.py's flags, as on a command line -> {name: value}, "True" for one without a value.
    Numbers are written in one way, so that a run is found again by its flags. Raises ValueError."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else "True"
        elif flags.get(name) == "True":
            flags[name] = word
        else:
            raise ValueError(f"{word!r} is neither a flag nor the value of one")
    for name, value in flags.items():
        if name in ("out_dir", "resume", "init_from", "eval_interval", "eval_iters"):
            raise ValueError(f"--{name} is for scaling.py to set")
        with contextlib.suppress(ValueError):
            flags[name] = f"{float(value):.12g}"
    return flags

def plan(flags, data):
    """What a run will take -> {parameters, tokens, compute, iters}; --train_flops becomes a number
    of steps. Raises ValueError, with train.py's sentence where there is no data."""
    from model import TransformerConfig, count  # (takes seconds)
    if not os.path.exists(os.path.join(data, "train.bin")):
        start("train.py", ["--data", data, "--eval_only"])
    head, sizes = np.fromfile(os.path.join(data, "train.bin"), "<i4", 256), {"vocab_size": 50304}
    if len(head) == 256 and head[0] in (20240520, 20240801):  # else it has no header
        sizes["vocab_size"] = int(head[3])
    for name, default in vars(TransformerConfig()).items():
        if name in flags:
            kind = (lambda text: text == "True") if isinstance(default, bool) else type(default)
            sizes[name] = kind(flags[name])
    parameters, flops = count(TransformerConfig(**sizes))
    step = math.prod(int(flags.get(name, default)) for name, default in (  # train.py's
        ("batch_size", 8), ("block_size", 256), ("gradient_accumulation_steps", 1)))
    iters, per_token = int(flags.get("max_iters", 450)), 3 * int(flops.total())
    if "train_flops" in flags:
        iters = round(float(flags["train_flops"]) / per_token / step)
    return {"parameters": parameters.total() - parameters["embedding"], "tokens": iters * step,
            "compute": iters * step * per_token, "iters": iters}

def train(flags, data, threads=1):
    """Hyperparameters in, loss out: {flag of train.py: value} and a folder of .bin files -> record
    for runs.jsonl. Raises ValueError with train.py's error."""
    record = plan(flags, data) | {"flags": flags, "data": data}
    if "train_flops" in flags:
        record["compute_budget"] = float(flags["train_flops"])
    # eval_iters is for evaluations before the last one, which takes all of val.bin
    words = [f"--{name}={value}" for name, value in flags.items() if name != "train_flops"]
    with tempfile.TemporaryDirectory() as folder:
        start("train.py", [*words, f"--max_iters={record['iters']}", "--data", data, "--out_dir",
                           folder, "--eval_interval=1000000", "--eval_iters=1"], threads)
        with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
            last = list(csv.DictReader(file))[-1]
    return record | {"loss": float(last["val_loss"]), "seconds": float(last["seconds"])}

def run_all(asked, args):
    """Make runs, as many at a time as there are cores (one with a GPU). asked: list of flags ->
    their records in that order; those in args.runs are not trained again, and one that fails is
    printed and left out. Raises ValueError if all fail, or if args.budget, the FLOPs that all runs
    in the file may take together, does not suffice: then none is started."""
    os.makedirs(os.path.dirname(os.path.abspath(args.runs)), exist_ok=True)
    runs = load_runs(args.runs) if os.path.exists(args.runs) else []
    todo = [flags for flags in asked if not any(run["flags"] == flags for run in runs)]
    print(f"{len(asked)} runs, {len(todo)} of them new", flush=True)
    if args.budget and todo:
        spent = sum(run["compute"] for run in runs)
        need = sum(plan(flags, args.data)["compute"] for flags in todo)
        if spent + need > args.budget:
            raise ValueError(f"the budget is {args.budget:.3g} FLOPs, {spent:.3g} are spent, and "
                             f"{len(todo)} new runs would take {need:.3g}: none was started")
    cores = os.cpu_count() or 1
    jobs = 1 if os.path.exists("/dev/nvidia0") else min(cores, max(1, len(todo)))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        work = {pool.submit(train, flags, args.data, cores // jobs): flags for flags in todo}
        for i, future in enumerate(concurrent.futures.as_completed(work), 1):
            what = " ".join(f"--{name} {value}" for name, value in work[future].items())
            try:
                run = future.result()
            except (ValueError, OSError) as error:
                print(f"failed: {what}: {error}", file=sys.stderr, flush=True)
                continue
            runs.append(run)
            with open(args.runs, "a", encoding="utf-8") as file:  # one write, so that several
                file.write(json.dumps(run) + "\n")  # processes can add to it
            print(f"[{i}/{len(todo)}] {what} | N {run['parameters']:,} | D {run['tokens']:,} | "
                  f"loss {run['loss']:.4f} | {run['seconds']:.0f} s", flush=True)
    found = [run for flags in asked for run in runs if run["flags"] == flags]
    if not found:
        raise ValueError("all runs failed")
    return found

def parse_size(text):
    """"64x2", n_embd and n_layer -> flags. Heads have 16 units, whatever the width."""
    width, _, depth = text.partition("x")
    if int(width) % 16:
        raise ValueError(f"{text}: n_embd is a multiple of 16")
    return {"n_embd": str(int(width)), "n_layer": str(int(depth)), "n_head": str(int(width) // 16)}

def isoflop_runs(flags, args):
    """Flags of a run of each size at each budget; but none with less than 2 tokens per parameter or
    more than 120: so far from any optimum the law's three terms are too simple."""
    asked = []
    for C, size in itertools.product(args.budgets, args.sizes):
        run = parse_flags([f"--{k}={v}" for k, v in {**flags, **size, "train_flops": C}.items()])
        cost = plan(run, args.data)
        if cost["iters"] >= 20 and 2 <= cost["tokens"] / cost["parameters"] <= 120:
            asked.append(run)
    return asked

def grid_of(specs, draws=0, seed=0):
    """["a=1,2", "b=x,y"] -> all combinations, [{"a": "1", "b": "x"}, ...]; or as many random draws
    (Bergstra & Bengio 2012), where a=low:high is drawn evenly in logarithms. Raises ValueError."""
    options = {name.lstrip("-"): text.split(",") for name, _, text in (s.partition("=") for s in specs)}
    if not draws:
        return [dict(zip(options, row)) for row in itertools.product(*options.values())]
    rng, rows = np.random.default_rng(seed), []
    for _ in range(draws):
        row = {name: str(rng.choice(values)) for name, values in options.items()}
        for name, value in row.items():
            if ":" in value:
                low, high = map(float, value.split(":"))
                row[name] = f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}"
        rows.append(row)
    return rows

# ---- Reports: dicts that are printed as tables, and kept as JSON.

METHODS = {"isoflop": fit_isoflops, "envelope": fit_envelope,
           "minimum": functools.partial(fit_isoflops, method="minimum")}

def as_dict(law, fits=(), y="", x="C"):
    """A law for JSON, with standard errors and 80% intervals over fits to resampled runs, and for
    a PowerLaw of y by x a formula."""
    result = {}
    for i, name in enumerate(law._fields):
        result[name] = law[i]
        if fits and i < 5:  # else a Parametric law's objective, or runs left out
            values = [fit[i] for fit in fits]
            result[name + "_error"], result[name + "_interval"] = np.std(values), interval(values)
    if y:
        result["formula"] = f"{y} = {law.coefficient:.4g} {x}^{law.exponent:.4f}"
    return result

def report(method, table, computes, n=100, inference_tokens=0.0):
    """Fit by one of Chinchilla's approaches, n times more to resampled runs, and predict the best
    model for each of some computes -> (dict, fit, list of the other fits)."""
    if method == "parametric":
        points = table["N"], table["D"], table["loss"]
        best = fit_parametric(*points)
        fits = bootstrap_parametric(best, *points, n)
        result = as_dict(best, fits)
    else:
        best, fits = METHODS[method](table), bootstrap(table, METHODS[method], n)
        result = {"N": as_dict(best.N, [fit.N for fit in fits], "N"),
                  "D": as_dict(best.D, [fit.D for fit in fits], "D"),
                  "optima": [choice._asdict() for choice in best.optima]}
    result |= {"resamples": len(fits), "predictions": []}
    for tokens, C in itertools.product(dict.fromkeys((0.0, inference_tokens)), computes):
        choice, *others = (predict(fit, C, inference_tokens=tokens) for fit in (best, *fits))
        row = {"inference_tokens": tokens, **choice._asdict(),
               "tokens_per_parameter": choice.D / choice.N}
        if fits:
            row["N_interval"] = interval([other.N for other in others])
            row["loss_interval"] = interval([other.loss for other in others])
        result["predictions"].append({k: v for k, v in row.items() if not np.isnan(v).any()})
    return result, best, fits

def show(result):
    """Print a report: laws as formulas, lists as tables, numbers by their names."""
    def text(value):
        if isinstance(value, tuple):
            return f"[{', '.join(map(text, value))}]"
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    for name, value in result.items():
        if isinstance(value, dict):
            more = (f"{key} {text(value[key])}" for key in value if key.endswith("_interval"))
            print(value["formula"], *more, sep="   ")
        elif isinstance(value, list):
            for row in [list(value[0]), *(row.values() for row in value)] if value else ():
                print("  ".join(text(cell).rjust(12) for cell in row))
        else:
            print(f"{name}: {text(value)}")

def save(folder, name, result, table, fits):
    """Leave name.json, and if matplotlib is installed name.png: the isoFLOP curves with their
    minima; the best N for C, over the contours of L(N, D); loss against compute, with the fit
    extrapolated. fits: ComputeLaws, Parametric."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no plots: they need matplotlib (pip install matplotlib)", file=sys.stderr)
    figure = Figure(figsize=(16, 4.6), layout="tight")
    curves, sizes, losses = figure.subplots(1, 3)
    curves.set(xscale="log", xlabel="N, parameters", ylabel="loss")
    sizes.set(xscale="log", yscale="log", xlabel="C, FLOPs", ylabel="best N; contours of L(N, D)")
    losses.set(xscale="log", xlabel="C, FLOPs", ylabel="loss; the fit; what was measured")
    for C, i in groups_of(table["C"]):
        i = i[np.argsort(table["N"][i])]
        curves.plot(table["N"][i], table["loss"][i], "o-", ms=4, label=f"C = {C:.1e}")
    curves.legend(fontsize=6)
    losses.plot(table["C"], table["loss"], ".", color="gray")
    sizes.plot(table["C"], table["N"], ".", color="gray")
    x = np.geomspace(table["C"].min(), table["C"].max() * 10)
    for fit in fits:
        if isinstance(fit, ComputeLaws):
            C, N, _, loss = np.array(fit.optima).T
            curves.plot(N, loss, "k*", ms=9)
            sizes.plot(C, N, "k*", x, fit.N(x))
        else:
            y = np.geomspace(table["N"].min(), table["N"].max() * 3)[:, None]
            loss = fit(y, x / (6 * y))
            sizes.contour(x, y[:, 0], loss, np.quantile(loss, np.linspace(0.02, 0.9, 14)))
            losses.plot(x, [predict(fit, C).loss for C in x])
    figure.savefig(path + ".png", dpi=110)

def fit_command(args):
    """`scaling.py fit`."""
    runs = load_runs(args.file)
    table, fits, result = columns(runs), [], {"method": args.method, "runs": len(runs)}
    if args.method == "kaplan":  # the lowest loss for each N, each D and each C
        for name in "NDC":
            best = [(x, table["loss"][i].min()) for x, i in groups_of(table[name])]
            result[name] = as_dict(fit_power_law(*zip(*best)), (), "loss", name)
    else:
        above = 10.0 ** (1 + math.floor(math.log10(table["C"].max())))
        computes = args.compute or [above, 10 * above, 100 * above]
        more, fit, _ = report(args.method, table, computes, args.bootstrap, args.inference_tokens)
        result, fits = result | more, [fit]
    print(json.dumps(result, indent=1)) if args.json else show(result)
    if args.out:
        save(args.out, args.method, result, table, fits)

# ---- The whole method, on this machine.

def make_data(folder):
    """Python's own standard library in 512 tokens, few, so that small models are not all head."""
    library = os.path.dirname(os.__file__)
    files = [path for path in sorted(glob.glob(f"{library}/**/*.py", recursive=True))
             if os.path.getsize(path) and not re.search("-packages|test", path[len(library):])]
    print(f"{folder}: {len(files)} files of Python's standard library, in 512 tokens", flush=True)
    for words in (["train", "--vocab_size", "512"],
                  ["encode", "--tokenizer", folder, "--val_fraction", "0.02"]):
        start("bpe.py", [*words, "--input", *files, "--out", folder], os.cpu_count())

def study(args):
    """The learning rate, isoFLOP curves, laws, a prediction at a larger compute, and its test."""
    # small batches, so that the shortest runs have some hundred steps: what happens in the first
    # ones is no power law, and with batches of 8 the predictions came out 0.1 nats too high
    flags = {"block_size": "128", "batch_size": "2", "mup": "64", **args.flags}
    C, base = args.target or 10 * args.budgets[-1], args.sizes[len(args.sizes) // 2]
    print("1. the learning rate, at one size: with --mup it holds for the others", flush=True)
    if "learning_rate" not in flags:
        asked = [{**flags, **base, "train_flops": f"{args.budgets[1]:.12g}", "learning_rate": rate}
                 for rate in ("0.0025", "0.005", "0.01", "0.02", "0.04")]
        tried = [(float(r["flags"]["learning_rate"]), r["loss"]) for r in run_all(asked, args)]
        try:
            best, _ = valley(*zip(*tried))
        except ValueError:  # a flat or slanting curve: its lowest point
            best, _ = min(tried, key=lambda pair: pair[1])
        flags["learning_rate"] = f"{best:.3g}"
    print(f"   {flags['learning_rate']}\n2. models of several sizes at each budget", flush=True)
    table = columns(run_all(isoflop_runs(flags, args), args))
    print("3. the laws")
    isoflop, laws, _ = report("isoflop", table, [C])
    show(isoflop)
    parametric, law, others = report("parametric", table, [C])
    show(parametric)

    # the width at which N = 12 depth width^2 + V width is the best N for C, in steps of 16; the
    # depth is kept, since a law holds for one family of models
    depth, width = int(base["n_layer"]), int(base["n_embd"])
    V = plan(flags | base, args.data)["parameters"] / width - 12 * depth * width
    width = (math.sqrt(V * V + 48 * depth * predict(laws, C).N) - V) / (24 * depth)
    size = f"{16 * max(1, round(width / 16))}x{depth}"
    final = parse_flags([f"--{name}={value}" for name, value in {
        **flags, **parse_size(size), "train_flops": C}.items()])
    cost = plan(final, args.data)
    N, D = cost["parameters"], cost["tokens"]
    predicted, between = float(law(N, D)), interval([other(N, D) for other in others])
    print(f"4. at {C:.3g} FLOPs: {size}, N {N:,}, D {D:,}; predicted loss {predicted:.4f} (80%: "
          f"{between[0]:.4f} to {between[1]:.4f})", flush=True)
    measured, = run_all([final], args)
    print(f"predicted_loss: {predicted:.4f}\nmeasured_loss: {measured['loss']:.4f}\n"
          f"difference: {measured['loss'] - predicted:+.4f}")
    home = os.path.dirname(os.path.abspath(args.runs))
    result = {"isoflop": isoflop, "parametric": parametric, "predicted": predicted, "interval":
              between, "measured": measured["loss"], "target": C, "size": size, "flags": final}
    save(home, "study", result, table, [laws, law])
    print(f"files: {home}")

# ---- The command line.

def main():
    words = sys.argv[1:]
    command = words.pop(0) if words and words[0] in ("run", "sweep", "isoflop", "fit") else "study"
    parser = argparse.ArgumentParser(prog=f"scaling.py {command}", allow_abbrev=False,
                                     description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"scaling.py: error: {message}\n")
    add = parser.add_argument
    if command == "fit":
        add("file", help="runs: .jsonl, .json or .csv")
        add("--method", default="isoflop", choices=[*METHODS, "parametric", "kaplan"])
        add("--bootstrap", type=int, default=100, help="resamples (default 100)")
        add("--compute", type=float, nargs="+", metavar="C", help="FLOPs to predict for")
        add("--inference_tokens", type=float, default=0.0, metavar="D", help="parametric: to be "
            "served afterwards, out of the same compute")
        add("--json", action="store_true", help="print JSON")
        add("--out", metavar="DIR", help="leave JSON, and PNG if matplotlib is installed")
        return fit_command(parser.parse_args(words))
    add("--runs", default="scaling/runs.jsonl", metavar="FILE", help="finished runs")
    add("--data", default=DATA, help=f"folder of bpe.py (default: {DATA}, made of Python's "
        "standard library if it is not there)")
    add("--budget", type=float, metavar="C", help="FLOPs that all in FILE may take")
    if command == "sweep":
        add("--grid", nargs="+", required=True, metavar="NAME=A,B", help="all combinations")
        add("--random", type=int, default=0, metavar="COUNT", help="so many random ones instead; "
            "NAME=LOW:HIGH is drawn evenly in logarithms")
    elif command != "run":
        add("--budgets", default="1e11,2e11,4e11,8e11", help="FLOPs of a run (%(default)s)")
        add("--sizes", default="16x2,32x2,48x2,64x2,80x2,96x2,128x2", metavar="WxL,WxL",
            help="n_embd x n_layer (%(default)s)")
    if command == "study":
        add("--target", type=float, metavar="C", help="FLOPs of the run that is predicted "
            "(default: 10 times the largest budget)")
    args, rest = parser.parse_known_args(words)
    args.flags = parse_flags(rest)
    if args.data == DATA and not os.path.exists(os.path.join(DATA, "val.bin")):
        make_data(args.data)
    if command in ("isoflop", "study"):
        args.budgets = sorted(map(float, args.budgets.split(",")))
        args.sizes = [parse_size(text) for text in args.sizes.split(",")]
    if command == "study":
        return study(args)
    asked = [args.flags]
    if command == "isoflop":
        asked = isoflop_runs(args.flags, args)
    if command == "sweep":
        asked = [parse_flags([f"--{name}={value}" for name, value in {**args.flags, **row}.items()])
                 for row in grid_of(args.grid, args.random)]
    best = min(run_all(asked, args), key=lambda run: run["loss"])
    print("best:", *(f"--{name} {value}" for name, value in best["flags"].items()))
    for name in ("loss", "parameters", "tokens", "compute", "seconds"):
        print(f"{name}: {best[name]}")

if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, LookupError, TypeError) as error:
        sys.exit(f"scaling.py: error: {error}")
