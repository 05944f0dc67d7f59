"""
Training on many processes, from collectives up.

    torchrun --nproc_per_node=2 ddp.py                    # data parallel: train.py, on 2 processes
    torchrun --nproc_per_node=2 ddp.py --scheme zero1     # or naive, flat, ddp, zero2, fsdp
    torchrun --nproc_per_node=4 ddp.py --tp 2             # 2 copies of a model split in 2
    torchrun --nproc_per_node=2 ddp.py --pp 2 --microbatches 4
    torchrun --nproc_per_node=2 ddp.py --sp 2             # each sequence split in 2
    torchrun --nproc_per_node=2 ddp.py --impl torch       # PyTorch's own DDP and FSDP2
    torchrun --nproc_per_node=2 ddp.py bench              # time, bytes and memory of each scheme
    python ddp.py plan --params 70e9 --gpus 1024          # what fits, and what it waits for

NCCL on GPUs, gloo on CPUs. Flags, files and losses are train.py's: a run can be resumed here on
another number of processes, or there; with --max_restarts 3 torchrun itself goes on after a
process has died. Several machines, each with 8 GPUs:

    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ddp.py

In comments: W processes, each with its rank; P bytes of parameters. What collectives cost, in bytes
sent by all ranks together: all-gather and reduce-scatter (W - 1) P, all-reduce, which is one of
each, 2 (W - 1) P.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while torch loads

import argparse
import contextlib
import csv
import datetime
import functools
import itertools
import math
import os
import sys
import threading
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import model as model_py
import train

# ---- Collectives of a group of processes (None: all of them). A single process needs no group.

def world(group=None):
    """Number of processes in a group; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1

def rank(group=None):
    """This process's number in a group."""
    return dist.get_rank(group) if dist.is_initialized() else 0

def flatten(tensors):
    """Numbers of several tensors, one after the other: (n,)"""
    return torch.cat([x.reshape(-1) for x in tensors])

