"""scaling.py: fits against laws that are known, runs against their own promises."""

import concurrent.futures
import contextlib
import csv
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import scaling as S

LAW = 1.7, 400.0, 1500.0, 0.34, 0.36  # E, A, B, alpha, beta
FORKS = multiprocessing.get_context("forkserver")  # processes that need not import torch again
FORKS.set_forkserver_preload(["torch._dynamo", "pytest"])


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
def call(capsys, monkeypatch):
    """The command line, without a process -> returncode, stdout, stderr."""
    def run(words, cwd="."):
        words = words.split() if isinstance(words, str) else map(str, words)
        monkeypatch.setattr(sys, "argv", ["scaling.py", *words])
        before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.chdir(cwd)
        code = 0
        try:
            S.main()
        except SystemExit as stop:
            code = stop.code
        for number, handler in before:
            signal.signal(number, handler)
        return types.SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())
    return run


# ---- power laws and isoFLOPs


def test_power_law():
    x = np.array([1.0, 10, 1000])
    fit = S.fit_power_law(x, 3 * x**-0.25)
    assert fit == pytest.approx((3, -0.25))
    assert fit(16) == pytest.approx(1.5) and S.predict(fit, 16) == pytest.approx(1.5)
    for x, y in (([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1, -1]), ([1, 2], [1, math.nan]),
                 ([1, 2], [1])):
        with pytest.raises(ValueError):
            S.fit_power_law(x, y)


def test_parabolas_find_the_bottoms():
    fit = S.fit_isoflops(isoflops())
    assert fit.N == pytest.approx((0.5, 0.45), rel=1e-6)
    assert fit.D.exponent == pytest.approx(0.55, rel=1e-6)
    assert [o[3] for o in fit.optima] == pytest.approx(
        [2 + 100 * C**-0.1 for C in (1e18, 1e19, 1e20)], abs=1e-6)
    choice = S.predict(fit, 1e23)
    assert choice.N * choice.D * 6 == pytest.approx(1e23)
    assert choice.N == pytest.approx(0.5 * 1e23**0.45)


def test_the_plain_minimum_takes_a_run():
    runs = isoflops()
    for C, N, D, loss in S.fit_isoflops(runs, "minimum").optima:
        same = [r for r in runs if r["compute_budget"] == pytest.approx(C)]
        assert loss == min(r["final_loss"] for r in same) and D == pytest.approx(C / 6 / N)
        assert N in [r["parameters"] for r in same]


def test_curves_without_a_bottom_are_refused():
    runs = isoflops()
    slope = [{**r, "final_loss": 5 - 0.1 * math.log(r["parameters"])} for r in runs]
    hill = [{**r, "final_loss": 10 - r["final_loss"]} for r in runs]
    far = [{**r, "final_loss": math.log(r["parameters"] / 1e15) ** 2} for r in runs]
    for wrong in (slope, hill, far, runs[:9], [], [1], runs[::9], runs[:2] + runs[9:]):
        with pytest.raises(ValueError):
            S.fit_isoflops(wrong)
    with pytest.raises(ValueError, match="parabola or minimum"):
        S.fit_isoflops(runs, "cubic")


def test_the_envelope_has_what_nothing_beats():
    runs = [dict(zip(("N", "C", "loss"), row)) for row in (
        (1e6, 1e15, 4.0), (2e6, 2e15, 4.1), (4e6, 4e15, 3.5), (9e6, 4e15, 3.6), (8e6, 1e16, 3.0))]
    assert [o[0] for o in S.fit_envelope(runs).optima] == [1e15, 4e15, 1e16]
    with pytest.raises(ValueError, match="envelope"):
        S.fit_envelope(runs[:2])


# ---- the parametric law


def test_parametric_recovers_exact_points():
    fit = S.fit_parametric(*points(60, noise=0))
    assert fit[:5] == pytest.approx(LAW, rel=1e-4) and fit.objective < 1e-12 and fit.left_out == ()
    assert S.predict(fit, 1e9, 1e11) == pytest.approx(loss_of(1e9, 1e11), rel=1e-6)


