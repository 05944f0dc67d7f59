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
# Collectives. All work on a group of processes (None: all), and on a world of one, too.


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
    """Give all ranks the tensors of the first."""
    if world(group) > 1:
        for x in tensors:
            dist.broadcast(x.detach(), group=group, group_src=0)


def all_reduce(x, group=None, op=dist.ReduceOp.SUM):
    """Sum (or maximum) over ranks, in place -> x."""
    if world(group) > 1:
        dist.all_reduce(x, op, group=group)
    return x


def exchange(send, send_sizes, receive_sizes, group=None):
    """all-to-all: of `send` rank r gets its part of send_sizes[r] numbers -> what came, one after
    the other. (n,) -> (sum of receive_sizes,)"""
    if world(group) == 1:
        return send.clone()
    out = send.new_empty(sum(receive_sizes))
    dist.all_to_all_single(out, send, receive_sizes, send_sizes, group=group)
    return out


def reduce_scatter(x, sizes, group=None):
    """Sum over ranks, of which rank r gets its part of sizes[r] numbers: (sum of sizes,) ->
    (own,). Gloo's own sends as much as an all-reduce; an exchange and a sum of what came send the
    least. The order of the sum is that of the ranks, the same everywhere."""
    own = sizes[rank(group)]
    return exchange(x, sizes, [own] * world(group), group).view(world(group), own).sum(0)


def all_gather(x, sizes, group=None):
    """Parts of all ranks, one after the other: (sizes[own],) -> (sum of sizes,)."""
    if world(group) == 1 or len(set(sizes)) > 1:
        return exchange(x.repeat(world(group)), [len(x)] * world(group), sizes, group)
    out = x.new_empty(sum(sizes))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # (new name, old)
    gather(out, x.contiguous(), group=group)
    return out


