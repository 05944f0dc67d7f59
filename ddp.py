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

NCCL on GPUs, gloo on CPUs. The flags, files and losses are those of train.py: a run can be resumed
here on another number of processes, or there. Several machines, each with 8 GPUs:

    torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 ddp.py

In the comments: W processes, each with its rank; P bytes of parameters. What collectives cost, in
bytes sent by all ranks together: all-gather and reduce-scatter (W - 1) P, all-reduce, which is one
of each, 2 (W - 1) P.
"""

import argparse
import bisect
import contextlib
import datetime
import functools
import gc
import itertools
import math
import os
import signal
import sys
import time
import types

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import model as model_py
import train

# -----------------------------------------------------------------------------
# Collectives of a group of processes (None: all of them). A single process needs no group.


def world(group=None):
    """Number of processes in a group; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group=None):
    """This process's number in a group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def flatten(tensors):
    """Tensors of one dtype, one after the other: (n,)"""
    return torch.cat([x.reshape(-1) for x in tensors])


def unflatten(flat, tensors):
    """Views into a flat tensor with the shapes of these."""
    return [x.view_as(t) for x, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


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


def reduce_scatter(x, sizes, group=None, dtype=None):
    """Sum over ranks, of which rank r gets its part of sizes[r] numbers: (sum of sizes,) ->
    (own,). Gloo's own sends as much as an all-reduce; an exchange and a sum of what came send the
    least. The order of the sum is that of the ranks, the same everywhere. dtype: of the sum."""
    own, W = sizes[rank(group)], world(group)
    if W == 1:
        return x.to(dtype or x.dtype)
    parts = x.new_empty(W * own)
    dist.all_to_all_single(parts, x, [own] * W, sizes, group=group)
    return parts.view(W, own).sum(0, dtype=dtype)


def all_gather(x, group=None):
    """Equally long parts of all ranks, one after the other: (n,) -> (W n,)"""
    if world(group) == 1:
        return x.clone()
    out = x.new_empty(world(group) * len(x))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # (old name)
    gather(out, x.contiguous(), group=group)
    return out


class Collective(torch.autograd.Function):
    """forward(x), whose gradient is backward(g): the mirror image of a collective is another."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.mirror = backward
        return forward(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.mirror(g.contiguous()), None, None


# -----------------------------------------------------------------------------
# Data parallel: every rank has the whole model and a part of the batch; gradients are averaged.


def pack_gradients(params):
    """Gradients, 0 where a parameter has none, and then for each whether it has one: (n,)"""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    has = torch.tensor([p.grad is not None for p in params])
    return flatten([*grads, has.to(params[0])])


def unpack_gradients(flat, params):
    """What `pack_gradients` made, summed over ranks -> {parameter: its gradient}, without those
    that have none on any rank."""
    *grads, has = unflatten(flat, [*params, flat[-len(params) :]])
    return {p: g for p, g, some in zip(params, grads, has.tolist()) if some}


class Buckets:
    """Parameters in groups of about bucket_mb, the last layers first, as the backward pass comes
    to them. While `active`, send(bucket) is called as soon as a bucket's gradients are there,
    while those of earlier layers are still being computed; `finish` sends the rest. The order is
    the same on all ranks, or they would wait for one another."""

    def __init__(self, params, bucket_mb, send, active):
        self.limit, self.send, self.active = bucket_mb * 2**20, send, active
        self.buckets, self.bucket_of = [], {}
        self.add(params)

    def add(self, params):
        """Take in further parameters. A bucket has one dtype."""
        room = -1
        for p in reversed([p for p in params if p.requires_grad]):
            if p.nbytes > room or p.dtype != self.buckets[-1][0].dtype:
                self.buckets.append([])
                room = self.limit
            self.buckets[-1].append(p)
            self.bucket_of[p] = len(self.buckets) - 1
            room -= p.nbytes
            p.register_post_accumulate_grad_hook(self._ready)
        self._begin()

    def _begin(self):
        self.missing, self.next = [set(bucket) for bucket in self.buckets], 0

    def _send(self):
        self.next += 1
        self.send(self.buckets[self.next - 1])

    def _ready(self, p):
        """The gradient of p is there."""
        if self.active:
            if p not in self.missing[self.bucket_of[p]]:  # this is another backward pass
                self.finish()
            self.missing[self.bucket_of[p]].remove(p)
            while self.next < len(self.buckets) and not self.missing[self.next]:
                self._send()

    def finish(self):
        """Send what is left: some of its gradients are missing."""
        while self.next < len(self.buckets):
            self._send()
        self._begin()


class DDP(nn.Module):
    """Wrap a module so that gradients become the mean over ranks.

    bucket_mb: gradients travel together in buckets of about this size: 0, each parameter alone
    (naive); math.inf, all in one (flat). overlap: a bucket leaves as soon as its gradients are
    there, while the backward pass still computes those of earlier layers. params: default all.

        model = DDP(model); loss = ...; loss.backward(); model.finish_gradient_synchronization()

    Parameters that get no gradient on any rank keep none; on a rank where one has none it counts
    as 0. Use `with model.no_sync()` around the backward passes of a step but the last.
    """

    def __init__(self, module, bucket_mb=25.0, overlap=True, group=None, params=None):
        super().__init__()
        self.module, self.group, self.overlap, self.work = module, group, overlap, []
        params = list(module.parameters()) if params is None else params
        broadcast([*params, *module.buffers()], group)
        self.buckets = Buckets(params, bucket_mb, self._send, overlap)

    def _send(self, bucket):
        """Start the all-reduce of a bucket."""
        if world(self.group) > 1:
            flat = pack_gradients(bucket)
            work = dist.all_reduce(flat, group=self.group, async_op=True)
            self.work.append((work, flat, bucket))

    def finish_gradient_synchronization(self):
        """After the backward pass: wait until all gradients are the mean over ranks."""
        self.buckets.finish()
        for work, flat, bucket in self.work:
            work.wait()
            for p, g in unpack_gradients(flat.div_(world(self.group)), bucket).items():
                p.grad = g
        self.work = []

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's own gradients."""
        self.buckets.active = False
        try:
            yield
        finally:
            self.buckets.active = self.overlap

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


# -----------------------------------------------------------------------------
# ZeRO (Rajbhandari et al. 2020): W copies of the same optimizer state are W - 1 too many.


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of any class whose state is divided: each parameter has one owner, which alone
    keeps its state and updates it, and then sends it to the others (ZeRO-1).

        optimizer = ShardedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)

    Gradients can be averaged before by DDP; or by `reduce_gradients`, which gives each only to its
    owner, so that with the parameters that come back no more is sent than for DDP alone. With
    shard_gradients that happens in the backward pass, and what a rank does not own it frees at
    once (ZeRO-2). state_dict() holds this rank's part of the state.
    """

    def __init__(self, params, optimizer_cls, group=None, shard_gradients=False, **kwargs):
        self.group, self.owner, self.load = group, {}, [0] * world(group)
        self.reduced = {}  # own gradients, summed over ranks and the backward passes so far
        limit = 0 if shard_gradients else math.inf
        self.buckets = Buckets([], limit, self._reduce, shard_gradients)
        # has all parameters, but makes a state only of those that have gradients when it steps
        self.local = optimizer_cls(params, **kwargs)
        super().__init__(self.local.param_groups, self.local.defaults)
        self.param_groups, self.state = self.local.param_groups, self.local.state
        for p, r in self.owner.items():  # (Adagrad has made all of it already)
            if r != rank(group):
                self.state.pop(p, None)

    def add_param_group(self, param_group):
        """Take in further parameters; each goes to the rank that has the least so far."""
        super().add_param_group(param_group)
        params = [p for p in self.param_groups[-1]["params"] if p.requires_grad]
        for p in sorted(params, key=lambda p: -p.numel()):
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()
        self.buckets.add(params)

    def load_state_dict(self, state_dict):
        """Take up what state_dict() gave on this rank."""
        super().load_state_dict(state_dict)
        self.local.state, self.local.param_groups = self.state, self.param_groups  # (new ones)

    @torch.no_grad()
    def _reduce(self, params):
        """Average the gradients of these parameters at their owners; the others lose them."""
        parts = [[p for p in params if self.owner[p] == r] for r in range(world(self.group))]
        packed = [pack_gradients(part) if part else params[0].new_empty(0) for part in parts]
        own = reduce_scatter(flatten(packed), [len(x) for x in packed], self.group)
        for p in params:
            p.grad = None
        for p, g in unpack_gradients(own / world(self.group), parts[rank(self.group)]).items():
            self.reduced[p] = g + self.reduced.get(p, 0)

    def reduce_gradients(self):
        """Average the gradients over ranks, each at its owner; all others are freed."""
        self.buckets.finish()
        for p, g in self.reduced.items():
            p.grad = g
        self.reduced = {}

    @torch.no_grad()
    def step(self, closure=None):
        """Update own parameters, then take over those of the other ranks."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for p, r in self.owner.items():
            if r != rank(self.group):
                p.grad = None
        self.local.step()
        parts = {}  # all of an owner travel together
        for p, r in self.owner.items():
            parts.setdefault((r, p.dtype), []).append(p)
        if world(self.group) > 1:
            for (r, _), part in parts.items():
                flat = flatten(part)
                dist.broadcast(flat, group=self.group, group_src=r)
                torch._foreach_copy_(part, unflatten(flat, part))
        return loss


