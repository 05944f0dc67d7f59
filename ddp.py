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
another number of processes, or there; torchrun --max_restarts 3 goes on when a process has died.
In comments: W processes, each with its rank; P bytes of parameters. Bytes sent by all together:
all-gather and reduce-scatter (W - 1) P, all-reduce, which is one of each, 2 (W - 1) P.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while torch loads

import argparse
import contextlib
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
from train import cross_entropy, get_batch, make_optimizers, random_state

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

def broadcast(module, group=None):
    """Overwrite the parameters and buffers of all ranks by those of the first."""
    for x in itertools.chain(module.parameters(), module.buffers()) if world(group) > 1 else ():
        dist.broadcast(x.detach(), group=group, group_src=0)

def all_reduce(x, group=None, op=dist.ReduceOp.SUM):
    """Sum (or maximum) over ranks, in place -> x."""
    if world(group) > 1:
        dist.all_reduce(x, op, group=group)
    return x

def all_gather(x, group=None, out=None):
    """Start to gather equally long parts of all ranks in `out`, one after the other: (n,) -> a
    function that waits, and returns it: (W n,)"""
    out = x.new_empty(world(group) * len(x)) if out is None else out
    if world(group) == 1:
        return functools.partial(out.copy_, x)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # (old name)
    work = gather(out, x.contiguous(), group=group, async_op=True)
    return lambda: [work.wait(), out][1]

def reduce_scatter(x, sizes, group=None, dtype=None):
    """Start to sum x over ranks, of which rank r is to get the r-th part, sizes[r] numbers -> a
    function that waits, and returns it. Gloo's own sends as much as an all-reduce; to exchange
    parts, and to sum up (in this dtype) what comes, is the least that can be sent."""
    own, W = sizes[rank(group)], world(group)
    if W == 1:
        return lambda: x.to(dtype or x.dtype)
    parts = x.new_empty(W * own)
    work = dist.all_to_all_single(parts, x, [own] * W, sizes, group=group, async_op=True)
    return lambda: [work.wait(), parts.view(W, own).sum(0, dtype=dtype)][1]

class Collective(torch.autograd.Function):
    """forward(x), whose gradient is backward(g): the mirror image of a collective is another."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.mirror = backward
        return forward(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.mirror(g.contiguous()), None, None

# ---- Data parallel: each rank has the whole model and a part of the batch; gradients are averaged.

class Buckets:
    """Groups of parameters whose gradients travel together. start(bucket) begins, and returns a
    function that waits and gives the reduced gradients: {parameter: tensor}. With `overlap` a
    bucket leaves as soon as its gradients are there, while the backward pass goes on. Order and
    number of messages are the same on all ranks, whichever parameters a rank has used, or they
    would wait for one another."""

    def __init__(self, start, group=None, overlap=True):
        self.buckets, self.start, self.group, self.overlap = [], start, group, overlap

    def add(self, params, bucket_mb):
        """Divide parameters into buckets of one dtype and about so many MB, ahead of those there
        are. The last parameters come first, as in the backward pass."""
        new, room = [], -1
        for p in reversed([p for p in params if p.requires_grad]):
            if p.nbytes > room or p.dtype != new[-1][0].dtype:
                new.append([])
                room = bucket_mb * 2**20
            new[-1].append(p)
            room -= p.nbytes
            p.register_post_accumulate_grad_hook(self._ready)
        self.buckets = new + self.buckets
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._begin()

    def _begin(self):
        self.missing, self.had, self.sent = [set(bucket) for bucket in self.buckets], set(), []

    def _ready(self, p):
        """The gradient of p is there: send what is complete, and has not been sent."""
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
        """Send what is left, and wait -> {parameter: reduced gradient}, without those that have
        none on any rank. A bucket that another backward pass has added to leaves once more."""
        for bucket in self.buckets[len(self.sent) :]:
            self._send(bucket)
        flags = [any(p.grad is not None for p in bucket) for bucket in self.buckets]
        flags = torch.tensor([*flags, *(p in self.had for p in self.bucket_of)], dtype=torch.uint8)
        if self.buckets and world(self.group) > 1:
            flags = all_reduce(flags.to(self.buckets[0][0].device), self.group, dist.ReduceOp.MAX)
        for bucket, again in zip(self.buckets, flags):
            if again:
                self._send(bucket)
        had, result = dict(zip(self.bucket_of, flags[len(self.buckets) :].tolist())), {}
        for p, g in itertools.chain.from_iterable(wait().items() for wait in self.sent):
            if had[p]:
                result[p] = result[p] + g if p in result else g
        self._begin()
        return result

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's own gradients."""
        before, self.overlap = self.overlap, False
        yield
        self.overlap = before

