"""
Train a Transformer language model.

    python bpe.py && python train.py && python model.py     # the whole of it on a laptop's CPU
    python train.py --resume                                # go on where a run was stopped
    python train.py --init_from out/ckpt.pt --data data/mine --out_dir out-mine
    python train.py --eval_only --init_from out/ckpt.pt

Data is a folder with train.bin, val.bin and tokenizer.json, as bpe.py leaves it; nanoGPT's and
llm.c's .bin files do as well. A run leaves in --out_dir: ckpt.pt (all that is needed to sample, or
to go on), log.csv, and loss.png if matplotlib is installed. It can be stopped at any time, by
Ctrl-C, SIGTERM or the power cord: --resume goes on from the last checkpoint, and gives bit for bit
(on a CPU) the losses of a run that was never stopped.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import math
import mmap
import os
import signal
import sys
import time

import numpy as np
import torch

from bpe import Tokenizer
from model import (Linear, Transformer, TransformerConfig, count_flops, load_checkpoint,
                   pick_device, save_checkpoint, upcast)

# -----------------------------------------------------------------------------
# Loss.


def cross_entropy(logits, targets, ignore_index=-100, reduction="mean", z_loss=0.0):
    """Negative log-likelihood of the targets, in nats: their mean, or with reduction="sum" the
    sum. z_loss: weight of (log Z)^2, Z being the softmax's denominator, which keeps logits from
    drifting (Chowdhery et al. 2022). logits: (..., V); targets: (...) int64, of which ignore_index
    does not count; the loss is 0 if none does."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction}")
    valid = targets != ignore_index
    picked = logits.gather(-1, targets.masked_fill(~valid, 0)[..., None])[..., 0]
    log_z = torch.logsumexp(upcast(logits), -1)  # takes off the largest before it exponentiates
    losses = log_z - picked
    if z_loss:
        losses = losses + z_loss * log_z.square()
    total = losses.masked_fill(~valid, 0.0).sum()
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)


def distillation_loss(logits, teacher_logits, targets, temperature=1.0, ignore_index=-100):
    """Sum over tokens of KL(teacher || student), of both distributions at a temperature, times its
    square, which keeps the gradient's size (Hinton et al. 2015). Shapes as in `cross_entropy`."""
    log_p = torch.log_softmax(upcast(teacher_logits) / temperature, -1)
    log_q = torch.log_softmax(upcast(logits) / temperature, -1)
    losses = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * losses.masked_fill(targets == ignore_index, 0.0).sum()


def backward(model, batches, autocast, loss_fn=None, norms=None, head=None):
    """Add to the gradients those of the mean loss over all targets of several batches (gradient
    accumulation), and return that loss, a tensor.

    batches: list of (ids, targets). The sum is divided once by the number of all targets that
    count: a mean of the batches' means would give the tokens of a short batch more weight.
    loss_fn(logits, ids, targets): the sum of the loss over targets; default: cross_entropy.
    norms: a list, to which the squared gradient norm of each batch's own mean loss is added.
    head: a weight (V, C), with which kernels.py computes logits and loss, a piece at a time.
    """
    counts = [int((y != -100).sum()) for _, y in batches]
    total, loss = max(1, sum(counts)), torch.zeros((), device=batches[0][0].device)
    params = [p for p in model.parameters() if p.requires_grad]
    for (x, y), count in zip(batches, counts):
        if norms is not None:
            before = [0 if p.grad is None else p.grad.clone() for p in params]
        with autocast():
            if head is not None:
                import kernels
                hidden = model(x, hidden=True)
                part = kernels.linear_cross_entropy(hidden, head, y, reduction="sum")
            elif loss_fn:
                part = loss_fn(model(x), x, y)
            else:
                part = cross_entropy(model(x), y, reduction="sum")
        # what experts add is a mean over tokens, and no part of the loss that is reported
        (part / total + model.auxiliary_loss() * (count / total)).backward()
        loss += part.detach() / total
        if norms is not None:
            square = sum((p.grad - g).square().sum() for p, g in zip(params, before)
                         if p.grad is not None)
            norms.append(((total / max(1, count)) ** 2 * square).item())
    return loss


def gradient_noise_scale(small_norms, big_norms, small, big):
    """The batch size at which noise and signal in a gradient are equal, tr(covariance) / |g|^2:
    larger batches hardly make more progress per step (McCandlish et al. 2018).

    small_norms, big_norms: squared norms of mean gradients over `small` and `big` samples. As
    E|g_B|^2 = |g|^2 + tr(covariance) / B, the two give both unknowns. Returns it in the unit of
    small and big; infinity if no signal is seen above the noise."""
    small_mean, big_mean = sum(small_norms) / len(small_norms), sum(big_norms) / len(big_norms)
    signal = (big * big_mean - small * small_mean) / (big - small)
    noise = (small_mean - big_mean) / (1 / small - 1 / big)
    return noise / signal if signal > 0 else math.inf


# -----------------------------------------------------------------------------
# Optimizers.


