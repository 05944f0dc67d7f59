"""
Train a Transformer language model.

    python bpe.py && python train.py && python model.py     # the whole of it on a laptop's CPU
    python train.py --resume                                # go on where a run was stopped
    python train.py --init_from out/ckpt.pt --data data/mine --out_dir out-mine
    python train.py --eval_only --init_from out/ckpt.pt

Data is a folder with train.bin, val.bin and tokenizer.json, as bpe.py leaves it, or nanoGPT's or
llm.c's .bin files. A run leaves ckpt.pt (all that is needed to sample, or to go on), log.csv, and
loss.png if matplotlib is installed. It can be stopped at any time, by Ctrl-C or the power cord:
--resume then gives bit for bit (on a CPU) the losses of a run that was never stopped.
"""

import argparse, contextlib, csv, functools, math, os, re, signal, sys, time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is quiet while torch loads
import numpy as np
import torch

import model as model_py
from bpe import Tokenizer, read_bin
from model import (SWITCH, Linear, Transformer, TransformerConfig, add_config_flags, count,
                   from_state, load_checkpoint, pick_device, replacing, save_checkpoint, upcast)

# ---- Loss.

def cross_entropy(logits, targets, ignore_index=-100, reduction="mean", z_loss=0.0):
    """Negative log-likelihood of the targets, in nats: their mean, or "sum". z_loss: weight of
    (log Z)^2, Z being the softmax's denominator, which keeps logits from drifting (Chowdhery et
    al. 2022). logits: (..., V); targets: (...) int64, of which ignore_index does not count."""
    valid = targets != ignore_index
    ids = targets.masked_fill(~valid, 0)[..., None]
    losses = -torch.log_softmax(upcast(logits), -1).gather(-1, ids)[..., 0]
    if z_loss:
        losses = losses + z_loss * (losses + logits.gather(-1, ids)[..., 0]).square()
    total = losses.masked_fill(~valid, 0.0).sum()
    return total if reduction == "sum" else total / valid.sum().clamp(min=1)

def distillation_loss(logits, teacher_logits, targets, temperature=1.0):
    """Sum over tokens of KL(teacher || student), both at a temperature, times its square, which
    keeps the gradient's size (Hinton et al. 2015). Shapes as in `cross_entropy`."""
    log_p, log_q = ((upcast(x) / temperature).log_softmax(-1) for x in (teacher_logits, logits))
    losses = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * losses.masked_fill(targets == -100, 0.0).sum()

def gradient_noise_scale(small_norms, big_norms, small, big):
    """The batch size at which noise and signal in a gradient are equal, tr(covariance) / |g|^2:
    larger ones hardly make more progress per step (McCandlish et al. 2018). small_norms, big_norms:
    squared norms of mean gradients over `small` and `big` samples, |g|^2 + tr(covariance) / B."""
    small_mean, big_mean = (sum(norms) / len(norms) for norms in (small_norms, big_norms))
    squared = (big * big_mean - small * small_mean) / (big - small)
    noise = (small_mean - big_mean) / (1 / small - 1 / big)
    return noise / squared if squared > 0 else math.inf

# ---- Optimizers. Each changes, in `update`, one parameter p that has a gradient g; s is its state.

class Optimizer(torch.optim.Optimizer):
    """What they have in common."""
    def __init__(self, params, **settings):
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                self.state[p]["step"] = self.state[p].get("step", 0) + 1
                p.mul_(1 - group["lr"] * group["weight_decay"])
                self.update(p, p.grad, self.state[p], **group)