def gradients(params):
    """Their gradients, 0 where there is none."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in params]

def start_average(params, group=None):
    """Start to average gradients over ranks -> a function, as in `Buckets`."""
    flat, W = flatten(gradients(params)), world(group)
    wait = dist.all_reduce(flat, group=group, async_op=True).wait if W > 1 else bool
    return lambda: [wait(), dict(zip(params, unflatten(flat.div_(W), params)))][1]

class DDP(nn.Module):
    """Wrap a module so that gradients become the mean over ranks.

        model = DDP(model); loss = ...; loss.backward(); model.finish_gradient_synchronization()

    bucket_mb: of gradients that travel together: 0, each alone (naive); math.inf, all (flat).
    overlap: see `Buckets`. Where only some ranks have a gradient it is 0 on others. Use `with
    model.no_sync()` around the backward passes of a step but the last."""

    def __init__(self, module, bucket_mb=25.0, overlap=True, group=None):
        super().__init__()
        self.module = module
        broadcast(module, group)
        self.buckets = Buckets(functools.partial(start_average, group=group), group, overlap)
        self.buckets.add(module.parameters(), bucket_mb)
        self.no_sync = self.buckets.no_sync

    def finish_gradient_synchronization(self):
        """After the backward pass: wait until all gradients are the mean over ranks."""
        for p, g in self.buckets.finish().items():
            p.grad = g

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

# ---- ZeRO (Rajbhandari et al. 2020): W copies of the same optimizer state are W - 1 too many.

class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of any class whose state is divided: each parameter has one owner, which alone
    keeps its state and updates it, and then sends it to the others (ZeRO-1).

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    Gradients are averaged before by DDP; or by `reduce_gradients`, which gives each only to its
    owner, so that with the parameters that come back no more is sent than for DDP alone. With
    shard_gradients they leave in the backward pass, in buckets of bucket_mb, and are freed
    (ZeRO-2); `no_sync` as in DDP. state_dict() is this rank's part of the state."""

    def __init__(self, params, optimizer_cls, group=None, shard_gradients=False, bucket_mb=0.0,
                 **kwargs):
        self.group, self.owner, self.load = group, {}, [0] * world(group)
        self.pending = self.shard_gradients = shard_gradients
        self.bucket_mb = bucket_mb if shard_gradients else math.inf
        self.buckets = Buckets(self._start, group, shard_gradients)
        self.no_sync = self.buckets.no_sync
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
        self.buckets.add(params, self.bucket_mb)

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
        self.pending = False

    @torch.no_grad()
    def step(self, closure=None):
        """Update own parameters, then take over those of the other ranks."""
        with torch.enable_grad():
            loss = closure() if closure else None
        if self.pending:
            self.reduce_gradients()
        parts, self.pending = {}, self.shard_gradients
        for p, r in self.owner.items():  # all of an owner travel together
            parts.setdefault((r, p.dtype), []).append(p)
            p.grad = p.grad if r == rank(self.group) else None
        self.local.step()
        for (r, _), part in parts.items() if world(self.group) > 1 else ():
            dist.broadcast(flat := flatten(part), group=self.group, group_src=r)
            torch._foreach_copy_(part, unflatten(flat, part))
        return loss

# ---- Fully sharded: no rank has a whole matrix but while it is used (ZeRO-3; Zhao et al. 2023).

def whole(p, x):
    """The whole of x, which is p or of its shape, if p is this rank's part of a parameter."""
    return p.to_whole(x.detach()) if hasattr(p, "to_whole") and x.shape == p.shape else x

class FSDP(nn.Module):
    """Wrap a module so that each rank keeps 1/W of the numbers of every Linear's and Embedding's
    weight (classes of these names, and what inherits from one); others, small, stay whole.

    The matrices of a unit (what is in a ModuleList; elsewhere, a layer) are gathered just ahead of
    its forward and its backward pass, and freed right after; those of the next one are on their way
    while it computes. The graph keeps views of a matrix, and their storage is emptied and refilled.

    compute_dtype: of a Linear's gathered weight and its gradient, bfloat16 or float16; the parts
    stay as they are. parameters() are the parts: AdamW, which looks at each number by itself, works
    on them; Muon, which needs matrices, does not. Methods as in DDP."""

    def __init__(self, module, compute_dtype=None, group=None):
        super().__init__()
        self.module, self.compute_dtype, self.group, self.kept = module, compute_dtype, group, {}
        broadcast(module, group)
        lists = [name for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
        units, uses = {}, {}  # by names of their modules; a tied matrix is another unit's
        for name, layer in module.named_modules():
            kinds = {cls.__name__ for cls in type(layer).__mro__}
            # (nn.MultiheadAttention's output layer is not called: its weight is read)
            if not kinds & {"Linear", "Embedding"} or "NonDynamicallyQuantizableLinear" in kinds:
                continue
            root = next((".".join(name.split(".")[: outer.count(".") + 2])
                         for outer in lists if name.startswith(f"{outer}.")), name)
            p, lookup = layer.weight, "Embedding" in kinds
            if not hasattr(p, "unit"):
                p.unit = units.setdefault(root, types.SimpleNamespace(
                    number=len(units), params=[], lookup=True, coming=None, in_backward=False))
                self._shard(p, None if lookup else compute_dtype)
            p.unit.lookup &= lookup
            if p.unit not in uses.setdefault(root, []):
                uses[root].append(p.unit)
        for root, used in uses.items():
            part = module.get_submodule(root)
            part.register_forward_pre_hook(functools.partial(self._before_forward, used))
            part.register_forward_hook(functools.partial(self._after_forward, used))
        self.buckets = Buckets(self._start, group)
        self.buckets.add([p for p in module.parameters() if not hasattr(p, "unit")], math.inf)
        for unit in units.values():
            self.buckets.add(unit.params, math.inf)
        self.units = [*units.values(), types.SimpleNamespace(params=[], coming=None, lookup=False)]

    def _shard(self, p, dtype):
        """Keep this rank's part of a matrix, ceil(n / W) numbers; the last is filled up with 0."""
        n, shape, W, group = p.numel(), p.shape, world(self.group), self.group
        p.to_part = lambda x: F.pad(x.reshape(-1), (0, -n % W)).view(W, -1)[rank(group)].clone()
        p.to_whole = lambda x: all_gather(x, group)()[:n].view(shape)
        p.data = p.shard = p.to_part(p.detach())
        p.full = p.shard.new_empty(W * len(p), dtype=dtype)
        p.view_full = lambda: p.full[:n].view(shape)
        p.unit.params.append(p)

    def _before_forward(self, units, *_):
        for unit in units:  # (activation checkpointing: this may be part of the backward pass)
            self._gather(unit, -1 if unit.in_backward else 1)

    def _after_forward(self, units, part, args, y):
        for unit in units:
            if not unit.in_backward:
                self._free(unit)
            for x in y if isinstance(y, (tuple, list)) else [y]:
                if torch.is_tensor(x) and x.requires_grad:
                    x.register_hook(functools.partial(self._before_backward, unit))

    def _before_backward(self, unit, _):
        """The gradient of the output is there: weights are needed for that of the input; but that
        of ids does not exist, and the shape is enough."""
        unit.in_backward = True
        if not unit.lookup:
            return self._gather(unit, -1)
        for p in unit.params:
            p.full.untyped_storage().resize_(p.full.nbytes)
            p.data = p.view_full()

    def _gather(self, unit, direction):
        """Make the matrices of a unit whole, and start with those of the next in this direction."""
        self._start_gather(unit)
        following = self.units[unit.number + direction]
        for p, wait in zip(unit.params, unit.coming):
            wait()
            p.data = p.view_full()
        unit.coming = ()  # all is here
        if direction > 0 or not following.lookup:
            self._start_gather(following)

    def _start_gather(self, unit):
        if unit.coming is None:
            for p in unit.params:
                p.full.untyped_storage().resize_(p.full.nbytes)
            unit.coming = [all_gather(p.shard.to(p.full.dtype), self.group, p.full)
                           for p in unit.params]

    def _free(self, unit):
        """Keep this rank's parts of a unit's matrices alone."""
        for wait in unit.coming or ():
            wait()
        for p in unit.params:
            p.data = p.shard
            p.full.untyped_storage().resize_(0)
        unit.coming, unit.in_backward = None, False

    def _start(self, bucket):
        """Start to average the gradients of a bucket, of which each rank gets its parts."""
        if not hasattr(bucket[0], "unit"):
            return start_average(bucket, self.group)
        W, sizes = world(self.group), [len(p.shard) for p in bucket]
        grads = (torch.zeros_like(p.full) if p.grad is None else p.grad.reshape(-1) for p in bucket)
        rows = [F.pad(g, (0, W * n - len(g))).view(W, n) for g, n in zip(grads, sizes)]
        flat, dtype = torch.cat(rows, 1).view(-1), bucket[0].shard.dtype
        wait = reduce_scatter(flat, [sum(sizes)] * W, self.group, dtype)
        self._free(bucket[0].unit)
        return lambda: dict(zip(bucket, (wait() / W).split(sizes)))

    @contextlib.contextmanager
    def no_sync(self):
        """For whole gradients there is no room: they are reduced after all, and parts added up."""
        yield
        self.finish_gradient_synchronization(more=True)

    def finish_gradient_synchronization(self, more=False):
        """After a backward pass: gradients become means over ranks, of which each has its parts.
        more: another one of this step will follow."""
        for p, g in self.buckets.finish().items():
            self.kept[p] = self.kept[p] + g if p in self.kept else g
        for unit in self.units:
            self._free(unit)
        while self.kept and not more:
            p, g = self.kept.popitem()
            p.grad = g

    def forward(self, *args, **kwargs):
        lower = self.compute_dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(next(self.parameters()).device.type, self.compute_dtype) if lower else \
                contextlib.nullcontext():
            return self.module(*args, **kwargs)

    def gather_full_params(self):
        """{name: whole tensor} as the wrapped module's own state_dict() would be on one rank."""
        params = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: whole(params.get(name), x).clone()
                for name, x in self.module.state_dict().items()}