class Collective(torch.autograd.Function):
    """forward(x), whose gradient is backward(g): of every collective another one is the mirror."""

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
    """Parameters in buckets of about bucket_mb, the last layers first, as the backward pass comes
    to them. While `active`, send(bucket) is called as soon as a bucket's gradients are there,
    while those of earlier layers are still being computed; in the same order on all ranks."""

    def __init__(self, params, bucket_mb, send, active):
        self.limit, self.send, self.active = bucket_mb * 2**20, send, active
        self.buckets, self.bucket_of = [], {}
        self.add(params)

    def add(self, params):
        """Take in further parameters. Only one dtype goes into a bucket."""
        for p in reversed([p for p in params if p.requires_grad]):
            last = self.buckets[-1] if self.buckets else []
            if not last or last[0].dtype != p.dtype or \
                    sum(q.nbytes for q in [*last, p]) > self.limit:
                self.buckets.append([])
            self.buckets[-1].append(p)
            self.bucket_of[p] = len(self.buckets) - 1
            p.register_post_accumulate_grad_hook(self._ready)
        self._begin()

    def _begin(self):
        self.missing, self.next = [set(bucket) for bucket in self.buckets], 0

    def _ready(self, p):
        """A gradient is there."""
        if self.active:
            if p not in self.missing[self.bucket_of[p]]:  # another backward pass has begun
                self.finish()
            self.missing[self.bucket_of[p]].remove(p)
            self._send(wait=True)

    def _send(self, wait):
        while self.next < len(self.buckets) and not (wait and self.missing[self.next]):
            self.next += 1
            self.send(self.buckets[self.next - 1])

    def finish(self):
        """Send what is left, since some of its gradients are missing."""
        self._send(wait=False)
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
        flat, work = pack_gradients(bucket), None
        if world(self.group) > 1:
            work = dist.all_reduce(flat, group=self.group, async_op=True)
        self.work.append((work, flat, bucket))

    def finish_gradient_synchronization(self):
        """After the backward pass: wait until all gradients are the mean over ranks."""
        self.buckets.finish()
        for work, flat, bucket in self.work:
            if work is not None:
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
        self.group, self.owner, self.load, self.local = group, {}, [0] * world(group), None
        self.make = functools.partial(optimizer_cls, **kwargs)
        self.reduced = {}  # own gradients, summed over ranks and the backward passes so far
        limit = 0 if shard_gradients else math.inf
        self.buckets = Buckets([], limit, self._reduce, shard_gradients)
        super().__init__(params, dict(kwargs))

    def add_param_group(self, param_group):
        """Take in further parameters; each goes to the rank that has the least so far."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in sorted((p for p in group["params"] if p.requires_grad), key=lambda p: -p.numel()):
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()
        own = {**group, "params": [p for p in group["params"]
                                   if self.owner.get(p) == rank(self.group)]}
        if self.local is None:
            self.local = self.make([own])
            self.state = self.local.state
        else:
            self.local.add_param_group(own)
        for name, value in self.local.param_groups[-1].items():
            group.setdefault(name, value)  # the class's defaults
        self.buckets.add(group["params"])

    def load_state_dict(self, state_dict):
        """Take up what state_dict() gave on this rank."""
        super().load_state_dict(state_dict)
        self.local.state = self.state  # which has been replaced

    def _by_owner(self, params):
        return [[p for p in params if self.owner[p] == r] for r in range(world(self.group))]

    @torch.no_grad()
    def _reduce(self, params):
        """Average the gradients of these parameters at their owners; the others lose them."""
        parts = self._by_owner(params)
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
        loss = train.loss_of(closure)
        for ours, theirs in zip(self.local.param_groups, self.param_groups):
            ours |= {**theirs, "params": ours["params"]}  # a schedule changes the learning rate
        if any(group["params"] for group in self.local.param_groups):
            self.local.step()
        for dtype in dict.fromkeys(p.dtype for p in self.owner):
            parts = self._by_owner([p for p in self.owner if p.dtype == dtype])
            every = [p for part in parts for p in part]
            mine = flatten([every[0].new_empty(0), *parts[rank(self.group)]])
            sizes = [sum(p.numel() for p in part) for part in parts]
            for p, x in zip(every, unflatten(all_gather(mine, sizes, self.group), every)):
                p.copy_(x)
        return loss


# -----------------------------------------------------------------------------
# Fully sharded: no rank has a whole matrix but while it is used (ZeRO-3; Zhao et al. 2023).


def shard_of(x, group=None):
    """This rank's part of a tensor's numbers: (ceil(n / W),), the end filled up with 0."""
    W = world(group)
    return F.pad(x.detach().reshape(-1), (0, -x.numel() % W)).view(W, -1)[rank(group)].clone()


def whole_of(shard, shape, group=None):
    """The tensor of this shape of which each rank has a shard."""
    full = all_gather(shard, [len(shard)] * world(group), group)
    return full[: math.prod(shape)].view(shape)


def gather_weight(shard, shape, dtype, group=None):
    """Shards of all ranks -> the whole matrix; its gradient, averaged, goes back into shards."""
    def scatter(g):
        flat = F.pad(g.reshape(-1), (0, len(shard) * world(group) - g.numel()))
        own = reduce_scatter(flat, [len(shard)] * world(group), group) / world(group)
        return own.to(shard.dtype)

    return Collective.apply(shard, lambda x: whole_of(x.to(dtype), shape, group), scatter)


class FSDP(DDP):
    """Wrap a module so that each rank keeps 1/W of every Linear's and Embedding's weight, as a
    flat parameter; gathers it just ahead of its use, in the forward pass and again in the backward
    pass, and frees it afterwards. Other parameters are small: they stay whole, as in DDP.

    compute_dtype: bfloat16 or float16, of gathered weights and their gradients; the shards stay as
    they are (float32 masters). Optimizers are given FSDP's parameters(): AdamW, which looks at
    each number by itself, works on shards; Muon, which needs matrices, does not.
    """

    def __init__(self, module, compute_dtype=None, group=None):
        shards = {}  # whole parameter -> its shard; of tied ones there is one
        self.shapes = {}  # shard -> shape of the whole
        for part in module.modules():
            if type(part) in (nn.Linear, nn.Embedding, model_py.Linear, model_py.Embedding):
                p = part.weight
                if p not in shards:
                    broadcast([p], group)
                    shards[p] = nn.Parameter(shard_of(p, group), p.requires_grad)
                    self.shapes[shards[p]] = p.shape
                part.weight = shards[p]
                part.forward = functools.partial(self._run, part, part.forward)
        others = [p for p in module.parameters() if p not in self.shapes]
        super().__init__(module, math.inf, False, group, others)
        self.compute_dtype = compute_dtype

    def _run(self, part, forward, *args, **kwargs):
        """Call a Linear or an Embedding with its whole weight."""
        shard, group = part.weight, self.group
        shape, dtype = self.shapes[shard], self.compute_dtype or shard.dtype
        full = gather_weight(shard, shape, dtype, group)
        address, numel = full.data_ptr(), full.numel()

        def pack(x):  # in place of the whole matrix the graph keeps a note to gather it again
            whole = x.data_ptr() == address and x.numel() == numel
            return (x.shape, x.stride()) if whole else x

        def unpack(x):
            if torch.is_tensor(x):
                return x
            return whole_of(shard.detach().to(dtype), shape, group).as_strided(*x)

        lower = contextlib.nullcontext() if dtype == shard.dtype else \
            torch.autocast(full.device.type, dtype)
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
        return {name: whole_of(x, self.shapes[params[name]], self.group)
                if params.get(name) in self.shapes else x.clone()
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


def own_piece(x, *part):
    """A parameter of its own that is a part of another one; None for None."""
    return None if x is None else nn.Parameter(x.detach()[part].clone())


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b of which each rank computes d_out / W columns: (..., d_in) -> (..., d_out /
    W). weight, bias_value: of the whole layer, or random. copied: the input's gradient is summed
    over ranks elsewhere, once for several such layers. axes: along which parameters are split."""

    axes = {"weight": 0, "bias": 0}

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None,
                 copied=False):
        super().__init__()
        self.group, self.copied, part = group, copied, part_of(d_out, group, "d_out")
        whole = model_py.Linear(d_in, d_out, bias)
        self.weight = own_piece(whole.weight if weight is None else weight, part)
        self.bias = own_piece(whole.bias if bias_value is None else bias_value, part)

    def forward(self, x):
        x = x if self.copied else copy_to(x, self.group)
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """y = x W^T + b of which each rank has d_in / W inputs: (..., d_in / W) -> (..., d_out)."""

    axes = {"weight": 1}

    def __init__(self, d_in, d_out, bias=False, group=None, weight=None, bias_value=None):
        super().__init__()
        self.group, part = group, part_of(d_in, group, "d_in")
        whole = model_py.Linear(d_in, d_out, bias)
        self.weight = own_piece(whole.weight if weight is None else weight, slice(None), part)
        self.bias = own_piece(whole.bias if bias_value is None else bias_value)

    def forward(self, x):
        y = sum_over(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """An embedding of which each rank has n / W rows: ids of others give 0 here, and the sum is
    all ranks' together. (...) int64 -> (..., d)"""

    axes = {"weight": 0}

    def __init__(self, n, d, group=None, weight=None):
        super().__init__()
        self.group, self.part = group, part_of(n, group, "vocabulary")
        weight = model_py.Embedding(n, d).weight if weight is None else weight
        self.weight = own_piece(weight, self.part)

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
    other = c.tie_embeddings or c.qk_norm_joint or c.dropout or c.logit_cap
    if set(c.attention.split(",")) - {"full", "sliding"} or c.norm_place != "pre" or \
            c.activation == "moe" or other:
        raise ValueError("--tp is for full and sliding attention and norms before the parts, with "
                         "no experts, tied embeddings, qk_norm_joint, dropout or logit_cap")
    for name in ("n_head", "n_kv_head", "d_ff", "vocab_size"):
        part_of(getattr(c, name), group, name)

    def split(parent, name, kind, **more):
        weight, bias = getattr(parent, name).weight, getattr(parent, name).bias
        setattr(parent, name, kind(*weight.shape[::-1], bias is not None, group, weight, bias,
                                   **more))

    def copy(module, args, y):
        return copy_to(y, group)

    def add_up(g):
        return all_reduce(g.clone(), group)

    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        # queries, keys and values have one input, as have w1 and w3: one all-reduce for all
        for norm in (block.attn_norm, block.ffn_norm):
            norm.register_forward_hook(copy)
        for parent, names in ((attn, ("q_proj", "k_proj", "v_proj")), (ffn, ("w1", "w3"))):
            for name in names:
                if hasattr(parent, name):
                    split(parent, name, ColumnParallelLinear, copied=True)
        split(attn, "o_proj", RowParallelLinear)
        split(ffn, "w2", RowParallelLinear)
        attn.n_head, attn.n_kv_head = c.n_head // W, c.n_kv_head // W
        for norm in ("q_norm", "k_norm"):  # each rank's heads give a part of the gradient
            if hasattr(attn, norm):
                getattr(attn, norm).weight.register_hook(add_up)
    model.embedding = VocabParallelEmbedding(c.vocab_size, c.n_embd, group, model.embedding.weight)
    split(model, "head", ColumnParallelLinear)
    return model


def tensor_axis(model):
    """{name of a split parameter: the axis along which it is split}."""
    return {f"{prefix}.{name}": axis for prefix, module in model.named_modules()
            for name, axis in getattr(module, "axes", {}).items()}


# -----------------------------------------------------------------------------
# Pipeline parallel: every rank has some of the layers, and a batch passes in pieces, so that all
# have something to do. GPipe (Huang et al. 2019) does all forward passes, then all backward
# passes; 1F1B (Narayanan et al. 2019) begins each backward pass as soon as it can, and keeps the
# activations of W pieces at most. Both wait (W - 1) / (pieces + W - 1) of the time.

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def send_tensor(x, to, group):
    """Send a tensor of up to 6 axes -> handles to be waited for, and what they send."""
    head = [DTYPES.index(x.dtype), x.ndim, *x.shape]
    head = torch.tensor(head + [0] * (8 - len(head)), device=x.device)
    return [(dist.isend(y, group=group, group_dst=to), y) for y in (head, x.contiguous())]


def receive_tensor(source, device, group):
    """Receive what `send_tensor` sent."""
    head = torch.zeros(8, dtype=torch.int64, device=device)
    dist.recv(head, group=group, group_src=source)
    dtype, ndim, *shape = head.tolist()
    x = torch.empty(shape[:ndim], dtype=DTYPES[dtype], device=device)
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

    def forward(x, y):
        nonlocal loss
        if not first:
            x = receive_tensor(r - 1, device, group).requires_grad_()
        out = stage(x)
        if last:
            out = loss_fn(out, y)
            loss = loss + out.detach()
        else:
            sent.extend(send_tensor(out.detach(), r + 1, group))
        under_way.append((x, out))

    def backward():
        x, out = under_way.pop(0)
        if torch.is_grad_enabled():
            out.backward(None if last else receive_tensor(r + 1, device, group))
            if not first:
                sent.extend(send_tensor(x.grad, r - 1, group))

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


class Parallel:
    """A Transformer on several processes: what the loop of `run` needs to know of it.

    Ranks are numbered so that those of one copy of the model are neighbours. A copy has tp, pp or
    sp ranks; the same rank of all copies forms a group for data parallelism.
    """

    def __init__(self, model, args, device):
        self.args, self.device, self.config = args, device, model.config
        self.autocast, self.dtype = train.make_autocast(device, args.dtype)
        self.tp, self.pp, self.sp, zero = args.tp, args.pp, args.sp, "zero" in args.scheme
        n, W = self.tp * self.pp * self.sp, world()  # ranks of one copy, and all
        self.dp, self.copy_rank = W // n, rank() // n
        self.group = self.grads = None  # ranks of one copy; those that average their gradients
        if n > 1:
            make = dist.new_subgroups_by_enumeration
            self.group, _ = make([list(range(i, i + n)) for i in range(0, W, n)])
            if self.sp == 1:  # else all have the same parameters, and different tokens
                self.grads, _ = make([list(range(i, W, n)) for i in range(n)])
        # of --tp all ranks have the same loss, of --pp the last one has it, of --sp each its part
        self.speaks = self.tp * self.pp == 1 or rank(self.group) == self.pp - 1

        # optimizers as one process has them, whose parameters are then replaced by our parts
        self.optimizers = train.make_optimizers(
            model, args.optimizer, args.learning_rate, args.weight_decay, (args.beta1, args.beta2),
            args.momentum, args.mup)
        name_of = {p: name for name, p in model.named_parameters()}
        self.names = [[[name_of[p] for p in group["params"]] for group in optimizer.param_groups]
                      for optimizer in self.optimizers]
        if self.tp > 1:
            model = split_tensors(model, self.group)
        elif self.pp > 1:
            model = split_layers(model, self.group)
        elif self.sp > 1:
            part_of(self.config.block_size, self.group, "block_size")
            model = split_sequence(model, self.config.block_size // self.sp, self.group)
        self.module = self.wrapped = model
        if args.impl == "torch" and args.scheme == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for part in [*model.blocks, model]:
                fully_shard(part)
        elif args.scheme == "fsdp":
            self.wrapped = FSDP(model, group=self.grads)
        elif args.impl == "torch" and W > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=args.bucket_mb)
        elif zero:
            broadcast([*model.parameters(), *model.buffers()])
        elif world(self.grads) > 1:
            size = {"naive": 0, "flat": math.inf}.get(args.scheme, args.bucket_mb)
            # a pipeline has several backward passes, of which only the last may send
            overlap = args.scheme == "ddp" and self.pp == 1
            self.wrapped = DDP(model, size, overlap, self.grads)
        self.params, self.axes = dict(model.named_parameters()), tensor_axis(model)
        self.split = {name for name, p in self.params.items() if name in self.axes or hasattr(
            p, "full_tensor") or p in getattr(self.wrapped, "shapes", ())}
        self.apart = zero or self.pp > 1  # each optimizer state, and each gradient, on one rank
        for optimizer, names in zip(self.optimizers, self.names):
            for group, part in zip(optimizer.param_groups, names):
                group["params"] = [self.params[name] for name in part if name in self.params]
        self.finish = [getattr(self.wrapped, "finish_gradient_synchronization", lambda: None)]
        if zero:
            self.optimizers = [ShardedOptimizer(o.param_groups, type(o), self.grads,
                                                args.scheme == "zero2", **o.defaults)
                               for o in self.optimizers]
            self.finish = [optimizer.reduce_gradients for optimizer in self.optimizers]

    def cut(self, x):
        """This rank's positions of sequences: all, but for sequence parallelism."""
        return x.chunk(self.sp, 1)[rank(self.group)] if self.sp > 1 else x

    def loss_sum(self, logits, y):
        """Sum of the losses of this rank's part of a batch."""
        z_loss = self.args.z_loss if self.module.training else 0.0
        if self.tp > 1:
            return vocab_parallel_cross_entropy(logits, y, self.group, z_loss=z_loss)
        return train.cross_entropy(logits, y, reduction="sum", z_loss=z_loss)

    def backward(self, batches):
        """Gradients of the mean loss over all tokens of all ranks -> that loss, a number."""
        batches = [(self.cut(x), self.cut(y)) for x, y in batches]
        total = sum(y.numel() for _, y in batches)  # the same on all ranks
        loss, quiet = 0.0, getattr(self.wrapped, "no_sync", contextlib.nullcontext)
        if self.pp > 1:
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
        for finish in self.finish:
            finish()
        return all_reduce(loss * self.speaks).item() / (self.dp * self.sp)

    @torch.no_grad()
    def clip(self, max_norm, eps=1e-6):
        """Clip all gradients by their norm together -> the norm before, a number."""
        grads = {name: p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
                 for name, p in self.params.items() if p.grad is not None}
        squares = torch.zeros(2, device=self.device)  # of our own ones, and of those that all have
        for name, g in grads.items():
            squares[0 if self.apart or name in self.split else 1] += g.square().sum()
        all_reduce(squares[0], self.group if self.tp * self.pp > 1 else self.grads)
        norm = squares.sum().sqrt()
        if max_norm and grads:
            shrink = torch.clamp(max_norm / (norm + eps), max=1.0)
            torch._foreach_mul_(list(grads.values()), shrink)
        return norm.item()

    def step(self):
        """Update the parameters."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.pp == 1:
            for block in self.module.blocks:
                if torch.is_tensor(getattr(block.ffn, "load", None)):
                    all_reduce(block.ffn.load, self.grads)
            self.module.update_router_bias()

    @torch.no_grad()
    def evaluate(self, data, batch_size, most=None):
        """As train.evaluate, on at most so many windows, which the copies of the model share."""
        T, n = self.config.block_size, self.dp * batch_size
        starts = np.arange(0, len(data) - 1, T)
        if most and len(starts) > most:
            starts = starts[np.linspace(0, len(starts) - 2, most).astype(int)]
        total = count = 0
        self.module.eval()
        for i in range(self.copy_rank * batch_size, -(-len(starts) // n) * n, n):
            # -100, no target, stands where a copy lacks windows, and behind the data's end
            rows = torch.full((batch_size, T + 1), -100)
            for row, start in zip(rows, starts[i:]):
                ids = torch.from_numpy(data[start : start + T + 1].astype(np.int64))
                row[: len(ids)] = ids
            train.check_ids([(rows, rows)], self.config.vocab_size)
            rows = rows.to(self.device)
            x, y = self.cut(rows[:, :-1].clamp(min=0)), self.cut(rows[:, 1:])
            with self.autocast():
                loss = self.loss_sum(self.wrapped(x), y) if self.pp == 1 else pipeline_step(
                    self.module, [(x, y)], self.loss_sum, self.group, device=self.device)
            total += self.speaks * loss.item()
            count += self.speaks * (y != -100).sum().item()
        self.module.train()
        total, count = all_reduce(torch.tensor([total, count], device=self.device)).tolist()
        return total / count

    # ---- checkpoints, which are those of one process

    def whole(self, name, x):
        """The whole of this rank's part of a parameter, or of something of its shape."""
        if name not in self.split or getattr(x, "shape", None) != self.params[name].shape:
            return x
        if hasattr(x, "full_tensor"):
            return x.full_tensor()
        if self.tp == 1:
            return whole_of(x, self.wrapped.shapes[self.params[name]], self.grads)
        parts = all_gather(x.reshape(-1), [x.numel()] * self.tp, self.group)
        return torch.cat(parts.view(self.tp, *x.shape).unbind(), self.axes[name])

    def part(self, name, x):
        """What this rank keeps of something whole."""
        p = self.params[name]
        if name not in self.split or not torch.is_tensor(x):
            return x
        if hasattr(p, "full_tensor"):  # of PyTorch's FSDP2
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(x, p.device_mesh, p.placements)
        if self.tp == 1:
            return shard_of(x, self.grads)
        return x.chunk(self.tp, self.axes[name])[rank(self.group)].clone()

    @torch.no_grad()
    def full_state(self):
        """-> (state dict of the whole model, state of each optimizer as on one process); all ranks
        take part."""
        model = {name: self.whole(name, x) for name, x in self.module.state_dict().items()}
        if self.config.tie_embeddings:
            model["head.weight"] = model["embedding.weight"]
        name_of, states = {p: name for name, p in self.params.items()}, {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                states[name_of[p]] = {k: self.whole(name_of[p], x) for k, x in state.items()}
        if self.apart and world() > 1:
            group = self.group if self.pp > 1 else self.grads
            parts = [None] * world(group)
            own = model if self.pp > 1 else {}  # with ZeRO all ranks have the whole model
            dist.all_gather_object(parts, (own, states), group=group)
            for theirs, more in parts:
                model |= theirs
                states |= more
        result = []
        for optimizer, names in zip(self.optimizers, self.names):
            number = itertools.count()
            groups = [{**group, "params": [next(number) for _ in part]}
                      for group, part in zip(optimizer.param_groups, names)]
            state = {i: states[name] for i, name in enumerate(sum(names, [])) if name in states}
            result.append({"state": state, "param_groups": groups})
        return model, result

    def load_optimizers(self, saved):
        """Take this rank's part of the optimizers' state in a checkpoint. Raises ValueError."""
        me = rank(self.grads)
        try:
            for optimizer, names, whole in zip(self.optimizers, self.names, saved, strict=True):
                names, owner = sum(names, []), getattr(optimizer, "owner", {})
                for i, state in whole["state"].items():
                    p = self.params.get(names[i])
                    if p is not None and owner.get(p, me) == me:
                        optimizer.state[p] = {k: self.part(names[i], x) for k, x in state.items()}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"the checkpoint's optimizer can not be resumed: {error}") from None


def setup(args):
    """Join the other processes -> this one's device. Raises ValueError."""
    W, device = int(os.environ.get("WORLD_SIZE", 1)), model_py.pick_device(args.device)
    if "RANK" in os.environ or W > 1:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ValueError(f"{name} is not set, as torchrun would have: start me with it")
        backend, device = ("nccl", device) if device.startswith("cuda") else ("gloo", "cpu")
        if backend == "nccl":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        store, number, W = next(dist.rendezvous("env://"))
        # after a restart the store still has the addresses of those that have died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, store=store, rank=number, world_size=W,
                                timeout=datetime.timedelta(minutes=10))
    n, batch = args.tp * args.pp * args.sp, args.batch_size
    copies, cuts = max(1, W // n), args.scheme == "fsdp" or args.tp > 1
    refused = {
        "--tp, --pp and --sp go with --dp, but not with one another":
            n not in (args.tp, args.pp, args.sp),
        f"--dp {args.dp or 'any'} x --tp {args.tp} x --pp {args.pp} x --sp {args.sp} is not the "
        f"number of processes, {W}": W % n or (args.dp and args.dp * n != W),
        f"--scheme {args.scheme} is for data parallelism alone":
            n > 1 and args.scheme in ("zero1", "zero2", "fsdp"),
        "--impl torch has --scheme ddp and fsdp, without --tp, --pp and --sp":
            args.impl == "torch" and (n > 1 or args.scheme not in ("ddp", "fsdp")),
        "--scheme fsdp and --tp split matrices, which muon and soap need whole":
            cuts and args.optimizer in ("muon", "soap"),
        f"--batch_size {batch}, of all ranks together, can not be divided by {copies}":
            batch % copies,
        f"the {batch // copies} sequences of a rank can not be divided into {args.microbatches} "
        "micro-batches": args.pp > 1 and batch // copies % args.microbatches,
        "--activation_checkpointing goes with none of --tp, --pp, --sp and fsdp":
            args.activation_checkpointing and (n > 1 or args.scheme == "fsdp"),
        **{f"--{flag} is train.py's": getattr(args, flag) not in (None, False, "none")
           for flag in ("teacher", "noise_scale", "kernels", "compile", "offload")},
    }
    for message in refused:
        if refused[message]:
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
        log.evaluation(checkpoint["step"] if checkpoint else 0,
                       parallel.evaluate(val_data, batch_size))
        return
    if args.resume:
        best_val_loss = checkpoint["best_val_loss"]
        parallel.load_optimizers(checkpoint["optimizer"])
        train.set_rng(checkpoint["rng"])
    os.makedirs(args.out_dir, exist_ok=True)
    if parallel.copy_rank:  # dropout is to differ among copies, and from step to step
        torch.manual_seed(args.seed + parallel.copy_rank + 1_000_003 * step)
    warmup_iters = args.max_iters // 20 if args.warmup_iters is None else args.warmup_iters
    say(f"dp {parallel.dp} x tp {args.tp} x pp {args.pp} x sp {args.sp} processes, {args.impl} "
        f"{args.scheme} | {n:,} training tokens | {tokens_per_step:,} tokens per step | {device}, "
        f"{parallel.dtype}")

    def like_module(state):
        return types.SimpleNamespace(config=config, quantized=None, state_dict=lambda: state)

    def save():
        state, optimizers = parallel.full_state()
        if rank() == 0:
            optimizers = [like_module(o) for o in optimizers]
            model_py.save_checkpoint(path, like_module(state), optimizers, step, best_val_loss,
                                     train.get_rng(), vars(args), tokenizer)
            log.write()

    # Ctrl-C and SIGTERM, of any process: finish the step, save, leave
    stopped, stop = torch.zeros((), device=device), False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.fill_(1))
    log.pause(step)
    parallel.module.train()
    while step < args.max_iters and not stop:
        lr = train.get_lr(step, args.learning_rate, args.min_lr, warmup_iters, args.max_iters,
                          args.schedule, args.decay_fraction)
        for optimizer in parallel.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        batches = [train.get_batch(train_data, batch_size, T, device, i, args.seed,
                                   parallel.copy_rank, parallel.dp)
                   for i in range(step * accumulate, (step + 1) * accumulate)]
        train.check_ids(batches, config.vocab_size)
        loss, norm = parallel.backward(batches), parallel.clip(args.grad_clip)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ValueError(f"at step {step + 1} the loss is {loss} and the gradient norm "
                             f"{norm}: try a smaller --learning_rate")
        parallel.step()
        step += 1
        stop, last_step = bool(all_reduce(stopped.clone())), step == args.max_iters
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
    parser = train.build_parser()
    parser.description = "Train a Transformer language model on several processes."
    add = parser.add_argument_group("processes").add_argument
    add("--scheme", choices=SCHEMES, default="ddp", help="data parallelism: naive, flat and ddp "
        "(in buckets, while the backward pass goes on) average gradients; zero1 divides the "
        "optimizer's state, zero2 gradients, too, fsdp parameters, too")
    some, any_number = train.number(int, 1), train.number(int)
    add("--bucket_mb", type=train.number(float), default=25.0, help="of ddp (default 25)")
    add("--dp", type=any_number, default=0, help="copies of the model (default: as many as fit)")
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
    kinds = [[x.to_local() if hasattr(x, "to_local") else x for x in xs if torch.is_tensor(x)]
             for xs in (params, [p.grad for p in params], states)]
    return [sum(x.numel() * x.element_size() for x in xs) / 1e6 for xs in kinds]


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

    say(f"{W} processes on {device}\n\nall-reduce, MB          ms    GB/s per rank")
    for mb in (4**i for i in range(10) if 4**i <= args.max_mb):
        x, times = torch.ones(mb * 2**18, device=device), []
        for _ in range(args.repeat):
            begin = clock()
            dist.all_reduce(x)
            times.append(clock() - begin)
        seconds = np.median(times)
        say(f"{mb:14} {1e3 * seconds:11.2f} {2 * (W - 1) / W * mb * 2**20 / seconds / 1e9:16.2f}")

    config = model_py.TransformerConfig(vocab_size=2048, n_embd=args.n_embd, n_layer=args.n_layer)
    batch = torch.randint(2048, (2, 2, 256), device=device).unbind()
    when = "".join(f"{when:>24}" for when in ("at the start", "before the step", "after it"))
    say(f"\n{'scheme':14}{'ms a step':>10}{'sent, P':>9}{'formula':>9}   MB of parameters, "
        f"gradients, optimizer state on a rank\n{'':45}{when}")
    for impl, scheme in [*(("own", s) for s in SCHEMES), ("torch", "ddp"), ("torch", "fsdp")]:
        torch.manual_seed(0)
        model = model_py.Transformer(config).to(device)
        P = 4 * sum(p.numel() for p in model.parameters())
        parallel = Parallel(model, build_parser().parse_args(
            [*flags, "--scheme", scheme, "--impl", impl]), device)
        memory, times, sent = held(parallel), [], []
        for i in range(args.repeat + 2):
            before, begin = sent_bytes(), clock()
            parallel.backward([batch])
            memory += held(parallel) if i == 1 else []
            parallel.step()
            times.append(clock() - begin)
            time.sleep(0.05)  # until the interface has counted all of it
            sent.append((sent_bytes() - before) / P)
        memory += held(parallel)
        formula = (3 if scheme == "fsdp" else 2) * (W - 1)
        name = {"own": scheme, "torch": "torch " + {"fsdp": "FSDP2"}.get(scheme, "DDP")}[impl]
        say(f"{name:14}{1e3 * np.median(times[2:]):10.1f}{np.median(sent[2:]):9.2f}{formula:8}P   "
            + "".join(f"{x:{width}.1f}" for x, width in zip(memory, (9, 7, 8) * 3)))
        if (impl, scheme) == ("own", "ddp"):
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler talks
            with torch.profiler.profile() as profile:
                parallel.backward([batch])
            if rank() == 0:
                profile.export_chrome_trace(args.trace)
    say(f"\n{args.trace}: a backward pass of ddp, and the all-reduces beside it (ui.perfetto.dev)")