class Optimizer(torch.optim.Optimizer):
    """What the optimizers below have in common. Each has a method `update` that changes those
    parameters of a group that have gradients. matrices_only: raise ValueError for others."""

    def __init__(self, params, matrices_only=False, **settings):
        super().__init__(params, settings)
        if matrices_only and any(p.ndim != 2 for g in self.param_groups for p in g["params"]):
            raise ValueError(f"{type(self).__name__} is for matrices: give the rest to AdamW")

    @torch.no_grad()
    def step(self, closure=None):
        """One update from the gradients. closure: recomputes the loss, which is returned."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            self.update([p for p in group["params"] if p.grad is not None], group)
        return loss

    def memory(self, p, *names):
        """The state of a parameter, a dict; at first zeros of its shape under these names."""
        if not self.state[p]:
            self.state[p] = {name: torch.zeros_like(p) for name in names}
        return self.state[p]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019).

    m <- beta1 m + (1 - beta1) g          a running mean of the gradient
    v <- beta2 v + (1 - beta2) g^2        and of its square
    p <- p - lr * decay * p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    All tensors of a group go through a line together (torch._foreach_*), on a GPU in one kernel
    in place of hundreds; fused: one of kernels.py for all lines. Equal to torch.optim.AdamW."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01,
                 fused=False):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.fused = fused

    def update(self, params, group):
        (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
        for p in params:
            state = self.memory(p, "m", "v")
            state["step"] = state.get("step", 0) + 1
        # a parameter that had no gradient at first has taken fewer steps than others
        for t in {self.state[p]["step"] for p in params}:
            ps = [p for p in params if self.state[p]["step"] == t]
            gs = [p.grad for p in ps]
            ms, vs = ([self.state[p][name] for p in ps] for name in "mv")
            if self.fused:
                import kernels
                gs = [g.contiguous() for g in gs]
                kernels.adamw_step(ps, gs, ms, vs, t, lr, (beta1, beta2), eps,
                                   group["weight_decay"])
                continue
            torch._foreach_mul_(ps, 1 - lr * group["weight_decay"])
            torch._foreach_lerp_(ms, gs, 1 - beta1)
            torch._foreach_mul_(vs, beta2)
            torch._foreach_addcmul_(vs, gs, gs, 1 - beta2)
            denominators = torch._foreach_sqrt(vs)
            torch._foreach_div_(denominators, math.sqrt(1 - beta2**t))
            torch._foreach_add_(denominators, eps)
            torch._foreach_addcdiv_(ps, ms, denominators, -lr / (1 - beta1**t))


class SGD(Optimizer):
    """Gradient descent with momentum: v <- momentum v + g + decay p; p <- p - lr v. Equal to
    torch.optim.SGD."""

    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, params, group):
        for p in params:
            v = self.memory(p, "v")["v"].mul_(group["momentum"])
            p.sub_(v.add_(p.grad.add(p, alpha=group["weight_decay"])), alpha=group["lr"])


def zeropower_newton_schulz(G, steps=5, eps=1e-7, dtype=torch.bfloat16):
    """About U V^T for matrices G = U S V^T: all singular values become roughly 1 (0.7 to 1.2),
    with nothing but matrix products (Jordan 2024; each step is a polynomial a x + b x^3 + c x^5
    whose coefficients raise small values fastest). G: (..., m, n) -> the same, of `dtype`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[-2] > G.shape[-1]
    X = G.to(dtype).mT if tall else G.to(dtype)  # X X^T shall be the smaller of the two products
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)  # no singular value above 1
    add_product = torch.addmm if X.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        A = X @ X.mT
        B = add_product(A, A, A, beta=b, alpha=c)
        X = add_product(X, B, X, beta=a)
    return X.mT if tall else X