# ---- Tensor parallel (Shoeybi et al. 2019): every matrix is split; of two in a row the first by
# columns, the second by rows: only then sums are added up, one all-reduce forward, one backward.

def copy_to(x, group=None):
    """The same input for all ranks; its gradient is the sum of theirs."""
    return Collective.apply(x, lambda x: x.view_as(x), lambda g: all_reduce(g.clone(), group))

def sum_over(x, group=None):
    """The sum of all ranks' outputs; each has the gradient of the sum."""
    return Collective.apply(x, lambda x: all_reduce(x.clone(), group), lambda g: g)

def part_of(n, group=None, what="size"):
    """This rank's range of n things. Raises ValueError if they can not be divided evenly."""
    if n % world(group):
        raise ValueError(f"{what} {n} can not be divided by {world(group)} processes")
    return slice(rank(group) * n // world(group), (rank(group) + 1) * n // world(group))

def split_parameter(p, axis, group=None):
    """-> this rank's part of a parameter along an axis, a parameter. Raises ValueError."""
    part_of(p.shape[axis], group)
    own = nn.Parameter(p.detach().chunk(world(group), axis)[rank(group)].clone())
    own.to_part = lambda x: x.chunk(world(group), axis)[rank(group)].clone()
    own.to_whole = lambda x: torch.cat(
        [*all_gather(x.reshape(-1), group)().view(-1, *x.shape)], axis)
    return own

class ParallelLinear(nn.Module):
    """y = x W^T + b of which each rank has a part. axis 0: it computes d_out / W columns: (...,
    d_in) -> (..., d_out / W). axis 1: it has d_in / W inputs: (..., d_in / W) -> (..., d_out).
    weight, bias_value: of the whole layer; None: random. copied: an input's gradient is summed over
    ranks elsewhere, once for several layers."""

    def __init__(self, axis, d_in, d_out, bias=False, group=None, weight=None, bias_value=None,
                 copied=False):
        super().__init__()
        self.axis, self.group, self.copied = axis, group, copied
        layer = model_py.Linear(d_in, d_out, bias)
        self.weight = split_parameter(layer.weight if weight is None else weight, axis, group)
        self.bias = layer.bias if bias_value is None else nn.Parameter(bias_value.detach().clone())
        if self.bias is not None and axis == 0:
            self.bias = split_parameter(self.bias, 0, group)

    def forward(self, x):
        if self.axis == 0:
            x = x if self.copied else copy_to(x, self.group)
            return F.linear(x, self.weight, self.bias)
        y = sum_over(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias

ColumnParallelLinear = functools.partial(ParallelLinear, 0)
RowParallelLinear = functools.partial(ParallelLinear, 1)

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
    logits, n = model_py.upcast(logits), logits.shape[-1]
    m = all_reduce(logits.detach().amax(-1), group, dist.ReduceOp.MAX)
    log_z = m + sum_over((logits - m[..., None]).exp().sum(-1), group).log()
    at = targets - rank(group) * n
    mine = (at >= 0) & (at < n)
    at = logits.gather(-1, at.masked_fill(~mine, 0)[..., None])[..., 0] * mine
    losses = log_z - sum_over(at, group) + z_loss * log_z.square()
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

    for block in model.blocks:
        for part in (block.attn, *getattr(block.ffn, "experts", [block.ffn])):
            # one all-reduce for queries, keys and values, one for w1 and w3
            part.register_forward_pre_hook(lambda _, args: (copy_to(args[0], group), *args[1:]))
            for name in {*part._modules} & {"q_proj", "k_proj", "v_proj", "w1", "w3"}:
                split(part, name, ColumnParallelLinear, copied=True)
            split(part, "o_proj" if part is block.attn else "w2", RowParallelLinear)
        for p in (*block.attn.q_norm.parameters(), *block.attn.k_norm.parameters()):
            p.register_hook(lambda g: all_reduce(g.clone(), group))  # each rank's heads give a part
    model.embedding = VocabParallelEmbedding(c.vocab_size, c.n_embd, group, model.embedding.weight)
    split(model, "head", ColumnParallelLinear)
    if c.tie_embeddings:  # (both are cut by ids)
        model.head.weight = model.embedding.weight
    return model

# ---- Pipeline parallel: each rank has some layers, a batch passes in pieces. GPipe (Huang et al.
# 2019) does all forward passes first; 1F1B (Narayanan et al. 2019) each backward pass as soon as it
# can: activations of W pieces at most. Both wait (W - 1) / (pieces + W - 1) of the time.

def pipeline_step(stage, batches, loss_fn, group=None, schedule="1f1b", device="cpu"):
    """Forward and (with gradients) backward passes of micro-batches through the stages of a group's
    ranks. stage: this rank's module; what it receives is like x, or an empty tensor that its
    input_like(x) gives. batches: list of (x, y), of which the first stage takes x and the last y.
    loss_fn(output, y): a micro-batch's share of the loss, in the last stage. -> the sum of the
    losses, a tensor (on the last rank; 0 elsewhere). Raises ValueError."""
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"schedule is gpipe or 1f1b, not {schedule}")
    last, r, sent, under_way = world(group) - 1, rank(group), [], []
    loss, like = torch.zeros((), device=device), getattr(stage, "input_like", torch.empty_like)

    def send(x, to):  # x must live until it has left
        sent.append((dist.isend(x := x.contiguous(), group=group, group_dst=to), x))

    def receive(x, source):
        dist.recv(x, group=group, group_src=source)
        return x

    # every rank is this many forward passes ahead of its backward passes
    ahead = len(batches) if schedule == "gpipe" else last - r
    for i in range(len(batches) + ahead):
        if i < len(batches):
            x, y = batches[i]
            x = receive(like(x), r - 1).requires_grad_() if r else x
            out = stage(x) if r < last else loss_fn(stage(x), y)
            under_way.append((x, out))
            if r < last:
                send(out.detach(), r + 1)
            else:
                loss = loss + out.detach()
        if i >= ahead and torch.is_grad_enabled():
            x, out = under_way.pop(0)
            out.backward(receive(torch.empty_like(out), r + 1) if r < last else None)
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
    model.auxiliary_loss = lambda: 0.0
    if r > 0:
        model.input_like = lambda x: torch.empty(*x.shape, c.n_embd, dtype=p.dtype, device=p.device)
        model.embed, model.positions = lambda x, at: x, None
        if r < W - 1 or not c.tie_embeddings:  # (else it is the head, too)
            model.embedding = None
    if r < W - 1:
        model.logits, model.final_norm, model.head = lambda x: x, Skip(), None
    return model

def add_tied_gradients(model, group=None):
    """The first and the last rank of a pipeline both have a tied embedding: add gradients up."""
    c, p = model.config, next(model.parameters())
    table = model.embedding and model.embedding.weight.grad
    all_reduce(p.new_zeros(c.vocab_size, c.n_embd) if table is None else table, group)

# ---- Sequence parallel: every rank has a part of each sequence. For attention keys and values go
# around in a ring, and each rank keeps an online softmax of what it has seen (Liu et al. 2023).

def rotate(tensors, group=None):
    """Send tensors to the next rank -> those of the one before."""
    W, r, flat = world(group), rank(group), flatten(tensors)
    if W == 1:
        return tensors
    out = torch.empty_like(flat)
    for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, flat, group=group, group_peer=(r + 1) % W),
             dist.P2POp(dist.irecv, out, group=group, group_peer=(r - 1) % W)]):
        work.wait()
    return unflatten(out, tensors)

