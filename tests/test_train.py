"""train.py: its loss and optimizers against PyTorch's, its data, and whole runs."""

import csv, functools, itertools, math, os, shutil, signal, sys

import numpy as np, pytest, torch
import torch.nn.functional as F

import bpe, model as M, train as T

plain = functools.partial(torch.autocast, "cpu", enabled=False)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def small(**changes):
    sizes = dict(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16)
    return M.Transformer(M.TransformerConfig(**sizes | changes))

def test_cross_entropy_equals_pytorch_and_is_stable():
    logits, targets = (torch.randn(4, 7, 11) * 5).requires_grad_(), torch.randint(11, (4, 7))
    targets[0, :3] = -100
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    ours = T.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, want)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(T.cross_entropy(logits, targets, reduction="sum"), want * 25)
    huge = torch.tensor([[1e5, 0.0, -1e5]] * 2)
    assert T.cross_entropy(huge, torch.tensor([0, 2]), reduction="sum") == 2e5
    assert T.cross_entropy(logits, torch.full((4, 7), -100)) == 0
    z = F.cross_entropy(logits[1], targets[1]) + 0.1 * logits[1].logsumexp(-1).square().mean()
    torch.testing.assert_close(T.cross_entropy(logits[1], targets[1], z_loss=0.1), z)

def test_distillation_loss_and_noise_scale():
    student, teacher, y = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    y[0, :2] = -100
    q, p = (student / 2).log_softmax(-1), (teacher / 2).softmax(-1)
    want = 4 * F.kl_div(q, p, reduction="none").sum(-1)[y != -100].sum()
    torch.testing.assert_close(T.distillation_loss(student, teacher, y, 2.0), want)
    w = torch.full((50,), 0.5)  # loss |w - x|^2 / 2, x ~ N(0, 9): the gradient is w, its noise 9 d
    gradients = w - 3 * torch.randn(4000, 8, 50)
    few = gradients.view(-1, 2, 50).mean(1).square().sum(-1).tolist()
    many = gradients.mean(1).square().sum(-1).tolist()
    assert abs(T.gradient_noise_scale(few, many, 2, 8) / (450 / 12.5) - 1) < 0.1
    assert T.gradient_noise_scale([2.0], [1.0], 1, 2) == math.inf  # nothing but noise

@pytest.mark.parametrize("ours, theirs, how, tolerance", [
    (T.AdamW, torch.optim.AdamW, dict(lr=3e-2, betas=(0.9, 0.95), weight_decay=0.1), 1e-6),
    (T.SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9), 1e-6),
    # (products of bfloat16 round otherwise on another processor)
    (T.Muon, functools.partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"),
     dict(lr=0.02, momentum=0.9, weight_decay=0.1), 2e-3)], ids=["adamw", "sgd", "muon"])
def test_optimizers_equal_pytorchs_step_by_step(ours, theirs, how, tolerance):
    ps = [torch.randn(shape, requires_grad=True) for shape in ((24, 8), (8, 40), (16, 16))]
    qs = [p.detach().clone().requires_grad_() for p in ps]
    a, b = ours(ps, **how), theirs(qs, **how)
    for _ in range(10):
        for p, q in zip(ps, qs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ps, qs, atol=tolerance, rtol=0)

def test_mistake_10_muon_takes_hidden_matrices_only_and_q_k_v_apart():
    model = small(n_layer=2, position="learned", activation="moe")
    adamw, muon = T.make_optimizers(model, "muon", 0.01, 0.1, (0.9, 0.95), 0.95)
    names = {p: name for name, p in model.named_parameters()}
    taken, left = ({names[p] for group in each.param_groups for p in group["params"]}
                   for each in (muon, adamw))
    assert taken | left == set(names.values()) and not taken & left
    assert {"embedding.weight", "positions.weight", "head.weight", "final_norm.weight",
            "blocks.0.ffn.router.weight"} <= left
    assert {f"blocks.0.attn.{x}_proj.weight" for x in "qkvo"} <= taken  # each of its own
    p = torch.nn.Parameter(torch.zeros(64, 256))  # the scale: steps about as large as AdamW's
    p.grad = torch.randn_like(p)
    T.Muon([p], lr=1.0, weight_decay=0).step()
    assert 0.1 < p.square().mean().sqrt() < 0.3

