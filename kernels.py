"""
GPU kernels in Triton: the cost of a computation is moving its data.

    python kernels.py check      # every kernel against float64; without a GPU, in the interpreter
    python kernels.py bench      # on a GPU time, bandwidth and memory beside PyTorch; else counts
    python kernels.py profile    # where the time of one training step goes, with and without them
    python kernels.py ptx        # what the compiler makes of them: registers, spills, tensor cores

A GPU computes far faster than it reads: in the time that the memory of an H100 needs to deliver
one bfloat16 number, its tensor cores do some 600 operations. In eager PyTorch each operation reads
its inputs from memory and writes its output back. A fused kernel reads once, does everything in
registers, and writes once. To use a kernel in a project of your own, copy this file.

In the comments: B batch, H heads, T queries, S keys, D head size, V vocabulary; N rows of
anything. A launch starts many programs, each of which computes its own block of the output; an
argument marked tl.constexpr is known to the compiler, which makes a new kernel for each value.
"""

import argparse
import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Without a GPU the kernels run in Triton's interpreter, in NumPy: slowly, but they run. Triton
# reads the variable while it is imported, and torch's optimizers may have imported it already.
if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if re.match(r"triton($|\.(?!_C))", name)]:
        del sys.modules[name]
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def config(warps, stages=3, **sizes):
    """One setting: warps (groups of 32 threads) in a program, and loads kept in flight."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def tuned(configs, key, room=math.inf):
    """Decorator: when a kernel first meets a value of `key`, time it with each of the settings
    and keep the fastest (triton.autotune). room: for attention, how many numbers of its two tiles
    a warp can hold before registers are spilled to memory (`python kernels.py ptx` shows it).
    float32 gets only the last and smallest setting: its tiles take twice the shared memory, and
    no tensor core multiplies it exactly, which makes larger tiles slow to compile."""
    def choose(configs, args, D=0, **more):
        if next(iter(args.values())).dtype == torch.float32:
            return configs[-1:]
        fit = [c for c in configs[:-1]
               if (c.kwargs["BM"] + c.kwargs["BN"]) * D <= room * c.num_warps]
        return fit + configs[-1:]  # the last also suits GPUs with little shared memory

    if INTERPRETED:  # where none is fast
        return triton.autotune(configs[:1], key)
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": choose})


def same_kind(*tensors):
    """Raise unless all are of one floating-point dtype, and on one device that Triton can use."""
    for x in tensors:
        if not torch.is_tensor(x):
            raise TypeError(f"expected a tensor, not {type(x).__name__}")
    kinds = {(x.dtype, x.device) for x in tensors}
    if len(kinds) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError("tensors of one dtype of float32, float16 and bfloat16 and on one device "
                        f"are needed, not {kinds}")
    if not INTERPRETED and not (x.is_cuda and x.device.index == torch.cuda.current_device()):
        raise ValueError(f"a tensor on {x.device}: kernels run on the current GPU only, or with "
                         "TRITON_INTERPRET=1, set before Triton is imported")


def expect_fit(condition, **tensors):
    """Raise unless this condition on the shapes of the tensors holds."""
    if not condition:
        raise ValueError("shapes do not fit: " + ", ".join(
            f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


def warps_for(block):
    """So many warps that a thread has about 16 numbers of a block, which fit its registers."""
    return min(32, max(4, block // 512))


def by_rows(kernel, x, *args, programs=None, **flags):
    """Launch one program for each row of x (..., n), or `programs` of them; a block is a row."""
    if x.numel():
        block = triton.next_power_of_2(x.shape[-1])
        kernel[(programs or x.numel() // x.shape[-1],)](
            x, *args, BLOCK=block, num_warps=warps_for(block), **flags)


# -----------------------------------------------------------------------------
# Softmax, the first warm-up: one program per row, which is read once and written once. Eager
# PyTorch, spelled out as exp(x - max) / sum, moves each row five times.


@triton.jit
def softmax_forward(x, y, n, BLOCK: tl.constexpr):
    """y = softmax(x), x and y: (rows, n). One program a row; BLOCK: n or more."""
    row = tl.program_id(0).to(tl.int64)  # a row number times n can be more than 2^31
    i = tl.arange(0, BLOCK)  # a power of two, so the end of the row has to be masked
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + i, (e / tl.sum(e, 0)).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def softmax_backward(y, g, dx, n, BLOCK: tl.constexpr):
    """dx = y (g - sum(y g)) with g the gradient of y; all (rows, n). One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    p = tl.load(y + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    d = tl.load(g + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    d = p * (d - tl.sum(p * d, 0))
    tl.store(dx + row * n + i, d.to(dx.dtype.element_ty), mask=i < n)


class Softmax(torch.autograd.Function):
    """softmax over the last dimension of a contiguous x: (..., n); y is saved."""

    @staticmethod
    def forward(ctx, x):
        y = torch.empty_like(x)
        by_rows(softmax_forward, x, y, x.shape[-1])
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would be wrong
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        dx = torch.empty_like(y)
        by_rows(softmax_backward, y, g.contiguous(), dx, y.shape[-1])
        return dx


def softmax(x):
    """exp(x) / sum(exp(x)) over the last dimension, of up to 65,536. x: (..., n) -> (..., n)"""
    same_kind(x)
    expect_fit(x.ndim and x.shape[-1] <= 65536, x=x)
    return Softmax.apply(x.contiguous())


# -----------------------------------------------------------------------------
# Matrix product, the second warm-up: a program computes one tile of the result, and walks along K.


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Number of a program -> row and column of its tile of an (M, N) result. Row by row, the
    programs that run at one time would need all of b. In this order they form a block of GROUP
    rows of tiles, which share their tiles of a and of b in the L2 cache."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = pid // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    inside = pid % (GROUP * columns)
    return group * GROUP + inside % height, inside // height


@triton.jit
def product_tile(a, b, scales, c, M, N, K, am, ak, bk, bn,  # strides
                 BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b, each column times its number in scales (N,), if given. a: (M, K); b: (K, N), maybe
    integers, converted in registers; c: (M, N), contiguous. A program: one (BM, BN) tile."""
    m, n = tile_of(tl.program_id(0), M, N, BM, BN, 8)
    i, j = m * BM + tl.arange(0, BM).to(tl.int64), n * BN + tl.arange(0, BN).to(tl.int64)
    k = tl.arange(0, BK)
    # these addresses move along K, so that no product of K and a stride can overflow
    a += i[:, None] * am + k[None, :] * ak
    b += k[:, None] * bk + j[None, :] * bn
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        x = tl.load(a, mask=(i < M)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b, mask=inside[:, None] & (j < N)[None, :], other=0)
        acc = tl.dot(x, y.to(x.dtype), acc, input_precision="ieee")  # float32, not TF32
        a += BK * ak
        b += BK * bk
    if scales is not None:
        acc *= tl.load(scales + j, mask=j < N, other=0.0)[None, :]  # one for a column: at the end
    tl.store(c + i[:, None] * N + j[None, :], acc.to(c.dtype.element_ty),
             mask=(i < M)[:, None] & (j < N)[None, :])


matmul_kernel = tuned(
    [config(4, 3, BM=64, BN=64, BK=32), config(8, 3, BM=128, BN=256, BK=64),
     config(8, 4, BM=128, BN=128, BK=64), config(4, 4, BM=128, BN=64, BK=64),
     config(4, 4, BM=64, BN=128, BK=64), config(4, 5, BM=32, BN=64, BK=64)],
    ["M", "N", "K"])(product_tile)


def tiles(M, N):
    """The grid of a launch with one program for each (BM, BN) tile of an (M, N) result."""
    return lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)


def product(kernel, a, b, scales=None, **options):
    """a @ b, of two matrices with any strides, by a kernel of product_tile."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N)
    if c.numel():
        kernel[tiles(M, N)](a, b, scales, c, M, N, K, *a.stride(), *b.stride(), **options)
    return c


class MatMul(torch.autograd.Function):
    """a b for a: (M, K), b: (K, N); da = g b^T, db = a^T g."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return product(matmul_kernel, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        # a transpose is a matter of strides
        return product(matmul_kernel, g, b.T), product(matmul_kernel, a.T, g)


def matmul(a, b):
    """a @ b. a: (M, K), b: (K, N) -> (M, N), summed in float32."""
    same_kind(a, b)
    expect_fit(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0], a=a, b=b)
    return MatMul.apply(a, b)


# -----------------------------------------------------------------------------
# RMSNorm, with the addition to the residual stream that comes before it in most models.


@triton.jit
def rms_norm_forward(x, residual, weight, y, total, inverse, n, eps, BLOCK: tl.constexpr):
    """y = h / rms(h) * weight with h = x or, given a residual, h = total = x + residual; all
    (rows, n); inverse = 1 / rms, (rows,) float32. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < n
    h = tl.load(x + row * n + i, mask=inside, other=0.0)
    if residual is not None:  # rounded as an addition in eager PyTorch is
        h = h + tl.load(residual + row * n + i, mask=inside, other=0.0)
        tl.store(total + row * n + i, h, mask=inside)
    h = h.to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(h * h, 0) / n + eps)
    tl.store(inverse + row, r)
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n + i, (h * r * w).to(y.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward(h, weight, inverse, g, g_total, dx, partial, rows, n, BLOCK: tl.constexpr):
    """dx = r g w - h r^3 mean(g w h) (+ g_total) with r = 1 / rms; all (rows, n). The gradient of
    the weight is a sum over rows: each program adds up its rows in one row of partial, (programs,
    n) float32, and those are summed afterwards. With two stages in place of atomic additions the
    result is the same every time."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    inside = i < n
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    at = program.to(tl.int64) * n + i
    for row in range(program, rows, programs):
        v = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row)
        dw += d * v * r
        d = d * w
        out = r * d - v * (r * r * r * (tl.sum(d * v, 0) / n))
        if g_total is not None:
            out += tl.load(g_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
        at += programs * n
    tl.store(partial + program.to(tl.int64) * n + i, dw, mask=inside)


class RMSNorm(torch.autograd.Function):
    """rms_norm of contiguous x: (..., n) -> y, or with a residual y and h."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        by_rows(rms_norm_forward, x, residual, weight, y, total, inverse, x.shape[-1], eps)
        ctx.save_for_backward(x if total is None else total, weight, inverse)
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, g_total=None):
        h, weight, inverse = ctx.saved_tensors
        n, rows, cores = h.shape[-1], inverse.numel(), 1
        if h.is_cuda:
            cores = torch.cuda.get_device_properties(h.device).multi_processor_count
        programs, dx = min(rows, 4 * cores), torch.empty_like(h)
        partial = h.new_empty((programs, n), dtype=torch.float32)
        by_rows(rms_norm_backward, h, weight, inverse, g.contiguous(),
                None if g_total is None else g_total.contiguous(), dx, partial, rows, n,
                programs=programs)
        return dx, partial.sum(0).to(weight.dtype), None, None if g_total is None else dx


def rms_norm(x, weight, eps=1e-5, residual=None):
    """h / sqrt(mean(h^2) + eps) * weight with h = x, or with a residual h = x + residual.

    x, residual: (..., n), n at most 65,536; weight: (n,) -> (..., n), or (that, h).
    """
    same_kind(x, weight, x if residual is None else residual)
    expect_fit(weight.ndim == 1 and weight.shape == x.shape[-1:] and len(weight) <= 65536,
               x=x, weight=weight)
    if residual is not None:
        expect_fit(residual.shape == x.shape, x=x, residual=residual)
        residual = residual.contiguous()
    return RMSNorm.apply(x.contiguous(), weight.contiguous(), eps, residual)


# -----------------------------------------------------------------------------
# SwiGLU: silu(gate) * up. Eager PyTorch keeps silu(gate) for the backward pass; here it is
# computed again, which costs nothing as long as memory is the bottleneck.


@triton.jit
def swiglu_forward(a, b, y, n, BLOCK: tl.constexpr):
    """y = silu(a) b of n numbers. A program: BLOCK of them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(a + i, mask=i < n).to(tl.float32)
    v = tl.load(b + i, mask=i < n).to(tl.float32)
    tl.store(y + i, (u * tl.sigmoid(u) * v).to(y.dtype.element_ty), mask=i < n)


@triton.jit
def swiglu_backward(a, b, g, da, db, n, BLOCK: tl.constexpr):
    """da = g b silu'(a), db = g silu(a), of n numbers. A program: BLOCK of them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(a + i, mask=i < n).to(tl.float32)
    v = tl.load(b + i, mask=i < n).to(tl.float32)
    d = tl.load(g + i, mask=i < n).to(tl.float32)
    s = tl.sigmoid(u)
    tl.store(da + i, (d * v * s * (1 + u * (1 - s))).to(da.dtype.element_ty), mask=i < n)
    tl.store(db + i, (d * u * s).to(db.dtype.element_ty), mask=i < n)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, contiguous and of one shape; the two inputs are saved."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        y, n = torch.empty_like(gate), gate.numel()
        swiglu_forward[(triton.cdiv(n, 1024),)](gate, up, y, n, 1024)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        da, db, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        swiglu_backward[(triton.cdiv(n, 1024),)](gate, up, g.contiguous(), da, db, n, 1024)
        return da, db


def swiglu(gate, up):
    """silu(gate) * up = gate * sigmoid(gate) * up, element by element."""
    same_kind(gate, up)
    expect_fit(gate.shape == up.shape, gate=gate, up=up)
    return SwiGLU.apply(gate.contiguous(), up.contiguous())


# -----------------------------------------------------------------------------
# Cross-entropy over a vocabulary. The forward pass also writes the gradient, softmax - onehot:
# all it needs is at hand, and the logits (for V = 131,072 the largest tensor of all) need not be
# read a third time. Written in place, it takes no memory either.


@triton.jit
def cross_entropy_kernel(logits, grad, targets, losses, V, scale, ignore_index,
                         BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """losses = logsumexp(logits) - logits[target], (rows,), and with GRAD grad = (softmax(logits)
    - onehot) scale, (rows, V), which may be the logits themselves. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignore_index
    stop = tl.where(counts, V, 0)  # of a row that does not count, no logit is read
    logits += row * V
    grad += row * V
    # read first: if the gradient is written in place, another thread may soon do so
    at_target = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    # online: when a larger maximum comes, what was summed before shrinks by the difference
    m = tl.full((), -float("inf"), tl.float32)
    total = tl.where(counts, 0.0, 1.0)
    for start in range(0, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, tl.max(v, 0))
        base = tl.where(larger == -float("inf"), 0.0, larger)  # nothing but -inf so far
        total = total * tl.exp(m - base) + tl.sum(tl.exp(v - base), 0)
        m = larger
    lse = tl.where(counts, m + tl.log(total), 0.0)
    tl.store(losses + row, lse - at_target)
    if GRAD:
        scale = tl.where(counts, scale, 0.0)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            v = tl.load(logits + i, mask=i < stop, other=-float("inf")).to(tl.float32)
            p = tl.exp(v - lse) - tl.where(i == target, 1.0, 0.0)
            tl.store(grad + i, (p * scale).to(grad.dtype.element_ty), mask=i < V)


class CrossEntropy(torch.autograd.Function):
    """Sum of the losses / n, of logits x: (N, V) or, with a weight (V, C), of x weight^T for x:
    (N, C), `chunk` rows at a time. Only the gradients are saved; inplace: that of x in x."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, n, chunk, inplace):
        (need_x, need_weight), x = ctx.needs_input_grad[:2], x.detach()
        dx = torch.empty_like(x) if need_x and not inplace else x
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        losses = x.new_empty(len(x), dtype=torch.float32)
        for i in range(0, len(x), chunk):
            rows = slice(i, i + chunk)
            logits, grad = x[rows], dx[rows]
            if weight is not None:  # all there ever is of the logits: (chunk, V)
                logits = grad = x[rows] @ weight.T
            V = logits.shape[1]
            block = min(4096, triton.next_power_of_2(max(1, V)))
            cross_entropy_kernel[(len(logits),)](
                logits, grad, targets[rows], losses[rows], V, 1 / n, ignore_index, block,
                need_x or need_weight, num_warps=warps_for(2 * block))
            if need_weight:
                dw += grad.T @ x[rows]
            if need_x and weight is not None:
                dx[rows] = grad @ weight
        ctx.save_for_backward(dx if need_x else None, dw.to(weight.dtype) if need_weight else None)
        return losses.sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        if g != 1:  # as it is in loss.backward(), where there is nothing left to do
            dx, dw = (d if d is None else d * g.to(d.dtype) for d in (dx, dw))
        return dx, dw, None, None, None, None, None


def fused_loss(x, weight, targets, ignore_index, reduction, chunk, inplace=False):
    """What the two functions below share. Raises unless there is one target for each row of x,
    and each is an id of the vocabulary or ignore_index."""
    V = (x if weight is None else weight.T).shape[-1]
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is mean or sum, not {reduction}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, not int64")
    expect_fit(targets.shape == x.shape[:-1], x=x, targets=targets)
    counts = targets != ignore_index
    if (((targets < 0) | (targets >= V)) & counts).any():
        raise IndexError(f"a target is not in 0 to {V - 1}, nor ignore_index {ignore_index}")
    n = max(1, int(counts.sum())) if reduction == "mean" else 1
    rows = x.contiguous().view(targets.numel(), x.shape[-1])
    if not torch.is_grad_enabled():  # a gradient would be made in vain
        rows, weight = rows.detach(), weight if weight is None else weight.detach()
    return CrossEntropy.apply(rows, weight, targets.contiguous().view(-1), ignore_index, n, chunk,
                              inplace and x.is_contiguous())


def cross_entropy(logits, targets, ignore_index=-100, reduction="mean", inplace=False):
    """Negative log-likelihood of the targets in nats: their mean, or "sum".

    logits: (..., V); targets: (...) int64. Targets of ignore_index do not count; with none that
    counts the loss is 0. inplace: the logits, which nothing else may use then, become the
    gradient. Raises IndexError for a target that is no id.
    """
    same_kind(logits)
    expect_fit(logits.ndim >= 2, logits=logits)
    return fused_loss(logits, None, targets, ignore_index, reduction, max(1, targets.numel()),
                      inplace)


def linear_cross_entropy(x, weight, targets, ignore_index=-100, reduction="mean", chunk=None):
    """cross_entropy(x @ weight.T, targets), of which the logits are never all in memory: they are
    made, and turned into gradients, `chunk` rows at a time (Wijmans et al. 2024; Hsu et al. 2024).

    x: (..., C), weight: (V, C), targets: (...) int64. chunk: by default so many rows that their
    logits take as much memory as x does, and at least 64.
    """
    same_kind(x, weight)
    expect_fit(weight.ndim == 2 and x.shape[-1:] == weight.shape[1:], x=x, weight=weight)
    if chunk is None:
        chunk = max(64, triton.next_power_of_2(max(1, x.numel() // max(1, len(weight)))))
    return fused_loss(x, weight, targets, ignore_index, reduction, chunk)


# -----------------------------------------------------------------------------
# FlashAttention-2 (Dao 2023): softmax(q k^T scale) v without the (T, S) matrix ever in memory. A
# tile of queries stays in registers while tiles of keys and values pass by; the softmax is kept up
# to date as larger scores come (an online softmax: m the maximum so far, l the sum). For the
# backward pass only the output and the logarithm of the sum, one number a row, are saved; the
# probabilities are computed again.
#
# Query i has position i + S - T among the keys: if there are fewer queries than keys, they are the
# last. A causal query sees keys up to its own position, with a window only the last `window` of
# them. A query that sees no key at all has output 0 and moves nothing.


def seen(i, j, offset, causal, window):
    """Whether queries i see keys j, (len(i), len(j)) of bool."""
    distance = (i + offset)[:, None] - j[None, :]
    return ((distance >= 0) | (not causal)) & (distance < (window or math.inf))


class FlashAttentionTorch(torch.autograd.Function):
    """The algorithm in PyTorch, tile by tile, to be read before the kernels. q: (B, H, T, D); k,
    v: (B, H, S, D) -> (B, H, T, D), all float32; also without H. Saved: these, and lse, the
    logsumexp of the scores: (B, H, T)."""

    @staticmethod
    def forward(ctx, q, k, v, causal=False, window=None, scale=None):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        queries, keys = (torch.arange(x.shape[-2], device=x.device) for x in (q, k))
        o, lse = torch.empty_like(q), torch.empty_like(q[..., 0])
        for i in queries.split(64):
            qi, acc = q[..., i, :] * scale, torch.zeros_like(q[..., i, :])
            l = torch.zeros_like(acc[..., :1])
            m = torch.full_like(l, -math.inf)
            for j in keys.split(64):
                mask = seen(i, j, len(keys) - len(queries), causal, window)
                if mask.any():
                    s = (qi @ k[..., j, :].mT).masked_fill(~mask, -math.inf)
                    larger = torch.maximum(m, s.amax(-1, keepdim=True))
                    base = larger.masked_fill(larger == -math.inf, 0.0)  # nothing seen so far
                    p, shrink = torch.exp(s - base), torch.exp(m - base)
                    l = l * shrink + p.sum(-1, keepdim=True)
                    acc = acc * shrink + p @ v[..., j, :]
                    m = larger
            o[..., i, :] = acc / l.masked_fill(l == 0, 1.0)
            lse[..., i] = (m + torch.log(l))[..., 0]  # -inf where nothing was seen
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = queries, keys, causal, window, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        queries, keys, causal, window, scale = ctx.options
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (g * o).sum(-1, keepdim=True)  # equal to the sum over keys of p dp
        for j in keys.split(64):
            for i in queries.split(64):
                mask = seen(i, j, len(keys) - len(queries), causal, window)
                if mask.any():
                    p = torch.exp(q[..., i, :] @ k[..., j, :].mT * scale - lse[..., i, None])
                    p = p.masked_fill(~mask, 0.0)  # also in rows that see nothing: lse is -inf
                    dv[..., j, :] += p.mT @ g[..., i, :]
                    ds = p * (g[..., i, :] @ v[..., j, :].mT - delta[..., i, :]) * scale
                    dq[..., i, :] += ds @ k[..., j, :]
                    dk[..., j, :] += ds.mT @ q[..., i, :]
        return dq, dk, dv, None, None, None


# Tiles. q (BM, D) and the accumulator (BM, D), in float32, live in registers all the time: with
# BM = 128 and D = 128 these are 128 x 128 x 6 bytes = 96 kB of a multiprocessor's 256 kB, which
# leaves room for the scores (BM, BN) with 8 warps. Tiles of k and v wait in shared memory, 2
# stages x 2 x BN x D x 2 bytes: 64 kB for BN = 64. At D = 256 everything doubles, so tiles halve.
FORWARD = [config(8, 3, BM=128, BN=64), config(4, 3, BM=64, BN=64), config(8, 3, BM=128, BN=128),
           config(4, 4, BM=128, BN=64), config(8, 2, BM=64, BN=64), config(8, 2, BM=32, BN=32)]
# The backward pass holds two accumulators (dk and dv) and two tiles more: smaller tiles.
BACKWARD = [config(8, 2, BM=64, BN=64), config(4, 2, BM=32, BN=64), config(4, 2, BM=64, BN=32),
            config(4, 2, BM=32, BN=32), config(8, 2, BM=32, BN=32)]
# LENGTH, of T and S the larger, rounded up to a power of two, is there for the tuner alone: it is
# not to start again for each length of a prompt
KEY = ["LENGTH", "D", "CAUSAL", "WINDOW"]


@triton.jit
def load_tile(base, row, rows, stride, D: tl.constexpr):
    """Rows `row` of a (rows, D) matrix -> (len(row), D), zeros outside."""
    return tl.load(base + row.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :],
                   mask=(row < rows)[:, None], other=0.0)


@triton.jit
def store_tile(base, row, rows, tile, D: tl.constexpr):
    """The reverse, for a contiguous matrix."""
    tl.store(base + row.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :],
             tile.to(base.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit
def visible(i, j, T, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries i see keys j, (len(i), len(j)) of bool: see `seen`."""
    mask = (i < T)[:, None] & (j < S)[None, :]
    distance = (i + S - T)[:, None] - j[None, :]
    if CAUSAL:
        mask = mask & (distance >= 0)
    if WINDOW:
        mask = mask & (distance < WINDOW)
    return mask


@triton.jit
def attend(acc, m, l, q, k, v, start, stop, i, T, S, kt, vt, scale, D: tl.constexpr,
           BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr):
    """Take keys start to stop into account for the queries i, a tile q of (BM, D): sums of values
    acc (BM, D), maxima m and sums l (BM,) -> the same, up to date. scale holds log2(e): exp2 is
    what the hardware has."""
    for n in range(start, stop, BN):
        j = n + tl.arange(0, BN)
        kj = load_tile(k, j, S, kt, D)
        s = tl.dot(q, tl.trans(kj), input_precision="ieee") * scale
        if MASKED:
            s = tl.where(visible(i, j, T, S, CAUSAL, WINDOW), s, -float("inf"))
        larger = tl.maximum(m, tl.max(s, 1))
        base = larger
        if MASKED:
            base = tl.where(larger == -float("inf"), 0.0, larger)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        vj = load_tile(v, j, S, vt, D)
        acc = tl.dot(p.to(vj.dtype), vj, acc * shrink[:, None], input_precision="ieee")
        m = larger
    return acc, m, l


@tuned(FORWARD, KEY, room=4096)
@triton.jit
def flash_forward(q, k, v, o, lse, scale, T, S, H, group, qb, qh, qt, kb, kh, kt, vb, vh, vt,
                  D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                  LENGTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """o (B, H, T, D) and lse (B, H, T), by the strides of q, k and v. A program: BM queries of one
    head; group: heads of queries that share one of keys."""
    # long tiles first: with a causal mask the last queries have the most keys
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    k += b * kb + h // group * kh
    v += b * vb + h // group * vh
    i = tile * BM + tl.arange(0, BM)
    qi = load_tile(q + b * qb + h * qh, i, T, qt, D)
    m = tl.full((BM,), -float("inf"), tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    # keys that some query of the tile sees, [lo, hi), and those that all see, [full_lo, full_hi):
    # only the tiles at the edges need a mask
    first, last = tile * BM + S - T, tile * BM + BM - 1 + S - T  # positions of the queries
    lo, hi = 0, S
    full_lo, full_hi = 0, S // BN * BN
    if CAUSAL:
        hi = tl.maximum(0, tl.minimum(S, last + 1))
        full_hi = tl.maximum(0, tl.minimum(full_hi, (first + 1) // BN * BN))
    if WINDOW:
        lo = tl.maximum(0, first - WINDOW + 1) // BN * BN
        full_lo = tl.maximum(0, last - WINDOW + BN) // BN * BN
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.maximum(full_hi, full_lo)
    if WINDOW:
        acc, m, l = attend(acc, m, l, qi, k, v, lo, full_lo, i, T, S, kt, vt, scale, D, BN,
                           CAUSAL, WINDOW, True)
    acc, m, l = attend(acc, m, l, qi, k, v, full_lo, full_hi, i, T, S, kt, vt, scale, D, BN,
                       CAUSAL, WINDOW, False)
    acc, m, l = attend(acc, m, l, qi, k, v, full_hi, hi, i, T, S, kt, vt, scale, D, BN,
                       CAUSAL, WINDOW, True)
    l = tl.where(l == 0, 1.0, l)  # saw nothing: acc is 0, and m -inf
    store_tile(o + bh * T * D, i, T, acc / l[:, None], D)
    # scores are in base 2 here, lse is natural: times ln(2)
    tl.store(lse + bh * T + i, (m + tl.log2(l)) * 0.6931471805599453, mask=i < T)


@tuned([config(8, 2, BM=64, BN=128), *BACKWARD], KEY, room=3072)
@triton.jit
def flash_backward_queries(q, k, v, o, g, lse, delta, dq, scale, T, S, H, group, qb, qh, qt, kb,
                           kh, kt, vb, vh, vt, D: tl.constexpr, CAUSAL: tl.constexpr,
                           WINDOW: tl.constexpr, LENGTH: tl.constexpr, BM: tl.constexpr,
                           BN: tl.constexpr):
    """dq, (B, H, T, D), and delta, (B, H, T) float32: the sum over d of o g, which is the sum over
    keys of p dp. A program: BM queries, which stay, while keys and values pass by."""
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    i = tile * BM + tl.arange(0, BM)
    gi = load_tile(g + bh * T * D, i, T, D, D)
    oi = load_tile(o + bh * T * D, i, T, D, D)
    delta_i = tl.sum(oi.to(tl.float32) * gi.to(tl.float32), 1)
    tl.store(delta + bh * T + i, delta_i, mask=i < T)
    lse_i = tl.load(lse + bh * T + i, mask=i < T, other=0.0) * 1.4426950408889634
    qi = load_tile(q + b * qb + h * qh, i, T, qt, D)
    acc = tl.zeros((BM, D), tl.float32)
    lo, hi = 0, S
    if CAUSAL:
        hi = tl.maximum(0, tl.minimum(S, tile * BM + BM + S - T))
    if WINDOW:
        lo = tl.maximum(0, tile * BM + S - T - WINDOW + 1) // BN * BN
    for start in range(lo, hi, BN):
        j = start + tl.arange(0, BN)
        kj = load_tile(k + b * kb + h // group * kh, j, S, kt, D)
        vj = load_tile(v + b * vb + h // group * vh, j, S, vt, D)
        s = tl.dot(qi, tl.trans(kj), input_precision="ieee") * (scale * 1.4426950408889634)
        # masked entries are 0, also in rows that see nothing, where lse is -inf
        p = tl.where(visible(i, j, T, S, CAUSAL, WINDOW), tl.exp2(s - lse_i[:, None]), 0.0)
        dp = tl.dot(gi, tl.trans(vj), input_precision="ieee")
        ds = p * (dp - delta_i[:, None])
        acc = tl.dot(ds.to(kj.dtype), kj, acc, input_precision="ieee")
    store_tile(dq + bh * T * D, i, T, acc * scale, D)


@tuned(BACKWARD, KEY, room=2048)
@triton.jit
def flash_backward_keys(q, k, v, g, lse, delta, dk, dv, scale, T, S, H, group, qb, qh, qt, kb, kh,
                        kt, vb, vh, vt, D: tl.constexpr, CAUSAL: tl.constexpr,
                        WINDOW: tl.constexpr, LENGTH: tl.constexpr, BM: tl.constexpr,
                        BN: tl.constexpr):
    """dk and dv, (B, H / group, S, D). A program: BN keys and values, which stay, while the
    queries of all heads of their group pass by."""
    tile, bk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = bk // (H // group), bk % (H // group)
    j = tile * BN + tl.arange(0, BN)
    kj = load_tile(k + b * kb + head * kh, j, S, kt, D)
    vj = load_tile(v + b * vb + head * vh, j, S, vt, D)
    dk_acc = tl.zeros((BN, D), tl.float32)
    dv_acc = tl.zeros((BN, D), tl.float32)
    lo, hi = 0, T
    if CAUSAL:
        lo = tl.maximum(0, tile * BN - (S - T)) // BM * BM
    if WINDOW:
        hi = tl.maximum(0, tl.minimum(T, tile * BN + BN - 1 - (S - T) + WINDOW))
    for h in range(head * group, head * group + group):
        bh = b * H + h
        for start in range(lo, hi, BM):
            i = start + tl.arange(0, BM)
            qi = load_tile(q + b * qb + h * qh, i, T, qt, D)
            gi = load_tile(g + bh * T * D, i, T, D, D)
            lse_i = tl.load(lse + bh * T + i, mask=i < T, other=0.0) * 1.4426950408889634
            delta_i = tl.load(delta + bh * T + i, mask=i < T, other=0.0)
            s = tl.dot(qi, tl.trans(kj), input_precision="ieee") * (scale * 1.4426950408889634)
            p = tl.where(visible(i, j, T, S, CAUSAL, WINDOW), tl.exp2(s - lse_i[:, None]), 0.0)
            dv_acc = tl.dot(tl.trans(p).to(gi.dtype), gi, dv_acc, input_precision="ieee")
            dp = tl.dot(gi, tl.trans(vj), input_precision="ieee")
            ds = p * (dp - delta_i[:, None])
            dk_acc = tl.dot(tl.trans(ds).to(qi.dtype), qi, dk_acc, input_precision="ieee")
    store_tile(dk + bk * S * D, j, S, dk_acc * scale, D)
    store_tile(dv + bk * S * D, j, S, dv_acc, D)


class FlashAttention(torch.autograd.Function):
    """As FlashAttentionTorch, by the kernels, with k and v (B, H / n, S, D). D: 16, 32, 64, 128 or
    256; the last dimension of q, k and v contiguous."""

    @staticmethod
    def forward(ctx, q, k, v, causal=False, window=None, scale=None):
        shape, scale = q.shape, q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (x[:, None] if x.ndim == 3 else x for x in (q, k, v))
        (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
        o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
        sizes = T, S, H, H // K, *(n for x in (q, k, v) for n in x.stride()[:3])
        options = {"D": D, "CAUSAL": causal, "LENGTH": triton.next_power_of_2(max(T, S)),
                   "WINDOW": window if window and window < S else 0}  # or it leaves nothing out
        if o.numel():
            flash_forward[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
                q, k, v, o, lse, scale * math.log2(math.e), *sizes, **options)
        ctx.save_for_backward(q, k, v, o, lse.view(shape[:-1]))
        ctx.options = scale, sizes, options
        return o.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        scale, sizes, options = ctx.options
        (B, H, T), (K, S) = q.shape[:3], k.shape[1:3]
        g, delta = g.contiguous(), torch.empty_like(lse)
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        if o.numel() and dk.numel():
            flash_backward_queries[lambda meta: (triton.cdiv(T, meta["BM"]), B * H)](
                q, k, v, o, g, lse, delta, dq, scale, *sizes, **options)
            flash_backward_keys[lambda meta: (triton.cdiv(S, meta["BN"]), B * K)](
                q, k, v, g, lse, delta, dk, dv, scale, *sizes, **options)
        if g.ndim == 3:
            dq, dk, dv = dq[:, 0], dk[:, 0], dv[:, 0]
        return dq, dk, dv, None, None, None


def check_attention(q, k, v, causal, window):
    """Raise unless these are queries, keys and values that fit together."""
    same_kind(q, k, v)
    expect_fit(q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and
               q.shape[3] == k.shape[3] and k.shape[1] and q.shape[1] % k.shape[1] == 0 and
               q.shape[0] * q.shape[1] < 65536, q=q, k=k, v=v)  # 65535: a launch's limit
    if not 0 < q.shape[3] <= 256:
        raise ValueError(f"head size {q.shape[3]} is not in 1 to 256")
    if window is not None and not (causal and window > 0):
        raise ValueError("a window is a positive number of keys, of causal attention")


def flash_attention(q, k, v, causal=True, window=None, scale=None):
    """softmax(q k^T scale) v in memory proportional to T.

    q: (B, H, T, D); k, v: (B, H / n, S, D), each serving n heads of queries -> (B, H, T, D).
    causal: query i sees keys up to i + S - T; window: only the last so many of them. scale:
    default 1 / sqrt(D). Any T and S, any strides, D up to 256 (padded to a power of two), B H up
    to 65,535.
    """
    check_attention(q, k, v, causal, window)
    D, scale = q.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return FlashAttention.apply(q, k, v, causal, window, scale)[..., :D]


def flash_attention_torch(q, k, v, causal=True, window=None, scale=None):
    """`flash_attention` in plain PyTorch, in float32."""
    check_attention(q, k, v, causal, window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return FlashAttentionTorch.apply(q.float(), k, v, causal, window, scale).to(q.dtype)


# -----------------------------------------------------------------------------
# AdamW over many tensors in one launch. A model has hundreds of parameters, many of them small,
# and a launch takes several microseconds however little it does. A table of addresses tells each
# program which piece of which tensor is its own.


@triton.jit
def adamw_kernel(table, owner, lr, beta1, beta2, eps, decay, correction1, correction2,
                 DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one step for BLOCK numbers of one tensor. owner: (programs,), the tensor of each
    program; table: (tensors, 6), addresses of p, g, m and v, numbers in each, first program."""
    program = tl.program_id(0).to(tl.int64)
    entry = table + tl.load(owner + program) * 6
    p = tl.load(entry).to(tl.pointer_type(DTYPE))
    g = tl.load(entry + 1).to(tl.pointer_type(DTYPE))
    m = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    v = tl.load(entry + 3).to(tl.pointer_type(tl.float32))
    i = (program - tl.load(entry + 5)) * BLOCK + tl.arange(0, BLOCK)
    inside = i < tl.load(entry + 4)
    x = tl.load(p + i, mask=inside).to(tl.float32)
    d = tl.load(g + i, mask=inside).to(tl.float32)
    first = tl.load(m + i, mask=inside)
    second = tl.load(v + i, mask=inside)
    first += (1 - beta1) * (d - first)
    second += (1 - beta2) * (d * d - second)
    x *= 1 - lr * decay
    x -= lr / correction1 * first / (tl.sqrt(second) / correction2 + eps)
    tl.store(p + i, x.to(DTYPE), mask=inside)
    tl.store(m + i, first, mask=inside)
    tl.store(v + i, second, mask=inside)


@torch.no_grad()
def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
               weight_decay=0.01):
    """One step of AdamW (Loshchilov & Hutter 2019) for lists of tensors, in place; see AdamW in
    train.py. params and grads of one dtype, the two running means in float32, all contiguous; step
    counts from 1."""
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError("lengths differ")
    if step < 1:
        raise ValueError(f"step counts from 1, and is {step}")
    if not params:
        return
    same_kind(*params, *grads)
    device, rows = params[0].device, list(zip(params, grads, exp_avgs, exp_avg_sqs))
    for p, g, *means in rows:
        if any((x.dtype, x.device) != (torch.float32, device) for x in means):
            raise TypeError(f"the running means must be float32, on {device}")
        if any(x.shape != p.shape or not x.is_contiguous() for x in (p, g, *means)):
            raise ValueError("a parameter, its gradient and means need one shape, contiguous")
    block, sizes = 1024, torch.tensor([p.numel() for p in params])
    programs = (sizes + block - 1) // block
    addresses = torch.tensor([[x.data_ptr() for x in tensors] for tensors in rows])
    table = torch.column_stack((addresses, sizes, programs.cumsum(0) - programs))
    if total := int(programs.sum()):
        owner = torch.repeat_interleave(programs.to(device), output_size=total)
        adamw_kernel[(total,)](
            table.to(device), owner, lr, *betas, eps, weight_decay, 1 - betas[0] ** step,
            math.sqrt(1 - betas[1] ** step), getattr(tl, str(params[0].dtype)[6:]), block)


# -----------------------------------------------------------------------------
# Products with quantized weights, in the formats of QuantizedLinear in model.py. The integers
# become numbers in registers, so that memory moves one byte for a weight, or half of one, not two.

FEW = [config(4, 4, BM=16, BN=64), config(8, 3, BM=64, BN=128), config(4, 4, BM=32, BN=64),
       config(4, 5, BM=16, BN=32)]
GROUP = 32  # numbers of a row of int4 weights that share a scale
int8_kernel = tuned(FEW, ["M", "N", "K"])(product_tile)


@tuned(FEW, ["M", "N", "K"])
@triton.jit
def int4_kernel(x, w, scales, lows, y, M, N, K, groups, BM: tl.constexpr, BN: tl.constexpr,
                GROUP: tl.constexpr):
    """y = x (w scale + low)^T: x (M, K), w (N, groups GROUP / 2) uint8, scales, lows (N, groups).
    Of each byte the low half is an even k, the high half the odd one after it: two products of
    half the length, and no shuffling of numbers between threads."""
    m, n = tile_of(tl.program_id(0), M, N, BM, BN, 8)
    i, j = m * BM + tl.arange(0, BM).to(tl.int64), n * BN + tl.arange(0, BN).to(tl.int64)
    half = tl.arange(0, GROUP // 2)
    acc = tl.zeros((BM, BN), tl.float32)
    for group in range(0, groups):
        k = group * GROUP + 2 * half
        at = x + i[:, None] * K + k[None, :]
        even = tl.load(at, mask=(i < M)[:, None] & (k < K)[None, :], other=0.0)
        odd = tl.load(at + 1, mask=(i < M)[:, None] & (k + 1 < K)[None, :], other=0.0)
        byte = tl.load(w + (j[None, :] * groups + group) * (GROUP // 2) + half[:, None],
                       mask=(j < N)[None, :], other=0)
        s = tl.load(scales + j * groups + group, mask=j < N, other=0.0)
        l = tl.load(lows + j * groups + group, mask=j < N, other=0.0)
        part = tl.dot(even, (byte & 15).to(even.dtype), input_precision="ieee")
        part = tl.dot(odd, (byte >> 4).to(odd.dtype), part, input_precision="ieee")
        total = tl.sum(even.to(tl.float32), 1) + tl.sum(odd.to(tl.float32), 1)
        acc += part * s[None, :] + total[:, None] * l[None, :]
    tl.store(y + i[:, None] * N + j[None, :], acc.to(y.dtype.element_ty),
             mask=(i < M)[:, None] & (j < N)[None, :])


def dequantize(weight, scale, low=None):
    """The numbers that integers stand for, (N, K) float32: see `int8_matmul`, `int4_matmul`."""
    if low is None:
        return weight * scale[:, None]
    weight = torch.stack((weight & 15, weight >> 4), -1).flatten(1).unflatten(1, (-1, GROUP))
    return (weight * scale[..., None] + low[..., None]).flatten(1)


class IntegerMatMul(torch.autograd.Function):
    """x (..., K) times integers (N, K): int8 without `low`, else int4; x alone has a gradient."""

    @staticmethod
    def forward(ctx, x, weight, scale, low):
        ctx.save_for_backward(weight, scale, low)
        ctx.columns = x.shape[-1]
        rows, N = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous(), len(weight)
        if low is None:
            return product(int8_kernel, rows, weight.T, scale, BK=64).view(*x.shape[:-1], N)
        y = x.new_empty(*x.shape[:-1], N)
        if y.numel():
            int4_kernel[tiles(len(rows), N)](rows, weight, scale, low, y, len(rows), N,
                                             ctx.columns, scale.shape[1], GROUP=GROUP)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # the weights are fixed, but what came before them may be trained
        weight, scale, low = ctx.saved_tensors
        w = dequantize(weight, scale, low)[:, : ctx.columns]
        return g @ w.to(g.dtype), None, None, None


def int8_matmul(x, weight, scale):
    """x @ (weight * scale[:, None]).T. x: (..., K); weight: (N, K) int8; scale: (N,) float32."""
    same_kind(x)
    if (weight.dtype, scale.dtype) != (torch.int8, torch.float32):
        raise TypeError(f"int8 and a float32 scale are needed, not {weight.dtype}, {scale.dtype}")
    expect_fit(x.ndim and weight.shape == (*scale.shape, x.shape[-1]),
               x=x, weight=weight, scale=scale)
    return IntegerMatMul.apply(x, weight.contiguous(), scale.contiguous(), None)


def int4_matmul(x, weight, scale, low):
    """x @ w.T with w = integer * scale + low, where each 32 numbers of a row share these two.

    x: (..., K); weight: (N, groups * 16) uint8, the first of each two integers of 0 to 15 in the
    low half of its byte; scale, low: (N, groups) float32, groups = K / 32 rounded up.
    """
    same_kind(x)
    if (weight.dtype, scale.dtype, low.dtype) != (torch.uint8, torch.float32, torch.float32):
        raise TypeError(f"uint8, and scale and low in float32, are needed, not {weight.dtype}, "
                        f"{scale.dtype} and {low.dtype}")
    groups = triton.cdiv(x.shape[-1], GROUP) if x.ndim else 0
    expect_fit(groups and weight.shape == (len(scale), groups * GROUP // 2) and
               scale.shape == low.shape == (len(scale), groups),
               x=x, weight=weight, scale=scale, low=low)
    return IntegerMatMul.apply(x, weight.contiguous(), scale.contiguous(), low.contiguous())


# -----------------------------------------------------------------------------
# The same in PyTorch: check computes these in float64, bench and profile have them beside ours.


def plain_norm(x, weight, residual=None):
    """As rms_norm."""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight, 1e-5)
    return y if residual is None else (y, h)


def plain_swiglu(gate, up):
    """As swiglu."""
    return F.silu(gate) * up


def plain_loss(x, weight=None, *, targets, reduction="mean"):
    """As linear_cross_entropy or, without a weight, cross_entropy."""
    logits = x if weight is None else x @ weight.T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def plain_attention(q, k, v, causal=True, window=None):
    """As flash_attention."""
    if causal and not window and q.shape == k.shape:  # PyTorch's own kernels need no mask
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    i, j = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    mask = seen(i, j, len(j) - len(i), causal, window)
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def cases(rows, losses, attention, products, integers, dtype=torch.float64, device=DEVICE):
    """Yield (kernel, flags, function, the same in PyTorch, shapes of its inputs, FLOPs of the
    forward pass, of both passes) for these sizes. dtype: of the integers' values, for PyTorch."""
    for shape in rows:
        n, a = shape[-1], math.prod(shape)
        yield "softmax", "", softmax, partial(torch.softmax, dim=-1), [shape], 5 * a, 9 * a
        yield "swiglu", "", swiglu, plain_swiglu, [shape, shape], 5 * a, 15 * a
        yield "rms_norm", "", rms_norm, plain_norm, [shape, (n,)], 4 * a, 12 * a
        yield ("rms_norm", "residual", lambda x, w, r: rms_norm(x, w, residual=r), plain_norm,
               [shape, (n,), shape], 5 * a, 14 * a)
    for *lead, C, V in losses:
        N, targets = math.prod(lead), torch.randint(V, lead, device=device)
        targets.view(-1)[:2] = -100
        for flags, reduction, chunk in ("", "mean", None), ("sum, in place, chunks", "sum", 3):
            options = {"targets": targets, "reduction": reduction}
            plain = partial(plain_loss, **options)
            yield ("cross_entropy", flags, partial(cross_entropy, inplace=bool(chunk), **options),
                   plain, [(*lead, V)], 4 * N * V, 7 * N * V)
            yield ("linear_cross_entropy", flags, partial(linear_cross_entropy, chunk=chunk,
                   **options), plain, [(*lead, C), (V, C)], 2 * N * C * V, 6 * N * C * V)
    for B, H, K, T, S, D, causal, window in attention:
        flops = 4 * B * H * T * S * D / (1 + causal)  # a mask leaves half
        mask = {"causal": causal, "window": window}
        usual = causal and not window and (H, T) == (K, S)
        for f in (flash_attention, flash_attention_torch):
            flags = "" if usual and f is flash_attention else str(mask)
            yield (f.__name__, flags, partial(f, **mask), partial(plain_attention, **mask),
                   [(B, H, T, D), (B, K, S, D), (B, K, S, D)], flops, 3.5 * flops)
    for M, K, N in products:
        yield "matmul", "", matmul, torch.matmul, [(M, K), (K, N)], 2 * M * N * K, 6 * M * N * K
    for M, K, N in integers:
        w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
        w4 = torch.randint(256, (N, triton.cdiv(K, 32) * 16), dtype=torch.uint8, device=device)
        scale, low = torch.rand(2, N, triton.cdiv(K, 32), device=device) + 0.5
        for f, parts in ((int8_matmul, {"weight": w8, "scale": scale[:, 0]}),
                         (int4_matmul, {"weight": w4, "scale": scale, "low": low})):
            plain = partial(F.linear, weight=dequantize(**parts)[:, :K].to(dtype))
            yield f.__name__, "", partial(f, **parts), plain, [(M, K)], 2 * M * N * K


# -----------------------------------------------------------------------------
# check: every kernel against float64.

SMALL = {
    "rows": [(3, 3, n) for n in (1, 7, 129, 1000)],
    "losses": [(2, 4, 24, V) for V in (7, 129, 1000)],
    "attention": [  # B, H, heads of k and v, T, S, D, causal, window
        (1, 2, 2, 64, 64, 64, True, None), (2, 2, 1, 70, 70, 16, True, None),
        (1, 3, 1, 129, 129, 32, True, None), (1, 2, 2, 65, 65, 80, False, None),
        (1, 1, 1, 37, 101, 64, True, None), (1, 1, 1, 101, 37, 32, True, None),
        (1, 2, 1, 37, 101, 24, False, None), (1, 1, 1, 150, 150, 32, True, 1),
        (1, 2, 1, 150, 150, 16, True, 70), (1, 1, 1, 140, 140, 16, True, 66),
        (1, 1, 1, 130, 190, 16, True, 33), (1, 1, 1, 40, 40, 128, True, None),
        (1, 1, 1, 33, 33, 256, True, None), (1, 1, 1, 1, 1, 16, True, None),
        (1, 1, 1, 1, 90, 32, True, 20)],
    "products": [(1, 1, 1), (64, 64, 64), (65, 33, 130), (5, 200, 17)],
    "integers": [(M, K, N) for K, N in ((32, 1), (70, 50), (128, 64)) for M in (1, 5, 70)]}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}
if not INTERPRETED:  # which is too slow for these sizes, and multiplies bfloat16 wrongly
    SMALL["rows"] += [(3, 3, 5000), (3, 3, 32768)]
    SMALL["losses"] += [(2, 4, 24, 131072)]
    SMALL["attention"] += [(2, 16, 4, 1023, 1023, 128, True, None),
                           (1, 8, 8, 2048, 2048, 64, True, 500)]
    TOLERANCE[torch.bfloat16] = 4e-2


def error(found, wanted):
    """Largest difference of two lists of tensors, relative to the largest number, or 0.01."""
    if any(a.shape != b.shape or not a.isfinite().all() for a, b in zip(found, wanted)):
        return math.inf
    size = max(1e-2, *(b.abs().max().item() for b in wanted))
    return max((a.double() - b).abs().max().item() for a, b in zip(found, wanted)) / size


def error_of(ours, plain, shapes, dtype):
    """-> error of outputs or gradients, the larger, for random inputs and output gradients."""
    exact = [torch.randn(s).to(DEVICE, dtype).double().requires_grad_() for s in shapes]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    outs, refs = ((y if type(y) is tuple else (y,)) for y in (ours(*inputs), plain(*exact)))
    g = [torch.randn(y.shape).to(DEVICE, dtype) for y in refs]
    grads = torch.autograd.grad(outs, inputs, [a.to(y.dtype) for a, y in zip(g, outs)])
    exact_grads = torch.autograd.grad(refs, exact, [a.double() for a in g])
    return max(error(outs, refs), error(grads, exact_grads))


def error_of_adamw(dtype):
    """-> error after 4 steps with tensors of odd sizes; bfloat16 is rounded at each of them."""
    params = [torch.randn(s).to(DEVICE, dtype) for s in ((3, 700), (1,), (1024,), (1025,), ())]
    exact = [p.double() for p in params]
    means = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    optimizer = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for t in range(1, 5):
        grads = [torch.randn_like(p) for p in params]
        adamw_step(params, grads, *means, t, 1e-2, (0.9, 0.95), 1e-8, 0.1)
        for p, g in zip(exact, grads):
            p.grad = g.double()
        optimizer.step()
    return error(params, exact)


def check():
    """Compare all kernels with float64, print the largest errors -> number of failures."""
    torch.manual_seed(0)
    start, failures, runs = time.perf_counter(), 0, {"adamw_step": [("", error_of_adamw)]}
    for name, flags, ours, plain, shapes, *_ in cases(**SMALL):
        run = partial(error_of, ours, plain, shapes)
        runs.setdefault(name, []).append((f"{shapes} {flags}", run))
    print(f"{'kernel':24}{'dtype':10}{'cases':>6}{'largest error':>16}")
    for name, dtype in ((name, dtype) for name in runs for dtype in TOLERANCE):
        found = {case: run(dtype=dtype) for case, run in runs[name]}
        for case, size in found.items():
            if size > TOLERANCE[dtype]:
                failures += 1
                print(f"FAILED {name}, {case}, {dtype}: {size:.1e}")
        largest = max(found.values())
        print(f"{name:24}{str(dtype)[6:]:10}{len(found):6}{largest:16.1e}", flush=True)
    where = "in the interpreter" if INTERPRETED else f"on {torch.cuda.get_device_name()}"
    print(f"{failures} failures, {time.perf_counter() - start:.0f} s, {where}; errors are of "
          "outputs and gradients, relative to the largest number")
    return failures


# -----------------------------------------------------------------------------
# bench: how far from the roofline (Williams et al. 2009). A kernel takes at least the time its
# bytes need at the memory's speed, and at least the time its operations need at the processor's.

LARGE = {
    "rows": [(32768, 1024), (32768, 8192)],
    "losses": [(8192, 2048, 32768), (8192, 2048, 131072)],
    "attention": [(B, 16, 16, T, T, D, True, None)
                  for B, T, D in ((4, 4096, 64), (1, 16384, 64), (4, 8192, 128))],
    "products": [(4096, 4096, 4096), (8192, 8192, 8192)],
    "integers": [(1, 4096, 14336), (16, 4096, 14336)]}


def bench():
    """Print what each kernel has to move and to compute and, on a GPU, how fast it does."""
    try:
        from liger_kernel.transformers import functional as liger
    except ImportError:
        liger = None
    gpu, half = DEVICE == "cuda", torch.bfloat16
    if gpu:
        x = torch.empty(2**30, device="cuda", dtype=torch.uint8)
        a = torch.randn(8192, 8192, device="cuda", dtype=half)
        memory = 2 * x.numel() / triton.testing.do_bench(x.clone) * 1e3
        compute = 2 * 8192**3 / triton.testing.do_bench(lambda: a @ a) * 1e3
        print(f"{torch.cuda.get_device_name()}: a copy moves {memory / 1e12:.2f} TB/s, a product "
              f"in bfloat16 does {compute / 1e12:.0f} TFLOP/s: the roofline")
    else:
        print("no GPU: these are the bytes and FLOPs of each kernel in bfloat16, not times")
    device = "cuda" if gpu else "meta"
    for name, flags, ours, plain, shapes, *flops in cases(**LARGE, dtype=half, device=device):
        if flags:
            continue
        inputs = [torch.randn(s, device=device, dtype=half, requires_grad=True) for s in shapes]
        # forward: inputs and weights are read, the output is written; backward: inputs and the
        # output's gradient are read, the inputs' gradients written
        x, y = sum(x.nbytes for x in inputs), plain(*inputs).nbytes
        fixed = [w for w in getattr(ours, "keywords", {}).values() if torch.is_tensor(w)]
        size = ", ".join(" x ".join(map(str, s))
                         for s in dict.fromkeys([*shapes, *(w.shape for w in fixed[:1])]))
        w = sum(w.nbytes for w in fixed)
        for backward, n, b in zip((False, True), flops, (x + y + w, 3 * x + 2 * y + w)):
            print(f"{name:22}{size:34}{b / 1e6:9,.1f} MB{n / 1e9:10,.1f} GFLOP{n / b:10,.1f} "
                  f"FLOP/byte  forward{' + backward' if backward else ''}", flush=True)
            if not gpu:
                continue
            torch.compiler.reset()  # or a second size would be compiled for all sizes
            rivals = {"ours": ours, "eager": plain,
                      "compiled": torch.compile(lambda *inputs: plain(*inputs))}
            if liger and name in ("rms_norm", "softmax", "swiglu"):
                more = {"eps": 1e-5} if name == "rms_norm" else {}
                rivals["liger"] = partial(getattr(liger, "liger_" + name), **more)
            for rival, f in rivals.items():
                def run():
                    with torch.set_grad_enabled(backward):
                        y = f(*inputs)
                        if backward:
                            torch.autograd.grad(y, inputs, torch.ones_like(y))
                try:
                    run()  # compiles, and tries settings
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    peak = torch.cuda.max_memory_allocated() - before
                    ms = triton.testing.do_bench(run)
                except RuntimeError as problem:  # out of memory, or it does not compile
                    print(f"    {rival:10}{type(problem).__name__}")
                    continue
                best = max(b / memory, n / compute) * 1e3
                print(f"    {rival:10}{ms:9.3f} ms{b / ms / 1e9:7.2f} TB/s"
                      f"{n / ms / 1e9:7.0f} TFLOP/s{best / ms:6.0%} of the roofline"
                      f"{peak / 1e6:9,.0f} MB at the peak", flush=True)


# -----------------------------------------------------------------------------
# profile: where the time of a training step goes.


def step_loss(params, x, y, heads, norm, gated, attend, loss):
    """Loss of a Transformer without positions, by these functions, on ids x and targets y (B, T).
    params: embedding, head and last norm; then seven for each layer."""
    embedding, head, last, *layers = params
    h = embedding[x]
    part = torch.zeros_like(h)
    for i in range(0, len(layers), 7):
        norm1, qkv, out, norm2, gate, up, down = layers[i : i + 7]
        u, h = norm(part, norm1, residual=h)
        q, k, v = (u @ qkv.T).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        part = attend(q, k, v).transpose(1, 2).flatten(2) @ out.T
        u, h = norm(part, norm2, residual=h)
        part = gated(u @ gate.T, u @ up.T) @ down.T
    return loss(norm(part, last, residual=h)[0], head, targets=y)


def profile():
    """Print where the time of a training step goes, with and without these kernels."""
    gpu = DEVICE == "cuda"
    B, T, C, V, n_layer, heads = (8, 1024, 768, 32768, 12, 12) if gpu else (1, 32, 64, 1024, 1, 2)
    dtype, where = (torch.bfloat16, "device") if gpu else (torch.float32, "cpu")
    x, y = torch.randint(V, (2, B, T), device=DEVICE)
    layer = [(C,), (3 * C, C), (C, C), (C,), (3 * C, C), (3 * C, C), (C, 3 * C)]
    for title, functions in (
            ("without", (plain_norm, plain_swiglu, plain_attention, plain_loss)),
            ("with", (rms_norm, swiglu, flash_attention, linear_cross_entropy))):
        torch.manual_seed(0)
        params = [(torch.randn(s) / s[1] ** 0.5 if s[1:] else torch.ones(s)).to(DEVICE, dtype)
                  .requires_grad_() for s in [(V, C), (V, C), (C,)] + layer * n_layer]
        means = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
        optimizer = torch.optim.AdamW(params, lr=1e-3)
        for t in (1, 2):  # the first compiles, and tries settings
            with torch.profiler.profile() if t == 2 else contextlib.nullcontext() as result:
                loss = step_loss(params, x, y, heads, *functions)
                loss.backward()
                if title == "with":
                    adamw_step(params, [p.grad for p in params], *means, t)
                else:
                    optimizer.step()
                optimizer.zero_grad()
                loss = loss.item()
        table = result.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=12,
                                            max_name_column_width=48)
        print(f"{title} these kernels, loss {loss:.4f}\n{table}")


# -----------------------------------------------------------------------------
# ptx: what the compiler makes of the kernels for an H100. It needs no GPU for that.

# types of arguments by name; the others are int32, or known to the compiler
TYPES = dict.fromkeys("q k v g o dk dv dq a c x y h residual weight total g_total dx logits "
                      "grad".split(), "*bf16") | {
    **dict.fromkeys("lse delta inverse partial losses scales lows".split(), "*fp32"),
    "scale": "fp32", "eps": "fp32", "targets": "*i64", "w": "*u8"}


def ptx():
    """Compile the kernels, and print what became of them."""
    if INTERPRETED:  # the compiler is to see the kernels, not the interpreter
        return subprocess.run([sys.executable, __file__, "ptx"],
                              env=os.environ | {"TRITON_INTERPRET": "0"}).returncode
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = [(kernel, {"D": D, "CAUSAL": True, "WINDOW": 0, "LENGTH": 4096})
               for D in (64, 128, 256)
               for kernel in (flash_forward, flash_backward_queries, flash_backward_keys)]
    kernels += [(matmul_kernel, {"scales": None, "ak": 1, "bn": 1}),
                (int8_kernel, {"ak": 1, "bk": 1, "BK": 64}), (int4_kernel, {"GROUP": GROUP}),
                (rms_norm_forward, {"BLOCK": 8192, "residual": None, "total": None}),
                (rms_norm_backward, {"BLOCK": 8192, "g_total": None}),
                (cross_entropy_kernel, {"BLOCK": 4096, "GRAD": True}),
                (swiglu_forward, {"BLOCK": 1024})]
    # numbers that do not fit into registers are spilled to a stack in memory
    row = "{:26}{:36}{:>10}{:>9}{:>11}{:>14}"
    print(row.format("kernel", "settings", "registers", "stack", "shared kB", "tensor cores"))
    for kernel, constants in kernels:
        fn, configs = kernel, [config(warps_for(constants.get("BLOCK", 0)))]
        if isinstance(kernel, triton.runtime.Autotuner):
            first = {"": torch.empty(0, dtype=torch.bfloat16)}
            fn, configs = kernel.fn, kernel.early_config_prune(kernel.configs, first, **constants)
        for setting in configs:
            known = constants | setting.kwargs
            types = TYPES | {"b": "*i8" if kernel is int8_kernel else "*bf16"}
            types = {name: "constexpr" if name in known else types.get(name, "i32")
                     for name in fn.arg_names}
            # as at run time, where Triton sees that addresses and sizes are multiples of 16
            aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in
                       enumerate(types.items()) if kind[0] == "*" or
                       kind == "i32" and name not in ("H", "group", "groups", "rows")}
            built = triton.compile(
                ASTSource(fn, types, known, aligned), target=GPUTarget("cuda", 90, 32),
                options={"num_warps": setting.num_warps, "num_stages": setting.num_stages})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                tool = os.path.join(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
                said = subprocess.check_output([tool, "-res-usage", file.name], text=True)
            code = built.asm["ptx"]
            cores = "wgmma" if "wgmma.mma" in code else "mma" if "mma.sync" in code else "-"
            shown = [f"{k}={v}" for k, v in known.items() if k in ("D", "BM", "BN", "BK", "BLOCK")]
            print(row.format(
                fn.__name__, " ".join(shown) + f" warps={setting.num_warps}",
                *re.search(r"REG:(\d+) STACK:(\d+)", said).groups(),
                built.metadata.shared // 1024, cores), flush=True)


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    commands = {"check": check, "bench": bench, "profile": profile, "ptx": ptx}
    parser = argparse.ArgumentParser(description="Triton kernels: check, bench, profile, ptx.")
    parser.add_argument("command", choices=commands, nargs="?", default="check")
    try:
        sys.exit(1 if commands[parser.parse_args().command]() else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as problem:
        print(f"kernels.py: error: {problem}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