def test_a_scaling_fit_stops_early_or_keeps_outliers():
    """No step of a simple search from the answer finds anything lower, not even in a long valley,
    and runs that failed to learn do not move the law."""
    N, D, loss = points()
    fit = S.fit_parametric(N, D, loss)

    def objective(*law):
        r = np.log(loss_of(N, D, law)) - np.log(loss)
        return np.where(np.abs(r) <= 1e-3, r * r / 2, 1e-3 * (np.abs(r) - 5e-4)).sum()

    assert fit.objective == pytest.approx(objective(*fit[:5]), rel=1e-9)
    assert fit.objective < objective(*LAW)
    rng = np.random.default_rng(1)
    for scale in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        for _ in range(50):
            near = fit[:5] * np.exp(scale * rng.standard_normal(5))
            assert objective(*near) >= fit.objective * (1 - 1e-12)
    long = S.fit_parametric(*points(120, 0.002, law=(2.24, 52.0, 488.0, 0.511, 0.486)))
    assert long.objective == pytest.approx(0.0001415201468, rel=1e-9)  # thousands of iterations
    spoilt = loss.copy()
    spoilt[[3, 50, 100, 150, 200]] *= 1.6, 1.5, 1.4, 1.8, 1.3
    again = S.fit_parametric(N, D, spoilt)
    assert again.left_out == (3, 50, 100, 150, 200)
    without = [np.delete(v, again.left_out) for v in (N, D, loss)]
    assert again[:6] == pytest.approx(S.fit_parametric(*without)[:6], rel=1e-6)
    kept = S.fit_parametric(N, D, spoilt, outliers=None)
    assert kept.left_out == () and kept.objective > 5 * again.objective / 2


def test_intervals_cover_the_law_they_should_find():
    N, D, loss = points(seed=5)
    begin = time.process_time()
    fit = S.fit_parametric(N, D, loss)
    fits = S.bootstrap_parametric(fit, N, D, loss, 100)
    assert time.process_time() - begin < 10 and len(fits) == 100
    for i, true in enumerate(LAW):
        spread = np.std([f[i] for f in fits])
        assert abs(fit[i] - true) < 4 * spread and spread > 0
    assert S.bootstrap_parametric(fit, N, D, loss, 100) == fits  # the same draws every time
    assert S.interval(range(101)) == pytest.approx((10, 90))


@pytest.mark.parametrize("change, message", [
    (lambda N, D, loss: (N[:5], D[:5], loss[:5]), "too few"),
    (lambda N, D, loss: (N * 0 + 1e8, D, loss), "values of N"),
    (lambda N, D, loss: (N, 20 * N, loss), "tied"),
    (lambda N, D, loss: (N, D, -loss), "positive"),
    (lambda N, D, loss: (N, D, loss * np.nan), "positive"),
    (lambda N, D, loss: (N, D, 3 + 0 * loss), "bounds|converge"),
    (lambda N, D, loss: (N, D, 2 + 400 * D**-0.3), "bounds|converge"),
    (lambda N, D, loss: (N, D[:-1], loss), "as many"),
])
def test_runs_that_do_not_determine_the_law(change, message):
    with pytest.raises(ValueError, match=message):
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
        assert served.D / served.N > choice.D / choice.N
        assert 6 * served.N * served.D + 2 * served.N * choice.D == pytest.approx(C)
        for other in (0.98, 1.02):  # nothing beside it is better
            N = served.N * other
            assert fit(N, (C / N - 2 * choice.D) / 6) > served.loss
    for C, tokens in ((-1.0, 0), (math.inf, 0), (math.nan, 0), (1e6, 1e12), (1e6, 5e5),
                      (1e6, math.nan), (1e6, -1)):
        with pytest.raises(ValueError):
            S.predict(fit, C, inference_tokens=tokens)
    with pytest.raises(ValueError, match="Parametric"):
        S.predict(S.fit_isoflops(isoflops()), 1e20, inference_tokens=1.0)


# ---- tables, and the command line


def test_columns_by_their_usual_names(tmp_path):
    N, D, loss = points(20)
    rows = list(zip(N, D, loss))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("Model Size", "Training FLOP", "loss")] + [
            (n, 6 * n * d, x) for n, d, x in rows])
    (tmp_path / "a.json").write_text(json.dumps(
        [{"params": n, "Training Tokens": d, "val_loss": x} for n, d, x in rows]))
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"N": n, "D": d, "loss": x}) + "\n" for n, d, x in rows) + '{"N": 12, "D"')
    for name in ("a.csv", "a.json", "a.jsonl"):
        table = S.columns(S.load_runs(str(tmp_path / name)))
        for found, wanted in zip((table["N"], table["D"], table["C"]), (N, D, 6 * N * D)):
            np.testing.assert_allclose(found, wanted)
    mixed = [{"N": 1, "loss": 1, "compute": 9} | more for more in ({"compute_budget": 8}, {})]
    assert S.columns(mixed)["C"].tolist() == [8, 9]


