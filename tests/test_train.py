"""train.py: its loss and optimizers against PyTorch's, its data, and whole runs."""

import contextlib
import csv
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import bpe
import model as M
import train as T


def plain():
    return torch.autocast("cpu", enabled=False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**changes):
    sizes = dict(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16)
    return M.Transformer(M.TransformerConfig(**sizes | changes))


def parts(x, y):
    return [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]


# ---- loss


def test_cross_entropy_equals_pytorch_and_is_stable():
    logits = (torch.randn(4, 7, 11) * 5).requires_grad_()
    targets = torch.randint(11, (4, 7))
    targets[0, :3] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    ours = T.cross_entropy(logits, targets)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    huge = torch.tensor([[1e5, 0.0, -1e5]])
    assert T.cross_entropy(huge, torch.tensor([0])).item() == 0
    assert T.cross_entropy(huge, torch.tensor([2])).item() == 2e5
    assert T.cross_entropy(logits, torch.full((4, 7), -100)).item() == 0


def test_z_loss():
    logits, targets = torch.randn(4, 7), torch.randint(7, (4,))
    expected = F.cross_entropy(logits, targets) + 0.1 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(T.cross_entropy(logits, targets, z_loss=0.1), expected)


def test_distillation_loss():
    student, teacher, y = torch.randn(2, 5, 9), torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    y[0, :2] = -100
    for temperature in (1.0, 2.0):
        q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
        expected = temperature**2 * F.kl_div(q, p, reduction="none").sum(-1)[y != -100].sum()
        torch.testing.assert_close(T.distillation_loss(student, teacher, y, temperature), expected)
    assert T.distillation_loss(teacher, teacher, y).abs() < 1e-6


def test_noise_scale_of_a_quadratic():
    """Loss |w - x|^2 / 2 with x ~ N(0, s^2): the gradient is w, its noise d s^2."""
    d, s = 50, 3.0
    w = torch.full((d,), 0.5)
    gradients = w - s * torch.randn(4000, 8, d)
    few = gradients.view(-1, 2, d).mean(1).square().sum(-1).tolist()
    many = gradients.mean(1).square().sum(-1).tolist()
    expected = d * s**2 / w.square().sum().item()
    assert abs(T.gradient_noise_scale(few, many, 2, 8) / expected - 1) < 0.1
    assert T.gradient_noise_scale([2.0], [1.0], 1, 2) == math.inf  # nothing but noise


def test_norms_of_parts_are_those_of_their_own_mean_loss():
    model, x, y = small(), torch.randint(20, (6, 8)), torch.randint(20, (6, 8))
    y[:2, 3:] = -100
    T.backward(model, parts(x, y), plain)
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    norms, expected = [], []
    T.backward(model, parts(x, y), plain, norms=norms)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), whole))
    for a, b in parts(x, y):
        model.zero_grad()
        T.cross_entropy(model(a), b).backward()
        expected.append(sum(p.grad.square().sum().item() for p in model.parameters()))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-3, atol=1e-5)


def test_mistake_1_accumulation_weighs_tokens_not_batches():
    model, x, y = small(), torch.randint(20, (6, 8)), torch.randint(20, (6, 8))
    y[:2, 1:] = -100  # the first batches have 2 and 9 targets, the last 16
    y[2, :7] = -100
    whole = T.backward(model, [(x, y)], plain)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.testing.assert_close(T.backward(model, parts(x, y), plain), whole)
    for p, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, atol=1e-6, rtol=1e-4)
    means = [T.cross_entropy(model(a), b).item() for a, b in parts(x, y)]
    assert abs(sum(means) / 3 - whole.item()) > 1e-3  # what the mistake would give


# ---- optimizers


