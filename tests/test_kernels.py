"""kernels.py against PyTorch in float64, in Triton's interpreter or on a GPU, and its errors."""

import math
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import kernels as K
import model as M
import train as T

DEVICE = K.DEVICE
close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, torch.float32).requires_grad_()


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def largest_error(f, reference, *inputs):
    """|a - b| / (1 + |b|) of outputs and gradients, a of f and b, in float64, of reference."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = f(*inputs), reference(*exact)
    g = torch.randn_like(wanted)
    grads = torch.autograd.grad(out, inputs, g.to(out.dtype))
    pairs = list(zip((out, *grads), (wanted, *torch.autograd.grad(wanted, exact, g))))
    if any(a.shape != b.shape or not a.isfinite().all() for a, b in pairs):
        return math.inf
    return max(((a.double() - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)


def test_check_finds_no_error():
    assert K.check() == 0


def test_check_finds_errors(capsys, monkeypatch):
    """The check can fail: a norm without its eps."""
    monkeypatch.setattr(K, "cases", lambda **sizes: [
        ("rms_norm", "", lambda x, w: K.rms_norm(x, w, 0.1), K.plain_norm, [(3, 8), (8,)], 0, 0),
        ("swiglu", "", K.swiglu, K.plain_swiglu, [(3, 8), (3, 8)], 0, 0)])
    assert K.check() >= 2
    out = capsys.readouterr().out
    assert "FAILED rms_norm" in out and "FAILED swiglu" not in out


def attention(q, k, v, mask):
    """PyTorch's own, where mask says what is seen; a query that sees nothing gets 0."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0).nan_to_num(0.0) @ v


@pytest.mark.parametrize("f", [K.flash_attention, K.flash_attention_torch])
@pytest.mark.parametrize("T_, S, causal, window", [
    (70, 70, True, None), (70, 70, False, None), (90, 40, True, None), (40, 90, True, None),
    (100, 100, True, 37)])
def test_mistake_5_attention_gradients_under_masks(f, T_, S, causal, window):
    """Masked columns, rows that see nothing (T > S), the causal flag, and the window."""
    position = torch.arange(T_)[:, None] + S - T_
    mask = torch.ones(T_, S, dtype=torch.bool)
    if causal:
        mask &= torch.arange(S) <= position
    if window:
        mask &= position - torch.arange(S) < window
    q, k, v = rand(1, 4, T_, 20), rand(1, 2, S, 20), rand(1, 2, S, 20)
    assert largest_error(partial(f, causal=causal, window=window),
                         partial(attention, mask=mask.to(DEVICE)), q, k, v) < 1e-5
    if T_ > S and causal:  # the first queries: output 0, and they move nothing
        out = f(q, k, v, causal, window)
        assert (out[:, :, : T_ - S] == 0).all()
        grads = torch.autograd.grad(out[:, :, : T_ - S].sum(), (q, k, v))
        assert all((g == 0).all() for g in grads)


