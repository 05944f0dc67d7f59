"""ddp.py: every scheme against one process, over gloo."""

import contextlib, copy, csv, glob, importlib, math, multiprocessing, os, signal, sys, time
from multiprocessing import forkserver

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# all processes are forked from one that imports this beforehand, while we do the same
multiprocessing.set_forkserver_preload(["pytest", "torch._dynamo", "ddp"])
if "__mp_main__" not in sys.modules:  # (it is in theirs)
    forkserver.ensure_running()

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist, multiprocessing as mp, nn
from torch.utils.checkpoint import checkpoint

import ddp as D
import model as M

def child(rank, world, path, f):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(rank)  # different weights, until they are broadcast
    f(rank, world)
    open(f"{path}.{rank}", "x").close()  # it came to the end
    dist.barrier()  # or a rank that is ready first takes the connection away from the others
    dist.destroy_process_group()

def assert_equal(a, b, tolerance=1e-10, msg=None):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=msg)

# ---- Data parallelism.
class Odd(nn.Module):
    """Odd sizes, a tied matrix, a frozen one, and one that is never used."""
    def __init__(self):
        super().__init__()
        self.unused, self.embedding = nn.Linear(3, 3), nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(7)
        self.a, self.b, self.frozen = nn.Linear(7, 13), nn.Linear(13, 7), nn.Linear(7, 7)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.b(torch.tanh(self.a(self.frozen(x))))
        return self.head(self.norm(x))

def loss_of(module, ids):
    return F.cross_entropy(module(ids[..., :-1]).flatten(0, -2), ids[..., 1:].flatten())

def one_process(world, accumulate):
    torch.manual_seed(0)
    module, data = Odd().double(), torch.randint(11, (3, accumulate, world, 3, 6))
    optimizer, start = torch.optim.AdamW(module.parameters(), lr=1e-2), copy.deepcopy(module)
    for batches in data:
        for ids in batches:
            (loss_of(module, ids) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return start, data, module.state_dict()

def each_scheme_is_one_process(rank, world):
    for scheme in ("naive", "flat", "ddp", "ddp + zero1", "zero1", "zero2", "fsdp"):
        for accumulate in (1, 3):
            start, data, expected = one_process(world, accumulate)
            module = start if rank == 0 else Odd().double()
            if scheme == "fsdp":
                wrapped = D.FSDP(module)
                assert module.a.weight.shape == (-(-7 * 13 // world),)
                assert module.head.weight is module.embedding.weight
            elif scheme in ("zero1", "zero2"):
                wrapped = module
                D.broadcast(module)
            else:
                size = {"naive": 0, "flat": math.inf}.get(scheme, 0.0003)
                wrapped = D.DDP(module, size, overlap="ddp" in scheme)
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            if "zero" in scheme:
                optimizer = D.ShardedOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2,
                                               shard_gradients=scheme == "zero2", bucket_mb=0.0003)
            syncing, sent = optimizer if scheme in ("zero1", "zero2") else wrapped, []
            module.embedding.weight.register_post_accumulate_grad_hook(
                lambda _: sent.append(len(syncing.sent)))
            for batches in data:
                for i, ids in enumerate(batches):
                    more = i + 1 < accumulate
                    with syncing.no_sync() if more else contextlib.nullcontext():
                        loss = loss_of(wrapped, ids[rank]) / accumulate
                        assert {p.ndim for p in syncing.matrices} <= {1}  # fsdp's, freed after use
                        loss.backward()
                if scheme != "zero2":  # (there `step` does it)
                    syncing.finish_gradient_synchronization()
                for p, owner in getattr(optimizer, "owner", {}).items():
                    assert owner == rank or p.grad is None or scheme == "ddp + zero1"
                assert module.frozen.weight.grad is None
                optimizer.step()
                optimizer.zero_grad()
            state = wrapped.gather_full_params() if scheme == "fsdp" else module.state_dict()
            for name in (name for name in expected if "unused" not in name):  # (it decays)
                assert_equal(state[name], expected[name], msg=f"{scheme} {accumulate} {name}")
            overlapped = scheme in ("ddp", "ddp + zero1", "zero2", "fsdp")
            assert accumulate > 1 or (min(sent) > 0 if overlapped else max(sent) == 0)
            if "zero" in scheme:
                held = sum(x.numel() for s in optimizer.state.values() for x in s.values())
                assert held <= 2.5 * sum(p.numel() for p in module.parameters()) / world
                again = D.ShardedOptimizer(module.parameters(), torch.optim.AdamW, lr=1e-2)
                again.load_state_dict(optimizer.state_dict())
                assert again.state.keys() == optimizer.state.keys()

def which_parameters_a_rank_uses_does_not_matter(rank, world):
    a, b = nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)
    wrapped, x = D.DDP(nn.ModuleList([a, b]), bucket_mb=0), torch.ones(1, 3)
    c, d = copy.deepcopy((a, b))
    optimizer = D.ShardedOptimizer([c.weight, d.weight], torch.optim.SGD, True, lr=1.0)
    for layers, finish in (((a, b), wrapped.finish_gradient_synchronization),
                           ((c, d), optimizer.step)):  # (which reduces by itself)
        for layer in layers if rank == 0 else (layers[1], layers[1]):
            layer(x).sum().backward()
        finish()
    D.DDP(nn.Linear(2, 2).requires_grad_(False)).finish_gradient_synchronization()  # (none at all)
    assert_equal(a.weight.grad, torch.full((1, 3), 0.5))
    assert_equal(b.weight.grad, torch.full((1, 3), 1.5))
    assert_equal(d.weight, b.weight - 1.5, 1e-6)

class Paths(nn.Module):
    """Layers in the order that is asked for, with or without activation checkpointing."""
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Embedding(6, 6), *(M.Linear(6, 6) for _ in range(4))])
        self.layers[4].weight = self.layers[0].weight

    def forward(self, ids, order, checkpointing):
        x = self.layers[0](ids)
        for i in order:
            layer = self.layers[int(i)]
            x = checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
            x = torch.tanh(x)
        return x

