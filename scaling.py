"""
Scaling laws: small runs that predict large ones.

    python scaling.py     # the whole method: small runs, laws, a prediction at 10 x the compute
    python scaling.py run --n_layer 2 --n_embd 64 --train_flops 1e11 --learning_rate 1e-2
    python scaling.py sweep --grid learning_rate=3e-3,1e-2,3e-2 n_embd=32,64 --train_flops 1e11
    python scaling.py isoflop --budgets 1e11,2e11 --sizes 24x2,32x2,40x2,48x2,56x2 --batch_size 2
    python scaling.py fit scaling/runs.jsonl --method isoflop --compute 1e13 --out scaling
    python scaling.py fit chinchilla.csv --method parametric --inference_tokens 1e12

Flags that --help does not list are train.py's; --train_flops C is ours: as many steps as it pays
for. A finished run is a line of runs.jsonl, and is not made again. N: parameters, without the input
embedding, a table look-up; D: training tokens; C = 6 N D: floating-point operations (FLOPs).
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word

import argparse
import contextlib
import csv
import glob
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ROOT, DATA = os.path.dirname(os.path.abspath(__file__)), os.path.join("data", "scaling")

# ---- Tables of runs.

NAMES = {"N": ("n", "parameters", "params", "model size", "n params"),
         "D": ("d", "tokens", "training tokens", "train tokens"),
         "C": ("c", "compute budget", "compute", "training flop", "training flops", "flops"),
         "loss": ("loss", "final loss", "val loss")}

def columns(runs):
    """Runs, a list of dicts (or a dict of columns) -> {"N", "D", "C", "loss": float64 (n,)}, by the
    names above in any spelling; C or D may be missing, as C = 6 N D. Raises ValueError."""
    if isinstance(runs, dict):
        runs = [dict(zip(runs, row)) for row in zip(*runs.values(), strict=True)]
    runs = [{" ".join(str(key).lower().replace("_", " ").split()): value
             for key, value in run.items() if value is not None} for run in runs]
    # of several names the first that a run has: the budget it was given, before what it took
    table = {name: np.array([next((float(run[key]) for key in usual if key in run), math.nan)
                             for run in runs]) for name, usual in NAMES.items()}
    N, D, C, _ = table.values()
    table |= {"D": np.where(np.isnan(D), C / (6 * N), D), "C": np.where(np.isnan(C), 6 * N * D, C)}
    for name, values in table.items():
        if not runs or not ((values > 0) & (values < math.inf)).all():
            raise ValueError(f"a run has no {name} above 0 ({', '.join(NAMES[name])})")
    return table

def load_runs(path):
    """A .jsonl, .json or .csv file -> list of dicts. Raises ValueError, OSError, csv.Error."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if str(path).endswith(".jsonl"):
            return [{**json.loads(line)} for line in file if line.strip()]
        return [{**run} for run in (json.load(file) if str(path).endswith(".json")
                                    else csv.DictReader(file))]

# ---- Power laws: straight lines in logarithms (Kaplan et al. 2020).

class PowerLaw(namedtuple("PowerLaw", "coefficient exponent")):
    """y = coefficient * x^exponent"""
    def __call__(self, x):
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent

def fit_power_law(x, y):
    """Least squares of log y against log x -> PowerLaw. Raises ValueError."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(np.unique(x)) < 2 or not (x.min() > 0 and y.min() > 0):
        raise ValueError("a power law needs at least 2 different points, of positive numbers")
    x, y = np.log(x), np.log(y)
    d = x - x.mean()
    exponent = float((d @ y) / (d @ d))
    return PowerLaw(float(np.exp(y.mean() - exponent * x.mean())), exponent)

def groups_of(values, tolerance=1.1):
    """Values that are equal up to a factor -> list of (geometric mean, indices), ascending."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(values[order][1:] > tolerance * values[order][:-1]) + 1
    return [(float(np.exp(np.log(values[i]).mean())), i) for i in np.split(order, cuts)]

# ---- Chinchilla's three approaches (Hoffmann et al. 2022) to the question: with a given compute,
# how large a model should one train, on how many tokens?