def test_adamw_equals_pytorch_step_by_step():
    start = [torch.randn(s) for s in ((5, 4), (3,), (2, 3, 4), (1,))]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    how = dict(lr=3e-2, betas=(0.9, 0.95), eps=1e-8)

    def groups(ps):
        return [{"params": ps[:2], "weight_decay": 0.1}, {"params": ps[2:], "weight_decay": 0.0}]

    a, b = T.AdamW(groups(ours), **how), torch.optim.AdamW(groups(theirs), **how)
    for step in range(30):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            # the first has no gradient at first, so its bias correction lags behind
            p.grad = None if i == 0 and step < 5 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 3e-2 / (step + 1)
            optimizer.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)
    again = T.AdamW(groups(ours), **how)
    again.load_state_dict(a.state_dict())
    assert again.state[ours[1]]["step"] == 30


def test_adamw_is_not_slower_than_pytorch():
    times = []
    for kind in (T.AdamW, torch.optim.AdamW):
        params = [torch.randn(128, 128, requires_grad=True) for _ in range(40)]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer, best = kind(params, lr=1e-3), math.inf
        for _ in range(20):
            start = time.perf_counter()
            optimizer.step()
            best = min(best, time.perf_counter() - start)
        times.append(best)
    assert times[0] < 2 * times[1]  # twice: these machines are noisy


def side_by_side(ours, theirs, shapes, steps, how):
    """Parameters after steps of two optimizers from the same start by the same gradients."""
    ps = [torch.randn(s, requires_grad=True) for s in shapes]
    qs = [p.detach().clone().requires_grad_() for p in ps]
    a, b = ours(ps, **how), theirs(qs, **how)
    for _ in range(steps):
        for p, q in zip(ps, qs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    return zip(ps, qs)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_equals_pytorch_step_by_step(scale):
    shapes = (24, 8), (8, 40), (24, 8), (16, 16)
    how = dict(lr=0.02, adjust_lr_fn=scale)
    for p, q in side_by_side(T.Muon, torch.optim.Muon, shapes, 10, how):
        # products of bfloat16 in batches may round otherwise on another processor
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
    for kind in (T.Muon, T.SOAP):
        with pytest.raises(ValueError, match="matrices"):
            kind([torch.randn(3, requires_grad=True)])


def test_sgd_equals_pytorch_step_by_step():
    how = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    for p, q in side_by_side(T.SGD, torch.optim.SGD, [(3, 2), (5,)], 9, how):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (3, 16, 16)])
def test_newton_schulz_makes_singular_values_one(shape):
    G = torch.randn(shape)
    values = torch.linalg.svdvals(T.zeropower_newton_schulz(G, dtype=torch.float32))
    assert 0.3 < values.min() and values.max() < 1.3
    G = G[0] if len(shape) == 3 else G
    one = T.zeropower_newton_schulz(G, dtype=torch.float32)
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert ((one * (U @ V)).sum() / one.norm() / (U @ V).norm()) > 0.97  # the same direction


def test_mistake_10_muon_takes_hidden_matrices_only_and_q_k_v_apart():
    model = small(n_layer=2, position="learned")
    muon, adamw = T.make_optimizers(model, "muon", 0.01, 0.1, (0.9, 0.95), 0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    taken, left = ({names[id(p)] for group in optimizer.param_groups for p in group["params"]}
                   for optimizer in (muon, adamw))
    assert taken | left == set(names.values()) and not taken & left
    assert {"embedding.weight", "positions.weight", "head.weight", "final_norm.weight"} <= left
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):  # matrices of their own, 16 x 16 each
        assert f"blocks.0.attn.{part}.weight" in taken
    # the scale: a step of Muon is about as large as one of AdamW
    p = torch.nn.Parameter(torch.zeros(64, 256))
    p.grad = torch.randn_like(p)
    T.Muon([p], lr=1.0, weight_decay=0, adjust_lr_fn="match_rms_adamw").step()
    assert 0.1 < p.square().mean().sqrt() < 0.3


