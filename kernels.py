"""
GPU kernels in Triton: the cost of a computation is moving its data.

    python kernels.py check      # every kernel against float64; without a GPU, in the interpreter
    python kernels.py bench      # on a GPU time, bandwidth, roofline beside PyTorch; else counts
    python kernels.py profile    # where a training step's time goes, with and without the kernels
    python train.py --kernels    # training with them

A GPU computes far faster than it reads: in the time that the memory of an H100 needs to deliver
one bfloat16 number, its tensor cores do some 600 operations. In eager PyTorch each operation reads
its inputs from memory and writes its output back. A fused kernel reads once, does everything in
registers, and writes once. To use a kernel in a project of your own, copy this file.

A launch starts many programs, each of which computes its own block of the output. A kernel gets
addresses of contiguous tensors, and is compiled anew for each value of a tl.constexpr argument. In
the comments: B batch, H heads, T queries, S keys, D head size, V vocabulary.
"""

import argparse
import math
import os
import re
import sys
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
if INTERPRETED:
    print("kernels.py: this is Triton's interpreter in place of a GPU: right, but very slow, and "
          "bfloat16 is computed in float32", file=sys.stderr)

def ready(*tensors, fit=True):
    """-> the tensors, contiguous and, in the interpreter, which multiplies bfloat16 wrongly, in
    float32 instead. Raises for shapes that do not fit, of which a kernel would read past the end,
    and for dtypes that differ or that it would round without a word."""
    if not fit:
        raise ValueError(f"shapes do not fit: {', '.join(str(tuple(x.shape)) for x in tensors)}")
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        raise TypeError(f"one dtype of float32, float16 and bfloat16 is needed, not {dtypes}")
    wrong = INTERPRETED and torch.bfloat16 in dtypes
    return [(x.float() if wrong else x).contiguous() for x in tensors]

def tuned(key, *settings):
    """Decorator: when a kernel first meets values of the arguments `key`, or a dtype, it is timed
    with each setting, and the fastest kept; those that need more shared memory than there is are
    passed over. A setting: warps (of 32 threads), loads in flight; BM, BN, BK of tiles. float32
    takes the last: no tensor core multiplies it exactly, and large tiles compile for a minute."""
    def choose(configs, args, **more):
        return configs[-1:] if next(iter(args.values())).dtype == torch.float32 else configs

    configs = [triton.Config(dict(zip(("BM", "BN", "BK"), sizes)), num_warps=warps,
                             num_stages=stages) for warps, stages, *sizes in settings]
    return triton.autotune(configs[:1] if INTERPRETED else configs, key,
                           prune_configs_by={"early_config_prune": choose})