Choice = namedtuple("Choice", "C N D loss")  # a model, its tokens and its loss, for a compute
ComputeLaws = namedtuple("ComputeLaws", "N D optima")  # PowerLaws by C, through a list of Choices
Kaplan = namedtuple("Kaplan", "N D C")  # PowerLaws of the loss

def fit_isoflops(runs, method="parabola"):
    """Runs (list of dicts, or columns) -> ComputeLaws through the best model for each compute.
    Approach 1, "envelope": the runs that none with as little compute beats. Approach 2: at the same
    compute, small models lack capacity and large ones see too few tokens; the best is the bottom of
    a "parabola" in log N, or the best run ("minimum"). Raises ValueError, also if it has none."""
    table, optima = columns(runs), []
    for C, i in groups_of(table["C"], 1.0 if method == "envelope" else 1.1):
        N, loss = table["N"][i], table["loss"][i]
        best, lowest = float(N[loss.argmin()]), float(loss.min())
        if method == "parabola":
            a, b, c = np.polyfit(np.log(N), loss, 2) if len(np.unique(N)) > 2 else (0, 0, 0)
            if not (a > 0 and N.min() <= math.exp(-b / (2 * a)) <= N.max()):
                raise ValueError(f"at C = {C:.3g} the losses have no valley within what was tried")
            best, lowest = math.exp(-b / (2 * a)), float(c - b * b / (4 * a))
        if method != "envelope" or not optima or lowest < optima[-1].loss:
            optima.append(Choice(C, best, C / (6 * best), lowest))
    C, N, D, _ = np.array(optima).T
    return ComputeLaws(fit_power_law(C, N), fit_power_law(C, D), optima)

class Parametric(namedtuple("Parametric", "E A B alpha beta objective left_out")):
    """L(N, D) = E + A / N^alpha + B / D^beta: the loss of the text itself, what a model of finite
    size adds, and what training on finitely many tokens adds. objective: the sum of Huber losses;
    left_out: indices of runs taken for outliers."""
    def __call__(self, N, D):
        N, D = np.asarray(N, np.float64), np.asarray(D, np.float64)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

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
    loss of log L - log loss -> Parametric. From the best 60 of the published grid's 4,500 starts,
    until the gradient vanishes. (The first published fit stopped early: it minimized the mean, not
    the sum, below its tolerance; Besiroglu et al. 2024.) Runs more than `outliers` robust standard
    deviations off are left out, and the rest is fitted again: at 11, just the five of Hoffmann et
    al.'s 245 that Besiroglu et al. leave out. Raises ValueError where runs do not determine it."""
    x, y, z = (np.log(np.asarray(column, np.float64)) for column in (N, D, loss))
    if min(len(x) / 2, len(set(x)), len(set(y))) < 3 or np.corrcoef(x, y)[0, 1] > 0.99999:
        raise ValueError("the law needs 6 runs, 3 different N and 3 D, and D not tied to N")
    halves, fives, kept = np.arange(0, 2.5, 0.5), range(0, 30, 5), np.arange(len(x))
    grid = np.array(list(itertools.product(halves - 1, fives, fives, halves, halves)))
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
    exponents, shares = theta[best, 3:], share[:, 0, kept].max(1)  # of the terms in the loss
    if not (gradient[best] <= 1e-6 * delta * len(kept) and (shares >= (1e-3, 1e-5, 1e-5)).all()
            and 0.01 <= min(exponents) and max(exponents) <= 4):
        raise ValueError(f"the runs do not determine the law: exponents {exponents}, shares of its "
                         f"terms {shares}, gradient {gradient[best]:.1e}")
    left_out = tuple(np.setdiff1d(np.arange(len(x)), kept).tolist())
    return Parametric(*np.exp(theta[best, :3]), *exponents, objective[best], left_out)