class AdamW(Optimizer):
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019):
    m <- beta1 m + (1 - beta1) g          a running mean of the gradient
    v <- beta2 v + (1 - beta2) g^2        and of its square
    p <- p - lr * decay * p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)"""
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, p, g, s, lr, betas, eps, **_):
        if "m" not in s:
            s |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        m, v = s["m"].lerp_(g, 1 - betas[0]), s["v"]
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        root = math.sqrt(1 - betas[1] ** s["step"])
        p.addcdiv_(m, v.sqrt().add_(eps * root), value=-lr * root / (1 - betas[0] ** s["step"]))

class SGD(Optimizer):
    """Gradient descent with momentum: v <- momentum v + g; p <- p - lr * decay * p - lr v"""
    def __init__(self, params, lr=1e-2, momentum=0.9, weight_decay=0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def update(self, p, g, s, lr, momentum, **_):
        v = s.setdefault("v", torch.zeros_like(p)).mul_(momentum).add_(g)
        p.sub_(v, alpha=lr)

def zeropower_newton_schulz(G, steps=5, eps=1e-7):
    """About U V^T for a matrix G = U S V^T: all singular values become roughly 1 (0.7 to 1.2),
    with nothing but matrix products (Jordan 2024; each step is a polynomial a x + b x^3 + c x^5
    whose coefficients raise small values fastest). G: (m, n) -> (m, n)"""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = G.shape[0] > G.shape[1]
    X = G.T if tall else G  # X X^T shall be the smaller of the two products
    X = X / (X.norm() + eps)  # no singular value above 1
    for _ in range(steps):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.T if tall else X

class Muon(Optimizer):
    """Momentum, orthogonalized: a matrix moves as far in all its directions, rare ones included
    (Jordan et al. 2024). For hidden matrices only, each by itself (not fused Q, K, V). Steps are as
    large as AdamW's, whose learning rate and decay serve here, too (Liu et al. 2025):
    m <- momentum m + (1 - momentum) g;  u = zeropower((1 - momentum) g + momentum m)
    p <- p - lr * decay * p - lr * 0.2 sqrt(max(m, n)) * u"""
    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

    def update(self, p, g, s, lr, momentum, **_):
        m = s.setdefault("m", torch.zeros_like(p)).lerp_(g, 1 - momentum)
        u = g.lerp(m, momentum).to(torch.bfloat16 if has_fast_bfloat16(p.device) else p.dtype)
        u = zeropower_newton_schulz(u).to(p.dtype)
        p.sub_(u, alpha=lr * 0.2 * math.sqrt(max(p.shape)))

class SOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024), for matrices:
    L <- b2 L + (1 - b2) G G^T and R <- b2 R + (1 - b2) G^T G are running means; the gradient is
    turned to their eigenvectors, Q_L^T G Q_R, where Adam's division by each entry's own size is
    closest to the right one; the step is turned back. Every precondition_frequency steps one power
    iteration and QR bring the eigenvectors up to date. The first gradient only makes them."""
    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01,
                 precondition_frequency=10):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                         precondition_frequency=precondition_frequency)

    def update(self, p, g, s, lr, betas, eps, precondition_frequency, **_):
        t, (beta1, beta2) = s["step"] - 1, betas
        if t == 0:
            s |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p),
                  "L": (1 - beta2) * (g @ g.T), "R": (1 - beta2) * (g.T @ g)}
            for side in "LR":  # eigenvectors, the largest eigenvalue's first
                s["Q" + side] = torch.linalg.eigh(s[side])[1].flip(1)
            return
        turned = s["QL"].T @ g @ s["QR"]
        s["m"].lerp_(turned, 1 - beta1)
        s["v"].lerp_(turned.square(), 1 - beta2)
        step = s["QL"] @ (s["m"] / (s["v"].sqrt() + eps)) @ s["QR"].T
        p.sub_(step, alpha=lr * math.sqrt(1 - beta2**t) / (1 - beta1**t))
        s["L"].lerp_(g @ g.T, 1 - beta2)
        s["R"].lerp_(g.T @ g, 1 - beta2)
        if t % precondition_frequency == 0:
            m = s["QL"] @ s["m"] @ s["QR"].T  # out of the old basis, and into the new one
            for side in "LR":
                s["Q" + side] = torch.linalg.qr(s[side] @ s["Q" + side])[0]
            s["m"] = s["QL"].T @ m @ s["QR"]