def ring_scores(q, k, source, group, causal):
    """How q sees the keys of rank `source`: (..., T, T); None if all of them come later."""
    if causal and source > rank(group):
        return None
    s = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    return s.masked_fill(later, -math.inf) if causal and source == rank(group) else s

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
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
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
    """Let a Transformer's attention reach all ranks' parts of a sequence, in place -> itself. It is
    to be called with this rank's `positions`. Raises ValueError."""
    if {*model.kinds} != {"full"} or model.config.dropout:
        raise ValueError("--sp is for full attention, without dropout")

    def forward(attn, x, where, cache=None):
        q, k, v = attn.heads(x, where.rotate)
        return attn.o_proj(ring_attention(q, k, v, group).transpose(-3, -2).flatten(-2))

    for block in model.blocks:
        block.attn.forward = functools.partial(forward, block.attn)
    return model

# ---- The training run: train.py's loop, in which methods of `Parallel` replace functions.

SCHEMES = ("naive", "flat", "ddp", "zero1", "zero2", "fsdp")

class Parallel:
    """A Transformer on several processes. The tp, pp or sp ranks of one copy of it are neighbours;
    the same rank of all copies forms a group for data parallelism. Raises ValueError."""

    def __init__(self, args, device):
        n, W, self.zero = args.tp * args.pp * args.sp, world(), "zero" in args.scheme
        self.args, self.device, self.passes, self.signals = args, device, 0, []
        # with --sp, this rank's positions of (x, y)
        self.cut = lambda batch: [x.chunk(args.sp, 1)[rank() % args.sp] for x in batch]
        self.dp, self.copy, self.group, self.grads = W // n, rank() // n, None, None
        schemes = SCHEMES[:3] if n > 1 else SCHEMES if args.impl == "own" else ("ddp", "fsdp")
        matrices_split = args.scheme == "fsdp" or args.tp > 1
        for wrong, why in (
                (n not in (args.tp, args.pp, args.sp) or W % n or args.dp not in (0, W // n),
                 f"the {W} processes are not dp, dp x tp, dp x pp or dp x sp"),
                (args.scheme not in schemes or n > 1 and args.impl == "torch", "--tp, "
                 "--pp, --sp go with naive, flat and ddp; --impl torch, alone, with ddp and fsdp"),
                (matrices_split and args.optimizer in ("muon", "soap"),
                 "fsdp and --tp split the matrices that muon and soap need whole"),
                (args.teacher or args.noise_scale or args.kernels or args.compile,
                 "--teacher, --noise_scale, --kernels and --compile are train.py's alone"),
                (args.batch_size % max(1, self.dp), "--batch_size, of all, can not be divided")):
            if wrong:
                raise ValueError(why)
        if n > 1:
            make = dist.new_subgroups_by_enumeration
            self.group, _ = make([list(range(i, i + n)) for i in range(0, W, n)])  # one copy
            if args.sp == 1:  # who averages gradients; else all: same parameters, other tokens
                self.grads, _ = make([list(range(i, W, n)) for i in range(n)])

    def make_optimizers(self, model, *how):
        """Divide a model, in place -> its optimizers, made for the whole, then given our parts."""
        a, self.model, self.wrapped, self.switches = self.args, model, None, []
        optimizers = make_optimizers(model, *how)
        name_of = {p: name for name, p in model.named_parameters()}
        groups = [group for o in optimizers for group in o.param_groups]
        self.names = [[name_of[p] for group in o.param_groups for p in group["params"]]
                      for o in optimizers]
        if a.tp > 1:
            split_tensors(model, self.group)
        elif a.pp > 1:
            self.stage = functools.partial(split_layers(model, self.group).forward)
            self.stage.input_like = getattr(model, "input_like", None)
            model.forward = lambda x: x  # (`cross_entropy` does all of it)
        elif a.sp > 1:
            part = part_of(model.config.block_size, self.group, "block_size")
            at = torch.arange(part.start, part.stop, device=self.device)[None]
            split_sequence(model, self.group)
            model.forward = functools.partial(model.forward, positions=at)
        if a.impl == "torch" and a.scheme == "fsdp":
            fully_shard(model)
        elif a.impl == "torch":
            inner = nn.Module()  # calls of the model go through PyTorch's DDP from now on
            inner.model, inner.forward = model, model.forward
            ddp = nn.parallel.DistributedDataParallel(inner, bucket_cap_mb=a.bucket_mb)
            model.forward, self.switches = ddp.forward, [(ddp, "require_backward_grad_sync")]
        elif a.scheme == "fsdp":
            fast = a.dtype == "auto" and train.has_fast_bfloat16(self.device)
            self.wrapped = FSDP(model, torch.bfloat16 if fast or a.dtype == "bfloat16" else None)
        elif self.zero:
            broadcast(model)
        else:  # (of a pipeline's backward passes only the last may send)
            size = {"naive": 0, "flat": math.inf}.get(a.scheme, a.bucket_mb)
            self.wrapped = DDP(model, size, a.scheme == "ddp" and a.pp == 1, self.grads)
            self.switches = [(self.wrapped.buckets, "overlap")] * self.wrapped.buckets.overlap
        self.params = dict(model.named_parameters())
        for group in groups:
            names = [name_of[p] for p in group["params"]]
            group["params"] = [self.params[name] for name in names if name in self.params]
        if self.zero:
            optimizers = [ShardedOptimizer(o.param_groups, type(o), None, a.scheme == "zero2",
                                           a.bucket_mb, **o.defaults) for o in optimizers]
            self.switches = [(o.buckets, "overlap") for o in optimizers if o.buckets.overlap]
        for optimizer, names in zip(optimizers, self.names):
            optimizer.load_state_dict = functools.partial(self.load, optimizer, names)
        self.optimizers, self.stream = optimizers, rank() if a.pp > 1 else self.copy
        if self.stream:  # random numbers, for dropout, differ
            torch.manual_seed(a.seed + self.stream)
        model.register_forward_pre_hook(self.before_forward)
        return optimizers

    def before_forward(self, model, _):
        """Gradients leave in the last backward pass of a step; fsdp's, in each."""
        if model.training and torch.is_grad_enabled():
            if self.passes and isinstance(self.wrapped, FSDP):
                self.wrapped.finish_gradient_synchronization(more=True)
            self.passes = (self.passes + 1) % self.args.gradient_accumulation_steps
            for each, name in self.switches:
                setattr(each, name, self.passes == 0)

    def get_batch(self, data, batch_size, block_size, device, number, *more):
        """This copy's rows, and with --sp this rank's positions. ValueError, on all ranks."""
        batch, error = None, ValueError("stopped")
        try:
            batch = get_batch(data, batch_size // self.dp, block_size, device,
                              number * self.dp + self.copy, *more)
        except ValueError as wrong:
            error = wrong
        going_on = torch.tensor(bool(batch and not self.signals), dtype=torch.uint8, device=device)
        if not all_reduce(going_on, op=dist.ReduceOp.MIN):
            raise error
        return self.cut(batch)

    def cross_entropy(self, logits, y, reduction="sum", z_loss=0.0):
        """The mean over copies (and parts of a sequence) of the sum of this batch's losses; the
        gradient is that of this rank's own, as the gradients will be averaged."""
        a, n = self.args, self.args.microbatches
        if a.pp > 1:  # (logits are still ids here; the backward pass, too, is in this)
            tokens = y.numel() * a.gradient_accumulation_steps
            loss = tokens * pipeline_step(
                self.stage, list(zip(logits.chunk(n), y.chunk(n))), lambda logits, y: cross_entropy(
                    logits, y, reduction="sum", z_loss=z_loss) / tokens, self.group, a.pp_schedule,
                self.device).requires_grad_()
        elif a.tp > 1:
            loss = vocab_parallel_cross_entropy(logits, y, self.group, z_loss=z_loss)
        else:
            loss = cross_entropy(logits, y, reduction="sum", z_loss=z_loss)
        share = a.pp / world()
        return Collective.apply(loss, lambda x: all_reduce(x.clone()) * share, lambda g: g)

    @torch.no_grad()
    def clip_grad_norm(self, params, max_norm, eps=1e-6):
        """Average all gradients, and clip them by their norm together -> the norm before."""
        tied = self.args.pp > 1 and self.model.config.tie_embeddings
        if tied:
            add_tied_gradients(self.model, self.group)
        if self.wrapped:
            self.wrapped.finish_gradient_synchronization()
        for optimizer in self.optimizers if self.zero else ():
            optimizer.reduce_gradients()
        grads, squares = [], torch.zeros(2, device=self.device)  # this rank's alone, and everyone's
        for name, p in self.params.items():
            if p.grad is not None:
                grads.append(getattr(p.grad, "_local_tensor", p.grad))
                if not (tied and rank(self.group) and name == "embedding.weight"):  # (the first's)
                    own = self.args.pp > 1 or self.zero or hasattr(p, "to_whole")
                    squares[0 if own else 1] += grads[-1].square().sum()
        all_reduce(squares[:1], self.group)
        norm = squares.sum().sqrt()
        if max_norm:
            torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0))
        return norm

    def evaluate(self, model, data, batch_size, block_size, device, autocast, max_batches=0):
        """As train.evaluate, of windows that the copies of the model share."""
        starts, loss, b = np.arange(0, len(data) - 1, block_size), 0.0, batch_size // self.dp
        if max_batches and len(starts) > max_batches * batch_size:
            starts = starts[np.linspace(0, len(starts) - 2, max_batches * batch_size).astype(int)]
        count = float(np.minimum(block_size, len(data) - 1 - starts).sum())
        # all ranks take part in all batches: in the last one some have windows without targets
        starts = np.pad(starts, (0, -len(starts) % batch_size), constant_values=len(data))
        model.eval()
        for i in range(self.copy * b, len(starts), batch_size):
            x, y = self.cut(train.windows(data, starts[i : i + b], block_size, device,
                                          model.config.vocab_size))
            with torch.no_grad(), autocast():
                loss += self.cross_entropy(model(x), y).item() * self.dp * self.args.sp
        model.train()
        return loss / count

    def random_state(self, device, new=None):
        """As train.random_state, with "ranks", the states of all; other ranks than those of the
        run that was saved draw new numbers."""
        layout = [world(), self.args.tp, self.args.pp]
        if new:
            same = new.get("layout", [1, 1, 1]) == layout
            random_state(device, new.get("ranks", [new])[rank()] if same else new)
            if not same:
                torch.manual_seed(torch.randint(2**40, ()).item() + self.stream)
        return (own := random_state(device)) | {"ranks": gather_objects(own), "layout": layout}

    @torch.no_grad()
    def save_checkpoint(self, path, model, optimizers, **more):
        """As model.save_checkpoint: a file as of one process, which the first one writes."""
        state = model.state_dict()  # (first: it puts FSDP2's parameters back into parts)
        params = dict(model.named_parameters(remove_duplicate=False))
        state = {name: whole(params.get(name), x) for name, x in state.items()}
        moments = {
            name: {k: whole(p, x) if torch.is_tensor(x) else x for k, x in o.state[p].items()}
            for o in optimizers for name, p in self.params.items() if p in o.state}
        if self.args.pp > 1 or self.zero:  # each rank has some of them
            for theirs, of_theirs in gather_objects((state, moments), self.group):
                state, moments = state | theirs, moments | of_theirs
        if rank() == 0:
            dicts = [{"state": {i: moments[k] for i, k in enumerate(names) if k in moments}}
                     for names in self.names]
            model_py.save_checkpoint(path, state, dicts, config=model.config, **more)

    def load(self, optimizer, names, saved):
        """Take this rank's part of an optimizer's state in a checkpoint."""
        for i, state in saved["state"].items():
            p = self.params.get(names[i])
            if p is not None and getattr(optimizer, "owner", {}).get(p, rank()) == rank():
                part = getattr(p, "to_part", lambda x: x.to(self.device))
                optimizer.state[p] = {k: part(x) if torch.is_tensor(x) else x
                                      for k, x in state.items()}