def predict(fit, x, D=None, inference_tokens=0.0):
    """A PowerLaw: y at x. A Parametric law and D: the loss of N = x on D tokens. Otherwise x is a
    compute -> Choice of the best N and D for it, the loss NaN for ComputeLaws. inference_tokens: to
    serve afterwards, for 2 N FLOPs each out of x (Sardana et al. 2023). Raises ValueError."""
    if isinstance(fit, PowerLaw) or D is not None:
        return fit(x) if D is None else fit(x, D)
    laws, spent = isinstance(fit, ComputeLaws), 2 * inference_tokens
    if not 0 <= spent < x < math.inf or laws and spent:
        raise ValueError(f"compute {x:g}: {spent:g} for inference, which needs the parametric law")
    if laws:
        return Choice(x, float(fit.N(x)), float(fit.D(x)), math.nan)
    # a search on ever finer grids; without inference there is a formula (Hoffmann et al., eq. 4)
    low, high = 1.0, x / max(6.0, spent)
    for _ in range(9):
        N = np.geomspace(low, high, 200)[1:-1]
        D = (x / N - spent) / 6
        i = fit(N, np.maximum(D, 1e-9)).argmin()
        low, high = N[i] * N[0] / N[1], N[i] * N[1] / N[0]
    return Choice(x, float(N[i]), float(D[i]), float(fit(N[i], D[i])))

def bootstrap(table, fit, n=100, seed=0, delta=1e-3):
    """n fits to runs drawn from a table of `columns`, with replacement (Efron 1979) -> list. fit: a
    function of a table (at each compute as many runs are drawn as there are; draws that can not be
    fitted are left out), or a Parametric law (n fits at once, runs weighed by how often drawn)."""
    rng, fits = np.random.default_rng(seed), []
    if isinstance(fit, Parametric):
        kept = np.setdiff1d(np.arange(len(table["N"])), fit.left_out)
        data = [np.log(table[name][kept]) for name in ("N", "D", "loss")]
        weights = rng.multinomial(len(kept), np.ones(len(kept)) / len(kept), n)
        start = np.tile([*np.log(fit[:3]), *fit[3:5]], (n, 1))
        theta, objective, _ = minimize_huber(start, *data, weights, delta)
        return [Parametric(*np.exp(row[:3]), *row[3:], value, fit.left_out)
                for row, value in zip(theta, objective)]
    for _ in range(n):
        rows = np.concatenate([rng.choice(i, len(i)) for _, i in groups_of(table["C"])])
        with contextlib.suppress(ValueError):
            fits.append(fit({name: values[rows] for name, values in table.items()}))
    return fits

# ---- Runs: hyperparameters in, loss out.

# a script as a child that, when its parent was killed, ends and removes the folder it writes to
CHILD = """import os, runpy, shutil, sys, threading, time
_, parent, folder, *sys.argv = sys.argv
def watch():
    while os.getppid() == int(parent):
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")"""

def plan(flags, data):
    """What a run will take -> a record for runs.jsonl, but for its loss. Numbers are written in one
    way, to find a run again; --train_flops becomes a number of steps. Raises ValueError."""
    from model import TransformerConfig, count  # (takes seconds)
    flags, path = dict(sorted(flags.items())), os.path.join(data, "train.bin")
    if taken := {"data", "out_dir", "init_from"} & flags.keys():
        raise ValueError(f"it is for scaling.py to set {', '.join(taken)}")
    for name in flags:
        with contextlib.suppress(ValueError):
            flags[name] = f"{float(flags[name]):.12g}"
    head = np.fromfile(path, "<i4", 256)  # without a header, GPT-2's ids
    sizes = {"vocab_size": int(head[3]) if head[0] in (20240520, 20240801) else 50304}
    for name, default in vars(TransformerConfig()).items():
        if name in flags:
            sizes[name] = type(default)({"False": ""}.get(flags[name], flags[name]))
    parameters, flops = count(TransformerConfig(**sizes))
    iters, *each = (int(flags.get(name, default)) for name, default in (("max_iters", 450),
        ("batch_size", 8), ("block_size", 256), ("gradient_accumulation_steps", 1)))  # train.py's
    step, per_token = math.prod(each), 3 * int(flops.total())
    iters = round(float(flags.get("train_flops", iters * step * per_token)) / step / per_token)
    names = [os.path.basename(os.path.abspath(data)), f"{os.path.getsize(path)}"]
    return {"run": " ".join(names + [f"--{name}={value}" for name, value in flags.items()]),
            "parameters": parameters.total() - parameters["embedding"], "tokens": iters * step,
            "compute": iters * step * per_token, "iters": iters, "flags": flags}

