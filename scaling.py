"""
Scaling laws: small runs that predict large ones.

    python scaling.py                         # the whole method: some 20 small runs, laws, a
                                              # prediction at 10 times the compute, and its test
    python scaling.py run --n_layer 2 --n_embd 64 --train_flops 1e11 --learning_rate 1e-2
    python scaling.py sweep --grid learning_rate=3e-3,1e-2,3e-2 n_embd=32,64 --train_flops 1e11
    python scaling.py sweep --random 20 learning_rate=1e-3:1e-1 --n_embd 64 --train_flops 1e11
    python scaling.py isoflop --budgets 1e11,4e11 --sizes 32x2,64x2,96x3 --learning_rate 1e-2
    python scaling.py fit scaling/runs.jsonl --method isoflop --compute 1e13 --out scaling
    python scaling.py fit chinchilla.csv --method parametric --inference_tokens 1e12
    python scaling.py fit scaling/runs.jsonl --method optimum --of learning_rate --against N

Runs are train.py's: flags that are not listed here go to it as they are, but --train_flops, which
stands for the --max_iters that so many FLOPs allow. Each run is a line of runs.jsonl, and asking
for one again costs nothing. `fit` takes such a file, or a table of somebody else's runs (.json,
.csv) whose columns have the usual names.

Throughout: N parameters, without the input embedding, which computes nothing; D tokens; C = 6 N D
floating-point operations of training (FLOPs); losses in nats per token.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np

ROOT = os.path.dirname(os.path.abspath(__file__))

# -----------------------------------------------------------------------------
# Tables of runs.

NAMES = {"N": ("n", "parameters", "params", "model size", "n params"),
         "D": ("d", "tokens", "training tokens", "train tokens"),
         "C": ("c", "compute budget", "compute", "training flop", "training flops", "flops"),
         "loss": ("loss", "final loss", "val loss")}


def to_number(value):
    """What a table or a flag says, as a float; NaN if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def columns(runs, need=("N", "C", "loss")):
    """A list of runs, each a dict, or a dict of columns -> {"N", "D", "C", "loss": float64 (n,)}
    of those that there are; C or D follow from C = 6 N D. Names are matched without regard to
    case, spaces and underscores. Raises ValueError for what is missing or not positive."""
    if isinstance(runs, dict):
        runs = [dict(zip(runs, row)) for row in zip(*runs.values(), strict=True)]
    if not runs or not all(isinstance(run, dict) for run in runs):
        raise ValueError("there are no runs: a table is a list of objects, one for each run")
    plain = {" ".join(str(key).lower().replace("_", " ").split()): key for key in runs[0]}
    found = {}
    for name, usual in NAMES.items():
        keys = [plain[known] for known in usual if known in plain]
        if keys:  # of several, a run's first that it has: its budget, or the compute it took
            values = [next((run[key] for key in keys if run.get(key) is not None), None)
                      for run in runs]
            found[name] = np.array(list(map(to_number, values)))
            for i in np.flatnonzero(~((found[name] > 0) & (found[name] < math.inf))):
                raise ValueError(f"run {i + 1}: {keys[0]} is {values[i]!r}: not positive")
    if {"N", "D"} <= set(found):
        found.setdefault("C", 6 * found["N"] * found["D"])
    elif {"N", "C"} <= set(found):
        found["D"] = found["C"] / (6 * found["N"])
    for name in need:
        if name not in found:
            raise ValueError(f"no column for {name} ({', '.join(NAMES[name])}) among those of the "
                             f"runs: {', '.join(plain)}")
    return found


def load_runs(path):
    """The runs in a .jsonl (of which a last line cut short is left out), .json or .csv file: a
    list of dicts. Raises ValueError, OSError."""
    runs, i = [], 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
        if str(path).endswith(".jsonl"):
            *lines, last = text.split("\n")
            for i, line in enumerate(lines, 1):
                runs += [json.loads(line)] if line.strip() else []
            with contextlib.suppress(ValueError):
                runs.append(json.loads(last))
        elif str(path).endswith(".json"):
            runs = json.loads(text)
        else:
            runs = list(csv.DictReader(text.splitlines()))
    except (ValueError, RecursionError, csv.Error) as error:
        why = str(error).replace("line 1 ", f"line {i} ")  # json saw one line
        raise ValueError(f"{path} is no table of runs: {why}") from None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path} is no table of runs: it should be a list of objects")
    return runs


# -----------------------------------------------------------------------------
# Power laws. Over many orders of magnitude losses and optima follow y = a x^b (Kaplan et al.
# 2020): straight lines in logarithms.


class PowerLaw(NamedTuple):
    """y = coefficient * x^exponent"""
    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent


def logs(*columns):
    """Logarithms of columns of numbers. Raises ValueError where there are none."""
    columns = [np.asarray(column, np.float64) for column in columns]
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns):
        raise ValueError("there must be as many numbers of each kind")
    if not all(((column > 0) & (column < math.inf)).all() for column in columns):
        raise ValueError("a fit in logarithms needs positive numbers")
    return [np.log(column) for column in columns]


def fit_power_law(x, y):
    """The power law through points: least squares of log y against log x -> PowerLaw.

        fit_power_law([1, 10, 100], [2, 20, 200]) -> (2.0, 1.0)

    Raises ValueError for fewer than 2 different x, and for what has no logarithm."""
    x, y = logs(x, y)
    if len(np.unique(x)) < 2:
        raise ValueError(f"a power law needs at least 2 different points, not {len(np.unique(x))}")
    d = x - x.mean()
    b = float((d @ y) / (d @ d))
    return PowerLaw(math.exp(y.mean() - b * x.mean()), b)


