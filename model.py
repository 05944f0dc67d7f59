"""
The Transformer language model, from its parts, and what it takes to run one.

    python model.py                                  # sample from out/ckpt.pt
    python model.py --prompt "def main(" --num_samples 3 --temperature 0.8 --top_p 0.9
    python model.py info                             # parameters, FLOPs and memory of out/ckpt.pt
    python model.py info --n_layer 12 --n_head 12 --n_embd 768 --vocab_size 50257 --batch_size 64

A pre-norm decoder as in Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases.
Three older parts can be chosen instead, to have GPT-2 (Radford et al. 2019): layernorm, learned
positions, gelu.

Names are nanoGPT's. In the terms of a course: n_embd = d_model, n_layer = num_layers,
n_head = num_heads, block_size = context_length, and d_ff is d_ff. In the comments: B batch, T time
(position in the sequence), C channels (n_embd), H heads, D head size (C / H), V vocabulary.
"""

import argparse
import codecs
import dataclasses
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# The parts.


class Linear(nn.Module):
    """y = x W^T + b. weight: (d_out, d_in), truncated normal of variance 2 / (d_in + d_out)
    (Glorot & Bengio 2010), cut at three standard deviations."""

    def __init__(self, d_in, d_out, bias=False, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype)) if bias else None
        std = math.sqrt(2 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, x):
        """(..., d_in) -> (..., d_out)"""
        # F.linear is x @ weight.T + bias, with the addition inside the matrix product
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A vector for each of n ids: row i of the table. weight: (n, d)"""

    def __init__(self, n, d, std=1.0, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, ids):
        """(...) int64 -> (..., d)"""
        # the same as self.weight[ids]; the backward pass of indexing is several times slower
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of 1, then by a learned gain (Zhang & Sennrich 2019).
    Computed in float32, whatever comes in: squares of bfloat16 lose too much."""

    def __init__(self, d, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x):
        """(..., d) -> (..., d)"""
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """Subtract the mean, divide by the standard deviation, scale (Ba et al. 2016). No bias unless
    asked for, as in nanoGPT."""

    def __init__(self, d, eps=1e-5, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d)) if bias else None
        self.eps = eps

    def forward(self, x):
        """(..., d) -> (..., d)"""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def softmax(x, dim=-1):
    """exp(x) / sum(exp(x)) along a dimension; the maximum is taken off first, so that nothing
    overflows. Entries of -inf get 0."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


def rope_angles(positions, head_size, theta=10000.0):
    """cos and sin of the angles by which rotary embedding turns, each (T, D / 2), float32.

    positions: (T,). Pair i of a head turns by position * theta^(-2 i / D): fast for small i, slow
    for large ones, like the hands of a clock (Su et al. 2021).
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float()[:, None] * theta ** (-exponent / head_size)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin, interleaved=False):
    """Turn pairs of channels of queries or keys by angles that grow with position, so that a dot
    product depends on the distance of two tokens only.

    x: (..., T, D); cos, sin: (T, D / 2) of `rope_angles`.
    Which channels make pair i is a convention, and mixing up two of them ruins a model without
    any error: here it is i and i + D / 2, as in Hugging Face's Llama and in GPT-NeoX. The paper
    and the weights that Meta gave out pair 2 i and 2 i + 1: `interleaved`.
    """
    h = x.float()  # bfloat16 can not tell position 1000 from 1001
    if interleaved:
        a, b = h[..., 0::2], h[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:  # the same for a, b = h.chunk(2, -1), in few operations on whole heads
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        out = h * cos + h.roll(h.shape[-1] // 2, -1) * sin
    return out.to(x.dtype)


def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: each query takes a mean of the values, weighted by how well
    their keys fit (Vaswani et al. 2017).

    q: (..., T, D), k: (..., S, D), v: (..., S, E) -> (..., T, E)
    mask: (..., T, S) of bool, True where a query may attend to a key; a query that may attend to
    nothing gets 0.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
        nothing = ~mask.any(-1, keepdim=True)
        return softmax(scores.masked_fill(nothing, 0.0)).masked_fill(nothing, 0.0) @ v
    return softmax(scores) @ v


def fast_attention(q, k, v, dropout=0.0):
    """PyTorch's fused causal attention, in which no (T, T) matrix is ever stored."""
    if q.device.type == "cpu" and q.shape[-1] < 64:
        # on CPUs its backward pass in bfloat16 is five times slower for small heads
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(),
                                                  dropout_p=dropout, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def causal_mask(T, device=None):
    """(T, T) of bool: position t may attend to positions 0 to t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


# -----------------------------------------------------------------------------
# The model.


@dataclasses.dataclass
class TransformerConfig:
    """All that decides the shapes and the computation of a model; it goes into checkpoints.

    Raises ValueError for values that make no model.
    """

    vocab_size: int = 4096
    block_size: int = 256  # the longest sequence
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # heads of keys and values, each shared by a group of queries; 0: n_head
    n_embd: int = 256
    d_ff: int = 0  # width inside the feed-forward part; 0: 8/3 n_embd to a multiple of 64, or 4x
    activation: str = "swiglu"  # or gelu
    position: str = "rope"  # or learned
    norm: str = "rmsnorm"  # or layernorm
    bias: bool = False  # in linear layers and layernorm
    tie_embeddings: bool = False  # one matrix for the embedding and the output
    dropout: float = 0.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} can not be divided by n_head {self.n_head}")
        if self.n_head % self.n_kv_head or self.n_kv_head < 0:
            raise ValueError(f"n_head {self.n_head} can not be divided by n_kv_head "
                             f"{self.n_kv_head}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"rope needs an even head size, not {self.n_embd // self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        for name, choices in (("activation", ("swiglu", "gelu")), ("position", ("rope", "learned")),
                              ("norm", ("rmsnorm", "layernorm"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, not {getattr(self, name)!r}")
        if not self.d_ff:
            swiglu = max(64, round(8 / 3 * self.n_embd / 64) * 64)  # three matrices for two
            self.d_ff = swiglu if self.activation == "swiglu" else 4 * self.n_embd


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the past. With fewer heads of keys and values than of queries,
    each serves a group of queries (Ainslie et al. 2023), which makes a smaller cache.

    fast: use PyTorch's fused attention; the readable form gives the same (see the tests).
    """

    def __init__(self, config, fast=True):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size = config.n_embd // config.n_head
        self.dropout, self.fast = config.dropout, fast
        width = self.n_kv_head * self.head_size
        self.q_proj = Linear(config.n_embd, config.n_embd, config.bias)
        self.k_proj = Linear(config.n_embd, width, config.bias)
        self.v_proj = Linear(config.n_embd, width, config.bias)
        self.o_proj = Linear(config.n_embd, config.n_embd, config.bias)

    def forward(self, x, rope=None):
        """x: (B, T, C) -> (B, T, C); rope: cos and sin for the T positions, or None"""
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)
        if rope is not None:
            q, k = apply_rope(q.contiguous(), *rope), apply_rope(k.contiguous(), *rope)
        if self.n_kv_head < self.n_head:
            k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
            v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        if self.fast:
            dropout = self.dropout if self.training else 0.0
            y = fast_attention(q, k, v, dropout)
        else:
            y = scaled_dot_product_attention(q, k, v, causal_mask(T, x.device))
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): a feed-forward part whose units are gated (Shazeer 2020)."""

    def __init__(self, d, d_ff, bias=False):
        super().__init__()
        self.w1 = Linear(d, d_ff, bias)
        self.w2 = Linear(d_ff, d, bias)
        self.w3 = Linear(d, d_ff, bias)

    def forward(self, x):
        """(..., d) -> (..., d)"""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # silu(x) = x * sigmoid(x)


class GELU(nn.Module):
    """w2(gelu(w1 x)): the feed-forward part of GPT-2."""

    def __init__(self, d, d_ff, bias=False):
        super().__init__()
        self.w1 = Linear(d, d_ff, bias)
        self.w2 = Linear(d_ff, d, bias)

    def forward(self, x):
        """(..., d) -> (..., d)"""
        return self.w2(F.gelu(self.w1(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): each part adds to what is there."""

    def __init__(self, config):
        super().__init__()
        norm = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[config.norm]
        feed_forward = {"swiglu": SwiGLU, "gelu": GELU}[config.activation]
        self.attn_norm = norm(config.n_embd, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ffn_norm = norm(config.n_embd, config.norm_eps)
        self.ffn = feed_forward(config.n_embd, config.d_ff, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None):
        """(B, T, C) -> (B, T, C)"""
        x = x + self.dropout(self.attn(self.attn_norm(x), rope))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class Transformer(nn.Module):
    """The language model: ids of a text -> for each position, scores of the next id."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # a unit variance suits the norms; as output weights it would make logits too large
        std = 1 / math.sqrt(config.n_embd) if config.tie_embeddings else 1.0
        self.embedding = Embedding(config.vocab_size, config.n_embd, std)
        if config.position == "learned":
            self.positions = Embedding(config.block_size, config.n_embd, std)
        else:
            head_size = config.n_embd // config.n_head
            cos, sin = rope_angles(torch.arange(config.block_size), head_size, config.rope_theta)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        norm = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}[config.norm]
        self.final_norm = norm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        # every block adds to the residual stream twice: start with small steps, as GPT-2 does
        for block in self.blocks:
            for last in (block.attn.o_proj, block.ffn.w2):
                last.weight.data.mul_(1 / math.sqrt(2 * config.n_layer))

    def forward(self, ids):
        """ids: (B, T) int64, T at most block_size -> logits: (B, T, V)"""
        T = ids.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size {self.config.block_size}")
        x, rope = self.embedding(ids), None
        if self.config.position == "learned":
            x = x + self.positions.weight[:T]
        else:
            rope = self.cos[:T], self.sin[:T]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rope)
        return self.head(self.final_norm(x))

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None, on_token=None):
        """Continue sequences, token by token.

        ids: (B, T) int64 -> (B, T + n), n at most max_new_tokens. Of sequences longer than
        block_size, the end is what the model sees. Ends early when every sequence has had the id
        `stop`; what follows a sequence's own `stop` is `stop` again.
        temperature, top_k, top_p: see `sample`. generator: torch.Generator on ids' device, for
        samples that can be repeated. on_token: called with each new (B,) of ids.
        """
        was_training = self.training
        self.eval()
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits = self(ids[:, -self.config.block_size :])[:, -1]
            new = sample(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                new = torch.where(done, stop, new)
                done |= new == stop
            ids = torch.cat((ids, new[:, None]), dim=1)
            if on_token:
                on_token(new)
            if stop is not None and done.all():
                break
        self.train(was_training)
        return ids


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next ids. logits: (B, V) -> (B,) int64

    temperature: logits are divided by it; 0 takes the most likely id. top_k: only the k most
    likely ids. top_p: only the fewest ids that together have at least this probability
    (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = softmax(ordered)
        before = p.cumsum(-1) - p  # what the more likely ids have together
        drop = (before >= top_p).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return torch.multinomial(softmax(logits), 1, generator=generator)[:, 0]


# -----------------------------------------------------------------------------
# Checkpoints.


def save_checkpoint(path, model, optimizer=None, step=0, best_val_loss=math.inf, rng=None,
                    args=None, tokenizer=None, template=None):
    """Write all that is needed to use a model or to go on training it to one file.

    optimizer: anything with state_dict(), or a list of such; rng: dict of RNG states; args: dict of plain values;
    tokenizer: the text of its tokenizer.json; template: that of a chat.
    The file is written under another name, and renamed when it is safe on disk: whatever happens
    meanwhile, `path` is a whole checkpoint, the old or the new. Raises OSError.
    """
    if isinstance(optimizer, (list, tuple)):
        optimizer_state = [o.state_dict() for o in optimizer]
    else:
        optimizer_state = optimizer.state_dict() if optimizer else None
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    checkpoint = {
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "optimizer": optimizer_state,
        "step": step, "best_val_loss": best_val_loss, "rng": rng, "args": args,
        "tokenizer": tokenizer, "template": template,
    }
    temporary = os.fspath(path) + ".tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint -> (Transformer in eval mode, the dict of `save_checkpoint`).

    Only tensors and plain Python values are read, so a file from a stranger can not run code.
    Raises ValueError for a file that is no checkpoint or does not fit together, or OSError.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}: python train.py makes one")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises for broken files varies from one to the next
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no checkpoint: {reason}") from None
    try:
        known = {field.name for field in dataclasses.fields(TransformerConfig)}
        if unknown := set(checkpoint["config"]) - known:
            raise ValueError(f"its config has {', '.join(sorted(map(str, unknown)))}")
        config = TransformerConfig(**checkpoint["config"])
        with torch.device("meta"):  # shapes first: the numbers need not fit into memory
            model = Transformer(config)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in checkpoint["model"].items()}
        for name in sorted({*shapes, *found}):
            if shapes.get(name) != found.get(name):
                raise ValueError(f"{name} is {found.get(name)}, by its config {shapes.get(name)}")
        model = Transformer(config).to(device)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of this model: {error}") from None
    return model.eval(), checkpoint


def pick_device(name="auto"):
    """The best device there is, or the one asked for. Raises ValueError if it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not there: {str(error).splitlines()[0]}") from None
    return name


# -----------------------------------------------------------------------------
# Resource accounting: what a model costs.


def count_parameters(config):
    """{part: number of parameters}, from the formulas. Tied matrices count once."""
    C, L, F_ = config.n_embd, config.n_layer, config.d_ff
    kv = C // config.n_head * config.n_kv_head
    bias = config.bias
    norms = C * (2 * L + 1)
    matrices = 3 if config.activation == "swiglu" else 2
    return {
        "embedding": config.vocab_size * C,
        "positions": config.block_size * C * (config.position == "learned"),
        "attention": L * (2 * C * C + 2 * C * kv + bias * (2 * C + 2 * kv)),
        "feed-forward": L * (matrices * C * F_ + bias * ((matrices - 1) * F_ + C)),
        "norms": norms,
        "head": config.vocab_size * C * (not config.tie_embeddings),
    }


def count_flops(config, T=None):
    """{part: FLOPs per token} of a forward pass over T tokens (default block_size); training
    takes three times that. A multiplication and its addition are two. Only matrix products
    count; of attention half, since a causal mask leaves half of it to be computed."""
    T = T or config.block_size
    parameters = count_parameters(config)
    bias = config.bias * config.n_layer
    kv = config.n_embd // config.n_head * config.n_kv_head
    matrices = 3 if config.activation == "swiglu" else 2
    return {
        "attention, projections": 2 * (parameters["attention"] - bias * 2 * (config.n_embd + kv)),
        "attention, scores and values": 2 * 2 * config.n_layer * config.n_embd * T // 2,
        "feed-forward": 2 * config.n_layer * matrices * config.n_embd * config.d_ff,
        "head": 2 * config.vocab_size * config.n_embd,
    }


def count_activations(config, batch_size):
    """Numbers kept for the backward pass of a batch of sequences of block_size, with fused
    attention: roughly, for what is kept and what is recomputed varies."""
    C, F_ = config.n_embd, config.d_ff
    kv = C // config.n_head * config.n_kv_head
    # two norms (input and float32 output), q k v before and after rope, attention's output; then
    # the feed-forward part's input and what is inside it
    block = 6 * C + 2 * (C + 2 * kv) + 2 * C + (4 if config.activation == "swiglu" else 2) * F_
    return batch_size * config.block_size * (config.n_layer * block + 3 * C + 2 * config.vocab_size)


def info(config, batch_size, tflops):
    """Print what a model of this config costs."""
    parameters, flops = count_parameters(config), count_flops(config)
    total, forward = sum(parameters.values()), sum(flops.values())
    print(", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()), "\n")
    print(f"{'parameters':32}{total:16,}")
    for part, n in parameters.items():
        print(f"  {part:30}{n:16,}{n / total:8.1%}")
    print(f"\n{'FLOPs per token, forward':32}{forward:16,}")
    for part, n in flops.items():
        print(f"  {part:30}{n:16,}{n / forward:8.1%}")
    print(f"{'FLOPs per token, training':32}{3 * forward:16,}   (6 x parameters: {6 * total:,})")
    activations = 4 * count_activations(config, batch_size)
    memory = {"weights": 4 * total, "gradients": 4 * total, "optimizer (AdamW)": 8 * total,
              f"activations of a batch of {batch_size}, about": activations}
    print(f"\n{'memory for training in float32':32}{sum(memory.values()) / 1e6:13,.1f} MB")
    for part, n in memory.items():
        print(f"  {part:40}{n / 1e6:3,.1f} MB")
    rate = tflops * 1e12 / (3 * forward)
    print(f"\nat {tflops:g} TFLOP/s: {rate:,.0f} tokens/s in training, "
          f"{total * 20 / rate / 3600:,.2f} hours for 20 tokens per parameter")


# -----------------------------------------------------------------------------
# The command line.


def main():
    parser = argparse.ArgumentParser(description="Sample from a model, or account for its costs.")
    parser.add_argument("command", nargs="?", choices=("sample", "info"), default="sample")
    parser.add_argument("--ckpt", default=None, metavar="FILE", help="default: out/ckpt.pt")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    g = parser.add_argument_group("sample")
    g.add_argument("--prompt", default=None, help="text to continue (default: a new document)")
    g.add_argument("--num_samples", type=int, default=1)
    g.add_argument("--max_new_tokens", type=int, default=200, help="tokens to add (default 200)")
    g.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    g.add_argument("--top_k", type=int, default=None, help="draw from the k likeliest tokens")
    g.add_argument("--top_p", type=float, default=None, help="draw from the likeliest tokens that "
                   "together have this probability")
    g.add_argument("--seed", type=int, default=1337)
    g = parser.add_argument_group("info", "the costs of a checkpoint, or of a model of these sizes")
    for field in dataclasses.fields(TransformerConfig):
        if field.type is bool or field.type == "bool":
            g.add_argument(f"--{field.name}", action="store_true", default=None)
        else:
            g.add_argument(f"--{field.name}", type=type(field.default), default=None, metavar="X")
    g.add_argument("--batch_size", type=int, default=32, help="sequences (default 32)")
    g.add_argument("--tflops", type=float, default=0.1, help="of the device (default 0.1)")
    args = parser.parse_args()
    if args.temperature < 0 or args.num_samples < 1 or args.max_new_tokens < 1:
        parser.error("--temperature must not be negative; --num_samples and --max_new_tokens "
                     "must be at least 1")
    if (args.top_k is not None and args.top_k < 1) or not 0 < (args.top_p or 1) <= 1:
        parser.error("--top_k must be at least 1, and --top_p above 0 and at most 1")
    try:
        run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        sys.exit(1)


def run(args):
    """Do what the command line asks for."""
    default = os.path.join("out", "ckpt.pt")
    if args.command == "info":
        names = [field.name for field in dataclasses.fields(TransformerConfig)]
        sizes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        if args.ckpt or (not sizes and os.path.exists(default)):
            model, _ = load_checkpoint(args.ckpt or default)
            sizes = dataclasses.asdict(model.config) | sizes
        info(TransformerConfig(**sizes), args.batch_size, args.tflops)
        return

    from bpe import EOT, Tokenizer

    device = pick_device(args.device)
    path = args.ckpt or default
    model, checkpoint = load_checkpoint(path, device)
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{path} holds no tokenizer: it was trained on ids of unknown meaning")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]  # a document begins after one
    ids = start + tokenizer.encode(args.prompt or "")
    if not ids:
        raise ValueError("this tokenizer has no end-of-text token to begin with: give a --prompt")
    ids = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens can be half characters

        def show(new):
            if new.item() != tokenizer.eot_id:
                print(decoder.decode(tokenizer.decode_bytes(new.tolist())), end="", flush=True)

        print(args.prompt or "", end="", flush=True)
        model.generate(ids, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                       tokenizer.eot_id, generator, show)
        print(decoder.decode(b"", True) + ("\n---------------" if i + 1 < args.num_samples else ""))


if __name__ == "__main__":
    main()