# -----------------------------------------------------------------------------
# Fully sharded: no rank has a whole matrix but while it is used (ZeRO-3; Zhao et al. 2023).


def shard_parameter(x, group=None):
    """This rank's part of a parameter's numbers, a parameter of its own: (ceil(n / W),), the end
    filled up with 0. It knows how parts are made of what has its shape, and wholes of parts."""
    W, n, shape = world(group), x.numel(), x.shape

    def to_part(x):
        return F.pad(x.detach().reshape(-1), (0, -n % W)).view(W, -1)[rank(group)].clone()

    shard = nn.Parameter(to_part(x), x.requires_grad)
    shard.to_part, shard.to_whole = to_part, lambda x: all_gather(x, group)[:n].view(shape)
    return shard


def gather_weight(shard, dtype, group=None):
    """Shards of all ranks -> the whole matrix; its gradient, averaged, goes back into shards."""
    def scatter(g):
        flat = F.pad(g.reshape(-1), (0, len(shard) * world(group) - g.numel()))
        sizes = [len(shard)] * world(group)
        return reduce_scatter(flat, sizes, group, shard.dtype) / world(group)

    return Collective.apply(shard, lambda x: shard.to_whole(x.to(dtype)), scatter)


def whole(p, x):
    """The whole of x, which is p or of its shape, if p is this rank's part of a parameter."""
    return p.to_whole(x) if hasattr(p, "to_whole") and x.shape == p.shape else x


class FSDP(DDP):
    """Wrap a module so that each rank keeps 1/W of every Linear's and Embedding's weight, as a
    flat parameter; gathers it just ahead of its use, in the forward pass and again in the backward
    pass, and frees it afterwards. Other parameters are small: they stay whole, as in DDP. Linear
    and Embedding are any classes of these names, and what inherits from one. Raises ValueError if
    there is none.

    compute_dtype: bfloat16 or float16, of gathered weights and their gradients; the shards stay as
    they are (float32 masters). Optimizers are given FSDP's parameters(): AdamW, which looks at
    each number by itself, works on shards; Muon, which needs matrices, does not.
    """

    def __init__(self, module, compute_dtype=None, group=None):
        shards = {}  # whole parameter -> its shard; of tied ones there is one
        for part in module.modules():
            names = {cls.__name__ for cls in type(part).__mro__}
            p = part._parameters.get("weight")
            # (nn.MultiheadAttention's output layer is not called: its weight is read)
            if p is not None and p.ndim == 2 and names & {"Linear", "Embedding"} and \
                    "NonDynamicallyQuantizableLinear" not in names:
                if p not in shards:
                    broadcast([p], group)
                    shards[p] = shard_parameter(p, group)
                part.weight = shards[p]
                part.forward = functools.partial(self._run, part, part.forward)
        if not shards:
            raise ValueError("FSDP finds nothing to shard: no Linear or Embedding whose weight is "
                             "a matrix")
        others = [p for p in module.parameters() if not hasattr(p, "to_whole")]
        super().__init__(module, math.inf, False, group, others)
        self.compute_dtype = compute_dtype

    def _run(self, part, forward, *args, **kwargs):
        """Call a Linear or an Embedding with its whole weight."""
        shard, kind = part.weight, part.weight.device.type
        dtype = self.compute_dtype or shard.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(kind) and any(
                torch.is_tensor(x) and x.is_floating_point() for x in args):  # (no Embedding's)
            dtype = torch.get_autocast_dtype(kind)  # or the graph would keep a copy in this dtype
        full = gather_weight(shard, dtype, self.group)
        address, numel = full.data_ptr(), full.numel()

        def pack(x):  # in place of the whole matrix the graph keeps a note to gather it again
            whole = x.data_ptr() == address and x.numel() == numel
            return (x.shape, x.stride()) if whole else x

        def unpack(x):
            if torch.is_tensor(x):
                return x
            return shard.to_whole(shard.detach().to(dtype)).as_strided(*x)

        lower = contextlib.nullcontext() if dtype == shard.dtype else torch.autocast(kind, dtype)
        part.__dict__["weight"] = full  # found before the parameter of this name
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack), lower:
                return forward(*args, **kwargs)
        finally:
            del part.__dict__["weight"]

    @torch.no_grad()
    def gather_full_params(self):
        """{name: whole tensor} as the wrapped module's own state_dict() would be on one rank."""
        params = dict(self.module.named_parameters(remove_duplicate=False))
        return {name: whole(params.get(name), x).clone()
                for name, x in self.module.state_dict().items()}