class Muon(Optimizer):
    """Momentum, orthogonalized: every matrix moves by the same amount in all its directions, rare
    ones included (Jordan et al. 2024). For hidden matrices only; a matrix that is really several
    (fused Q, K, V) should be given in parts. Equal to torch.optim.Muon.

    m <- momentum m + (1 - momentum) g;  u = zeropower((1 - momentum) g + momentum m)
    p <- p - lr * decay * p - lr * scale * u

    adjust_lr_fn: the scale of (m, n): "original", sqrt(max(1, m / n)); "match_rms_adamw",
    0.2 sqrt(max(m, n)): steps as large as AdamW's, whose learning rate and decay then serve here,
    too (Liu et al. 2025). dtype: float32 where bfloat16 is slow."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5,
                 adjust_lr_fn="original", dtype=torch.bfloat16):
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError("adjust_lr_fn must be original or match_rms_adamw")
        super().__init__(params, True, lr=lr, weight_decay=weight_decay, momentum=momentum,
                         nesterov=nesterov, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
                         dtype=str(dtype))  # as text: for checkpoints

    def update(self, params, group):
        lr, momentum = group["lr"], group["momentum"]
        dtype = getattr(torch, group["dtype"].removeprefix("torch."))
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, ps in by_shape.items():  # all of a shape in one product
            gs, ms = [p.grad for p in ps], [self.memory(p, "m")["m"] for p in ps]
            torch._foreach_lerp_(ms, gs, 1 - momentum)
            us = torch._foreach_lerp(gs, ms, momentum) if group["nesterov"] else ms
            us = zeropower_newton_schulz(torch.stack(us), group["ns_steps"], dtype=dtype)
            scale = math.sqrt(max(1, shape[0] / shape[1]))
            if group["adjust_lr_fn"] == "match_rms_adamw":
                scale = 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(ps, 1 - lr * group["weight_decay"])
            torch._foreach_add_(ps, list(us.to(ps[0].dtype)), alpha=-lr * scale)


class SOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024).

    L <- b2 L + (1 - b2) G G^T and R <- b2 R + (1 - b2) G^T G are running means; the gradient is
    turned to their eigenvectors, Q_L^T G Q_R, where Adam's division by each entry's own size is
    closest to the right one; the step is turned back. Every precondition_frequency steps one power
    iteration and a QR decomposition bring the eigenvectors up to date. The first gradient only
    makes them, and moves nothing. For matrices; equal to the authors' own code."""

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01,
                 precondition_frequency=10):
        super().__init__(params, True, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         precondition_frequency=precondition_frequency)

    def update(self, params, group):
        (beta1, beta2), lr = group["betas"], group["lr"]
        for p in params:
            g, s = p.grad, self.state[p]
            if not s:
                s |= {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p),
                      "L": (1 - beta2) * (g @ g.T), "R": (1 - beta2) * (g.T @ g)}
                for side in "LR":  # eigenvectors, the largest eigenvalue's first
                    s["Q" + side] = torch.linalg.eigh(s[side])[1].flip(1)
                continue
            s["step"] += 1
            t, turned = s["step"], s["QL"].T @ g @ s["QR"]
            s["m"].mul_(beta1).add_(turned, alpha=1 - beta1)
            s["v"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
            step = s["QL"] @ (s["m"] / (s["v"].sqrt() + group["eps"])) @ s["QR"].T
            p.sub_(step, alpha=lr * math.sqrt(1 - beta2**t) / (1 - beta1**t))
            p.mul_(1 - lr * group["weight_decay"])
            s["L"].lerp_(g @ g.T, 1 - beta2)
            s["R"].lerp_(g.T @ g, 1 - beta2)
            if t % group["precondition_frequency"] == 0:
                m = s["QL"] @ s["m"] @ s["QR"].T  # out of the old basis, and into the new one
                for axis, side in enumerate("LR"):
                    Q = s["Q" + side]
                    order = torch.diag(Q.T @ s[side] @ Q).argsort(descending=True)
                    s["v"] = s["v"].index_select(axis, order)
                    s["Q" + side] = torch.linalg.qr(s[side] @ Q[:, order])[0]
                s["m"] = s["QL"].T @ m @ s["QR"]


def parameter_groups(model, weight_decay, mup=0):
    """Weight decay for matrices (embeddings among them), none for gains and biases.

    mup: the width at which the learning rate was found, to hold at this one, too (Yang et al.
    2022). Adam moves every weight by about the learning rate. A unit adds up its inputs' moves,
    which all go the way that the loss wants: from n inputs, n times as far. So matrices of n
    inputs learn mup / n times as fast, with the same decay. An embedding's row is one input."""
    params = [p for p in model.parameters() if p.requires_grad]
    scaled = {id(m.weight) for m in model.modules() if mup and isinstance(m, Linear)}
    groups = [{"params": [p for p in params if p.ndim >= 2 and id(p) not in scaled],
               "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    if mup:
        scale = mup / model.config.n_embd
        groups.append({"params": [p for p in params if id(p) in scaled],
                       "weight_decay": weight_decay / scale, "lr_scale": scale})
    return groups


def has_fast_bfloat16(device):
    """Whether matrix products in bfloat16 are faster than in float32: on NVIDIA's cards since
    Ampere, and CPUs with AMX or AVX-512 BF16. Elsewhere it is emulated, or not there."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return kind == "cpu" and fast


def make_optimizers(model, kind, learning_rate, weight_decay, betas, momentum, mup=0):
    """-> list of optimizers for all parameters of the model. mup: see `parameter_groups`.

    kind: adamw and sgd take all; muon and soap the hidden matrices, which map vectors to vectors,
    and AdamW what is left: embeddings, head and routers (their rows belong to tokens or experts,
    and each should move by its own frequency), gains and biases."""
    groups = parameter_groups(model, weight_decay, mup)
    if kind == "sgd":
        return [SGD(groups, learning_rate, momentum)]
    if kind == "adamw":
        return [AdamW(groups, learning_rate, betas)]
    hidden = {id(m.weight) for name, m in model.blocks.named_modules()
              if isinstance(m, Linear) and not name.endswith("router") and "filter" not in name}
    matrices = [p for p in model.parameters() if p.requires_grad and id(p) in hidden]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in hidden]
    if kind == "soap":
        first = SOAP(matrices, learning_rate, weight_decay=weight_decay)
    else:
        dtype = torch.bfloat16 if has_fast_bfloat16(matrices[0].device) else torch.float32
        first = Muon(matrices, learning_rate, weight_decay, momentum,
                     adjust_lr_fn="match_rms_adamw", dtype=dtype)
        if mup:  # its step has one size in all directions, and 1 / sqrt(n) that of Adam's
            scale = math.sqrt(mup / model.config.n_embd)
            first.param_groups[0] |= {"lr_scale": scale, "weight_decay": weight_decay / scale}
    return [first, AdamW(groups, learning_rate, betas)]


@torch.no_grad()
def clip_grad_norm(params, max_norm, eps=1e-6):
    """Scale all gradients by one factor so that together their norm is at most max_norm (0 or
    None: only measure). Returns the norm before, a tensor."""
    params = [params] if torch.is_tensor(params) else params
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    if max_norm:
        torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + eps), max=1.0))
    return norm


def get_lr(it, learning_rate, min_lr, warmup_iters, max_iters, schedule="cosine",
           decay_fraction=0.2):
    """Learning rate of step `it`, counted from 0: up in a straight line for warmup_iters, then
    down to min_lr at max_iters, by half a period of a cosine, or (wsd: warm-up, stable, decay; Hu
    et al. 2024) level, and straight down over the last decay_fraction of the steps; or constant.
    As in nanoGPT the first step has learning_rate / (warmup_iters + 1), not 0, and moves."""
    if schedule not in ("cosine", "wsd", "constant"):
        raise ValueError(f"schedule must be cosine, wsd or constant, not {schedule}")
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    if it >= max_iters:
        return min_lr
    if schedule == "wsd":
        share = min(1.0, (max_iters - it) / max(1, int(decay_fraction * max_iters)))
    else:
        progress = (it - warmup_iters) / max(1, max_iters - warmup_iters)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (learning_rate - min_lr) * share


def move_state(optimizers, device):
    """Move the state of optimizers, a list, to a device: to the CPU's memory between steps
    (`--offload optimizer`), so that on a GPU it and the activations need not fit at one time."""
    for state in (state for optimizer in optimizers for state in optimizer.state.values()):
        state |= {name: x.to(device) for name, x in state.items() if torch.is_tensor(x)}


# -----------------------------------------------------------------------------
# Data.


def open_bin(path):
    """A .bin (see bpe.py) -> (memory-mapped ids, header as int32 or None). Without a header it is
    nanoGPT's plain uint16. Raises ValueError or OSError."""
    header = np.fromfile(path, "<i4", 256)
    dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}.get(tuple(header[:2]))
    if dtype is None or len(header) < 256:
        dtype, header = "<u2", None
    offset = 0 if header is None else header.nbytes
    size = os.path.getsize(path) - offset
    if size % np.dtype(dtype).itemsize or not size:
        raise ValueError(f"{path} is no .bin with tokens: after the header it has {size:,} bytes")
    return np.memmap(path, dtype, "r", offset), header


def windows(data, starts, block_size, device="cpu"):
    """block_size ids from each start, and, as targets, the same shifted by one: two tensors
    (len(starts), block_size) of int64. Behind the end of the data ids are 0 and targets -100."""
    if isinstance(getattr(data, "base", None), mmap.mmap):
        # opened anew, or all pages ever read stay in memory
        data = np.memmap(data.filename, data.dtype, "r", data.offset)
    rows = np.full((len(starts), block_size + 1), -100, "i8")
    for row, start in zip(rows, starts):
        ids = data[start : start + block_size + 1]
        row[: len(ids)] = ids
    rows = torch.from_numpy(rows)
    pin = torch.device(device).type == "cuda"
    rows = (rows.pin_memory() if pin else rows).to(device, non_blocking=pin)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def check_ids(batches, vocab_size):
    """Raise ValueError where ids or targets, in a list of pairs, are none of the vocabulary's."""
    if (largest := max(int(torch.maximum(x, y).max()) for x, y in batches)) >= vocab_size:
        raise ValueError(f"the data holds the id {largest}, but the model's vocabulary has "
                         f"{vocab_size}")


@functools.lru_cache(maxsize=2)
def _window_order(n, block_size, seed, epoch):
    """The starts of an epoch's windows."""
    rng = np.random.default_rng((seed, epoch))
    first = int(rng.integers(min(block_size, n - block_size)))
    return first + block_size * rng.permutation((n - 1 - first) // block_size)


def get_batch(data, batch_size, block_size, device="cpu", step=None, seed=1337, rank=0,
              world_size=1):
    """Windows of data, (n,) ids -> ids and targets, two tensors (batch_size, block_size) of int64.

    step None: windows drawn at random. Else batch number `step` of a fixed order, which depends
    on the seed alone, so a run can be taken up at any step: each epoch is all windows, shuffled
    anew and from another offset. Raises ValueError if data is not longer than block_size."""
    if len(data) <= block_size:
        raise ValueError(f"block_size {block_size} is too long for data of {len(data):,} tokens")
    if step is None:
        starts = torch.randint(len(data) - block_size, (batch_size,)).tolist()
    else:  # the windows from number `at` on, counted through all epochs
        starts, epoch, at = [], 0, (step * world_size + rank) * batch_size
        while len(starts) < batch_size:
            order = _window_order(len(data), block_size, seed, epoch)
            starts += order[at : at + batch_size - len(starts)].tolist()
            epoch, at = epoch + 1, max(0, at - len(order))
    return windows(data, starts, block_size, device)


def evaluation_starts(data, block_size, most=None):
    """Where windows start that together are all of data; of more than `most`, that many."""
    starts = np.arange(0, len(data) - 1, block_size)
    if most and len(starts) > most:  # evenly spaced, without the last one, which may be shorter
        starts = starts[np.linspace(0, len(starts) - 2, most).astype(int)]
    return starts


@torch.no_grad()
def evaluate(model, data, batch_size, block_size, device, autocast, max_batches=None):
    """Mean loss in nats over fixed windows that together are all of data (or, of more than
    max_batches, that many evenly spaced), each predicted from its own beginning."""
    starts = evaluation_starts(data, block_size, max_batches and max_batches * batch_size)
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for i in range(0, len(starts), batch_size):
        x, y = windows(data, starts[i : i + batch_size], block_size, device)
        check_ids([(x, y)], model.config.vocab_size)
        with autocast():
            total += cross_entropy(model(x), y, reduction="sum").item()
        count += int((y != -100).sum())
    model.train(was_training)
    return total / max(1, count)


def open_data(folder, block_size):
    """A folder of bpe.py -> (train ids, val ids, text of tokenizer.json or None, vocabulary size
    or None, bytes of text per validation token or None). Raises ValueError."""
    paths = [os.path.join(folder, name) for name in ("train.bin", "val.bin")]
    for path in paths:
        if not os.path.exists(path):
            how = f" encode --tokenizer ... --input ... --out {folder}"
            raise ValueError(f"there is no {path}: python bpe.py"
                             f"{how if folder != 'data/stdlib' else ''} makes it")
    (train, _), (val, header) = opened = [open_bin(path) for path in paths]
    if len(train) <= block_size:
        raise ValueError(f"block_size {block_size} is too long for {paths[0]}, which has "
                         f"{len(train):,} tokens")
    if len(val) < 2:
        raise ValueError(f"{paths[1]} has one token: there is nothing to predict in it")
    tokenizer, vocab_size, path = None, None, os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                tokenizer = file.read()
            vocab_size = Tokenizer.from_json(tokenizer).vocab_size
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from None
    for path, (_, head) in zip(paths, opened):
        size = 0 if head is None else int(head[3])
        if head is not None and vocab_size not in (None, size):
            raise ValueError(f"{path} was made with a vocabulary of {size:,}, but the "
                             f"tokenizer.json beside it has {vocab_size:,}")
        vocab_size = size or vocab_size
    text_bytes = 0 if header is None else int(header[5:7].copy().view("<i8")[0])
    return train, val, tokenizer, vocab_size, text_bytes / len(val) or None


# -----------------------------------------------------------------------------
# The log of a run.

LOG = ("step", "tokens", "seconds", "loss", "val_loss", "val_bpb", "learning_rate", "grad_norm")


class Log:
    """What a run reports: lines on the terminal, by `say`, and the rows of log.csv, at `path`, of
    which a run that is taken up at step > 0 keeps those up to there. bytes_per_token: of the
    validation text, for bits per byte, or None."""

    def __init__(self, path, step, max_iters, tokens_per_step, bytes_per_token, say=print):
        self.path, self.max_iters, self.say = path, max_iters, say
        self.tokens_per_step, self.bytes_per_token = tokens_per_step, bytes_per_token
        self.rows, self.begin = [], time.perf_counter()
        if step and os.path.exists(path):
            with open(path, encoding="utf-8", newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if
                             0 < int(row.get("step") or 0) <= step]
            self.begin -= float(self.rows[-1]["seconds"]) if self.rows else 0.0
        self.pause(step)

    def pause(self, step):
        """Speed is counted anew from here: what came before was no training."""
        self.since, self.counted = time.perf_counter(), step

    def row(self, step, **values):
        """Add values to the row of a step."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step, "tokens": step * self.tokens_per_step,
                              "seconds": f"{time.perf_counter() - self.begin:.2f}"})
        self.rows[-1] |= values

    def train(self, step, loss, lr, norm, flops_per_token=0, peak=None):
        """After a step of training. peak: TFLOP/s of the device, to print the share in use."""
        rate = (step - self.counted) * self.tokens_per_step / (time.perf_counter() - self.since)
        minutes = (self.max_iters - step) * self.tokens_per_step / rate / 60
        mfu = f" | mfu {rate * flops_per_token / peak / 1e12:.1%}" if peak else ""
        self.say(f"step {step:6d}/{self.max_iters} ({step / self.max_iters:4.0%}) | "
                 f"loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {rate:,.0f} tok/s{mfu} | "
                 f"{minutes:.1f} min left")
        self.pause(step)
        self.row(step, loss=f"{loss:.6f}", learning_rate=f"{lr:.6g}", grad_norm=f"{norm:.4f}")

    def evaluation(self, step, loss):
        """After an evaluation."""
        self.row(step, val_loss=f"{loss:.6f}")
        text = f"step {step:6d} | val loss {loss:.4f} | perplexity {math.exp(min(loss, 700)):.2f}"
        if self.bytes_per_token:
            bits = loss / math.log(2) / self.bytes_per_token
            self.row(step, val_bpb=f"{bits:.6f}")
            text += f" | {bits:.4f} bits per byte"
        self.say(text)

    def write(self):
        """Write log.csv beside and rename it."""
        temporary = self.path + ".tmp"
        try:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, LOG, "", "ignore", lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            os.replace(temporary, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise

    def summary(self, step, ckpt, **more):
        """The last lines, to be read by scripts: a key and a value each."""
        last = self.rows[-1] if self.rows else {}
        if not last.get("val_loss"):
            return self.say(f"{ckpt} is already at step {step}: nothing to do for --max_iters "
                            f"{self.max_iters}")
        lines = {"val_loss": f"{float(last['val_loss']):.4f}"}
        if last.get("val_bpb"):
            lines["val_bits_per_byte"] = f"{float(last['val_bpb']):.4f}"
        lines |= more | {"tokens": step * self.tokens_per_step,
                         "seconds": f"{float(last['seconds']):.1f}", "ckpt": ckpt}
        self.say("\n" + "\n".join(f"{key}: {value}" for key, value in lines.items()))


def plot_log(path, rows):
    """loss.png, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = Figure().subplots()
    for name in ("loss", "val_loss"):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*points), label=name)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    axes.figure.savefig(path, dpi=120)


# -----------------------------------------------------------------------------
# The run.

ARCHITECTURE = [field.name for field in dataclasses.fields(TransformerConfig)]
# what cards can do in bfloat16 without sparsity, by their data sheets, in TFLOP/s
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}