def valley(x, loss, method="parabola"):
    """Where a loss is lowest along x: at the best run ("minimum"), or at the bottom of a parabola
    in log x through all runs -> (x, loss) there. Raises ValueError if the parabola has none in the
    range of x: then the runs do not say where it is."""
    x, loss = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    least = 2 if method == "minimum" else 3
    if len(np.unique(x)) < least:
        raise ValueError(f"a curve needs at least {least} points, not {len(np.unique(x))}")
    if method == "minimum":
        return float(x[loss.argmin()]), float(loss.min())
    center = np.log(x).mean()
    c2, c1, c0 = np.polyfit(np.log(x) - center, loss, 2)
    if c2 <= 0:
        raise ValueError("the losses have no valley: their parabola opens downward")
    u = -c1 / (2 * c2)
    best = math.exp(u + center)
    if not x.min() <= best <= x.max():
        raise ValueError(f"the bottom, at {best:.3g}, lies outside of what was tried, "
                         f"{x.min():.3g} to {x.max():.3g}")
    return best, float(c0 + c1 * u + c2 * u * u)


def groups_of(values, tolerance=1.1):
    """Runs of one value, up to a factor (runs end at whole steps, so that their compute is not
    quite what was asked for) -> list of (geometric mean, indices), ascending."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(values[order][1:] > tolerance * values[order][:-1]) + 1
    return [(float(np.exp(np.log(values[i]).mean())), i) for i in np.split(order, cuts)]


# -----------------------------------------------------------------------------
# Chinchilla's three approaches (Hoffmann et al. 2022) to the question: for a given compute, how
# large a model, on how many tokens?


class Choice(NamedTuple):
    """A model and its training, for a compute."""
    C: float
    N: float
    D: float
    loss: float


class ComputeLaws(NamedTuple):
    """The best N and D for a compute C, as power laws, and the optima they were drawn through."""
    N: PowerLaw
    D: PowerLaw
    optima: list  # of (C, N, D, loss)


def compute_laws(optima):
    """Power laws through optima, a list of (C, N, D, loss)."""
    C, N, D, _ = np.array(optima).T
    return ComputeLaws(fit_power_law(C, N), fit_power_law(C, D), optima)


def fit_envelope(runs):
    """Approach 1: of runs of all kinds, those that no other beats with as little compute. runs: a
    list of dicts, or columns. -> ComputeLaws. Raises ValueError."""
    table = columns(runs)
    order = np.lexsort((table["loss"], table["C"]))
    loss = table["loss"][order]
    best = order[loss < np.minimum.accumulate(np.append(np.inf, loss[:-1]))]
    if len(np.unique(table["C"][best])) < 2:
        raise ValueError("no run is better than one with less compute: there is no envelope")
    return compute_laws(list(zip(*(table[name][best].tolist() for name in Choice._fields))))


def fit_isoflops(runs, method="parabola"):
    """Approach 2: of models trained with the same compute, too small ones and too large ones
    (which see too few tokens) are worse. The bottom of each such curve is an optimum, and a power
    law joins them. method: "parabola" or "minimum", see `valley`. -> as `fit_envelope`."""
    if method not in ("parabola", "minimum"):
        raise ValueError(f"method is parabola or minimum, not {method}")
    table, optima = columns(runs), []
    groups = groups_of(table["C"])
    if len(groups) < 2:
        raise ValueError("all runs have the same compute: a law needs 2 budgets at least")
    for C, i in groups:
        try:
            N, loss = valley(table["N"][i], table["loss"][i], method)
        except ValueError as error:
            raise ValueError(f"at C = {C:.3g}: {error}") from None
        optima.append((C, N, C / (6 * N), loss))
    return compute_laws(optima)


class Parametric(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta"""
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
    """The law of theta = log A, log B, log E, alpha, beta."""
    a, b, e = np.exp(theta[:3])
    return Parametric(*map(float, (e, a, b, *theta[3:], objective)), tuple(left_out))


def evaluate(theta, x, y, z, weights, delta):
    """How well laws fit. theta: (s, 5), of s candidates; x, y, z: (n,) log N, log D, log loss;
    weights: (n,) or (s, n). -> sums over the runs of weight times Huber loss, r^2 / 2 that beyond
    delta goes on as a straight line (s,); r, log L - log loss (s, n); its derivatives, the share
    of each of the three terms in L (3, s, n)."""
    a, b, e, alpha, beta = (column[:, None] for column in theta.T)
    terms = np.stack((a - alpha * x, b - beta * y, e + 0 * x))
    top = terms.max(0)
    parts = np.exp(terms - top)
    total = parts.sum(0)
    r = top + np.log(total) - z
    c = np.minimum(np.abs(r), delta)
    return (weights * c * (np.abs(r) - c / 2)).sum(-1), r, parts / total


