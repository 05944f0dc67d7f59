"""
The Transformer language model, written from its parts, and everything needed to run one.

    python model.py                                  # sample from out/ckpt.pt
    python model.py --prompt "def main(" --num_samples 3 --temperature 0.8 --top_p 0.9
    python model.py --draft small.pt --gamma 4       # speculative decoding
    python model.py chat                             # several turns
    python model.py info --n_layer 12 --n_embd 768   # parameters, FLOPs and memory
    python model.py prune --n_layer 2 --d_ff 256     # out/prune.pt; then train.py --teacher
    python model.py quantize --quantize int4         # out/quantize.pt; then --ckpt
    python model.py import DIR --out theirs.pt       # a folder in Hugging Face's format
    python model.py export DIR --ckpt out/ckpt.pt    # a folder that transformers opens

The default is Llama's decoder (Touvron et al. 2023); every part has alternatives, which
TransformerConfig lists. Names are nanoGPT's; a course may say d_model for n_embd, num_layers for
n_layer, num_heads for n_head, context_length for block_size. In comments: B batch, T positions of a
pass, S all positions up to now, C channels (n_embd), H heads, D head size, V vocabulary.
"""

import argparse, codecs, collections, contextlib, dataclasses, functools, glob, inspect, json, math
import os, pathlib, re, signal, sys, time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word, at any time
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as checkpointed

kernels = None  # kernels.py, when its Triton kernels are to compute: see train.py --kernels
SLACK = 16  # what a sliding cache keeps beyond the window: `speculate` takes back fewer tokens

# ---- The parts.