def gather_objects(x, group=None):
    """What all ranks have, a list."""
    parts = [x] * world(group)
    if len(parts) > 1:
        dist.all_gather_object(parts, x, group=group)
    return parts

def fully_shard(model):
    """PyTorch's FSDP2, in place; its parameters are given `to_whole` and `to_part`."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    for part in (*model.blocks, model):
        fully_shard(part)
    for p in model.parameters():
        p.to_whole, p.to_part = type(p).full_tensor, functools.partial(
            distribute_tensor, device_mesh=p.device_mesh, placements=p.placements)

def setup(name):
    """Join the other processes -> this one's device, of the kind asked for. Raises ValueError."""
    device, restarts = train.pick_device(name), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":  # else a world of one
        nccl = device.startswith("cuda")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if nccl else "cpu"
        if nccl:
            torch.cuda.set_device(device)
        store, number, W = next(dist.rendezvous("env://"))
        # after a restart the store may still have the addresses of those that have died
        dist.init_process_group("nccl" if nccl else "gloo", store=dist.PrefixStore(restarts, store),
                                rank=number, world_size=W)

    def watch(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:  # when torchrun is killed, end, too
        threading.Thread(target=watch, args=[os.getppid()], daemon=True).start()
    if rank() > 0:  # the first one speaks for all
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return torch.device(device)

def build_parser(parser=None):
    """What the command line has beside train.py's; a parser that is given gets that, too."""
    parser = parser or argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: fail(message, 2)
    add = parser.add_argument_group("processes").add_argument
    for name, default, choices in (("scheme", "ddp", SCHEMES), ("impl", "own", ("own", "torch")),
                                   ("pp_schedule", "1f1b", ("1f1b", "gpipe"))):
        add(f"--{name}", choices=choices, default=default, help=f"(default {default})")
    for name, default, text in (
            ("bucket_mb", 25.0, "of ddp, zero2"), ("dp", 0, "copies of the model; 0: all it can"),
            ("tp", 1, "processes that share each matrix"), ("pp", 1, "that share the layers"),
            ("sp", 1, "that share each sequence"), ("microbatches", 4, "of a pipeline")):
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    return parser

def run(words):
    """Train as train.py does, on all processes together."""
    ours, words = build_parser().parse_known_args(words)  # a checkpoint has train.py's words alone
    parser = build_parser(train.build_parser())
    path = os.path.join(parser.parse_known_args(words)[0].out_dir, "ckpt.pt")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(path) and \
            train.load_checkpoint(path)[1]["args"] == words:
        words.append("--resume")  # torchrun --max_restarts starts all again when one has died
    args, words, checkpoint = train.parse_args(parser, words)
    args = argparse.Namespace(**vars(args) | vars(ours))
    args.device = str(device := setup(args.device))
    parallel = Parallel(args, device)
    print(f"dp {parallel.dp} x tp {args.tp} x pp {args.pp} x sp {args.sp} processes, {args.impl} "
          f"{args.scheme}; of the first one:", flush=True)

    def prepare(model, *how):  # (train.py would do this on all ranks)
        if rank() == 0 and not (args.resume or args.eval_only) and os.path.exists(path):
            os.rename(path, aside := f"{path[:-3]}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
            print(f"{path}, of another run, is now {aside}")
        all_reduce(torch.zeros(1, device=device))  # (wait for that)
        return parallel.make_optimizers(model, *how)

    def on_signal(number, _):  # (Ctrl-C comes twice, from the terminal and from torchrun)
        parallel.signals.append(number)
        if len(parallel.signals) > 2:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    train.signal = types.SimpleNamespace(signal=lambda *_: None, SIGINT=0, SIGTERM=0)
    for name in ("get_batch", "cross_entropy", "clip_grad_norm", "evaluate", "random_state",
                 "save_checkpoint"):
        setattr(train, name, getattr(parallel, name))
    train.make_optimizers, train.parse_args = prepare, lambda *_: (args, words, checkpoint)
    if rank() > 0:
        train.plot_log = lambda *_: None
        train.replacing = lambda *_, **how: contextlib.nullcontext(sys.stdout)
    try:
        train.main()
    except ValueError as error:
        if str(error) != "stopped":
            raise
        time.sleep(0 if parallel.signals else 4)  # (another rank may have an error to tell)
        print(f"{path}: go on with --resume", flush=True)
        os._exit(130) if world() > 1 else sys.exit(130)
    except SystemExit:  # (its regular end)
        pass

# ---- bench: what the schemes send, take and keep on this machine.

def sent_bytes():
    """Bytes that went through the loopback interface so far: all that the processes of one machine
    sent each other. nan where the system does not tell."""
    time.sleep(0.1)  # until it has counted all of them
    with contextlib.suppress(OSError), open("/sys/class/net/lo/statistics/tx_bytes") as file:
        return int(file.read())
    return math.nan

def bench(words):
    """Print tables of all-reduce and of each scheme."""
    parser = build_parser(train.build_parser())
    parser.add_argument("--max_mb", type=int, default=256, help="largest of the all-reduces")
    parser.add_argument("--repeat", type=int, default=7, help="times that each is timed")
    a = parser.parse_args("--n_embd 256 --n_layer 4 --vocab_size 2048 --bucket_mb 4 --dtype "
                          "float32".split() + words)
    names = {*vars(model_py.TransformerConfig())}
    config = model_py.TransformerConfig(**{k: x for k, x in vars(a).items() if k in names and x})
    device, W = setup(a.device), world()
    x, y = torch.randint(config.vocab_size, (2, 2, config.block_size), device=device)

    def clock():
        """The time, when all processes are here."""
        all_reduce(torch.zeros(1, device=device)).item()
        return time.perf_counter()

    def milliseconds(*actions):
        """Medians of the time of actions, which take turns."""
        times = [[-clock() + (action(), clock())[1] for action in actions] for _ in range(a.repeat)]
        return [1e3 * np.median(each) for each in zip(*times)]

    print(f"{W} processes on {device}\n\nall-reduce, MB          ms    GB/s per rank", flush=True)
    for mb in (4**i for i in range(10) if 4**i <= a.max_mb):
        big = torch.ones(mb * 2**18, device=device)
        ms, = milliseconds(lambda: all_reduce(big))
        print(f"{mb:14} {ms:11.2f} {2 * (W - 1) / W * big.nbytes / ms / 1e6:16.2f}", flush=True)
    names, steps, lines = [*SCHEMES, "torch ddp", "torch fsdp"], [], []
    for name in names:
        torch.manual_seed(0)
        a.impl, a.scheme = "torch" if " " in name else "own", name.split()[-1]
        model = model_py.Transformer(config)
        parallel = Parallel(argparse.Namespace(**vars(a)), device)
        P = sum(p.nbytes for p in model.to(device).parameters())
        optimizers = parallel.make_optimizers(model, "adamw", 3e-3, 0.1, (0.9, 0.95), 0.95)

        def step(parallel=parallel, model=model, optimizers=optimizers):
            (parallel.cross_entropy(model(x), y) / y.numel()).backward()
            parallel.clip_grad_norm(model.parameters(), 1.0)
            held = [*model.parameters()], [p.grad for p in model.parameters()], [
                v for o in optimizers for s in o.state.values() for v in s.values()]
            held = [sum(getattr(v, "_local_tensor", v).nbytes for v in kind if torch.is_tensor(v))
                    for kind in held]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            return "".join(f"{n / 1e6:10.1f}" for n in held)

        step()
        before = sent_bytes()
        held = step()
        sent = (clock() and sent_bytes() - before) / P
        lines.append(f"{sent:9.2f}{(3 if 'fsdp' in name else 2) * (W - 1):8}P {held}")
        steps.append(step)
    print("\nsent: by all; MB when gradients are there: of one\nscheme         ms a step  sent, P  "
          "formula    params     grads     optim", flush=True)
    for name, ms, line in zip(names, milliseconds(*steps), lines):
        print(f"{name:14}{ms:10.1f}{line}")

# ---- plan: the same on paper, for machines one does not have.

def estimate(params, tp, pp, scheme, a):
    """What a configuration needs, by formula -> (bytes of parameters, gradients, optimizer state
    and activations; seconds of a step: computation, communication, how much of that has nothing to
    hide behind; share of time that a pipeline waits; layers L; width h). The model has h = 128 L,
    and 12 L h^2 parameters, each of 2 bytes (bfloat16), 2 for its gradient, 12 for the optimizer
    (float32 weights, Adam's two means). Activations of a layer: some 34 h bytes per token
    (Korthikanti et al. 2022), or with checkpointing its input's 2 h."""
    L = max(1, round((params / (12 * 128**2)) ** (1 / 3)))
    h, own, dp = math.sqrt(params / (12 * L)), params / (tp * pp), a.gpus // (tp * pp)
    divided, fsdp = SCHEMES[2:].index(scheme), scheme == "fsdp"  # how many of the three kinds
    memory = [n * own / (dp if divided > i else 1) for n, i in ((2, 2), (2, 1), (12, 0))]
    memory[0] += 2 * 2 * 12 * h * h / tp if fsdp else 0  # two layers at a time are whole
    tokens = a.batch_tokens / dp  # of a copy of the model, in pieces, as many under way as stages
    alive = min(1, pp / a.microbatches) * tokens * L / pp
    memory.append(alive * (2 if a.checkpoint else 34) * h / tp)
    bubble = (pp - 1) / (a.microbatches + pp - 1)
    compute = 6 * params * a.batch_tokens / (a.gpus * a.tflops * 1e12 * a.mfu) / (1 - bubble)
    compute *= 4 / 3 if a.checkpoint else 1
    fast, slow = a.node_gbs * 1e9, a.net_gbs * 1e9  # bytes/s inside a machine, and between them
    comm = (3 if fsdp else 2) * 2 * own * (dp - 1) / dp / (fast if a.gpus <= a.node else slow)
    comm += 4 * L / pp * 2 * tokens * h * 2 * (tp - 1) / tp / (fast if tp <= a.node else slow)
    exposed = max(0.0, comm - 2 / 3 * compute)  # gradients leave during the backward pass
    return memory, (compute, comm, exposed), bubble, L, h

def plan(words):
    """Print memory and time of each way to divide a model and its batch among GPUs."""
    parser = argparse.ArgumentParser("ddp.py plan", description="What fits, and what waits.")
    parser.error = lambda message: fail(message, 2)
    for name, default, text in (
            ("params", 7e9, "of the model"), ("gpus", 64, "in all"), ("gpu_gb", 80.0, "of one"),
            ("tflops", 989.0, "of one, H100's"), ("mfu", 0.4, "share of that in practice"),
            ("node", 8, "GPUs in a machine"), ("node_gbs", 450.0, "GB/s of one inside a machine"),
            ("net_gbs", 50.0, "... between them"), ("batch_tokens", 4e6, "of a step"),
            ("microbatches", 16, "of a pipeline")):
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
        print(f"{scheme:8}{a.gpus // (tp * pp):6}{tp:4}{pp:4}     "
              + "".join(f"{x / 1e9:8.1f}" for x in [*memory, sum(memory)])
              + ("     " if sum(memory) <= a.gpu_gb * 1e9 else "!    ")
              + "".join(f"{x:8.2f}" for x in seconds) + f"{bubble:8.0%}")
    print("\n! does not fit; exposed: the part of comm that has no computation to hide behind")

def fail(error, code=1):
    """End with one line. What all ranks find wrong the first one says; torchrun ends the others."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"ddp.py: error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
    os._exit(code) if "RANK" in os.environ else sys.exit(code)  # (others may wait: no farewell)

def main():
    command, words = {"bench": bench, "plan": plan}.get((*sys.argv, "")[1]), sys.argv[1:]
    try:
        command(words[1:]) if command else run(words)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os._exit(0)
    except (ValueError, OSError, LookupError, RuntimeError, ArithmeticError, TypeError) as error:
        fail(error)

if __name__ == "__main__":
    main()