def by_rows(kernel, x, *args, programs=None):
    """Launch one program for each row of x (..., n), or `programs` of them. A block is a row."""
    if x.numel():
        block = triton.next_power_of_2(x.shape[-1])
        kernel[(programs or x.numel() // x.shape[-1],)](
            x, *args, BLOCK=block, num_warps=min(32, max(4, block // 512)))

# ---- Softmax, the first warm-up: one program per row, which is read once and written once. Eager
# PyTorch, spelled out as exp(x - max) / sum, moves each row five times.

@triton.jit
def softmax_kernel(x, g, out, n, BLOCK: tl.constexpr):
    """out = softmax(x) or, with g the gradient of y = softmax(...) and x = y, the gradient y (g -
    sum(y g)); all (rows, n). One program a row; BLOCK: n or more."""
    row = tl.program_id(0).to(tl.int64)  # a row number times n can be more than 2^31
    i = tl.arange(0, BLOCK)  # a power of two, so the end of the row has to be masked
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf") if g is None else 0.0)
    v = v.to(tl.float32)
    if g is None:
        v = tl.exp(v - tl.max(v, 0))
        v = v / tl.sum(v, 0)
    else:
        d = tl.load(g + row * n + i, mask=i < n, other=0.0).to(tl.float32)
        v = v * (d - tl.sum(v * d, 0))
    tl.store(out + row * n + i, v.to(out.dtype.element_ty), mask=i < n)

class Softmax(torch.autograd.Function):
    """exp(x) / sum(exp(x)) over the last dimension. x: (..., n) -> (..., n). A program has a whole
    row in its registers: for n over 32,768 they spill to memory. y is saved."""

    @staticmethod
    def forward(ctx, x):
        (rows,) = ready(x)
        y = torch.empty_like(rows)
        by_rows(softmax_kernel, rows, None, y, x.shape[-1])
        ctx.save_for_backward(y)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable  # a second derivative is refused: it would be wrong
    def backward(ctx, g):
        (y,), (g,) = ctx.saved_tensors, ready(g)
        dx = torch.empty_like(y)
        by_rows(softmax_kernel, y, g, dx, y.shape[-1])
        return dx

softmax = Softmax.apply

# ---- Matrix product, the second warm-up: a program computes one tile of the result, along all K.
# Each number is loaded for a whole tile of results at once: (BM + BN) loads for BM BN products.

@triton.jit
def load_tile(base, row, rows, column, columns):
    """Rows `row` and columns `column` of a (rows, columns) matrix, zeros outside."""
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    return tl.load(base + at, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0)

@triton.jit
def store_tile(base, row, rows, column, columns, tile):
    """The reverse."""
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(base + at, tile.to(base.dtype.element_ty), mask=mask)

@tuned(["M", "N", "K"], (8, 3, 128, 256, 64), (8, 4, 128, 128, 64), (4, 4, 128, 64, 64),
       (4, 3, 64, 64, 32))
@triton.jit
def matmul_kernel(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b. a: (M, K); b: (K, N); c: (M, N). A program: one (BM, BN) tile of c."""
    # Row by row, the programs that run at one time would need all of b. In this order, 8 tiles
    # down and then one to the right, they share their tiles of a and of b in the L2 cache.
    columns, pid = tl.cdiv(N, BN), tl.program_id(0)
    top, inside = pid // (8 * columns) * 8, pid % (8 * columns)
    height = tl.minimum(tl.cdiv(M, BM) - top, 8)
    i = (top + inside % height) * BM + tl.arange(0, BM)
    j = inside // height * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x, y = load_tile(a, i, M, k, K), load_tile(b, k, K, j, N)
        acc = tl.dot(x, y, acc, input_precision="ieee")  # float32, not TF32
    store_tile(c, i, M, j, N, acc)

class MatMul(torch.autograd.Function):
    """a b for a: (M, K), b: (K, N), summed in float32. da = g b^T, db = a^T g."""

    @staticmethod
    def forward(ctx, a, b):
        x, y = ready(a, b, fit=a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0])
        (M, K), N = x.shape, y.shape[1]
        c = x.new_empty(M, N)
        matmul_kernel[lambda meta: (triton.cdiv(M, meta["BM"]) * triton.cdiv(N, meta["BN"]),)](
            x, y, c, M, N, K)
        ctx.save_for_backward(x, y)
        return c.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (a, b), (g,) = ctx.saved_tensors, ready(g)
        return matmul(g, b.T), matmul(a.T, g)

matmul = MatMul.apply

# ---- RMSNorm (Zhang & Sennrich 2019): eager PyTorch reads x for the mean, and once more to divide.

@triton.jit
def rms_norm_forward(x, weight, y, inverse, n, eps, BLOCK: tl.constexpr):
    """y = x / rms(x) * weight, x and y: (rows, n), weight: (n,); inverse = 1 / rms, (rows,)
    float32. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(v * v, 0) / n + eps)
    tl.store(inverse + row, r)
    w = tl.load(weight + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + row * n + i, (v * r * w).to(y.dtype.element_ty), mask=i < n)

@triton.jit
def rms_norm_backward(x, weight, inverse, g, dx, partial, rows, n, BLOCK: tl.constexpr):
    """dx = r g w - x r^3 mean(g w x) with r = 1 / rms; all (rows, n). The weight's gradient is a
    sum over rows: each program adds up its rows in one row of partial, (programs, n) float32, to
    be summed afterwards. Without atomic additions the result is the same every time."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    i = tl.arange(0, BLOCK)
    w = tl.load(weight + i, mask=i < n, other=0.0).to(tl.float32)
    dw, at = tl.zeros((BLOCK,), tl.float32), program.to(tl.int64) * n + i
    for row in range(program, rows, programs):
        v = tl.load(x + at, mask=i < n, other=0.0).to(tl.float32)
        d = tl.load(g + at, mask=i < n, other=0.0).to(tl.float32)
        r = tl.load(inverse + row)
        dw += d * v * r
        d = r * d * w - v * (r * r * r * (tl.sum(d * w * v, 0) / n))
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=i < n)
        at += programs * n
    tl.store(partial + program.to(tl.int64) * n + i, dw, mask=i < n)

class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: (..., n), weight: (n,) ->
    (..., n). x and the inverse of the root, one number a row, are saved."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h, weight = ready(x, weight, fit=weight.shape == x.shape[-1:])
        y, inverse = torch.empty_like(h), h.new_empty(x.shape[:-1], dtype=torch.float32)
        by_rows(rms_norm_forward, h, weight, y, inverse, x.shape[-1], eps)
        ctx.save_for_backward(h, weight, inverse)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x, weight, inverse), (g,) = ctx.saved_tensors, ready(g)
        n, rows, dx = x.shape[-1], inverse.numel(), torch.empty_like(x)
        partial = x.new_empty((min(rows, 512), n), dtype=torch.float32)  # some 4 a multiprocessor
        by_rows(rms_norm_backward, x, weight, inverse, g, dx, partial, rows, n,
                programs=len(partial))
        return dx, partial.sum(0), None

def rms_norm(x, weight, eps=1e-5):
    """See RMSNorm."""
    return RMSNorm.apply(x, weight, eps)

# ---- SwiGLU (Shazeer 2020): silu(gate) * up. Eager PyTorch keeps silu(gate) for the backward pass;
# here it is computed again, which costs nothing as long as memory is the bottleneck.

@triton.jit
def swiglu_kernel(a, b, g, y, da, db, n, BLOCK: tl.constexpr):
    """y = silu(a) b or, with g the gradient of y, da = g b silu'(a) and db = g silu(a), of n
    numbers. A program: BLOCK of them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(a + i, mask=i < n).to(tl.float32)
    v = tl.load(b + i, mask=i < n).to(tl.float32)
    s = tl.sigmoid(u)
    if g is None:
        tl.store(y + i, (u * s * v).to(y.dtype.element_ty), mask=i < n)
    else:
        d = tl.load(g + i, mask=i < n).to(tl.float32)
        tl.store(da + i, (d * v * s * (1 + u * (1 - s))).to(da.dtype.element_ty), mask=i < n)
        tl.store(db + i, (d * u * s).to(db.dtype.element_ty), mask=i < n)

class SwiGLU(torch.autograd.Function):
    """silu(gate) * up = gate * sigmoid(gate) * up, element by element. The inputs are saved."""

    @staticmethod
    def forward(ctx, gate, up):
        a, b = ready(gate, up, fit=gate.shape == up.shape)
        y, n = torch.empty_like(a), a.numel()
        swiglu_kernel[(triton.cdiv(n, 1024),)](a, b, None, y, None, None, n, 1024)
        ctx.save_for_backward(a, b)
        return y.to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (a, b), (g,) = ctx.saved_tensors, ready(g)
        da, db, n = torch.empty_like(a), torch.empty_like(b), a.numel()
        swiglu_kernel[(triton.cdiv(n, 1024),)](a, b, g, None, da, db, n, 1024)
        return da, db

swiglu = SwiGLU.apply

# ---- Cross-entropy over a vocabulary. The forward pass also writes the gradient, softmax - onehot:
# all it needs is at hand, and the logits (for V = 131,072 the largest tensor of all) need not be
# read a third time.

@triton.jit
def cross_entropy_kernel(logits, grad, targets, losses, V, scale, ignore_index,
                         BLOCK: tl.constexpr, GRAD: tl.constexpr):
    """losses = logsumexp(logits) - logits[target], (rows,), and with GRAD grad = (softmax(logits)
    - onehot) scale, (rows, V), maybe the logits themselves. A program: one row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != ignore_index
    logits += row * V
    grad += row * V
    # read first: if the gradient is written in place, another thread may soon do so
    at_target = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    # online: when a larger maximum comes, what was summed before shrinks by the difference
    m, total = -3e38, 0.0  # finite: -inf - -inf is no number
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = tl.load(logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, tl.max(v, 0))
        total = total * tl.exp(m - larger) + tl.sum(tl.exp(v - larger), 0)
        m = larger
    lse = m + tl.log(total)
    tl.store(losses + row, tl.where(counts, lse - at_target, 0.0))
    if GRAD:
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            v = tl.load(logits + i, mask=i < V, other=-float("inf")).to(tl.float32)
            d = tl.where(counts, (tl.exp(v - lse) - tl.where(i == target, 1.0, 0.0)) * scale, 0.0)
            tl.store(grad + i, d.to(grad.dtype.element_ty), mask=i < V)

class CrossEntropy(torch.autograd.Function):
    """Loss of logits x: (..., V) or, with a weight (V, C), of x weight^T for x: (..., C), `chunk`
    rows at a time. The gradients are saved."""

    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, reduction, chunk, grad):
        V, counts = x.shape[-1] if weight is None else len(weight), targets != ignore_index
        if (((targets < 0) | (targets >= V)) & counts).any():  # other memory would be read
            raise IndexError(f"a target is not in 0 to {V - 1}, nor ignore_index {ignore_index}")
        n = {"mean": max(1, int(counts.sum())), "sum": 1}[reduction]
        rows, w = ready(x.detach(), x if weight is None else weight,
                        fit=targets.shape == x.shape[:-1] and not targets.is_floating_point())
        rows, targets = rows.view(-1, x.shape[-1]), targets.long().contiguous().view(-1)
        losses = rows.new_empty(len(rows), dtype=torch.float32)
        dx = torch.empty_like(rows) if grad else rows
        dw = torch.zeros_like(w, dtype=torch.float32) if grad and weight is not None else None
        block = min(4096, triton.next_power_of_2(max(1, V)))
        for part in (slice(i, i + chunk) for i in range(0, len(rows), chunk)):
            logits, dlogits = rows[part], dx[part]
            if weight is not None:  # all there ever is of the logits: (chunk, V)
                logits = dlogits = rows[part] @ w.T
            cross_entropy_kernel[(len(logits),)](
                logits, dlogits, targets[part], losses[part], V, 1 / n, ignore_index, block, grad,
                num_warps=max(4, block // 256))
            if dw is not None:
                dw += dlogits.T @ rows[part]
                dx[part] = dlogits @ w
        ctx.save_for_backward(dx.view(x.shape) if grad else None, dw)
        return losses.sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = (d if d is None or g == 1 else d * g.to(d.dtype) for d in ctx.saved_tensors)
        return dx, dw, None, None, None, None, None

def cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    """Negative log-likelihood of the targets in nats: their mean, or "sum". logits: (..., V);
    targets: (...) int64. Targets of ignore_index do not count; with none that counts the loss is
    0. Raises IndexError for a target that is no id."""
    return CrossEntropy.apply(logits, None, targets, ignore_index, reduction,
                              max(1, targets.numel()), torch.is_grad_enabled())

def linear_cross_entropy(x, weight, targets, ignore_index=-100, reduction="mean", chunk=None):
    """cross_entropy(x @ weight.T, targets), of which the logits are never all in memory: they are
    made, and turned into gradients, `chunk` rows at a time (Wijmans et al. 2024; Hsu et al. 2024).
    x: (..., C), weight: (V, C), targets: (...) int64. chunk: by default so many rows that their
    logits take as much memory as x does, and at least 64."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # cast as for any product, but once for all chunks
        x, weight = (a.to(torch.get_autocast_dtype(kind)) for a in (x, weight))
    chunk = chunk or max(64, triton.next_power_of_2(max(1, x.numel() // max(1, len(weight)))))
    with torch.autocast(kind, enabled=False):
        return CrossEntropy.apply(x, weight, targets, ignore_index, reduction, chunk,
                                  torch.is_grad_enabled())

# ---- FlashAttention-2 (Dao 2023): softmax(q k^T scale) v without the (T, S) matrix ever in memory.
# While tiles of keys and values pass by, the softmax is kept up to date as larger scores come (an
# online softmax: m the maximum so far, l the sum). For the backward pass only the output and the
# logarithm of the sum, one number a row, are saved; the probabilities are computed again.
#
# Query i is at position i + S - T of the S keys. Causal: it sees keys up to its own position; with
# a window the last `window` of them. One that sees nothing has output 0, lse -3e38 and p 0.

def masked_scores(q, k, tile, causal, window, scale):
    """Scores of all queries and a slice of the keys; -inf where a query does not see a key."""
    T, S = q.shape[-2], k.shape[-2]
    queries, keys = (torch.arange(first, S, device=q.device) for first in (S - T, 0))
    distance = queries[:, None] - keys[tile]
    hidden = distance >= (math.inf if window is None else window)
    if causal:
        hidden |= distance < 0
    return (q @ k[..., tile, :].mT * scale).masked_fill(hidden, -math.inf)

class FlashAttentionTorch(torch.autograd.Function):
    """The algorithm in PyTorch, to be read before the kernels; for those, all queries at once are
    many programs. q: (B, H, T, D); k, v: (B, H, S, D) -> (B, H, T, D), all float32; also without
    H. Saved: these, and lse, the natural logsumexp of the scores: (B, H, T)."""

    @staticmethod
    def forward(ctx, q, k, v, causal=False, window=None, scale=None):
        ctx.options = causal, window, q.shape[-1] ** -0.5 if scale is None else scale
        o, m = torch.zeros_like(q), torch.full_like(q[..., :1], -3e38)  # -inf - -inf is no number
        l = torch.zeros_like(m)
        for tile in (slice(j, j + 64) for j in range(0, k.shape[-2], 64)):
            s = masked_scores(q, k, tile, *ctx.options)
            larger = torch.maximum(m, s.amax(-1, keepdim=True))
            p, shrink = torch.exp(s - larger), torch.exp(m - larger)
            l = l * shrink + p.sum(-1, keepdim=True)
            o = o * shrink + p @ v[..., tile, :]
            m = larger
        l.masked_fill_(l == 0, 1.0)
        o = o / l
        ctx.save_for_backward(q, k, v, o, (m + torch.log(l))[..., 0])
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        delta = (g * o).sum(-1, keepdim=True)  # equal to the sum over keys of p dp
        for tile in (slice(j, j + 64) for j in range(0, k.shape[-2], 64)):
            p = torch.exp(masked_scores(q, k, tile, *ctx.options) - lse[..., None])
            ds = p * (g @ v[..., tile, :].mT - delta) * ctx.options[2]
            dq += ds @ k[..., tile, :]
            dk[..., tile, :] = ds.mT @ q
            dv[..., tile, :] = p.mT @ g
        return dq, dk, dv, None, None, None

# The same in Triton. A mask is a range of distances between query and key, low to high - 1: low
# is 0 if causal, high the window, and else out of reach. A tile of q and its float32 accumulator
# stay in registers: BM x D x 6 bytes, 96 of 256 kB at BM = D = 128. Tiles of k and v are in shared
# memory: 2 stages x 2 x BN x D x 2 bytes, 64 of an H100's 228 kB at BN = 64. Backward needs more.

@triton.jit
def scores(qi, kj, row, column, T, S, scale, low, high):
    """Scores of queries from `row` on, qi: (BM, D), and keys from `column` on, kj: (BN, D), in
    base 2, which is what the hardware exponentiates; -inf where a query does not see a key."""
    s = tl.dot(qi, tl.trans(kj), input_precision="ieee") * (scale * 1.4426950408889634)
    BM: tl.constexpr = qi.shape[0]
    BN: tl.constexpr = kj.shape[0]
    first = row + S - T - column  # distance of the first query from the first key
    if (column + BN > S) | (first - BN + 1 < low) | (first + BM - 1 >= high):  # else all is seen
        j = tl.arange(0, BN)[None, :]
        distance = first + tl.arange(0, BM)[:, None] - j
        s = tl.where((column + j < S) & (distance >= low) & (distance < high), s, -float("inf"))
    return s

@tuned(["D"], (4, 3, 64, 64), (8, 3, 128, 64), (8, 3, 128, 128), (8, 2, 64, 64), (8, 2, 32, 32))
@triton.jit
def flash_forward(q, k, v, o, lse, scale, T, S, group, low, high, D: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):
    """o (B, H, T, D) and lse (B, H, T), the natural logsumexp of the scores. A program: BM queries
    of one head; group: heads of queries that share one of keys."""
    # long tiles first: with a causal mask the last queries have the most keys
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i, d, head = row + tl.arange(0, BM), tl.arange(0, D), tl.program_id(1).to(tl.int64)
    qi = load_tile(q + head * T * D, i, T, d, D)
    k += head // group * S * D  # (B, H / group, S, D): heads follow one another
    v += head // group * S * D
    m = tl.full((BM,), -3e38, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    start = tl.maximum(0, row + S - T - high + 1) // BN * BN  # the keys that some query sees
    stop = tl.minimum(S, row + BM + S - T - low)
    for column in range(start, stop, BN):
        j = column + tl.arange(0, BN)
        s = scores(qi, load_tile(k, j, S, d, D), row, column, T, S, scale, low, high)
        larger = tl.maximum(m, tl.max(s, 1))
        p, shrink = tl.exp2(s - larger[:, None]), tl.exp2(m - larger)
        l = l * shrink + tl.sum(p, 1)
        vj = load_tile(v, j, S, d, D)
        acc = tl.dot(p.to(vj.dtype), vj, acc * shrink[:, None], input_precision="ieee")
        m = larger
    l = tl.where(l == 0, 1.0, l)
    store_tile(o + head * T * D, i, T, d, D, acc / l[:, None])
    tl.store(lse + head * T + i, (m + tl.log2(l)) * 0.6931471805599453, mask=i < T)  # ln(2)

@triton.jit
def backward_tile(qi, kj, vj, gi, lse, delta, row, column, T, S, scale, low, high):
    """Probabilities of a tile, and the gradient of its scores / scale, both (BM, BN)."""
    s = scores(qi, kj, row, column, T, S, scale, low, high)
    p = tl.exp2(s - lse[:, None] * 1.4426950408889634)
    return p, p * (tl.dot(gi, tl.trans(vj), input_precision="ieee") - delta[:, None])

@tuned(["D"], (8, 2, 64, 64), (8, 2, 64, 128), (4, 2, 64, 32), (8, 2, 32, 32))
@triton.jit
def flash_backward_queries(q, k, v, o, g, lse, delta, dq, scale, T, S, group, low, high,
                           D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dq, (B, H, T, D), and delta, (B, H, T) float32: the sum over d of o g, which is the sum over
    keys of p dp. A program: BM queries, which stay, while keys and values pass by."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    i, d, head = row + tl.arange(0, BM), tl.arange(0, D), tl.program_id(1).to(tl.int64)
    qi, gi = load_tile(q + head * T * D, i, T, d, D), load_tile(g + head * T * D, i, T, d, D)
    oi = load_tile(o + head * T * D, i, T, d, D)
    lse_i = tl.load(lse + head * T + i, mask=i < T, other=0.0)
    delta_i = tl.sum(oi.to(tl.float32) * gi.to(tl.float32), 1)
    tl.store(delta + head * T + i, delta_i, mask=i < T)
    k += head // group * S * D
    v += head // group * S * D
    acc = tl.zeros((BM, D), tl.float32)
    start = tl.maximum(0, row + S - T - high + 1) // BN * BN
    stop = tl.minimum(S, row + BM + S - T - low)
    for column in range(start, stop, BN):
        j = column + tl.arange(0, BN)
        kj, vj = load_tile(k, j, S, d, D), load_tile(v, j, S, d, D)
        _, ds = backward_tile(qi, kj, vj, gi, lse_i, delta_i, row, column, T, S, scale, low, high)
        acc = tl.dot(ds.to(kj.dtype), kj, acc, input_precision="ieee")
    store_tile(dq + head * T * D, i, T, d, D, acc * scale)

@tuned(["D"], (8, 2, 64, 64), (4, 2, 64, 32), (4, 2, 32, 32), (8, 2, 32, 32))
@triton.jit
def flash_backward_keys(q, k, v, g, lse, delta, dk, dv, scale, T, S, group, low, high,
                        D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """dk and dv, (B, H / group, S, D). A program: BN keys and values, which stay, while the
    queries of all heads of their group pass by."""
    column, head = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    j, d = column + tl.arange(0, BN), tl.arange(0, D)
    kj, vj = load_tile(k + head * S * D, j, S, d, D), load_tile(v + head * S * D, j, S, d, D)
    dk_acc = tl.zeros((BN, D), tl.float32)
    dv_acc = tl.zeros((BN, D), tl.float32)
    start = tl.maximum(0, column - (S - T) + low) // BM * BM  # the queries that see some key
    stop = tl.minimum(T, column + BN - 1 - (S - T) + high)
    for h in range(head * group, head * group + group):
        for row in range(start, stop, BM):
            i = row + tl.arange(0, BM)
            qi, gi = load_tile(q + h * T * D, i, T, d, D), load_tile(g + h * T * D, i, T, d, D)
            lse_i = tl.load(lse + h * T + i, mask=i < T, other=0.0)
            delta_i = tl.load(delta + h * T + i, mask=i < T, other=0.0)
            p, ds = backward_tile(qi, kj, vj, gi, lse_i, delta_i, row, column, T, S, scale, low,
                                  high)
            dv_acc = tl.dot(tl.trans(p).to(gi.dtype), gi, dv_acc, input_precision="ieee")
            dk_acc = tl.dot(tl.trans(ds).to(qi.dtype), qi, dk_acc, input_precision="ieee")
    store_tile(dk + head * S * D, j, S, d, D, dk_acc * scale)
    store_tile(dv + head * S * D, j, S, d, D, dv_acc)

class FlashAttention(torch.autograd.Function):
    """As FlashAttentionTorch, by the kernels; k and v: (B, H / n, S, D), D: 16, 32 ... or 256."""

    @staticmethod
    def forward(ctx, q, k, v, causal=False, window=None, scale=None):
        fit = (k.shape == v.shape and q.ndim == k.ndim and q.shape[0] == k.shape[0] and
               q.shape[-1] == k.shape[-1] and q.shape[-3] % k.shape[-3] == 0)
        (q, k, v), dtype = ready(q, k, v, fit=fit and (window is None or window > 0)), q.dtype
        D, T, S, group = q.shape[-1], q.shape[-2], k.shape[-2], q.shape[-3] // k.shape[-3]
        ctx.sizes = (D**-0.5 if scale is None else scale, T, S, group, 0 if causal else -(2**30),
                     2**30 if window is None else window, D)
        o, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        flash_forward[lambda meta: (triton.cdiv(T, meta["BM"]), q.shape[:-2].numel())](
            q, k, v, o, lse, *ctx.sizes)
        ctx.save_for_backward(q, k, v, o, lse)
        return o.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (q, k, v, o, lse), (g,) = ctx.saved_tensors, ready(g)
        dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
        T, S, heads, kv_heads = *ctx.sizes[1:3], q.shape[:-2].numel(), k.shape[:-2].numel()
        flash_backward_queries[lambda meta: (triton.cdiv(T, meta["BM"]), heads)](
            q, k, v, o, g, lse, delta, dq, *ctx.sizes)
        flash_backward_keys[lambda meta: (triton.cdiv(S, meta["BN"]), kv_heads)](
            q, k, v, g, lse, delta, dk, dv, *ctx.sizes)
        return dq, dk, dv, None, None, None

def flash_attention(q, k, v, causal=True, window=None, scale=None):
    """softmax(q k^T scale) v in memory proportional to T. q: (B, H, T, D); k, v: (B, H / n, S, D),
    each serving n heads of queries -> (B, H, T, D). causal: query i sees keys up to i + S - T;
    window: only the last so many of them. scale: default 1 / sqrt(D). Any T and S; D up to 256."""
    D, scale = q.shape[-1], q.shape[-1] ** -0.5 if scale is None else scale
    if pad := max(16, triton.next_power_of_2(D)) - D:
        q, k, v = (F.pad(x, (0, pad)) for x in (q, k, v))
    return FlashAttention.apply(q, k, v, causal, window, scale)[..., :D]

def flash_attention_torch(q, k, v, causal=True, window=None, scale=None):
    """`flash_attention` in plain PyTorch, in float32."""
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return FlashAttentionTorch.apply(q.float(), k, v, causal, window, scale).to(q.dtype)

# ---- AdamW (Loshchilov & Hutter 2019): eager PyTorch moves a tensor about ten times, this kernel
# once. On paper GPT-2's 148 launches take 1.5 ms, its step of half a million tokens a second.

@triton.jit
def adamw_kernel(p, g, m, v, n, lr, rate, beta1, beta2, eps, decay, root, BLOCK: tl.constexpr):
    """One step for n numbers in place; p and g of one dtype, m and v float32. A program: BLOCK."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p + i, mask=i < n).to(tl.float32)
    d = tl.load(g + i, mask=i < n).to(tl.float32)
    first, second = tl.load(m + i, mask=i < n), tl.load(v + i, mask=i < n)
    first += (1 - beta1) * (d - first)
    second += (1 - beta2) * (d * d - second)
    x -= lr * decay * x + rate * first / (tl.sqrt(second) / root + eps)
    tl.store(p + i, x.to(p.dtype.element_ty), mask=i < n)
    tl.store(m + i, first, mask=i < n)
    tl.store(v + i, second, mask=i < n)

@torch.no_grad()
def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
               weight_decay=0.01):
    """One step of AdamW for lists of tensors, in place. params and grads of one dtype, the two
    running means in float32, params and means contiguous; step counts from 1."""
    rate, root = lr / (1 - betas[0] ** step), math.sqrt(1 - betas[1] ** step)  # means begin at 0
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        ready(m, v, fit=p.shape == g.shape == m.shape == v.shape and m.dtype == torch.float32 and
              all(x.is_contiguous() for x in (p, m, v)))
        g = ready(p, g)[1]
        adamw_kernel[(triton.cdiv(p.numel(), 1024),)](
            p, g, m, v, p.numel(), lr, rate, *betas, eps, weight_decay, root, 1024)

# ---- Products with quantized weights, in the formats of QuantizedLinear in model.py. The integers
# become numbers in registers, so that memory moves one byte for a weight, or half of one, not two.

@tuned(["N", "K"], (4, 4, 16, 64), (8, 3, 64, 128), (4, 5, 16, 32))
@triton.jit
def integer_kernel(x, w, scales, lows, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    """y = x w^T for x: (M, K) and the weights w that `int8_matmul`, or with lows `int4_matmul`,
    describes. A program: one (BM, BN) tile of y."""
    i = tl.program_id(1) * BM + tl.arange(0, BM)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    acc, groups = tl.zeros((BM, BN), tl.float32), tl.cdiv(K, 32)
    for group in range(0, groups):
        k = group * 32 + tl.arange(0, 32)
        xk = load_tile(x, i, M, k, K)
        if lows is None:
            wk = load_tile(w, j, N, k, K)
        else:  # of each byte the low half is an even k, the high half the odd one after it
            byte = load_tile(w, j, N, group * 16 + tl.arange(0, 16), groups * 16)
            at = j.to(tl.int64) * groups + group
            scale = tl.load(scales + at, mask=j < N, other=0.0)[:, None]
            low = tl.load(lows + at, mask=j < N, other=0.0)[:, None]
            wk = tl.interleave(byte & 15, byte >> 4) * scale + low
        acc = tl.dot(xk, tl.trans(wk.to(xk.dtype)), acc, input_precision="ieee")
    if lows is None:
        acc *= tl.load(scales + j, mask=j < N, other=0.0)[None, :]  # one for a column: at the end
    store_tile(y, i, M, j, N, acc)

class IntegerMatMul(torch.autograd.Function):
    """x (..., K) times integers (N, K): int8 without `low`, else int4. Such a model generates and
    is not trained: there is no backward pass, and PyTorch raises if it is asked for one."""

    @staticmethod
    def forward(ctx, x, weight, scale, low):
        N, K, groups = len(weight), x.shape[-1], triton.cdiv(x.shape[-1], 32)
        dtype, shapes = torch.int8, [(N, K), (N,)]
        if low is not None:
            dtype, shapes = torch.uint8, [(N, groups * 16), (N, groups), (N, groups)]
        parts = [a.contiguous() for a in (weight, scale, low) if a is not None]
        (rows,) = ready(x, fit=weight.dtype == dtype and [a.shape for a in parts] == shapes)
        M, y = x.shape[:-1].numel(), rows.new_empty(*x.shape[:-1], N)
        integer_kernel[lambda meta: (triton.cdiv(N, meta["BN"]), triton.cdiv(M, meta["BM"]))](
            rows, *parts, *([None] if low is None else []), y, M, N, K)
        return y.to(x.dtype)

def int8_matmul(x, weight, scale):
    """x @ (weight * scale[:, None]).T. x: (..., K); weight: (N, K) int8; scale: (N,) float32."""
    return IntegerMatMul.apply(x, weight, scale, None)

def int4_matmul(x, weight, scale, low):
    """x @ w.T with w = integer * scale + low, where each 32 numbers of a row share these two. x:
    (..., K); weight: (N, groups * 16) uint8, the first of each two integers of 0 to 15 in the low
    half of its byte; scale, low: (N, groups) float32, groups = K / 32 rounded up."""
    return IntegerMatMul.apply(x, weight, scale, low)

# ---- check: every kernel beside the same in PyTorch, in float64. bench: how far it is from the
# roofline (Williams et al. 2009): it takes at least the time that its bytes need at the memory's
# speed, and its operations at the processor's. profile: where a training step's time goes.

def plain_attention(q, k, v, causal=True, window=None):
    """As flash_attention."""
    if causal and not window and q.shape == k.shape:  # PyTorch's own kernels need no mask
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T, S = q.shape[2], k.shape[2]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T if causal else S)
    mask = mask.triu(S - T - window + 1) if window else mask
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

def cases(large, dtype=torch.float64, device=DEVICE):
    """Yield (kernel, function, the same in PyTorch, shapes of its inputs, FLOPs of the forward
    pass, of both passes). dtype: of the integers' values, for PyTorch."""
    def first_adamw_step(p, g):  # known in closed form: p (1 - lr decay) - lr g / |g|
        p, (m, v) = p.detach().clone(), torch.zeros(2, *p.shape, device=p.device)
        adamw_step([p], [g.detach()], [m], [v], step=1)
        return p

    for shape in ((32768, 1024), (32768, 8192)) if large else ((3, 3, 7), (3, 129), (5, 5000)):
        n, a = shape[-1], math.prod(shape)
        yield "softmax", softmax, partial(torch.softmax, dim=-1), [shape], 5 * a, 9 * a
        yield "swiglu", swiglu, lambda a, b: F.silu(a) * b, [shape, shape], 5 * a, 15 * a
        yield ("rms_norm", rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-5), [shape, (n,)],
               4 * a, 12 * a)
        yield ("adamw_step", first_adamw_step,
               lambda p, g: p * (1 - 1e-5) - 1e-3 * g / (g.abs() + 1e-8), [shape, shape])
    for N, C, V in ((8192, 2048, 32768), (8192, 2048, 131072)) if large else (
            (8, 24, 7), (100, 24, 129), (8, 24, 5000)):
        targets = torch.randint(V, (N,), device=device)
        targets[:2] = -100
        yield ("cross_entropy", partial(cross_entropy, targets=targets),
               partial(F.cross_entropy, target=targets), [(N, V)], 4 * N * V, 7 * N * V)
        yield ("linear_cross_entropy", partial(linear_cross_entropy, targets=targets),
               lambda x, w: F.cross_entropy(x @ w.T, targets), [(N, C), (V, C)], 2 * N * C * V,
               6 * N * C * V)
    for B, H, K, T, S, D, *mask in (  # K: heads of keys and values; mask: causal, window
            (4, 16, 16, 4096, 4096, 64, True, None), (1, 16, 16, 16384, 16384, 64, True, None),
            (4, 16, 16, 8192, 8192, 128, True, None)) if large else (
            (2, 2, 1, 70, 70, 16, True, None), (1, 2, 1, 199, 199, 64, True, None),
            (1, 2, 2, 65, 65, 80, False, None), (1, 1, 1, 37, 101, 32, True, None),
            (1, 2, 1, 101, 37, 24, True, None), (1, 1, 1, 150, 150, 128, True, 2),
            (1, 2, 1, 130, 190, 16, True, 70), (1, 1, 1, 33, 33, 256, True, None)):
        n = 4 * B * H * T * S * D / (1 + mask[0])  # a causal mask leaves half
        yield ("flash_attention", lambda *x: flash_attention(*x, *mask),
               lambda *x: plain_attention(*x, *mask),
               [(B, H, T, D), (B, K, S, D), (B, K, S, D)], n, 3.5 * n)
    for M, K, N in ((4096, 4096, 4096), (8192, 8192, 8192)) if large else (
            (1, 1, 1), (1200, 5, 300), (65, 33, 130), (5, 200, 17)):
        yield "matmul", matmul, torch.matmul, [(M, K), (K, N)], 2 * M * N * K, 6 * M * N * K
    for M, K, N in ((1, 4096, 14336), (16, 4096, 14336)) if large else (
            (1, 32, 1), (5, 70, 50), (70, 128, 64)):
        w8 = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
        w4 = torch.randint(256, (N, triton.cdiv(K, 32), 16), dtype=torch.uint8, device=device)
        scale, low = torch.rand(2, N, triton.cdiv(K, 32), device=device) + 0.5
        plain = partial(F.linear, weight=w8.to(dtype) * scale[:, :1].to(dtype))
        yield ("int8_matmul", partial(int8_matmul, weight=w8, scale=scale[:, 0]), plain, [(M, K)],
               2 * M * N * K)
        w = torch.stack((w4 & 15, w4 >> 4), -1).flatten(2) * scale[..., None] + low[..., None]
        plain = partial(F.linear, weight=w.to(dtype).flatten(1)[:, :K])
        yield ("int4_matmul", partial(int4_matmul, weight=w4.flatten(1), scale=scale, low=low),
               plain, [(M, K)], 2 * M * N * K)

def error_of(ours, plain, shapes, backward, dtype):
    """Largest error of output and gradients, relative to the largest number of each, or 0.01."""
    exact = [torch.randn(s).to(DEVICE, dtype).double().requires_grad_() for s in shapes]
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
    found, wanted = [ours(*inputs)], [plain(*exact)]
    if backward:
        g = torch.randn(wanted[0].shape).to(DEVICE, dtype)
        found += torch.autograd.grad(found, inputs, g.to(found[0].dtype))
        wanted += torch.autograd.grad(wanted, exact, g.double())
    if any(a.shape != b.shape or not a.isfinite().all() for a, b in zip(found, wanted)):
        return math.inf
    return max(((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-2)).item()
               for a, b in zip(found, wanted))

def check():
    """Compare all kernels with float64, print the errors -> number of failures."""
    torch.manual_seed(0)
    failures, start = 0, time.perf_counter()
    print("errors of output and gradients, relative to the largest number of each:")
    for name, ours, plain, shapes, *flops in cases(large=False):
        print(f"{name:21}{str(shapes[:2])[1:-1]:35}", end="", flush=True)
        for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)):
            error = error_of(ours, plain, shapes, len(flops) == 2, dtype)
            failures += error > limit
            print(f"{str(dtype)[6:]:>9}{error:8.1e}{' FAILED' * (error > limit)}", end="")
        print(flush=True)
    print(f"{failures} failures, {time.perf_counter() - start:.0f} s on {DEVICE}")
    return failures

def bench():
    """Print what each kernel has to move and to compute and, on a GPU, how fast it does."""
    gpu, half, time_of = DEVICE == "cuda", torch.bfloat16, triton.testing.do_bench  # milliseconds
    device = "cuda" if gpu else "meta"
    if gpu:
        x = torch.empty(2**30, device=device, dtype=torch.uint8)
        a = torch.randn(8192, 8192, device=device, dtype=half)
        memory, compute = 2 * x.numel() / time_of(x.clone), 2 * 8192**3 / time_of(lambda: a @ a)
        print(f"{torch.cuda.get_device_name()}: a copy moves {memory / 1e9:.2f} TB/s, a product "
              f"in bfloat16 does {compute / 1e9:.0f} TFLOP/s: the roofline")
    else:
        print("no GPU: these are the bytes and FLOPs of each kernel in bfloat16, not times")
    for name, ours, plain, shapes, *flops in cases(True, half, device):
        inputs = [torch.randn(s, device=device, dtype=half, requires_grad=True) for s in shapes]
        # backward: inputs and the output's gradient are read, the inputs' gradients written
        x, y = sum(x.nbytes for x in inputs), plain(*inputs).nbytes
        w = sum(w.nbytes for w in getattr(ours, "keywords", {}).values())
        for backward, n, b in zip((False, True), flops, (x + y + w, 3 * x + 2 * y + w)):
            print(f"{name} {str(shapes[:2])[1:-1]} forward{' + backward' * backward}: "
                  f"{b / 1e6:,.1f} MB, {n / 1e9:,.1f} GFLOP, {n / b:,.1f} FLOP/byte", flush=True)
            fast = gpu and torch.compile(plain, dynamic=False)  # for this size
            for rival, f in (("ours", ours), ("eager", plain), ("compiled", fast)) if gpu else ():
                def run():
                    with torch.set_grad_enabled(backward):
                        y = f(*inputs)
                        if backward:
                            torch.autograd.grad(y, inputs, torch.ones_like(y))
                ms = time_of(run)  # the first calls, which compile and try settings, are not timed
                print(f"    {rival:10}{ms:9.3f} ms{b / ms / 1e9:7.2f} TB/s{n / ms / 1e9:7.0f} "
                      f"TFLOP/s{max(b / memory, n / compute) / ms:6.0%} of roofline", flush=True)

def profile():
    """Print where the time of a training step of model.py goes, with and without these kernels."""
    import model as M
    gpu = DEVICE == "cuda"
    B, T, layers, C, V = (8, 1024, 12, 768, 32768) if gpu else (1, 32, 1, 64, 1024)
    x, y = torch.randint(V, (2, B, T), device=DEVICE)
    for title, M.kernels in ("without", None), ("with", sys.modules[__name__]):
        torch.manual_seed(0)
        model = M.Transformer(M.TransformerConfig(block_size=T, n_layer=layers, n_embd=C,
                                                  n_head=C // 64, vocab_size=V)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), fused=gpu)
        for _ in range(2):  # the first compiles, and tries settings
            with torch.profiler.profile() as result:
                with torch.autocast(DEVICE, torch.bfloat16, gpu):
                    if M.kernels:
                        loss = linear_cross_entropy(model(x, hidden=True), model.head.weight, y)
                    else:
                        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        print(f"{title} these kernels, loss {loss:.4f}\n" + result.key_averages().table(
            f"self_{'device' if gpu else 'cpu'}_time_total", 12, max_name_column_width=48))

def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    commands = {"check": check, "bench": bench, "profile": profile}
    parser = argparse.ArgumentParser(description="Triton kernels: check, bench, profile.")
    parser.add_argument("command", choices=commands, nargs="?", default="check")
    parser.error = lambda message: parser.exit(2, f"kernels.py: error: {message}\n")
    try:
        sys.exit(1 if commands[parser.parse_args().command]() else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head`: what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, KeyError, RuntimeError) as problem:
        sys.exit(f"kernels.py: error: {problem}")

if __name__ == "__main__":
    main()