class Linear(nn.Module):
    """y = x W^T + b. weight: (d_out, d_in), normal of variance 2 / (d_in + d_out) (Glorot & Bengio
    2010), cut at three standard deviations."""
    def __init__(self, d_in, d_out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        std = math.sqrt(2 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        return F.linear(x, self.weight, self.bias)  # x @ weight.T + bias

class Embedding(nn.Module):
    """A vector for each of n ids: row i of the table. weight: (n, d)"""
    def __init__(self, n, d, std=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, ids):  # (...) int64 -> (..., d)
        return F.embedding(ids, self.weight)  # self.weight[ids], whose backward pass is slower

def upcast(x):
    """bfloat16 and float16 as float32; what is more precise stays."""
    return x if x.dtype == torch.float64 else x.float()

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), in float32. weight: (d,)"""
    def __init__(self, d, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):  # (..., d) -> (..., d)
        if kernels and x.dtype == self.weight.dtype:
            return kernels.rms_norm(x, self.weight, self.eps)
        h = upcast(x)
        mean = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square() / h.shape[-1]  # one pass
        return (h * torch.rsqrt(mean + self.eps) * self.weight).type_as(x)

def make_norm(config):
    """The norm that the config asks for: RMSNorm, LayerNorm (Ba et al. 2016) as in GPT-2, none."""
    layernorm = functools.partial(nn.LayerNorm, bias=config.bias)
    kind = {"rmsnorm": RMSNorm, "layernorm": layernorm, "none": nn.Identity}[config.norm]
    return kind(config.n_embd, config.norm_eps)

def softmax(x, dim=-1):
    """exp(x) / sum(exp(x)), the maximum subtracted first, so that nothing overflows."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)

def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: each query takes a mean of the values, weighted by how well
    their keys match it (Vaswani et al. 2017). q: (..., T, D), k and v: (..., S, D) -> (..., T, D).
    mask: (..., T, S) of bool, True where a query may look. To be read: models call PyTorch's."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return softmax(scores) @ v
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # (-inf leads to NaN)
    return softmax(scores).masked_fill(~mask, 0.0) @ v

def rope_angles(positions, D, theta=10000.0, scaling="", interleaved=False):
    """Cosines and sines for `apply_rope`: pair i of the D / 2 pairs of channels turns by position *
    theta^(-2 i / D). positions: (..., T) -> two (..., T, D), float32. scaling, as Llama 3 has it,
    "FACTOR,LOW,HIGH,LENGTH": pairs that turn less than LOW times in LENGTH positions turn FACTOR
    times slower, those that turn more than HIGH times as before."""
    frequencies = theta ** (-torch.arange(0, D, 2, device=positions.device).float() / D)
    if scaling:
        factor, low, high, length = map(float, scaling.split(","))
        kept = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    both = torch.stack((-frequencies, frequencies), -1 if interleaved else 0).flatten()
    angles = positions[..., None] * both  # of (a, b); in `apply_rope` the sine of a is negative
    return angles.cos(), angles.sin()

def apply_rope(x, cos, sin, interleaved=False):
    """Rotary positions (Su et al. 2021): turn pairs of channels by angles that grow with position,
    so that the product of a query and a key depends only on their distance: (a, b) becomes (a cos -
    b sin, b cos + a sin). x, cos, sin: (..., T, D). The channels of a pair are i and i + D / 2 (as
    Hugging Face's) or, interleaved, 2 i and 2 i + 1 (Meta's): the wrong ones ruin a model."""
    h, half = upcast(x), x.shape[-1] // 2  # bfloat16 cannot tell position 1000 from 1001
    other = h.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else h.roll(half, -1)
    return torch.addcmul(h * cos, other, sin).type_as(x)

# ---- The configuration.

CHOICES = {"activation": "swiglu relu gelu gelu_tanh silu relu2 moe", "norm_place": "pre post",
           "position": "rope learned sinusoidal none", "norm": "rmsnorm layernorm none",
           "attention": "full sliding linear latent hyena"}

@dataclasses.dataclass
class TransformerConfig:
    """Everything that decides a model's shapes and computation; it is part of each checkpoint."""
    vocab_size: int = 4096
    block_size: int = 256  # tokens of the longest sequence
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # heads of keys and values, each shared by a group of queries; 0: n_head
    n_embd: int = 256  # width of the residual stream
    head_size: int = 0  # 0: n_embd / n_head
    d_ff: int = 0  # width inside the feed-forward part; 0: 8/3 n_embd, or 4 n_embd without a gate
    activation: str = "swiglu"  # or relu, gelu, gelu_tanh (GPT-2's), silu, relu2, moe
    position: str = "rope"  # or learned, sinusoidal, none
    norm: str = "rmsnorm"  # or layernorm, none
    norm_place: str = "pre"  # or post
    attention: str = "full"  # or sliding, linear, latent, hyena; a,b,c: that pattern, repeated
    window: int = 64  # sliding: positions a query looks at, its own included
    kv_rank: int = 0  # latent: width of the compressed keys and values; 0: n_embd / 4
    rope_size: int = 0  # latent: further channels of a head, for the position; 0: half of head_size
    qk_norm: bool = False  # normalise the queries and keys of each head
    n_expert: int = 8  # moe: experts; d_ff is then the width of one
    top_k: int = 2  # moe: experts that a token goes to
    balance_weight: float = 0.01  # moe: weight of the loss that keeps experts equally busy
    bias: bool = False  # in linear layers and layernorm
    qkv_bias: bool = False  # in the projections to queries, keys and values
    tie_embeddings: bool = False  # one matrix for the embedding and the output
    logit_cap: float = 0.0  # keep logits between -cap and cap by tanh; 0: do not
    dropout: float = 0.0
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: str = ""  # for longer texts: see rope_angles
    rope_interleaved: bool = False  # which channels rotate together: see apply_rope
    norm_eps: float = 1e-5

    def __post_init__(self):
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        self.kv_rank = self.kv_rank or max(1, self.n_embd // 4)
        self.rope_size = self.rope_size or max(2, self.head_size // 4 * 2)
        if not self.d_ff:  # three matrices in place of two, and only top_k of the experts are met
            gated = self.activation in ("swiglu", "moe")
            self.d_ff = max(64, round(8 / 3 * self.n_embd / 64) * 64) if gated else 4 * self.n_embd
            self.d_ff //= self.top_k if self.activation == "moe" else 1
        for name, choices in CHOICES.items():
            if {*vars(self)[name].split("," if name == "attention" else "\n")} - {*choices.split()}:
                raise ValueError(f"{name} is one of {choices}")

def build(part, config):
    """An instance of part, whose arguments are the config's fields of the same names."""
    names = {name for kind in part.__mro__ for name in inspect.signature(kind.__init__).parameters}
    return part(**{name: value for name, value in vars(config).items() if name in names})

# ---- Attention, in five kinds: (..., T, C) -> (..., T, C), where no position sees a later one.

class Where:
    """Where the T tokens of a pass stand among the S of their rows. positions: (B, S), of those in
    the cache, too; None: 0, 1, 2, ... A 0 begins a text, and texts do not see one another: so a row
    can hold several, and begin with padding, texts of one token each. config: of rotary ones."""
    def __init__(self, T, S=0, positions=None, config=None, device="cpu"):
        self.plain, self.T, self.config, S = positions is None, T, config, S or T
        self.at = torch.arange(S - T, S, device=device) if self.plain else positions[:, -T:]
        self.text = None if self.plain else (positions == 0).cumsum(1)  # the number of its text
        self.ropes, self.masks = {}, {}

    def rotate(self, x):
        """Rotary positions for queries or keys x: (..., H, T, D)."""
        D, c = x.shape[-1], self.config
        if not c or c.position != "rope":
            return x
        if D not in self.ropes:
            at = self.at if self.plain else self.at[:, None]  # the same for all heads
            self.ropes[D] = rope_angles(at, D, c.rope_theta, c.rope_scaling, c.rope_interleaved)
        return apply_rope(x, *self.ropes[D], c.rope_interleaved)

    def mask(self, S, window):
        """Which of the last S tokens each of ours sees, (T, S) or (B, 1, T, S); None: all."""
        if self.plain and self.T == 1 and S <= window:
            return None
        if (S, window) not in self.masks:
            i, j = (torch.arange(-m, 0, device=self.at.device) for m in (self.T, S))  # from the end
            seen = (j <= i[:, None]) & (i[:, None] - j < window)
            if not self.plain:
                seen = (seen & (self.text[:, -self.T :, None] == self.text[:, None, -S:]))[:, None]
            self.masks[S, window] = seen
        return self.masks[S, window]

    def without_padding(self, x):
        """x: (B, H, T, D), with 0 for padding, for layers that sum up all that came before."""
        last = None if self.plain else self.text[:, -self.T :] == self.text[:, -1:]
        if last is not None and (self.at * ~last).any():
            raise ValueError("a sum cannot tell texts apart: no packing with linear or hyena")
        return x if last is None else x * last[:, None, :, None]

def keep(cache, name, new, most=2**40):
    """Add new, (B, H, T, D), to what the cache has under this name -> all of it, (B, H, S, D). Only
    its last `most` stay cached, in a buffer with room for 64 more, so that few calls copy all."""
    if cache is None:
        return new
    old, (B, H, T, D) = cache.get(name, new), new.shape
    S = T + (old.shape[2] if name in cache else 0)
    if name not in cache or old.storage_offset() + S * D > old.stride(1):
        old = F.pad(old[:, :, : S - T], (0, 0, 0, T + min(64, S)))
    both = old.as_strided((B, H, S, D), old.stride())  # the same memory, T positions more
    both[:, :, S - T :] = new
    cache[name] = both if S <= most else both[:, :, -most:]
    return both

class CausalSelfAttention(nn.Module):
    """Multi-head attention to the past. With fewer heads of keys and values than of queries, each
    serves a group of queries (Ainslie et al. 2023), which makes the cache smaller."""
    window = 2**40  # positions that a query looks at: no limit
    def __init__(self, n_embd, n_head, n_kv_head=0, head_size=0, bias=False, qkv_bias=False,
                 qk_norm=False, dropout=0.0, norm_eps=1e-5):
        super().__init__()
        n_kv_head, D = n_kv_head or n_head, head_size or n_embd // n_head
        self.D, self.n_kv_head, self.dropout, width = D, n_kv_head, dropout, n_head * D
        self.join = not qk_norm and n_embd * (width + 2 * n_kv_head * D) <= 2**20  # see heads
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(n_embd, D * n, bias or qkv_bias) for n in (n_head, n_kv_head, n_kv_head))
        self.o_proj = Linear(width, n_embd, bias)
        # scores of normalised queries and keys cannot grow freely (Henry et al. 2020)
        norms = (RMSNorm(D, norm_eps) if qk_norm else nn.Identity() for _ in "qk")
        self.q_norm, self.k_norm = norms

    def heads(self, x, rotate, cache=None):
        """x -> q: (..., H, T, D); k, v: (..., n_kv_head, T, D); q and k rotated"""
        parts, n = (self.q_proj, self.k_proj, self.v_proj), self.n_kv_head
        if cache is None or not self.join or type(self.q_proj) is not Linear:
            q, k, v = (part(x).unflatten(-1, (-1, self.D)).transpose(-3, -2) for part in parts)
            return rotate(self.q_norm(q)), rotate(self.k_norm(k)), v
        if "qkv" not in cache:  # for few tokens one product of joined matrices is faster than three
            w, b = zip(*((part.weight, part.bias) for part in parts))
            cache["qkv"] = torch.cat(w), None if b[0] is None else torch.cat(b)
        y = F.linear(x, *cache["qkv"]).unflatten(-1, (-1, self.D)).transpose(-3, -2)
        qk = rotate(y[:, :-n])
        return qk[:, :-n], qk[:, -n:], y[:, -n:]

    def forward(self, x, where=None, cache=None):  # (..., T, C) -> (..., T, C)
        where = where or Where(x.shape[-2], device=x.device)
        q, k, v = self.heads(x, where.rotate, cache)
        k, v = (keep(cache, name, a, self.window + SLACK) for name, a in (("k", k), ("v", v)))
        T, S, kind, dropout = q.shape[-2], k.shape[-2], q.dtype, self.dropout * self.training
        alone = where.plain and T == S  # one text, and nothing of it came before
        mask = None if alone and self.window >= T else where.mask(S, self.window)
        if alone and kernels and not dropout:
            y = kernels.flash_attention(q, k, v, True, None if mask is None else self.window)
        else:  # (with small heads, the backward pass in bfloat16 is slow on CPUs)
            slow = kind == torch.bfloat16 and x.device.type == "cpu" and self.D < 64
            q, k, v = (a.float() if slow else a for a in (q, k, v))
            with torch.autocast("cpu", enabled=False) if slow else contextlib.nullcontext():
                y = F.scaled_dot_product_attention(
                    q, k, v, mask, dropout, is_causal=mask is None and alone,
                    enable_gqa=q.shape[-3] != k.shape[-3]).to(kind)
        return self.o_proj(y.transpose(-3, -2).flatten(-2))

class SlidingWindowAttention(CausalSelfAttention):
    """Attention to the last `window` positions only (Beltagy et al. 2020), as is the cache."""
    def __init__(self, n_embd, n_head, window=64, **more):
        super().__init__(n_embd, n_head, **more)
        self.window = window

def linear_attention(q, k, v, rq, rk, S=0.0, z=0.0, chunk=64):
    """Attention with phi(q) . phi(k), phi = elu + 1, in place of exp(q . k) (Katharopoulos et al.
    2020). Sums over the past, S of rk v^T (..., D, D) and z of k (..., 1, D), are then a state:
    with chunk=1 this is a recurrent network; larger chunks compute the same. q, k: phi of queries
    and keys; rq, rk: these rotated, for the numerator alone, as a rotated sum could be 0 (Su et al.
    2021); v: values; all (..., T, D) -> y: (..., T, D), S, z."""
    out, S = [], S + rk[..., :0, :].mT @ v[..., :0, :]  # (adds 0, of the shape (..., D, D))
    for q, k, v, rq, rk in zip(*(x.split(chunk, -2) for x in (q, k, v, rq, rk))):
        norm = (q * (z + k.cumsum(-2))).sum(-1, keepdim=True)
        out.append(((rq @ rk.mT).tril() @ v + rq @ S) / (norm + 1e-9))  # (padding has a norm of 0)
        S, z = S + rk.mT @ v, z + k.sum(-2, keepdim=True)
    return torch.cat(out, -2), S, z

class LinearAttention(CausalSelfAttention):
    """Attention without softmax, in time proportional to T: see `linear_attention`."""
    def forward(self, x, where=None, cache=None):  # (..., T, C) -> (..., T, C)
        where, cache = where or Where(x.shape[-2], device=x.device), {} if cache is None else cache
        q, k, v = self.heads(x, lambda a: a)
        q, k, v = F.elu(upcast(q)) + 1, F.elu(upcast(k)) + 1, upcast(v)
        k = where.without_padding(k)
        k, v = (a.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for a in (k, v))
        rq, rk = where.rotate(q), where.rotate(k)
        y, cache["S"], cache["z"] = linear_attention(q, k, v, rq, rk, **cache)
        return self.o_proj(y.type_as(x).transpose(-3, -2).flatten(-2))

class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): the keys and values of all heads are made
    from one small vector per token, and only that is cached. A rotation cannot be moved past this
    projection, so `rope_size` further channels carry the position; all heads share their key."""
    def __init__(self, n_embd, n_head, head_size, kv_rank, rope_size, bias=False, dropout=0.0,
                 norm_eps=1e-5):
        super().__init__()
        self.H, self.sizes, self.dropout = n_head, (head_size, rope_size), dropout
        self.q_proj = Linear(n_embd, n_head * (head_size + rope_size), bias)
        self.kv_down = Linear(n_embd, kv_rank + rope_size, bias)
        self.kv_norm = RMSNorm(kv_rank, norm_eps)
        self.k_up, self.v_up = (Linear(kv_rank, n_head * head_size) for _ in "kv")
        self.o_proj = Linear(n_head * head_size, n_embd, bias)

    def forward(self, x, where=None, cache=None):  # (..., T, C) -> (..., T, C)
        where, (D, R) = where or Where(x.shape[-2], device=x.device), self.sizes
        q, q_rope = self.q_proj(x).unflatten(-1, (-1, D + R)).transpose(-3, -2).split((D, R), -1)
        latent, k_rope = self.kv_down(x).unsqueeze(-3).tensor_split((-R,), -1)  # (..., 1, T, ...)
        latent, q_rope, k_rope = self.kv_norm(latent), where.rotate(q_rope), where.rotate(k_rope)
        keys = keep(cache, "latent", torch.cat((latent, k_rope), -1))
        latent, k_rope = keys.tensor_split((-R,), -1)
        if cache is not None:  # q . (U l) = (U^T q) . l: no keys of past tokens have to be made
            q, k, v = q @ self.k_up.weight.unflatten(0, (-1, D)), keys, latent
        else:
            k, v = (latent @ up.weight.unflatten(0, (-1, D)).mT for up in (self.k_up, self.v_up))
            k = torch.cat((k, k_rope.expand_as(q_rope)), -1)
        k, v = (a.expand(*q.shape[:-2], -1, -1) for a in (k, v))
        q, mask = torch.cat((q, q_rope), -1), where.mask(k.shape[-2], 2**40)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout * self.training,
                                           scale=(D + R) ** -0.5)
        if cache is not None:  # and the sum of p (V l) is V (sum of p l)
            y = y @ self.v_up.weight.unflatten(0, (-1, D)).mT
        return self.o_proj(y.transpose(-3, -2).flatten(-2))

class Hyena(nn.Module):
    """A long convolution between two gates (Poli et al. 2023; order 2): y = o(x0 * (h conv (x1 *
    v))), in O(T log T). The filter h is as long as the text: a small network computes it."""
    def __init__(self, n_embd, block_size, bias=False):
        super().__init__()
        self.block_size = block_size
        self.in_proj = nn.ModuleList(Linear(n_embd, n_embd, bias) for _ in range(3))
        self.short = nn.Parameter(torch.randn(3, 3 * n_embd, 1) / 3)  # three taps for each channel
        self.filter_in, self.filter_out = Linear(17, 32, bias=True), Linear(32, n_embd)  # 1 + 8 + 8
        self.skip = nn.Parameter(torch.ones(n_embd))
        self.o_proj = Linear(n_embd, n_embd, bias)

    def filter(self, T):  # h: (T, C)
        t = torch.arange(T, device=self.skip.device)[:, None] / self.block_size
        angles = 2 * math.pi * t * torch.linspace(1e-4, 7, 8).to(t)  # a position in 8 frequencies
        x = torch.cat((t, angles.cos(), angles.sin()), 1).type_as(self.skip)
        h = self.filter_out(torch.sin(10 * self.filter_in(x)))  # without the 10 it is too smooth
        decay = torch.linspace(0, math.log(5e-4), len(self.skip)).to(t).exp()
        return h * torch.exp(-decay * t * self.block_size)  # slower from channel to channel

    def forward(self, x, where=None, cache=None):  # (..., T, C) -> (..., T, C)
        where, T = where or Where(x.shape[-2], device=x.device), x.shape[-2]
        u = torch.cat([project(x) for project in self.in_proj], -1).unsqueeze(-3)
        u = where.without_padding(u)  # (..., 1, T, 3 C)
        u = keep(cache, "short", F.pad(u, (0, 0, 2, 0)) if not cache else u, 2).squeeze(-3)
        taps = (u[..., i : i + T, :] * self.short[i].T for i in range(3))
        x0, x1, v = sum(taps).chunk(3, -1)
        v = keep(cache, "long", (x1 * v).unsqueeze(-3)).squeeze(-3)
        # y[t] = sum over s <= t of h[t - s] v[s]; zeros to twice the length S, or it wraps around
        S = v.shape[-2]
        spectra = (torch.fft.rfft(upcast(a), 2 * S, dim=-2) for a in (v, self.filter(S)))
        y = torch.fft.irfft(math.prod(spectra), 2 * S, dim=-2)[..., :S, :].type_as(v)
        return self.o_proj(x0 * (y + self.skip * v)[..., -T:, :])

ATTENTION = {"full": CausalSelfAttention, "sliding": SlidingWindowAttention,
             "linear": LinearAttention, "latent": LatentAttention, "hyena": Hyena}

# ---- Feed-forward parts.

class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): a feed-forward part whose units are gated (Shazeer 2020)."""
    def __init__(self, n_embd, d_ff, bias=False):
        super().__init__()
        self.w1, self.w3 = Linear(n_embd, d_ff, bias), Linear(n_embd, d_ff, bias)
        self.w2 = Linear(d_ff, n_embd, bias)

    def forward(self, x):  # (..., C) -> (..., C)
        gate, up = self.w1(x), self.w3(x)
        return self.w2(kernels.swiglu(gate, up) if kernels else F.silu(gate) * up)

class FeedForward(nn.Module):
    """w2(f(w1 x))"""
    KINDS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu2": lambda x: F.relu(x).square(),
             "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}  # (GPT-2's approximation)
    def __init__(self, n_embd, d_ff, activation, bias=False):
        super().__init__()
        self.w1, self.w2 = Linear(n_embd, d_ff, bias), Linear(d_ff, n_embd, bias)
        self.f = self.KINDS[activation]

    def forward(self, x):  # (..., C) -> (..., C)
        return self.w2(self.f(self.w1(x)))

class MixtureOfExperts(nn.Module):
    """A router sends each token to top_k of several feed-forward parts, and adds their outputs,
    weighted by its probabilities (Shazeer et al. 2017). A loss keeps the experts equally busy
    (Fedus et al. 2021): E sum_i f_i P_i, f_i the share of tokens, P_i the mean probability of i."""
    def __init__(self, n_embd, d_ff, n_expert, top_k=2, balance_weight=0.01, bias=False):
        super().__init__()
        self.top_k, self.balance_weight, self.loss = top_k, balance_weight, 0.0
        self.router = Linear(n_embd, n_expert)
        self.experts = nn.ModuleList(SwiGLU(n_embd, d_ff, bias) for _ in range(n_expert))

    def forward(self, x):  # (..., C) -> (..., C)
        flat, E = x.flatten(0, -2), len(self.experts)
        p = softmax(upcast(self.router(flat)))  # (N, E)
        weights, chosen = p.topk(self.top_k, -1)  # (N, top_k)
        weights, y = weights / weights.sum(-1, keepdim=True), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, slot = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, token, (expert(flat[token]) * weights[token, slot, None]).type_as(y))
        share = torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()
        self.loss = self.balance_weight * E * (share * p.mean(0)).sum()
        return y.view_as(x)

