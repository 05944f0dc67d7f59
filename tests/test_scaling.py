"""scaling.py: fits against laws that are known, runs against their own promises."""

import csv
import glob
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import scaling as S

LAW = 1.7, 400.0, 1500.0, 0.34, 0.36  # E, A, B, alpha, beta

def loss_of(N, D, law=LAW):
    E, A, B, alpha, beta = law
    return E + A * N**-alpha + B * D**-beta

def points(n=240, noise=0.005, seed=0, law=LAW):
    rng = np.random.default_rng(seed)
    C, ratio = np.exp(rng.uniform(math.log(1e18), math.log(1e22), n)), np.exp(rng.uniform(0, 5, n))
    N = np.sqrt(C / 6 / ratio)
    D = C / 6 / N
    return N, D, loss_of(N, D, law) * np.exp(noise * rng.standard_normal(n))

def isoflops(budgets=(1e18, 1e19, 1e20), sizes=9, width=2.0):
    """Exact parabolas in log N with their bottoms at N = 0.5 C^0.45."""
    return [{"parameters": 0.5 * C**0.45 * math.exp(u), "compute_budget": C,
             "final_loss": 2 + 100 * C**-0.1 + 0.05 * u * u}
            for C in budgets for u in np.linspace(-width, 1.3 * width, sizes)]

@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """The command line, without a process -> exit code (or error), stdout, stderr."""
    def run(words):
        monkeypatch.setattr(sys, "argv", ["scaling.py", *map(str, words.split())])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            S.main()
        except (SystemExit, ValueError, OSError, LookupError, TypeError, RuntimeError) as stop:
            code = stop.code if isinstance(stop, SystemExit) else repr(stop)
        return types.SimpleNamespace(code=code, **capsys.readouterr()._asdict())
    return run

# ---- Power laws and isoFLOPs.

def test_power_law():
    x = np.array([1.0, 10, 1000])
    fit = S.fit_power_law(x, 3 * x**-0.25)
    assert fit == pytest.approx((3, -0.25))
    assert fit(16) == pytest.approx(1.5) and S.predict(fit, 16) == pytest.approx(1.5)
    for x, y in (([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1, -1]), ([1, 2], [1, math.nan])):
        with pytest.raises(ValueError):
            S.fit_power_law(x, y)

def test_parabolas_find_the_bottoms():
    fit = S.fit_isoflops(isoflops())
    assert fit.N == pytest.approx((0.5, 0.45), rel=1e-6)
    assert fit.D.exponent == pytest.approx(0.55, rel=1e-6)
    assert all(choice.loss == pytest.approx(2 + 100 * choice.C**-0.1) for choice in fit.optima)
    choice = S.predict(fit, 1e23)
    assert choice.N * choice.D * 6 == pytest.approx(1e23) == 6 * choice.D * 0.5 * 1e23**0.45

def test_the_plain_minimum_takes_a_run():
    runs = isoflops()
    for C, N, D, loss in S.fit_isoflops(runs, "minimum").optima:
        same = {r["final_loss"]: r["parameters"] for r in runs if r["compute_budget"] < 1.1 * C}
        assert loss == min(same) and N == same[loss] and D == pytest.approx(C / 6 / N)

def test_curves_without_a_bottom_are_refused():
    runs = isoflops()
    slope = [{**r, "final_loss": 5 - 0.1 * math.log(r["parameters"])} for r in runs]
    hill = [{**r, "final_loss": 10 - r["final_loss"]} for r in runs]
    for wrong in (slope, hill, runs[:9], [], runs[::9], runs[:2] + runs[9:]):
        with pytest.raises(ValueError):
            S.fit_isoflops(wrong)

def test_the_envelope_has_what_nothing_beats():
    runs = [dict(zip(("N", "C", "loss"), row)) for row in (
        (1e6, 1e15, 4.0), (2e6, 2e15, 4.1), (4e6, 4e15, 3.5), (9e6, 4e15, 3.6), (8e6, 1e16, 3.0))]
    assert [choice.C for choice in S.fit_isoflops(runs, "envelope").optima] == pytest.approx(
        [1e15, 4e15, 1e16])
    with pytest.raises(ValueError):
        S.fit_isoflops(runs[:2], "envelope")

# ---- The parametric law.