def unflatten(flat, tensors):
    """Views into a flat tensor with the shapes of these."""
    return [x.view(t.shape) for x, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

def broadcast(tensors, group=None):
    """Overwrite the tensors of all ranks by those of the first."""
    if world(group) > 1:
        for x in tensors:
            dist.broadcast(x.detach(), group=group, group_src=0)

def all_reduce(x, group=None, op=dist.ReduceOp.SUM):
    """Sum (or maximum) over ranks, in place -> x."""
    if world(group) > 1:
        dist.all_reduce(x, op, group=group)
    return x

def all_gather(x, group=None, out=None):
    """Start to gather equally long parts of all ranks in `out`, one after the other: (n,) -> a
    function that waits for it and returns it, (W n,)"""
    out = x.new_empty(world(group) * len(x)) if out is None else out
    if world(group) == 1:
        out.copy_(x)
        return lambda: out
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # (old name)
    work = gather(out, x.contiguous(), group=group, async_op=True)

    def wait():
        work.wait()
        return out
    return wait

def reduce_scatter(x, sizes, group=None, dtype=None):
    """Start to sum x over ranks, of which rank r is to get the r-th part, sizes[r] numbers -> a
    function that waits for it and returns it. Gloo's own sends as much as an all-reduce; to
    exchange parts, and to sum up what comes (in this dtype), is the least that can be sent."""
    own, W = sizes[rank(group)], world(group)
    if W == 1:
        return lambda: x.to(dtype or x.dtype)
    parts = x.new_empty(W * own)
    work = dist.all_to_all_single(parts, x, [own] * W, sizes, group=group, async_op=True)

    def wait():
        work.wait()
        return parts.view(W, own).sum(0, dtype=dtype)
    return wait

class Collective(torch.autograd.Function):
    """forward(x), whose gradient is backward(g): the mirror image of a collective is another."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.mirror = backward
        return forward(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.mirror(g.contiguous()), None, None

# ---- Data parallel: every rank has the whole model and a part of the batch; gradients are averaged.

def fill_buckets(params, bucket_mb):
    """Parameters in groups of one dtype and about so many MB: 0, each alone; math.inf, all in one.
    The last come first, as in the backward pass."""
    buckets, room = [], -1
    for p in reversed([p for p in params if p.requires_grad]):
        if p.nbytes > room or p.dtype != buckets[-1][0].dtype:
            buckets.append([])
            room = bucket_mb * 2**20
        buckets[-1].append(p)
        room -= p.nbytes
    return buckets

class Buckets:
    """Groups of parameters whose gradients travel together. start(bucket) begins, and returns a
    function that waits and gives {parameter: gradient}. With `overlap` a bucket leaves as soon as
    its gradients are there, while the backward pass computes those of earlier layers. The order,
    and the number of messages, are the same on all ranks, whichever parameters a rank has used, or
    they would wait for one another."""

    def __init__(self, buckets, start, group=None, overlap=True):
        self.buckets, self.start, self.group, self.overlap = [], start, group, overlap
        self.add(buckets)

    def add(self, buckets):
        """Take in further buckets, ahead of those there are."""
        self.buckets = buckets + self.buckets
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        for p in itertools.chain(*buckets):
            p.register_post_accumulate_grad_hook(self._ready)
        self._begin()

    def _begin(self):
        self.missing, self.had, self.sent = [set(bucket) for bucket in self.buckets], set(), []

    def _ready(self, p):
        """The gradient of p is there: send what is complete, and was not sent before."""
        if self.overlap:
            self.missing[self.bucket_of[p]].discard(p)
            while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
                self._send(self.buckets[len(self.sent)])

    def _send(self, bucket):
        self.had.update(p for p in bucket if p.grad is not None)
        self.sent.append(self.start(bucket))
        for p in bucket:
            p.grad = None

    def finish(self):
        """Send what is left, and wait -> {parameter: reduced gradient}, for those that have got
        one on any rank. A bucket that has got more in another backward pass leaves once more."""
        for bucket in self.buckets[len(self.sent) :]:
            self._send(bucket)
        late = [any(p.grad is not None for p in bucket) for bucket in self.buckets]
        flags = [*late, *(p in self.had for p in self.bucket_of)]
        if world(self.group) > 1:
            device = next(iter(self.bucket_of)).device if self.bucket_of else "cpu"
            flags = torch.tensor(flags, dtype=torch.uint8, device=device)
            flags = all_reduce(flags, self.group, dist.ReduceOp.MAX).tolist()
        for bucket, again in zip(self.buckets, flags):
            if again:
                self._send(bucket)
        had = {p for p, some in zip(self.bucket_of, flags[len(late) :]) if some}
        result = {}
        for wait in self.sent:
            for p, g in wait().items():
                if p in had:
                    result[p] = result[p] + g if p in result else g
        self._begin()
        return result

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's own gradients."""
        before, self.overlap = self.overlap, False
        try:
            yield
        finally:
            self.overlap = before

def gradients(params):
    """Their gradients, 0 where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

def start_average(params, group=None):
    """Start to average gradients over ranks -> a function that waits: {parameter: gradient}"""
    flat, W = flatten(gradients(params)), world(group)
    work = dist.all_reduce(flat, group=group, async_op=True) if W > 1 else None

    def wait():
        if work:
            work.wait()
        return dict(zip(params, unflatten(flat.div_(W), params)))
    return wait

class DDP(nn.Module):
    """Wrap a module so that gradients become the mean over ranks.

        model = DDP(model); loss = ...; loss.backward(); model.finish_gradient_synchronization()

    bucket_mb: see `fill_buckets`; 0 is known as naive, math.inf as flat. overlap: see `Buckets`.
    Parameters without a gradient on any rank keep none; where only one rank has none, it counts as
    0. Use `with model.no_sync()` around the backward passes of a step but the last.
    """

    def __init__(self, module, bucket_mb=25.0, overlap=True, group=None):
        super().__init__()
        self.module = module
        broadcast([*module.parameters(), *module.buffers()], group)
        start = functools.partial(start_average, group=group)
        self.buckets = Buckets(fill_buckets(module.parameters(), bucket_mb), start, group, overlap)

    def finish_gradient_synchronization(self):
        """After the backward pass: wait until all gradients are the mean over ranks."""
        for p, g in self.buckets.finish().items():
            p.grad = g

    def no_sync(self):
        """A context in which backward passes only add to this rank's own gradients."""
        return self.buckets.no_sync()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

# ---- ZeRO (Rajbhandari et al. 2020): W copies of the same optimizer state are W - 1 too many.

class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of any class whose state is divided: each parameter has one owner, which alone
    keeps its state and updates it, and then sends it to the others (ZeRO-1).

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    Gradients can be averaged before by DDP; or by `reduce_gradients`, which gives each only to its
    owner, so that with the parameters that come back no more is sent than for DDP alone. With
    shard_gradients they leave in the backward pass, in buckets, and what a rank does not own it
    frees at once (ZeRO-2); `no_sync` as in DDP. state_dict() is this rank's part of the state.
    """

    def __init__(self, params, optimizer_cls, group=None, shard_gradients=False, bucket_mb=0.0,
                 **kwargs):
        self.group, self.owner, self.load = group, {}, [0] * world(group)
        self.shard_gradients, self.reduced = shard_gradients, False
        self.bucket_mb = bucket_mb if shard_gradients else math.inf
        self.buckets = Buckets([], self._start, group, shard_gradients)
        # has all parameters, but makes a state only of those that have gradients when it steps
        self.local = optimizer_cls(params, **kwargs)
        super().__init__(self.local.param_groups, self.local.defaults)
        self.param_groups, self.state = self.local.param_groups, self.local.state

    def add_param_group(self, param_group):
        """Take in further parameters; each goes to the rank that has the least so far."""
        super().add_param_group(param_group)
        params = [p for p in self.param_groups[-1]["params"] if p.requires_grad]
        for p in sorted(params, key=lambda p: -p.numel()):
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()
        self.buckets.add(fill_buckets(params, self.bucket_mb))

    def load_state_dict(self, state_dict):
        """Take up what state_dict() gave on this rank."""
        super().load_state_dict(state_dict)
        self.local.state, self.local.param_groups = self.state, self.param_groups  # (new ones)

    def _start(self, bucket):
        """Start to average the gradients of a bucket, each at its owner."""
        W = world(self.group)
        parts = [[p for p in bucket if self.owner[p] == r] for r in range(W)]
        sizes, own = [sum(p.numel() for p in part) for part in parts], parts[rank(self.group)]
        wait = reduce_scatter(flatten(gradients(itertools.chain(*parts))), sizes, self.group)
        return lambda: dict(zip(own, unflatten(wait() / W, own)))

    def reduce_gradients(self):
        """Average the gradients over ranks, each at its owner; all others are freed."""
        for p, g in self.buckets.finish().items():
            p.grad = g
        self.reduced = True

    def no_sync(self):
        """A context in which backward passes only add to this rank's own gradients."""
        return self.buckets.no_sync()

    @torch.no_grad()
    def step(self, closure=None):
        """Update own parameters, then take over those of the other ranks."""
        with torch.enable_grad():
            loss = closure() if closure else None
        if self.shard_gradients and not self.reduced:
            self.reduce_gradients()
        parts, self.reduced = {}, False
        for p, r in self.owner.items():  # all of an owner will travel together
            parts.setdefault((r, p.dtype), []).append(p)
            if r != rank(self.group):
                p.grad = None
        self.local.step()
        if world(self.group) > 1:
            flats = [flatten(part) for part in parts.values()]
            works = [dist.broadcast(flat, group=self.group, group_src=r, async_op=True)
                     for flat, (r, _) in zip(flats, parts)]
            for work, flat, (r, _), part in zip(works, flats, parts, parts.values()):
                work.wait()
                if r != rank(self.group):
                    torch._foreach_copy_(part, unflatten(flat, part))
        return loss

# ---- Fully sharded: no rank has a whole matrix but while it is used (ZeRO-3; Zhao et al. 2023).

def whole(p, x):
    """The whole of x, which is p or of its shape, if p is this rank's part of a parameter."""
    return p.to_whole(x) if hasattr(p, "to_whole") and x.shape == p.shape else x

class FSDP(nn.Module):
    """Wrap a module so that each rank keeps 1/W of the numbers of every Linear's and Embedding's
    weight, a flat tensor; other parameters are small, and stay whole, as in DDP. Linear and
    Embedding are any classes of these names, and what inherits from one.

    All matrices of a block (what is in a ModuleList; elsewhere a layer) are gathered just ahead of
    its forward pass and of its backward pass, and freed right after; those of the next one are
    already on their way while it computes. For the backward pass the graph keeps views of a matrix:
    they share a storage that is emptied and filled again.

    compute_dtype: bfloat16 or float16, of gathered matrices and their gradients; the parts stay as
    they are (float32 masters). parameters() are the parts: AdamW, which looks at each number by
    itself, works on them; Muon, which needs matrices, does not. Methods as in DDP.
    """

    def __init__(self, module, compute_dtype=None, group=None):
        super().__init__()
        self.module, self.compute_dtype, self.group = module, compute_dtype, group
        broadcast([*module.parameters(), *module.buffers()], group)
        lists = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        units, self.kept = {}, {}  # kept: gradients of earlier backward passes
        for name, layer in module.named_modules():
            kinds = {cls.__name__ for cls in type(layer).__mro__}
            p = layer._parameters.get("weight")
            # (nn.MultiheadAttention's output layer is not called: its weight is read)
            if getattr(p, "full_shape", () if p is None else p.shape)[1:] == () or not kinds & {"Linear", "Embedding"} or \
                    "NonDynamicallyQuantizableLinear" in kinds:
                continue
            root = next((".".join(name.split(".")[: outer.count(".") + 2])
                         for outer in lists if name.startswith(f"{outer}.")), name)
            if root not in units:
                units[root] = types.SimpleNamespace(
                    params=[], number=len(units), needed=False, in_backward=False)
                module.get_submodule(root).register_forward_hook(functools.partial(
                    lambda unit, *_: None if unit.in_backward else self._free(unit), units[root]))
            unit = units[root]
            unit.params.append(p)
            lookup = "Embedding" in kinds
            unit.needed |= not lookup
            if not hasattr(p, "shard"):  # (tied ones: once)
                self._shard(p)
                p.unit, p.lookup = unit, lookup
            p.lookup |= lookup
            layer.forward = functools.partial(self._run, unit, lookup, layer.forward)
        self.units = list(units.values())
        buckets = [[p for p in dict.fromkeys(unit.params) if p.unit is unit and p.requires_grad]
                   for unit in reversed(self.units)]
        buckets.append([p for p in module.parameters()
                        if p.requires_grad and not hasattr(p, "shard")])
        self.buckets = Buckets([b for b in buckets if b], self._start_reduce, group)

    def _shard(self, p):
        """Keep this rank's part of a matrix, ceil(n / W) numbers; the last is filled up with 0."""
        n, shape, W, group = p.numel(), p.shape, world(self.group), self.group
        p.to_part = lambda x: F.pad(x.detach().reshape(-1), (0, -n % W)).view(
            W, -1)[rank(group)].clone()
        p.to_whole = lambda x: all_gather(x.detach(), group)()[:n].view(shape)
        p.full_shape, p.shard, p.full, p.coming, p.ready = shape, p.to_part(p), None, None, False
        p.data = p.shard

    def _run(self, unit, lookup, forward, *args, **kwargs):
        """Call a Linear or an Embedding with its whole weight."""
        self._gather(unit, -1 if unit.in_backward else 1)  # (activation checkpointing: again)
        lower = self.compute_dtype not in (None, unit.params[0].shard.dtype)
        kind = unit.params[0].device.type
        with torch.autocast(kind, self.compute_dtype) if lower else contextlib.nullcontext():
            y = forward(*args, **kwargs)
        if y.requires_grad:
            y.register_hook(lambda g: self._before_backward(unit, lookup))
        return y

    def _before_backward(self, unit, lookup):
        """The gradient of a layer's output is there, and the matrix is needed for its input's; but
        for a lookup, whose input has none: there the shape is enough."""
        unit.in_backward = True
        if not lookup:
            return self._gather(unit, -1)
        for p in unit.params:
            if p.ndim == 1:  # (what is in there is not ready)
                p.full.untyped_storage().resize_(p.full.nbytes)
                p.data = p.full[: p.full_shape.numel()].view(p.full_shape)

    def _gather(self, unit, direction):
        """Make the matrices of a unit whole, and start with those of the next in this direction."""
        self._start_gather(unit, direction)
        for p in unit.params:
            if p.coming:
                p.coming()
                p.data = p.full[: p.full_shape.numel()].view(p.full_shape)
                p.coming, p.ready = None, True
        following = unit.number + direction
        if 0 <= following < len(self.units) and (direction > 0 or self.units[following].needed):
            self._start_gather(self.units[following], direction)

    def _start_gather(self, unit, direction):
        for p in unit.params:
            if p.ready or p.coming:
                continue
            dtype, kind = self.compute_dtype or p.shard.dtype, p.device.type
            if direction < 0 and p.full is not None:
                dtype = p.full.dtype
            elif torch.is_autocast_enabled(kind) and dtype == torch.float32 and not p.lookup:
                dtype = torch.get_autocast_dtype(kind)  # or the graph would keep a copy in this one
            x = p.shard.to(dtype)
            if p.full is None or p.full.dtype != dtype:
                p.full = x.new_empty(world(self.group) * len(x))
            p.full.untyped_storage().resize_(p.full.nbytes)
            p.coming = all_gather(x, self.group, p.full)

    def _free(self, unit):
        """Keep this rank's parts of a unit's matrices alone."""
        for p in unit.params:
            if p.coming:
                p.coming()
            p.coming, p.ready, p.data = None, False, p.shard
            if p.full is not None:
                p.full.untyped_storage().resize_(0)
        unit.in_backward = False

    def _start_reduce(self, bucket):
        """Start to average the gradients of a bucket, of which each rank gets its parts."""
        if not hasattr(bucket[0], "shard"):
            return start_average(bucket, self.group)
        W, rows = world(self.group), []
        for p in bucket:
            g = torch.zeros_like(p.shard if p.full is None else p.full) if p.grad is None else p.grad
            rows.append(F.pad(g.reshape(-1), (0, W * len(p.shard) - g.numel())).view(W, -1))
        flat, sizes = torch.cat(rows, 1).view(-1), [len(p.shard) for p in bucket]
        wait = reduce_scatter(flat, [sum(sizes)] * W, self.group, bucket[0].shard.dtype)
        self._free(bucket[0].unit)
        return lambda: dict(zip(bucket, (wait() / W).split(sizes)))

    def finish_gradient_synchronization(self):
        """After the backward pass: all gradients are means over ranks, those of matrices in parts."""
        with self.no_sync():
            pass
        for p, g in self.kept.items():
            p.grad = g
        self.kept = {}

    @contextlib.contextmanager
    def no_sync(self):
        """Whole gradients would have no room: they are reduced after all, and added up in parts."""
        yield
        grads = self.buckets.finish()
        for unit in self.units:
            self._free(unit)
        for p, g in grads.items():
            self.kept[p] = self.kept[p] + g if p in self.kept else g

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def gather_full_params(self):
        """{name: whole tensor} as the wrapped module's own state_dict() would be on one rank."""
        params = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: whole(params.get(name), x).clone()
                for name, x in self.module.state_dict().items()}