def test_attention_saves_the_output_and_one_number_a_row():
    q, k, v = rand(1, 2, 50, 16), rand(1, 1, 50, 16), rand(1, 1, 50, 16)
    hidden = torch.ones(50, 50, device=DEVICE).triu(1).bool()
    scores = (q @ k.mT / 4).masked_fill(hidden, -math.inf)
    for f in (K.flash_attention, K.flash_attention_torch):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out = f(q, k, v)
        (lse,) = [x for x in saved if x.shape not in (q.shape, k.shape)]
        assert len(saved) == 5 and lse.shape == (1, 2, 50)
        assert sum(x.shape == out.shape and torch.equal(x, out) for x in saved) == 1
        close(lse, torch.logsumexp(scores, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("function", [K.FlashAttention, K.FlashAttentionTorch])
def test_attention_functions_of_one_head(function, causal):
    q, k, v, g = (rand(3, 40, 16) for _ in range(4))
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function.apply(*inputs, causal)
    (lse,) = [x for x in out.grad_fn.saved_tensors if x.shape == (3, 40)]
    mask = torch.ones(40, 40, device=DEVICE).tril().bool() | (not causal)
    scores = (q @ k.mT / 4).masked_fill(~mask, -math.inf)
    assert (lse - torch.logsumexp(scores, -1)).abs().max() < 1e-4
    one_head = [x[:, None].clone().requires_grad_() for x in (q, k, v)]
    expected = attention(*one_head, mask=mask)
    assert (out - expected[:, 0]).abs().max() < 1e-4
    for a, b in zip(torch.autograd.grad(out, inputs, g),
                    torch.autograd.grad(expected, one_head, g[:, None])):
        assert (a - b[:, 0]).abs().max() < 1e-4


def test_any_strides_are_taken():
    q = rand(2, 30, 4, 16).transpose(1, 2)
    k, v = rand(2, 2, 16, 30).mT, rand(2, 30, 2, 16).transpose(1, 2)
    mask = torch.ones(30, 30, device=DEVICE).tril().bool()
    assert largest_error(K.flash_attention, partial(attention, mask=mask), q, k, v) < 1e-5
    x, w, y = rand(12, 5).T, rand(24)[::2], rand(12, 5).T
    targets = torch.tensor([3, 11, -100, 0, 2], device=DEVICE)
    loss = partial(F.cross_entropy, target=targets)
    ours = partial(K.cross_entropy, targets=targets)
    for f, reference, inputs in (
            (K.rms_norm, K.plain_norm, (x, w)), (K.softmax, lambda x: x.softmax(-1), (x,)),
            (K.swiglu, K.plain_swiglu, (x, y)), (K.matmul, torch.matmul, (x, rand(7, 12).T)),
            (ours, loss, (x,)), (partial(ours, inplace=True), loss, (x,))):
        assert largest_error(f, reference, *inputs) < 1e-5


def test_cross_entropy_in_place_uses_the_memory_of_the_logits():
    leaf, targets = rand(6, 33), torch.arange(6, device=DEVICE)
    before = leaf.detach().clone()
    logits = leaf * 1.0
    K.cross_entropy(logits, targets).backward()
    assert torch.equal(logits, before)
    loss = K.cross_entropy(logits, targets, reduction="sum", inplace=True)
    close(logits.detach(), before.softmax(-1) - F.one_hot(targets, 33), atol=1e-6)
    close(loss, F.cross_entropy(before, targets, reduction="sum"))
    big = (1e4 * torch.randn(3, 50, device=DEVICE)).requires_grad_()  # nothing overflows
    close(K.cross_entropy(big, targets[:3]), F.cross_entropy(big, targets[:3]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_without_a_target_are_0(reduction):
    x, w, none = rand(6, 33), rand(33, 33), torch.full((6,), -100, device=DEVICE)
    for f, inputs in ((K.cross_entropy, (x,)), (K.linear_cross_entropy, (x, w))):
        loss = f(*inputs, targets=none, reduction=reduction)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


def test_a_first_block_of_impossible_tokens():
    logits = torch.cat([torch.full((1, 5000), -math.inf), torch.zeros(1, 10)], 1).to(DEVICE)
    loss = K.cross_entropy(logits, torch.tensor([5005], device=DEVICE))
    assert abs(loss.item() - math.log(10)) < 1e-6


def test_second_derivatives_are_refused():
    """They would be wrong: autograd sees nothing of what the kernels of a backward pass do."""
    x, w = rand(3, 8), rand(8)
    (g,) = torch.autograd.grad(K.rms_norm(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_without_gradients_the_loss_alone_is_computed():
    x, targets = rand(6, 33), torch.arange(6, device=DEVICE)
    before = x.detach().clone()
    with torch.no_grad():
        for loss in (K.cross_entropy(x, targets, inplace=True),
                     K.linear_cross_entropy(x, torch.eye(33, device=DEVICE), targets, chunk=4)):
            close(loss, F.cross_entropy(before, targets))
    assert torch.equal(x, before)


def test_a_scale_of_0_is_no_default():
    q, k, v = (rand(1, 1, 8, 16) for _ in range(3))
    for f in (K.flash_attention, K.flash_attention_torch):
        out = f(q, k, v, False, scale=0.0)
        assert (out - v.mean(-2, keepdim=True)).abs().max() < 1e-6


def test_linear_cross_entropy_never_has_all_logits():
    x, w, targets = rand(24, 8), rand(500, 8), torch.randint(500, (24,), device=DEVICE)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(out.numel() if torch.is_tensor(out) else 0)
            return out

    with Watch():
        loss = K.linear_cross_entropy(x, w, targets, chunk=8)
        loss.backward()
    assert max(seen) == 8 * 500 * 4
    close(loss, F.cross_entropy(x @ w.T, targets))
    for chunk in (1, 7, 24, 1000, None):
        assert largest_error(lambda x, w: 3 * K.linear_cross_entropy(x, w, targets, chunk=chunk),
                             lambda x, w: 3 * F.cross_entropy(x @ w.T, targets), x, w) < 1e-5


def test_norm_gradients_need_no_atomics():
    x, w = rand(40, 9), rand(9)
    grads = [torch.autograd.grad(K.rms_norm(x, w).square().sum(), w)[0] for _ in range(3)]
    assert all(torch.equal(g, grads[0]) for g in grads)
    with open(K.__file__, encoding="utf-8") as file:
        assert "tl.atomic" not in file.read()


def test_adamw_equals_torch():
    shapes = [(5, 7), (3000,), (), (1, 1)]
    ours = [torch.randn(s, device=DEVICE) for s in shapes]
    theirs = [torch.nn.Parameter(x.clone()) for x in ours]
    reference = torch.optim.AdamW(theirs, lr=3e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    m, v = ([torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2))
    for t in range(1, 12):
        for b in theirs:
            b.grad = torch.randn_like(b)
        reference.step()
        K.adamw_step(ours, [b.grad.clone() for b in theirs], m, v, t, 3e-2, (0.8, 0.9), 1e-6, 0.3)
        for a, b in zip(ours, theirs):
            close(a, b.detach(), atol=1e-6)
            assert (a - b).abs().max() < 1e-5
    K.adamw_step([], [], [], [], 1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_products_take_the_formats_of_model_py(kind):
    linear = M.QuantizedLinear(M.Linear(70, 50), kind).to(DEVICE)
    parts = [linear.weight, linear.scale] + ([linear.low] if kind == "int4" else [])
    f = K.int8_matmul if kind == "int8" else K.int4_matmul
    w = linear.rows().double()
    for shape in ((2, 3, 70), (70,)):
        assert largest_error(lambda x: f(x, *parts), lambda x: x @ w.T, rand(*shape)) < 1e-5
    assert f(zeros(0, 70), *parts).shape == (0, 50)


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "sliding", "window": 5, "n_kv_head": 1, "qk_norm": True}])
def test_training_with_the_kernels_gives_the_same_losses(changes):
    config = M.TransformerConfig(vocab_size=40, block_size=18, n_layer=1, n_head=2, n_embd=32,
                                 **changes)
    x, y = torch.randint(40, (2, 1, 18), device=DEVICE)
    y[0, :4] = -100
    losses = []
    for use in (False, True):
        torch.manual_seed(1)
        model = M.Transformer(config).to(DEVICE)
        model.use_kernels(use)
        optimizer = T.AdamW(model.parameters(), lr=1e-2, fused=use)
        losses.append([])
        for _ in range(3):
            loss = T.backward(model, [(x, y)], lambda: torch.autocast(DEVICE, enabled=False),
                              head=model.head.weight if use else None)
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][2] < losses[0][0]
    close(torch.tensor(losses[0]), torch.tensor(losses[1]))


@pytest.mark.parametrize("f, shapes", [
    (K.softmax, [(0, 5)]), (K.softmax, [(3, 0)]), (K.rms_norm, [(0, 5), (5,)]),
    (K.rms_norm, [(3, 0), (0,)]), (K.swiglu, [(0,), (0,)]), (K.matmul, [(0, 3), (3, 4)]),
    (K.matmul, [(2, 0), (0, 4)]), (K.flash_attention, [(1, 2, 0, 16)] * 3),
    (K.flash_attention, [(1, 2, 3, 16), (1, 2, 0, 16), (1, 2, 0, 16)]),
    (K.flash_attention_torch, [(1, 2, 3, 16), (1, 2, 0, 16), (1, 2, 0, 16)])])
def test_empty_inputs(f, shapes):
    inputs = [rand(*s) for s in shapes]
    out = f(*inputs)
    assert (out == 0).all()
    assert out.shape == ((shapes[0][0], shapes[1][1]) if f is K.matmul else shapes[0])
    for x, g in zip(inputs, torch.autograd.grad(out.sum(), inputs)):
        assert g.shape == x.shape and (g == 0).all()


IDS = torch.zeros(2, dtype=torch.int64, device=DEVICE)
BYTES = partial(zeros, dtype=torch.uint8)
HEADS = zeros(1, 1, 4, 16)


@pytest.mark.parametrize("error, f, args", [
    (TypeError, K.softmax, [zeros(2, 3).int()]), (ValueError, K.softmax, [zeros(1, 70000)]),
    (TypeError, K.softmax, [[1.0]]), (TypeError, K.softmax, [zeros(2, dtype=torch.float64)]),
    (ValueError, K.softmax, [zeros()]), (ValueError, K.matmul, [zeros(2, 3), zeros(2, 3)]),
    (ValueError, K.matmul, [zeros(2, 3), zeros(3)]),
    (TypeError, K.matmul, [zeros(2, 3), zeros(3, 2).half()]),
    (ValueError, K.rms_norm, [zeros(2, 3), zeros(4)]),
    (ValueError, K.rms_norm, [zeros(), zeros()]),
    (TypeError, K.rms_norm, [zeros(2, 3), zeros(3).half()]),
    (ValueError, K.rms_norm, [zeros(2, 3), zeros(3), 1e-5, zeros(2, 2)]),
    (ValueError, K.swiglu, [zeros(2, 3), zeros(3, 2)]),
    (IndexError, K.cross_entropy, [zeros(2, 5), IDS + 5]),
    (IndexError, K.cross_entropy, [zeros(2, 5), IDS - 1]),
    (ValueError, K.cross_entropy, [zeros(2, 5), IDS[:1]]),
    (TypeError, K.cross_entropy, [zeros(2, 5), IDS.int()]),
    (ValueError, K.cross_entropy, [zeros(2, 5), IDS, -100, "none"]),
    (ValueError, K.linear_cross_entropy, [zeros(2, 5), zeros(7, 4), IDS]),
    (IndexError, K.linear_cross_entropy, [zeros(2, 5), zeros(7, 5), IDS + 7]),
    (ValueError, K.linear_cross_entropy, [zeros(2, 5), zeros(7, 5), IDS, -100, "none"]),
    (ValueError, K.linear_cross_entropy, [zeros(2, 5), zeros(7, 5), IDS, -100, "mean", -1]),
    (ValueError, K.flash_attention, [zeros(1, 3, 4, 16), *[zeros(1, 2, 4, 16)] * 2]),
    (ValueError, K.flash_attention, [zeros(1, 1, 4, 257)] * 3),
    (ValueError, K.flash_attention, [zeros(1, 4, 16)] * 3),
    (ValueError, K.flash_attention, [HEADS] * 3 + [True, 0]),
    (ValueError, K.flash_attention, [HEADS] * 3 + [False, 3]),
    (TypeError, K.flash_attention, [HEADS.half(), HEADS, HEADS]),
    (ValueError, K.flash_attention_torch, [zeros(1, 4, 16)] * 3),
    (ValueError, K.adamw_step, [[zeros(2)], [zeros(3)], [zeros(2)], [zeros(2)], 1]),
    (ValueError, K.adamw_step, [[zeros(2)], [], [], [], 1]),
    (ValueError, K.adamw_step, [[zeros(2)]] * 4 + [0]),
    (TypeError, K.adamw_step, [[zeros(2)], [zeros(2)], [zeros(2).half()], [zeros(2)], 1]),
    (ValueError, K.adamw_step, [[zeros(2, 3).T], *[[zeros(3, 2)]] * 3, 1]),
    (TypeError, K.int8_matmul, [zeros(2, 4), zeros(3, 4), zeros(3)]),
    (ValueError, K.int8_matmul, [zeros(2, 4), zeros(3, 5).to(torch.int8), zeros(3)]),
    (ValueError, K.int4_matmul, [zeros(2, 40), BYTES(3, 16), zeros(3, 1), zeros(3, 1)])])
def test_wrong_inputs_are_refused(error, f, args):
    with pytest.raises(error):
        f(*args)


@pytest.mark.skipif(not K.INTERPRETED, reason="with a GPU, bench measures")
def test_bench_without_a_gpu_counts(capsys):
    K.bench()
    row = re.search(r"flash_attention +1 x 16 x 16384 x 64 +([\d.,]+) MB +([\d.,]+) GFLOP",
                    capsys.readouterr().out)
    moved, flops = 4 * 16 * 16384 * 64 * 2, 2 * 2 * 16 * 16384**2 * 64 / 2  # q, k, v, o in 2 bytes
    assert float(row[1]) == pytest.approx(moved / 1e6, abs=0.1)
    assert float(row[2]) == pytest.approx(flops / 1e9, abs=0.1)


def test_profile_runs_the_same_step_with_and_without_the_kernels(capsys):
    K.profile()
    out = capsys.readouterr().out
    without, with_them = map(float, re.findall(r"these kernels, loss ([\d.]+)", out))
    # (on a GPU in bfloat16)
    assert without == pytest.approx(with_them, abs=1e-4 if DEVICE == "cpu" else 0.02)
    ours = re.findall(r"^ *(\w+) ", out.split("with these kernels")[1], re.MULTILINE)
    assert DEVICE != "cpu" or {"FlashAttention", "RMSNorm", "SwiGLU"} <= set(ours)


def test_attention_compiles_for_an_h100_without_spills():
    result = subprocess.run([sys.executable, K.__file__, "ptx"], capture_output=True, text=True,
                            env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr[-500:]
    rows = [row for row in result.stdout.splitlines() if re.match(r"flash_\w+ +D=(64|128) ", row)]
    assert len(rows) > 10
    by_name = {}
    for row in rows:
        name, size, *_, registers, stack, _, cores = row.split()
        by_name.setdefault((name, size), []).append((int(registers), int(stack), cores))
    for found in by_name.values():
        assert any(stack == 0 and cores == "wgmma" for _, stack, cores in found)
        assert all(stack == 0 for _, stack, _ in found), found