def fully_sharded_in_any_order(rank, world):
    torch.manual_seed(0)
    module, ids = Paths().double(), torch.tensor([0, 5, 2])
    wrapped = D.FSDP(copy.deepcopy(module))
    for orders, checkpointing in (("1234", False), ("4321", False), ("1 4", False),
                                  ("123 32", False), ("1123", True)):
        losses = []
        for x in (module, wrapped):
            for order in orders.split():  # several backward passes add up
                losses.append(x(ids, order, checkpointing).square().sum())
                losses[-1].backward()
        wrapped.finish_gradient_synchronization()
        wrapped(ids, "24", False)  # gathers weights that will have changed before the next time
        for p in (p for x in (module, wrapped) for p in x.parameters() if p.grad is not None):
            p.data = p.data - 0.1 * p.grad  # not in place
            p.grad = None
        half = len(losses) // 2
        assert_equal(torch.stack(losses[half:]), torch.stack(losses[:half]), msg=orders)
        wrapped(ids, "1", False)
        full = wrapped.gather_full_params()
        for name, x in module.state_dict().items():
            assert_equal(full[name], x)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, 0.0), torch.randn(3, 2, 8)
    assert_equal(layer(x), D.FSDP(layer)(x), 1e-6)
    half = D.FSDP(Odd(), compute_dtype=torch.bfloat16)
    out = half(torch.randint(11, (2, 7)))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    half.finish_gradient_synchronization()  # (a gradient has its weight's type)

# ---- Parts of a model, and of a sequence.
CONFIG = dict(vocab_size=24, block_size=12, n_layer=4, n_head=4, n_kv_head=2, n_embd=16, d_ff=32)