# ---- The model.

class Block(nn.Module):
    """Attention, then the feed-forward part; each adds to what is there. pre: x + part(norm(x));
    post, as in 2017: norm(x + part(x)), which trains less well (Xiong et al. 2020)."""
    def __init__(self, config, kind="full"):
        super().__init__()
        self.attn_norm, self.ffn_norm = make_norm(config), make_norm(config)
        self.attn = build(ATTENTION[kind], config)
        ffn = {"moe": MixtureOfExperts, "swiglu": SwiGLU}.get(config.activation, FeedForward)
        self.ffn, self.post = build(ffn, config), config.norm_place == "post"
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, where=None, cache=None):  # (..., T, C) -> (..., T, C)
        if self.post:
            x = self.attn_norm(x + self.dropout(self.attn(x, where, cache)))
            return self.ffn_norm(x + self.dropout(self.ffn(x)))
        x = x + self.dropout(self.attn(self.attn_norm(x), where, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

class Cache:
    """What the layers keep of the `length` tokens read so far: a dict of (B, ...) tensors each."""
    def __init__(self, model):
        self.layers, self.length = [{} for _ in model.blocks], 0

    def change(self, f):
        """Replace all tensors x by f(x); joined weights stay."""
        for layer in self.layers:
            layer.update({name: f(x) for name, x in layer.items() if torch.is_tensor(x)})

    def cut(self, length):
        """Take back the tokens after the first `length`; keys and values only, no states."""
        back, self.length = self.length - length, length
        self.change(lambda x: x[:, :, : x.shape[2] - back])

class Transformer(nn.Module):
    """The language model: ids of a text -> for each position, scores of the next id."""
    def __init__(self, config):
        super().__init__()
        self.config, self.quantized = config, None  # or int8, int4: see `quantize`
        self.activation_checkpointing = False  # True: keep only each block's input for backward
        self.kinds = (config.attention.split(",") * config.n_layer)[: config.n_layer]
        # a unit variance suits the norms; as output weights it would make logits too large
        self.std = 1 / math.sqrt(config.n_embd) if config.tie_embeddings else 1.0
        self.embedding = Embedding(config.vocab_size, config.n_embd, self.std)
        if config.position == "learned":
            self.positions = Embedding(config.block_size, config.n_embd, self.std)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in self.kinds)
        self.final_norm = make_norm(config) if config.norm_place == "pre" else nn.Identity()
        self.head = Linear(config.n_embd, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        # every block adds to the residual stream twice: start with small steps, as GPT-2 does
        for name, p in self.blocks.named_parameters():
            if name.endswith(("o_proj.weight", "w2.weight")):
                p.data *= 1 / math.sqrt(2 * config.n_layer)

    def forward(self, ids, cache=None, positions=None, last=0, hidden=False):
        """ids: (B, T) int64 -> logits: (B, T, V). cache: a `Cache` of the tokens before these, and
        afterwards of these, too. positions: (B, S), those before included: see `Where`. last: of so
        many last positions only; 0: all. hidden: the head's input instead. Raises ValueError."""
        T, S = ids.shape[1], ids.shape[1] + (cache.length if cache else 0)
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens are more than block_size {self.config.block_size}")
        where = Where(T, S, positions, self.config, ids.device)
        x = self.embed(ids, where.at)
        call = functools.partial(checkpointed, use_reentrant=False) if self.training and \
            self.activation_checkpointing else lambda block, *args: block(*args)
        for block, past in zip(self.blocks, cache.layers if cache else [None] * len(self.blocks)):
            x = call(block, x, where, past)
        if cache:
            cache.length = S
        x = self.final_norm(x[:, -last:])  # (-0: of all)
        return x if hidden else self.logits(x)

    def embed(self, ids, at):
        """The input of the first block: ids (B, T) at positions (B, T) or (T,) -> (B, T, C)"""
        x, C = self.embedding(ids), self.config.n_embd
        if self.config.position == "learned":
            x = x + self.positions(at)
        elif self.config.position == "sinusoidal":  # (Vaswani et al. 2017; the positive half)
            cos, sin = (a[..., (C + 1) // 2 :] for a in rope_angles(at, C + C % 2))
            x = x + self.std * torch.cat((sin, cos), -1)[..., :C].to(x.dtype)
        return self.dropout(x)

    def logits(self, hidden):
        """The head. (..., C) -> (..., V)"""
        logits, cap = self.head(hidden), self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def auxiliary_loss(self):
        """What mixtures of experts add to the loss of the last forward pass; 0 without any."""
        return sum(getattr(block.ffn, "loss", 0.0) for block in self.blocks)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(),
                 generator=None, on_token=None):
        """Continue texts, token by token. prompts: lists of ids, or (B, T) int64 -> list of lists.
        max_new_tokens: a number, or a list of one for each. temperature, top_k, top_p, generator:
        see `sample`. stop: an id, or several, that end a text. on_token: called with (number of the
        text, id) for each new one. Of texts longer than block_size the model sees the end."""
        texts, limit = [list(map(int, text)) for text in prompts], self.config.block_size
        if not all(texts):
            raise ValueError("a text without an id cannot be continued")
        device, was_training, cache = self.embedding.weight.device, self.training, None
        most = max_new_tokens if type(max_new_tokens) is list else [max_new_tokens] * len(texts)
        ends = [len(text) + n for text, n in zip(texts, most)]
        stop = {stop} if type(stop) is int else set(stop or ())
        rows = [i for i, text in enumerate(texts) if len(text) < ends[i]]  # those not done
        self.eval()
        while rows:
            if cache is None or cache.length == limit:  # read all; again when the window moves
                cache, seen = Cache(self), [texts[i][-limit:] for i in rows]
                longest = max(map(len, seen))
                pads = [longest - len(text) for text in seen]
                new = [[0] * n + text for n, text in zip(pads, seen)]
                pad = torch.tensor(pads, device=device)[:, None] if any(pads) else None
            else:
                new = [texts[i][-1:] for i in rows]
            S = cache.length + len(new[0])
            positions = None if pad is None else (torch.arange(S, device=device) - pad).clamp(min=0)
            logits = self(torch.tensor(new, device=device), cache, positions, last=1)[:, 0]
            ids = sample(logits, temperature, top_k, top_p, generator).tolist()
            for i, token in zip(rows, ids):
                texts[i].append(token)
                if on_token:
                    on_token(i, token)
            alive = [j for j, i in enumerate(rows)
                     if len(texts[i]) < ends[i] and ids[j] not in stop]
            if len(alive) < len(rows):
                cache.change(lambda x: x[alive])
                rows, pad = [rows[j] for j in alive], None if pad is None else pad[alive]
        self.train(was_training)
        return texts

# ---- Sampling.

def token_probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that `sample` draws from. logits: (..., V) -> (..., V), float32."""
    if not (temperature >= 0 and (top_k or 1) > 0 and 0 < (top_p or 1) <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k} or top_p {top_p} has no sense")
    if temperature < 1e-6:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = upcast(logits) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = softmax(logits)
    if top_p:
        ordered, order = p.sort(descending=True)
        drop = ordered.cumsum(-1) - ordered >= top_p  # the likelier ids are enough
        p = p.scatter(-1, order, ordered.masked_fill(drop, 0.0))  # back in the order of ids
    return p / p.sum(-1, keepdim=True)

def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next ids. logits: (B, V) -> (B,) int64. Logits are divided by temperature; 0 takes
    the likeliest id. top_k: only the k likeliest ids; top_p: the fewest with this probability."""
    p = token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(p, 1, generator=generator)[:, 0] if temperature else p.argmax(-1)

@torch.no_grad()
def speculate(target, draft, text, max_new_tokens, gamma=4, temperature=1.0, top_k=None, top_p=None,
              stop=(), generator=None, on_token=None):
    """Continue a text with the distribution of target.generate, in fewer calls of the target
    (Leviathan et al. 2023; Chen et al. 2023). The small model `draft` proposes gamma tokens; one
    call of the target gives p for all of their places. A proposal x drawn from q is kept with
    probability min(1, p(x) / q(x)); in place of the first one rejected, an id is drawn from max(0,
    p - q), normalised; if all are kept, one from the last p. It ends where either window is full.
    text: list of ids, not empty -> (text, {"proposed", "accepted", "calls" of the target}). Raises
    ValueError for a state, which cannot take guesses back."""
    if {"linear", "hyena"} & {*target.kinds, *draft.kinds} or not 0 < gamma < SLACK:
        raise ValueError(f"guesses cannot be taken back by a state, nor {SLACK} or more at a time")
    text, how = list(text), (temperature, top_k, top_p)
    end = min(len(text) + max_new_tokens, target.config.block_size, draft.config.block_size)
    stop, done = {stop} if type(stop) is int else {*(stop or ())}, False
    caches, counts = (Cache(target.eval()), Cache(draft.eval())), collections.Counter()

    def draw(p):
        return torch.multinomial(p, 1, generator=generator).item()

    def ask(model, cache, text, last):  # -> the probabilities after the last tokens of the text
        new = torch.tensor([text[cache.length :]], device=model.embedding.weight.device)
        return token_probabilities(model(new, cache, last=last)[0], *how)

    while len(text) < end and not done:
        n, guesses, q, kept = min(gamma, end - len(text) - 1), [], [], 0
        for _ in range(n):
            q.append(ask(draft, caches[1], text + guesses, 1)[0])
            guesses.append(draw(q[-1]))
        p = ask(target, caches[0], text + guesses, n + 1)
        while kept < n and torch.rand(1, generator=generator, device=p.device).item() * \
                q[kept][guesses[kept]] < p[kept][guesses[kept]]:
            kept += 1
        last = draw((p[kept] - q[kept]).clamp(min=0) if kept < n else p[n])
        for token in guesses[:kept] + [last]:
            if not done:
                text.append(token)
                if on_token:
                    on_token(0, token)
            done = done or token in stop
        for cache in caches:
            cache.cut(min(cache.length, len(text) - 1))
        counts.update(proposed=n, accepted=kept, calls=1)
    return text, counts

# ---- Quantization: a new token needs every weight once, so fewer bytes take less time.

GROUP = 32  # int4: weights that share a scale

class QuantizedLinear(nn.Module):
    """A Linear whose weights are scale * integer + low. int8, (d_out, d_in): -127 to 127, a scale
    for each row, no `low`. int4, (d_out, d_in / 2) uint8: two of 0 to 15 in a byte, the low half
    first; scale and low for each GROUP weights of a row, its end padded by zeros."""
    def __init__(self, linear, kind):
        super().__init__()
        w, self.bias, low = linear.weight.detach().float(), linear.bias, None
        self.d_in = w.shape[1]
        if kind == "int8":
            scale = (w.abs().amax(1) / 127).clamp(min=1e-30)
            weight = (w / scale[:, None]).round().to(torch.int8)
        else:
            w = F.pad(w, (0, -self.d_in % GROUP)).unflatten(1, (-1, GROUP))
            low, high = w.aminmax(dim=-1)
            scale = ((high - low) / 15).clamp(min=1e-30)
            weight = ((w - low[..., None]) / scale[..., None]).round().to(torch.uint8).flatten(1)
            weight = weight[:, 0::2] | weight[:, 1::2] << 4
        for name, x in {"weight": weight, "scale": scale, "low": low}.items():
            self.register_buffer(name, x)

    def rows(self):
        """The weights as float32: (d_out, d_in)"""
        weight, scale = self.weight, self.scale[..., None]
        if self.low is None:
            return weight * scale
        weight = torch.stack((weight & 15, weight >> 4), -1).flatten(-2).unflatten(-1, (-1, GROUP))
        return (weight * scale + self.low[..., None]).flatten(-2)[..., : self.d_in]

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        rows = x.flatten(0, -2)
        if not 0 < len(rows) <= 32:  # for more, turning the integers into floats is worth it
            return F.linear(x, self.rows().to(x.dtype), self.bias)
        if x.is_cuda:
            import kernels
            y = (kernels.int8_matmul(rows, self.weight, self.scale) if self.low is None else
                 kernels.int4_matmul(rows, self.weight, self.scale, self.low))
        elif self.low is None and self.d_in % 32 == 0:  # reads the integers themselves
            one = torch.ones_like(self.scale, dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, one) * self.scale
        else:
            y = rows @ self.rows().to(x.dtype).T
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)

def quantize(model, kind):
    """Make a Transformer's linear layers int8 or int4, in place -> the model. The head, which
    matters most, becomes int8 in any case; embeddings and routers stay. Raises ValueError."""
    if model.quantized or kind not in ("int8", "int4"):
        raise ValueError(f"can't make {kind} of {model.quantized or 'floats'}: int8 or int4, once")
    kept = ("router", "k_up", "v_up", "filter_in", "filter_out")  # used as matrices, or small
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and name not in kept:
                setattr(parent, name, QuantizedLinear(child, kind))
    model.head, model.quantized = QuantizedLinear(model.head, "int8"), kind
    return model.requires_grad_(False)

# ---- Pruning: a smaller model out of a larger one, to be trained a little more.

@torch.no_grad()
def prune(model, ids, n_layer=0, d_ff=0):
    """Keep the n_layer blocks that turn their input most (Men et al. 2024), and in each the d_ff
    units of largest activation (Muralidharan et al. 2024), on ids (B, T) of text. 0: all."""
    c, same, size, hooks = model.config, [], [], []
    n_layer, d_ff = n_layer or c.n_layer, d_ff or c.d_ff
    for block in model.blocks:
        hooks.append(block.register_forward_hook(lambda _, args, y: same.append(
            F.cosine_similarity(args[0], y, dim=-1).mean().item())))
        if d_ff != c.d_ff:  # (experts have no w2 of their own: AttributeError)
            hooks.append(block.ffn.w2.register_forward_hook(
                lambda _, args, y: size.append(args[0].abs().mean((0, 1)))))
    model(ids)
    for hook in hooks:
        hook.remove()
    kept = sorted(sorted(range(c.n_layer), key=same.__getitem__)[:n_layer])
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("blocks.")}
    for new, old in enumerate(kept):
        units = size[old].topk(d_ff).indices.sort().values if size else slice(None)
        for name, x in model.blocks[old].state_dict().items():
            if name.startswith(("ffn.w1", "ffn.w3")):
                x = x[units]
            state[f"blocks.{new}.{name}"] = x[:, units] if name == "ffn.w2.weight" else x
    kinds = ",".join(model.kinds[i] for i in kept)
    small = Transformer(dataclasses.replace(c, n_layer=n_layer, d_ff=d_ff, attention=kinds))
    small.load_state_dict(state)
    return small.to(ids.device).eval()

# ---- Checkpoints: one torch.save of a dict of tensors and plain values.

@contextlib.contextmanager
def replacing(path, mode="wb", **how):
    """A file of this process's own that takes the place of `path` once it is whole and on the disk;
    what writers that were killed have left is removed."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for name in glob.glob(f"{glob.escape(str(path))}.*.tmp"):
        with contextlib.suppress(ValueError, OverflowError, PermissionError):  # (not ours)
            try:
                os.kill(int(name.split(".")[-2]), 0)  # (signal 0 only asks whether it runs)
            except ProcessLookupError:
                pathlib.Path(name).unlink(missing_ok=True)  # (it may just have been renamed)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)

def save_checkpoint(path, model, optimizers=(), **more):
    """Write a model, its optimizers and what else there is: step, rng, args, tokenizer (the text of
    tokenizer.json), template, stop, begin, names. For state dicts the `config` is given, too."""
    config = more.pop("config", getattr(model, "config", None))
    parts = [x if isinstance(x, dict) else x.state_dict() for x in (model, *optimizers)]
    with replacing(path) as file:
        torch.save({"config": vars(config) if config else None, "model": parts[0], "optimizer":
                    parts[1:], "quantize": getattr(model, "quantized", None), **more}, file)

def load_checkpoint(path, device="cpu"):
    """-> (Transformer in eval mode, the dict that was saved). Only tensors and plain values are
    read, so a file from a stranger cannot run code. Raises ValueError, OSError."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        state, config = checkpoint["model"], TransformerConfig(**checkpoint["config"])
        for name, x in state.items():
            if x.untyped_storage().nbytes() < x.nbytes:  # strides of 0: gigabytes in a small file
                raise ValueError(f"{name} has fewer bytes than numbers")
        return from_state(config, state, device, checkpoint.get("quantize")), checkpoint
    except Exception as error:  # what torch raises for broken files varies
        why = re.split(r"\n|\. ", str(error) or "it ends too early")[0]
        raise ValueError(f"{path} is no checkpoint as train.py makes it ({why}); for other models: "
                         "python model.py import FOLDER") from None

def from_state(config, state, device="cpu", quantized=None):
    """A Transformer in eval mode with the tensors of a state dict. Raises ValueError and others."""
    if config.n_layer * (config.n_expert if config.activation == "moe" else 1) > len(state):
        raise ValueError("it has too few tensors")  # a small file must not cost minutes
    with torch.device("meta"):  # shapes without numbers
        model = Transformer(config)
    model = quantize(model, quantized) if quantized else model
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings and not quantized:
        model.head.weight = model.embedding.weight
    return model.to(device).eval()

def pick_device(name="auto"):
    """The best device there is, or the one asked for."""
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    return name if name != "auto" else "cuda" if cuda else "mps" if mps else "cpu"

# ---- Folders in the format of Hugging Face's transformers.

# ours=theirs: numbers in config.json, and parts of names of tensors; Llama's names are those of
# all families but GPT-2
NUMBERS, TENSORS, GPT2_KEYS, GPT2_TENSORS = (
    dict(pair.split("=") for pair in table.split()) for table in ("""
    vocab_size=vocab_size block_size=max_position_embeddings n_layer=num_hidden_layers
    n_head=num_attention_heads n_kv_head=num_key_value_heads n_embd=hidden_size head_size=head_dim
    d_ff=intermediate_size norm_eps=rms_norm_eps rope_theta=rope_theta
    tie_embeddings=tie_word_embeddings""", """
    embedding=model.embed_tokens final_norm=model.norm head=lm_head blocks.=model.layers.
    attn_norm=input_layernorm ffn_norm=post_attention_layernorm attn.=self_attn.
    ffn.w1=mlp.gate_proj ffn.w2=mlp.down_proj ffn.w3=mlp.up_proj""", """
    max_position_embeddings=n_positions num_hidden_layers=n_layer num_attention_heads=n_head
    hidden_size=n_embd rms_norm_eps=layer_norm_epsilon intermediate_size=n_inner""", """
    embedding=transformer.wte positions=transformer.wpe final_norm=transformer.ln_f head=lm_head
    blocks.=transformer.h. attn_norm=ln_1 ffn_norm=ln_2 attn.q_proj=attn.c_attn
    attn.k_proj=attn.c_attn attn.v_proj=attn.c_attn attn.o_proj=attn.c_proj ffn.w1=mlp.c_fc
    ffn.w2=mlp.c_proj"""))
# {model_type: (architecture, what all such models have, the values of keys that are absent)}
LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
         "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False}
QWEN = LLAMA | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "max_window_layers":
                28, "use_sliding_window": False, "sliding_window": 4096}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}, LLAMA),
    "mistral": ("MistralForCausalLM", {}, LLAMA | {"sliding_window": 4096, "num_key_value_heads": 8,
                                                   "max_position_embeddings": 131072}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}, QWEN),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}, QWEN | {"head_dim": 128}),
    "gpt2": ("GPT2LMHeadModel", {"position": "learned", "norm": "layernorm", "bias": True,
                                 "activation": "gelu_tanh"},
             LLAMA | {"max_position_embeddings": 1024, "intermediate_size": None,
                      "rms_norm_eps": 1e-5, "tie_word_embeddings": True})}
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "scale_attn_weights":
         True, "partial_rotary_factor": 1.0, "activation_function": "gelu_new",
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}  # as ours is
ROPE = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"

