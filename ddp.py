"""
Training on many processes, from collectives up.

    torchrun --nproc_per_node=2 ddp.py                    # data parallel: train.py, on 2 processes
    torchrun --nproc_per_node=2 ddp.py --scheme zero1     # or naive, flat, ddp, zero2, fsdp
    torchrun --nproc_per_node=4 ddp.py --tp 2             # 2 copies of a model split in 2
    torchrun --nproc_per_node=2 ddp.py --pp 2             # its layers; or --sp 2, each sequence
    torchrun --nproc_per_node=2 ddp.py --impl torch       # PyTorch's own DDP and FSDP2
    torchrun --nproc_per_node=2 ddp.py bench              # time, bytes and memory of each scheme
    python ddp.py plan --params 70e9 --gpus 1024          # what fits, and what it waits for

NCCL on GPUs, gloo on CPUs. Flags, files and losses are train.py's: a run goes on here on another
number of processes, or there; torchrun --max_restarts 3 goes on when a process has died. Of P bytes
W processes together send (W - 1) P in an all-gather or reduce-scatter, twice that in an all-reduce.
"""

import argparse, contextlib, functools, itertools, math, os, signal, sys, threading, time, types

PARENT = os.getppid()  # torchrun; asked now, as it may be killed while torch loads
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet until then

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from torch.distributed import get_rank as rank, get_world_size as world

import model as model_py
import train
from train import cross_entropy, make_optimizers, random_state, windows

# ---- Collectives of a group of processes, by default of all.

def flatten(tensors):
    """Numbers of several tensors, one after the other: (n,)"""
    return torch.cat([x.reshape(-1) for x in tensors])