@pytest.mark.parametrize("kind", [list, np.array])
@pytest.mark.parametrize("names", [("N", "C", "loss"), ("parameters", "compute_budget", "loss")])
def test_columns_of_columns(kind, names):
    rows = [list(run.values()) for run in isoflops()]
    table = dict(zip(names, map(kind, zip(*rows))))
    assert S.fit_isoflops(table) == S.fit_isoflops(isoflops())
    with pytest.raises(ValueError):
        S.columns({**table, "loss": table["loss"][:-1]})


def test_a_cell_stands_under_its_own_heading(capsys):
    S.show({"rows": [{"a": 1, "b": 2, "c": 3}, {"a": 4, "c": 5}], "none": []})
    assert capsys.readouterr().out == "a  b  c\n1  2  3\n4     5\n"


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"N": 1}\n\n{"N": \n{"N": 2}\n', "line 3 column"),
    ("a.json", b'[{"N": 1},\n {"N": }]', "line 2 column"),
    ("a.csv", b"N,D,loss\n1,2,\xff\n", "a.csv is no table of runs"),
])
def test_a_bad_table_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        S.load_runs(tmp_path / name)


@pytest.mark.parametrize("content, message", [
    ("[]", "no runs"),
    ("{}", "list"),
    ("[1]", "list"),
    ("[{", "no table"),
    ('[{"N": 1, "loss": 2}]', "column"),
    ('[{"N": 1, "C": 2, "loss": -3}]', "loss is -3"),
    ('[{"N": 1, "C": 2, "loss": NaN}]', "loss is nan"),
    ('[{"N": 1, "C": 2, "loss": null}]', "loss is None"),
    ('[{"N": 1, "C": 2, "loss": 3}]', "2 budgets"),
    ("[" * 100000, "no table"),
    (None, "No such file"),
])
def test_bad_tables_get_one_line(tmp_path, content, message, call):
    path = tmp_path / "runs.json"
    if content is not None:
        path.write_text(content)
    result = call(["fit", path])
    assert result.returncode == 1 and message in result.err
    assert result.err.count("\n") == 1 and not result.out


def test_fit_prints_json_and_leaves_files(tmp_path, call):
    (tmp_path / "runs.json").write_text(json.dumps(
        [{"N": n, "D": d, "loss": x} for n, d, x in zip(*points())]))
    result = call("fit runs.json --method parametric --bootstrap 50 --json --out plots "
                  "--compute 1e23 --inference_tokens 1e12", tmp_path)
    assert result.returncode == 0, result.err
    found = json.loads(result.out)
    assert found["alpha"] == pytest.approx(0.34, abs=0.03)
    assert found["alpha_interval"][0] < found["alpha"]
    first, served = found["predictions"]
    assert served["N"] < first["N"]
    assert first["loss_interval"][0] <= first["loss"] <= first["loss_interval"][1]
    assert json.loads((tmp_path / "plots/parametric.json").read_text()) == found
    with contextlib.suppress(ImportError):
        import matplotlib  # noqa: F401
        assert (tmp_path / "plots/parametric.png").read_bytes()[1:4] == b"PNG"
    for method in ("kaplan", "envelope"):
        result = call(f"fit runs.json --method {method}", tmp_path)
        assert result.returncode == 0 and "C^" in result.out, result.err
    (tmp_path / "iso.json").write_text(json.dumps(isoflops()))
    result = call("fit iso.json", tmp_path)
    assert "N = 0.5 C^0.4500" in result.out and "1e+23" in result.out, result.out


def test_the_best_learning_rate_by_size(capsys):
    runs = [{"N": N, "D": 1e6, "loss": 3 + (math.log(lr) - math.log(0.1 * N**-0.2)) ** 2,
             "flags": {"lr": str(lr)}} for N in (1e4, 1e5, 1e6) for lr in (1e-3, 3e-3, 1e-2, 3e-2)]
    result = S.report_optimum(runs, "lr", "N")
    assert result["law"]["exponent"] == pytest.approx(-0.2) and len(result["optima"]) == 3
    result = S.report_optimum(runs[:6] + runs[8:], "lr", "N")  # of one size too few runs
    assert result["law"]["exponent"] == pytest.approx(-0.2) and len(result["optima"]) == 2
    assert "left out: N = 1e+05" in capsys.readouterr().err
    result = S.report_optimum(runs[:4], "lr", "N")  # one size: an optimum, but no law
    assert len(result["optima"]) == 1 and "law" not in result
    with pytest.raises(ValueError, match="no run has"):
        S.report_optimum(runs, "beta3", "N")