def train(flags, data, **env):
    """Hyperparameters in, loss out: {flag of train.py: value}, a folder of bpe.py, environment
    variables -> record for runs.jsonl. Raises ValueError with train.py's error, OSError."""
    record = plan(flags, data)
    words = [f"--{name}={record['flags'][name]}" for name in flags if name != "train_flops"]
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(os.getpid()), folder, f"{ROOT}/train.py", *words,
             f"--max_iters={record['iters']}", "--data", data, "--out_dir", folder,
             "--eval_interval=1000000"],  # and after the last step
            env=os.environ | env, start_new_session=True, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "train.py was stopped").splitlines()[-1]
            raise ValueError(last.removeprefix("train.py: error: "))
        with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
            *_, last = csv.DictReader(file)
    return record | {"loss": float(last["val_loss"]), "seconds": float(last["seconds"])}

def run_all(plans, args):
    """Make runs, small ones as many at a time as there are cores. plans: a list of `plan` -> their
    records; those in args.runs are not made again, and one that fails is printed and left out.
    Raises ValueError if all, those in the file too, would take more FLOPs than args.budget."""
    from model import pick_device
    os.makedirs(os.path.dirname(os.path.abspath(args.runs)), exist_ok=True)
    kept, done = load_runs(args.runs) if os.path.exists(args.runs) else [], itertools.count(1)
    runs = {run.get("run"): run for run in kept}
    todo = [of for of in plans if of["run"] not in runs]
    print(f"{len(plans)} runs, {len(todo)} of them new", flush=True)
    if todo and (need := sum(run["compute"] for run in kept + todo)) > args.budget:
        raise ValueError(f"with {len(todo)} new runs all would take {need:.3g} FLOPs; none started")
    def make(of):
        try:
            run = runs[of["run"]] = train(of["flags"], args.data, **env)
        except (ValueError, OSError) as error:
            return print(f"failed: {of['run']}: {error}", file=sys.stderr, flush=True)
        with open(args.runs, "a", encoding="utf-8") as file:  # one write, so that several
            file.write(json.dumps(run) + "\n")  # processes can add to it
        print(f"[{next(done)}/{len(todo)}] {run['run']} | N {run['parameters']:,} | D "
              f"{run['tokens']:,} | loss {run['loss']:.4f} | {run['seconds']:.0f} s", flush=True)
    small = pick_device() == "cpu" and all(of["parameters"] < 5e5 for of in todo)
    env = {"OMP_NUM_THREADS": "1"} if small else {}  # they are too small to share
    with ThreadPoolExecutor(os.cpu_count() if small else 1) as pool:
        list(pool.map(make, todo))
    return [runs[of["run"]] for of in plans if of["run"] in runs]

def isoflop_runs(flags, budgets, sizes, data):
    """Plans of runs of each size ("64x2": n_embd, n_layer; of one family) at each budget; but none
    with fewer than 2.2 tokens per parameter or more than 40: there the law's terms are too few."""
    shapes = [list(map(int, size.split("x"))) for size in sizes.split(",")]
    plans = [plan({**flags, "n_embd": w, "n_layer": depth, "n_head": w // 8, "d_ff": 3 * w,
                   "train_flops": C}, data) for C in budgets.split(",") for w, depth in shapes]
    return [of for of in plans if 2.2 <= of["tokens"] / of["parameters"] <= 40]

# ---- Reports: dicts that are printed, and kept as JSON.

METHODS = {"isoflop": fit_isoflops, "envelope": lambda table: fit_isoflops(table, "envelope"),
           "minimum": lambda table: fit_isoflops(table, "minimum"),
           "parametric": lambda table: fit_parametric(table["N"], table["D"], table["loss"]),
           "kaplan": lambda table: Kaplan(*(fit_power_law(*zip(*(  # the lowest loss for each
               (x, table["loss"][i].min()) for x, i in groups_of(table[N])))) for N in "NDC"))}