def minimize_huber(theta, x, y, z, weights, delta, iterations=300):
    """Bring many candidates to minima at once: (s, 5) -> (s, 5), objectives (s,), largest entry of
    each one's gradient (s,). weights: (n,) or (s, n).

    Levenberg-Marquardt with two guesses at the curvature, of which nearly all points, in the Huber
    loss's straight part, have none of their own: that of the parabola that touches from above
    (iteratively reweighted least squares: safe, slow in the end), and the exact Hessian (useless
    far away, quadratic convergence in the end). Each step takes the better of both."""
    # centered, the exponents turn the curves about the middle of the data, which makes them all
    # but independent of log A and log B
    middle = np.array([x.mean(), y.mean()])
    x, y, theta = x - middle[0], y - middle[1], theta.copy()
    theta[:, :2] -= theta[:, 3:] * middle
    slopes = np.zeros((3, 5, len(x)))  # derivatives of the logarithms of the three terms
    slopes[0, 0] = slopes[1, 1] = slopes[2, 2] = 1
    slopes[0, 3], slopes[1, 4] = -x, -y
    squares = slopes[:, :, None] * slopes[:, None]  # (3, 5, 5, n)
    weights = np.broadcast_to(weights, (len(theta), len(x)))
    value = evaluate(theta, x, y, z, weights, delta)[0]
    damping, slope = np.full(len(theta), 1e-2), np.full(len(theta), np.inf)
    quiet = np.zeros(len(theta), int)  # iterations without gain
    for _ in range(iterations):
        i = np.flatnonzero(quiet < 12)
        if not len(i):
            break
        base, before, w = theta[i], value[i], weights[i]
        _, r, share = evaluate(base, x, y, z, w, delta)
        J = np.einsum("ksn,kjn->sjn", share, slopes)
        psi = w * np.clip(r, -delta, delta)
        g = np.einsum("sn,sjn->sj", psi, J)
        slope[i] = np.abs(g).max(1)
        touching = w * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))
        safe = (touching[:, None] * J) @ J.swapaxes(1, 2)
        exact = ((w * (np.abs(r) < delta) - psi)[:, None] * J) @ J.swapaxes(1, 2) \
            + np.tensordot(psi * share, squares, ((0, 2), (0, 3)))
        diagonal = damping[i, None] * np.einsum("sjj->sj", safe) + 1e-14
        for H in (safe, exact):
            try:
                step = np.linalg.solve(H + diagonal[:, :, None] * np.eye(5), g[:, :, None])
            except np.linalg.LinAlgError:
                continue
            new = base - np.clip(step[:, :, 0], -5, 5)
            f = evaluate(new, x, y, z, w, delta)[0]
            ok = f < value[i]
            theta[i[ok]], value[i[ok]] = new[ok], f[ok]
        gained = before - value[i]
        damping[i] = np.clip(np.where(gained > 0, damping[i] / 5, damping[i] * 5), 1e-12, 1e8)
        quiet[i] = np.where(gained <= 1e-13 * value[i], quiet[i] + 1, 0)
    theta[:, :2] += theta[:, 3:] * middle
    return theta, value, slope


def fit_parametric(N, D, loss, delta=1e-3, outliers=11.0, starts=60):
    """Approach 3: L(N, D) = E + A / N^alpha + B / D^beta, by the sum over runs of the Huber loss
    of log L - log loss -> Parametric.

    From the best of the published grid's 4,500 starts, in float64, until the gradient is 0. (The
    first published fit stopped early: it minimized the mean instead of the sum, which fell below
    the optimizer's tolerance; Besiroglu et al. 2024.) Runs more than `outliers` standard
    deviations (estimated by the median) from the law are left out, and the rest is fitted again;
    at 11, of Hoffmann et al.'s 245 runs, just the five that Besiroglu et al. leave out; None keeps
    all. Raises ValueError where the runs do not determine the law: too few, all at one size, a fit
    that does not converge or ends at a bound."""
    x, y, z = logs(N, D, loss)
    if len(x) < 6:
        raise ValueError(f"{len(x)} runs are too few for a law of 5 numbers: at least 6")
    for what, values in (("N", x), ("D", y)):
        if len(np.unique(values)) < 3:
            raise ValueError(f"at least 3 values of {what} are needed")
    if np.corrcoef(x, y)[0, 1] > 0.99999:
        raise ValueError("D is tied to N in all runs: they can not tell which lowers the loss")
    exponents = np.arange(0, 2.5, 0.5)
    grid = np.array(list(itertools.product(range(0, 30, 5), range(0, 30, 5), exponents - 1,
                                           exponents, exponents)))
    keep = np.arange(len(x))
    while True:
        data = x[keep], y[keep], z[keep], np.ones(len(keep)), delta
        first = np.argsort(evaluate(grid, *data)[0])[:starts]
        theta, value, _ = minimize_huber(grid[first], *data)
        theta, value, slope = minimize_huber(theta[np.argsort(value)[:5]], *data, iterations=5000)
        best = value.argmin()
        _, r, share = evaluate(theta[best : best + 1], x, y, z, 1, delta)
        spread = max(1.4826 * np.median(np.abs(r[0, keep])), delta)
        new = np.flatnonzero(np.abs(r[0]) <= outliers * spread) if outliers else keep
        if len(new) == len(keep) or len(new) < 6:
            break
        keep = new
    if not slope[best] <= 1e-6 * delta * len(keep):
        raise ValueError(f"the fit did not converge: its gradient is still {slope[best]:.1e}")
    share = share[:, 0, keep].max(1)
    at_end = {"alpha": not 0.01 < theta[best, 3] < 4, "beta": not 0.01 < theta[best, 4] < 4,
              "E": share[2] < 1e-3, "A": share[0] < 1e-5, "B": share[1] < 1e-5}
    if any(at_end.values()):
        raise ValueError("the runs do not determine the law: the fit ends at the bounds of "
                         f"{' and '.join(name for name in at_end if at_end[name])}")
    return parametric(theta[best], value[best], np.setdiff1d(np.arange(len(x)), keep).tolist())