def their_name(ours, family):
    """blocks.3.ffn.w1.weight -> model.layers.3.mlp.gate_proj.weight"""
    table = GPT2_TENSORS if family == "gpt2" else TENSORS
    return functools.reduce(lambda name, pair: name.replace(*pair), table.items(), ours)

def config_from(theirs):
    """Their config.json, a dict -> (TransformerConfig, family). Raises ValueError for models that
    ours cannot be, KeyError for a size that is missing."""
    family = theirs.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not among {', '.join(FAMILIES)}")
    rope = (theirs.get("rope_scaling") or {}) | (theirs.get("rope_parameters") or {})
    keys = {gpt2: llama for llama, gpt2 in GPT2_KEYS.items()} if family == "gpt2" else {}
    theirs = {keys.get(key, key): value for key, value in theirs.items()}
    ours, theirs = dict(FAMILIES[family][1]), FAMILIES[family][2] | theirs | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    wrong = [f"{key} {theirs[key]}" for key in FIXED if theirs.get(key, FIXED[key]) != FIXED[key]]
    if wrong or kind not in ("default", "llama3"):
        raise ValueError(f"a {family} with {', '.join(wrong) or 'rope ' + kind} can't be imported")
    ours |= {name: theirs[key] for name, key in NUMBERS.items() if theirs[key] is not None}
    if kind == "llama3":
        ours["rope_scaling"] = ",".join(str(float(rope[key])) for key in ROPE)
    window = theirs["sliding_window"] if "sliding_window" in FAMILIES[family][2] else None
    if window and theirs.get("use_sliding_window", True):
        n, full = ours["n_layer"], theirs.get("max_window_layers", 0)
        kinds = theirs.get("layer_types") or ["full"] * min(n, full) + ["sliding"] * (n - full)
        ours |= {"window": window, "attention": ",".join(kinds).replace("_attention", "")}
    return TransformerConfig(**ours), family

