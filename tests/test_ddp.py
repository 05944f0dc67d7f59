"""ddp.py: every scheme against one process, over gloo."""

import copy
import importlib
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import ddp as D
import model as M
import train as T

multiprocessing.set_forkserver_preload(["torch._dynamo", "ddp"])  # once for all processes


def child(rank, world, path, f, args):
    """One process of `spawn`: leaves a file when f has passed all it checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(rank)  # different weights, until they are broadcast
    try:
        f(rank, world, *args)
        dist.barrier()  # or a rank that is ready first takes the connection away from the others
        time.sleep(0.1)
        open(f"{path}.{rank}", "x").close()
    finally:
        dist.destroy_process_group()


def spawn(tmp_path, world, f, *args):
    """Run f(rank, world, *args) in `world` processes -> ranks in which all that it checks held. An
    assertion that fails in one is raised here."""
    path = tmp_path / f"rendezvous{len(list(tmp_path.iterdir()))}"
    mp.start_processes(child, (world, str(path), f, args), world, start_method="forkserver")
    return [rank for rank in range(world) if os.path.exists(f"{path}.{rank}")]


def equal(a, b, tolerance=1e-10, msg=None):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=msg)


class Odd(nn.Module):
    """Odd sizes, a tied matrix, a frozen one, and one that is never used."""

    def __init__(self, linear=nn.Linear):
        super().__init__()
        self.unused = linear(3, 3)
        self.embedding = nn.Embedding(11, 7)
        self.a = linear(7, 13)
        self.b = linear(13, 7)
        self.norm = nn.LayerNorm(7)
        self.frozen = linear(7, 7)
        self.frozen.weight.requires_grad_(False)
        self.head = linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.b(torch.tanh(self.a(self.frozen(x))))
        return self.head(self.norm(x))


def loss_of(module, ids):
    return F.cross_entropy(module(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def reference(steps, dtype, world, optimizer_cls=torch.optim.AdamW, accumulate=1):
    """Losses and parameters of one process that has all the data."""
    torch.manual_seed(0)
    module = Odd().to(dtype)
    optimizer = optimizer_cls(module.parameters(), lr=1e-2)
    data = torch.randint(11, (steps, accumulate, world, 3, 6))
    start = copy.deepcopy(module.state_dict())
    for batches in data:
        for ids in batches:
            (loss_of(module, ids.flatten(0, 1)) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, data, module.state_dict()


def close(a, b, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    for name in b:
        equal(a[name], b[name], tolerance, name)


def data_parallel(rank, world):
    for dtype in (torch.float64, torch.float32):
        for bucket_mb, overlap, accumulate in ((0, False, 1), (math.inf, False, 1),
                                               (0.0003, True, 1), (25, True, 3)):
            start, data, expected = reference(3, dtype, world, accumulate=accumulate)
            module = Odd().to(dtype)
            if rank == 0:
                module.load_state_dict(start)
            wrapped = D.DDP(module, bucket_mb=bucket_mb, overlap=overlap)
            assert wrapped.module is module
            on_the_way = []  # buckets that have left when the last gradient is there
            module.embedding.weight.register_post_accumulate_grad_hook(
                lambda _: on_the_way.append(len(wrapped.work)))
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            for batches in data:
                for i, ids in enumerate(batches):
                    if i + 1 < accumulate:
                        with wrapped.no_sync():
                            (loss_of(wrapped, ids[rank]) / accumulate).backward()
                            assert not wrapped.work
                    else:
                        (loss_of(wrapped, ids[rank]) / accumulate).backward()
                wrapped.finish_gradient_synchronization()
                assert module.unused.weight.grad is None and module.frozen.weight.grad is None
                optimizer.step()
                optimizer.zero_grad()
            close(module.state_dict(), expected, dtype)
            if bucket_mb == 0.0003:  # the first bucket left before the backward pass was over
                assert len(wrapped.buckets.buckets) > 2 and min(on_the_way) > 0
            elif not overlap:
                assert max(on_the_way) == 0


def test_data_parallel(tmp_path):
    assert spawn(tmp_path, 2, data_parallel) == [0, 1]
    assert spawn(tmp_path, 3, data_parallel) == [0, 1, 2]


def used_on_one_rank(rank, world):
    module = Odd()
    wrapped = D.DDP(module, bucket_mb=0.0003)
    loss_of(wrapped, torch.randint(11, (2, 5))).backward()
    if rank == 0:
        module.unused(torch.ones(1, 3)).sum().backward()
    wrapped.finish_gradient_synchronization()
    torch.testing.assert_close(module.unused.weight.grad, torch.ones(3, 3) / world)


def test_a_parameter_used_on_one_rank_only(tmp_path):
    assert spawn(tmp_path, 2, used_on_one_rank) == [0, 1]


def sharded_optimizer(rank, world):
    for dtype in (torch.float64, torch.float32):
        for cls in (torch.optim.AdamW, T.AdamW, torch.optim.SGD):
            for how in ("ddp", "zero1", "zero2"):
                accumulate = 2 if how == "zero2" else 1
                start, data, expected = reference(3, dtype, world, cls, accumulate)
                module = Odd().to(dtype)
                module.load_state_dict(start)
                optimizer = D.ShardedOptimizer(module.parameters(), cls, lr=1e-2,
                                               shard_gradients=how == "zero2")
                wrapped = D.DDP(module) if how == "ddp" else module
                for batches in data:
                    for i, ids in enumerate(batches):
                        (loss_of(wrapped, ids[rank]) / accumulate).backward()
                        if how == "zero2" and i == 0:
                            others = [p for p, r in optimizer.owner.items() if r != rank]
                            assert others and all(p.grad is None for p in others)
                    if how == "ddp":
                        wrapped.finish_gradient_synchronization()
                    else:
                        optimizer.reduce_gradients()
                    optimizer.step()
                    optimizer.zero_grad()
                close(module.state_dict(), expected, dtype)
                numbers = sum(x.numel() for s in optimizer.state.values() for x in s.values()
                              if torch.is_tensor(x) and x.numel() > 1)
                total = 2 * sum(p.numel() for p in module.parameters()
                                if p.requires_grad and p.numel() > 1)
                if cls is not torch.optim.SGD:
                    assert numbers <= 0.62 * total if world == 2 else numbers < 0.45 * total
    # the state taken up by another one
    again = D.ShardedOptimizer(module.parameters(), cls, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert again.local.state.keys() == optimizer.local.state.keys()
    for p, state in optimizer.local.state.items():
        torch.testing.assert_close(again.local.state[p], state)
    # Adagrad, which makes its state before the first step; a parameter that is not contiguous,
    # and an empty one
    params = nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(3, 5).T), nn.Parameter(
        torch.ones(15))
    adagrad = D.ShardedOptimizer(params, torch.optim.Adagrad, lr=1.0, shard_gradients=True)
    assert sum(p.numel() for p in adagrad.state) == (15 if rank < 2 else 0)
    sum(p.sum() for p in params).backward()
    adagrad.reduce_gradients()
    adagrad.step()
    assert all((p == 0).all() for p in params)
    # a schedule, and further parameters
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    before = len(optimizer.owner)
    more = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [more], "lr": 0.1})
    assert len(optimizer.owner) == before + 1
    start = module.norm.bias.detach().clone()
    for p in (module.norm.bias, more):
        p.grad = torch.ones_like(p)
    optimizer.reduce_gradients()
    optimizer.step()
    assert [group["lr"] for group in optimizer.local.param_groups] == [0.5, 0.1]
    torch.testing.assert_close(module.norm.bias, start - 0.5)
    torch.testing.assert_close(more, torch.full((2,), 0.9))


def test_sharded_optimizer(tmp_path):
    assert spawn(tmp_path, 2, sharded_optimizer) == [0, 1]
    assert spawn(tmp_path, 3, sharded_optimizer) == [0, 1, 2]


def fully_sharded(rank, world):
    for dtype in (torch.float64, torch.float32):
        start, data, expected = reference(3, dtype, world)
        module = Odd().to(dtype)
        if rank == 0:
            module.load_state_dict(start)
        wrapped = D.FSDP(module)
        assert module.a.weight.shape == (-(-7 * 13 // world),)
        assert module.head.weight is module.embedding.weight
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        for batches in data:
            loss = loss_of(wrapped, batches[0, rank])
            assert module.a.weight.ndim == 1  # freed after use
            loss.backward()
            wrapped.finish_gradient_synchronization()
            optimizer.step()
            optimizer.zero_grad()
        full = wrapped.gather_full_params()
        assert set(full) == set(expected)
        close(full, expected, dtype)
    torch.manual_seed(5)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0, dtype=torch.float64), torch.randn(
        3, 2, 8, dtype=torch.float64)
    expected = layer(x)
    torch.testing.assert_close(D.FSDP(layer)(x), expected)
    half = D.FSDP(Odd(), compute_dtype=torch.bfloat16)
    out = half.module.a(torch.randn(2, 7))
    assert out.dtype == torch.bfloat16 and half.module.a.weight.dtype == torch.float32
    out.sum().backward()
    assert half.module.a.weight.grad.dtype == torch.float32


def test_fully_sharded(tmp_path):
    assert spawn(tmp_path, 2, fully_sharded) == [0, 1]
    assert spawn(tmp_path, 3, fully_sharded) == [0, 1, 2]


class Linear(nn.Module):
    """Somebody else's."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))

    def forward(self, x):
        return torch.einsum("...i,oi->...o", x, self.weight)