def unflatten(flat, tensors):
    """Views into a flat tensor with the shapes of these."""
    return [x.view(t.shape) for x, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

def broadcast(module, group=None):
    """Overwrite the parameters and buffers of all ranks by those of the first."""
    for x in itertools.chain(module.parameters(), module.buffers()):
        dist.broadcast(x.detach(), group=group, group_src=0)

def all_reduce(x, group=None):
    """Sum over ranks, in place -> x."""
    dist.all_reduce(x, group=group)
    return x

def all_gather(x, out=None, group=None):
    """Start to gather equal parts: (n,) -> a function that waits, and returns `out`: (W n,)"""
    out = x.new_empty(world(group) * len(x)) if out is None else out
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # (old name)
    work = gather(out, x.contiguous(), group=group, async_op=True)
    return lambda: [work.wait(), out][1]

def reduce_scatter(x, sizes, dtype=None):
    """Start to sum x over ranks, of which rank r gets the r-th part, sizes[r] numbers -> a function
    that waits, and returns it. An exchange, then a sum: gloo's own sends as much as all-reduce."""
    W, own = world(), sizes[rank()]
    parts = x.new_empty(W * own)
    work = dist.all_to_all_single(parts, x, [own] * W, sizes, async_op=True)
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
    """What DDP, ShardedOptimizer and FSDP have in common: gradients travel in buckets, which with
    `overlap` leave as soon as they are complete, while the backward pass goes on. Whichever
    parameters a rank has used, order and number of messages are the same on all, or they would wait
    for one another: a missing gradient counts as 0."""
    overlap, group, matrices = True, None, ()  # (matrices: FSDP's)
    require_backward_grad_sync = True  # False: see `no_sync` (PyTorch's name)

    def add_buckets(self, params, bucket_mb):
        """Divide parameters into buckets of one dtype, the last first, ahead of those there are."""
        new, room = [], -1
        for p in reversed([p for p in params if p.requires_grad]):
            if p.nbytes > room or p.dtype != new[-1][0].dtype:
                new.append([])
                room = bucket_mb * 2**20
            new[-1].append(p)
            room -= p.nbytes
            p.register_post_accumulate_grad_hook(self._ready)
        self.buckets = new + getattr(self, "buckets", [])
        self.ready, self.sent, self.total = set(), [], {}

    def _ready(self, p):  # its gradient is there
        if self.overlap and self.require_backward_grad_sync:
            self.ready.add(p)
            unsent = self.buckets[len(self.sent) :]
            for bucket in itertools.takewhile(self.ready.issuperset, unsent):
                self._send(bucket)

    def _send(self, bucket):
        self.sent.append(self._start(bucket))
        for p in bucket:
            p.grad = None

    def _start(self, bucket):
        """Start to average over ranks -> a function that waits, and gives {p: gradient}."""
        flat, W = gradients(bucket), world(self.group)
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return lambda: [work.wait(), dict(zip(bucket, unflatten(flat.div_(W), bucket)))][1]

    def finish_gradient_synchronization(self, more=False):
        """After the backward pass: wait until gradients are the mean over ranks. more: another pass
        of this step follows, and adds to them."""
        for bucket in self.buckets[len(self.sent) :]:
            self._send(bucket)
        # if on any rank another backward pass has added to what had left, all goes once more
        params = [*itertools.chain(*self.buckets)]
        late = float(any(p.grad is not None for p in params))
        if params and all_reduce(params[0].new_tensor(late), self.group):
            for bucket in self.buckets:
                self._send(bucket)
        for p, g in itertools.chain.from_iterable(wait().items() for wait in self.sent):
            self.total[p] = self.total[p] + g if p in self.total else g
        self.ready, self.sent, self.pending = set(), [], False
        for p in self.matrices:
            self._free(p)
        while self.total and not more:
            p, g = self.total.popitem()
            p.grad = g

    @contextlib.contextmanager
    def no_sync(self):
        """Backward passes in here only add to this rank's own gradients."""
        self.require_backward_grad_sync = False
        yield
        self.require_backward_grad_sync = True

def gradients(params):
    """Their gradients, flat, 0 where there is none."""
    return flatten([torch.zeros_like(p) if p.grad is None else p.grad for p in params])

class DDP(Buckets, nn.Module):
    """Wrap a module so that after loss.backward() and finish_gradient_synchronization() gradients
    are the mean over ranks; of several backward passes, all but the last go `with no_sync():`.
    bucket_mb: of gradients that travel together: 0, each alone (naive); math.inf, all (flat)."""
    def __init__(self, module, bucket_mb=25.0, overlap=True, group=None):
        super().__init__()
        self.module, self.overlap, self.group = module, overlap, group
        broadcast(module, group)
        self.add_buckets(module.parameters(), bucket_mb)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

# ---- ZeRO (Rajbhandari et al. 2020): W copies of the same optimizer state are W - 1 too many.

class ShardedOptimizer(Buckets, torch.optim.Optimizer):
    """An optimizer of any class whose state is divided: each parameter has one owner, which alone
    keeps its state and updates it, and then sends it to the others (ZeRO-1). Gradients are averaged
    before, by DDP or by finish_gradient_synchronization here, which gives each only to its owner:
    with the parameters that come back no more is sent than by DDP alone. With shard_gradients they
    leave in the backward pass, and are freed (ZeRO-2); no_sync as in DDP."""
    def __init__(self, params, optimizer_cls, shard_gradients=False, bucket_mb=25.0, **kwargs):
        self.owner, self.load, self.bucket_mb = {}, [0] * world(), bucket_mb
        self.overlap = self.pending = shard_gradients
        # has all parameters, but makes a state only of those that have gradients when it steps
        self.local = optimizer_cls(params, **kwargs)
        super().__init__(self.local.param_groups, self.local.defaults)

    def add_param_group(self, param_group):
        """Take in further parameters; each goes to the rank that has the least so far."""
        super().add_param_group(param_group)
        params = [p for p in self.param_groups[-1]["params"] if p.requires_grad]
        for p in sorted(params, key=lambda p: -p.numel()):
            self.owner[p] = self.load.index(min(self.load))
            self.load[self.owner[p]] += p.numel()
        self.add_buckets(params, self.bucket_mb)

    def _start(self, bucket):  # each gradient goes to its owner alone
        parts = [[p for p in bucket if self.owner[p] == r] for r in range(world())]
        sizes, own = [sum(p.numel() for p in part) for part in parts], parts[rank()]
        wait = reduce_scatter(gradients(itertools.chain(*parts)), sizes)
        return lambda: dict(zip(own, unflatten(wait() / world(), own)))

    @torch.no_grad()
    def step(self):
        """Update own parameters, then take over those of the other ranks."""
        if self.pending:
            self.finish_gradient_synchronization()
        for p, r in self.owner.items():
            p.grad = p.grad if r == rank() else None
        self.local.state, self.local.param_groups = self.state, self.param_groups
        self.local.step()
        self.pending = self.overlap
        for r in sorted({*self.owner.values()}):  # all of an owner travel together
            part = [p for p, owner in self.owner.items() if owner == r]
            flat = flatten(part)
            dist.broadcast(flat, src=r)
            torch._foreach_copy_(part, unflatten(flat, part))

# ---- Fully sharded: no rank has a whole matrix but while it is used (ZeRO-3; Zhao et al. 2023).

def gather_full_params(module):
    """{name: whole tensor} as the module's own state_dict() would be on one rank."""
    state = module.state_dict()  # (first: it puts FSDP2's parameters back into parts)
    params = dict(module.named_parameters(remove_duplicate=False))
    return {name: whole(params.get(name), x).clone() for name, x in state.items()}

def whole(p, x):
    """The whole of x, if x is p, a part of a parameter, or has p's shape; or else x as it is."""
    like = hasattr(p, "to_whole") and torch.is_tensor(x) and x.shape == p.shape
    return p.to_whole(x.detach()) if like else x

class FSDP(Buckets, nn.Module):
    """Wrap a module so that each rank keeps 1/W of the numbers of every Linear's and Embedding's
    weight (classes of these names, or that inherit from one); others, small, stay whole. A matrix
    is gathered just ahead of its layer's forward and backward pass, and freed right after, while
    the next is on its way. The graph keeps views of it: their storage is emptied and refilled.
    compute_dtype: of a Linear's gathered weight and its gradient, bfloat16 or float16. parameters()
    are the parts: AdamW works on them; Muon, which needs matrices, does not. Methods as in DDP."""
    def __init__(self, module, compute_dtype=None):
        super().__init__()
        self.module, self.compute_dtype, self.matrices = module, compute_dtype, []
        self.gather_full_params = functools.partial(gather_full_params, module)
        broadcast(module)
        module.register_forward_pre_hook(lambda *_: self._free(*self.matrices))  # (old weights)
        for layer in module.modules():
            kinds = {kind.__name__ for kind in type(layer).__mro__}
            # (nn.MultiheadAttention's output layer is not called: its weight is read)
            if kinds & {"Linear", "Embedding"} and "NonDynamicallyQuantizableLinear" not in kinds:
                p = layer.weight
                if not hasattr(p, "shard"):  # (it may be tied)
                    self._shard(p, "Embedding" in kinds)
                p.lookup &= "Embedding" in kinds
                layer.register_forward_pre_hook(functools.partial(self._gather, p, False))
                layer.register_forward_hook(functools.partial(self._after_forward, p))
        self.add_buckets([p for p in module.parameters() if not hasattr(p, "shard")], math.inf)
        self.add_buckets(self.matrices, 0)

    def _shard(self, p, lookup):
        """Keep this rank's part of a matrix, ceil(n / W) numbers; the last is filled up with 0."""
        n, shape, W = p.numel(), p.shape, world()
        p.to_part = lambda x: F.pad(x.reshape(-1), (0, -n % W)).view(W, -1)[rank()].clone()
        p.to_whole = lambda x: all_gather(x)()[:n].view(shape)
        p.shard, p.lookup, p.coming = p.to_part(p.detach()), lookup, None
        p.full = p.shard.new_empty(W * len(p.shard), dtype=None if lookup else self.compute_dtype)
        p.matrix = p.full[:n].view(shape)
        p.number = len(self.matrices)
        self.matrices.append(p)
        self._free(p)

    def _free(self, *matrices):
        for p in matrices:
            if p.coming:
                p.coming()
            p.shard = p.data if p.ndim == 1 else p.shard  # (an optimizer may have put another here)
            p.data, p.coming, p.in_backward = p.shard, None, False
            p.full.untyped_storage().resize_(0)

    def _gather(self, p, in_backward, *_):
        """Make a matrix whole, and start with the next one."""
        p.in_backward |= in_backward
        i = p.number + (-1 if p.in_backward else 1)
        for each in (p, *self.matrices[max(0, i) : i + 1]):
            if each.coming is None and not (in_backward and each.lookup):  # (its shape will do)
                each.full.untyped_storage().resize_(each.full.nbytes)
                each.coming = all_gather(each.shard.to(each.full.dtype), each.full)
        if p.coming:
            p.coming()
        p.data = p.matrix

    def _after_forward(self, p, layer, args, y):
        if not p.in_backward:  # (a checkpointed layer may be)
            self._free(p)
        for x in y if isinstance(y, (tuple, list)) else [y]:
            if torch.is_tensor(x) and x.requires_grad:  # with its gradient the backward pass begins
                x.register_hook(functools.partial(self._gather, p, True))

    def _start(self, bucket):  # of the gradient of a matrix each rank gets its part
        p, W = bucket[0], world()
        if not hasattr(p, "shard"):
            return super()._start(bucket)
        g = torch.zeros_like(p.full) if p.grad is None else p.grad.reshape(-1)
        wait = reduce_scatter(F.pad(g, (0, -len(g) % W)), [len(p.shard)] * W, p.shard.dtype)
        self._free(p)
        return lambda: {p: wait() / W}

    def forward(self, *args, **kwargs):
        with contextlib.nullcontext() if self.compute_dtype in (None, torch.float32) else \
                torch.autocast(next(self.parameters()).device.type, self.compute_dtype):
            return self.module(*args, **kwargs)

# ---- Tensor parallel (Shoeybi et al. 2019): of two matrices in a row each rank has a part.

def sum_over(x, group=None):
    """The sum of all ranks' outputs; each has the gradient of the sum."""
    return Collective.apply(x, lambda x: all_reduce(x.clone(), group), lambda g: g)

def join(x, axis, group=None):
    """All ranks' parts of a tensor along an axis, a whole."""
    return torch.cat([*all_gather(x.reshape(-1), group=group)().view(-1, *x.shape)], axis)

def split_parameter(p, axis, group=None):
    """Leave a parameter this rank's part along an axis. Raises ValueError."""
    W, r = world(group), rank(group)
    if hasattr(p, "to_part"):  # tied
        return
    if p.shape[axis] % W:
        raise ValueError(f"{p.shape[axis]} rows or columns can not be divided by {W} processes")
    p.to_part = lambda x: x.chunk(W, axis)[r].clone()
    p.to_whole = lambda x: join(x, axis, group)
    p.data = p.to_part(p.data)

def ColumnParallelLinear(layer, group=None):
    """Leave a Linear layer this rank's d_out / W outputs, in place -> itself: (..., d_in) -> (...,
    d_out / W). The input is the same for all, its gradient the sum of theirs. Raises ValueError."""
    for p in layer.parameters():
        split_parameter(p, 0, group)
    layer.register_forward_pre_hook(lambda _, args: Collective.apply(
        args[0], lambda x: x.view_as(x), lambda g: all_reduce(g.clone(), group)))
    return layer

def RowParallelLinear(layer, group=None):
    """Leave a Linear layer this rank's d_in / W inputs, in place -> itself: (..., d_in / W) ->
    (..., d_out), the sum of all ranks' products. Raises ValueError."""
    def forward(self, x):
        y = sum_over(F.linear(x, self.weight), group)
        return y if self.bias is None else y + self.bias
    split_parameter(layer.weight, 1, group)
    layer.forward = types.MethodType(forward, layer)
    return layer

def VocabParallelEmbedding(layer, group=None):
    """Leave an Embedding this rank's n / W rows, in place -> itself. Ids of others give 0, and the
    sum is all ranks' together: (...) int64 -> (..., d). Raises ValueError."""
    pad = getattr(layer, "padding_idx", None)  # (nn.Embedding's: an id whose row does not learn)
    def forward(self, ids):
        own = ids - rank(group) * len(self.weight)
        mine = (own >= 0) & (own < len(self.weight))
        x = F.embedding(own.masked_fill(~mine, 0), self.weight)
        x = x if pad is None else torch.where(ids[..., None] == pad, x.detach(), x)
        return sum_over(x * mine[..., None], group)
    split_parameter(layer.weight, 0, group)
    layer.forward = types.MethodType(forward, layer)
    return layer

def split_tensors(model, group=None):
    """Make a Transformer tensor parallel, in place. Raises ValueError, RuntimeError."""
    for name, layer in model.named_modules():
        name = name.split(".")[-1]
        if name in ("q_proj", "k_proj", "v_proj", "w1", "w3", "head"):
            ColumnParallelLinear(layer, group)
        elif name in ("o_proj", "w2"):
            RowParallelLinear(layer, group)
        for p in layer.parameters() if name in ("q_norm", "k_norm") else ():
            p.register_hook(lambda g: all_reduce(g.clone(), group))  # each rank's heads give a part
    VocabParallelEmbedding(model.embedding, group)
    model.head.register_forward_hook(lambda _, args, y: Collective.apply(
        y, lambda y: join(y, -1, group), lambda g: g.chunk(world(group), -1)[rank(group)]))

# ---- Pipeline parallel: each rank has some layers, and a batch passes in pieces.

def pipeline_step(stage, batches, loss_fn, group=None, schedule="1f1b", like=torch.empty_like):
    """Forward and (with gradients) backward passes of micro-batches through the stages of a group's
    ranks: GPipe (Huang et al. 2019) does all forward passes first, 1F1B (Narayanan et al. 2019) at
    most W ahead; both wait (W - 1) / (pieces + W - 1) of the time. stage: this rank's module.
    batches: list of (x, y), for the first and the last stage. loss_fn(output, y): a piece's loss.
    like(x): an empty tensor as later stages receive it. -> the sum of losses (on the last rank)."""
    last, r, sent, under_way = world(group) - 1, rank(group), [], []
    loss = torch.zeros((), device=batches[0][0].device)
    def send(x, to):  # x must live until it has left
        x = x.contiguous()
        sent.append((dist.isend(x, group=group, group_dst=to), x))
    def receive(x, source):
        x = x.contiguous()
        dist.recv(x, group=group, group_src=source)
        return x
    ahead = {"gpipe": len(batches), "1f1b": last - r}[schedule]  # of backward passes, by so many
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

def split_layers(model, group=None):
    """Leave a Transformer this rank's layers, in place: (B, T, C) -> (B, T, C), but the first rank
    takes ids, and the last one gives logits. Raises ValueError."""
    c, W, r, before = model.config, world(group), rank(group), [*model.parameters()]
    if c.activation == "moe" or c.n_layer < W:
        raise ValueError(f"--pp is for models without experts, and at least {W} layers")
    for i in range(c.n_layer):
        if not r * c.n_layer // W <= i < (r + 1) * c.n_layer // W:
            delattr(model.blocks, str(i))
    model.like = lambda x: before[0].new_empty(*x.shape, c.n_embd)
    if r > 0:
        model.embed, model.positions = lambda x, at: x, None
    if r < W - 1:
        model.logits, model.final_norm, model.head = lambda x: x, nn.Identity(), None
    if 0 < r and (r < W - 1 or not c.tie_embeddings):  # (else it is the head, too)
        model.embedding = None
    for p in {*before}.difference(model.parameters()):  # (that optimizers may know)
        p.data = p.new_empty(0)

def add_tied_gradients(model, group=None):
    """The first and the last rank of a pipeline both have a tied embedding: add gradients up."""
    p, c = next(model.parameters()), model.config
    table = model.embedding.weight.grad if model.embedding else p.new_zeros(c.vocab_size, c.n_embd)
    all_reduce(table, group)

# ---- Sequence parallel: each rank has a part of each sequence; keys and values go around a ring.

def rotate(tensors, group=None):
    """Send tensors to the next rank -> those of the one before."""
    flat, W, r = flatten(tensors), world(group), rank(group)
    to, source = ([len(flat) * (i == (r + step) % W) for i in range(W)] for step in (1, -1))
    out = torch.empty_like(flat)
    dist.all_to_all_single(out, flat, source, to, group=group)
    return unflatten(out, tensors)

def ring_scores(q, k, step, group, causal):
    """How q sees the keys that have come `step` ranks far: (..., T, T)"""
    s, i = q @ k.mT * q.shape[-1] ** -0.5, torch.arange(q.shape[-2], device=q.device)
    ahead = (rank(group) - step) % world(group) - rank(group)  # of ours is the keys' rank
    return s.masked_fill(ahead * len(i) + i > i[:, None], -math.inf) if causal else s

class RingAttention(torch.autograd.Function):
    """See `ring_attention`; backward as in FlashAttention, with gradients that travel. Keys and
    values are (B, H / n, 1, T, D), all else (B, H / n, n, T, D)."""
    @staticmethod
    def forward(ctx, q, k, v, group, causal):
        m, l, acc, kv = torch.full_like(q[..., :1], -math.inf), 0.0, 0.0, (k, v)
        for step in range(world(group)):  # own keys first: no maximum stays -inf
            kv = rotate(kv, group) if step else kv
            s = ring_scores(q, kv[0], step, group, causal)
            larger = torch.maximum(m, s.amax(-1, keepdim=True))
            p, shrink = (s - larger).exp(), (m - larger).exp()
            m, l, acc = larger, l * shrink + p.sum(-1, keepdim=True), acc * shrink + p @ kv[1]
        ctx.group, ctx.causal, o = group, causal, acc / l
        ctx.save_for_backward(q, k, v, o, m + l.log())
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, o, lse = ctx.saved_tensors
        delta, (dq, dk, dv) = (g * o).sum(-1, keepdim=True), map(torch.zeros_like, (q, k, v))
        for step in range(world(ctx.group)):  # dk and dv go around with their keys, and come home
            p = (ring_scores(q, k, step, ctx.group, ctx.causal) - lse).exp()
            ds = p * (g @ v.mT - delta) * q.shape[-1] ** -0.5
            dq += ds @ k
            dk += (ds.mT @ q).sum(2, keepdim=True)
            dv += (p.mT @ g).sum(2, keepdim=True)
            k, v, dk, dv = rotate((k, v, dk, dv), ctx.group)
        return dq, dk, dv, None, None

def ring_attention(q, k, v, group=None, causal=True):
    """Attention to all ranks' parts of a sequence, T positions each (Liu et al. 2023), by an online
    softmax: none has more than two parts. q: (B, H, T, D); k, v: (B, H / n, T, D) -> like q."""
    q, k, v = q.unflatten(1, (k.shape[1], -1)), k.unsqueeze(2), v.unsqueeze(2)
    with torch.autocast(q.device.type, enabled=False):
        y = RingAttention.apply(*(model_py.upcast(x) for x in (q, k, v)), group, causal)
    return y.flatten(1, 2).type_as(q)

def split_sequence(model, group=None):
    """Let a Transformer take this rank's part of each sequence, and its attention reach the others,
    in place. Raises ValueError."""
    c = model.config
    if {*model.kinds} != {"full"} or c.dropout or c.block_size % world(group):
        raise ValueError("--sp is for full attention, no dropout, and a block_size that it divides")
    def attend(attn, x, where, cache=None):
        q, k, v = attn.heads(x, where.rotate)
        return attn.o_proj(ring_attention(q, k, v, group).transpose(-3, -2).flatten(-2))
    def forward(self, ids):
        at = torch.arange(ids.shape[1], device=ids.device) + rank(group) * ids.shape[1]
        return type(self).forward(self, ids, positions=at[None])
    for block in model.blocks:
        block.attn.forward = functools.partial(attend, block.attn)
    model.forward = types.MethodType(forward, model)

# ---- The training run: train.py's loop, in which methods of `Parallel` replace functions.

SCHEMES = ("naive", "flat", "ddp", "zero1", "zero2", "fsdp")

class Parallel:
    """A Transformer on several processes; the tp, pp or sp ranks of a copy of it are neighbours.
    saved: the states of optimizers in a checkpoint; path: where one will be. Raises ValueError."""
    def __init__(self, args, saved=(), path=""):
        n, W, self.zero = args.tp * args.pp * args.sp, world(), "zero" in args.scheme
        self.args, self.saved, self.path, self.passes, self.signals = args, saved, path, 0, []
        self.dp, self.copy, self.group, self.grads = W // n, rank() // n, None, None
        schemes = SCHEMES[:3] if n > 1 else SCHEMES if args.impl == "own" else ("ddp", "fsdp")
        parts = (args.scheme == "fsdp" or args.tp > 1) and args.optimizer in ("muon", "soap")
        alone = args.teacher or args.noise_scale or args.kernels or args.compile
        if (n not in (args.tp, args.pp, args.sp) or n * (args.dp or self.dp) != W or parts or alone
                or args.scheme not in schemes or args.batch_size % self.dp
                or n > 1 and args.impl == "torch"):
            raise ValueError(
                f"{W} processes are not dp, dp x tp, dp x pp or dp x sp, dp does not divide "
                "batch_size, or flags do not go together: --tp, --pp, --sp take naive, flat, ddp; "
                "--impl torch ddp, fsdp; --tp, fsdp no muon, soap; some flags are train.py's alone")
        if n > 1:
            make = dist.new_subgroups_by_enumeration
            self.group, _ = make([list(range(i, i + n)) for i in range(0, W, n)])  # one copy
            if args.sp == 1:  # who averages gradients; else all: same parameters, other tokens
                self.grads, _ = make([list(range(i, W, n)) for i in range(n)])

    def make_optimizers(self, model, *how):
        """Divide a model, in place -> its optimizers, made for the whole, then for our parts."""
        a, self.model, self.syncs, self.finish = self.args, model, [], []
        if a.impl == "torch" and a.scheme == "fsdp":
            fully_shard(model)
        optimizers = make_optimizers(model, *how)
        self.tied = model.embedding.weight if a.pp > 1 and model.config.tie_embeddings else None
        for n, split in (a.tp, split_tensors), (a.sp, split_sequence), (a.pp, split_layers):
            if n > 1:
                split(model, self.group)
        if a.pp > 1:  # (`cross_entropy` does all of it)
            self.stage, model.forward = model.forward, lambda x: x
        if self.zero:
            broadcast(model)
            optimizers = [ShardedOptimizer(o.param_groups, type(o), a.scheme == "zero2",
                                           a.bucket_mb, **o.defaults) for o in optimizers]
            self.syncs = self.finish = optimizers
        elif a.impl == "own" and a.scheme == "fsdp":
            half = a.dtype == "bfloat16" or a.dtype == "auto" and train.has_fast_bfloat16(a.device)
            self.finish = [FSDP(model, torch.bfloat16 if half else None)]
        elif a.impl == "own":  # (of a pipeline's backward passes only the last may send)
            size = {"naive": 0, "flat": math.inf}.get(a.scheme, a.bucket_mb)
            overlap = a.scheme == "ddp" and a.pp == 1
            self.syncs = self.finish = [DDP(model, size, overlap, self.grads)]
        elif a.scheme == "ddp":  # calls of the model go through PyTorch's DDP from now on
            inner = nn.Module()
            inner.model, inner.forward = model, model.forward
            self.syncs = [nn.parallel.DistributedDataParallel(inner, bucket_cap_mb=a.bucket_mb)]
            model.forward = self.syncs[0].forward
        for optimizer, saved in zip(optimizers, self.saved):  # what train.py will load
            params = [p for group in optimizer.param_groups for p in group["params"]]
            saved["state"] = {
                i: {k: params[i].to_part(x) if hasattr(params[i], "to_part") and torch.is_tensor(x)
                    else x for k, x in state.items()}
                for i, state in saved["state"].items() if params[i].numel() and
                getattr(optimizer, "owner", {}).get(params[i], rank()) == rank()}
        stream = rank() if a.pp > 1 else self.copy
        if stream:  # (dropout differs; the first one's is train.py's)
            torch.manual_seed(a.seed + stream)
        model.register_forward_pre_hook(self.before_forward)
        if rank() == 0 and not (a.resume or a.eval_only) and os.path.exists(self.path):
            os.rename(self.path, aside := f"{self.path[:-3]}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
            print(f"{self.path}, of another run, is now {aside}", flush=True)
        dist.barrier()  # (or train.py would do that on all ranks)
        return optimizers

    def before_forward(self, model, _):
        """Gradients leave in the last backward pass of a step; fsdp's, in each."""
        if model.training and torch.is_grad_enabled():
            for each in self.finish if self.passes and self.args.scheme == "fsdp" else ():
                each.finish_gradient_synchronization(more=True)
            self.passes = (self.passes + 1) % self.args.gradient_accumulation_steps
            for each in self.syncs:
                each.require_backward_grad_sync = self.passes == 0

    def cut(self, x):
        """Rows of this copy of the model and, with --sp, positions of this rank."""
        return x.chunk(self.dp)[self.copy].chunk(self.args.sp, 1)[rank() % self.args.sp]

    def windows(self, data, starts, *more):
        """As train.windows, but of the inputs only this rank's: `cross_entropy` cuts targets, and
        train.py counts all. Raises ValueError on all ranks if one was told to stop."""
        if all_reduce(torch.tensor(float(len(self.signals)), device=self.args.device)):
            raise ValueError("stopped")
        starts = np.pad(starts, (0, -len(starts) % self.dp), constant_values=len(data))
        x, y = windows(data, starts, *more)
        return self.cut(x), y

    def cross_entropy(self, logits, y, reduction="sum", z_loss=0.0):
        """The sum of everyone's losses. Its gradient is that of this rank's own, times the number
        of those that have others, since gradients will be averaged."""
        a, own, n = self.args, self.cut(y), self.dp * self.args.sp
        loss_of = functools.partial(cross_entropy, reduction="sum", z_loss=z_loss)
        if a.pp > 1:  # (logits are still ids here; the backward pass, too, is in this)
            part, m = n / (y.numel() * a.gradient_accumulation_steps), a.microbatches
            loss = pipeline_step(
                self.stage, [*zip(logits.chunk(m), own.chunk(m))], lambda *x: part * loss_of(*x),
                self.group, a.pp_schedule, self.model.like).requires_grad_() / part
        else:
            loss = loss_of(logits, own)
        return Collective.apply(loss, lambda x: all_reduce(x.clone()) / a.tp, lambda g: n * g)

    @torch.no_grad()
    def clip_grad_norm(self, params, max_norm, eps=1e-6):
        """Average all gradients, and clip them by their norm together -> the norm before."""
        if self.tied is not None:
            add_tied_gradients(self.model, self.group)
        for each in self.finish:
            each.finish_gradient_synchronization()
        grads, square = [], torch.zeros((), device=self.args.device)
        for p in (p for p in params if p.grad is not None):
            grads.append(getattr(p.grad, "_local_tensor", p.grad))
            own = self.args.pp > 1 or self.zero or hasattr(p, "to_whole")
            copies = 2 if p is self.tied else 1 if own else world(self.group)
            square += grads[-1].square().sum() / copies
        norm = all_reduce(square, self.group).sqrt()
        for g in grads if max_norm else ():
            g.mul_((max_norm / (norm + eps)).clamp(max=1.0))
        return norm

    def random_state(self, device, new=None):
        """As train.random_state, with the states of all ranks; other ranks begin anew."""
        layout = [world(), self.args.tp, self.args.pp]
        if new and new.get("layout", [1, 1, 1]) == layout:
            random_state(device, new.get("ranks", [new])[rank()])
        own, ranks = random_state(device), [None] * world()
        dist.all_gather_object(ranks, own)
        return own | {"ranks": ranks, "layout": layout}

    @torch.no_grad()
    def save_checkpoint(self, path, model, optimizers, **more):
        """As model.save_checkpoint: a file as of one process, which the first one writes."""
        parts = [gather_full_params(model)]
        for o in optimizers:
            params = enumerate(p for group in o.param_groups for p in group["params"])
            parts.append({i: {k: whole(p, x) for k, x in o.state[p].items()}
                          for i, p in params if p in o.state})
        if self.args.pp > 1 or self.zero:  # each rank has some of them
            theirs = [None] * world(self.group)
            dist.all_gather_object(theirs, parts, group=self.group)
            parts = [dict(itertools.chain(*(x.items() for x in each))) for each in zip(*theirs)]
        if rank() == 0:
            model_py.save_checkpoint(path, parts[0], [{"state": x} for x in parts[1:]],
                                     config=model.config, **more)

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
    """Join the other processes, or without torchrun be alone -> this one's device, CPU or GPU."""
    device = torch.device("cpu")
    if train.pick_device(name).startswith("cuda"):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    alone = "RANK" not in os.environ
    store, number, W = (dist.HashStore(), 0, 1) if alone else next(dist.rendezvous("env://"))
    # after a restart the store may still have the addresses of those that have died
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(store=store, rank=number, world_size=W)  # gloo, and for GPUs NCCL
    def watch():  # when torchrun is killed, end, too
        while os.getppid() == PARENT:
            time.sleep(1)
        os._exit(1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()
    if rank() > 0:  # the first one speaks for all
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device

def build_parser(parser=None):
    """What the command line has beside train.py's; a parser that is given gets that, too."""
    parser = parser or argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: fail(message, 2)
    for name, default, text, *choices in (
            ("scheme", "ddp", "", *SCHEMES), ("impl", "own", "", "own", "torch"),
            ("pp_schedule", "1f1b", "", "1f1b", "gpipe"), ("bucket_mb", 25.0, "of ddp, zero2"),
            ("dp", 0, "copies of the model; 0: all it can"), ("sp", 1, "sharing each sequence"),
            ("tp", 1, "sharing each matrix"), ("pp", 1, "sharing the layers"),
            ("microbatches", 4, "of a pipeline")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            choices=choices or None, help=f"{text} (default {default})")
    return parser

def run(words):
    """Train as train.py does, on all processes together."""
    ours, words = build_parser().parse_known_args(words)  # a checkpoint has train.py's words alone
    parser = build_parser(train.build_parser("ddp.py"))
    path = os.path.join(parser.parse_known_args(words)[0].out_dir, "ckpt.pt")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and os.path.exists(path) and \
            train.load_checkpoint(path)[1]["args"] == words:
        words.append("--resume")  # torchrun --max_restarts starts all again when one has died
    args, words, checkpoint = train.parse_args(parser, words)
    if any(getattr(args, name) != parser.get_default(name) for name in vars(ours)):
        parser.error("flags that train.py does not have can not be abbreviated")
    args = argparse.Namespace(**vars(args) | vars(ours) | {"device": setup(args.device)})
    parallel = Parallel(args, checkpoint[1]["optimizer"] if checkpoint else (), path)
    for name in vars(Parallel).keys() & vars(train).keys():  # (windows, cross_entropy, ...)
        setattr(train, name, getattr(parallel, name))
    train.parse_args = lambda *_: (args, words, checkpoint)
    train.signal = types.SimpleNamespace(SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, signal=(
        lambda number, _: signal.signal(number, lambda *_: parallel.signals.append(number))))
    if rank() > 0:  # (log.csv and its plot)
        train.replacing = train.plot_log = lambda *_, **how: contextlib.nullcontext(sys.stdout)
    try:
        train.main()
    except ValueError as error:
        if str(error) != "stopped":
            raise
        print(f"{path}: go on with --resume", flush=True)
        sys.exit(130)

# ---- bench: what the schemes send, take and keep on this machine.

def sent_bytes():
    """Bytes that all processes of this machine have sent each other so far, nan if not known."""
    path = "/sys/class/net/lo/statistics/tx_bytes"
    dist.barrier()
    time.sleep(0.03)  # until the loopback interface has counted all of them
    return float(np.loadtxt(path)) if os.path.exists(path) else math.nan

def bench(words):
    """Print a table of all schemes, which take turns: time, bytes sent, and memory of a step."""
    parser = build_parser(train.build_parser("ddp.py bench"))
    parser.add_argument("--repeat", type=int, default=7, help="times that each is timed")
    a = parser.parse_args("--n_embd 256 --n_layer 4 --vocab_size 2048 --bucket_mb 4 --dtype "
                          "float32".split() + words)
    names = {*vars(model_py.TransformerConfig())}
    config = model_py.TransformerConfig(**{k: x for k, x in vars(a).items() if k in names and x})
    a.device, runs, rows = setup(a.device), {}, {}
    x, y = torch.randint(config.vocab_size, (2, 2 * world(), config.block_size)).to(a.device)
    for name in (*SCHEMES, "torch ddp", "torch fsdp"):
        a.impl, a.scheme = "torch" if " " in name else "own", name.split()[-1]
        parallel = Parallel(argparse.Namespace(**vars(a)))
        model = model_py.Transformer(config).to(a.device)
        P = sum(p.nbytes for p in model.parameters())
        optimizers = parallel.make_optimizers(model, "adamw", 3e-3, 0.1, (0.9, 0.95), 0.95)
        runs[name], rows[name] = (parallel, model, optimizers), []
    for name in [*runs] * (a.repeat + 1):
        before, begin, (parallel, model, optimizers) = sent_bytes(), time.perf_counter(), runs[name]
        (parallel.cross_entropy(model(parallel.cut(x)), y) / y.numel()).backward()
        parallel.clip_grad_norm(model.parameters(), 1.0)
        held = [[*model.parameters()], [p.grad for p in model.parameters()]]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        ms = 1e3 * (time.perf_counter() - begin)
        held.append([v for o in optimizers for s in o.state.values() for v in s.values()])
        rows[name].append((ms, (sent_bytes() - before) / P, *(sum(
            getattr(v, "_local_tensor", v).nbytes for v in kind if torch.is_tensor(v)) / 1e6
            for kind in held)))
    print(f"{world()} processes on {a.device}; sent: by all; MB: of one, when gradients are there\n"
          "scheme         ms a step   sent, P    params     grads     optim")
    for name, row in rows.items():  # (the first step made the optimizer's state)
        print(f"{name:14}" + "".join(f"{x:10.2f}" for x in np.median(row[1:], 0)))

# ---- plan: the same on paper, for machines one does not have.

def plan(words):
    """Print what each way to divide a model and its batch among GPUs needs: of each of the 12 L h^2
    parameters in L layers of width h = 128 L, 2 bytes (bfloat16), 2 of gradient, 12 of optimizer
    (float32 weights, two means); per layer and token 34 h of activations (Korthikanti et al. 2022).
    !: does not fit; exposed: communication that has no computation to hide behind."""
    parser = argparse.ArgumentParser("ddp.py plan", description=plan.__doc__)
    parser.error = lambda message: fail(message, 2)
    for name, default, text in (
            ("params", 7e9, "of the model"), ("gpus", 64, "in all"), ("gpu_gb", 80.0, "of one"),
            ("tflops", 400.0, "of one in practice"), ("node", 8, "GPUs in a machine"),
            ("node_gbs", 450.0, "GB/s of one inside"), ("net_gbs", 50.0, "... and outside"),
            ("batch_tokens", 4e6, "of a step"), ("microbatches", 16, "of a pipeline")):
        parser.add_argument(f"--{name}", type=type(default), default=default,
                            help=f"{text} (default {default:g})")
    a = parser.parse_args(words)
    L = max(1, round((a.params / (12 * 128**2)) ** (1 / 3)))
    h = math.sqrt(a.params / (12 * L))
    print("scheme    dp  tp  pp  GB: params  grads  optim  activ  total  s: compute   comm exposed")
    for tp, pp, (kinds, scheme) in itertools.product(
            (1, 2, 4, 8), (1, 2, 4, 8, 16), enumerate(SCHEMES[2:])):  # kinds that are divided
        if tp > a.node or a.gpus % (tp * pp) or pp > L or pp > 1 and kinds > 1:
            continue  # (with pipelines gradients and weights would travel for every piece)
        dp, own, fsdp = a.gpus // (tp * pp), a.params / (tp * pp) / 1e9, scheme == "fsdp"
        gb = [n * own / (dp if kinds >= least else 1) for n, least in ((2, 3), (2, 2), (12, 1))]
        gb[0] += 2 * own / L * fsdp * 2  # two layers at a time are whole
        acts = 34 * h * a.batch_tokens / dp * L / (tp * pp) / 1e9
        gb.append(acts * min(1, pp / a.microbatches))  # (of as many pieces as there are stages)
        bubble = (pp - 1) / a.microbatches  # (a pipeline waits that much longer)
        compute = 6 * a.params * a.batch_tokens / (a.gpus * a.tflops * 1e12) * (1 + bubble)
        # to average gradients, and to add up each layer's outputs in both directions
        comm = (2 + fsdp) * 2 * own * (dp - 1) / dp / (
            a.node_gbs if a.gpus <= a.node else a.net_gbs) + 16 / 34 * acts * (tp - 1) / a.node_gbs
        seconds = compute, comm, max(0, comm - 2 / 3 * compute)  # (hidden in backward passes)
        print(f"{scheme:6}{dp:6}{tp:4}{pp:4}    " + "".join(f"{x:7.1f}" for x in (*gb, sum(gb)))
              + (" " if sum(gb) <= a.gpu_gb else "!") + "".join(f"{x:9.2f}" for x in seconds))

def fail(error, code=1):
    """End with one line. What all ranks find wrong the first one says; torchrun ends the others."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if not isinstance(error, BrokenPipeError):  # (`head`, for instance, has seen enough)
        print(f"ddp.py: error: {' '.join(str(error).split()):.300}", file=sys.stderr, flush=True)
    os._exit(code)  # (others may wait: no farewell)

def main():
    command = {"bench": bench, "plan": plan}.get((*sys.argv, "")[1])
    try:
        command(sys.argv[2:]) if command else run(sys.argv[1:])
    except Exception as error:  # (what a stranger's file can raise varies)
        fail(error)
    finally:
        if dist.is_initialized():
            dist.barrier()  # (or who is ready first takes the connections away)
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