def read_safetensors(path):
    """-> {name: tensor} of the floating-point tensors. Raises ValueError, KeyError, OSError."""
    size, found = os.path.getsize(path), {}
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > size - 8:
            raise ValueError(f"{path} is no safetensors file, or not all of it")
        header = json.loads(file.read(n))
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n :]  # memory-mapped
    for name, part in header.items():
        if kind := kinds.get(part.get("dtype")):  # (not __metadata__, nor the masks of GPT-2)
            (begin, end), shape = part["data_offsets"], part["shape"]
            size = math.prod(shape) * kind.itemsize
            if not 0 <= begin <= end <= len(data) or end - begin != size:
                raise ValueError(f"{path} has no room for {name}")
            found[name] = data[begin:end].clone().view(kind).view(shape)
    return found

def read_text(*path):
    """A file of UTF-8 text, or "" if there is none."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(*path), encoding="utf8") as file:
        return file.read()
    return ""

def import_folder(folder):
    """A folder as transformers writes it, of one of the FAMILIES -> (Transformer in eval mode,
    float32; what `settings_from` finds). Raises ValueError, KeyError, RuntimeError, OSError."""
    config, family = config_from(json.loads(read_text(folder, "config.json") or "{}"))
    index = json.loads(read_text(folder, "model.safetensors.index.json") or "{}")
    theirs, state = {}, {}
    for name in {*index.get("weight_map", {"": "model.safetensors"}).values()}:
        theirs |= read_safetensors(os.path.join(folder, os.path.basename(name)))
    if family == "gpt2" and "wte.weight" in theirs:  # OpenAI's own files lack the prefix
        theirs = {f"transformer.{name}": x for name, x in theirs.items()}
    if config.tie_embeddings:  # a head of its own in the file wins
        table = theirs[their_name("embedding.weight", family)]
        config.tie_embeddings = torch.equal(theirs.setdefault("lm_head.weight", table), table)
    with torch.device("meta"):
        names = {ours: their_name(ours, family) for ours in Transformer(config).state_dict()}
    for ours, name in names.items():
        x, part = theirs[name], re.search("attn.([qkv])_proj", ours)
        if family == "gpt2" and "blocks." in ours:
            x = x.chunk(3, -1)["qkv".index(part[1])] if part else x
            x = x.t() if x.ndim == 2 else x
        state[ours] = x.float().contiguous()
    left = {*theirs} - {*names.values()}  # (some files have frequencies and masks)
    if left := [name for name in left if not re.search(r"inv_freq$|attn\.\w*bias$", name)]:
        raise ValueError(f"{folder} has tensors without a place in a {family}: {left[:3]}")
    return from_state(config, state), settings_from(folder)

def settings_from(folder):
    """What a folder says beside its weights -> {tokenizer: the text of tokenizer.json, template: in
    Jinja, stop: ids that end a text, begin: the id that begins one, names: what templates read}."""
    from bpe import Tokenizer
    said = {}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        said |= json.loads(read_text(folder, name) or "{}")  # the later wins
    names = {key: x["content"] if isinstance(x, dict) else x for key, x in said.items()
             if x is not None and re.fullmatch("add_bos_token|(bos|eos|pad|unk)_token(_id)?", key)}
    template = said.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    template = read_text(folder, "chat_template.jinja") or template
    text = read_text(folder, "tokenizer.json")
    try:  # (without that file: vocab.json and merges.txt)
        tokenizer = Tokenizer.from_json(text) if text else Tokenizer.from_file(folder)
    except (OSError, ValueError) as error:
        print(f"its tokenizer is not taken over: {error}", file=sys.stderr)
        return {"template": template, "names": names}
    text, special = text or tokenizer.to_json(), tokenizer.special_tokens
    stop, bos = names.get("eos_token_id", []), names.get("bos_token")
    stop = {*(stop if isinstance(stop, list) else [stop]), special.get(names.get("eos_token"))}
    after = json.dumps(json.loads(text).get("post_processor"))
    begins = names.get("add_bos_token") or bos and json.dumps(bos) in after
    return {"tokenizer": text, "template": template, "stop": sorted(stop - {None}),
            "begin": special.get(bos) if begins else None, "names": names}

def export_folder(model, folder, checkpoint):
    """Write a model, and what its checkpoint has beside it, as a new folder that transformers
    opens -> its family there. Raises ValueError if there is no such family, OSError."""
    c, kinds = model.config, model.kinds
    family = ("gpt2" if c.position == "learned" else "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias
              else "mistral" if {*kinds} == {"sliding"} else "llama")
    theirs = {"model_type": family, "architectures": [FAMILIES[family][0]], "dtype": "float32"}
    for name, key in NUMBERS.items():
        theirs[GPT2_KEYS.get(key, key) if family == "gpt2" else key] = getattr(c, name)
    if c.rope_scaling:
        *numbers, length = map(float, c.rope_scaling.split(","))
        theirs["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE, (*numbers, int(length))))}
    if "sliding" in kinds:
        theirs |= {"sliding_window": c.window, "use_sliding_window": True,
                   "layer_types": [f"{kind}_attention" for kind in kinds]}
    back = config_from(theirs)[0]  # it has to be the same, but for what is of no matter here
    free = "dropout window kv_rank rope_size n_expert top_k balance_weight".split()
    back.attention = back.attention.replace(",".join(kinds), c.attention)
    wrong = [n for n in vars(c) if getattr(back, n) != getattr(c, n) and n not in free]
    if wrong or model.quantized:
        raise ValueError(f"it is no {family}: {model.quantized or ', '.join(wrong)}")
    tensors, header, end = {}, {"__metadata__": {"format": "pt"}}, 0
    for ours, x in model.state_dict().items():
        if ours != "head.weight" or not c.tie_embeddings:
            name, turn = their_name(ours, family), family == "gpt2" and "blocks." in ours
            x = (x.t() if turn and x.ndim == 2 else x).float().cpu()
            tensors[name] = torch.cat((tensors[name], x), -1) if name in tensors else x
    for name, x in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(x.shape),
                        "data_offsets": [end, end := end + 4 * x.numel()]}
    header = json.dumps(header).encode()
    names = checkpoint.get("names") or {"eos_token_id": checkpoint.get("stop")}
    ids = {key: value for key, value in names.items() if key.endswith("_id")}
    tokens = {key: value for key, value in names.items() if key not in ids}
    os.path.isdir(folder) and os.rmdir(folder)  # (OSError if there is something in it)
    os.makedirs(temporary := f"{os.path.normpath(folder)}.{os.getpid()}.tmp")
    with open(os.path.join(temporary, "model.safetensors"), "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.writelines(x.contiguous().numpy().data for x in tensors.values())
    tokens["chat_template"] = checkpoint.get("template")
    contents = {"config": theirs | ids, "generation_config": ids, "tokenizer_config": tokens,
                "tokenizer": json.loads(checkpoint.get("tokenizer") or "{}")}
    for name, content in contents.items():
        with open(os.path.join(temporary, f"{name}.json"), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
    os.rename(temporary, folder)
    return family

# ---- Resource accounting: what a model costs.

def count(config):
    """-> ({part: parameters}, {part: FLOPs per token}) of a forward pass over block_size tokens, a
    third of training: products with weights (of the experts that a token meets), and scores and
    sums of values over what the mask leaves."""
    c, parameters, flops = config, collections.Counter(), collections.Counter()
    with torch.device("meta"):  # shapes without numbers
        model = Transformer(c)
    for name, p in model.named_parameters(remove_duplicate=False):
        part = name.split(".")[2 if name.startswith("blocks.") else 0]
        part = "norms" if part.endswith("norm") else part
        share = c.top_k / c.n_expert if ".experts." in name else 1
        parameters[part] += 0 if part == "head" and c.tie_embeddings else p.numel()
        if p.ndim == 2 and part not in ("embedding", "positions") and "filter" not in name:
            flops[part] += 2 * p.numel() * share
    T, width, W = c.block_size, c.n_head * c.head_size, min(c.window, c.block_size)
    for kind in model.kinds:
        flops["scores and values"] += int({
            "full": 2 * width * T, "sliding": 4 * width * (W - W * (W - 1) / 2 / T),
            "linear": 4 * width * (min(T, 64) + c.head_size),  # inside a chunk, and the state
            "latent": (2 * width + c.n_head * c.rope_size) * T,
            "hyena": c.n_embd * 15 * math.log2(2 * T)}[kind])  # three transforms of 2 T numbers
    return parameters, flops

def info(config, batch_size):
    """Print what a model of this config costs."""
    (parameters, flops), c = count(config), config
    kept = c.n_layer * (12 * c.n_embd + 4 * c.d_ff) + 4 * c.n_embd + 2 * c.vocab_size  # a token
    memory = {"weights": 4, "gradients": 4, "optimizer (AdamW)": 8}
    memory = {part: n * parameters.total() for part, n in memory.items()}
    memory["activations, about"] = 4 * batch_size * c.block_size * kept
    for title, table in (("parameters", parameters), ("FLOPs per token, forward", flops),
                         (f"bytes to train on {batch_size} texts in float32", memory)):
        total = sum(table.values())
        print(f"{title:40}{total:20,.0f}")
        for part, value in table.items():
            print(f"  {part:38}{value:20,.0f}{value / total:8.1%}")
    print(f"FLOPs per token, training: {3 * flops.total():,.0f}")

# ---- Chat: a template, a stranger's program in Jinja, makes one text of a conversation.

TEMPLATES = {  # for models without one
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
              "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
    "plain": "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == "
             "'assistant' }}\n{% endfor %}{{ 'assistant:' if add_generation_prompt }}"}
MARK = "\U000f0000"  # a private character, put into what looks like a special token and is none

@functools.lru_cache
def compiled(template):
    """Jinja's sandbox, set up as transformers does it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    sandbox.globals["strftime_now"] = time.strftime
    # ({% generation %}, around what the assistant says, has no effect on the text)
    return sandbox.from_string(re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", template))

def render(template, messages, reply=True, **names):
    """The text of a list of {"role": ..., "content": ...}; with reply, up to where the assistant
    speaks next. names: bos_token, eos_token and what else a template reads. Raises ValueError."""
    import resource

    def fail(why, frame=None):  # called by templates and, with a frame, by the alarm
        raise SystemExit("it takes too long") if frame else ValueError(why)

    names = {"tools": None, "documents": None, "raise_exception": fail, **names}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 3, 1)
    try:
        with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:  # Linux
            used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
        text = compiled(template).render(messages=messages, add_generation_prompt=reply, **names)
        return text if len(text) < 10**7 else fail("its text is too long")
    except (Exception, SystemExit) as error:  # (Jinja itself catches Exception in places)
        raise ValueError(f"the chat template fails: {error!r:.300}") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)