def test_parametric_recovers_exact_points():
    fit = S.fit_parametric(*points(60, noise=0))
    assert fit[:5] == pytest.approx(LAW, rel=1e-4) and fit.objective < 1e-12 and fit.left_out == ()
    assert S.predict(fit, 1e9, 1e11) == pytest.approx(loss_of(1e9, 1e11), rel=1e-6)

def test_mistake_8_a_scaling_fit_stops_early_or_keeps_outliers():
    """No step of a simple search from the answer finds anything lower, not even in a long valley,
    and runs that failed to learn do not move the law."""
    N, D, loss = points()
    fit = S.fit_parametric(N, D, loss)

    def objective(*law):
        r = np.log(loss_of(N, D, law)) - np.log(loss)
        return np.where(np.abs(r) <= 1e-3, r * r / 2, 1e-3 * (np.abs(r) - 5e-4)).sum()

    assert fit.objective == pytest.approx(objective(*fit[:5]), rel=1e-9)
    assert fit.objective < objective(*LAW)
    for scale in 10.0 ** -np.arange(2, 7):
        for draw in np.random.default_rng(1).standard_normal((50, 5)):
            assert objective(*fit[:5] * np.exp(scale * draw)) >= fit.objective * (1 - 1e-12)
    long = S.fit_parametric(*points(120, 0.002, law=(2.24, 52.0, 488.0, 0.511, 0.486)))
    assert long.objective == pytest.approx(0.0001415201468, rel=1e-9)  # thousands of iterations
    spoilt = loss * 1.0
    spoilt[[3, 50, 100, 150, 200]] *= 1.6, 1.5, 1.4, 1.8, 1.3
    again = S.fit_parametric(N, D, spoilt)
    assert again.left_out == (3, 50, 100, 150, 200)
    without = [np.delete(v, again.left_out) for v in (N, D, loss)]
    assert again[:6] == pytest.approx(S.fit_parametric(*without)[:6], rel=1e-6)
    assert S.fit_parametric(N, D, spoilt, outliers=None).objective > 2.5 * again.objective

def test_intervals_cover_the_law_they_should_find():
    N, D, loss = points(seed=5)
    fit, table = S.fit_parametric(N, D, loss), S.columns({"N": N, "D": D, "loss": loss})
    begin = time.process_time()
    fits = S.bootstrap(table, fit)
    assert time.process_time() - begin < 2 and len(fits) == 100
    for i, true in enumerate(LAW):
        spread = np.std([f[i] for f in fits])
        assert abs(fit[i] - true) < 4 * spread and spread > 0
    assert S.bootstrap(table, fit) == fits  # the same draws every time
    runs = S.columns(isoflops())
    runs["loss"] *= np.exp(1e-3 * np.random.default_rng(0).standard_normal(len(runs["loss"])))
    drawn = [law.N.exponent for law in S.bootstrap(runs, S.fit_isoflops)]
    assert min(drawn) < 0.45 < max(drawn)

@pytest.mark.parametrize("change", [
    lambda N, D, loss: (N[:5], D[:5], loss[:5]), lambda N, D, loss: (N * 0 + 1e8, D, loss),
    lambda N, D, loss: (N, 20 * N, loss), lambda N, D, loss: (N, D, 3 + 0 * loss),
    lambda N, D, loss: (N, D, 2 + 400 * D**-0.3), lambda N, D, loss: (N, D[:-1], loss)])
def test_runs_that_do_not_determine_the_law(change):
    with pytest.raises(ValueError):
        S.fit_parametric(*change(*points(60, noise=0)))

def test_the_best_size_for_a_compute():
    fit = S.Parametric(*LAW, 0.0, ())
    E, A, B, alpha, beta = LAW
    for C in (1e12, 1e18, 5.76e23):
        choice = S.predict(fit, C)
        G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
        assert choice.N == pytest.approx(G * (C / 6) ** (beta / (alpha + beta)), rel=1e-5)
        assert 6 * choice.N * choice.D == pytest.approx(C)
        served = S.predict(fit, C, inference_tokens=choice.D)
        assert served.N < choice.N and served.loss > choice.loss
        assert 6 * served.N * served.D + 2 * served.N * choice.D == pytest.approx(C)
        for other in (0.98, 1.02):  # nothing beside it is better
            N = served.N * other
            assert fit(N, (C / N - 2 * choice.D) / 6) > served.loss
    for C, tokens in ((-1.0, 0), (math.inf, 0), (math.nan, 0), (1e6, 5e5), (1e6, math.nan)):
        with pytest.raises(ValueError):
            S.predict(fit, C, inference_tokens=tokens)
    with pytest.raises(ValueError, match="parametric"):
        S.predict(S.fit_isoflops(isoflops()), 1e20, inference_tokens=1.0)