# ---- runs


def test_grids_and_draws():
    assert S.grid_of(["a=1,2", "b=x,y"]) == [{"a": a, "b": b} for a in "12" for b in "xy"]
    drawn = S.grid_of(["a=1e-3:1e-1", "b=16:64"], 200)
    values = [float(row["a"]) for row in drawn]
    assert len(drawn) == 200 and 1e-3 <= min(values) < 2e-3 and 5e-2 < max(values) <= 1e-1
    assert 0.4 < sum(v < 1e-2 for v in values) / 200 < 0.6  # evenly in logarithms
    assert all(16 <= int(row["b"]) <= 64 for row in drawn)
    assert drawn == S.grid_of(["a=1e-3:1e-1", "b=16:64"], 200)
    for wrong, draws in (("a", 0), ("a=", 0), ("=3", 0), ("a=-1:3", 2)):
        with pytest.raises(ValueError):
            S.grid_of([wrong], draws)


def test_no_line_is_lost_where_several_write(tmp_path):
    path = str(tmp_path / "runs.jsonl")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: S.append(path, {"i": i}), range(40)))
    assert sorted(run["i"] for run in S.load_runs(path)) == list(range(40))


def test_a_run_has_one_process(tmp_path, monkeypatch):
    """Also where scaling.py was killed, and train.py goes on."""
    held, args = [], ({}, str(tmp_path), str(tmp_path / "run"), 1)

    def start(script, words, threads, keep):
        held.append(os.dup(keep[0]))  # train.py inherits it
        raise ValueError("killed")

    monkeypatch.setattr(S, "make_plan", lambda flags, data: {"iters": 20, "parameters": 1})
    monkeypatch.setattr(S, "start", start)
    for message in ("killed", "another process"):
        with pytest.raises(ValueError, match=message):
            S.train(*args)
    os.close(held.pop())
    with pytest.raises(ValueError, match="killed"):
        S.train(*args)
    os.close(held.pop())


def test_a_line_cut_short_goes_when_the_next_is_added(tmp_path):
    path = str(tmp_path / "runs.jsonl")
    S.append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"a": 2, "b')
    assert S.load_runs(path) == [{"a": 1}]
    S.append(path, {"a": 3})
    assert S.load_runs(path) == [{"a": 1}, {"a": 3}]
    with open(path, "a") as file:
        file.write('{"a": 4}')  # whole, but for its newline
    S.append(path, {"a": 5})
    assert S.load_runs(path) == [{"a": 1}, {"a": 3}, {"a": 4}, {"a": 5}]


SHORT = "--block_size 16 --batch_size 4 --device cpu --data ."
TINY = "--n_layer 1 --n_head 2 " + SHORT


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import bpe

    folder = tmp_path_factory.mktemp("scaling")
    (folder / "t.txt").write_text(("the cat sat on the mat. a dog ran. " * 4 + bpe.EOT) * 60)
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(folder / "t.txt", 264), [bpe.EOT])
    tokenizer.save(folder)
    bpe.encode_files(tokenizer, [folder / "t.txt"], folder, 0.1)
    return folder


def forked(script, words, out):
    """One of the scripts, with all that it prints in a file."""
    importlib.import_module("torch").set_num_threads(1)
    sys.modules["matplotlib"] = None  # it takes longer than the run
    sys.argv = [script, *words]
    with open(out, "w") as sys.stdout:
        sys.stderr = sys.stdout
        importlib.import_module(script.removesuffix(".py")).main()
    os.replace(out, f"{out}.done")  # exit codes are not for several threads to ask for


@pytest.fixture
def forks(monkeypatch, tmp_path):
    """Runs of the other scripts by processes that have torch already."""
    def start(script, words, threads, keep=()):
        out = tmp_path / f"{time.monotonic_ns()}.{len(words)}"
        process = FORKS.Process(target=forked, args=(script, words, out))
        process.start()
        process.join()
        if out.exists():
            raise ValueError(out.read_text().splitlines()[-1])
        return (tmp_path / f"{out.name}.done").read_text()
    monkeypatch.setattr(S, "start", start)