# -----------------------------------------------------------------------------
# Tensor parallel (Shoeybi et al. 2019): every matrix is split. Of two in a row the first is split
# by columns (each rank computes some of the units), the second by rows (each rank sums over its
# units); only then are the sums added up: one all-reduce forward, and one backward.


def copy_to(x, group):
    """The same input for all ranks; its gradient is the sum of theirs."""
    return Collective.apply(x, lambda x: x.view_as(x), lambda g: all_reduce(g.clone(), group))


def sum_over(x, group):
    """The sum of all ranks' outputs; each has the gradient of the sum."""
    return Collective.apply(x, lambda x: all_reduce(x.clone(), group), lambda g: g)


def part_of(n, group, what="size"):
    """This rank's slice of n things. Raises ValueError if they can not be divided evenly."""
    W = world(group)
    if n % W:
        raise ValueError(f"{what} {n} can not be divided by {W} processes")
    return slice(rank(group) * n // W, (rank(group) + 1) * n // W)


def split_parameter(x, axis, group):
    """This rank's part of a parameter along an axis, as `shard_parameter`. Raises ValueError."""
    W = world(group)
    part_of(x.shape[axis], group)

    def to_part(x):
        return x.detach().chunk(W, axis)[rank(group)].clone()

    def to_whole(x):
        return torch.cat(all_gather(x.reshape(-1), group).view(W, *x.shape).unbind(), axis)

    p = nn.Parameter(to_part(x))
    p.to_part, p.to_whole = to_part, to_whole
    return p


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b of which each rank computes d_out / W columns: (..., d_in) -> (..., d_out /
    W). weight, bias_value: of the whole layer, or random. copied: the input's gradient is summed
    over ranks elsewhere, once for several such layers."""

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None,
                 copied=False):
        super().__init__()
        self.group, self.copied, whole = group, copied, model_py.Linear(d_in, d_out, bias)
        self.weight = split_parameter(whole.weight if weight is None else weight, 0, group)
        bias = whole.bias if bias_value is None else bias_value
        self.bias = None if bias is None else split_parameter(bias, 0, group)

    def forward(self, x):
        x = x if self.copied else copy_to(x, self.group)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b of which each rank has d_in / W inputs: (..., d_in / W) -> (..., d_out)."""

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None):
        super().__init__()
        self.group, whole = group, model_py.Linear(d_in, d_out, bias)
        self.weight = split_parameter(whole.weight if weight is None else weight, 1, group)
        bias = whole.bias if bias_value is None else bias_value
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
    maximum, a sum and the target's logit of each position travel, not the logits. z_loss: as in
    train.cross_entropy."""
    part = part_of(logits.shape[-1] * world(group), group)
    logits = model_py.upcast(logits)
    m = all_reduce(logits.detach().amax(-1), group, dist.ReduceOp.MAX)
    log_z = m + sum_over((logits - m[..., None]).exp().sum(-1), group).log()
    mine = (targets >= part.start) & (targets < part.stop)
    at = logits.gather(-1, (targets - part.start).masked_fill(~mine, 0)[..., None])[..., 0]
    losses = log_z - sum_over(at * mine, group)
    if z_loss:
        losses = losses + z_loss * log_z.square()
    return losses.masked_fill(targets == ignore_index, 0.0).sum()


def split_tensors(model, group):
    """Make a Transformer tensor parallel, in place -> itself. Raises ValueError."""
    c, W = model.config, world(group)
    if set(c.attention.split(",")) - {"full", "sliding"} or c.norm_place != "pre" or \
            c.activation == "moe" or c.tie_embeddings or c.qk_norm_joint or c.dropout or \
            c.logit_cap:
        raise ValueError("--tp is for full and sliding attention and norms before the parts, with "
                         "no experts, tied embeddings, qk_norm_joint, dropout or logit_cap")
    for name in ("n_head", "n_kv_head", "d_ff", "vocab_size"):
        part_of(getattr(c, name), group, name)

    def split(parent, name, kind, **more):
        linear = getattr(parent, name)
        setattr(parent, name, kind(*linear.weight.shape[::-1], linear.bias is not None, group,
                                   linear.weight, linear.bias, **more))

    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        # queries, keys and values have one input, as have w1 and w3: one all-reduce for all
        for norm in (block.attn_norm, block.ffn_norm):
            norm.register_forward_hook(lambda module, args, y: copy_to(y, group))
        for name in ("q_proj", "k_proj", "v_proj"):
            split(attn, name, ColumnParallelLinear, copied=True)
        for name in ("w1", "w3") if c.activation == "swiglu" else ("w1",):
            split(ffn, name, ColumnParallelLinear, copied=True)
        split(attn, "o_proj", RowParallelLinear)
        split(ffn, "w2", RowParallelLinear)
        attn.n_head, attn.n_kv_head = c.n_head // W, c.n_kv_head // W
        if c.qk_norm:  # each rank's heads give a part of the gradient
            for norm in (attn.q_norm, attn.k_norm):
                norm.weight.register_hook(lambda g: all_reduce(g.clone(), group))
    model.embedding = VocabParallelEmbedding(c.vocab_size, c.n_embd, group, model.embedding.weight)
    split(model, "head", ColumnParallelLinear)
    return model


# -----------------------------------------------------------------------------
# Pipeline parallel: every rank has some of the layers, and a batch passes in pieces, so that all
# have something to do. GPipe (Huang et al. 2019) does all forward passes, then all backward
# passes; 1F1B (Narayanan et al. 2019) begins each backward pass as soon as it can, and keeps the
# activations of W pieces at most. Both wait (W - 1) / (pieces + W - 1) of the time.

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def receive(x, source, group):
    """Fill x with what rank `source` sends -> x."""
    dist.recv(x, group=group, group_src=source)
    return x


def pipeline_step(stage, batches, loss_fn, group=None, schedule="1f1b", device="cpu"):
    """Forward and backward passes of several micro-batches through the stages of a group's ranks.

    stage: this rank's module; batches: list of (x, y), of which the first stage takes x and the
    last y; loss_fn(output, y): a micro-batch's share of the loss, in the last stage. Adds to
    gradients; under torch.no_grad() there are only the forward passes. -> the sum of the losses, a
    tensor (on the last rank; 0 elsewhere). Raises ValueError.
    """
    if schedule not in ("gpipe", "1f1b"):
        raise ValueError(f"schedule is gpipe or 1f1b, not {schedule}")
    W, r = world(group), rank(group)
    first, last = r == 0, r == W - 1
    under_way, sent, loss = [], [], torch.zeros((), device=device)

    def send(x, to):
        x = x.contiguous()
        sent.append((dist.isend(x, group=group, group_dst=to), x))  # x must live until it has left

    def forward(x, y):
        nonlocal loss
        if not first:  # what comes: first its dtype and shape, then the numbers
            dtype, *shape = receive(torch.zeros(8, dtype=torch.int64, device=device), r - 1, group)
            shape = [n for n in shape if n >= 0]
            x = torch.empty(shape, dtype=DTYPES[dtype], device=device)
            x = receive(x, r - 1, group).requires_grad_()
        out = stage(x)
        if last:
            out = loss_fn(out, y)
            loss = loss + out.detach()
        else:
            head = [DTYPES.index(out.dtype), *out.shape]
            send(torch.tensor(head + [-1] * (8 - len(head)), device=device), r + 1)
            send(out.detach(), r + 1)
        under_way.append((x, out))

    def backward():
        x, out = under_way.pop(0)
        if torch.is_grad_enabled():
            out.backward(None if last else receive(torch.empty_like(out), r + 1, group))
            if not first:
                send(x.grad, r - 1)

    ahead = len(batches) if schedule == "gpipe" else min(len(batches), W - 1 - r)
    for i, batch in enumerate(batches):
        forward(*batch)
        if i >= ahead:
            backward()
    while under_way:
        backward()
    for handle, _ in sent:
        handle.wait()
    return loss


class Skip(nn.Module):
    """A layer that another rank has."""

    def forward(self, x, *others):
        return x


def split_layers(model, group=None):
    """Leave a Transformer this rank's layers, in place -> itself. The first rank also keeps the
    embedding, and takes ids, the others (B, T, C); the last one keeps the head, and gives logits,
    the others (B, T, C). Raises ValueError."""
    c, W, r = model.config, world(group), rank(group)
    if c.tie_embeddings or c.activation == "moe":
        raise ValueError("--pp does not go with tied embeddings or experts")
    if c.n_layer < W:
        raise ValueError(f"{c.n_layer} layers are too few for {W} stages")
    for i in range(c.n_layer):
        if not r * c.n_layer // W <= i < (r + 1) * c.n_layer // W:
            model.blocks[i] = Skip()
    if r > 0:
        model.embedding = model.positions = None
        model.embed = lambda x, at: x
    if r < W - 1:
        model.final_norm = model.head = None
        model.predict = lambda x: x
    return model


# -----------------------------------------------------------------------------
# Sequence parallel: every rank has a part of each sequence. All parts of a model work on tokens
# one by one, but for attention: there keys and values go around in a ring, and each rank keeps an
# online softmax of what it has seen (Liu et al. 2023).


def rotate(tensors, group=None):
    """Send tensors to the next rank, receive those of the one before."""
    W, r = world(group), rank(group)
    if W == 1:
        return tensors
    flat = flatten(tensors)
    out = torch.empty_like(flat)
    ways = [dist.P2POp(dist.isend, flat, group=group, group_peer=(r + 1) % W),
            dist.P2POp(dist.irecv, out, group=group, group_peer=(r - 1) % W)]
    for handle in dist.batch_isend_irecv(ways):
        handle.wait()
    return unflatten(out, tensors)


class RingAttention(torch.autograd.Function):
    """See `ring_attention`; backward as in FlashAttention, with gradients that travel. Keys and
    values are (B, H / n, 1, T, D), all else (B, H / n, n, T, D)."""

    @staticmethod
    def visible(q, k, source, group, causal):
        """How q sees the keys of rank `source`: scores (..., T, T); None if they come later."""
        r = rank(group)
        if causal and source > r:
            return None
        s = q @ k.mT * q.shape[-1] ** -0.5
        if causal and source == r:
            s = s.masked_fill(~model_py.causal_mask(q.shape[-2], q.device), -math.inf)
        return s

    @staticmethod
    def forward(ctx, q, k, v, group, causal):
        W, r, saved = world(group), rank(group), (q, k, v)
        m, l, acc = torch.full_like(q[..., :1], -math.inf), 0.0, 0.0
        for step in range(W):
            s = RingAttention.visible(q, k, (r - step) % W, group, causal)
            if s is not None:
                larger = torch.maximum(m, s.amax(-1, keepdim=True))
                p, shrink = (s - larger).exp(), (m - larger).exp()
                m, l, acc = larger, l * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ v
            if step + 1 < W:
                k, v = rotate((k, v), group)
        ctx.group, ctx.causal, o = group, causal, acc / l
        ctx.save_for_backward(*saved, o, m + l.log())
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        W, r, delta = world(ctx.group), rank(ctx.group), (g * o).sum(-1, keepdim=True)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for step in range(W):  # the gradients travel with their keys, and are home after W steps
            s = RingAttention.visible(q, k, (r - step) % W, ctx.group, ctx.causal)
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
    return RingAttention.apply(q, k, v, group, causal).flatten(1, 2)


def split_sequence(model, T, group):
    """Let a Transformer work on this rank's T positions of each sequence, in place -> itself."""
    c = model.config
    if set(c.attention.split(",")) != {"full"} or c.activation == "moe" or c.dropout:
        raise ValueError("--sp is for full attention, without experts and dropout")
    model.first_position = rank(group) * T
    for block in model.blocks:
        block.attn.attend = functools.partial(ring_attention, group=group)
    return model