def report(method, table, computes, n=100, inference_tokens=0.0):
    """Fit by a method, n times more to resampled runs, and predict the best model for each compute
    -> (dict, with standard errors and 80% intervals, fit). Raises ValueError."""
    def spread(of):
        rows = [of(fit)._asdict() for fit in (best, *fits)]
        result = {name: value for name, value in rows[0].items() if value == value}  # no NaN
        for name in [name for name in result if fits and isinstance(result[name], float)]:
            values = [row[name] for row in rows[1:]]
            if name not in ("C", "objective"):
                result[f"{name}_error"] = float(np.std(values))
                result[f"{name}_interval"] = tuple(np.quantile(values, (0.1, 0.9)).tolist())
        return result
    best, law = METHODS[method](table), method == "parametric"
    computes = () if method == "kaplan" else computes
    fits = bootstrap(table, best if law else METHODS[method], n)
    result = spread(lambda fit: fit) if law else {
        name: spread(lambda fit: getattr(fit, name)) for name in best._fields if name != "optima"}
    optima = [choice._asdict() for choice in getattr(best, "optima", ())]
    result |= {"optima": optima, "predictions": [
        {"inference_tokens": tokens} | spread(lambda fit: predict(fit, C, None, tokens))
        for tokens in dict.fromkeys((0.0, inference_tokens)) for C in computes]}
    return result, best

def show(result):
    """Print a report, a line for each number, law and row."""
    def text(value):
        if isinstance(value, dict):
            return "   ".join(f"{name} {text(part)}" for name, part in value.items())
        if isinstance(value, tuple):
            return f"[{', '.join(map(text, value))}]"
        return f"{value:.5g}" if isinstance(value, float) else str(value)
    for name, value in result.items():
        for row in value if isinstance(value, list) else [value]:
            print(f"{name}: {text(row)}", flush=True)

def save(path, result, table, fit):
    """Leave path.json, and if matplotlib is installed path.png: runs and laws."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(16, 5), layout="tight")
        ahead = np.geomspace(table["C"].min(), 10 * table["C"].max())
        for axes, x, y in zip(figure.subplots(1, 3), ("N", "C", "C"), ("loss", "N", "loss")):
            axes.set(xscale="log", yscale="log" if y == "N" else "linear", xlabel=x, ylabel=y)
            for C, i in groups_of(table["C"]):
                axes.plot(table[x][i], table[y][i], "o", label=f"C = {C:.1e}")
            best = [] if isinstance(fit, Kaplan) else [predict(fit, C)._asdict() for C in ahead]
            axes.plot([row[x] for row in best], [row[y] for row in best], "k--")
        axes.legend(fontsize=6)
        figure.savefig(path + ".png", dpi=110)

# ---- The whole method, on this machine.

def make_data(folder):
    """Python's own standard library in 512 tokens, few, so that small models are not all head."""
    library = os.path.dirname(os.__file__)
    names = sorted(glob.glob("**/*.py", root_dir=library, recursive=True))
    files = [path for name in names if os.path.getsize(path := os.path.join(library, name))
             and "-packages" not in name and "test" not in name]
    for words in ("train --vocab_size 512", f"encode --val_fraction 0.02 --tokenizer {folder}"):
        subprocess.run([sys.executable, f"{ROOT}/bpe.py", *words.split(), "--out", folder,
                        "--input", *files])

STUDY = {"block_size": "64", "batch_size": "4", "attention": "sliding,full", "window": "4",
         "dtype": "float32", "learning_rate": "0.007", "mup": "64", "seed": "1337"}