def predict(fit, x, D=None, inference_tokens=0.0):
    """What a fit says of x: a PowerLaw, y there; a Parametric law of x = N and D, the loss;
    without D, or of ComputeLaws, x is a compute: -> Choice of the best N and D (its loss NaN for
    ComputeLaws, which do not know it).

    inference_tokens: that the model shall serve afterwards, at 2 N FLOPs each, paid for from the
    same compute (Sardana et al. 2023): the more, the smaller the best model. Raises ValueError."""
    if isinstance(fit, PowerLaw):
        return fit(x)
    if D is not None:
        return fit(x, D)
    C = float(x)
    if not 0 <= 2 * inference_tokens < C < math.inf:
        raise ValueError(f"compute {C:g}: not positive, or at most 2 FLOPs per inference token")
    if isinstance(fit, ComputeLaws):
        if inference_tokens:
            raise ValueError("inference_tokens need a Parametric law")
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


# -----------------------------------------------------------------------------
# How sure is a fit? The bootstrap (Efron 1979): fit again to runs drawn from the runs, with
# replacement; what varies, varies as much as it would with other runs.


def bootstrap(table, fit, n=100, seed=0):
    """Fits to n tables whose runs are drawn from `table` (of columns), at each compute as many as
    there are. A draw that can not be fitted is left out. -> list of what fit(table) gives."""
    rng, groups, fits = np.random.default_rng(seed), groups_of(table["C"]), []
    for _ in range(n):
        rows = np.concatenate([rng.choice(i, len(i)) for _, i in groups])
        with contextlib.suppress(ValueError):
            fits.append(fit({name: values[rows] for name, values in table.items()}))
    return fits


def bootstrap_parametric(fit, N, D, loss, n=100, seed=0, delta=1e-3):
    """The same for a Parametric law, all n at once: a draw is a weight for each run -> list."""
    keep = np.setdiff1d(np.arange(len(N)), fit.left_out)
    x, y, z = (column[keep] for column in logs(N, D, loss))
    weights = np.random.default_rng(seed).multinomial(len(keep), np.ones(len(keep)) / len(keep), n)
    start = [math.log(fit.A), math.log(fit.B), math.log(fit.E), fit.alpha, fit.beta]
    theta, value, _ = minimize_huber(np.tile(start, (n, 1)), x, y, z, weights * 1.0, delta)
    return [parametric(row, v, fit.left_out) for row, v in zip(theta, value)]


def interval(values):
    """The middle of a sample: 80% of it lie between these two."""
    return tuple(np.quantile(np.asarray(values, np.float64), (0.1, 0.9)).tolist())


# -----------------------------------------------------------------------------
# Runs: hyperparameters in, loss out. The other scripts are started as processes.

CHILDREN = []  # processes, also finished ones


def interrupted(number, frame):
    """Ctrl-C and SIGTERM reach the processes too: train.py saves, and leaves."""
    for process in CHILDREN:
        process.send_signal(signal.SIGINT)
    raise KeyboardInterrupt


def start(script, words, threads):
    """Run one of the other scripts, on so many threads -> what it printed. Raises ValueError with
    the last line of its errors."""
    with subprocess.Popen([sys.executable, os.path.join(ROOT, script), *words], text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as process:
        CHILDREN.append(process)
        out, err = process.communicate()
    if process.returncode:
        last = (err.strip() or f"{script} died").splitlines()[-1]
        raise ValueError(last.removeprefix(f"{script}: error: "))
    return out


def parse_flags(words, ours=()):
    """train.py's flags as they stand on a command line -> {name: value}, True for a flag without
    one. ours: names that are refused, beside those that always are. Raises ValueError."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = value if equals else True
        elif flags.get(name) is True:
            flags[name] = word
        else:
            raise ValueError(f"{word!r} is neither a flag nor the value of one")
    for name in {"out_dir", "resume", "init_from", "eval_interval", "eval_iters", "data",
                 *ours} & set(flags):
        raise ValueError(f"--{name} is for scaling.py to set")
    if "train_flops" in flags and (flags["train_flops"] is True or "max_iters" in flags):
        raise ValueError("--train_flops takes a number, and sets --max_iters")
    return flags


def as_words(flags):
    """The reverse of `parse_flags`."""
    return [word for name, value in flags.items()
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


MODEL = """vocab_size block_size n_layer n_head n_kv_head n_embd head_size d_ff activation position
norm norm_place attention window kv_rank rope_size qk_norm qk_norm_joint n_expert top_k
n_shared_expert bias qkv_bias tie_embeddings""".split()
LEAST_STEPS = 20
RESULTS = "loss", "parameters", "tokens", "compute", "seconds"  # numbers in a line of runs.jsonl


def vocabulary(data):
    """The vocabulary size that train.bin's header gives -> flags."""
    head = np.fromfile(os.path.join(data, "train.bin"), "<i4", 256)
    known = len(head) == 256 and head[0] in (20240520, 20240801)
    return {"vocab_size": str(head[3])} if known else {}


@functools.lru_cache(maxsize=None)
def cost(*words):
    """model.py's account of a model of these flags -> (parameters without the input embedding,
    FLOPs per token of training). Raises ValueError."""
    known = start("model.py", ["info", *words], 1).replace(",", "")
    N, embedding, flops = (int(re.search(rf"(?m)^{row}\W+(\d+)", known)[1])
                           for row in ("parameters", "  embedding", "FLOPs per token training"))
    return N - embedding, flops


def make_plan(flags, data):
    """What a run will take -> {"N", "D", "C", "iters"}; its --train_flops are turned into steps.
    Raises ValueError, and OSError where there is no data."""
    N, per_token = cost(*as_words({name: value for name, value in sorted(
        (vocabulary(data) | flags).items()) if name in MODEL}))
    try:
        tokens = math.prod(int(flags.get(name, default)) for name, default in (
            ("batch_size", 8), ("block_size", 256), ("gradient_accumulation_steps", 1)))
        iters = int(flags.get("max_iters", 450))
        if "train_flops" in flags:
            iters = round(float(flags["train_flops"]) / per_token / tokens)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"a flag is no number: {error}") from None
    return {"N": N, "D": iters * tokens, "C": iters * tokens * per_token, "iters": iters}