def test_soap_is_adam_in_the_eigenbasis():
    """By the paper's algorithm, in float64 and without any shortcut."""
    p = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    q = p.detach().clone()
    optimizer = T.SOAP([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, precondition_frequency=3)
    gradients = [torch.randn(6, 4, dtype=torch.float64) for _ in range(8)]
    L, R = (0.05 * (gradients[0] @ gradients[0].T), 0.05 * (gradients[0].T @ gradients[0]))
    m, V = torch.zeros_like(q), torch.zeros_like(q)  # momentum in the weights' own basis
    for t, g in enumerate(gradients):
        p.grad = g.clone()
        optimizer.step()
        if t == 0:
            assert torch.equal(p, q)
            # eigenvectors of equal eigenvalues (the null space) are arbitrary: take over ours
            QL, QR = (optimizer.state[p][name].clone() for name in ("QL", "QR"))
            torch.testing.assert_close(QL @ torch.diag(torch.diag(QL.T @ L @ QL)) @ QL.T, L)
            continue
        m = 0.9 * m + 0.1 * g
        V = 0.95 * V + 0.05 * (QL.T @ g @ QR) ** 2
        adam = QL.T @ m @ QR / (1 - 0.9**t)
        adam /= (V / (1 - 0.95**t)).sqrt() + 1e-8 / math.sqrt(1 - 0.95**t)
        q = (q - 0.01 * QL @ adam @ QR.T) * (1 - 0.01 * 0.1)
        L, R = 0.95 * L + 0.05 * g @ g.T, 0.95 * R + 0.05 * g.T @ g
        if t % 3 == 0:
            left, right = ((Q.T @ A @ Q).diagonal().argsort(descending=True)
                           for Q, A in ((QL, L), (QR, R)))
            V = V[left][:, right]
            QL, QR = torch.linalg.qr(L @ QL[:, left])[0], torch.linalg.qr(R @ QR[:, right])[0]
        torch.testing.assert_close(p.detach(), q, atol=1e-9, rtol=1e-9)


def test_weight_decay_on_matrices_only():
    model = small(tie_embeddings=True)
    decayed, others = T.parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("scale, limit", [(10.0, 1.0), (1e-3, 1.0), (1.0, 0)])
def test_clip_grad_norm_equals_pytorch(scale, limit):
    a = [torch.randn(5, 3, requires_grad=True), torch.randn(4, requires_grad=True), torch.randn(1)]
    b = [p.detach().clone().requires_grad_() for p in a]
    for p, q in zip(a[:2], b):
        p.grad = torch.randn_like(p) * scale
        q.grad = p.grad.clone()
    norm = T.clip_grad_norm(a, limit)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(b[:2], limit or math.inf))
    for p, q in zip(a[:2], b):
        torch.testing.assert_close(p.grad, q.grad)


def test_learning_rate_schedules():
    def lr(it, kind):
        return T.get_lr(it, 1.0, 0.1, 10, 100, kind)

    for kind in ("cosine", "wsd", "constant"):
        rates = [lr(i, kind) for i in range(101)]
        assert rates[0] == 1 / 11 and all(a < b for a, b in zip(rates[:10], rates[1:11]))
        assert rates[10] == 1.0 and all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert lr(100, "cosine") == lr(500, "wsd") == 0.1 and lr(500, "constant") == 1
    assert math.isclose(lr(55, "cosine"), 0.55)
    assert lr(80, "wsd") == 1 and math.isclose(lr(90, "wsd"), 0.55)