def study(args):
    """Small runs, each with two seeds, a prediction at 10 times their compute, and its test. So few
    runs hardly tell the exponents: laws fitted to resampled runs count the more, the closer theirs
    are to the published ones (importance resampling; Smith & Gelfand 1992)."""
    flags, noise = STUDY | args.flags, 1e-2  # of log loss, from seed to seed
    C = 10 * max(map(float, args.budgets.split(",")))
    table = columns(run_all([of for i in (0, 1) for of in isoflop_runs(
        flags | {"seed": int(flags["seed"]) + i}, args.budgets, args.sizes, args.data)], args))
    law = fit_parametric(table["N"], table["D"], table["loss"], noise)
    fits = bootstrap(table, law, 400, 0, noise)
    p = np.array([math.exp(-((f.alpha - 0.35) ** 2 + (f.beta - 0.37) ** 2) / 0.02) for f in fits])
    fits = [fits[i] for i in np.random.default_rng(0).choice(len(fits), 1000, p=p / p.sum())]
    best, widths = np.median([predict(fit, C).N for fit in fits]), range(8, 520, 8)
    final = min(isoflop_runs(flags, str(C), ",".join(f"{w}x2" for w in widths), args.data),
                key=lambda of: abs(math.log(of["parameters"] / best)))
    N, D = final["parameters"], final["tokens"]
    low, middle, high = np.quantile([fit(N, D) for fit in fits], (0.1, 0.5, 0.9)).tolist()
    result = {"target": C, "N": N, "D": D, "predicted_loss": middle, "interval": (low, high)}
    show(result)
    result["measured_loss"] = run_all([final], args)[0]["loss"]
    result["difference"] = result["measured_loss"] - result["predicted_loss"]
    show(result)
    save(os.path.join(os.path.dirname(args.runs), "study"), result, table, law)

# ---- The command line.

def main():
    words, commands = sys.argv[1:], ("study", "run", "sweep", "isoflop", "fit")
    command = words.pop(0) if words and words[0] in commands else "study"
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"scaling.py: error: {message}\n")
    add = parser.add_argument
    for name, default, text in (
            ("runs", "scaling/runs.jsonl", "file of finished runs"),
            ("data", DATA, "folder of bpe.py; this one is made if need be"),
            ("budget", math.inf, "FLOPs that all in --runs may take together"),
            ("budgets", "5e10,1e11,2e11", "isoflop, study: FLOPs of a run"),
            ("sizes", "16x2,24x2,32x2,40x2,48x2,56x2", "n_embd x n_layer, where tokens suit them"),
            ("bootstrap", 100, "fit: resamples"),
            ("inference_tokens", 0.0, "fit: to be served later, out of the same compute"),
            ("out", "", "fit: folder for JSON, and for PNG if matplotlib is installed")):
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    add("--grid", nargs="+", default=[], metavar="NAME=A,B", help="sweep: values of flags")
    add("--method", default="isoflop", choices=METHODS, help="fit (default isoflop)")
    add("--compute", type=float, nargs="+", metavar="C", help="fit: FLOPs to predict for")
    add("--json", action="store_true", help="fit: print JSON")
    if command == "fit":
        add("file", help="runs: .jsonl, .json or .csv")
        args = parser.parse_args(words)
        table = columns(load_runs(args.file))
        ahead = args.compute or [table["C"].max() * factor for factor in (10, 100, 1000)]
        result, fit = report(args.method, table, ahead, args.bootstrap, args.inference_tokens)
        print(json.dumps(result, indent=1)) if args.json else show(result)
        return args.out and save(os.path.join(args.out, args.method), result, table, fit)
    rest = parser.parse_known_args(words)[1]
    theirs = {word.partition("=")[0] for word in rest if word.startswith("--")}
    for name in theirs:
        add(name, nargs="?", const="True")
    args = parser.parse_args(words)
    args.flags = {name[2:]: getattr(args, name[2:]) for name in theirs}
    print(f"{command}: {args.data} to {args.runs}", flush=True)
    if args.data == DATA and not os.path.exists(os.path.join(DATA, "val.bin")):
        make_data(args.data)
    if not os.path.exists(path := os.path.join(args.data, "train.bin")):
        raise ValueError(f"there is no {path}: see python bpe.py --help")
    if command == "study":
        return study(args)
    grid = dict(text.split("=", 1) for text in args.grid)
    plans = [plan(args.flags | dict(zip(grid, row)), args.data)
             for row in itertools.product(*(text.split(",") for text in grid.values()))]
    if command == "isoflop":
        plans = isoflop_runs(args.flags, args.budgets, args.sizes, args.data)
    show(min(run_all(plans, args), key=lambda run: run["loss"]))

if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, LookupError, TypeError, RuntimeError, csv.Error) as error:
        sys.exit(f"scaling.py: error: {error}")