def test_runs_are_kept_and_counted(data, call, forks):
    result = call("sweep --grid n_embd=16,32 learning_rate=1e-2,nonsense --train_flops 2e8 "
                  + TINY, data)
    assert result.returncode == 0 and result.err.count("failed:") == 2, result.err
    assert "best: " in result.out
    path = str(data / "scaling/runs.jsonl")
    runs = S.load_runs(path)
    assert len(runs) == 2 and not list(data.glob("scaling/run-*/ckpt.pt"))
    for run in runs:
        assert run["compute"] == pytest.approx(2e8, rel=0.1) and 0 < run["loss"] < 6
        assert run["compute"] > 4 * run["parameters"] * run["tokens"]
    assert runs[0]["parameters"] != runs[1]["parameters"]
    again = call("run --n_embd 32 --learning_rate 1e-2 --train_flops 2e8 " + TINY, data)
    assert again.returncode == 0 and "[1/1]" not in again.out  # no new run
    (wide,) = (run for run in runs if run["flags"]["n_embd"] == "32")
    assert f"loss: {wide['loss']}" in again.out
    spent = sum(run["compute"] for run in runs)
    result = call(f"run --n_embd 16 --train_flops 2e8 --budget {spent * 1.2} " + TINY, data)
    assert result.returncode == 1 and "budget" in result.err and result.err.count("\n") == 1
    assert len(S.load_runs(path)) == 2


@pytest.mark.parametrize("change", [{"compute": "abc"}, {"loss": None}, {"flags": 3}, {}])
def test_lines_that_are_no_records_are_left_out(tmp_path, monkeypatch, change):
    flags, path = {"n_embd": "16"}, tmp_path / "runs.jsonl"
    args = types.SimpleNamespace(runs=str(path), data=".", budget=1e12, jobs=1)
    record = dict.fromkeys(S.RESULTS, 7) | {"key": S.key_of(flags, "."), "flags": flags}
    path.write_text(json.dumps(record | change) + "\n")
    monkeypatch.setattr(S, "make_plan", lambda flags, data: {"compute": 1e9})
    monkeypatch.setattr(S, "train", lambda *_: record | {"loss": 3})
    assert S.run_all([flags], args)[0]["loss"] == (3 if change else 7)


def test_old_files_are_taken_up():
    """What names a run must not change, or all that have been made are made again."""
    flags = {"n_embd": "64", "train_flops": "1e11", "learning_rate": "1e-2", "bias": True}
    assert S.key_of(flags, "no/such/folder") == "7beafa4ef2501e20"
    assert S.key_of({**flags, "learning_rate": "0.01"}, "no/such/folder") == "7beafa4ef2501e20"


def stoppable(words, out):
    """scaling.py, but for model.py's part, with its errors in a file."""
    S.cost = lambda *words: (10000, 60000)
    sys.argv = ["scaling.py", *words]
    with open(out, "w") as sys.stderr:
        S.main()