def make_autocast(device, dtype):
    """-> (function that returns a context for the forward pass, name of the dtype)."""
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return functools.partial(torch.autocast, torch.device(device).type, torch.bfloat16,
                             enabled=dtype == "bfloat16"), dtype


@contextlib.contextmanager
def keep_on_cpu(autocast, pin_memory):
    """autocast's context, in which what the backward pass will need goes to the CPU's memory, and
    comes back for it (`--offload activations`)."""
    with autocast(), torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
        yield


def get_rng():
    """The states of torch's generators (data needs none: see `get_batch`)."""
    cuda = {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
    return {"cpu": torch.get_rng_state()} | cuda


def set_rng(states):
    """Restore what `get_rng` saved, as far as this machine has the devices."""
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in states["cuda"]])


def open_model(args, device):
    """The data, and the model from scratch, from a checkpoint, or from where a run was stopped.
    -> (model, checkpoint or None, train ids, val ids, text of tokenizer.json, bytes per token)
    Raises ValueError if they do not go together."""
    given = {name: getattr(args, name) for name in ARCHITECTURE if getattr(args, name) is not None}
    start = os.path.join(args.out_dir, "ckpt.pt") if args.resume else args.init_from
    if start == "scratch":
        block_size = given.get("block_size", TransformerConfig.block_size)
        train, val, tokenizer, vocab_size, bytes_per_token = open_data(args.data, block_size)
        if args.vocab_size and vocab_size and args.vocab_size < vocab_size:
            raise ValueError(f"--vocab_size {args.vocab_size} is below the data's {vocab_size}")
        # GPT-2's 50,257 to a multiple of 64, if nothing says what the ids are: as nanoGPT does
        given["vocab_size"] = args.vocab_size or vocab_size or 50304
        model = Transformer(TransformerConfig(**given)).to(device)
        if args.mup:  # or the first logits would differ with the width
            torch.nn.init.zeros_(model.head.weight)
        return model, None, train, val, tokenizer, bytes_per_token

    model, checkpoint = load_checkpoint(start, device)
    config, theirs = model.config, checkpoint.get("tokenizer")
    if model.quantized and not args.eval_only:
        raise ValueError(f"{start} is quantized: train the checkpoint that it was made from")
    config.dropout = given.pop("dropout", config.dropout)  # alone it can be another one now
    dataclasses.replace(config)  # raises ValueError if it is none
    for module in model.modules():
        name = "p" if isinstance(module, torch.nn.Dropout) else "dropout"
        if name in vars(module):
            setattr(module, name, config.dropout)
    for name, value in given.items():
        if getattr(config, name) != value:
            raise ValueError(f"{start} has {name} {getattr(config, name)}, not {value}")
    train, val, tokenizer, vocab_size, bytes_per_token = open_data(args.data, config.block_size)
    if tokenizer and theirs not in (None, tokenizer):
        raise ValueError(f"{start} was trained with another tokenizer than the one that "
                         f"{args.data} was made with")
    if vocab_size and vocab_size > config.vocab_size:
        raise ValueError(f"{args.data} has ids up to {vocab_size:,}, {start} only "
                         f"{config.vocab_size:,}")
    return model, checkpoint, train, val, tokenizer or theirs, bytes_per_token