def key_of(flags, data):
    """Names a run: its flags (1e-2 is 0.01), and the data by name and size."""
    path = os.path.join(data, "train.bin")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    plain = {name: str(value) if math.isnan(to_number(value)) else f"{to_number(value):.12g}"
             for name, value in flags.items()}
    text = json.dumps([sorted(plain.items()), os.path.basename(os.path.abspath(data)), size])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train(flags, data, home, threads):
    """Train, in a folder of `home` -> (folder, record for runs.jsonl). A run that was stopped goes
    on from its last checkpoint. Raises ValueError with train.py's error."""
    plan, key, begin = make_plan(flags, data), key_of(flags, data), time.time()
    if plan["iters"] < LEAST_STEPS:
        raise ValueError(f"a run takes at least {LEAST_STEPS} steps, this {plan['iters']}: use a "
                         "smaller model or batch, or more compute")
    folder = os.path.join(home, f"run-{key}")
    words = as_words({name: value for name, value in flags.items() if name != "train_flops"}
                     | {"max_iters": plan["iters"], "data": data, "out_dir": folder,
                        "eval_interval": max(100, plan["iters"] // 4), "eval_iters": 1})
    words += ["--resume"] * os.path.exists(os.path.join(folder, "ckpt.pt"))
    start("train.py", words, threads if plan["N"] > 5e5 else 1)  # small products are not shared
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    record = {"key": key, "parameters": plan["N"], "tokens": plan["D"], "compute": plan["C"],
              "loss": float(last["val_loss"]), "seconds": round(float(last["seconds"]), 1),
              "date": round(begin), "data": data, "flags": flags}
    if "train_flops" in flags:
        record["compute_budget"] = float(flags["train_flops"])
    return folder, record


def append(path, record):
    """Add a line; a last line that was cut short by a crash goes first."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_all(asked, args):
    """Runs for a list of flags, several at a time -> their records, in that order, None for those
    that failed (which is said). What is in args.runs already is not trained again. Raises
    ValueError if all fail, or if args.budget, of FLOPs for all runs in the file, is too small."""
    home = os.path.dirname(os.path.abspath(args.runs))
    os.makedirs(home, exist_ok=True)
    runs = load_runs(args.runs) if os.path.exists(args.runs) else []
    known = {str(r.get("key")): r for r in runs if isinstance(r.get("flags"), dict)
             and all(isinstance(r.get(name), (int, float)) for name in RESULTS)}
    keys = [key_of(flags, args.data) for flags in asked]
    todo = {key: flags for key, flags in zip(keys, asked) if key not in known}
    for key in set(keys) & set(known):  # what a run left that was killed when it had been kept
        shutil.rmtree(os.path.join(home, f"run-{key}"), ignore_errors=True)
    if args.budget and todo:
        spent = sum(r.get("compute", 0) for r in known.values())
        need = sum(make_plan(flags, args.data)["C"] for flags in todo.values())
        if spent + need > args.budget:
            raise ValueError(f"of the budget of {args.budget:.3g} FLOPs {spent:.3g} are spent; "
                             f"{len(todo)} new runs would take {need:.3g}: none was started")
    cores = os.cpu_count() or 1
    jobs = args.jobs or (1 if shutil.which("nvidia-smi") else cores)
    threads = max(1, cores // max(1, min(jobs, len(todo))))
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        work = {pool.submit(train, flags, args.data, home, threads): flags
                for flags in todo.values()}
        for i, future in enumerate(concurrent.futures.as_completed(work)):
            what = " ".join(as_words(work[future]))
            try:
                folder, r = future.result()
            except (ValueError, OSError) as error:
                print(f"failed: {what}: {error}", file=sys.stderr, flush=True)
                continue
            append(args.runs, r)
            known[r["key"]] = r
            shutil.rmtree(folder, ignore_errors=True)  # its checkpoint has done its duty
            print(f"[{i + 1}/{len(todo)}] {what} | N {r['parameters']:,} | D {r['tokens']:,} | "
                  f"loss {r['loss']:.4f} | {r['seconds']:.0f} s", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    if not set(keys) & set(known):
        raise ValueError("all runs failed")
    return [known.get(key) for key in keys]


def parse_size(text):
    """"64x2", n_embd and n_layer -> flags. Heads have 16 units, whatever the width."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,3})", text.strip())
    if not match or int(match[1]) % 16:
        raise argparse.ArgumentTypeError("a size is n_embd x n_layer, such as 64x2, n_embd a "
                                         f"multiple of 16: not {text!r}")
    return {"n_embd": match[1], "n_layer": match[2], "n_head": str(int(match[1]) // 16)}


def isoflop_runs(flags, args):
    """Flags of a run of each size at each budget; but none with less than 1 token per parameter,
    or more than 120: far from any optimum the law's three terms are too simple, and bent to such
    runs they are wrong where it matters."""
    asked = [{**flags, **size, "train_flops": f"{C:g}"}
             for C in sorted(args.budgets) for size in args.sizes]
    with concurrent.futures.ThreadPoolExecutor(args.jobs or os.cpu_count()) as pool:
        plans = list(pool.map(make_plan, asked, itertools.repeat(args.data)))
    good = [plan["iters"] >= LEAST_STEPS and 1 <= plan["D"] / plan["N"] <= 120 for plan in plans]
    for flags, plan in itertools.compress(zip(asked, plans), [not kept for kept in good]):
        print(f"left out: {' '.join(as_words(flags))}: {plan['iters']} steps, "
              f"{plan['D'] / plan['N']:.2g} tokens per parameter", flush=True)
    if not any(good):
        raise ValueError(f"no size suits a budget: it takes {LEAST_STEPS} steps, and 1 to 120 "
                         "tokens per parameter")
    return list(itertools.compress(asked, good))


def grid_of(specs, random_runs=0, seed=0):
    """name=1,2,3 -> all combinations; or with random_runs name=low:high, drawn evenly in
    logarithms (Bergstra & Bengio 2012), -> as many draws. Raises ValueError."""
    options = {}
    for spec in specs:
        name, _, text = spec.partition("=")
        if not name or not text:
            raise ValueError(f"{spec!r} is not name=value,value,...")
        options[name.lstrip("-")] = text.split(",")
    if not random_runs:
        return [dict(zip(options, row)) for row in itertools.product(*options.values())]
    rng = np.random.default_rng(seed)

    def draw_one(values):
        value = str(rng.choice(values))
        low, colon, high = value.partition(":")
        if not colon:
            return value
        if not all(0 < to_number(end) < math.inf for end in (low, high)):
            raise ValueError(f"{value!r} is not low:high, two positive numbers")
        drawn = math.exp(rng.uniform(math.log(float(low)), math.log(float(high))))
        return str(round(drawn)) if (low + high).isdigit() else f"{drawn:.4g}"

    return [{name: draw_one(values) for name, values in options.items()}
            for _ in range(random_runs)]


# -----------------------------------------------------------------------------
# Reports: dicts that are printed as tables, and kept as JSON.

METHODS = {"isoflop": fit_isoflops, "envelope": fit_envelope,
           "minimum": functools.partial(fit_isoflops, method="minimum")}


def as_dict(law, fits=(), names=""):
    """A law for JSON; with standard errors and 80% intervals, of what resampled runs gave. names:
    of what a PowerLaw gives and of what it takes, such as "N C"."""
    result = {}
    for name, value in law._asdict().items():
        result[name] = value
        if fits and name not in ("objective", "left_out"):
            values = [getattr(fit, name) for fit in fits]
            result[name + "_error"], result[name + "_interval"] = np.std(values), interval(values)
    if names:
        y, x = names.split()
        result["formula"] = f"{y} = {law.coefficient:.4g} {x}^{law.exponent:.4f}"
    return result


def report(method, table, computes, n=100, inference_tokens=0.0):
    """Fit by one of Chinchilla's approaches, n times more to resampled runs, and look ahead to
    computes -> (dict, fit, list of the other fits)."""
    if method == "parametric":
        points = table["N"], table["D"], table["loss"]
        best = fit_parametric(*points)
        fits = bootstrap_parametric(best, *points, n)
        result = as_dict(best, fits)
    else:
        best, fits = METHODS[method](table), bootstrap(table, METHODS[method], n)
        result = {name: as_dict(getattr(best, name), [getattr(f, name) for f in fits], f"{name} C")
                  for name in "ND"}
        result["optima"] = [dict(zip(Choice._fields, optimum)) for optimum in best.optima]
    result |= {"resamples": len(fits), "predictions": []}
    for tokens, C in itertools.product(dict.fromkeys((0.0, inference_tokens)), computes):
        choice, *others = (predict(f, C, inference_tokens=tokens) for f in (best, *fits))
        row = {"inference_tokens": tokens, **choice._asdict(),
               "tokens_per_parameter": choice.D / choice.N}
        for name in ("N", "loss") if fits else ():
            row[name + "_interval"] = interval([getattr(other, name) for other in others])
        result["predictions"].append({k: v for k, v in row.items() if not np.isnan(v).any()})
    return result, best, fits


def report_kaplan(table):
    """Kaplan et al.'s laws, of the best loss for each N, D and C -> dict."""
    result = {}
    for name in "NDC":
        best = [(x, table["loss"][i].min()) for x, i in groups_of(table[name])]
        result[name] = as_dict(fit_power_law(*zip(*best)), names=f"loss {name}")
    return result


def report_optimum(runs, of, against):
    """The best value of a hyperparameter as a power law of N, D, C or another flag -> dict."""
    table, optima, without = columns(runs), [], []
    for name in {of, against} - set(table):
        table[name] = np.array([to_number({**(run.get("flags") or {}), **run}.get(name))
                                for run in runs])
    rows = np.flatnonzero((table[of] > 0) & (table[against] > 0))
    if not len(rows):
        raise ValueError(f"no run has both {of} and {against}")
    for at, i in groups_of(table[against][rows], 1.01):
        try:
            best, loss = valley(table[of][rows[i]], table["loss"][rows[i]])
            optima.append({against: at, of: best, "loss": loss})
        except ValueError as error:
            without.append({against: at, "why": str(error)})
    if not optima:
        raise ValueError("; ".join(f"{row[against]:.4g}: {row['why']}" for row in without))
    result = {"optima": optima, "without": without}
    if len(optima) > 1:
        law = fit_power_law([row[against] for row in optima], [row[of] for row in optima])
        result["law"] = as_dict(law, names=f"{of} {against}")
    return result


def as_text(value):
    """A number, numbers, or a word."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_text, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def show(result):
    """Print a report: laws as formulas, lists as tables, numbers by their names."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(value["formula"], *(f"{key} {as_text(value[key])}" for key in value
                                      if key.endswith("_interval")), sep="   ")
        elif isinstance(value, list):
            rows = [list(row) for row in value[:1]]
            rows += [[as_text(row.get(key, "")) for key in rows[0]] for row in value]
            widths = [max(map(len, column)) for column in zip(*rows)]
            for row in rows:
                print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
        else:
            print(f"{name}: {as_text(value)}")


def save(folder, name, result, table=None, laws=None, law=None, measured=None):
    """Leave name.json, and if matplotlib is installed name.png: the isoFLOP curves with their
    minima, the best N for C among the parametric law's contours, and loss against compute with
    the fit extrapolated. measured: a Choice that tested the prediction."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, name)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    os.replace(path + ".tmp", path + ".json")
    if table is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: they need matplotlib (pip install matplotlib)", file=sys.stderr)
        return
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
    x = np.geomspace(table["C"].min(), max(table["C"].max() * 30, measured.C if measured else 0))
    if laws:
        C, N, _, loss = np.array(laws.optima).T
        curves.plot(N, loss, "k*", ms=9)
        sizes.plot(C, N, "k*", x, laws.N(x))
    if law:
        y = np.geomspace(table["N"].min(), table["N"].max() * 3)[:, None]
        loss = law(y, x / (6 * y))
        sizes.contour(x, y[:, 0], loss, levels=np.quantile(loss, np.linspace(0.02, 0.9, 14)))
        losses.plot(x, [predict(law, C).loss for C in x])
    if measured:
        sizes.plot(measured.C, measured.N, "r*", ms=12)
        losses.plot(measured.C, measured.loss, "r*", ms=12)
    figure.savefig(path + ".tmp", dpi=110, format="png")
    os.replace(path + ".tmp", path + ".png")


def fit_command(args):
    """`scaling.py fit`."""
    runs = load_runs(args.file)
    table = None if args.method == "optimum" else columns(runs, ("N", "D", "C", "loss"))
    laws = law = None
    if args.method == "optimum":
        result = report_optimum(runs, args.of, args.against)
    elif args.method == "kaplan":
        result = report_kaplan(table)
    else:
        above = 10.0 ** (1 + math.floor(math.log10(table["C"].max())))
        computes = args.compute or [above, 10 * above, 100 * above]
        result, fit, _ = report(args.method, table, computes, args.bootstrap,
                                args.inference_tokens)
        laws, law = (None, fit) if args.method == "parametric" else (fit, None)
    result = {"method": args.method, "runs": len(runs), **result}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    if args.out:
        save(args.out, args.method, result, table, laws, law)


# -----------------------------------------------------------------------------
# The whole method, on this machine.


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
    C, depth = args.target, args.base["n_layer"]
    print("1. the learning rate, at one size: with --mup it holds for the others", flush=True)
    if "learning_rate" not in flags:
        asked = [{**flags, **args.base, "train_flops": f"{sorted(args.budgets)[1]:g}",
                  "learning_rate": rate} for rate in ("2.5e-3", "5e-3", "1e-2", "2e-2", "4e-2")]
        tried = [(float(r["flags"]["learning_rate"]), r["loss"])
                 for r in run_all(asked, args) if r]
        try:
            best, _ = valley(*zip(*tried))
        except ValueError:  # a flat or slanting curve: its lowest point
            best, _ = min(tried, key=lambda pair: pair[1])
        flags["learning_rate"] = f"{best:.3g}"
    print(f"   {flags['learning_rate']}\n2. models of several sizes at each budget", flush=True)
    table = columns([r for r in run_all(isoflop_runs(flags, args), args) if r])
    print("3. the laws")
    isoflop, laws, _ = report("isoflop", table, [C])
    show(isoflop)
    parametric, law, others = report("parametric", table, [C])
    show(parametric)

    vocab_size = int((flags | vocabulary(args.data)).get("vocab_size", 50304))
    parameters = {width: (12 * int(depth) * width + vocab_size) * width
                  for width in range(16, 8193, 16)}  # of one depth: a law holds for one family
    N = predict(laws, C).N
    width = min(parameters, key=lambda width: abs(math.log(parameters[width] / N)))
    final = {**flags, **parse_size(f"{width}x{depth}"), "train_flops": f"{C:g}"}
    plan = make_plan(final, args.data)
    predicted, *rest = (float(fit(plan["N"], plan["D"])) for fit in (law, *others))
    between = interval(rest)
    print(f"4. at {C:.3g} FLOPs: {width}x{depth}, N {plan['N']:,}, D {plan['D']:,}; predicted "
          f"loss {predicted:.4f} (80%: {as_text(between)})", flush=True)
    record, = run_all([final], args)
    print(f"predicted_loss: {predicted:.4f}\nmeasured_loss: {record['loss']:.4f}\n"
          f"difference: {record['loss'] - predicted:+.4f}\n"
          f"compute_beyond_largest_budget: {C / max(args.budgets):.1f}x")
    home = os.path.dirname(os.path.abspath(args.runs))
    save(home, "study", {"isoflop": isoflop, "parametric": parametric, "predicted": predicted,
                         "interval": between, "measured": record["loss"], "target": C,
                         "size": f"{width}x{depth}", "flags": final},
         table, laws, law, Choice(C, plan["N"], plan["D"], record["loss"]))
    print(f"files: {home}")


# -----------------------------------------------------------------------------
# The command line.


def number(kind, low=0, high=math.inf):
    """A type for argparse: an int or a float from low to high, and finite."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # for argparse's own messages
    return read


def list_of(kind):
    """A type for argparse: values with commas between."""
    return functools.wraps(kind)(lambda text: [kind(part) for part in text.split(",")])


def parse_args(words):
    """The command line. Flags that are not known are train.py's, but not after `fit`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Scaling laws: small runs "
                                     "that predict large ones. Flags not listed are train.py's; "
                                     "--train_flops C sets its --max_iters.")
    commands = parser.add_subparsers(dest="command", metavar="run|sweep|isoflop|fit|study")
    for name, text in {"run": "one run; prints its loss",
                       "sweep": "a grid of hyperparameters, or random ones",
                       "isoflop": "models of each size at each budget",
                       "study": "all of it: what happens without a command"}.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        add = command.add_argument_group("runs").add_argument
        add("--runs", default="scaling/runs.jsonl", metavar="FILE", help="finished runs")
        add("--data", default="data/scaling", help="folder of bpe.py (default: data/scaling, made "
            "of Python's standard library if it is not there)")
        add("--budget", type=number(float, 1), metavar="C", help="FLOPs that all in FILE may take")
        add("--jobs", type=number(int, 1), help="runs at a time (default: 1 with a GPU, else as "
            "many as cores)")
        add = command.add_argument_group(name).add_argument
        if name == "sweep":
            add = command.add_mutually_exclusive_group(required=True).add_argument
            add("--grid", nargs="+", metavar="NAME=A,B", help="all combinations")
            add("--random", nargs="+", metavar="X", help="COUNT NAME=LOW:HIGH NAME=A,B ...")
        elif name != "run":
            add("--budgets", type=list_of(number(float, 1)), default="1e11,2e11,4e11,8e11",
                help="FLOPs of a run (default %(default)s)")
            add("--sizes", type=list_of(parse_size), default="16x2,32x2,48x2,64x2,80x2,96x2,128x2",
                metavar="WxL,WxL", help="n_embd x n_layer (default %(default)s)")
    add("--target", type=number(float, 1), default=8e12, help="FLOPs of the test (default 8e12)")
    add("--base", type=parse_size, default="64x2", help="where the learning rate is found; the "
        "target has its depth (default 64x2)")
    add = commands.add_parser("fit", help="laws of a table of runs").add_argument
    add("file", help=".jsonl, .json or .csv")
    add("--method", default="isoflop", choices=[*METHODS, "parametric", "kaplan", "optimum"])
    add("--bootstrap", type=number(int), default=100, help="resamples (default 100)")
    add("--compute", type=number(float, 1), nargs="+", metavar="C", help="FLOPs to predict for")
    add("--inference_tokens", type=number(float), default=0.0, metavar="D", help="parametric: to "
        "be served afterwards, out of the same compute")
    add("--of", default="learning_rate", metavar="NAME", help="optimum: of which hyperparameter")
    add("--against", default="N", metavar="NAME", help="optimum: N, D, C or a flag")
    add("--json", action="store_true", help="print JSON")
    add("--out", metavar="DIR", help="leave JSON, and PNG if matplotlib is installed")

    if not words or words[0].startswith("--") and words[0] != "--help":
        words = ["study", *words]
    args, rest = parser.parse_known_args(words)
    try:
        if args.command == "fit" and rest:
            raise ValueError(f"unknown: {' '.join(rest)}")
        if args.command == "fit" and args.inference_tokens and args.method != "parametric":
            raise ValueError("--inference_tokens is for --method parametric")
        args.flags = parse_flags(rest, ["train_flops", "max_iters", *args.sizes[0]]
                                 if "sizes" in args else ())
        args.asked = [args.flags]
        if args.command == "study" and len(args.budgets) < 2:
            raise ValueError("--budgets: a law needs two at least")
        if args.command == "sweep":
            count, *specs = args.random or ["0", *args.grid]
            if not count.isdigit() or bool(args.random) != bool(int(count)) or not specs:
                raise ValueError("--random takes a number of runs, and NAME=LOW:HIGH ...")
            args.asked = [parse_flags(as_words(args.flags | row))
                          for row in grid_of(specs, int(count))]
    except ValueError as error:
        parser.error(str(error))
    return args


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    args = parse_args(sys.argv[1:])
    try:
        if args.command == "fit":
            return fit_command(args)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupted)
        if args.data == "data/scaling" and not os.path.exists("data/scaling/val.bin"):
            make_data(args.data)
        if args.command == "study":
            return study(args)
        if args.command == "isoflop":
            args.asked = isoflop_runs(args.flags, args)
        best = min((r for r in run_all(args.asked, args) if r), key=lambda r: r["loss"])
        print("best:", *as_words(best["flags"]))
        print(*(f"{name}: {best[name]}" for name in RESULTS), sep="\n")
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the rest goes on when asked again",
              file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"scaling.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
