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

pytest.importorskip("triton")  # which is for Linux only
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import kernels as K
import model as M

DEVICE = K.DEVICE
assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)

@pytest.fixture(autouse=True)
def begin(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(M, "kernels", None)  # whatever a test makes of it

def rand(*shape):
    return torch.randn(shape).to(DEVICE).requires_grad_()

def largest_error(f, reference, *inputs):
    """|a - b| / (1 + |b|) of outputs and gradients, a of f and b, in float64, of reference."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = f(*inputs), reference(*exact)
    g = torch.randn_like(wanted)
    grads = torch.autograd.grad(out, inputs, g.to(out.dtype))
    pairs = list(zip((out, *grads), (wanted, *torch.autograd.grad(wanted, exact, g))))
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs)
    return max(((a.double() - b).abs() / (1 + b.abs())).max().item() for a, b in pairs)

def test_check_finds_no_error(capsys):
    assert K.check() == 0
    names = re.findall(r"^(\w+) .*float32.* float16.*bfloat16", capsys.readouterr().out, re.M)
    assert set(names) == set("softmax matmul rms_norm swiglu cross_entropy linear_cross_entropy "
                             "adamw_step flash_attention int8_matmul int4_matmul".split())

def test_check_finds_errors(capsys, monkeypatch):
    shapes, plain = [(3, 8), (8,)], lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)
    monkeypatch.setattr(K, "cases", lambda large: [
        ("eps", lambda x, w: K.rms_norm(x, w, 0.1), plain, shapes, 0, 0),
        ("grad", lambda x, w: K.rms_norm(x, w.detach()) + 0 * w, plain, shapes, 0, 0),
        ("right", K.rms_norm, plain, shapes, 0, 0)])
    assert K.check() == 6  # two of them in three dtypes
    assert re.findall(r"^(\w+) .*FAILED", capsys.readouterr().out, re.M) == ["eps", "grad"]

def attention(q, k, v, mask):
    """PyTorch's own, where mask says what is seen; a query that sees nothing gets 0."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.0).nan_to_num(0.0) @ v

@pytest.mark.parametrize("f", [K.flash_attention, K.flash_attention_torch])
@pytest.mark.parametrize("T, S, causal, window", [
    (70, 70, True, None), (70, 70, False, None), (90, 40, True, None), (40, 90, True, None),
    (100, 100, True, 37), (130, 130, True, 127), (90, 90, True, 1), (70, 70, False, 9),
    (150, 60, True, 20)])
def test_mistake_5_attention_gradients_under_masks(f, T, S, causal, window):
    """Masked columns, rows that see nothing (T > S), the causal flag, and the window."""
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    mask = ((distance >= 0) | (not causal)) & (distance < (window or math.inf))
    q, k, v = rand(1, 4, T, 20), rand(1, 2, S, 20), rand(1, 2, S, 20)
    assert largest_error(partial(f, causal=causal, window=window),
                         partial(attention, mask=mask.to(DEVICE)), q, k, v) < 1e-5
    if T > S and causal:  # the first queries: output 0, and they move nothing
        out = f(q, k, v, causal, window)[:, :, : T - S]
        assert (out == 0).all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))

@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("function", [K.FlashAttention, K.FlashAttentionTorch])
def test_attention_functions_without_heads_save_one_number_a_row(function, causal):
    inputs = q, k, _ = [rand(3, 40, 16) for _ in range(3)]
    mask = torch.ones(40, 40, device=DEVICE).tril().bool() | (not causal)
    saved = function.apply(*inputs, causal).grad_fn.saved_tensors
    (lse,) = [x for x in saved if x.shape == (3, 40)]
    assert len(saved) == 5 and all(x.shape == (3, 40, 16) for x in saved if x is not lse)
    assert_close(lse, (q @ k.mT / 4).masked_fill(~mask, -math.inf).logsumexp(-1))
    assert largest_error(lambda *x: function.apply(*x, causal), lambda *x: attention(
        *(a[:, None] for a in x), mask)[:, 0], *inputs) < 1e-5