def transformer_reference(**changes):
    torch.manual_seed(0)
    model = M.Transformer(M.TransformerConfig(**CONFIG | changes)).double()
    whole, ids = copy.deepcopy(model), torch.randint(24, (8, 13))
    logits = whole(ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {name: p.grad for name, p in whole.named_parameters()}
    return model, ids, logits.detach(), loss.detach(), grads

def tensor_parallel(rank, world):
    for changes in ({}, {"qk_norm": True, "bias": True, "tie_embeddings": True, "logit_cap": 3.0},
                    {"attention": "sliding", "activation": "gelu", "norm_place": "post"},
                    {"attention": "linear", "activation": "moe"}):
        model, ids, logits, loss, grads = transformer_reference(n_layer=2, **changes)
        split = copy.deepcopy(model)
        D.split_tensors(split)
        out = split(ids[:, :-1])
        assert_equal(out, logits)
        F.cross_entropy(out.flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, p in split.named_parameters():
            assert_equal(p.grad, getattr(p, "to_part", lambda x: x)(grads[name]), msg=name)
            assert_equal(D.whole(p, p), model.get_parameter(name), msg=name)
    a, b, table = nn.Linear(6, 8).double(), nn.Linear(8, 6).double(), nn.Embedding(8, 4, 5)
    for layer in (a, b, table):  # by themselves
        D.broadcast(layer)
    column, row = D.ColumnParallelLinear(copy.deepcopy(a)), D.RowParallelLinear(copy.deepcopy(b))
    x = torch.ones(3, 6).double().requires_grad_()
    assert_equal(*(torch.autograd.grad(g(f(x).relu()).square().sum(), x)[0]
            for f, g in ((a, b), (column, row))))
    own, x = D.VocabParallelEmbedding(copy.deepcopy(table)), torch.arange(8)
    assert_equal(own(x), table(x))
    (own(x) + table(x)).sum().backward()  # (row 5, padding, does not learn)
    assert_equal(own.weight.grad, own.weight.to_part(table.weight.grad))

def pipeline(rank, world):
    for changes in ({"position": "learned", "norm": "layernorm"}, {"tie_embeddings": True}):
        model, ids, _, loss, grads = transformer_reference(**changes)
        for schedule, n in (("gpipe", 2), ("1f1b", 1), ("1f1b", 8), ("gpipe", 3)):
            stage = copy.deepcopy(model)
            D.split_layers(stage)
            stage.register_forward_hook(lambda _, args, y: y.mT.contiguous().mT)  # odd strides
            batches = [(b[:, :-1], b[:, 1:]) for b in ids.chunk(n)]
            def share(out, y):
                return F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="sum") / (8 * 12)
            ours = D.pipeline_step(stage, batches, share, None, schedule, stage.like)
            assert rank < world - 1 or not assert_equal(ours, loss)
            if model.config.tie_embeddings:
                D.add_tied_gradients(stage)
            assert 0 < len([*stage.parameters()]) < len(grads)
            for name, p in stage.named_parameters():
                assert_equal(p.grad, grads[name], msg=name)

def ring(rank, world):
    torch.manual_seed(0)
    own = slice(5 * rank, 5 * rank + 5)
    for causal in (True, False):
        *full, g = (torch.randn(2, h, 5 * world, 6).double().requires_grad_() for h in (4, 2, 2, 4))
        out = F.scaled_dot_product_attention(*full, is_causal=causal, enable_gqa=True)
        expected = torch.autograd.grad(out, full, g)
        parts = [x[:, :, own].detach().requires_grad_() for x in full]
        ours = D.ring_attention(*parts, causal=causal)
        assert_equal(ours, out[:, :, own])
        for a, b in zip(torch.autograd.grad(ours, parts, g[:, :, own]), expected):
            assert_equal(a, b[:, :, own])
    for position in ("rope", "learned"):
        model, ids, logits, _, grads = transformer_reference(position=position)
        D.split_sequence(model)
        split, own = D.DDP(model), slice(4 * rank, 4 * rank + 4)
        out = split(ids[:, :-1][:, own])
        assert_equal(out, logits[:, own])
        F.cross_entropy(out.flatten(0, 1), ids[:, 1:][:, own].flatten()).backward()
        split.finish_gradient_synchronization()
        for name, p in model.named_parameters():
            assert_equal(p.grad, grads[name], msg=name)

@pytest.mark.parametrize("f, world", [
    (each_scheme_is_one_process, 2), (each_scheme_is_one_process, 3),
    (which_parameters_a_rank_uses_does_not_matter, 2), (fully_sharded_in_any_order, 2),
    (tensor_parallel, 2), (pipeline, 2), (pipeline, 3), (ring, 3)])
def test_of_processes(tmp_path, f, world):
    mp.start_processes(child, (world, f"{tmp_path}/store", f), world, start_method="forkserver")
    assert len(list(tmp_path.glob("store.*"))) == world

# ---- The command line.
def script(rank, name, environment, output, args, torchrun=None):
    # one process of `run`: a script's main(), as torchrun would start it; or torchrun, with one
    torch.set_num_threads(1)
    with open(f"{output}.{rank}", "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment | {"RANK": str(rank)} if environment else {})
    sys.argv = [f"{name}.py", *args]
    sys.modules["matplotlib"] = None  # (a plot takes longer than these runs)
    if torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
        if os.fork():
            os._exit(os.wait()[1] > 0)
        D.PARENT = os.getppid()  # (it had been imported)
    if rank == 1 and "SIGNAL" in environment:  # in its sixth step
        steps, step = iter(range(6)), D.Parallel.clip_grad_norm
        D.Parallel.clip_grad_norm = lambda *how: step(*how) if next(steps) < 5 else os.kill(
            os.getpid(), int(environment["SIGNAL"])) or step(*how)
    importlib.import_module(name).main()

def run(processes, folder, *args, name="ddp", **environment):
    """Run a script in so many processes (0: on its own) -> (whether all ended well, its output)."""
    world = max(1, processes)
    if processes:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost",
                        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    output, good = folder / f"output{len(list(folder.iterdir()))}", True
    try:
        mp.start_processes(script, (name, environment, str(output), [str(a) for a in args]), world,
                           start_method="forkserver")
    except mp.ProcessExitedException as error:
        good = error.exit_code == 0
    return good, "".join(open(path).read() for path in sorted(glob.glob(f"{output}.*")))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("".join(
        f"{i} and {i} are {2 * i}.\n" + "<|endoftext|>" * (i % 20 == 0) for i in range(2000)))
    for command in (("train", "--vocab_size", 264),
                    ("encode", "--tokenizer", folder, "--val_fraction", 0.02)):
        assert run(0, folder, *command, "--input", folder / "a.txt", "--out", folder, name="bpe")[0]
    return folder

FLAGS = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --log_interval 1 "
         "--eval_interval 4 --eval_iters 0 --dtype float32 --learning_rate 1e-2 --warmup_iters 0 "
         "--schedule constant --gradient_accumulation_steps 2 "  # whatever --max_iters is
         "--tie_embeddings").split()

def train(processes, data, out, *args, **environment):  # or in no processes train.py
    good, printed = run(processes, out, "--data", data, "--out_dir", out, *FLAGS, *args,
                        name="ddp" if processes else "train", **environment)
    assert good, printed[-2000:]

def rows_of(out):
    with open(out / "log.csv") as file:
        return torch.tensor([[float(row[k] or 0) for k in ("loss", "grad_norm", "val_loss")]
                             for row in csv.DictReader(file)])

@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    train(0, data, out, "--max_iters", 36)
    return out

def test_a_run_goes_on_elsewhere_with_equal_losses(data, alone, tmp_path):
    for step, (processes, flags) in enumerate((
            (0, ""), (2, "--scheme zero1"), (2, "--tp 2"), (4, "--pp 2 --pp_schedule gpipe"),
            (2, "--scheme fsdp --impl torch"), (2, "--scheme fsdp --activation_checkpointing"),
            (2, "--sp 2"), (2, "--scheme zero2"), (2, "--impl torch"))):
        train(processes, data, tmp_path, *flags.split(), "--max_iters", 4 * step + 4,
              *["--resume"][: step])
        assert_equal(rows_of(tmp_path), rows_of(alone)[: 4 * step + 4], 1e-3, flags)
    train(0, data, tmp_path, "--resume")  # (back again: there is nothing left to do)
    assert_equal(*(M.load_checkpoint(folder / "ckpt.pt")[0].state_dict()
                   for folder in (tmp_path, alone)), 1e-2)

def test_a_run_with_dropout_goes_on_with_every_ranks_random_numbers(data, tmp_path):
    rows = []
    for processes, args in ((2, "8"), (2, "4"), (2, "8 --resume"),  # (4 moves 8's file away)
                            (1, "2"), (0, "4 --resume"), (1, "6 --resume"), (0, "6")):
        train(processes, data, tmp_path, *f"--dropout 0.3 --max_iters {args}".split())
        rows.append(rows_of(tmp_path)[:, :2])
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[5], rows[6])
    assert 1 <= len(list(tmp_path.glob("ckpt-*.pt"))) <= 3