def moved(width, optimizer, mup, lr=1e-2, steps=4):
    """How far a few steps of training move what each part of a model puts out: {part: RMS}."""
    torch.manual_seed(0)
    model = small(vocab_size=64, block_size=32, n_layer=2, n_embd=width, n_head=width // 16)
    if mup:
        torch.nn.init.zeros_(model.head.weight)
    optimizers = T.make_optimizers(model, optimizer, lr, 0.0, (0.9, 0.95), 0.95, mup)
    for group in (group for o in optimizers for group in o.param_groups):
        group["lr"] = lr * group.get("lr_scale", 1.0)
    x, y = torch.randint(64, (8, 33)).unfold(1, 32, 1).unbind(1)
    seen = {}
    for name, part in model.named_modules():
        if name.endswith(("attn", "ffn", "head")):
            part.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out.detach()}))
    model(x)
    before = dict(seen)
    for _ in range(steps):
        T.backward(model, [(x, y)], contextlib.nullcontext)
        for o in optimizers:
            o.step()
            o.zero_grad()
    model(x)
    return {name: (seen[name] - before[name]).square().mean().sqrt().item() for name in seen}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinate_check_is_flat_in_width(optimizer):
    """With --mup steps move activations by as much at any width; without it by more and more."""
    flat, steep = ([moved(width, optimizer, mup) for width in (32, 256)] for mup in (32, 0))
    for name in flat[0]:
        assert 0.6 < flat[1][name] / flat[0][name] < 1.5, name
    assert steep[1]["head"] / steep[0]["head"] > 3
    assert steep[1]["blocks.0.attn"] / steep[0]["blocks.0.attn"] > 2.5


def test_mup_at_its_own_width_changes_nothing_but_the_head():
    model = small(vocab_size=64, n_embd=32)
    groups = T.parameter_groups(model, 0.1, mup=32)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {g.get("lr_scale", 1.0) for g in groups} == {1.0}
    assert {g["weight_decay"] for g in groups} == {0.1, 0.0}
    groups = T.parameter_groups(model, 0.1, mup=8)
    scaled = [p for g in groups if g.get("lr_scale") == 0.25 for p in g["params"]]
    assert model.head.weight in set(scaled) and model.embedding.weight not in set(scaled)
    assert len(scaled) == 1 + sum(isinstance(m, M.Linear) for m in model.blocks.modules())


# ---- data