# ---- Tables, and the command line.

def test_columns_by_their_usual_names(tmp_path):
    N, D, loss = points(20)
    rows = list(zip(N, D, loss))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([("Model Size", "Training FLOP", "loss")] + [
            (n, 6 * n * d, x) for n, d, x in rows])
    (tmp_path / "a.json").write_text(json.dumps(
        [{"params": n, "Training Tokens": d, "val_loss": x} for n, d, x in rows]))
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"N": n, "D": d, "loss": x}) + "\n\n" for n, d, x in rows))
    for name in ("a.csv", "a.json", "a.jsonl"):
        table = S.columns(S.load_runs(str(tmp_path / name)))
        for found, wanted in zip((table["N"], table["D"], table["C"]), (N, D, 6 * N * D)):
            np.testing.assert_allclose(found, wanted)
    mixed = [{"N": 1, "loss": 1, "compute": 9} | more for more in ({"compute_budget": 8}, {})]
    assert S.columns(mixed)["C"].tolist() == [8, 9]
    table = dict(zip(("parameters", "C", "loss"), zip(*(run.values() for run in isoflops()))))
    assert S.fit_isoflops(table) == S.fit_isoflops(isoflops())

@pytest.mark.parametrize("content", ["[]", "{}", "[1]", "[{", '[{"N": 1, "loss": 2}]', "[" * 100000,
                                     *(f'[{{"N": 1, "C": 2, "loss": {x}}}]' for x in (
                                         "-3", "NaN", "null", '"x"', "3"))])
def test_bad_tables_are_an_error(tmp_path, content, call):
    (tmp_path / "runs.json").write_text(content)
    assert call("fit runs.json").code

def test_fit_prints_json_and_leaves_files(tmp_path, call):
    (tmp_path / "runs.json").write_text(json.dumps(
        [{"N": n, "D": d, "loss": x} for n, d, x in zip(*points())]))
    result = call("fit runs.json --method parametric --bootstrap 50 --json --out plots "
                  "--compute 1e23 --inference_tokens 1e12")
    found = json.loads(result.out)
    assert found["alpha"] == pytest.approx(0.34, abs=0.03)
    assert found["alpha_interval"][0] < found["alpha"] and found["alpha_error"] > 0
    first, served = found["predictions"]
    assert served["N"] < first["N"]
    assert first["loss_interval"][0] <= first["loss"] <= first["loss_interval"][1]
    assert json.loads((tmp_path / "plots/parametric.json").read_text()) == found
    assert "matplotlib.figure" not in sys.modules or (tmp_path / "plots/parametric.png").exists()
    for method, word in (("kaplan", "N: coefficient"), ("envelope", "optima: C ")):
        assert word in call(f"fit runs.json --bootstrap 5 --method {method}").out
    (tmp_path / "iso.json").write_text(json.dumps(isoflops()))
    assert "N: coefficient 0.5   exponent 0.45 " in call("fit iso.json").out

@pytest.mark.parametrize("words", ["run stray", "fit", "fit x --bogus", "fit x --method cubic",
                                   "sweep --grid", "run --budget x"])
def test_usage_errors_are_one_line(words, call):
    result = call(words)
    assert result.code == 2 and result.err.count("\n") == 1 and "scaling.py: error" in result.err

# ---- Runs.

TINY = "--n_layer 1 --n_head 2 --block_size 16 --batch_size 4 --device cpu --data data"

@pytest.fixture
def data(tmp_path):
    """Ids that follow each other in a circle: easy to learn."""
    header = np.zeros(256, "<i4")
    header[:5] = 20240520, 1, 4000, 32, 0
    (tmp_path / "data").mkdir()
    ids = (np.arange(4000) % 32).astype("<u2")
    for name in ("train.bin", "val.bin"):
        (tmp_path / "data" / name).write_bytes(header.tobytes() + ids.tobytes())
    return tmp_path