# -----------------------------------------------------------------------------
# plan: the same on paper, for machines one does not have.


def estimate(params, gpus, tp, pp, scheme, a):
    """What a configuration needs, by formula -> (bytes of parameters, gradients, optimizer state
    and activations; seconds of a step: computation, communication, and how much of that has no
    computation to hide behind; share of the time that a pipeline waits; layers; width).

    The model has L layers of width h = 128 L, so that 12 L h^2 are its parameters. In bytes per
    parameter: 2 for bfloat16, 2 for its gradient, 12 for the optimizer (float32 weights and the
    two means of Adam). Activations of a layer take some 34 h bytes per token (Korthikanti et al.
    2022), or with checkpointing the 2 h of its input.
    """
    L = max(1, round((params / (12 * 128**2)) ** (1 / 3)))
    h = math.sqrt(params / (12 * L))
    own, dp = params / (tp * pp), gpus // (tp * pp)  # parameters of a rank's part; copies
    divided = ("ddp", "zero1", "zero2", "fsdp").index(scheme)  # how many of the three kinds
    memory = [size * own / (dp if 3 - kind <= divided else 1)
              for kind, size in enumerate((2, 2, 12))]
    if scheme == "fsdp":  # two layers at a time are whole
        memory[0] += 2 * 2 * 12 * h * h / tp
    tokens = a.batch_tokens / dp  # of a copy of the model, in a.microbatches pieces
    alive = min(a.microbatches, pp)  # pieces under way in 1F1B
    memory.append(alive * tokens / a.microbatches * L / pp * (2 if a.checkpoint else 34) * h / tp)
    bubble = (pp - 1) / (a.microbatches + pp - 1)
    compute = 6 * params * a.batch_tokens / (gpus * a.tflops * 1e12 * a.mfu) / (1 - bubble)
    compute *= 4 / 3 if a.checkpoint else 1
    fast, slow = a.node_gbs * 1e9, a.net_gbs * 1e9  # bytes/s inside a machine, and between them
    rounds = 3 if scheme == "fsdp" else 2
    time_dp = rounds * 2 * own * (dp - 1) / dp / (fast if gpus <= a.node else slow)
    time_tp = 4 * L / pp * 2 * tokens * h * 2 * (tp - 1) / tp / (fast if tp <= a.node else slow)
    # gradients leave during the backward pass, two thirds of the computation
    exposed = max(0.0, time_dp + time_tp - 2 / 3 * compute)
    return memory, (compute, time_dp + time_tp, exposed), bubble, L, h


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
    *_, L, h = estimate(a.params, a.gpus, 1, 1, "ddp", a)
    print(f"{a.params:.3g} parameters (about {L} layers of width {h:.0f}), {a.gpus} GPUs of "
          f"{a.gpu_gb:g} GB, {a.batch_tokens:.3g} tokens a step\n\nscheme      dp  tp  pp  GB:  "
          "params   grads   optim   activ   total   s: compute    comm exposed  bubble   largest")
    sizes = np.geomspace(1e6, 1e15, 2000)
    for tp, pp, scheme in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), SCHEMES[2:]):
        # (with pipelines gradients and weights would travel for every piece)
        if tp > a.node or a.gpus % (tp * pp) or pp > L or (
                pp > 1 and scheme in ("zero2", "fsdp")):
            continue
        memory, seconds, bubble, *_ = estimate(a.params, a.gpus, tp, pp, scheme, a)
        gb = "".join(f"{x / 1e9:8.1f}" for x in [*memory, sum(memory)])
        largest = bisect.bisect(sizes, a.gpu_gb * 1e9, key=lambda n: sum(
            estimate(n, a.gpus, tp, pp, scheme, a)[0]))
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