class Embedding(nn.Embedding):
    def forward(self, ids):
        return self.weight[ids]


class Paths(nn.Module):
    """Layers in the order that is asked for, with or without activation checkpointing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Embedding(6, 6), *(Linear(6, 6) for _ in range(4))])
        self.layers[4].weight = self.layers[0].weight

    def forward(self, ids, order, checkpointing):
        x = self.layers[0](ids)
        for i in order:
            layer = self.layers[int(i)]
            x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
            x = torch.tanh(x)
        return x


def foreign_layers(rank, world):
    torch.manual_seed(0)
    module, ids = Paths().double(), torch.tensor([0, 5, 2])
    wrapped = D.FSDP(copy.deepcopy(module))
    assert all(layer.weight.ndim == 1 for layer in wrapped.module.layers)
    models = [(x, torch.optim.SGD(x.parameters(), lr=0.1)) for x in (module, wrapped)]
    for orders, checkpointing in (("1234", False), ("4321", False), ("1 4", False),
                                  ("123 32", False), ("1123", True)):
        losses = []
        for x, optimizer in models:
            for order in orders.split():  # several backward passes add up
                out = x(ids, order, checkpointing)
                losses.append(out.square().sum())
                losses[-1].backward()
        wrapped.finish_gradient_synchronization()
        for x, optimizer in models:
            optimizer.step()
            optimizer.zero_grad()
        half = len(losses) // 2
        equal(torch.stack(losses[half:]), torch.stack(losses[:half]))
        close(wrapped.gather_full_params(), module.state_dict(), torch.float64)
    with pytest.raises(ValueError, match="nothing to shard"):
        D.FSDP(nn.LayerNorm(3))


def test_fully_sharded_layers_of_any_origin_in_any_order(tmp_path):
    assert spawn(tmp_path, 2, foreign_layers) == [0, 1]


def under_autocast(rank, world):
    """As one process would compute; the whole matrices are not kept for the backward pass."""
    torch.manual_seed(0)
    module, ids, gathered, all_gather = Odd(), torch.randint(11, (3, 6)), [], D.all_gather
    D.all_gather = lambda x, group: gathered.append(x.dtype) or all_gather(x, group)
    wrapped = D.FSDP(copy.deepcopy(module))
    for x in (module, wrapped):
        with torch.autocast("cpu", torch.bfloat16):
            out = x(ids)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    wrapped.finish_gradient_synchronization()
    assert gathered == [torch.float32] + 8 * [torch.bfloat16]  # the embedding; 4 layers, twice
    for a, b in zip(module.parameters(), wrapped.module.parameters()):
        if a.grad is not None:
            equal(a.grad, b.to_whole(b.grad) if hasattr(b, "to_whole") else b.grad, 1e-6)


def test_fully_sharded_under_autocast(tmp_path):
    assert spawn(tmp_path, 2, under_autocast) == [0, 1]


CONFIG = dict(vocab_size=24, block_size=12, n_layer=4, n_head=4, n_kv_head=2, n_embd=16, d_ff=32)


def transformer_reference(**changes):
    torch.manual_seed(0)
    model = M.Transformer(M.TransformerConfig(**CONFIG | changes)).double()
    ids = torch.randint(24, (8, 13))
    logits = model(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return model, ids, logits.detach(), loss.detach(), grads


def tensor_parallel(rank, world):
    for changes in ({}, {"qk_norm": True, "bias": True},
                    {"attention": "sliding", "window": 3, "activation": "gelu"}):
        model, ids, logits, loss, grads = transformer_reference(**changes)
        split = D.split_tensors(copy.deepcopy(model), None)
        split.zero_grad()
        out = split(ids[:, :-1])
        part = D.part_of(24, None)
        equal(out, logits[..., part])
        targets = ids[:, 1:].clone()
        ours = D.vocab_parallel_cross_entropy(out, targets) / targets.numel()
        equal(ours, loss)
        ours.backward()
        for name, p in split.named_parameters():
            part = p.to_part(grads[name]) if hasattr(p, "to_part") else grads[name]
            equal(p.grad, part, msg=name)
        targets[:, :5] = -100
        some = D.vocab_parallel_cross_entropy(out.detach(), targets)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        torch.testing.assert_close(some, expected)
        some = D.vocab_parallel_cross_entropy(out.detach(), targets, z_loss=0.1)
        expected = T.cross_entropy(logits, targets, reduction="sum", z_loss=0.1)
        torch.testing.assert_close(some, expected)
    # the layers by themselves, on torch.nn's weights
    torch.manual_seed(1)
    a, b = nn.Linear(6, 8).double(), nn.Linear(8, 6).double()
    x = torch.randn(3, 6).double().requires_grad_()
    column = D.ColumnParallelLinear(6, 8, True, weight=a.weight, bias_value=a.bias)
    row = D.RowParallelLinear(8, 6, True, weight=b.weight, bias_value=b.bias)
    g = torch.autograd.grad(row(column(x).relu()).square().sum(), x)[0]
    expected = torch.autograd.grad(b(a(x).relu()).square().sum(), x)[0]
    equal(g, expected)
    table = nn.Embedding(10, 4).double()
    ids = torch.tensor([[0, 9, 5], [4, 4, 1]])
    own = D.VocabParallelEmbedding(10, 4, weight=table.weight)
    torch.testing.assert_close(own(ids), table(ids))
    for kind, sizes in ((D.ColumnParallelLinear, (6, 7)), (D.RowParallelLinear, (7, 6)),
                        (D.VocabParallelEmbedding, (9, 4))):
        with pytest.raises(ValueError, match="divided"):
            kind(*sizes)


def test_tensor_parallel(tmp_path):
    assert spawn(tmp_path, 2, tensor_parallel) == [0, 1]


def pipeline(rank, world):
    for changes in ({}, {"position": "learned", "norm": "layernorm"}):
        model, ids, _, loss, grads = transformer_reference(**changes)
        model.zero_grad()
        for schedule in ("gpipe", "1f1b"):
            for n in (1, 2, 8):
                stage = D.split_layers(copy.deepcopy(model))
                batches = [(b[:, :-1], b[:, 1:]) for b in ids.chunk(n)]
                held = []
                stage.register_forward_hook(lambda *_: held.append(1))

                def share(out, y):
                    loss = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum")
                    return loss / (8 * 12)

                ours = D.pipeline_step(stage, batches, share, schedule=schedule)
                if rank == world - 1:
                    equal(ours, loss)
                assert len(held) == n
                names = dict(stage.named_parameters())
                assert names and set(names) <= set(grads)
                for name, p in names.items():
                    equal(p.grad, grads[name], msg=name)
    every = [None] * world
    dist.all_gather_object(every, list(names))
    assert sorted(sum(every, [])) == sorted(grads)
    with pytest.raises(ValueError, match="schedule"):
        D.pipeline_step(stage, batches, share, schedule="later")


def test_pipeline(tmp_path):
    assert spawn(tmp_path, 2, pipeline) == [0, 1]
    assert spawn(tmp_path, 4, pipeline) == [0, 1, 2, 3]


def ring(rank, world):
    torch.manual_seed(0)
    for causal in (True, False):
        q, k, v, g = (torch.randn(2, h, 5 * world, 6, dtype=torch.float64) for h in (4, 2, 2, 4))
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        kk, vv = (x.repeat_interleave(2, 1) for x in whole[1:])
        out = F.scaled_dot_product_attention(whole[0], kk, vv, is_causal=causal)
        expected = torch.autograd.grad(out, whole, g)
        own = slice(5 * rank, 5 * rank + 5)
        parts = [x[:, :, own].clone().requires_grad_() for x in (q, k, v)]
        ours = D.ring_attention(*parts, causal=causal)
        equal(ours, out[:, :, own])
        for a, b in zip(torch.autograd.grad(ours, parts, g[:, :, own]), expected):
            equal(a, b[:, :, own])
    for position in ("rope", "learned"):
        model, ids, logits, _, grads = transformer_reference(position=position)
        model.zero_grad()
        n = 12 // world
        own = slice(rank * n, rank * n + n)
        split = D.split_sequence(model, n, None)
        wrapped = D.DDP(split)
        out = wrapped(ids[:, :-1][:, own])
        equal(out, logits[:, own])
        F.cross_entropy(out.flatten(0, 1), ids[:, 1:][:, own].flatten()).backward()
        wrapped.finish_gradient_synchronization()
        for name, p in split.named_parameters():
            equal(p.grad, grads[name], msg=name)


def test_ring_attention(tmp_path):
    assert spawn(tmp_path, 2, ring) == [0, 1]
    assert spawn(tmp_path, 3, ring) == [0, 1, 2]


# ---- the command line


def script(rank, name, environment, output, args):
    """One process of `run`: a script's main(), as torchrun would start it."""
    torch.set_num_threads(1)
    with open(f"{output}.{rank}", "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment, RANK=str(rank))
    if not environment:
        del os.environ["RANK"]
    sys.argv = [f"{name}.py", *args]
    importlib.import_module(name).main()


def run(processes, tmp_path, *args, name="ddp"):
    """Run a script in so many processes (0: it needs no others) -> (whether all ended well, what
    they printed)."""
    environment, world = {}, max(1, processes)
    if processes:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    output, good = tmp_path / f"output{len(list(tmp_path.iterdir()))}", True
    try:
        mp.start_processes(script, (name, environment, str(output), [str(a) for a in args]), world,
                           start_method="forkserver")
    except mp.ProcessExitedException:
        good = False
    return good, "".join(open(f"{output}.{rank}").read() for rank in range(world))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("".join(f"{i} and {i} are {2 * i}.\n" for i in range(2000)))
    for command in (("train", "--vocab_size", 264),
                    ("encode", "--tokenizer", folder, "--val_fraction", 0.02)):
        files = "--input", folder / "a.txt", "--out", folder
        assert run(0, folder, *command, *files, name="bpe")[0]
    return folder


FLAGS = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --log_interval 1 "
         "--eval_interval 4 --eval_iters 0 --dtype float32 --learning_rate 1e-2").split()