def test_soap_is_adam_in_the_eigenbasis():
    """By the paper's algorithm, in float64."""
    p = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    q, m, V, L, R = p.detach().clone(), *(torch.zeros(6, 4).double() for _ in "mV"), 0.0, 0.0
    optimizer = T.SOAP([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=3)
    for t in range(8):  # m: momentum in the weights' own basis
        p.grad = g = torch.randn(6, 4, dtype=torch.float64)
        optimizer.step()
        q = q * (1 - 0.01 * 0.1)
        if t > 0:
            m, V = 0.9 * m + 0.1 * g, 0.95 * V + 0.05 * (QL.T @ g @ QR) ** 2
            adam = QL.T @ m @ QR / (1 - 0.9**t) * math.sqrt(1 - 0.95**t) / (V.sqrt() + 1e-8)
            q = q - 0.01 * QL @ adam @ QR.T
        L, R = 0.95 * L + 0.05 * g @ g.T, 0.95 * R + 0.05 * g.T @ g
        if t == 0:  # eigenvectors of equal eigenvalues (the null space) are arbitrary: take ours
            QL, QR = (optimizer.state[p][name].clone() for name in ("QL", "QR"))
            torch.testing.assert_close(QL @ torch.diag(torch.diag(QL.T @ L @ QL)) @ QL.T, L)
        elif t % 3 == 0:
            QL, QR = torch.linalg.qr(L @ QL)[0], torch.linalg.qr(R @ QR)[0]
        torch.testing.assert_close(p.detach(), q, atol=1e-9, rtol=1e-9)

@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_with_mup_four_steps_move_logits_as_far_at_any_width(optimizer):
    moved = {}
    for width, mup in itertools.product((32, 256), (32, 0)):
        torch.manual_seed(0)
        model = small(vocab_size=64, block_size=32, n_embd=width, n_head=width // 16)
        model.head.weight.data *= mup == 0
        optimizers = T.make_optimizers(model, optimizer, 0.01, 0.0, (0.9, 0.95), 0.95, mup)
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = 0.01 * group["lr_scale"]
        x, y = torch.randint(64, (8, 33)).unfold(1, 32, 1).unbind(1)
        before = model(x).detach()
        for _ in range(4):
            T.cross_entropy(model(x), y).backward()
            for o in optimizers:
                o.step()
                o.zero_grad()
        moved[width, mup] = (model(x) - before).square().mean().sqrt()
    assert 0.6 < moved[256, 32] / moved[32, 32] < 1.5 and moved[256, 0] / moved[32, 0] > 3

def test_weight_decay_on_matrices_only_and_clipping_equals_pytorchs():
    model = small(norm="layernorm", bias=True)
    optimizer, = T.make_optimizers(model, "adamw", 1e-3, 0.1, (0.9, 0.95), 0.95)
    for group in optimizer.param_groups:
        assert all((p.ndim == 2) == (group["weight_decay"] == 0.1) for p in group["params"])
    for scale, limit in ((10.0, 1.0), (1e-3, 1.0), (1.0, 0)):
        p, g = torch.ones(9), torch.randn(9) * scale
        p.grad = g.clone()
        torch.testing.assert_close(T.clip_grad_norm(iter([p, torch.ones(1)]), limit), g.norm())
        torch.testing.assert_close(p.grad, g * (min(1.0, limit / g.norm()) if limit else 1.0))
    assert T.clip_grad_norm([torch.ones(1)], 1.0) == 0  # of no gradients

def test_learning_rate_schedules():
    for kind, wanted in (("cosine", {55: 0.55, 100: 0.1}), ("constant", {500: 1.0}),
                         ("wsd", {80: 1.0, 90: 0.55, 500: 0.1})):
        rates = [T.get_lr(i, 1.0, 0.1, 10, 100, kind) for i in range(501)]
        assert rates[0] == 1 / 11 and all(a < b for a, b in zip(rates[:10], rates[1:11]))
        assert rates[10] == 1.0 and all(a >= b for a, b in zip(rates[10:], rates[11:]))
        assert {i: round(rates[i], 9) for i in wanted} == wanted

def test_batches_are_a_permutation_of_windows():
    data, starts = np.arange(1000, dtype=np.uint16), []
    for number in range(60):  # of 4: more than two epochs
        x, y = T.get_batch(data, 4, 9, number=number, seed=1)
        assert x.dtype == y.dtype == torch.int64 and torch.equal(x + 1, y)
        assert torch.equal(x, x[:, :1] + torch.arange(9))
        starts += x[:, 0].tolist()
    n = len(T.window_order(1000, 9, 1, 0))
    assert len(set(starts[:n])) == n and len({s % 9 for s in starts[:n]}) == 1
    assert starts[n : 2 * n] != starts[:n] != sorted(starts[:n])
    assert T.get_batch(data, 4, 9, number=7, seed=1)[0][:, 0].tolist() == starts[28:32]
    drawn = {int(T.get_batch(data[:20], 1, 9)[0][0, 0]) for _ in range(300)}
    assert drawn == set(range(11))  # without a number: any window
    with pytest.raises(ValueError, match="too short"):
        T.get_batch(data[:9], 1, 9)

def write_bin(path, ids, magic=20240520, dtype="<u2"):
    header = np.zeros(256, "<i4")
    header[:5] = magic, {"<u2": 1, "<u4": 7}[dtype], len(ids), 20, 0
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())

def test_bins_of_nanogpt_and_llm_c_and_what_is_none(tmp_path):
    ids, path = list(range(20)) * 3, tmp_path / "x.bin"
    for magic, dtype in ((20240520, "<u2"), (20240801, "<u4")):
        write_bin(path, ids, magic, dtype)
        data, header = bpe.read_bin(path)
        assert data.tolist() == ids and header[3] == 20
    np.array(ids, "<u2").tofile(path)
    assert bpe.read_bin(path)[0].tolist() == ids and bpe.read_bin(path)[1] is None
    np.save(tmp_path / "y.npy", np.array(ids, "<u2"))
    for content in (*(np.array(ids, kind).tobytes() for kind in ("<u4", ">u4", "<i8")), b"odd",
                    "ein Text über Ähnliches, ".encode() * 50, (tmp_path / "y.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no header, and no uint16"):
            bpe.read_bin(path)
    write_bin(path, ids)
    data = bpe.read_bin(path)[0]
    with pytest.raises(ValueError, match="id 19 in the data is beyond the vocabulary of 19"):
        T.get_batch(data, 2, 40, vocab_size=19)
    os.truncate(path, 1100)
    for read in (lambda: T.get_batch(data, 2, 9), lambda: bpe.read_bin(path)):
        with pytest.raises(ValueError, match="greater than file size"):
            read()
    np.arange(1, 101, dtype="<u2").tofile(path)
    data = np.memmap(path, "<u2", "r")
    for part in (data[50:], data[50:].astype("<i4"), np.array(data[50:])):  # slices are themselves
        assert T.windows(part, [0], 4)[0].tolist() == [[51, 52, 53, 54]]

def test_evaluate_is_the_mean_over_all_tokens_and_draws_nothing():
    model, data = small(dropout=0.5), np.random.default_rng(0).integers(0, 20, 61)
    state = torch.get_rng_state()
    loss = T.evaluate(model, data, 3, 8, "cpu", plain)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    model.eval()
    rows = [torch.tensor(data[i : i + 9])[None] for i in range(0, 60, 8)]
    total = sum(F.cross_entropy(model(r[:, :-1])[0], r[0, 1:], reduction="sum") for r in rows)
    assert math.isclose(loss, total.item() / 60, rel_tol=1e-5)
    assert T.evaluate(model, data, 3, 8, "cpu", plain, 1) != loss

# Runs are in this process, since a fresh one takes seconds to import torch.
SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --log_interval 1 "
         "--device cpu --max_iters 8 --eval_interval 3").split()

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"the {w} sat on the {v}. " for w in ("cat", "dog", "ox", "hen")
                   for v in ("mat", "log", "sea"))
    (folder / "t.txt").write_text((text + bpe.EOT) * 30)
    tokenizer = bpe.Tokenizer(*bpe.train_bpe(folder / "t.txt", 280), [bpe.EOT])
    tokenizer.save(folder)
    bpe.encode_files(tokenizer, [folder / "t.txt"], folder, 0.1)
    return folder