def test_attention_of_large_scores_and_a_scale_of_0():
    q, k, v = 300 * rand(1, 1, 50, 16), 30 * rand(1, 1, 50, 16), rand(1, 1, 50, 16)
    for f in (K.flash_attention, K.flash_attention_torch):
        assert_close(f(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-3)
        assert_close(f(q, k, v, False, scale=0.0), v.mean(-2, keepdim=True).expand_as(v))

def test_any_strides_are_taken():
    q, k, v = rand(2, 30, 4, 16).transpose(1, 2), rand(2, 2, 16, 30).mT, rand(2, 2, 16, 30).mT
    mask = torch.ones(30, 30, device=DEVICE).tril().bool()
    assert largest_error(K.flash_attention, partial(attention, mask=mask), q, k, v) < 1e-5
    x, w, y = rand(12, 5).T, rand(24)[::2], rand(12, 5).T
    targets = torch.tensor([3, 11, -100, 0, 2], device=DEVICE)
    for f, reference, inputs in (
            (K.softmax, lambda x: x.softmax(-1), [x]),
            (K.swiglu, lambda a, b: F.silu(a) * b, [x, y]),
            (K.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), [rand(12, 600).T, w]),
            (lambda x: K.cross_entropy(x, targets), lambda x: F.cross_entropy(x, targets), [x]),
            (K.matmul, torch.matmul, [x, rand(7, 12).T])):
        assert largest_error(f, reference, *inputs) < 1e-5

def test_cross_entropy_of_impossible_and_huge_logits_and_without_targets():
    logits = torch.cat([torch.full((1, 5000), -math.inf), torch.zeros(1, 10)], 1).to(DEVICE)
    assert abs(K.cross_entropy(logits, torch.tensor([5005]).to(DEVICE)) - math.log(10)) < 1e-6
    big, targets = 1e4 * torch.randn(2, 3, 50, device=DEVICE), torch.zeros(2, 3).long().to(DEVICE)
    assert_close(K.cross_entropy(big, targets),
                 F.cross_entropy(big.flatten(0, 1), targets.flatten()))
    x, w, none = rand(6, 33), rand(33, 33), torch.full((6,), -100, device=DEVICE)
    for f, inputs in ((K.cross_entropy, (x,)), (K.linear_cross_entropy, (x, w))):
        for reduction in ("mean", "sum"):
            loss = f(*inputs, targets=none, reduction=reduction)
            assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, inputs))

def test_linear_cross_entropy_never_has_all_logits():
    x, w, targets = rand(24, 8), rand(500, 8), torch.randint(500, (24,), device=DEVICE)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.append(out.nbytes if torch.is_tensor(out) else 0)
            return out

    plain = F.cross_entropy(x @ w.T, targets)
    with Watch():
        K.linear_cross_entropy(x, w, targets, chunk=7).backward()
    assert max(seen) == w.nbytes  # more than 7 x 500 logits, less than 24 x 500
    with torch.no_grad():
        assert_close(K.linear_cross_entropy(x, w, targets), plain)
    for chunk in (1, 7, 1000, None):
        ours = partial(K.linear_cross_entropy, targets=targets, chunk=chunk, reduction="sum")
        assert largest_error(lambda x, w: 3 * ours(x, w), lambda x, w: 3 * F.cross_entropy(
            x @ w.T, targets, reduction="sum"), x, w) < 1e-5

def test_second_derivatives_are_refused():
    x, targets = rand(1, 1, 16, 16), torch.zeros(1, 1, 16, dtype=torch.long, device=DEVICE)
    for y in (K.rms_norm(x, rand(16)), K.softmax(x), K.swiglu(x, x), K.matmul(x[0, 0], x[0, 0]),
              K.flash_attention(x, x, x), K.flash_attention_torch(x, x, x),
              K.cross_entropy(x, targets)):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):  # it would be wrong
            g.sum().backward()