def run(args):
    """Train (or evaluate) as the arguments say."""
    device = pick_device(args.device)
    cuda = torch.device(device).type == "cuda"
    autocast, dtype = make_autocast(device, args.dtype)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model, checkpoint, train_data, val_data, tokenizer, bytes_per_token = open_model(args, device)
    config, block_size = model.config, model.config.block_size
    path, log_path, plot_path = (os.path.join(args.out_dir, name)
                                 for name in ("ckpt.pt", "log.csv", "loss.png"))
    model.activation_checkpointing = args.activation_checkpointing
    model.use_kernels(args.kernels)
    if args.compile:
        model.compile()
    teacher = None
    if args.teacher:
        teacher, theirs = load_checkpoint(args.teacher, device)
        if teacher.config.vocab_size != config.vocab_size or (
                tokenizer and theirs.get("tokenizer") not in (None, tokenizer)):
            raise ValueError(f"{args.teacher} has another tokenizer than {args.data}")
        if teacher.config.block_size < block_size:
            raise ValueError(f"{args.teacher} has block_size {teacher.config.block_size}, less "
                             f"than {block_size}")

    step, best_val_loss = checkpoint["step"] if args.resume else 0, math.inf
    n = args.gradient_accumulation_steps
    tokens_per_step = args.batch_size * n * block_size
    log = Log(log_path, step, args.max_iters, tokens_per_step, bytes_per_token,
              functools.partial(print, flush=True))
    if args.eval_only:
        loss = evaluate(model, val_data, args.batch_size, block_size, device, autocast)
        return log.evaluation(checkpoint["step"] if checkpoint else 0, loss)

    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 (args.beta1, args.beta2), args.momentum, args.mup)
    for optimizer in optimizers:
        optimizer.fused = args.kernels
        if args.offload in ("optimizer", "both"):
            optimizer.register_step_pre_hook(lambda self, *_: move_state([self], device))
            optimizer.register_step_post_hook(lambda self, *_: move_state([self], "cpu"))
    if args.offload in ("activations", "both"):
        autocast = functools.partial(keep_on_cpu, autocast, cuda)
    if args.resume:
        best_val_loss = checkpoint["best_val_loss"]
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
                optimizer.load_state_dict(state)
            set_rng(checkpoint["rng"])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} can not be resumed: {error}") from None

    def loss_fn(logits, x, y):
        loss = cross_entropy(logits, y, reduction="sum", z_loss=args.z_loss)
        if teacher is None:
            return loss
        with torch.no_grad():
            taught = teacher(x)
        soft = distillation_loss(logits, taught, y, args.teacher_temperature)
        return (1 - args.teacher_weight) * loss + args.teacher_weight * soft

    plain = not (args.z_loss or teacher or config.logit_cap)  # all that the kernel's loss can do
    head = model.head.weight if args.kernels and plain else None

    def save():
        log.write()
        save_checkpoint(path, model, optimizers, step, best_val_loss, get_rng(), vars(args),
                        tokenizer)

    os.makedirs(args.out_dir, exist_ok=True)
    epochs = args.max_iters * tokens_per_step / len(train_data)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters | {len(train_data):,} "
          f"training tokens | {tokens_per_step:,} tokens per step | {epochs:.2f} epochs | "
          f"{device}, {dtype}", flush=True)
    card = torch.cuda.get_device_name(device) if cuda else ""
    peak = args.peak_flops or next((PEAK[name] for name in PEAK if name in card), None)
    flops_per_token = 3 * sum(count_flops(config).values())
    warmup_iters = args.max_iters // 20 if args.warmup_iters is None else args.warmup_iters
    small_norms, big_norms, stopped = [], [], []
    for number in (signal.SIGINT, signal.SIGTERM):  # finish the step, save, leave
        signal.signal(number, lambda number, frame: stopped.append(number))
    model.train()
    log.pause(step)
    while step < args.max_iters and not stopped:
        lr = get_lr(step, args.learning_rate, args.min_lr, warmup_iters, args.max_iters,
                    args.schedule, args.decay_fraction)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        batches = [get_batch(train_data, args.batch_size, block_size, device, i, args.seed)
                   for i in range(step * n, (step + 1) * n)]
        check_ids(batches, config.vocab_size)
        if args.noise_scale and n == 1:  # two sizes of batch: the halves, and the whole
            batches = [halves for x, y in batches for halves in zip(x.chunk(2), y.chunk(2))]
        loss = backward(model, batches, autocast, loss_fn,
                        small_norms if args.noise_scale else None, head).item()
        norm = clip_grad_norm(model.parameters(), args.grad_clip).item()
        big_norms.append(norm**2)
        if not math.isfinite(loss + norm):
            raise ValueError(f"at step {step + 1} the loss is {loss} and the gradient norm "
                             f"{norm}: try a smaller --learning_rate")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.update_router_bias()
        step += 1

        last_step = step == args.max_iters
        if step % args.log_interval == 0 or last_step or stopped:
            log.train(step, loss, lr, norm, flops_per_token, peak)
        if (step % args.eval_interval == 0 or last_step) and not stopped:
            val_loss = evaluate(model, val_data, args.batch_size, block_size, device, autocast,
                                None if last_step else args.eval_iters)
            best_val_loss = min(best_val_loss, val_loss)
            log.evaluation(step, val_loss)
            save()
            log.pause(step)
    if stopped:
        save()
        print(f"stopped after step {step}; --resume goes on from {path}", flush=True)
        sys.exit(130)
    plot_log(plot_path, log.rows)
    measured = {}
    if small_norms:
        scale = gradient_noise_scale(small_norms, big_norms, 1 / max(2, n), 1)
        measured["noise_scale_tokens"] = f"{scale * tokens_per_step:.0f}"
    log.summary(step, path, **measured)