CONSTANT = "--warmup_iters", 0, "--schedule", "constant"  # the same whatever --max_iters is


def train(processes, data, out, *args, name="ddp"):
    """Run ddp.py, or in no processes train.py, and expect it to end well."""
    good, printed = run(processes, out, "--data", data, "--out_dir", out, *FLAGS, *args,
                        name=name if processes else "train")
    assert good, printed[-2000:]


def rows_of(out):
    """Losses, gradient norms and validation losses of a run, a tensor."""
    rows = T.Log(out / "log.csv", 10**9, 1, 1, None).rows
    return torch.tensor([[float(row[k] or 0) for k in ("loss", "grad_norm", "val_loss")]
                         for row in rows])


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """train.py's losses of 8 steps."""
    out = tmp_path_factory.mktemp("alone")
    train(0, data, out, "--max_iters", 8, "--eval_iters", 2)
    return rows_of(out)


@pytest.fixture(scope="module")
def constant(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("constant")
    train(0, data, out, "--max_iters", 8, *CONSTANT)
    return out


@pytest.mark.parametrize("first, then", [
    ((0, ""), (2, "--scheme zero2")),
    ((2, "--scheme zero1"), (0, "")),
    ((2, "--tp 2"), (2, "--pp 2 --microbatches 2")),
    ((2, "--pp 2 --microbatches 2 --pp_schedule gpipe"), (2, "--scheme fsdp")),
    ((2, "--scheme fsdp --impl torch"), (4, "--scheme fsdp")),
])
def test_runs_go_on_elsewhere_with_equal_losses(data, constant, tmp_path, first, then):
    """4 of 8 steps by one scheme, the others by another: as train.py alone."""
    train(first[0], data, tmp_path, *first[1].split(), "--max_iters", 4, *CONSTANT)
    train(then[0], data, tmp_path, *then[1].split(), "--max_iters", 8, "--resume")
    equal(rows_of(tmp_path), rows_of(constant), 2e-4)
    a, b = (M.load_checkpoint(out / "ckpt.pt")[0].state_dict() for out in (tmp_path, constant))
    for name in b:
        equal(a[name], b[name], 2e-3, name)


@pytest.mark.parametrize("processes, flags", [
    (2, "--sp 2"),
    (2, "--scheme naive --activation_checkpointing"),
    (2, "--scheme zero2 --gradient_accumulation_steps 1"),
    (4, "--tp 2 --dp 2"),
])
def test_schemes_train_like_one_process(data, alone, tmp_path, processes, flags):
    train(processes, data, tmp_path, *flags.split(), "--max_iters", 8, "--eval_iters", 2)
    equal(rows_of(tmp_path), alone, 2e-4)


def test_bench(tmp_path):
    flags = f"bench --max_mb 1 --repeat 1 --n_embd 32 --n_layer 1 --trace {tmp_path}/trace.json"
    good, printed = run(2, tmp_path, *flags.split())
    assert good, printed
    rows = {words[0]: words for words in map(str.split, printed.splitlines()) if len(words) > 11}
    params, grads, state = (float(x) for x in rows["zero1"][-3:])
    assert grads == 0 and params / 2 < state < 1.5 * params  # two means of half the parameters
    assert float(rows["ddp"][-1]) > 1.5 * params
    with open(tmp_path / "trace.json") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert any("all_reduce" in name or "allreduce" in name for name in names)


def test_plan(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "ddp.py plan --params 7e9 --gpus 64 --gpu_gb 80".split())
    D.main()
    rows = {tuple(row.split()[:4]): row.split() for row in capsys.readouterr().out.splitlines()}
    assert rows["ddp", "64", "1", "1"][4:7] == ["14.0", "14.0", "84.0"]  # GB: 2, 2, 12 bytes each
    largest = [float(rows[scheme, "64", "1", "1"][-1]) for scheme in ("ddp", "zero1", "fsdp")]
    assert largest == sorted(largest) and 2e9 < largest[0] < 80e9 / 16


def test_a_reader_that_has_seen_enough_ends_it_quietly(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as out:
        monkeypatch.setattr(sys, "argv", ["ddp.py", "plan"])
        monkeypatch.setattr(sys, "stdout", out)
        D.main()
    assert not capsys.readouterr().err


def test_plain_python_is_a_world_of_one(data, alone, tmp_path):
    command = [sys.executable, os.path.join(ROOT, "ddp.py"), "--data", data, "--out_dir", tmp_path]
    result = subprocess.run([*command, *FLAGS, "--max_iters", "8", "--eval_iters", "2"],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    equal(rows_of(tmp_path), alone, 1e-5)


@pytest.mark.parametrize("flags, message", [
    ("--dp 3", "is not the number of processes"),
    ("--batch_size 3", "divided"),
    ("--tp 2 --n_head 1", "divided"),
    ("--pp 2 --microbatches 3", "micro-batches"),
])
def test_what_does_not_divide_is_one_clear_line(data, tmp_path, flags, message):
    good, printed = run(2, tmp_path, "--data", data, "--out_dir", tmp_path, *FLAGS, *flags.split(),
                        "--max_iters", 2)
    errors = [line for line in printed.splitlines() if line.startswith("ddp.py: error:")]
    assert not good and len(errors) == 1 and message in errors[0], printed[-1500:]
    assert "Traceback" not in printed


@pytest.mark.parametrize("flags, message", [
    ("--tp 2 --pp 2", "not with one another"),
    ("--impl torch --scheme zero1", "impl torch"),
    ("--teacher x", "train.py's"),
    ("--tp 2", "is not the number"),
    ("--offload optimizer", "train.py's"),
    ("--activation_checkpointing --scheme fsdp", "none of"),
    ("--scheme fsdp --optimizer muon", "need whole"),
])
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        D.setup(D.build_parser().parse_args(flags.split()))


def test_a_bin_too_short_is_refused(data, tmp_path):
    flags = f"--data {data} --out_dir {tmp_path} --block_size 2000 --batch_size 64"
    with pytest.raises(ValueError, match="fewer"):
        D.run(D.build_parser().parse_args(flags.split()))


@pytest.mark.parametrize("given", [{"RANK": "0", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "2"}])
def test_an_unset_rendezvous_is_one_clear_line(data, monkeypatch, capsys, given):
    for name in ("MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["ddp.py", "--data", str(data)])
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    D.main()
    error = capsys.readouterr().err
    assert left == [1] and "torchrun" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_dies(data, alone, tmp_path, restarts):
    """Without a restart the others end within seconds; with one the run goes on from its
    checkpoint."""
    dies = tmp_path / "dies.py"
    dies.write_text(f"""
import os, sys
sys.path.insert(0, {ROOT!r})
import ddp, train
get_batch = train.get_batch
def dies(data, batch_size, block_size, device, step, *more):
    if step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(9)
    return get_batch(data, batch_size, block_size, device, step, *more)
train.get_batch = dies
ddp.main()
""")
    torchrun = "-m torch.distributed.run --nproc_per_node 2".split()
    if restarts:  # ranks meet again in the store of those that died
        with socket.socket() as s:
            s.bind(("localhost", 0))
            torchrun += "--max_restarts", "1", "--master_port", str(s.getsockname()[1])
    else:
        torchrun += "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"
    out, begin = tmp_path / "out", time.monotonic()
    result = subprocess.run(
        [sys.executable, *torchrun, dies, "--data", data, "--out_dir", out, *FLAGS, "--max_iters",
         "8", "--eval_iters", "2"], capture_output=True, text=True, timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert M.load_checkpoint(out / "ckpt.pt")[1]["step"] == (8 if restarts else 4)
    if restarts:
        assert result.returncode == 0, result.stderr[-2000:]
        equal(rows_of(out), alone, 2e-4)
    else:
        assert result.returncode != 0 and time.monotonic() - begin < 60
        assert "exitcode  : 9" in result.stderr or \
            "connection to another process is lost" in result.stderr