def test_bench_and_plan(tmp_path, capsys):
    good, printed = run(2, tmp_path, *"bench --repeat 1 --n_embd 32 --n_layer 1".split())
    assert good, printed
    rows = {words[0]: words for words in map(str.split, printed.splitlines()) if len(words) == 6}
    params, grads, state = (float(x) for x in rows["zero1"][-3:])
    assert params / 2 < state < 1.5 * params < float(rows["ddp"][-1])
    assert not float(rows["zero2"][2]) < 1.9  # (others may send, too; nan where it is not known)
    D.plan("--params 7e9 --gpus 64 --gpu_gb 80".split())
    rows = {tuple(row.split()[:4]): row.split() for row in capsys.readouterr().out.splitlines()}
    assert rows["ddp", "64", "1", "1"][4:7] == ["14.0", "14.0", "84.0"]  # GB: 2, 2, 12 bytes each

@pytest.mark.parametrize("flags, message", [
    ("--dp 3", "are not dp"), ("--batch_size 3", "batch_size"), ("--tp 2 --d_ff 33", "divided"),
    ("--scheme zero3", "invalid choice"), ("--schem fsdp", "abbreviated"),
    ("--data /nowhere", "No such file"), ("--learning_rate 1e30 --grad_clip 0", "learning_rate")])