def test_adamw_equals_torch():
    shapes = [(5, 7), (3000,), (), (1, 1), (0,)]
    ours = [torch.randn(s, device=DEVICE) for s in shapes]
    theirs = [torch.nn.Parameter(x.clone()) for x in ours]
    reference = torch.optim.AdamW(theirs, lr=3e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    m, v = ([torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2))
    for t in range(1, 12):
        for b in theirs:
            b.grad = torch.randn_like(b)
        reference.step()
        K.adamw_step(ours, [b.grad.clone() for b in theirs], m, v, t, 3e-2, (0.8, 0.9), 1e-6, 0.3)
        assert_close(ours, [b.detach() for b in theirs], atol=1e-6)

@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integer_products_take_the_formats_of_model_py(kind):
    linear = M.QuantizedLinear(M.Linear(70, 50), kind).to(DEVICE)
    parts = [linear.weight, linear.scale] + ([linear.low] if kind == "int4" else [])
    f, w = K.int8_matmul if kind == "int8" else K.int4_matmul, linear.rows().double()
    for shape in ((2, 3, 70), (70,), (0, 70)):
        x = torch.randn(shape, device=DEVICE)
        assert_close(f(x, *parts).double(), x.double() @ w.T)
    with pytest.raises(NotImplementedError):  # a gradient that would be missing
        f(rand(2, 70), *parts).sum().backward()

@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_training_with_the_kernels_gives_the_same_losses(kind):
    config = M.TransformerConfig(vocab_size=40, block_size=18, n_layer=1, n_head=2, n_kv_head=1,
                                 n_embd=32, attention=kind, window=5)
    losses, (x, y) = [], torch.randint(40, (2, 1, 18), device=DEVICE)
    y[0, :4] = -100
    for M.kernels in (None, K):
        torch.manual_seed(1)
        model = M.Transformer(config).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            loss = (K.linear_cross_entropy(model(x, hidden=True), model.head.weight, y)
                    if M.kernels else F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert losses[2] < losses[0]
    assert_close(losses[:3], losses[3:])

@pytest.mark.skipif(not K.INTERPRETED, reason="it multiplies bfloat16 wrongly, a GPU does not")
def test_the_interpreter_computes_bfloat16_in_float32():
    q, k, v = (torch.randn(1, 2, 70, 32).bfloat16() for _ in range(3))
    for f, inputs in ((K.softmax, [q]), (K.matmul, [q[0, 0], k[0, 0].T]), (K.swiglu, [q, k]),
                      (K.rms_norm, [q, k[0, 0, 0]]), (K.flash_attention, [q, k, v]),
                      (K.FlashAttention.apply, [q, k, v])):
        assert torch.equal(f(*inputs), f(*(x.float() for x in inputs)).bfloat16())

@pytest.mark.parametrize("error, f, inputs", [
    (ValueError, K.rms_norm, [rand(2, 3), rand(4)]),
    (ValueError, K.flash_attention, [rand(1, 3, 4, 16), rand(1, 2, 4, 16), rand(1, 2, 4, 16)]),
    (TypeError, K.softmax, [rand(3).double()]), (TypeError, K.swiglu, [rand(3), rand(3).half()]),
    (IndexError, K.cross_entropy, [rand(2, 5), torch.tensor([0, 5], device=DEVICE)]),
    (ValueError, K.int8_matmul, [rand(2, 16), torch.zeros(3, 16).byte().to(DEVICE), rand(3)])])
def test_wrong_inputs_are_refused(error, f, inputs):
    with pytest.raises(error):
        f(*inputs)

@pytest.mark.parametrize("f, shapes", [
    (K.softmax, [(0, 5)]), (K.softmax, [(3, 0)]), (K.rms_norm, [(0, 5), (5,)]),
    (K.matmul, [(0, 3), (3, 4)]), (K.matmul, [(2, 0), (0, 4)]), (K.swiglu, [(0,), (0,)]),
    (K.flash_attention, [(1, 2, n, 16) for n in (0, 7, 7)]),
    (K.flash_attention_torch, [(1, 2, n, 16) for n in (0, 7, 7)]),
    (K.flash_attention, [(1, 2, n, 16) for n in (7, 0, 0)])])
def test_empty_inputs(f, shapes):
    inputs = [rand(*s) for s in shapes]
    out = f(*inputs)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))

@pytest.mark.skipif(not K.INTERPRETED, reason="with a GPU, bench measures")
def test_bench_counts_and_the_interpreter_says_once_that_it_is_one():
    result = subprocess.run([sys.executable, K.__file__, "bench"], capture_output=True, text=True)
    row = re.search(r"1, 16, 16384, 64.*forward: ([\d.]+) MB, ([\d.]+) GFLOP", result.stdout)
    wanted = 4 * 16 * 16384 * 64 * 2 / 1e6, 2 * 2 * 16 * 16384**2 * 64 / 2 / 1e9  # q, k, v, o
    assert [float(x) for x in row.groups()] == pytest.approx(wanted, abs=0.1)
    assert result.stderr.count("interpreter") == 1 and result.returncode == 0

def test_profile_runs_the_same_step_with_and_without_the_kernels(capsys):
    K.profile()
    out = capsys.readouterr().out
    without, with_them = map(float, re.findall(r"these kernels, loss ([\d.]+)", out))
    assert without == pytest.approx(with_them, abs=1e-4 if DEVICE == "cpu" else 0.02)
    ours = out.split("with these kernels")[1]
    assert all(name in ours for name in ("FlashAttention", "RMSNorm", "SwiGLU", "CrossEntropy"))