def test_batches_are_a_permutation_of_windows():
    data = np.arange(1000, dtype=np.uint16)
    n = len(T._window_order(1000, 9, 1, 0))
    assert n in (109, 110, 111)
    starts = []
    for step in range(60):  # of 4: more than two epochs
        x, y = T.get_batch(data, 4, 9, step=step, seed=1)
        assert x.shape == y.shape == (4, 9) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(9))
        starts += x[:, 0].tolist()
    first, second = starts[:n], starts[n : 2 * n]
    assert len(set(first)) == n and len({s % 9 for s in first}) == 1  # nothing twice, no overlap
    assert first != second and sorted(first) != first
    a, b, c = (T.get_batch(data, 4, 9, step=5, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_ranks_share_an_epoch_without_overlap():
    data = np.arange(1000, dtype=np.uint16)
    for step in range(10):
        one = T.get_batch(data, 6, 9, step=step)[0]
        two = [T.get_batch(data, 3, 9, step=step, rank=r, world_size=2)[0] for r in (0, 1)]
        assert torch.equal(one, torch.cat(two))


def test_random_batches_reach_every_window():
    data = np.arange(30, dtype=np.uint16)
    starts = torch.cat([T.get_batch(data, 50, 9)[0][:, 0] for _ in range(40)])
    assert starts.unique().tolist() == list(range(21))
    with pytest.raises(ValueError, match="too long"):
        T.get_batch(data, 1, 30)


def test_bins_of_nanogpt_and_llm_c(tmp_path):
    np.arange(700, dtype="<u2").tofile(tmp_path / "raw.bin")
    ids, header = T.open_bin(tmp_path / "raw.bin")
    assert header is None and ids.tolist() == list(range(700))
    for magic, version, dtype in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
        head = np.zeros(256, "<i4")
        head[:3] = magic, version, 700
        (tmp_path / "c.bin").write_bytes(head.tobytes() + np.arange(700, dtype=dtype).tobytes())
        ids, header = T.open_bin(tmp_path / "c.bin")
        assert header[2] == 700 and ids.tolist() == list(range(700)) and ids.dtype == dtype
        x, y = T.get_batch(ids, 3, 5, step=0)  # from the map, behind the header
        assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(5))
    for content in (b"", b"123", bytes(1023)):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(ValueError, match="bad.bin"):
            T.open_bin(tmp_path / "bad.bin")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells of its memory so")
def test_pages_that_were_read_do_not_stay_in_memory(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    np.ones(20_000_000, np.uint16).tofile(tmp_path / "x.bin")
    data = T.open_bin(tmp_path / "x.bin")[0]
    T.get_batch(np.ones(20_000_000, np.uint16), 64, 1024, step=0)
    before = resident()
    for step in range(300):  # nearly all of its 40 MB
        T.get_batch(data, 64, 1024, step=step)
    assert resident() - before < 10e6


def test_evaluate_is_the_mean_over_all_tokens_and_draws_nothing():
    model, total = small(), 0.0
    data = np.random.default_rng(0).integers(0, 20, 61).astype(np.uint16)
    before = torch.get_rng_state()
    loss = T.evaluate(model, data, 3, 8, "cpu", plain)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    for s in range(0, 60, 8):
        window = torch.tensor(data[s : s + 9].astype(np.int64))[None]
        logits = model(window[:, :-1])[0]
        total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert math.isclose(loss, total / 60, rel_tol=1e-5)
    assert T.evaluate(model, data, 3, 8, "cpu", plain, 1) != loss


# ---- runs

SMALL = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --batch_size 4 --log_interval 1 "
         "--device cpu").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"the {w} sat on the {v}. " for w in ("cat", "dog", "ox", "hen")
                   for v in ("mat", "log", "sea"))
    (folder / "t.txt").write_text((text + bpe.EOT) * 30)
    vocab, merges = bpe.train_bpe(folder / "t.txt", 280)
    tokenizer = bpe.Tokenizer(vocab, merges, [bpe.EOT])
    tokenizer.save(folder)
    bpe.encode_files(tokenizer, [folder / "t.txt"], folder, 0.1)
    return folder


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing of train.py catches it, nothing is saved."""


@pytest.fixture
def run(data, tmp_path, monkeypatch, capsys):
    """A function that runs a script (default: train.py with small sizes) in this process, since a
    fresh one takes seconds to import torch -> (exit code, stdout, stderr). at, how: the step after
    which a signal, or Killed, comes."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    log = T.Log.train

    def call(*args, script=T, at=None, how=Killed):
        def train(self, step, *rest):
            log(self, step, *rest)
            if step == at and how is Killed:
                raise Killed
            if step == at:
                os.kill(os.getpid(), how)

        monkeypatch.setattr(T.Log, "train", train)
        words = [*SMALL, "--data", data] if script is T and "--resume" not in args else []
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, [*words, *args])])
        code = 0
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        except Killed:
            code = -signal.SIGKILL
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def losses(out):
    with open(out / "log.csv", newline="") as file:
        return {int(r["step"]): (r["loss"], r["val_loss"]) for r in csv.DictReader(file)}


def test_one_batch_is_learnt_by_heart():
    model = small(vocab_size=30, block_size=16, n_layer=2, n_embd=32)
    optimizer = T.AdamW(T.parameter_groups(model, 0.0), lr=1e-2)
    x = torch.randint(30, (4, 17))
    for _ in range(150):
        loss = T.backward(model, [(x[:, :-1], x[:, 1:])], plain)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02