def test_a_stopped_run_goes_on_and_is_not_counted_before(data, call, forks, monkeypatch):
    monkeypatch.chdir(data)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ["run", "--n_embd", "16", "--max_iters", "400", *TINY.split()]
    runs = ["--runs", str(data / "stopped/runs.jsonl"), "--data", str(data)]
    folder = data / "stopped" / ("run-" + S.key_of(S.parse_flags(words[1:-2]), str(data)))
    process = FORKS.Process(target=stoppable, args=([*words, *runs], data / "err"))
    process.start()
    deadline = time.monotonic() + 60
    while not (folder / "ckpt.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130 and "Traceback" not in (data / "err").read_text()
    assert not (data / "stopped/runs.jsonl").exists()
    result = call([*words, *runs], data)
    assert result.returncode == 0, result.err
    (run,) = S.load_runs(str(data / "stopped/runs.jsonl"))
    assert run["tokens"] == 400 * 64 and not folder.exists()


@pytest.mark.parametrize("args, code, message", [
    ("run stray", 2, "neither a flag"),
    ("run --out_dir x", 2, "to set"),
    ("run --max_iters 30 --train_flops 1e9", 2, "--train_flops"),
    ("run --train_flops", 2, "--train_flops"),
    *((f"{command} --{flag} 64", 2, f"--{flag} is for") for command in ("isoflop", "study")
      for flag in ("n_embd", "n_head", "n_layer", "train_flops", "max_iters")),
    ("sweep", 2, "--grid"),
    ("sweep --grid n_embd=16 data=nope", 2, "--data is for"),
    ("sweep --random 2 --grid out_dir=zz", 2, "--out_dir is for"),
    ("sweep --grid max_iters=30 --train_flops 1e9", 2, "--train_flops"),
    ("sweep --random x --grid a=1:2", 2, "--random"),
    ("isoflop --sizes 30x2", 2, "multiple of 16"),
    ("isoflop --budgets 0,1", 2, "0 is not between"),
    ("isoflop --budgets x", 2, "to float: 'x'"),
    ("study --budgets 1e9", 2, "budgets"),
    ("run --jobs 0", 2, "--jobs"),
    ("run --runs a.csv", 2, ".jsonl"),
    ("fit", 2, "file"),
    ("fit x --bogus", 2, "--bogus"),
    ("fit x --inference_tokens 1e9", 2, "--method parametric"),
    ("run --n_head 3 --train_flops 1e9 --data .", 1, "all runs failed"),
    ("run --train_flops 1e3 --data .", 1, "all runs failed"),
    ("run --data nowhere", 1, "all runs failed"),
])
def test_bad_usage(data, args, code, message, call, forks):
    extra = "--method kaplan" if "fit" in args else "--runs kaplan.jsonl" * ("--runs" not in args)
    result = call(f"{args} {extra}", data)
    assert result.returncode == code and message in result.err, result.err


def test_a_whole_study(data, call, forks):
    """Tiny, and not to be believed; but every step of it takes what the one before leaves."""
    result = call("study --budgets 2.2e9,4.4e9 --sizes 16x2,16x3,16x1,32x1 --target 6e9 "
                  f"--learning_rate 1e-2 --runs study/runs.jsonl {SHORT} --batch_size 64", data)
    # whether so few runs determine a law is chance; if not, that is said
    assert result.returncode == 0 or result.err.count("\n") == 1, result.err
    assert len(S.load_runs(str(data / "study/runs.jsonl"))) >= 6
    if result.returncode == 0:
        found = json.loads((data / "study/study.json").read_text())
        assert f"measured_loss: {found['measured']:.4f}" in result.out
        assert found["predicted"] > 0


def test_a_study_predicts_models_that_follow_a_law(data, call, monkeypatch, tmp_path):
    law = 1.2, 30.0, 60.0, 0.34, 0.37

    def start(script, words, threads, keep=()):
        flags = dict(zip(words[words[0] == "info" :: 2], words[1 + (words[0] == "info") :: 2]))
        flags = {name[2:]: value for name, value in flags.items()}
        width, vocab_size = int(flags["n_embd"]), 264
        N = 12 * int(flags["n_layer"]) * width**2 + vocab_size * width
        if script == "model.py":
            return (f"parameters {N + vocab_size * width:,}\n  embedding {vocab_size * width:,}\n"
                    f"FLOPs per token, training {6 * N:,}\n")
        with open(os.path.join(flags["out_dir"], "log.csv"), "w") as file:
            slip = math.log(float(flags["learning_rate"]) / 1.2e-2) ** 2 / 100
            loss = loss_of(N, int(flags["max_iters"]) * 2 * 128, law) + slip
            file.write(f"val_loss,seconds\n9,0\n{loss},1\n")

    monkeypatch.setattr(S, "start", start)
    S.cost.cache_clear()
    result = call(f"--data {data} --runs study/runs.jsonl", tmp_path)
    S.cost.cache_clear()
    assert result.returncode == 0, result.err
    found = json.loads((tmp_path / "study/study.json").read_text())
    assert found["flags"]["learning_rate"] == "0.012" and found["target"] == 8e12
    assert abs(found["predicted"] - found["measured"]) < 0.001
    assert found["parametric"]["alpha"] == pytest.approx(0.34, rel=0.02)
    runs = S.load_runs(str(tmp_path / "study/runs.jsonl"))
    assert max(run["compute"] for run in runs) == pytest.approx(8e12, rel=0.01)
    assert {run["compute_budget"] for run in runs} == {1e11, 2e11, 4e11, 8e11, 8e12}