# -----------------------------------------------------------------------------
# Command line.


def number(kind, low=0, high=math.inf):
    """A type for argparse: an int or a float from low to high, and finite."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # for argparse's own messages
    return read


def build_parser():
    """The command line. Architecture flags have no default here: see `open_model`."""
    whole, positive, real, share = number(int), number(int, 1), number(float), number(float, 0, 1)
    below_1 = number(float, 0, 0.999999)
    parser = argparse.ArgumentParser(description="Train a Transformer language model.")
    add = parser.add_argument_group("data and files").add_argument
    add("--data", default="data/stdlib", help="folder with train.bin, val.bin, tokenizer.json")
    add("--out_dir", default="out", help="folder for ckpt.pt and log.csv (default out)")
    add("--init_from", default="scratch", help="scratch (default), resume, or a checkpoint")
    add("--resume", action="store_true", help="go on with out_dir/ckpt.pt, by its run's flags")
    add("--eval_only", action="store_true", help="print the validation loss and stop")

    add = parser.add_argument_group("model (see TransformerConfig in model.py)").add_argument
    add("--vocab_size", type=positive, help="for .bin files without a tokenizer beside them")
    for field in dataclasses.fields(TransformerConfig)[1:]:
        how = dict(action="store_true") if field.type is bool else \
            dict(type=field.type, metavar="X")
        add(f"--{field.name}", default=None, **how,
            help=f"{field.metadata['help']} (default {field.default!r})")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive, default=8, help="sequences at a time (default 8)")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches a step (1)")
    add("--max_iters", type=positive, default=450, help="steps (default 450)")
    add("--learning_rate", type=real, default=3e-3, help="the highest (default 3e-3)")
    add("--min_lr", type=real, default=0.0, help="the last (default 0)")
    add("--warmup_iters", type=whole, help="steps up to the highest (default: a twentieth of all)")
    add("--schedule", choices=("cosine", "wsd", "constant"), default="wsd", help="default wsd: "
        "level, and at the end straight down")
    add("--decay_fraction", type=share, default=0.2, help="of the steps: wsd's end (default 0.2)")
    add("--optimizer", choices=("adamw", "muon", "soap", "sgd"), default="adamw", help="muon and "
        "soap: for hidden matrices, with adamw (the default) for the rest")
    add("--mup", type=whole, nargs="?", const=128, default=0, metavar="WIDTH", help="let the rate "
        "that is best at this n_embd (128 if none follows) be it at any with the same head size")
    add("--momentum", type=below_1, default=0.95, help="of muon and sgd (default 0.95)")
    add("--weight_decay", type=real, default=0.1, help="of matrices (default 0.1)")
    add("--beta1", type=below_1, default=0.9, help="of adamw's mean gradient (default 0.9)")
    add("--beta2", type=below_1, default=0.95, help="of adamw's mean square (default 0.95)")
    add("--z_loss", type=real, default=0.0, help="weight; PaLM's is 1e-4 (default 0)")
    add("--grad_clip", type=real, default=1.0, help="largest gradient norm; 0: any (default 1)")
    add("--teacher", metavar="CKPT", help="distillation: learn from its predictions as well")
    add("--teacher_weight", type=share, default=0.5, help="in the loss (default 0.5)")
    add("--teacher_temperature", type=number(float, 1e-6), default=1.0, help="default 1")
    add("--noise_scale", action="store_true", help="measure the batch size worth having; slower")

    add = parser.add_argument_group("evaluation and logging").add_argument
    add("--eval_interval", type=positive, default=100, help="steps; saves, too (default 100)")
    add("--eval_iters", type=whole, default=20, help="batches of val.bin; 0: all (default 20)")
    add("--log_interval", type=positive, default=10, help="steps (default 10)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of matrix "
        "products; auto: bfloat16 where the device is fast at it")
    add("--activation_checkpointing", action="store_true", help="less memory, more computation")
    add("--offload", choices=("none", "activations", "optimizer", "both"), default="none",
        help="what a GPU keeps in the CPU's memory meanwhile: slower, and the same losses")
    add("--kernels", action="store_true", help="the Triton kernels of kernels.py: for GPUs")
    add("--compile", action="store_true", help="torch.compile: pays on long runs")
    add("--peak_flops", type=real, help="of the device in TFLOP/s, for MFU")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1337, help="default 1337")
    return parser


def parse_args(parser, fresh=()):
    """The command line; for a run that is resumed its flags hold where none are given now, but for
    those named in `fresh`. Exits with code 2 for values that make no run."""
    args = parser.parse_args()
    if args.resume or args.init_from == "resume":
        saved = load_checkpoint(os.path.join(args.out_dir, "ckpt.pt"))[1].get("args") or {}
        skip = {"resume", "init_from", "out_dir", "eval_only", *ARCHITECTURE, *fresh}
        parser.set_defaults(**{k: saved[k] for k in saved if k in vars(args) and k not in skip})
        args = parser.parse_args()
        args.resume = True
    if args.mup and (args.tie_embeddings or args.optimizer in ("sgd", "soap")):
        parser.error("--mup is for adamw and muon, and a head of its own")
    if args.noise_scale and args.gradient_accumulation_steps == 1 and args.batch_size % 2:
        parser.error("--noise_scale needs an even --batch_size, or --gradient_accumulation_steps")
    return args


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    try:
        run(parse_args(build_parser()))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