def encode_chat(tokenizer, template, messages, reply=True, **names):
    """The ids of what `render` returns, where nothing in a message is a special token."""
    special = tokenizer.special_tokens
    known = "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or MARK  # longest win
    firsts = "|".join(f"{re.escape(s[0])}(?={re.escape(s[1:])})" for s in special if s.strip())
    spared = {"assistant": "(?!</?think>)"}  # thinking aloud, which templates look for
    messages = [{key: re.sub(f"{spared.get(m['role'], '')}(?:{firsts or MARK})", rf"\g<0>{MARK}",
                             m[key].replace(MARK, "")) for key in m} for m in messages]
    parts = re.split(f"({known})(?!{MARK})", render(template, messages, reply, **names))
    return [i for part in parts for i in ([special[part]] if part in special else
                                          tokenizer.encode_ordinary(part.replace(MARK, "")))]

def chat_stops(tokenizer, template, **names):
    """Ids that end a reply: of the first special token after one, and of the end of a text."""
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    after = [render(template, talk, more, **names).partition(MARK)[2] for more in (False, True)]
    ids = [i for i in tokenizer.encode("".join(after)) if i in tokenizer.special_tokens.values()]
    return [i for i in (*ids[:1], tokenizer.eot_id) if i is not None]

def chat(model, tokenizer, template, names, system, max_new_tokens, stop, **how):
    """Talk, line by line from standard input, until its end."""
    messages, first = [{"role": "system", "content": system}] * bool(system), bool(system)
    stop = {*stop, *chat_stops(tokenizer, template, **names)}
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        while len(ids := encode_chat(tokenizer, template, messages, **names)) + max_new_tokens > \
                model.config.block_size and len(messages) > first + 2:
            del messages[first : first + 2]  # forget what was said first
        text, = model.generate([ids], max_new_tokens, stop=stop, on_token=printer(tokenizer, stop),
                               **how)
        print()
        reply = tokenizer.decode([i for i in text[len(ids) :] if i not in stop])
        messages.append({"role": "assistant", "content": reply.strip()})