def test_an_error_is_one_line(data, tmp_path, flags, message):
    (tmp_path / "ckpt.pt").write_text("of another run")
    args = ("--data", data, "--out_dir", tmp_path, *FLAGS, "--max_iters", 9, *flags.split())
    good, printed = run(2, tmp_path, *args)
    errors = [line for line in printed.splitlines() if line.startswith("ddp.py: error:")]
    assert not good and len(errors) == 1 and message in errors[0], printed[-1500:]
    assert "Traceback" not in printed
    assert (tmp_path / "ckpt.pt").exists() or "learning_rate" in flags  # (it had begun)

@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rank_that_dies_or_stops_ends_the_others_and_all_go_on(data, alone, tmp_path, number):
    begin, args = time.monotonic(), ("--data", data, "--out_dir", tmp_path, *FLAGS)
    good, printed = run(2, tmp_path, *args, "--max_iters", 8, SIGNAL=str(int(number)))
    assert not good and time.monotonic() < begin + 20
    assert number == signal.SIGKILL or "go on with --resume" in printed
    train(2, data, tmp_path, "--max_iters", 8, TORCHELASTIC_RESTART_COUNT="1")
    assert_equal(rows_of(tmp_path), rows_of(alone)[:8], 2e-4)

def test_a_rank_ends_when_torchrun_is_killed(data, tmp_path):
    args = ["--data", str(data), "--out_dir", str(tmp_path), *FLAGS, "--max_iters", "100000"]
    ours, theirs = multiprocessing.Pipe(False)
    torchrun, = mp.start_processes(script, ("ddp", {}, f"{tmp_path}/output", args, theirs), 1,
                                   join=False, start_method="forkserver").processes
    theirs.close()
    while not (tmp_path / "ckpt.pt").exists():
        assert torchrun.is_alive()
        time.sleep(0.1)
    torchrun.kill()
    assert ours.poll(20)  # none has the other end any more