def test_run_leaves_checkpoint_log_and_a_summary(run, data, tmp_path):
    flags = "--max_iters 40 --eval_interval 20 --learning_rate 1e-2 --dropout 0.1"
    code, out, err = run(*flags.split(), "--gradient_accumulation_steps", 2)
    assert code == 0, err
    rows = losses(tmp_path / "out")
    assert list(rows) == list(range(1, 41)) and rows[20][1] and rows[40][1] and not rows[19][1]
    assert float(rows[40][0]) < float(rows[1][0]) - 1
    summary = dict(line.split(": ") for line in out.splitlines() if line.count(": ") == 1)
    assert math.isclose(float(summary["val_loss"]), float(rows[40][1]), abs_tol=1e-4)
    assert int(summary["tokens"]) == 40 * 2 * 4 * 16
    ids, header = T.open_bin(data / "val.bin")
    expected = float(summary["val_loss"]) / math.log(2) * len(ids) / int(header[5])
    assert math.isclose(float(summary["val_bits_per_byte"]), expected, abs_tol=2e-3)
    checkpoint = M.load_checkpoint(tmp_path / "out/ckpt.pt")[1]
    assert checkpoint["step"] == 40
    assert checkpoint["tokenizer"] == (data / "tokenizer.json").read_text("utf-8")
    _, out, _ = run("--eval_only", "--init_from", "out/ckpt.pt", "--dropout", 0.1)
    assert f"val loss {float(rows[40][1]):.4f}" in out
    code, out, _ = run("--prompt", "the", script=M)
    assert code == 0 and out.startswith("the")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("kind", ["adamw", "muon", "soap", "sgd"])
def test_every_optimizer_learns_and_resumes(run, tmp_path, kind):
    flags = ("--max_iters", 30, "--eval_interval", 15, "--optimizer", kind,
             "--learning_rate", 0.3 if kind == "sgd" else 0.01)
    code, _, err = run(*flags, "--out_dir", "whole")
    assert code == 0, err
    expected = losses(tmp_path / "whole")
    assert float(expected[30][0]) < float(expected[1][0]) - 0.5
    assert run(*flags, "--out_dir", "o", at=17)[0] == -signal.SIGKILL
    assert M.load_checkpoint(tmp_path / "o/ckpt.pt")[1]["step"] == 15
    assert run("--resume", "--out_dir", "o")[0] == 0
    assert losses(tmp_path / "o") == expected