def printer(tokenizer, stop):
    """-> a function for `on_token` that prints ids; half a character waits for the rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return lambda _, i: i in stop or print(
        decoder.decode(tokenizer.vocab.get(i, b"")), end="", flush=True)

# ---- The command line.

SWITCH = {"type": lambda text: bool(json.loads(text.lower())), "nargs": "?", "const": True,
          "metavar": "True"}  # --bias, --bias=True, --bias=False

def add_config_flags(add):
    """--n_layer and so on, as TransformerConfig has them; None where one is not given."""
    for field in dataclasses.fields(TransformerConfig):
        how = SWITCH if field.type is bool else {"type": field.type, "metavar": "X"}
        add(f"--{field.name}", **how, help=f"default {field.default}")

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"model.py: error: {message}\n")
    add = parser.add_argument
    add("command", nargs="?", default="sample", choices=(
        "sample", "chat", "info", "prune", "quantize", "import", "export"))
    add("folder", nargs="?", help="import, export: in the format of transformers")
    add("--ckpt", default="out/ckpt.pt", help="the checkpoint to read (default out/ckpt.pt)")
    add("--out", help="prune, quantize, import: the checkpoint to write (default out/COMMAND.pt)")
    add("--prompt", "--start", default="", help="text to continue (default: a new document)")
    for name, default, text in (
            ("num_samples", 1, "texts"), ("max_new_tokens", 200, "tokens of each"),
            ("temperature", 0.8, "0: always the likeliest token"), ("seed", 1337, "of the draws"),
            ("gamma", 4, "tokens that the draft guesses"), ("device", "auto", "or cpu, cuda, mps"),
            ("batch_size", 32, "texts, for info")):
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default {default})")
    add("--top_p", type=float, help="draw from the likeliest tokens that have this probability")
    add("--draft", help="a small checkpoint that guesses ahead; the distribution stays the same")
    add("--quantize", choices=("int8", "int4"), help="weights as integers")
    add("--system", help="chat: what the assistant is told to be")
    add("--template", choices=TEMPLATES, help="chat: in place of the checkpoint's")
    add_config_flags(parser.add_argument_group(
        "sizes, for info and prune (--top_k is for sampling, too)").add_argument)
    args = parser.parse_args()
    if (args.command in ("import", "export")) != bool(args.folder):
        parser.error("import and export, and no other command, take a folder")
    if args.command == "info":
        names = vars(TransformerConfig())
        sizes = {k: v for k, v in vars(args).items() if k in names and v is not None}
        saved = {} if sizes else vars(load_checkpoint(args.ckpt)[0].config)
        return info(TransformerConfig(**saved | sizes), args.batch_size)
    out = args.out or os.path.join("out", f"{args.command}.pt")
    if args.command == "import":
        model, more = import_folder(args.folder)
        save_checkpoint(out, model, **more)
        return print(f"{out}: weights, " + ", ".join(key for key in more if more[key]))
    device = pick_device(args.device)
    model, checkpoint = load_checkpoint(args.ckpt, device)
    if args.command == "export":
        return print(f"{args.folder}: a {export_folder(model, args.folder, checkpoint)}")
    from bpe import Tokenizer
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{args.ckpt} has no tokenizer, as data without a tokenizer.json has none")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    eot = tokenizer.eot_id
    names = checkpoint.get("names") or {"eos_token": tokenizer.vocab.get(eot, b"").decode()}
    stop = {*(checkpoint.get("stop") or ()), eot}
    how = {k: vars(args)[k] for k in ("max_new_tokens", "temperature", "top_k", "top_p")}
    how |= {"stop": stop, "generator": torch.Generator(device).manual_seed(args.seed)}
    begin = checkpoint.get("begin", eot)  # a document of ours comes after the end of another
    ids = ([] if begin is None else [begin]) + tokenizer.encode(args.prompt) or [eot]
    if args.command == "prune":  # measured on what the model itself writes
        texts = model.generate([ids] * 16, min(256, model.config.block_size - len(ids)),
                               generator=how["generator"])
        model = prune(model, torch.tensor(texts, device=device), args.n_layer, args.d_ff)
    if args.quantize or args.command == "quantize":
        quantize(model, args.quantize or "int8")
    if args.command == "chat":
        template = TEMPLATES.get(args.template) or checkpoint.get("template") or TEMPLATES["plain"]
        return chat(model, tokenizer, template, names, args.system, **how)
    if args.command in ("prune", "quantize"):
        keys = {*checkpoint} - {"config", "model", "quantize", "optimizer"}
        save_checkpoint(out, model, **{key: checkpoint[key] for key in keys})
        return print(f"{out}: {os.path.getsize(out):,} bytes")
    draft = load_checkpoint(args.draft, device)[0] if args.draft else None
    for i in range(args.num_samples):
        print("---------------\n" * (i > 0) + args.prompt, end="", flush=True)
        how["on_token"] = printer(tokenizer, stop)
        if draft:
            print(dict(speculate(model, draft, ids, gamma=args.gamma, **how)[1]), file=sys.stderr)
        else:
            model.generate([ids], **how)
        print()

if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # (what a stranger's file can raise varies)
        sys.exit(f"model.py: error: {' '.join(str(error).split()):.300}")