def make_optimizers(model, kind, lr, weight_decay, betas, momentum, mup=0):
    """-> list of optimizers for all parameters of the model. adamw and sgd take all; muon and soap
    the hidden matrices, which map vectors to vectors, and AdamW what is left: embeddings, head and
    routers (their rows belong to tokens or experts, and move by their own frequency) and, without
    weight decay, gains and biases. mup: the width at which the learning rate was found, to hold at
    this one, too (Yang et al. 2022): Adam moves every weight by about that rate, and a unit of n
    inputs adds up n moves, so matrices of n inputs learn mup / n times as fast, with the same
    decay; Muon's, whose steps have one size in all directions, sqrt(mup / n) times. ValueError."""
    if mup and (kind in ("soap", "sgd") or model.config.tie_embeddings):
        raise ValueError("mup is for adamw and muon, and a head of its own")
    scale = mup / model.config.n_embd if mup else 1.0
    groups = [{"params": [], "weight_decay": weight_decay / by, "lr_scale": by}
              for by in (1.0, 1.0, scale, scale**0.5)]
    groups[0]["weight_decay"] = 0.0  # of vectors
    linear = {m.weight: name for name, m in model.named_modules() if isinstance(m, Linear)}
    for p in model.parameters():
        hidden = "blocks" in linear.get(p, "") and not re.search("router|filter", linear[p])
        matrix = 3 if hidden and kind in ("muon", "soap") else 2 if p in linear else 1
        groups[matrix if p.ndim > 1 else 0]["params"].append(p)
    *others, matrices = groups
    others = [group for group in others if group["params"]]
    if kind == "sgd":
        return [SGD(others, lr, momentum)]
    more = {"muon": lambda: [Muon([matrices], lr, momentum=momentum)],
            "soap": lambda: [SOAP([matrices], lr)], "adamw": list}[kind]()
    return [AdamW(others, lr, betas), *more]

@torch.no_grad()
def clip_grad_norm(params, max_norm, eps=1e-6):
    """Scale all gradients by one factor so that together their norm is at most max_norm (0: only
    measure). Returns the norm before, a tensor."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads] or [torch.zeros(())]).norm()
    if max_norm:
        for g in grads:
            g.mul_((max_norm / (norm + eps)).clamp(max=1.0))
    return norm

def get_lr(it, learning_rate, min_lr, warmup_iters, max_iters, schedule="cosine",
           decay_fraction=0.2):
    """Learning rate of step `it`, counted from 0: up in a straight line for warmup_iters, then down
    to min_lr at max_iters, by half a cosine, or (wsd: Hu et al. 2024) level, and straight down over
    the last decay_fraction of the steps; or constant. The first step, which in some courses has 0
    and does nothing, has learning_rate / (warmup_iters + 1), as in nanoGPT."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return learning_rate
    left = max(0, max_iters - it)
    if schedule == "wsd":
        share = min(1.0, left / max(1, int(decay_fraction * max_iters)))
    else:
        share = 0.5 * (1 - math.cos(math.pi * left / max(1, max_iters - warmup_iters)))
    return min_lr + (learning_rate - min_lr) * share