# ---- Tensor parallel (Shoeybi et al. 2019): every matrix is split. Of two in a row the first is
# split by columns (each rank computes some of the units), the second by rows (each rank sums over
# its units); only then are the sums added up: one all-reduce forward, and one backward.

def copy_to(x, group=None):
    """The same input for all ranks; its gradient is the sum of theirs."""
    return Collective.apply(x, lambda x: x.view_as(x), lambda g: all_reduce(g.clone(), group))

def sum_over(x, group=None):
    """The sum of all ranks' outputs; each has the gradient of the sum."""
    return Collective.apply(x, lambda x: all_reduce(x.clone(), group), lambda g: g)

def part_of(n, group=None, what="size"):
    """This rank's slice of n things. Raises ValueError if they can not be divided evenly."""
    W = world(group)
    if n % W:
        raise ValueError(f"{what} {n} can not be divided by {W} processes")
    return slice(rank(group) * n // W, (rank(group) + 1) * n // W)

def split_parameter(p, axis, group=None):
    """-> this rank's part of a parameter along an axis, a parameter. Raises ValueError."""
    W = world(group)
    part_of(p.shape[axis], group)
    to_part = lambda x: x.detach().chunk(W, axis)[rank(group)].clone()
    part = nn.Parameter(to_part(p))
    part.to_part, part.to_whole = to_part, lambda x: torch.cat(
        all_gather(x.detach().reshape(-1), group)().view(W, *x.shape).unbind(), axis)
    return part

class ColumnParallelLinear(nn.Module):
    """y = x W^T + b of which each rank computes d_out / W columns: (..., d_in) -> (..., d_out /
    W). weight, bias_value: parameters of the whole layer, which are cut; or random. copied: the
    input's gradient is summed over ranks elsewhere, once for several such layers."""

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None,
                 copied=False):
        super().__init__()
        self.group, self.copied, layer = group, copied, model_py.Linear(d_in, d_out, bias)
        bias = layer.bias if bias_value is None else bias_value
        self.weight = split_parameter(layer.weight if weight is None else weight, 0, group)
        self.bias = None if bias is None else split_parameter(bias, 0, group)

    def forward(self, x):
        x = x if self.copied else copy_to(x, self.group)
        return F.linear(x, self.weight, self.bias)