class Killed(BaseException):
    """Ends a run as kill -9 would: nothing of train.py catches it, nothing is saved."""

def kill():
    raise Killed

@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """A function that runs train.py with small sizes -> (exit code, what it printed, and the
    error). how: called when step `at` begins. patches: what to replace in train.py."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*args, at=None, how=kill, **patches):
        def get_lr(step, *rest, original=T.get_lr):
            if step == at:
                how()
            return original(step, *rest)

        words, code, error = [] if "--resume" in args else [*SMALL, "--data", data], 0, ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, [*words, *args])])
            for name, value in {"get_lr": get_lr, **patches}.items():
                patch.setattr(T, name, value)
            try:
                T.main()
            except (SystemExit, Killed) as stop:
                code = getattr(stop, "code", -9)
            except Exception as why:  # as train.py itself does
                code, error = 1, str(why)
        out, err = capsys.readouterr()
        return code, out, error or err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)

def log(folder):
    with open(os.path.join(folder, "log.csv"), newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

@pytest.mark.parametrize("kind", ["adamw", "muon", "soap", "sgd"])
def test_a_killed_run_resumes_bit_for_bit(run, kind):
    """With dropout, after kill -9; and what it leaves is what DESIGN says."""
    flags = ("--optimizer", kind, "--dropout", "0.1", "--learning_rate", "0.02")
    assert run("--out_dir", "a", *flags)[0] == 0
    assert run("--out_dir", "b", *flags, at=5)[0] == -9
    assert len(log("b")) == 3
    assert run("--out_dir", "b", "--resume")[0] == 0
    assert log("b") == log("a") and len(log("a")) == 8
    assert [bool(row["val_loss"]) for row in log("a")] == [i in (3, 6, 8) for i in range(1, 9)]
    (one, saved), (two, _) = (M.load_checkpoint(f"{name}/ckpt.pt") for name in "ab")
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert saved["step"] == 8 and saved["tokenizer"] and saved["best_val_loss"] > 0

@pytest.mark.parametrize("at", [5, 7])  # 7: the last step, whose evaluation is then missing
def test_a_signal_saves_and_resume_evaluates_what_was_missed(run, at):
    run("--out_dir", "a")
    code, out, _ = run("--out_dir", "b", at=at, how=lambda: os.kill(os.getpid(), signal.SIGINT))
    assert code == 130 and "go on with --resume" in out and len(log("b")) == at + 1
    code, out, _ = run("--out_dir", "b", "--resume")
    assert code == 0 and log("b") == log("a")
    assert run("--out_dir", "b", "--resume")[0] == 0 and log("b") == log("a")

def test_what_is_given_on_resuming_holds(run):
    run("--out_dir", "a", at=5)
    adamw, make = [], T.make_optimizers
    assert run("--out_dir", "a", "--resume", "--weight_decay", ".77", "--beta1", ".5",
               make_optimizers=lambda *args: [adamw.extend(make(*args)), adamw][1])[0] == 0
    groups = adamw[0].param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, 0.77} and groups[0]["betas"] == (0.5, 0.95)
    assert adamw[0].state[groups[0]["params"][0]]["step"] == 8
    assert "a run of adamw can't go on with muon" in run(
        "--out_dir", "a", "--resume", "--optimizer", "muon")[2]
    assert run("--out_dir", "a", "--resume", "--dropout", 0.3, "--block_size", 8)[0] == 0
    config = M.load_checkpoint("a/ckpt.pt")[0].config
    assert (config.dropout, config.block_size) == (0.3, 8)
    assert "another n_layer" in run("--out_dir", "a", "--resume", "--n_layer", "3")[2]

@pytest.mark.parametrize("changes", [
    {"args": ["--nonsense"]}, {"args": 5}, {"args": [["--n_layer", {}]]}, {"step": "many"},
    {"best_val_loss": []}, {"optimizer": [{}]}, {"rng": None}, {"log": "step\nx\n"}], ids=str)
def test_hostile_values_to_resume_are_one_line(run, changes):
    run("--out_dir", "a")
    saved = torch.load("a/ckpt.pt", weights_only=True)
    if "log" in changes:
        with open("a/log.csv", "w") as file:
            file.write(changes["log"])
    torch.save(saved | changes, "a/ckpt.pt")
    code, _, error = run("--out_dir", "a", "--resume")
    assert code in (1, 2) and len(error.strip().splitlines()) == 1

def test_mistake_1_accumulation_weighs_tokens_not_batches(run):
    """Targets are masked by their ids, so that batches have unequal numbers of them."""
    def masked(*args, windows=T.windows):
        x, y = windows(*args)
        return x, y.masked_fill(y < 100, -100)

    for name, size, steps in (("a", 12, 1), ("b", 3, 4)):
        run("--out_dir", name, "--batch_size", size, "--gradient_accumulation_steps", steps,
            "--dtype", "float32", windows=masked)
    for one, many in zip(log("a"), log("b")):
        for key in ("loss", "grad_norm"):
            assert abs(float(one[key]) - float(many[key])) < 1e-4

def test_nothing_not_finite_is_saved_over_a_good_checkpoint(run):
    run("--out_dir", "a")
    for flags in (["--learning_rate", "1e38"], ["--learning_rate", "1e400"]):
        code, _, error = run("--out_dir", "a", "--resume", "--max_iters", 30, "--eval_interval", 1,
                             "--schedule", "constant", *flags)
        assert code == 1 and ("finite" in error or "lower --learning_rate" in error)
        model, saved = M.load_checkpoint("a/ckpt.pt")
        assert all(p.isfinite().all() for p in model.parameters()) and saved["step"] == 8

def test_a_new_run_moves_the_old_checkpoint_aside_and_a_shrunken_bin_keeps_the_last_step(run, data):
    run("--out_dir", "a")
    old = M.load_checkpoint("a/ckpt.pt")[0].head.weight
    shutil.copytree(data, "copy")
    code, out, error = run("--out_dir", "a", "--data", "copy", "--seed", 3, at=5,
                           how=lambda: os.truncate("copy/train.bin", 1100))
    aside, = [name for name in os.listdir("a") if name.startswith("ckpt-")]
    assert aside in out and torch.equal(M.load_checkpoint(f"a/{aside}")[0].head.weight, old)
    assert code == 1 and "greater than file size" in error
    assert M.load_checkpoint("a/ckpt.pt")[1]["step"] == 6

def test_nothing_changes_the_losses_that_should_not(run):
    run("--out_dir", "a", "--max_iters", 4, "--dtype", "float32")
    want = [row["loss"] for row in log("a")]
    for flags in (["--eval_interval=1"], ["--offload=both"], ["--activation_checkpointing"],
                  ["--compile=False"], ["--noise_scale"]):
        code, out, error = run("--out_dir", "b", "--max_iters", 4, "--dtype", "float32", *flags)
        assert code == 0, error
        got = [float(row["loss"]) for row in log("b")]
        assert max(abs(a - float(b)) for a, b in zip(got, want)) < 2e-6, flags
    assert "noise_scale_tokens" in out
    flags = ("--teacher", "a/ckpt.pt", "--teacher_weight", "1.0", "--dropout", "0")
    run("--out_dir", "g", "--max_iters", 4, *flags)
    assert [row["loss"] for row in log("g")] != want
    saved = torch.load("a/ckpt.pt", weights_only=True)
    other = bpe.Tokenizer(*bpe.train_bpe(["another text"] * 9, 260))
    torch.save(saved | {"tokenizer": other.to_json()}, "a/ckpt.pt")
    assert "another tokenizer" in run("--out_dir", "h", *flags)[2]

def test_nanogpts_habits_and_wrong_flags_get_one_line(run):
    for args, message in ((["--n_layr", "3"], "unrecognized arguments: --n_layr"),
                          (["config/train_gpt2.py"], "there are no config files"),
                          (["--lr_decay_iters", "5"], "the rate ends at --max_iters"),
                          (["--compile=Maybe"], "invalid")):
        code, out, err = run(*args)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    assert "data/nothing/train.bin" in run("--dataset=nothing")[2]
    assert run("--lr_decay_iters", "8")[0] == 0
    code, out, err = run("--eval_only", "--init_from", "out/ckpt.pt")
    assert code == 0 and "val loss" in out and "bits per byte" in out