def test_resume_is_exact_after_any_stop(run, data, tmp_path):
    """kill -9 of a process of its own, and signals in this one."""
    flags = ("--data", data, "--max_iters", 60, "--eval_interval", 10, "--eval_iters", 1,
             "--dropout", 0.2)
    command = [sys.executable, T.__file__, *SMALL, *map(str, flags), "--out_dir", "SIGKILL"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run(*flags, "--out_dir", "whole")[0] == 0
    expected, whole = losses(tmp_path / "whole"), M.load_checkpoint(tmp_path / "whole/ckpt.pt")[0]
    for line in process.stdout:
        if line.startswith("step     23/"):
            process.kill()
            break
    process.communicate(timeout=60)
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        out = tmp_path / how.name
        if how != signal.SIGKILL:
            assert run(*flags, "--out_dir", out, at=23, how=how)[0] == 130
        stopped = M.load_checkpoint(out / "ckpt.pt")[1]["step"]
        assert 20 <= stopped < 60 and (how != signal.SIGKILL or stopped % 10 == 0)
        code, _, err = run("--resume", "--out_dir", out)  # the flags are in the checkpoint
        assert code == 0, err
        assert losses(out) == expected
        state = M.load_checkpoint(out / "ckpt.pt")[0].state_dict()
        assert all(torch.equal(x, state[name]) for name, x in whole.state_dict().items())
    assert run("--init_from", "resume", "--out_dir", out)[0] == 0 and losses(out) == expected


def test_resume_is_exact_with_another_dropout_than_the_first_checkpoint(run, tmp_path):
    run("--max_iters", 4, "--out_dir", "start")
    flags = ("--init_from", "start/ckpt.pt", "--dropout", 0.3, "--max_iters", 8,
             "--eval_interval", 4)
    run(*flags, "--out_dir", "whole")
    run(*flags, "--out_dir", "o", at=6)
    assert run("--resume", "--out_dir", "o")[0] == 0
    assert losses(tmp_path / "o") == losses(tmp_path / "whole")


def test_teacher_and_noise_scale_on_the_command_line(run, tmp_path):
    rate = "--learning_rate", 0.01
    assert run(*rate, "--max_iters", 60, "--out_dir", "teacher")[0] == 0
    code, out, err = run(*rate, "--max_iters", 20, "--teacher", "teacher/ckpt.pt",
                         "--teacher_weight", 1, "--noise_scale")
    assert code == 0, err
    rows, summary = losses(tmp_path / "out"), out.split("noise_scale_tokens: ")
    assert float(rows[20][0]) < 0.7 * float(rows[1][0]) and float(summary[1].split()[0]) > 0
    code, _, err = run(*rate, "--teacher", "no.pt")
    assert code == 1 and "no.pt" in err


@pytest.mark.parametrize("flags", [
    "--activation moe --n_expert 4 --balance bias --attention latent",
    "--attention sliding,full --window 4",
    "--attention hyena,linear --position none --optimizer muon",
    "--activation relu2 --qk_norm --logit_cap 15",
])
def test_architectures_train_and_sample(run, tmp_path, flags):
    code, _, err = run("--max_iters", 30, "--n_layer", 2, "--learning_rate", 0.01,
                       "--z_loss", 1e-4, "--activation_checkpointing", *flags.split())
    assert code == 0, err
    rows = losses(tmp_path / "out")
    assert float(rows[30][0]) < float(rows[1][0]) - 0.5
    model, _ = M.load_checkpoint(tmp_path / "out/ckpt.pt")
    if "bias" in flags:
        assert model.blocks[0].ffn.bias.abs().sum() > 0  # moved, and saved
    ids = torch.randint(200, (2, 5))
    greedy = model.generate(ids, 20, temperature=0)  # past block_size
    for i in range(20):
        expected = model(greedy[:, max(0, i - 11) : i + 5])[:, -1]
        chosen = expected.gather(1, greedy[:, i + 5 : i + 6])[:, 0]
        torch.testing.assert_close(chosen, expected.amax(-1), atol=1e-4, rtol=0)


def test_offloading_and_checkpointing_change_no_loss(run, tmp_path):
    found = []
    for flags in ("", "--offload both", "--offload activations --activation_checkpointing"):
        flags += " --max_iters 12 --dropout 0.1 --optimizer muon"
        code, _, err = run(*flags.split())
        assert code == 0, err
        found.append(losses(tmp_path / "out"))
    assert found[0] == found[1] == found[2]
    w = torch.nn.Parameter(torch.ones(2, 2))
    w.grad = torch.ones(2, 2)
    optimizer = T.AdamW([w])
    optimizer.step()
    T.move_state([optimizer], "meta")  # another device than the one it is on
    state = optimizer.state[w]
    assert state["m"].is_meta and state["v"].is_meta and state["step"] == 1


def test_evaluating_more_often_changes_no_loss(run, tmp_path):
    found = []
    for interval in (3, 12):
        run("--max_iters", 12, "--eval_interval", interval, "--dropout", 0.2)
        found.append([loss for loss, _ in losses(tmp_path / "out").values()])
    assert len(found[0]) == 12 and found[0] == found[1]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    assert run("--max_iters", 4, "--eval_interval", 2)[0] == 0
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    code, _, err = run(*"--max_iters 40 --learning_rate 1e30 --grad_clip 0 --eval_interval 1000 "
                       "--warmup_iters 0".split())
    assert code == 1 and "at step" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before


def test_mup_in_a_run(run, tmp_path):
    code, _, err = run("--mup", "8", "--max_iters", "3")
    assert code == 0, err
    groups = M.load_checkpoint(tmp_path / "out/ckpt.pt")[1]["optimizer"][0]["param_groups"]
    assert [g.get("lr_scale") for g in groups] == [None, None, 0.5]


def test_bad_input_gets_one_line(run, data, tmp_path):
    def fails(code, message, *args):
        found, _, err = run(*args)
        lines = err.strip().splitlines()
        assert found == code and message in lines[-1], lines
        assert code == 2 or len(lines) == 1

    fails(1, "python bpe.py makes it", "--data", "data/stdlib")
    fails(1, "python bpe.py encode", "--data", "nothing")
    fails(1, "block_size 99999", "--block_size", 99999)
    fails(2, "--n_layers", "--n_layers", 3)
    for flag, value in (("max_iters", 0), ("beta1", 1), ("learning_rate", -1), ("momentum", 1),
                        ("teacher_weight", 2), ("log_interval", 0), ("seed", "x")):
        fails(2, f"--{flag}", f"--{flag}", value)
    fails(2, "--mup is for", "--mup", "--tie_embeddings")
    fails(2, "--mup is for", "--mup", "--optimizer=soap")
    fails(2, "even --batch_size", "--noise_scale", "--batch_size", 3)
    fails(1, "cuda:99", "--device", "cuda:99")
    fails(1, "n_head", "--n_head", 3)
    fails(1, "python train.py", "--resume")
    assert run("--max_iters", 1)[0] == 0
    fails(1, "n_embd", "--init_from", "out/ckpt.pt", "--n_embd", 32)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train.bin", "val.bin"):
        (other / name).write_bytes((data / name).read_bytes())
    vocab, merges = bpe.train_bpe(data / "t.txt", 270)
    tokenizer = bpe.Tokenizer(vocab, merges, [bpe.EOT])
    tokenizer.save(other)
    fails(1, "tokenizer.json", "--data", other)
    bpe.encode_files(tokenizer, [data / "t.txt"], other, 0.1)
    fails(1, "another tokenizer", "--data", other, "--init_from", "out/ckpt.pt")
    fails(1, "another tokenizer", "--data", other, "--teacher", "out/ckpt.pt")
    (tmp_path / "raw").mkdir()
    for name in ("train.bin", "val.bin"):
        np.full(900, 60, np.uint16).tofile(tmp_path / "raw" / name)
    fails(1, "holds the id 60", "--data", "raw", "--vocab_size", 50)
    np.full(900, 40, np.uint16).tofile(tmp_path / "raw/train.bin")  # and now in val.bin alone
    fails(1, "holds the id 60", "--data", "raw", "--vocab_size", 50, "--max_iters", 1)
    np.full(1, 40, np.uint16).tofile(tmp_path / "raw/val.bin")
    fails(1, "one token", "--data", "raw", "--vocab_size", 50)
    fails(1, "dropout", "--resume", "--dropout", 3, "--max_iters", 2)
    fails(2, "--seed", "--seed", -5)
    model = M.quantize(small(vocab_size=257, block_size=16, n_embd=32), "int8")
    M.save_checkpoint(tmp_path / "q.pt", model)
    fails(1, "quantized", "--init_from", "q.pt")


def test_odd_arguments_are_refused_or_right(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.full((4,), 2.0)
    assert T.clip_grad_norm(parameter, 1.0) == 4 and parameter.grad.norm() < 1.001
    x, y = T.get_batch(list(range(50)), 2, 8, step=0)
    assert torch.equal(x + 1, y)
    assert T.cross_entropy(torch.tensor([[1e30, 0.0]]), torch.tensor([0])) == 0
    with pytest.raises(ValueError, match="reduction"):
        T.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), reduction="none")
    with pytest.raises(ValueError, match="schedule"):
        T.get_lr(0, 1.0, 0.0, 0, 10, schedule="linear")
    path = tmp_path / "log.csv"
    path.write_text("a,b\n1,2\n")
    assert T.Log(str(path), 5, 10, 8, None).rows == []