class RowParallelLinear(nn.Module):
    """y = x W^T + b of which each rank has d_in / W inputs: (..., d_in / W) -> (..., d_out)."""

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None):
        super().__init__()
        self.group, layer = group, model_py.Linear(d_in, d_out, bias)
        self.weight = split_parameter(layer.weight if weight is None else weight, 1, group)
        bias = layer.bias if bias_value is None else bias_value
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x):
        y = sum_over(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias

class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has n / W rows: ids of others give 0 here, and the sum is
    all ranks' together. (...) int64 -> (..., d)"""

    def __init__(self, n, d, group=None, weight=None):
        super().__init__()
        self.group, self.part = group, part_of(n, group, "vocabulary")
        weight = model_py.Embedding(n, d).weight if weight is None else weight
        self.weight = split_parameter(weight, 0, group)

    def forward(self, ids):
        mine = (ids >= self.part.start) & (ids < self.part.stop)
        x = F.embedding((ids - self.part.start).masked_fill(~mine, 0), self.weight)
        return sum_over(x * mine[..., None], self.group)

def vocab_parallel_cross_entropy(logits, targets, group=None, ignore_index=-100, z_loss=0.0):
    """Sum of the losses, where each rank has the logits of its own ids: (..., V / W). Only a
    maximum, a sum and the target's logit of each position travel. z_loss: as in train.py."""
    part = part_of(logits.shape[-1] * world(group), group)
    logits = model_py.upcast(logits)
    m = all_reduce(logits.detach().amax(-1), group, dist.ReduceOp.MAX)
    log_z = m + sum_over((logits - m[..., None]).exp().sum(-1), group).log()
    mine = (targets >= part.start) & (targets < part.stop)
    at = logits.gather(-1, (targets - part.start).masked_fill(~mine, 0)[..., None])[..., 0]
    losses = log_z - sum_over(at * mine, group) + z_loss * log_z.square()
    return losses.masked_fill(targets == ignore_index, 0.0).sum()

def split_tensors(model, group=None):
    """Make a Transformer tensor parallel, in place -> itself. Raises ValueError."""
    c = model.config
    if {*model.kinds} & {"latent", "hyena"}:
        raise ValueError("--tp is for attention with heads of their own: not latent, not hyena")
    for name in ("n_head", "n_kv_head", "d_ff", "vocab_size"):  # (heads must not be cut through)
        part_of(getattr(c, name), group, name)

    def split(parent, name, kind, **more):
        old = getattr(parent, name)
        setattr(parent, name, kind(*old.weight.shape[::-1], old.bias is not None, group, old.weight,
                                   old.bias, **more))

    def copy_input(module):  # one all-reduce for queries, keys and values, one for w1 and w3
        module.register_forward_pre_hook(lambda _, args: (copy_to(args[0], group), *args[1:]))

    for block in model.blocks:
        for part in (block.attn, *getattr(block.ffn, "experts", [block.ffn])):
            copy_input(part)
            for name, _ in list(part.named_children()):
                if name in ("q_proj", "k_proj", "v_proj", "w1", "w3"):
                    split(part, name, ColumnParallelLinear, copied=True)
                elif name in ("o_proj", "w2"):
                    split(part, name, RowParallelLinear)
        for p in (*block.attn.q_norm.parameters(), *block.attn.k_norm.parameters()):
            p.register_hook(lambda g: all_reduce(g.clone(), group))  # each rank's heads give a part
    model.embedding = VocabParallelEmbedding(c.vocab_size, c.n_embd, group, model.embedding.weight)
    split(model, "head", ColumnParallelLinear)
    if c.tie_embeddings:  # (both are cut by ids)
        model.head.weight = model.embedding.weight
    return model

# ---- Pipeline parallel: every rank has some of the layers, and a batch passes in pieces, so that all
# have something to do. GPipe (Huang et al. 2019) does all forward passes, then all backward
# passes; 1F1B (Narayanan et al. 2019) begins each backward pass as soon as it can, and keeps the
# activations of W pieces at most. Both wait (W - 1) / (pieces + W - 1) of the time.

def pipeline_step(stage, batches, loss_fn, group=None, schedule="1f1b", device="cpu"):
    """Forward and backward passes of several micro-batches through the stages of a group's ranks.

    stage: this rank's module. Where what it receives is not of the shape and dtype of x, its
    input_like(x) says what: an empty tensor. batches: list of (x, y), of which the first stage
    takes x and the last y. loss_fn(output, y): a micro-batch's share of the loss, in the last
    stage. Adds to gradients; under torch.no_grad() there are only forward passes. -> the sum of
    the losses, a tensor (on the last rank; 0 elsewhere). Raises ValueError.
    """
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"schedule is gpipe or 1f1b, not {schedule}")
    W, r = world(group), rank(group)
    like = getattr(stage, "input_like", torch.empty_like)
    under_way, sent, loss = [], [], torch.zeros((), device=device)

    def send(x, to):  # x must live until it has left
        sent.append((dist.isend(x := x.contiguous(), group=group, group_dst=to), x))

    def receive(x, source):
        dist.recv(x, group=group, group_src=source)
        return x

    # every rank is this many forward passes ahead of its backward passes
    ahead = len(batches) if schedule == "gpipe" else W - 1 - r
    for i in range(len(batches) + ahead):
        if i < len(batches):
            x, y = batches[i]
            x = receive(like(x), r - 1).requires_grad_() if r else x
            out = stage(x) if r < W - 1 else loss_fn(stage(x), y)
            if r < W - 1:
                send(out.detach(), r + 1)
            else:
                loss = loss + out.detach()
            under_way.append((x, out))
        if i >= ahead and torch.is_grad_enabled():
            x, out = under_way.pop(0)
            out.backward(receive(torch.empty_like(out), r + 1) if r < W - 1 else None)
            if r:
                send(x.grad, r - 1)
    for work, _ in sent:
        work.wait()
    return loss

class Skip(nn.Module):
    """A layer that another rank has."""

    def forward(self, x, *others):
        return x

def split_layers(model, group=None):
    """Leave a Transformer this rank's layers, in place -> itself. The first rank also keeps the
    embedding, and takes ids, the others (B, T, C); the last one keeps the head, and gives logits,
    the others (B, T, C). Raises ValueError."""
    c, W, r, p = model.config, world(group), rank(group), next(model.parameters())
    if c.activation == "moe" or c.n_layer < W:
        raise ValueError(f"--pp is for models without experts, and at least {W} layers")
    for i in range(c.n_layer):
        if not r * c.n_layer // W <= i < (r + 1) * c.n_layer // W:
            model.blocks[i] = Skip()
    if r > 0:
        model.input_like = lambda x: torch.empty(*x.shape, c.n_embd, dtype=p.dtype, device=p.device)
        model.embed, model.positions = lambda x, at: x, None
        if r < W - 1 or not c.tie_embeddings:  # (else it is the head, too)
            model.embedding = None
    if r < W - 1:
        model.logits, model.final_norm, model.head = lambda x: x, Skip(), None
    return model

def add_tied_gradients(model, group=None):
    """The first and the last rank of a pipeline have a copy of a tied embedding: both take the sum
    of their gradients."""
    W, r = world(group), rank(group)
    if W > 1 and r in (0, W - 1):
        g = model.embedding.weight.grad
        work, other = dist.isend(g.clone(), group=group, group_dst=W - 1 - r), torch.empty_like(g)
        dist.recv(other, group=group, group_src=W - 1 - r)
        work.wait()
        g += other

# ---- Sequence parallel: every rank has a part of each sequence. All parts of a model work on tokens
# one by one, but for attention: there keys and values go around in a ring, and each rank keeps an
# online softmax of what it has seen (Liu et al. 2023).

def rotate(tensors, group=None):
    """Send tensors to the next rank -> those of the one before."""
    W, r = world(group), rank(group)
    if W == 1:
        return tensors
    out = torch.empty_like(flat := flatten(tensors))
    ways = [dist.P2POp(dist.isend, flat, group=group, group_peer=(r + 1) % W),
            dist.P2POp(dist.irecv, out, group=group, group_peer=(r - 1) % W)]
    for work in dist.batch_isend_irecv(ways):
        work.wait()
    return unflatten(out, tensors)

def ring_scores(q, k, source, group, causal):
    """How q sees the keys of rank `source`: (..., T, T); None if all of them come later."""
    r = rank(group)
    if causal and source > r:
        return None
    s = q @ k.mT * q.shape[-1] ** -0.5
    if causal and source == r:
        later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, -math.inf)
    return s