# -----------------------------------------------------------------------------
# The training run: train.py's, on several processes.

SCHEMES = ("naive", "flat", "ddp", "zero1", "zero2", "fsdp")


def say(*text):
    """Print, on the first process."""
    if rank() == 0:
        print(*text, flush=True)


def local(x):
    """What this rank has of a tensor of FSDP2, or the tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


class Parallel:
    """A Transformer on several processes: what the loop of `run` needs to know of it.

    Ranks are numbered so that those of one copy of the model are neighbours. A copy has tp, pp or
    sp ranks; the same rank of all copies forms a group for data parallelism.
    """

    def __init__(self, model, args, device):
        self.args, self.device, self.config = args, device, model.config
        self.autocast, self.dtype = train.make_autocast(device, args.dtype)
        n, W = args.tp * args.pp * args.sp, world()  # ranks of one copy, and all
        self.dp, self.copy_rank = W // n, rank() // n
        self.group = self.grads = None  # ranks of one copy; those that average their gradients
        if n > 1:
            make = dist.new_subgroups_by_enumeration
            self.group, _ = make([list(range(i, i + n)) for i in range(0, W, n)])
            if args.sp == 1:  # else all have the same parameters, and different tokens
                self.grads, _ = make([list(range(i, W, n)) for i in range(n)])

        # optimizers as one process has them, whose parameters are then replaced by our parts
        self.optimizers = train.make_optimizers(
            model, args.optimizer, args.learning_rate, args.weight_decay, (args.beta1, args.beta2),
            args.momentum, args.mup)
        name_of = {p: name for name, p in model.named_parameters()}
        self.groups = [group for o in self.optimizers for group in o.param_groups]
        for group in self.groups:
            group["names"] = [name_of[p] for p in group["params"]]
        if args.tp > 1:
            split_tensors(model, self.group)
        elif args.pp > 1:
            split_layers(model, self.group)
        elif args.sp > 1:
            part_of(self.config.block_size, self.group, "block_size")
            split_sequence(model, self.config.block_size // args.sp, self.group)
        self.module, self.wrapped = model, self.wrap(model)
        self.params = dict(model.named_parameters())
        for group in self.groups:
            group["params"] = [self.params[name] for name in group["names"] if name in self.params]
        if "zero" in args.scheme:
            self.optimizers = [ShardedOptimizer(o.param_groups, type(o), self.grads,
                                                args.scheme == "zero2", **o.defaults)
                               for o in self.optimizers]
        # whether each optimizer state, and each gradient, is on one rank only
        self.apart = "zero" in args.scheme or args.pp > 1

    def wrap(self, model):
        """-> what is called in place of the model, so that gradients become means."""
        args = self.args
        if args.impl == "torch" and args.scheme == "fsdp":
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import distribute_tensor

            for part in [*model.blocks, model]:
                fully_shard(part)
            for p in model.parameters():
                p.to_whole, p.to_part = type(p).full_tensor, functools.partial(
                    distribute_tensor, device_mesh=p.device_mesh, placements=p.placements)
        elif args.scheme == "fsdp":
            return FSDP(model, group=self.grads)
        elif args.impl == "torch" and world() > 1:
            return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=args.bucket_mb)
        elif "zero" in args.scheme:
            broadcast([*model.parameters(), *model.buffers()])
        elif world(self.grads) > 1:
            size = {"naive": 0, "flat": math.inf}.get(args.scheme, args.bucket_mb)
            # a pipeline has several backward passes, of which only the last may send
            return DDP(model, size, args.scheme == "ddp" and args.pp == 1, self.grads)
        return model

    def cut(self, x):
        """This rank's positions of sequences: all, but for sequence parallelism."""
        return x.chunk(self.args.sp, 1)[rank(self.group)] if self.args.sp > 1 else x

    def loss_sum(self, logits, y):
        """Sum of the losses of this rank's part of a batch."""
        z_loss = self.args.z_loss if self.module.training else 0.0
        if self.args.tp > 1:
            return vocab_parallel_cross_entropy(logits, y, self.group, z_loss=z_loss)
        return train.cross_entropy(logits, y, reduction="sum", z_loss=z_loss)

    def backward(self, batches):
        """Gradients of the mean loss over all tokens of all ranks -> that loss, a number."""
        batches = [(self.cut(x), self.cut(y)) for x, y in batches]
        total = sum(y.numel() for _, y in batches)  # the same on all ranks
        loss, quiet = 0.0, getattr(self.wrapped, "no_sync", contextlib.nullcontext)
        if self.args.pp > 1:
            n = self.args.microbatches
            batches = [piece for x, y in batches for piece in zip(x.chunk(n), y.chunk(n))]
            with self.autocast():
                loss = pipeline_step(
                    self.module, batches, lambda logits, y: self.loss_sum(logits, y) / total,
                    self.group, self.args.pp_schedule, self.device)
        else:
            for i, (x, y) in enumerate(batches):
                with quiet() if i + 1 < len(batches) else contextlib.nullcontext():
                    with self.autocast():
                        part = self.loss_sum(self.wrapped(x), y) / total
                    (part + self.module.auxiliary_loss() / len(batches)).backward()
                loss = loss + part.detach()
        if isinstance(self.wrapped, DDP):
            self.wrapped.finish_gradient_synchronization()
        if "zero" in self.args.scheme:
            for optimizer in self.optimizers:
                optimizer.reduce_gradients()
        # the loss of a copy: with --tp all its ranks have it, with --pp the last, with --sp parts
        return all_reduce(loss).item() * self.args.pp / world()

    @torch.no_grad()
    def clip(self, max_norm, eps=1e-6):
        """Clip all gradients by their norm together -> the norm before, a number."""
        grads, squares = [], torch.zeros(2, device=self.device)  # of our own, and of what all have
        for p in self.params.values():
            if p.grad is not None:
                grads.append(local(p.grad))
                own = self.apart or hasattr(p, "to_whole")
                squares[0 if own else 1] += grads[-1].square().sum()
        all_reduce(squares[0], self.group if self.args.tp * self.args.pp > 1 else self.grads)
        norm = squares.sum().sqrt()
        if max_norm and grads:
            torch._foreach_mul_(grads, torch.clamp(max_norm / (norm + eps), max=1.0))
        return norm.item()

    def step(self):
        """Update the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.args.pp == 1:
            for mixture in self.module.mixtures():
                if torch.is_tensor(mixture.load):
                    all_reduce(mixture.load, self.grads)
            self.module.update_router_bias()

    @torch.no_grad()
    def evaluate(self, data, batch_size, most=None):
        """As train.evaluate, on at most so many windows, which the copies of the model share."""
        T, n = self.config.block_size, self.dp * batch_size
        starts = train.evaluation_starts(data, T, most)
        # all ranks take part in all batches: in the last one some have windows without targets
        starts = np.pad(starts, (0, -len(starts) % n), constant_values=len(data))
        total = count = 0
        self.module.eval()
        for i in range(self.copy_rank * batch_size, len(starts), n):
            x, y = train.windows(data, starts[i : i + batch_size], T, self.device)
            train.check_ids([(x, y)], self.config.vocab_size)
            x, y = self.cut(x), self.cut(y)
            with self.autocast():
                loss = self.loss_sum(self.wrapped(x), y) if self.args.pp == 1 else pipeline_step(
                    self.module, [(x, y)], self.loss_sum, self.group, device=self.device)
            total += loss.item() * self.args.pp  # which only the last stage has
            count += int((y != -100).sum())
        self.module.train()
        total, count = all_reduce(torch.tensor([total, count], device=self.device)).tolist()
        return total / count

    # ---- checkpoints, which are those of one process

    @torch.no_grad()
    def full_state(self):
        """-> (state dict of the whole model, state of each optimizer as on one process); all ranks
        take part."""
        model = {name: whole(self.params.get(name), x)
                 for name, x in self.module.state_dict().items()}
        if self.config.tie_embeddings:
            model["head.weight"] = model["embedding.weight"]
        name_of = {p: name for name, p in self.params.items()}
        states = {name_of[p]: {key: whole(p, x) if torch.is_tensor(x) else x
                              for key, x in state.items()}
                  for optimizer in self.optimizers for p, state in optimizer.state.items()}
        if self.apart and world() > 1:
            group = self.group if self.args.pp > 1 else self.grads
            parts = [None] * world(group)
            own = model if self.args.pp > 1 else {}  # with ZeRO all ranks have the whole model
            dist.all_gather_object(parts, (own, states), group=group)
            for theirs, more in parts:
                model |= theirs
                states |= more
        result = []
        for optimizer in self.optimizers:
            index = {name: i for i, name in enumerate(names_of(optimizer))}
            groups = [{**group, "params": [index[name] for name in group["names"]]}
                      for group in optimizer.param_groups]
            result.append({"state": {i: states[name] for name, i in index.items()
                                     if name in states}, "param_groups": groups})
        return model, result

    def load_optimizers(self, saved):
        """Take this rank's part of the optimizers' state in a checkpoint. Raises ValueError."""
        me = rank(self.grads)
        try:
            for optimizer, whole in zip(self.optimizers, saved, strict=True):
                names, owner = names_of(optimizer), getattr(optimizer, "owner", {})
                for i, state in whole["state"].items():
                    p = self.params.get(names[i])
                    if p is not None and owner.get(p, me) == me:
                        part = getattr(p, "to_part", lambda x: x)
                        optimizer.state[p] = {key: part(x) if torch.is_tensor(x) else x
                                              for key, x in state.items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"the checkpoint's optimizer can not be resumed: {error}") from None


def names_of(optimizer):
    """Names of the parameters in the order in which one process has them."""
    return [name for group in optimizer.param_groups for name in group["names"]]


def setup(args):
    """Join the other processes -> this one's device. Raises ValueError."""
    device = model_py.pick_device(args.device)
    if "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":  # else a world of one
        if device.startswith("cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        else:
            device = "cpu"
        try:
            store, number, W = next(dist.rendezvous("env://"))
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{reason}: start me with torchrun") from None
        # after a restart the store may still have the addresses of those that have died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=number,
                                world_size=W, timeout=datetime.timedelta(minutes=10))
    W, n, alone = world(), args.tp * args.pp * args.sp, args.scheme in ("zero1", "zero2", "fsdp")
    sequences = args.batch_size // max(1, W // n)  # of a copy of the model
    ours = [flag for flag in ("teacher", "noise_scale", "kernels", "compile", "offload")
            if getattr(args, flag) not in (None, False, "none")]
    for wrong, message in (
            (n not in (args.tp, args.pp, args.sp),
             "--tp, --pp and --sp go with --dp, but not with one another"),
            (W % n or args.dp not in (0, W // n),
             f"--dp {args.dp or 'any'} x --tp {args.tp} x --pp {args.pp} x --sp {args.sp} is not "
             f"the number of processes, {W}"),
            (n > 1 and alone, f"--scheme {args.scheme} is for data parallelism alone"),
            (args.impl == "torch" and (n > 1 or args.scheme not in ("ddp", "fsdp")),
             "--impl torch has --scheme ddp and fsdp, without --tp, --pp and --sp"),
            ((args.scheme == "fsdp" or args.tp > 1) and args.optimizer in ("muon", "soap"),
             "--scheme fsdp and --tp split matrices, which muon and soap need whole"),
            (args.batch_size % max(1, W // n), f"--batch_size {args.batch_size}, of all ranks "
             f"together, can not be divided by {W // n}"),
            (args.pp > 1 and sequences % args.microbatches, f"the {sequences} sequences of a "
             f"rank can not be divided into {args.microbatches} micro-batches"),
            (args.activation_checkpointing and (n > 1 or args.scheme == "fsdp"),
             "--activation_checkpointing goes with none of --tp, --pp, --sp and fsdp"),
            (ours, f"--{', --'.join(ours)}: that is train.py's")):
        if wrong:
            raise ValueError(message)
    return device


def run(args):
    """Train as train.py does, on all processes together."""
    device = setup(args)
    torch.manual_seed(args.seed)  # all ranks begin with the same numbers
    path = os.path.join(args.out_dir, "ckpt.pt")
    model, checkpoint, train_data, val_data, tokenizer, bytes_per_token = \
        train.open_model(args, device)
    config, T, n = model.config, model.config.block_size, len(train_data)
    if n <= T * args.batch_size:
        raise ValueError(f"{args.data}/train.bin has {n:,} tokens, fewer than the "
                         f"{T * args.batch_size:,} of one batch of all ranks")
    model.activation_checkpointing = args.activation_checkpointing
    parallel = Parallel(model, args, device)
    batch_size, accumulate = args.batch_size // parallel.dp, args.gradient_accumulation_steps
    tokens_per_step = args.batch_size * accumulate * T
    step, best_val_loss = checkpoint["step"] if args.resume else 0, math.inf
    log = train.Log(os.path.join(args.out_dir, "log.csv"), step, args.max_iters, tokens_per_step,
                    bytes_per_token, say)
    if args.eval_only:
        loss = parallel.evaluate(val_data, batch_size)
        return log.evaluation(checkpoint["step"] if checkpoint else 0, loss)
    if args.resume:
        best_val_loss = checkpoint["best_val_loss"]
        parallel.load_optimizers(checkpoint["optimizer"])
        train.set_rng(checkpoint["rng"])
    os.makedirs(args.out_dir, exist_ok=True)
    if parallel.copy_rank:  # dropout is to differ among copies, and from step to step
        torch.manual_seed(args.seed + parallel.copy_rank + 1_000_003 * step)
    say(f"dp {parallel.dp} x tp {args.tp} x pp {args.pp} x sp {args.sp} processes, {args.impl} "
        f"{args.scheme} | {n:,} training tokens | {tokens_per_step:,} tokens per step | {device}, "
        f"{parallel.dtype}")

    def save():
        state, optimizers = parallel.full_state()
        if rank() == 0:
            like = [types.SimpleNamespace(config=config, quantized=None, state_dict=lambda x=x: x)
                    for x in (state, *optimizers)]  # what save_checkpoint asks for
            model_py.save_checkpoint(path, like[0], like[1:], step, best_val_loss,
                                     train.get_rng(), vars(args), tokenizer)
            log.write()

    warmup_iters = args.max_iters // 20 if args.warmup_iters is None else args.warmup_iters
    stopped, stop = [], False
    for number in (signal.SIGINT, signal.SIGTERM):  # of any process: finish the step, save, leave
        signal.signal(number, lambda number, frame: stopped.append(number))
    log.pause(step)
    parallel.module.train()
    while step < args.max_iters and not stop:
        lr = train.get_lr(step, args.learning_rate, args.min_lr, warmup_iters, args.max_iters,
                          args.schedule, args.decay_fraction)
        for group in parallel.groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        batches = [train.get_batch(train_data, batch_size, T, device, i, args.seed,
                                   parallel.copy_rank, parallel.dp)
                   for i in range(step * accumulate, (step + 1) * accumulate)]
        train.check_ids(batches, config.vocab_size)
        loss, norm = parallel.backward(batches), parallel.clip(args.grad_clip)
        if not math.isfinite(loss + norm):
            raise ValueError(f"at step {step + 1} the loss is {loss} and the gradient norm "
                             f"{norm}: try a smaller --learning_rate")
        parallel.step()
        step += 1
        stop = all_reduce(torch.tensor(len(stopped), device=device)).item() > 0
        last_step = step == args.max_iters
        if step % args.log_interval == 0 or last_step or stop:
            log.train(step, loss, lr, norm)
        if (step % args.eval_interval == 0 or last_step) and not stop:
            most = None if last_step else args.eval_iters * args.batch_size
            val_loss = parallel.evaluate(val_data, batch_size, most)
            best_val_loss = min(best_val_loss, val_loss)
            log.evaluation(step, val_loss)
            save()
            log.pause(step)
    if stop:
        save()
        say(f"stopped after step {step}; --resume goes on from {path}")
        sys.exit(130)
    log.summary(step, path)


def build_parser():
    """train.py's flags, and ours."""
    parser, some = train.build_parser(), train.number(int, 1)
    parser.description = "Train a Transformer language model on several processes."
    add = parser.add_argument_group("processes").add_argument
    add("--scheme", choices=SCHEMES, default="ddp", help="data parallelism: naive, flat and ddp "
        "(in buckets, while the backward pass goes on) average gradients; zero1 divides the "
        "optimizer's state, zero2 gradients, too, fsdp parameters, too")
    add("--bucket_mb", type=train.number(float), default=25.0, help="of ddp (default 25)")
    add("--dp", type=train.number(int), default=0, help="copies of the model; 0: all that fit")
    add("--tp", type=some, default=1, help="processes that share each matrix")
    add("--pp", type=some, default=1, help="processes that share the layers")
    add("--sp", type=some, default=1, help="processes that share each sequence")
    add("--microbatches", type=some, default=4, help="of a pipeline (default 4)")
    add("--pp_schedule", choices=("gpipe", "1f1b"), default="1f1b", help="(default 1f1b)")
    add("--impl", choices=("own", "torch"), default="own",
        help="torch: PyTorch's DDP, and FSDP2 for --scheme fsdp")
    return parser


# -----------------------------------------------------------------------------
# bench: what the schemes send, take and keep on this machine.


def sent_bytes():
    """Bytes that went through the loopback interface so far: all that the processes of one machine
    sent each other. nan where the system does not tell."""
    try:
        with open("/sys/class/net/lo/statistics/tx_bytes", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return math.nan


def held(parallel):
    """MB of parameters, gradients and optimizer state on this rank."""
    params = list(parallel.module.parameters())
    states = [x for o in parallel.optimizers for s in o.state.values() for x in s.values()]
    return [sum(local(x).nbytes for x in tensors if torch.is_tensor(x)) / 1e6
            for tensors in (params, [p.grad for p in params], states)]


def bench():
    """Print tables of all-reduce and of each scheme."""
    parser = argparse.ArgumentParser(prog="ddp.py bench",
                                     description="What the schemes cost here.")
    add = parser.add_argument
    add("--max_mb", type=int, default=256, help="largest of the all-reduces (default 256)")
    add("--repeat", type=int, default=7, help="times that each is timed (default 7)")
    add("--n_embd", type=int, default=256, help="width of the model (default 256)")
    add("--n_layer", type=int, default=4, help="layers of the model (default 4)")
    add("--trace", default="trace.json", help="of a step of ddp (default trace.json)")
    args = parser.parse_args()
    flags = ["--dtype", "float32", "--bucket_mb", "4"]
    device, W = setup(build_parser().parse_args(flags)), world()
    if W == 1:
        raise ValueError("bench needs several processes: torchrun --nproc_per_node=2 ddp.py bench")

    def clock():
        """The time, when all processes are here."""
        dist.barrier()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_of(action):
        """Median time of an action that all processes begin together."""
        times = []
        for _ in range(args.repeat):
            begin = clock()
            action()
            times.append(clock() - begin)
        return np.median(times)

    say(f"{W} processes on {device}\n\nall-reduce, MB          ms    GB/s per rank")
    for mb in (4**i for i in range(10) if 4**i <= args.max_mb):
        x = torch.ones(mb * 2**18, device=device)
        seconds = seconds_of(lambda: dist.all_reduce(x))
        say(f"{mb:14} {1e3 * seconds:11.2f} {2 * (W - 1) / W * x.nbytes / seconds / 1e9:16.2f}")

    config = model_py.TransformerConfig(vocab_size=2048, n_embd=args.n_embd, n_layer=args.n_layer)
    batch = torch.randint(2048, (2, 2, 256), device=device).unbind()
    say("\nsent: by all ranks; MB of parameters, gradients and optimizer state: of one rank\n"
        f"{'scheme':14}{'ms a step':>10}{'sent, P':>9}{'formula':>9}{'MB at the start':>27}"
        f"{'before the step':>24}{'after it':>24}")
    for name in (*SCHEMES, "torch ddp", "torch fsdp"):
        torch.manual_seed(0)
        model = model_py.Transformer(config).to(device)
        P = sum(p.nbytes for p in model.parameters())
        impl, scheme = name.split() if " " in name else ("own", name)
        parallel = Parallel(model, build_parser().parse_args(
            [*flags, "--scheme", scheme, "--impl", impl]), device)

        def step():
            parallel.backward([batch])
            parallel.step()

        memory = held(parallel)
        step()  # the first one makes the optimizer's state
        parallel.backward([batch])
        memory += held(parallel)
        parallel.step()
        memory += held(parallel)
        before, seconds = sent_bytes(), seconds_of(step)
        time.sleep(0.1)  # until the interface has counted all of it
        sent = (sent_bytes() - before) / args.repeat / P
        formula = (3 if scheme == "fsdp" else 2) * (W - 1)
        say(f"{name:14}{1e3 * seconds:10.1f}{sent:9.2f}{formula:8}P   "
            + "".join(f"{x:8.1f}" for x in memory))
        if name == "ddp":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks
            with torch.profiler.profile() as profile:
                parallel.backward([batch])
            if rank() == 0:
                profile.export_chrome_trace(args.trace)
    say(f"\n{args.trace}: a backward pass of ddp, and the all-reduces beside it (ui.perfetto.dev)")


# -----------------------------------------------------------------------------
# plan: the same on paper, for machines one does not have.


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


def plan():
    """Print memory and time of each way to divide a model and its batch among GPUs."""
    parser = argparse.ArgumentParser(prog="ddp.py plan", description="Napkin arithmetic of large "
                                     "runs: what fits, and what waits for what.")
    add, some, positive = parser.add_argument, train.number(int, 1), train.number(float, 1e-9)
    add("--params", type=positive, default=7e9, help="of the model (default 7e9)")
    add("--gpus", type=some, default=64, help="in all (default 64)")
    add("--gpu_gb", type=positive, default=80, help="memory of one (default 80)")
    add("--tflops", type=positive, default=989, help="of one (default 989, H100)")
    add("--mfu", type=positive, default=0.4, help="share of that in practice (default 0.4)")
    add("--node", type=some, default=8, help="GPUs in a machine (default 8)")
    add("--node_gbs", type=positive, default=450, help="GB/s of a GPU inside one (default 450)")
    add("--net_gbs", type=positive, default=50, help="GB/s of a GPU between machines (default 50)")
    add("--batch_tokens", type=positive, default=4e6, help="of a step (default 4e6)")
    add("--microbatches", type=some, default=16, help="of a pipeline (default 16)")
    add("--checkpoint", action="store_true", help="activation checkpointing")
    a = parser.parse_args()
    *_, L, h = estimate(a.params, 1, 1, "ddp", a)
    print(f"{a.params:.3g} parameters (about {L} layers of width {h:.0f}), {a.gpus} GPUs of "
          f"{a.gpu_gb:g} GB, {a.batch_tokens:.3g} tokens a step\n\nscheme      dp  tp  pp  GB:  "
          "params   grads   optim   activ   total   s: compute    comm exposed  bubble   largest")
    sizes = np.geomspace(1e6, 1e15, 2000)
    for tp, pp, scheme in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), SCHEMES[2:]):
        # (with pipelines gradients and weights would travel for every piece)
        if tp > a.node or a.gpus % (tp * pp) or pp > L or (
                pp > 1 and scheme in ("zero2", "fsdp")):
            continue
        memory, seconds, bubble, *_ = estimate(a.params, tp, pp, scheme, a)
        gb = "".join(f"{x / 1e9:8.1f}" for x in [*memory, sum(memory)])
        largest = bisect.bisect(sizes, a.gpu_gb * 1e9,
                                key=lambda n: sum(estimate(n, tp, pp, scheme, a)[0]))
        print(f"{scheme:8}{a.gpus // (tp * pp):6}{tp:4}{pp:4}     {gb}"
              f"{' ' if sum(memory) <= a.gpu_gb * 1e9 else '!'}    "
              + "".join(f"{x:8.2f}" for x in seconds)
              + f"{bubble:8.0%}{sizes[max(0, largest - 1)]:10.2g}")
    print("\n! does not fit; exposed: the part of comm that has no computation to hide behind")


def main():
    """Errors become one line, of the first process; all processes end."""
    commands = {"bench": bench, "plan": plan}
    try:
        if len(sys.argv) > 1 and sys.argv[1] in commands:
            return commands[sys.argv.pop(1)]()
        # torchrun --max_restarts starts all ranks again when one has died: go on where they were
        parser = build_parser()
        path = os.path.join(parser.parse_known_args()[0].out_dir, "ckpt.pt")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(path):
            sys.argv.append("--resume")
        fresh = "scheme", "dp", "tp", "pp", "sp", "microbatches", "pp_schedule", "impl", "device"
        run(train.parse_args(parser, fresh))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if world() > 1:
            os._exit(1)  # (see below)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # of torch.distributed, when another process has died
            if not dist.is_initialized() or "onnection" not in str(error):
                raise
            error = f"the connection to another process is lost: {str(error).splitlines()[0]}"
        if rank():  # what all ranks find wrong, the first one says, and torchrun ends the others
            time.sleep(3)
        print(f"ddp.py: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # the others may be waiting for us: no farewell to wait for
    finally:
        gc.collect()  # PyTorch's DDP and FSDP2, while their process group is still there
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