def test_runs_are_made_once_and_within_the_budget(data, call):
    result = call("sweep --grid n_embd=16 learning_rate=1e-2,nonsense --train_flops 2e7 " + TINY)
    assert result.err.count("failed: ") == 1 and "nonsense" in result.err and "loss: " in result.out
    run, = S.load_runs(data / "scaling/runs.jsonl")
    assert run["compute"] == pytest.approx(2e7, rel=0.05) and 0 < run["loss"] < 4
    assert run["tokens"] == run["iters"] * 64 and run["parameters"] > 1000
    again = call(f"run --n_embd=16 --learning_rate 0.01 --train_flops 20000000 {TINY}")
    assert "1 runs, 0 of them new" in again.out and f"loss: {run['loss']:.5g}" in again.out
    result = call(f"run --n_embd 16 --train_flops 2e7 --budget {run['compute'] * 1.9} {TINY}")
    assert "FLOPs; none started" in result.code
    os.truncate(data / "data/train.bin", 7000)  # other data: another run
    assert "1 of them new" in call(f"run --n_embd 16 --learning_rate 1e-2 --train_flops 2e7 "
                                   f"--budget 1 {TINY}").out

def test_what_a_run_will_take(data):
    flags = {"n_embd": "16", "n_layer": "1", "n_head": "2", "block_size": "16", "batch_size": "4"}
    N = S.plan(flags, data / "data")["parameters"]
    assert S.plan(flags | {"qk_norm": "True"}, data / "data")["parameters"] > N
    assert S.plan(flags | {"qk_norm": "False"}, data / "data")["parameters"] == N
    assert S.plan(flags | {"max_iters": "30"}, data / "data")["tokens"] == 30 * 64
    with pytest.raises(ValueError, match="init_from"):
        S.plan(flags | {"init_from": "x"}, data / "data")

def test_a_run_that_was_stopped_in_its_last_step_is_made_again(data, call, monkeypatch):
    last = []

    def run(words, **_):
        folder = words[words.index("--out_dir") + 1]
        with open(os.path.join(folder, "log.csv"), "w") as file:
            file.write(f"step,seconds,val_loss\n30,1,{last.pop()}\n")
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(S.subprocess, "run", run)
    for value in ("", "2.5"):
        last.append(value)
        result = call(f"run --n_embd 16 --max_iters 30 {TINY}")
        assert "1 of them new" in result.out and ("loss: 2.5" in result.out) == (value == "2.5")

@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_child_outlives_its_parent(data, number):
    words = f"run --n_embd 16 --max_iters 1000000 {TINY}".split()
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "scaling.py"), *words], cwd=data,
                               env=os.environ | {"TMPDIR": str(data)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("run: data")
    deadline = time.monotonic() + 60
    while not glob.glob(f"{data}/scaling-*") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    assert process.communicate() and process.returncode == -number
    while glob.glob(f"{data}/scaling-*") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not glob.glob(f"{data}/scaling-*")  # the child removes it, and ends

def test_a_study_predicts_models_that_follow_a_law(data, call, monkeypatch):
    law = 1.2, 30.0, 60.0, 0.34, 0.37

    def train(flags, folder, **_):
        run = S.plan(flags, folder)
        slip = 2e-3 * math.sin(zlib.crc32(run["run"].encode()))
        return run | {"loss": loss_of(run["parameters"], run["tokens"], law) + slip, "seconds": 1}

    monkeypatch.setattr(S, "train", train)
    result = call("--data data --runs study/runs.jsonl --seed 3")
    found = json.loads((data / "study/study.json").read_text())
    runs = S.load_runs(data / "study/runs.jsonl")
    assert result.code == 0 and found["target"] == 2e12 and abs(found["difference"]) < 0.02
    assert found["interval"][0] < found["predicted_loss"] < found["interval"][1]
    assert max(run["compute"] for run in runs) == pytest.approx(2e12, rel=0.01)
    seeds = [run["flags"]["seed"] for run in runs]
    assert seeds.count("3") == seeds.count("4") + 1 > 9 and set(seeds) == {"3", "4"}