class RingAttention(torch.autograd.Function):
    """See `ring_attention`; backward as in FlashAttention, with gradients that travel. Keys and
    values are (B, H / n, 1, T, D), all else (B, H / n, n, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, group, causal):
        W, r, kv = world(group), rank(group), (k, v)
        m, l, acc = torch.full_like(q[..., :1], -math.inf), 0.0, 0.0
        for step in range(W):
            s = ring_scores(q, kv[0], (r - step) % W, group, causal)
            if s is not None:
                larger = torch.maximum(m, s.amax(-1, keepdim=True))
                p, shrink = (s - larger).exp(), (m - larger).exp()
                m, l, acc = larger, l * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ kv[1]
            kv = rotate(kv, group) if step + 1 < W else kv
        ctx.group, ctx.causal, o = group, causal, acc / l
        ctx.save_for_backward(q, k, v, o, m + l.log())
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        W, r, delta = world(ctx.group), rank(ctx.group), (g * o).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for step in range(W):  # the gradients travel with their keys, and are home after W steps
            s = ring_scores(q, k, (r - step) % W, ctx.group, ctx.causal)
            if s is not None:
                p = (s - lse).exp()
                ds = p * (g @ v.mT - delta) * q.shape[-1] ** -0.5
                dq += ds @ k
                dk += (ds.mT @ q).sum(2, keepdim=True)
                dv += (p.mT @ g).sum(2, keepdim=True)
            k, v, dk, dv = rotate((k, v, dk, dv), ctx.group)
        return dq, dk, dv, None, None

def ring_attention(q, k, v, group=None, causal=True):
    """Attention over sequences of which each rank of a group has T consecutive positions, the
    first rank the first. q: (B, H, T, D); k, v: (B, H / n, T, D) -> (B, H, T, D). Exact; no rank
    ever has more than its own and one other rank's keys."""
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)
    with torch.autocast(q.device.type, enabled=False):
        y = RingAttention.apply(*(model_py.upcast(x) for x in (q, k, v)), group, causal)
    return y.flatten(1, 2).type_as(q)

def split_sequence(model, group=None):
    """Let a Transformer's attention reach all ranks' parts of a sequence, in place -> itself. To be
    called with this rank's `positions`. Raises ValueError."""
    if {*model.kinds} != {"full"} or model.config.dropout:
        raise ValueError("--sp is for full attention, without dropout")

    def forward(attn, x, where, cache=None):
        q, k, v = attn.heads(x, where.rotate)
        return attn.o_proj(ring_attention(q, k, v, group).transpose(-3, -2).flatten(-2))

    for block in model.blocks:
        block.attn.forward = functools.partial(forward, block.attn)
    return model

# ---- The training run: train.py's, on several processes.

SCHEMES = ("naive", "flat", "ddp", "zero1", "zero2", "fsdp")

def total(*numbers):
    """Sums over all ranks of Python's numbers."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return all_reduce(torch.tensor(numbers, dtype=torch.float64, device="cuda" if nccl else "cpu")).tolist()

def local(x):
    """What this rank has of a tensor of FSDP2, or the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x

class Parallel:
    """A Transformer on several processes, and its optimizers. Ranks of one copy of the model, tp,
    pp or sp of them, are neighbours; the same rank of all copies forms a group for data
    parallelism. Raises ValueError."""

    def __init__(self, model, args, device, autocast=contextlib.nullcontext):
        self.args, self.device, self.autocast, self.module = args, device, autocast, model
        n, W, zero = args.tp * args.pp * args.sp, world(), "zero" in args.scheme
        if n not in (args.tp, args.pp, args.sp) or W % n or args.dp not in (0, W // n):
            raise ValueError(f"{W} processes are dp x tp, dp x pp, or dp x sp")
        if n > 1 and (zero or args.scheme == "fsdp" or args.impl == "torch") or \
                args.impl == "torch" and args.scheme not in ("ddp", "fsdp"):
            raise ValueError("--tp, --pp, --sp go with --scheme naive, flat and ddp, --impl torch "
                             "alone with ddp and fsdp")
        if args.optimizer in ("muon", "soap") and (args.scheme == "fsdp" or args.tp > 1):
            raise ValueError("fsdp and --tp split the matrices that muon and soap need whole")
        self.dp, self.copy = W // n, rank() // n
        pieces = self.dp * (args.microbatches if args.pp > 1 else 1)
        if args.batch_size % pieces:
            raise ValueError(f"--batch_size, of all together, can not be divided by {pieces}")
        self.group = self.grads = None  # ranks of one copy; those that average their gradients
        if n > 1:
            make = dist.new_subgroups_by_enumeration
            self.group, _ = make([list(range(i, i + n)) for i in range(0, W, n)])
            if args.sp == 1:  # else all have the same parameters, and different tokens
                self.grads, _ = make([list(range(i, W, n)) for i in range(n)])

        # optimizers as one process has them; then their parameters are replaced by our parts
        self.optimizers = train.make_optimizers(
            model, args.optimizer, args.learning_rate, args.weight_decay, (args.beta1, args.beta2),
            args.momentum, args.mup)
        name_of = {p: name for name, p in model.named_parameters()}
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group in groups:
            group["names"] = [name_of[p] for p in group["params"]]
        self.positions = None
        if args.tp > 1:
            split_tensors(model, self.group)
        elif args.pp > 1:
            split_layers(model, self.group)
        elif args.sp > 1:
            mine = part_of(model.config.block_size, self.group, "block_size")
            self.positions = torch.arange(mine.start, mine.stop, device=device)[None]
            split_sequence(model, self.group)
        self.wrapped, own = model, args.impl == "own"
        if args.scheme == "fsdp":
            self.wrapped = FSDP(model) if own else fully_shard(model)
        elif not own and W > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=args.bucket_mb)
        elif zero:
            broadcast([*model.parameters(), *model.buffers()])
        elif world(self.grads) > 1:  # (of a pipeline's backward passes only the last may send)
            size = {"naive": 0, "flat": math.inf}.get(args.scheme, args.bucket_mb)
            self.wrapped = DDP(model, size, args.scheme == "ddp" and args.pp == 1, self.grads)
        self.params = dict(model.named_parameters())
        for group in groups:
            group["params"] = [self.params[name] for name in group["names"] if name in self.params]
        if zero:
            self.optimizers = [ShardedOptimizer(o.param_groups, type(o), None, args.scheme == "zero2",
                                                args.bucket_mb, **o.defaults) for o in self.optimizers]

    def loss_sum(self, logits, y):
        """Sum of the losses of this rank's part of a batch."""
        z_loss = self.args.z_loss if self.module.training else 0.0
        if self.args.tp > 1:
            return vocab_parallel_cross_entropy(logits, y, self.group, z_loss=z_loss)
        return train.cross_entropy(logits, y, reduction="sum", z_loss=z_loss)

    def losses(self, batches, scale):
        """Forward and (with gradients) backward passes of scale * loss -> its sum, on this rank."""
        if self.args.pp > 1:
            n = self.args.microbatches
            batches = [piece for x, y in batches for piece in zip(x.chunk(n), y.chunk(n))]
            with self.autocast():
                loss = pipeline_step(
                    self.module, batches, lambda logits, y: self.loss_sum(logits, y) * scale,
                    self.group, self.args.pp_schedule, self.device)
            return loss.item()
        loss, quiet = 0.0, getattr(self.wrapped, "no_sync", contextlib.nullcontext)
        if self.args.scheme == "zero2":
            quiet = self.optimizers_quiet
        for i, (x, y) in enumerate(batches):
            if self.args.sp > 1:
                x, y = (a.chunk(self.args.sp, 1)[rank(self.group)] for a in (x, y))
            with quiet() if i + 1 < len(batches) else contextlib.nullcontext():
                with self.autocast():
                    part = self.loss_sum(self.wrapped(x, positions=self.positions), y) * scale
                if torch.is_grad_enabled():
                    (part + self.module.auxiliary_loss() / len(batches)).backward()
            loss += part.item()
        return loss

    @contextlib.contextmanager
    def optimizers_quiet(self):
        """no_sync of all optimizers."""
        with contextlib.ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.no_sync())
            yield

    def backward(self, batches):
        """Gradients of the mean loss over all tokens of all ranks -> this rank's part of the loss,
        whose sum over ranks is the loss."""
        tokens = sum(y.numel() for _, y in batches) / self.args.sp  # the same on all ranks
        loss = self.losses(batches, 1 / tokens)
        if self.args.pp > 1 and self.module.config.tie_embeddings:
            add_tied_gradients(self.module, self.group)
        if hasattr(self.wrapped, "finish_gradient_synchronization"):
            self.wrapped.finish_gradient_synchronization()
        if "zero" in self.args.scheme:
            for optimizer in self.optimizers:
                optimizer.reduce_gradients()
        return loss * self.args.pp / world()

    @torch.no_grad()
    def clip(self, max_norm, eps=1e-6):
        """Clip all gradients by their norm together -> the norm before, a number."""
        grads, own, everyones = [], 0.0, 0.0  # squares, of what is on this rank alone, and on all
        tied = self.args.pp > 1 and rank(self.group) and self.module.config.tie_embeddings
        for name, p in self.params.items():
            if p.grad is not None:
                grads.append(local(p.grad))
                square = grads[-1].square().sum()
                if self.args.pp > 1 or "zero" in self.args.scheme or hasattr(p, "to_whole"):
                    own += 0 if tied and name == "embedding.weight" else square
                else:
                    everyones += square
        own = all_reduce(torch.as_tensor(own, device=self.device), self.group)
        norm = (own + everyones).sqrt()
        if max_norm and grads:
            torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
        return norm.item()

    def step(self):
        """Update the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, data, max_batches=0):
        """As train.evaluate, of windows that the copies of the model share."""
        c, n, loss, count = self.module.config, self.args.batch_size, 0.0, 0
        starts = np.arange(0, len(data) - 1, c.block_size)
        if max_batches and len(starts) > max_batches * n:
            starts = starts[np.linspace(0, len(starts) - 2, max_batches * n).astype(int)]
        # all ranks take part in all batches: in the last one some have windows without targets
        starts = np.pad(starts, (0, -len(starts) % n), constant_values=len(data))
        self.module.eval()
        for i in range(self.copy * n // self.dp, len(starts), n):
            x, y = train.windows(data, starts[i : i + n // self.dp], c.block_size, self.device,
                                 c.vocab_size)
            loss += self.losses([(x, y)], 1.0)
            count += int((y != -100).sum())
        self.module.train()
        loss, count = total(loss / self.args.tp, count / (world() // self.dp))
        return loss / count

    # Checkpoints are those of one process.

    @torch.no_grad()
    def full_state(self):
        """-> (state dict of the whole model, state dict of each optimizer as on one process); all
        ranks take part."""
        model = self.module.state_dict()  # (first: it puts FSDP2's parameters back into parts)
        params = dict(self.module.named_parameters(remove_duplicate=False))
        model = {name: whole(params.get(name), x) for name, x in model.items()}
        name_of = {p: name for name, p in self.params.items()}
        states = {name_of[p]: {key: whole(p, x) if torch.is_tensor(x) else x
                               for key, x in state.items()}
                  for optimizer in self.optimizers for p, state in optimizer.state.items()}
        if self.args.pp > 1 or "zero" in self.args.scheme and world() > 1:
            parts = [None] * world(self.group)
            own = model if self.args.pp > 1 else {}  # with ZeRO all ranks have the whole model
            dist.all_gather_object(parts, (own, states), group=self.group)
            for theirs, more in parts:
                model |= theirs
                states |= more
        optimizers = []
        for optimizer in self.optimizers:
            names = [name for group in optimizer.param_groups for name in group["names"]]
            groups = [group | {"params": [names.index(name) for name in group["names"]]}
                      for group in optimizer.param_groups]
            optimizers.append({"state": {i: states[name] for i, name in enumerate(names)
                                         if name in states}, "param_groups": groups})
        return model, optimizers

    def load_optimizers(self, saved):
        """Take this rank's part of the optimizers' state in a checkpoint."""
        for optimizer, theirs in zip(self.optimizers, saved, strict=True):
            names = [name for group in optimizer.param_groups for name in group["names"]]
            owner = getattr(optimizer, "owner", {})
            for i, state in theirs["state"].items():
                p = self.params.get(names[i])
                if p is not None and owner.get(p, rank()) == rank():
                    part = getattr(p, "to_part", lambda x: x.to(p.device))
                    optimizer.state[p] = {key: part(x) if torch.is_tensor(x) else x
                                          for key, x in state.items()}

def fully_shard(model):
    """PyTorch's FSDP2, whose parameters are given `to_whole` and `to_part`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    for part in (*model.blocks, model):
        fully_shard(part)
    for p in model.parameters():
        p.to_whole, p.to_part = type(p).full_tensor, functools.partial(
            distribute_tensor, device_mesh=p.device_mesh, placements=p.placements)
    return model