def has_fast_bfloat16(device):
    """Whether bfloat16 is fast: on NVIDIA's cards since Ampere, CPUs with AMX or AVX-512 BF16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    on_cpu = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.device(device).type == "cpu" and on_cpu

# ---- Data.

def open_data(folder):
    """A folder of bpe.py -> (train ids, val ids, the text of tokenizer.json or None, vocabulary
    size or None, bytes of text per token of val.bin or 0). Raises ValueError, OSError."""
    tokenizer, opened = model_py.read_text(folder, "tokenizer.json") or None, []
    sizes = {Tokenizer.from_json(tokenizer).vocab_size} if tokenizer else set()
    for name in ("train.bin", "val.bin"):
        data, header = read_bin(os.path.join(folder, name))
        sizes |= set() if header is None else {int(header[3])} - {0}  # (llm.c's do not say)
        opened.append(data)
    if len(sizes) > 1:
        raise ValueError(f"the files in {folder} are of vocabularies of {sizes} ids")
    n_bytes = 0 if header is None else int(header[5:7].copy().view("<i8")[0])
    return *opened, tokenizer, max(sizes, default=None), n_bytes / len(data)

def windows(data, starts, block_size, device="cpu", vocab_size=2**32):
    """block_size ids from each start, and, as targets, the same shifted by one: two tensors
    (len(starts), block_size) of int64. Behind the end of the data ids are 0 and targets -100.
    Raises ValueError for ids beyond the vocabulary, and a file that has become shorter."""
    if getattr(data, "filename", None) and not isinstance(data.base, np.ndarray):  # a whole file
        # opened anew: else all pages ever read stay in memory (a shrunk file: ValueError)
        data = np.memmap(data.filename, data.dtype, "r", data.offset, data.shape)
    rows = np.full((len(starts), block_size + 1), -100, "i8")
    for row, start in zip(rows, starts):
        ids = data[start : start + block_size + 1]
        row[: len(ids)] = ids
    if rows.max() >= vocab_size:
        raise ValueError(f"id {rows.max()} in the data is beyond the vocabulary of {vocab_size}")
    rows = torch.from_numpy(rows).to(device)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]

@functools.cache  # (8 bytes for each block_size tokens of training)
def window_order(n, block_size, seed, epoch):
    """Where the windows of an epoch start: all there are, shuffled, from another offset each."""
    rng = np.random.default_rng((seed, epoch))
    first = int(rng.integers(min(block_size, n - block_size)))
    return first + block_size * rng.permutation((n - 1 - first) // block_size)

def get_batch(data, batch_size, block_size, device="cpu", number=None, seed=1337, vocab_size=2**32):
    """Batch `number` of a fixed order, which depends on the seed alone, so that a run can be taken
    up at any step; None: drawn at random -> ids and targets, two tensors (batch_size, block_size)
    of int64. Raises ValueError."""
    if len(data) <= block_size:
        raise ValueError(f"data of {len(data):,} tokens is too short for block_size {block_size}")
    starts, epoch, at = [], 0, (number or 0) * batch_size  # windows counted through all epochs
    if number is None:
        starts = torch.randint(len(data) - block_size, (batch_size,)).tolist()
    while len(starts) < batch_size:
        order = window_order(len(data), block_size, seed, epoch)
        starts += order[at : at + batch_size - len(starts)].tolist()
        epoch, at = epoch + 1, max(0, at - len(order))
    return windows(data, starts, block_size, device, vocab_size)

@torch.no_grad()
def evaluate(model, data, batch_size, block_size, device, autocast, max_batches=0):
    """Mean loss in nats over fixed windows that together are all of data (or, of more than
    max_batches, that many evenly spaced), each predicted from its own beginning."""
    starts, total, n, V = np.arange(0, len(data) - 1, block_size), 0.0, 0, model.config.vocab_size
    if max_batches and len(starts) > max_batches * batch_size:
        starts = starts[np.linspace(0, len(starts) - 2, max_batches * batch_size).astype(int)]
    model.eval()
    for i in range(0, len(starts), batch_size):
        x, y = windows(data, starts[i : i + batch_size], block_size, device, V)
        with autocast():
            total += cross_entropy(model(x), y, reduction="sum").item()
        n += int((y != -100).sum())
    model.train()
    return total / n

# ---- The command line.

COLUMNS = "step tokens seconds loss val_loss val_bpb learning_rate grad_norm".split()  # log.csv's
PEAK = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}

def build_parser(name="train.py"):
    """The command line. The architecture's flags have no default here: a checkpoint has its own."""
    parser = argparse.ArgumentParser(name, description="Train a Transformer language model.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add = parser.add_argument
    add("config", nargs="*", help=argparse.SUPPRESS)
    add("--data", default="data/stdlib", help="folder with train.bin, val.bin, tokenizer.json")
    add("--dataset", dest="data", type="data/{}".format, help="X: --data data/X")
    add("--out_dir", default="out", help="folder for ckpt.pt and log.csv")
    add("--resume", **SWITCH, help="go on with out_dir/ckpt.pt, by its run's flags and these")
    add("--init_from", default="scratch", help="scratch, resume, or a checkpoint")
    add("--eval_only", **SWITCH, help="print the validation loss and stop")
    for name, default, text in (
            ("batch_size", 8, "sequences at a time"), ("gradient_accumulation_steps", 1, "batches"),
            ("max_iters", 450, "steps"), ("learning_rate", 3e-3, "the highest"),
            ("min_lr", 0.0, "the last"), ("warmup_iters", -1, "steps; -1: a twentieth of all"),
            ("decay_fraction", 0.2, "of the steps: wsd's end"), ("momentum", 0.95, "of muon, sgd"),
            ("beta1", 0.9, "of adamw"), ("beta2", 0.95, "of adamw"), ("seed", 1337, "of all draws"),
            ("grad_clip", 1.0, "largest norm; 0: any"), ("weight_decay", 0.1, "of matrices"),
            ("eval_interval", 100, "steps; saves, too"), ("device", "auto", "cpu, cuda or mps"),
            ("eval_iters", 20, "batches of val.bin; 0: all"), ("log_interval", 10, "steps"),
            ("z_loss", 0.0, "weight; PaLM's is 1e-4"), ("peak_flops", 0.0, "bf16 TFLOP/s, MFU"),
            ("mup", 0, "n_embd at which the rate is best, to be it at any; 0: off"),
            ("teacher", "", "distillation: a checkpoint whose predictions to learn from"),
            ("teacher_weight", 0.5, "in the loss"), ("teacher_temperature", 1.0, "of both")):
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    for name, values in (("optimizer", "adamw muon soap sgd"), ("schedule", "wsd cosine constant"),
                         ("dtype", "auto float32 bfloat16"),
                         ("offload", "none activations optimizer both")):
        add(f"--{name}", choices=values.split(), default=values.split()[0])
    for name, text in (("noise_scale", "measure the batch size worth having; slower"),
                       ("activation_checkpointing", "less memory, more computation"), ("kernels",
                       "Triton's, of kernels.py"), ("compile", "torch.compile: for long runs")):
        add(f"--{name}", **SWITCH, help=text)
    add_config_flags(parser.add_argument_group("model: see TransformerConfig").add_argument)
    add("--lr_decay_iters", type=int, help=argparse.SUPPRESS)
    return parser

def parse_args(parser, words):
    """The words of a command line -> (Namespace, words, (model, dict) to resume or None). If a run
    is resumed, its own words come before these. Exits with 2, raises ValueError, TypeError."""
    args, checkpoint = parser.parse_args(words), None
    if args.resume or args.init_from == "resume":
        checkpoint, out_dir = load_checkpoint(os.path.join(args.out_dir, "ckpt.pt")), args.out_dir
        was = [str(word) for word in checkpoint[1]["args"]]
        optimizer, args = parser.parse_args(was).optimizer, parser.parse_args(words := was + words)
        args.out_dir, args.resume = out_dir, True
        if args.optimizer != optimizer:
            raise ValueError(f"a run of {optimizer} can't go on with {args.optimizer}")
    if args.config or args.lr_decay_iters not in (None, args.max_iters):
        parser.error("there are no config files, and the rate ends at --max_iters: see --help")
    return args, words, checkpoint

# ---- The run.

def main():
    args, words, checkpoint = parse_args(build_parser(), sys.argv[1:])
    device, path = torch.device(pick_device(args.device)), os.path.join(args.out_dir, "ckpt.pt")
    os.makedirs(args.out_dir, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    half = has_fast_bfloat16(device) if args.dtype == "auto" else args.dtype == "bfloat16"
    half = half and not (args.kernels and device.type == "cpu")  # Triton's interpreter can't
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, half)

    # the data, and a model from scratch, from a checkpoint, or from where a run was stopped
    train_data, val_data, tokenizer, vocab_size, bytes_per_token = open_data(args.data)
    given = {k: getattr(args, k) for k in vars(TransformerConfig()) if getattr(args, k) is not None}
    resumed, (model, saved) = bool(checkpoint), checkpoint or (None, {})
    if not resumed and args.init_from != "scratch":
        model, saved = load_checkpoint(args.init_from)
    if model is None:  # (data that does not say its vocabulary: GPT-2's 50,257, up to 64 n)
        model = Transformer(TransformerConfig(**{"vocab_size": vocab_size or 50304} | given))
        if args.mup:  # or the first logits would differ with the width
            torch.nn.init.zeros_(model.head.weight)
    wanted = TransformerConfig(**vars(model.config) | given)
    changed = {k for k in given if getattr(wanted, k) != getattr(model.config, k)}
    sized = {"hyena", "learned"} & {*model.kinds, model.config.position}  # for one block_size
    if changed - ({"dropout"} if sized else {"dropout", "block_size"}):
        raise ValueError(f"the checkpoint's model has another {', '.join(sorted(changed))}")
    if changed:
        model = from_state(wanted, model.state_dict(), quantized=model.quantized)
    model, config, n = model.to(device), model.config, args.gradient_accumulation_steps
    theirs = saved.get("tokenizer") or tokenizer
    more = {k: saved[k] for k in ("template", "stop", "begin", "names") if k in saved}
    if config.vocab_size > 2**16 and 0 in (train_data.offset, val_data.offset):  # uint16
        raise ValueError(f"{args.data} does not say that its ids are of {config.vocab_size:,}")
    model.activation_checkpointing = args.activation_checkpointing
    if args.kernels:
        import kernels
        model_py.kernels = kernels
    if args.compile:
        model.compile()
    teacher, other = load_checkpoint(args.teacher, device) if args.teacher else (None, {})
    teacher = teacher and teacher.requires_grad_(False)
    known = [Tokenizer.from_json(t).vocab for t in {tokenizer, theirs, other.get("tokenizer")} if t]
    if any(vocab != known[0] for vocab in known):
        raise ValueError("another tokenizer made the data than the checkpoint's or the teacher's")

    optimizers = make_optimizers(model, args.optimizer, args.learning_rate, args.weight_decay,
                                 (args.beta1, args.beta2), args.momentum, args.mup)
    step, best, loss, seconds, rows, small_norms, big_norms = 0, math.inf, 0.0, 0.0, [], [], []
    T, log_path = config.block_size, os.path.join(args.out_dir, "log.csv")
    if resumed:
        step, best = int(saved["step"]), float(saved["best_val_loss"])
        for optimizer, state in zip(optimizers, saved["optimizer"], strict=True):
            settings = optimizer.state_dict()["param_groups"]  # from the flags, not the file
            optimizer.load_state_dict({"state": state["state"], "param_groups": settings})
        random_state(device, dict(saved["rng"]))
        with open(log_path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        seconds = float(rows[-1]["seconds"]) if rows else 0.0
    elif os.path.exists(path) and not args.eval_only:
        os.rename(path, aside := f"{path[:-3]}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
        print(f"{path}, of another run, is now {aside}")
    warmup = args.max_iters // 20 if args.warmup_iters < 0 else args.warmup_iters
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = args.peak_flops or next((PEAK[name] for name in PEAK if name in card), 0)
    flops_per_token, tokens_per_step = 3 * count(config)[1].total(), args.batch_size * n * T
    print(f"{count(config)[0].total():,} parameters | {tokens_per_step:,} tokens "
          f"per step | {args.max_iters * tokens_per_step / len(train_data):.2f} epochs | {device}")

    stop = []  # a signal, or what is wrong with the data: finish the step, save, leave
    def on_signal(number, _):
        stop.append(128 + number)
        signal.signal(number, signal.SIG_DFL)  # the second time at once
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    model.train()
    since, counted = time.perf_counter(), step
    while True:
        # evaluate, and save all that is needed to go on
        done, at_last = step >= args.max_iters, bool(rows) and int(rows[-1]["step"]) == step
        due = args.eval_only or done or (step > 0 and step % args.eval_interval == 0)
        try:
            batches = [] if done else [
                get_batch(train_data, args.batch_size, T, device, i, args.seed, config.vocab_size)
                for i in range(step * n, (step + 1) * n)]
            if due and not stop and (args.eval_only or not at_last or not rows[-1].get("val_loss")):
                loss = evaluate(model, val_data, args.batch_size, T, device, autocast,
                                0 if done or args.eval_only else args.eval_iters)
                best, bits = min(loss, best), loss / math.log(2) / (bytes_per_token or math.inf)
                print(f"step {step:6d} | val loss {loss:.4f}" + f" | {bits:.4f} bits per byte"
                      * bool(bits), flush=True)
                if at_last:
                    rows[-1] |= {"val_loss": f"{loss:.6f}", "val_bpb": f"{bits:.6f}" * bool(bits)}
        except ValueError as error:  # a file that is damaged, or has become shorter
            stop.append(error)
        if args.eval_only:
            break
        if due or stop:
            norms = [p.detach().norm() for p in model.parameters()]  # (infinite for huge weights)
            if not all(map(math.isfinite, (loss, *norms))):
                raise ValueError("loss or weights are not finite; the checkpoint stays as it was")
            with replacing(log_path, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)
            save_checkpoint(path, model, optimizers, step=step, best_val_loss=best, args=words,
                            rng=random_state(device), tokenizer=theirs, **more)
            since, counted = time.perf_counter(), step
        if done or stop:
            break

        lr = get_lr(step, args.learning_rate, args.min_lr, warmup, args.max_iters, args.schedule,
                    args.decay_fraction)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = lr * group.get("lr_scale", 1.0)

        # the mean over all targets of n batches: a mean of means would weigh tokens unequally
        if args.noise_scale and n == 1:  # two sizes of batch: the halves, and the whole
            batches = [pair for x, y in batches for pair in zip(x.chunk(2), y.chunk(2))]
        targets, loss, before = sum(int((y != -100).sum()) for _, y in batches), 0.0, 0.0
        for x, y in batches:
            offload = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda") if \
                args.offload in ("activations", "both") else contextlib.nullcontext()
            with autocast(), offload:
                if args.kernels and not (args.z_loss or teacher or config.logit_cap):
                    part = kernels.linear_cross_entropy(model(x, hidden=True), model.head.weight, y,
                                                        reduction="sum")
                else:
                    logits = model(x)
                    part = cross_entropy(logits, y, reduction="sum", z_loss=args.z_loss)
                if teacher:
                    soft = distillation_loss(logits, teacher(x), y, args.teacher_temperature)
                    part = part + args.teacher_weight * (soft - part)
            share = int((y != -100).sum()) / targets  # of experts' losses, which are means
            (part / targets + model.auxiliary_loss() * share).backward()
            loss += part.detach() / targets
            if args.noise_scale:  # |the gradient of this batch's own mean|^2
                now = torch.cat([p.grad.flatten() for p in model.parameters()])
                small_norms.append(((now - before) / share).square().sum().item())
                before = now
        norm, loss = clip_grad_norm(model.parameters(), args.grad_clip).item(), float(loss)
        big_norms += [norm**2] * bool(args.noise_scale)
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {step + 1}: loss {loss}, norm {norm}; lower --learning_rate")
        for optimizer in optimizers:
            move_state(optimizer, device)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            move_state(optimizer, "cpu" if args.offload in ("optimizer", "both") else device)
        step += 1

        if not step % args.log_interval or not step % args.eval_interval or step == args.max_iters:
            now = time.perf_counter()
            rate = (step - counted) * tokens_per_step / (now - since)
            seconds += now - since
            mfu = f" | mfu {rate * flops_per_token / peak / 1e12:.1%}" if peak else ""
            left = (args.max_iters - step) * tokens_per_step / rate / 60
            print(f"step {step:6d}/{args.max_iters} | loss {loss:.4f} | lr {lr:.2e} | norm "
                  f"{norm:.2f} | {rate:,.0f} tok/s{mfu} | {left:.1f} min left", flush=True)
            rows.append(dict(zip(COLUMNS, (step, step * tokens_per_step, f"{seconds:.2f}",
                                           f"{loss:.6f}", "", "", f"{lr:.6g}", f"{norm:.4f}"))))
            since, counted = now, step

    if stop and isinstance(stop[0], ValueError):
        raise stop[0]
    if len(small_norms) > len(big_norms):  # (a single sequence has no two sizes)
        scale = gradient_noise_scale(small_norms, big_norms, len(big_norms) / len(small_norms), 1)
        print(f"noise_scale_tokens: {scale * tokens_per_step:.0f}")
    if not args.eval_only:
        plot_log(os.path.join(args.out_dir, "loss.png"), rows)
        print(f"{path}: step {step} of {args.max_iters}" + ", go on with --resume" * bool(stop))
    sys.exit(stop[0] if stop else 0)

def random_state(device, new=None):
    """The state of the random numbers that dropout draws on CPU and device; new: to take up."""
    parts = {device.type: torch.get_device_module(device), "cpu": torch}
    for name in parts.keys() & (new or {}):
        parts[name].set_rng_state(new[name].cpu())
    return {name: part.get_rng_state() for name, part in parts.items()}

def move_state(optimizer, device):
    """Move the state of an optimizer to a device, if it is not there."""
    for state in optimizer.state.values():
        state |= {name: x.to(device) for name, x in state.items() if torch.is_tensor(x)}

def plot_log(path, rows):
    """loss.png, if matplotlib is installed."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        axes = Figure().subplots()
        for name in ("loss", "val_loss"):
            points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
            axes.plot(*zip(*points), label=name)
        axes.set(xlabel="step", ylabel="nats per token")
        axes.legend()
        axes.figure.savefig(path, dpi=120)

if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # (what a stranger's file can raise varies)
        sys.exit(f"train.py: error: {' '.join(str(error).split()):.300}")