def setup(args):
    """Join the other processes -> this one's device. Raises ValueError."""
    device = torch.device(train.pick_device(args.device))
    if "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":  # else a world of one
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0))) if \
            device.type == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, number, W = next(dist.rendezvous("env://"))
        # after a restart the store may still have the addresses of those that have died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", store=store,
                                rank=number, world_size=W, timeout=datetime.timedelta(minutes=10))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's death, even by kill -9, is ours
        parent = os.getppid()

        def watch():
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    return device

def add_flags(add):
    """What ddp.py's command line has beside train.py's."""
    add("--scheme", choices=SCHEMES, default="ddp", help="data parallelism: naive, flat and ddp "
        "(in buckets, while the backward pass goes on) average gradients; zero1 divides the "
        "optimizer's state, zero2 gradients, too, fsdp parameters, too")
    add("--bucket_mb", type=float, default=25.0, help="of ddp, zero2 (default 25)")
    for name, default, text in (
            ("dp", 0, "copies of the model; 0: all that fit"), ("microbatches", 4, "of a pipeline"),
            ("tp", 1, "processes that share each matrix"), ("pp", 1, "... the layers"),
            ("sp", 1, "... each sequence")):
        add(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    add("--pp_schedule", choices=("gpipe", "1f1b"), default="1f1b", help="(default 1f1b)")
    add("--impl", choices=("own", "torch"), default="own", help="torch: its DDP, and FSDP2")

def run(words):
    """Train as train.py does, on all processes together."""
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser = train.build_parser("ddp.py")
    for each in (ours, parser):
        each.error = lambda message: fail(message, 2)
        add_flags(each.add_argument_group("processes").add_argument)
    mine, words = ours.parse_known_args(words)  # train.py, too, is to understand a checkpoint's words
    path = os.path.join(parser.parse_known_args(words)[0].out_dir, "ckpt.pt")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(path) and \
            train.load_checkpoint(path)[1]["args"] == words:
        words.append("--resume")  # torchrun --max_restarts starts all ranks again when one has died
    args, words, checkpoint = train.parse_args(parser, words)
    args = argparse.Namespace(**vars(args) | vars(mine))
    theirs = [name for name in ("teacher", "noise_scale", "kernels", "compile") if getattr(args, name)]
    if theirs or args.offload != "none":
        raise ValueError(f"--{theirs[0] if theirs else 'offload'}: that is train.py's alone")
    device, path = setup(args), os.path.join(args.out_dir, "ckpt.pt")
    say = print if rank() == 0 else lambda *text, **how: None
    torch.manual_seed(args.seed)  # all ranks begin with the same numbers
    torch.set_float32_matmul_precision("high")
    half = train.has_fast_bfloat16(device) if args.dtype == "auto" else args.dtype == "bfloat16"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, half)

    train_data, val_data, tokenizer, vocab_size, bytes_per_token = train.open_data(args.data)
    given = {k: getattr(args, k) for k in vars(model_py.TransformerConfig())
             if getattr(args, k) is not None}
    resumed, (model, saved) = bool(checkpoint), checkpoint or (None, {})
    if not resumed and args.init_from != "scratch":
        model, saved = train.load_checkpoint(args.init_from)
    if model is None:
        sizes = {"vocab_size": vocab_size or 50304} | given
        model = model_py.Transformer(model_py.TransformerConfig(**sizes))
        if args.mup:
            nn.init.zeros_(model.head.weight)
    model, config, n = model.to(device), model.config, args.gradient_accumulation_steps
    if wrong := [f"{k} {v}" for k, v in given.items() if v != getattr(config, k)]:
        raise ValueError(f"the checkpoint's model has not {', '.join(wrong)}")
    theirs = saved.get("tokenizer") or tokenizer
    if tokenizer and train.Tokenizer.from_json(theirs).vocab != \
            train.Tokenizer.from_json(tokenizer).vocab:
        raise ValueError(f"{args.data} was made with another tokenizer than the checkpoint's")
    if config.vocab_size > 2**16 and train_data.offset == 0:  # (no header: uint16)
        raise ValueError(f"{args.data} does not say that its ids are of {config.vocab_size:,}")
    model.activation_checkpointing = args.activation_checkpointing
    parallel = Parallel(model, args, device, autocast)
    if args.eval_only:
        return say(f"val loss {parallel.evaluate(val_data):.4f}", flush=True)

    # random numbers, for dropout: those of the ranks of the same run, or others for each copy
    step, rows, best, seconds, T, V = 0, [], math.inf, 0.0, config.block_size, config.vocab_size
    layout, stream = [world(), args.tp, args.pp], rank() if args.pp > 1 else parallel.copy
    log_path = os.path.join(args.out_dir, "log.csv")
    if resumed:
        step, best = int(saved["step"]), float(saved["best_val_loss"])
        parallel.load_optimizers(saved["optimizer"])
        with open(log_path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        seconds = float(rows[-1]["seconds"]) if rows else 0.0
    elif rank() == 0:
        os.makedirs(args.out_dir, exist_ok=True)
        if os.path.exists(path):
            os.rename(path, aside := f"{path[:-3]}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
            print(f"{path}, of another run, is now {aside}")
    if resumed and saved.get("layout", [1, 1, 1]) == layout:
        train.random_state(device, dict(saved.get("rngs", [saved["rng"]])[rank()]))
    elif stream or resumed:
        torch.manual_seed(args.seed + stream + 1_000_003 * step)
    warmup = args.max_iters // 20 if args.warmup_iters < 0 else args.warmup_iters
    tokens_per_step, b = args.batch_size * n * T, args.batch_size // parallel.dp
    say(f"dp {parallel.dp} x tp {args.tp} x pp {args.pp} x sp {args.sp} processes, {args.impl} "
        f"{args.scheme} | {tokens_per_step:,} tokens per step | {device}", flush=True)

    stopped, stop = [], 0  # by a signal to any process: finish the step, save, leave
    def on_signal(number, _):  # (Ctrl-C comes twice, from the terminal and from torchrun)
        stopped.append(number)
        if len(stopped) > 2:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    model.train()
    since, counted = time.perf_counter(), step
    while True:
        done = step >= args.max_iters
        due = done or (step > 0 and step % args.eval_interval == 0)
        if due and not stop and not (rows and rows[-1]["val_loss"] and int(rows[-1]["step"]) == step):
            loss = parallel.evaluate(val_data, 0 if done else args.eval_iters)
            best, bits = min(best, loss), loss / math.log(2) / (bytes_per_token or math.inf)
            say(f"step {step:6d} | val loss {loss:.4f}" + f" | {bits:.4f} bits per byte" * bool(bits),
                flush=True)
            if rows:
                rows[-1] |= {"val_loss": f"{loss:.6f}", "val_bpb": f"{bits:.6f}" * bool(bits)}
        if due or stop:
            (state, optimizers), rngs = parallel.full_state(), [None] * world()
            rngs[0] = train.random_state(device)
            if world() > 1:
                dist.all_gather_object(rngs, rngs[0])
            if rank() == 0:
                if not all(math.isfinite(x.norm()) for x in state.values()):
                    raise ValueError("weights are not finite; the checkpoint stays as it was")
                with model_py.replacing(log_path, "w", newline="") as file:
                    writer = csv.DictWriter(file, train.COLUMNS, extrasaction="ignore")
                    writer.writeheader()
                    writer.writerows(rows)
                model_py.save_checkpoint(
                    path, state, optimizers, config=config, step=step, best_val_loss=best,
                    args=words, rng=rngs[0], rngs=rngs, layout=layout, tokenizer=tokenizer)
            since, counted = time.perf_counter(), step
        if done or stop:
            break

        lr = train.get_lr(step, args.learning_rate, args.min_lr, warmup, args.max_iters,
                          args.schedule, args.decay_fraction)
        for group in (group for o in parallel.optimizers for group in o.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1.0)
        batches = [train.get_batch(train_data, b, T, device, i * parallel.dp + parallel.copy,
                                   args.seed, V) for i in range(step * n, (step + 1) * n)]
        loss, stop = total(parallel.backward(batches), len(stopped))
        norm = parallel.clip(args.grad_clip)
        if not math.isfinite(loss + norm):
            raise ValueError(f"at step {step + 1} the loss is {loss} and the gradient norm {norm}: "
                             "try a smaller --learning_rate")
        parallel.step()
        step += 1
        if not step % args.log_interval or not step % args.eval_interval or step == args.max_iters:
            now = time.perf_counter()
            rate, seconds = (step - counted) * tokens_per_step / (now - since), seconds + now - since
            left = (args.max_iters - step) * tokens_per_step / rate / 60
            say(f"step {step:6d}/{args.max_iters} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} "
                f"| {rate:,.0f} tok/s | {left:.1f} min left", flush=True)
            rows.append(dict(zip(train.COLUMNS, (step, step * tokens_per_step, f"{seconds:.2f}",
                                                 f"{loss:.6f}", "", "", f"{lr:.6g}", f"{norm:.4f}"))))
            since, counted = now, step
    if rank() == 0:
        train.plot_log(os.path.join(args.out_dir, "loss.png"), rows)
    say(f"{path}: step {step} of {args.max_iters}" + ", go on with --resume" * bool(stop))
    if stop:
        sys.exit(130)

# ---- bench: what the schemes send, take and keep on this machine.

def sent_bytes():
    """Bytes that went through the loopback interface so far: all that the processes of one machine
    sent each other. nan where the system does not tell."""
    with contextlib.suppress(OSError), open("/sys/class/net/lo/statistics/tx_bytes") as file:
        return int(file.read())
    return math.nan

def held(parallel):
    """MB of parameters, gradients and optimizer state on this rank."""
    params = list(parallel.module.parameters())
    states = [x for o in parallel.optimizers for s in o.state.values() for x in s.values()]
    return [sum(local(x).nbytes for x in tensors if torch.is_tensor(x)) / 1e6
            for tensors in (params, [p.grad for p in params], states)]

def bench(words):
    """Print tables of all-reduce and of each scheme."""
    parser = argparse.ArgumentParser("ddp.py bench", description="What the schemes cost here.")
    parser.error = lambda message: fail(message, 2)
    for name, default, text in (
            ("max_mb", 256, "largest of the all-reduces"), ("repeat", 7, "times each is timed"),
            ("n_embd", 256, "width of the model"), ("n_layer", 4, "layers of the model")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default {default})")
    args, device, flags = parser.parse_args(words), None, train.build_parser()
    add_flags(flags.add_argument)
    device, W = setup(flags.parse_args([])), world()
    if W == 1:
        raise ValueError("bench needs several: torchrun --nproc_per_node=2 ddp.py bench")
    say = print if rank() == 0 else lambda *text, **how: None

    def clock():
        """The time, when all processes are here."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    def seconds_of(actions):
        """Median time of actions that all processes begin together, one after the other."""
        times = [[(clock(), action(), clock()) for action in actions] for _ in range(args.repeat)]
        return [np.median([end - begin for begin, _, end in each]) for each in zip(*times)]

    say(f"{W} processes on {device}\n\nall-reduce, MB          ms    GB/s per rank", flush=True)
    for mb in (4**i for i in range(10) if 4**i <= args.max_mb):
        x = torch.ones(mb * 2**18, device=device)
        seconds, = seconds_of([lambda: dist.all_reduce(x)])
        say(f"{mb:14} {1e3 * seconds:11.2f} {2 * (W - 1) / W * x.nbytes / seconds / 1e9:16.2f}")

    config = model_py.TransformerConfig(vocab_size=2048, n_embd=args.n_embd, n_layer=args.n_layer)
    batch = torch.randint(2048, (2, 2, 256), device=device).unbind()
    names, steps, lines = [*SCHEMES, "torch ddp", "torch fsdp"], [], []
    for name in names:
        torch.manual_seed(0)
        model = model_py.Transformer(config).to(device)
        P = sum(p.nbytes for p in model.parameters())
        scheme = ["--scheme", name.split()[-1], "--impl", "torch" if " " in name else "own"]
        parallel = Parallel(model, flags.parse_args(["--bucket_mb", "4", *scheme]), device)
        memory = held(parallel)

        def step(parallel=parallel):
            parallel.backward([batch])
            parallel.step()

        step()  # the first one makes the optimizer's state
        parallel.backward([batch])
        memory += held(parallel)
        parallel.step()
        memory += held(parallel)
        before = (clock(), sent_bytes())[1]
        step()
        time.sleep(0.1)  # until the interface has counted all of it
        sent = ((clock(), sent_bytes())[1] - before) / P
        lines.append(f"{sent:9.2f}{(3 if 'fsdp' in name else 2) * (W - 1):8}P   "
                     + "".join(f"{x:8.1f}" for x in memory))
        steps.append(step)
    say("\nsent: by all ranks; MB of parameters, gradients and optimizer state: of one rank\n"
        f"{'scheme':14}{'ms a step':>10}{'sent, P':>9}{'formula':>9}{'MB at the start':>27}"
        f"{'before the step':>24}{'after it':>24}")
    for name, seconds, line in zip(names, seconds_of(steps), lines):
        say(f"{name:14}{1e3 * seconds:10.1f}{line}")

# ---- plan: the same on paper, for machines one does not have.

def estimate(params, tp, pp, scheme, a):
    """What a configuration needs, by formula -> (bytes of parameters, gradients, optimizer state
    and activations; seconds of a step: computation, communication, and how much of that has no
    computation to hide behind; share of the time that a pipeline waits; layers L; their width h).

    The model has h = 128 L, and 12 L h^2 parameters. In bytes per parameter: 2 for bfloat16, 2 for
    its gradient, 12 for the optimizer (float32 weights and the two means of Adam). Activations of
    a layer take some 34 h bytes per token (Korthikanti et al. 2022), or with checkpointing the 2 h
    of its input.
    """
    L = max(1, round((params / (12 * 128**2)) ** (1 / 3)))
    h = math.sqrt(params / (12 * L))
    own, dp = params / (tp * pp), a.gpus // (tp * pp)  # parameters of a rank's part; copies
    divided = ("ddp", "zero1", "zero2", "fsdp").index(scheme)  # how many of the three kinds
    memory = [2 * own / (dp if divided > 2 else 1), 2 * own / (dp if divided > 1 else 1),
              12 * own / (dp if divided > 0 else 1)]
    if scheme == "fsdp":  # two layers at a time are whole
        memory[0] += 2 * 2 * 12 * h * h / tp
    tokens = a.batch_tokens / dp  # of a copy of the model, in a.microbatches pieces
    alive = min(a.microbatches, pp)  # pieces under way in 1F1B
    memory.append(alive * tokens / a.microbatches * L / pp * (2 if a.checkpoint else 34) * h / tp)
    bubble = (pp - 1) / (a.microbatches + pp - 1)
    compute = 6 * params * a.batch_tokens / (a.gpus * a.tflops * 1e12 * a.mfu) / (1 - bubble)
    compute *= 4 / 3 if a.checkpoint else 1
    fast, slow = a.node_gbs * 1e9, a.net_gbs * 1e9  # bytes/s inside a machine, and between them
    rounds = 3 if scheme == "fsdp" else 2
    comm = rounds * 2 * own * (dp - 1) / dp / (fast if a.gpus <= a.node else slow)
    comm += 4 * L / pp * 2 * tokens * h * 2 * (tp - 1) / tp / (fast if tp <= a.node else slow)
    # gradients leave during the backward pass, two thirds of the computation
    exposed = max(0.0, comm - 2 / 3 * compute)
    return memory, (compute, comm, exposed), bubble, L, h

def plan(words):
    """Print memory and time of each way to divide a model and its batch among GPUs."""
    parser = argparse.ArgumentParser("ddp.py plan", description="What fits, and what waits.")
    parser.error = lambda message: fail(message, 2)
    for name, default, text in (
            ("params", 7e9, "of the model"), ("gpus", 64, "in all"), ("gpu_gb", 80.0, "memory of one"),
            ("tflops", 989.0, "of one; an H100's"), ("mfu", 0.4, "share of that in practice"),
            ("node", 8, "GPUs in a machine"), ("node_gbs", 450.0, "GB/s of a GPU inside one"),
            ("net_gbs", 50.0, "GB/s of a GPU between machines"),
            ("batch_tokens", 4e6, "of a step"), ("microbatches", 16, "of a pipeline")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{text} (default {default:g})")
    parser.add_argument("--checkpoint", action="store_true", help="activation checkpointing")
    a = parser.parse_args(words)
    *_, L, h = estimate(a.params, 1, 1, "ddp", a)
    print(f"{a.params:.3g} parameters (about {L} layers of width {h:.0f}), {a.gpus} GPUs of "
          f"{a.gpu_gb:g} GB, {a.batch_tokens:.3g} tokens a step\n\nscheme      dp  tp  pp  GB:  "
          "params   grads   optim   activ   total   s: compute    comm exposed  bubble")
    for tp, pp, scheme in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), SCHEMES[2:]):
        # (with pipelines gradients and weights would travel for every piece)
        if tp > a.node or a.gpus % (tp * pp) or pp > L or pp > 1 and scheme in ("zero2", "fsdp"):
            continue
        memory, seconds, bubble, *_ = estimate(a.params, tp, pp, scheme, a)
        gb = "".join(f"{x / 1e9:8.1f}" for x in [*memory, sum(memory)])
        print(f"{scheme:8}{a.gpus // (tp * pp):6}{tp:4}{pp:4}     {gb}"
              f"{' ' if sum(memory) <= a.gpu_gb * 1e9 else '!'}    "
              + "".join(f"{x:8.2f}" for x in seconds) + f"{bubble:8.0%}")
    print("\n! does not fit; exposed: the part of comm that has no computation to hide behind")

def fail(error, code=1):
    """End with one line. What all ranks find wrong the first one says, and torchrun ends the
    others. They may be waiting for us: no farewell."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    print(f"ddp.py: error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    os._exit(code) if "RANK" in os.environ else sys.exit(code)

def main():
    words = sys.argv[1:]
    try:
        {"bench": bench, "plan": plan}.get(words[0], lambda _: run(words))(words[1:]) if words else run(words)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, LookupError, RuntimeError, ArithmeticError, TypeError) as error:
        import traceback; traceback.print_exc(); fail(error)

if __name__ == "__main__":
    main()
