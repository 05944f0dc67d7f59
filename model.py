"""
The Transformer language model, written from its parts, and everything needed to run one.

    python model.py                                  # sample from out/ckpt.pt
    python model.py --prompt "def main(" --num_samples 3 --temperature 0.8 --top_p 0.9
    python model.py --draft small.pt --gamma 4       # speculative decoding
    python model.py chat --template chatml           # several turns (the template: see align.py)
    python model.py info                             # parameters, FLOPs and memory of out/ckpt.pt
    python model.py info --n_layer 12 --n_head 12 --n_embd 768 --vocab_size 50257 --batch_size 64
    python model.py prune --n_layer 2 --d_ff 256 --out small.pt   # then train.py --teacher
    python model.py quantize --quantize int4 --out q.pt           # or int8; then --ckpt q.pt
    python model.py import DIR --out theirs.pt       # a model folder in Hugging Face's format
    python model.py export out/ckpt.pt DIR           # a folder that transformers opens

The default is a pre-norm decoder as in Llama (Touvron et al. 2023): RMSNorm, rotary positions,
SwiGLU, no biases. Every part has alternatives (see TransformerConfig): older ones, enough to build
GPT-2 (Radford et al. 2019), and newer ones: sliding-window, linear and latent attention, Hyena,
mixtures of experts.

Names are nanoGPT's. In the terms of a course: n_embd = d_model, n_layer = num_layers,
n_head = num_heads, block_size = context_length, and d_ff is d_ff. In the comments: B batch, T time
(position in the sequence), C channels (n_embd), H heads, D head size (C / H), V vocabulary.
"""

import argparse
import codecs
import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

kernels = None  # kernels.py, once `Transformer.use_kernels` has imported it

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

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        # F.linear is x @ weight.T + bias, with the addition inside the matrix product
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A vector for each of n ids: row i of the table. weight: (n, d)"""

    def __init__(self, n, d, std=1.0, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, 0.0, std, -3 * std, 3 * std)

    def forward(self, ids):  # (...) int64 -> (..., d)
        # the same as self.weight[ids]; the backward pass of indexing is several times slower
        return F.embedding(ids, self.weight)


class Dropout(nn.Dropout):
    """Dropout in training; when there is nothing to drop, not even a function call."""

    def forward(self, x):  # (...) -> (...)
        return super().forward(x) if self.training and self.p else x


def upcast(x):
    """x in float32; float64 stays as it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def inverse_rms(h, eps):
    """1 / sqrt(mean(h^2) + eps): (..., d) -> (..., 1)"""
    n = torch.linalg.vector_norm(h, dim=-1, keepdim=True)  # squares, sum and root in one call
    return torch.rsqrt(n * n / h.shape[-1] + eps)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019). x: (..., d), weight: (d,).
    Computed in float32 at least: squares of bfloat16 lose too much."""
    h = upcast(x)
    return (h * inverse_rms(h, eps) * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` with a hand-written backward pass, twice as fast on a CPU: autograd would make a
    pass over memory for each of the small operations. With r = 1 / rms and g the gradient of the
    output: dx = r g w - x r^3 mean(g w x), dw = the sum of g x r over all vectors."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        h = upcast(x)
        r = inverse_rms(h, eps)
        ctx.save_for_backward(x, weight, r)
        return (h * r * weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, r = ctx.saved_tensors
        h, g = upcast(x), upcast(g) * r
        gx = g * h
        dw = gx.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        mean = (gx * weight).mean(-1, keepdim=True).mul_(r.square())
        return torch.addcmul(g * weight, h, mean, value=-1).to(x.dtype), dw, None


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of 1, then by a learned gain: see `rms_norm`."""

    def __init__(self, d, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))
        self.eps, self.kernels = eps, False

    def forward(self, x):  # (..., d) -> (..., d)
        if self.kernels and x.dtype == self.weight.dtype:
            return kernels.rms_norm(x, self.weight, self.eps)
        by_hand = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (_RMSNorm.apply if by_hand else rms_norm)(x, self.weight, self.eps)


def softmax(x, dim=-1):
    """exp(x) / sum(exp(x)) along a dimension. The maximum is subtracted first, so that nothing
    overflows. Entries of -inf get 0."""
    e = torch.exp(x - x.amax(dim, keepdim=True))
    return e / e.sum(dim, keepdim=True)


@functools.lru_cache
def rope_frequencies(head_size, theta=10000.0, scaling="", device="cpu"):
    """Radians per position of the D / 2 pairs of channels of a head: theta^(-2 i / D).

    scaling makes them smaller, for texts longer than those a model was first trained on: "" (not);
    "linear:FACTOR" divides all of them (Chen et al. 2023); "llama3:FACTOR,LOW,HIGH,LENGTH" divides
    those that turn less than LOW times in LENGTH positions, leaves those that turn more than HIGH
    times, and interpolates in between. Raises ValueError.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device)
    frequencies = 1 / theta ** (exponent / head_size)
    kind, _, numbers = scaling.partition(":")
    try:
        values = [float(x) for x in numbers.split(",") if x]
        if not all(0 < x < 1e30 for x in values) or scaling and kind not in ("linear", "llama3"):
            raise ValueError
        if kind != "llama3":
            (factor,) = values if scaling else [1.0]
            return frequencies / factor
        factor, low, high, length = values
        if low >= high:
            raise ValueError
    except ValueError:
        raise ValueError(f"rope_scaling must be linear:FACTOR or llama3:FACTOR,LOW,HIGH,LENGTH, "
                         f"not {scaling!r}") from None
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rope_angles(positions, head_size, theta=10000.0, scaling=""):
    """cos and sin of the angles of rotary embedding (Su et al. 2021), each (..., T, D / 2),
    float32. positions: (..., T). Pair i of a head turns by position * frequency i: fast for small
    i, slow for large ones, like the hands of a clock."""
    # (torch.compile warns of caches)
    of = rope_frequencies.__wrapped__ if torch.compiler.is_compiling() else rope_frequencies
    angles = positions.float()[..., None] * of(head_size, theta, scaling, positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin, interleaved=False):
    """Rotate pairs of channels of queries or keys by angles that grow with position, so that the
    dot product of two tokens depends only on their distance.

    x: (..., T, D); cos, sin: (T, D / 2) from `rope_angles`, or (T, D) from `whole_heads`; or
    (B, T, ...), for x: (B, H, T, D) or (B, T, D) with positions of its own in each sequence.
    Which channels form pair i is a convention, and the wrong one ruins a model without any error:
    here i and i + D / 2, as in Hugging Face's Llama and GPT-NeoX. The paper and Meta's own weights
    pair 2 i and 2 i + 1: `interleaved`.
    """
    h = upcast(x)  # bfloat16 can not tell position 1000 from 1001
    if 2 < cos.ndim < x.ndim:  # the same for all heads
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    if interleaved:
        a, b = h[..., 0::2], h[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:  # the same for a, b = h.chunk(2, -1), in few operations on whole heads
        if cos.shape[-1] < h.shape[-1]:
            cos, sin = whole_heads(cos, sin)
        out = torch.addcmul(h * cos, h.roll(h.shape[-1] // 2, -1), sin)
    return out.to(x.dtype)


def whole_heads(cos, sin):
    """(T, D / 2) -> (T, D): the factors of a head, and of the head with its halves swapped."""
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def sinusoids(positions, C):
    """Fixed position embeddings: sines and cosines of falling frequency (Vaswani et al. 2017).
    positions: (..., T) -> (..., T, C)"""
    cos, sin = rope_angles(positions, C + C % 2)
    return torch.cat((sin, cos), -1)[..., :C]


def scaled_dot_product_attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: each query takes a mean of the values, weighted by how well
    their keys match it (Vaswani et al. 2017).

    q: (..., T, D), k: (..., S, D), v: (..., S, E) -> (..., T, E)
    mask: (..., T, S) of bool (or 1 and 0), True where a query may attend to a key; a query that
    may attend to nothing gets 0. Raises ValueError for masks that are to be added.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is None:
        return softmax(scores) @ v
    if mask.is_floating_point() and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("the mask must be True or 1 where a query attends, not added to scores")
    mask = mask.bool()
    # the lowest number, not -inf: a row without any key would be NaN, in the backward pass, too
    weights = softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min))
    return weights.masked_fill(~mask, 0.0) @ v


def fast_attention(q, k, v, dropout=0.0):
    """PyTorch's fused causal attention, in which no (T, T) matrix is ever stored."""
    if q.device.type == "cpu" and q.shape[-1] < 64:
        # on CPUs its backward pass in bfloat16 is five times slower for small heads
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(upcast(q), upcast(k), upcast(v),
                                                  dropout_p=dropout, is_causal=True).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def causal_mask(T, device=None):
    """(T, T) of bool: position t may attend to positions 0 to t."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


# -----------------------------------------------------------------------------
# The configuration.

CHOICES = {
    "activation": ("swiglu", "relu", "gelu", "gelu_tanh", "relu2", "silu", "moe"),
    "position": ("rope", "learned", "sinusoidal", "none"),
    "norm": ("rmsnorm", "layernorm", "none"),
    "norm_place": ("pre", "post", "res_post"),
    "balance": ("loss", "bias", "none"),
}


def option(default, help):
    """A field of TransformerConfig, with the text that --help shows for it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class TransformerConfig:
    """Everything that decides a model's shapes and computation; it is part of each checkpoint.

    Raises ValueError for values that make no model.
    """

    vocab_size: int = option(4096, "number of token ids")
    block_size: int = option(256, "tokens of the longest sequence")
    n_layer: int = option(4, "blocks, each of attention and a feed-forward part")
    n_head: int = option(4, "attention heads")
    n_kv_head: int = option(0, "heads of keys and values, each shared by a group of queries; "
                               "0: n_head")
    n_embd: int = option(256, "width of the residual stream")
    head_size: int = option(0, "width of a head; 0: n_embd / n_head")
    d_ff: int = option(0, "width inside the feed-forward part; 0: 8/3 n_embd to a multiple of 64, "
                          "or 4 n_embd without swiglu")
    activation: str = option("swiglu", "swiglu, relu, gelu, gelu_tanh (GPT-2's), relu2, silu, moe")
    position: str = option("rope", "rope, learned, sinusoidal, none")
    norm: str = option("rmsnorm", "rmsnorm, layernorm, none")
    norm_place: str = option("pre", "pre, post, res_post")
    attention: str = option("full", "full, sliding, linear, latent, hyena; a,b,c: that "
                                    "pattern, repeated")
    window: int = option(64, "sliding: positions a query attends to, its own included")
    kv_rank: int = option(0, "latent: width of the compressed keys and values; 0: n_embd / 4")
    rope_size: int = option(0, "latent: channels of a head that carry the position; 0: half of it")
    qk_norm: bool = option(False, "normalise queries and keys, each head by itself")
    qk_norm_joint: bool = option(False, "normalise them over all heads together, as OLMo 2 does")
    n_expert: int = option(8, "moe: experts; d_ff is then the width of one")
    top_k: int = option(2, "moe: experts that a token goes to")
    n_shared_expert: int = option(0, "moe: further experts, which every token goes to")
    balance: str = option("loss", "moe: keep experts equally busy by a loss, by a bias, or none")
    balance_weight: float = option(0.01, "moe: weight of that loss, or step of that bias, for "
                                         "which 0.001 is usual")
    router_z_weight: float = option(0.001, "moe: weight of the loss that keeps the logits of the "
                                           "router small")
    bias: bool = option(False, "biases in linear layers and layernorm")
    qkv_bias: bool = option(False, "biases in the projections to queries, keys and values")
    tie_embeddings: bool = option(False, "one matrix for the embedding and the output")
    logit_cap: float = option(0.0, "keep logits between -cap and cap by tanh; 0: do not")
    dropout: float = option(0.0, "share of activations set to 0 in training")
    rope_theta: float = option(10000.0, "base of the rotary frequencies")
    rope_scaling: str = option("", "for longer texts: linear:FACTOR, or "
                                   "llama3:FACTOR,LOW,HIGH,LENGTH")
    norm_eps: float = option(1e-5, "added to the mean square in norms")

    def __post_init__(self):
        def refuse(wrong, why):
            if wrong:
                raise ValueError(why)

        positive = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "window",
                    "n_expert", "top_k", "rope_theta")
        for field in dataclasses.fields(self):
            name, kind, value = field.name, field.type, getattr(self, field.name)
            refuse(type(value) is not kind and (type(value), kind) != (int, float),
                   f"{name} must be of type {kind.__name__}, not {value!r}")
            if kind in (int, float):  # larger numbers are mistakes, or malice
                least, most = int(name in positive), 2**24 if kind is int else 1e30
                refuse(not least <= value <= most,
                       f"{name} must be from {least} to {most:,}, not {value}")
                setattr(self, name, kind(value))
        for name, choices in CHOICES.items():
            refuse(getattr(self, name) not in choices,
                   f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        kinds, moe = set(self.attention.split(",")), self.activation == "moe"
        refuse(kinds - set(ATTENTION),
               f"attention must be a list of {', '.join(ATTENTION)}, not {self.attention!r}")
        refuse(self.dropout >= 1, f"dropout must be below 1, not {self.dropout}")
        refuse(not self.head_size and self.n_embd % self.n_head,
               f"n_embd {self.n_embd} can not be divided by n_head {self.n_head}")
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        refuse(self.n_head % self.n_kv_head,
               f"n_head {self.n_head} can not be divided by n_kv_head {self.n_kv_head}")
        refuse({"latent", "hyena"} & kinds and (
            self.n_kv_head != self.n_head or self.qk_norm or self.qk_norm_joint),
            "latent attention and hyena have no heads of keys, which could be shared by n_kv_head "
            "or normalised by qk_norm")
        self.kv_rank = self.kv_rank or max(1, self.n_embd // 4)
        self.rope_size = self.rope_size or max(2, self.head_size // 4 * 2)
        rope_frequencies(2, 1.0, self.rope_scaling)  # raises if the scaling is not understood
        rotated = {self.rope_of(kind) for kind in kinds}
        refuse(any(size % 2 for size in rotated), f"rope needs an even head size, not {rotated}")
        refuse(moe and self.top_k > self.n_expert,
               f"top_k {self.top_k} is more than n_expert {self.n_expert}")
        parts = self.n_layer * (self.n_expert + self.n_shared_expert if moe else 1)
        refuse(parts > 2**14, f"{parts:,} feed-forward parts are too many")
        if not self.d_ff:
            self.d_ff = max(64, round(8 / 3 * self.n_embd / 64) * 64)  # three matrices for two
            if moe:  # as many active parameters as without experts
                self.d_ff = max(8, self.d_ff // (self.top_k + self.n_shared_expert) // 8 * 8)
            elif self.activation != "swiglu":
                self.d_ff = 4 * self.n_embd

    def attention_of(self, layer):
        """The kind of attention of a layer, by the repeating pattern."""
        kinds = self.attention.split(",")
        return kinds[layer % len(kinds)]

    def rope_of(self, kind):
        """The number of a head's channels that are rotated, in this kind of attention."""
        if self.position != "rope" or kind == "hyena":
            return 0
        return self.rope_size if kind == "latent" else self.head_size


# -----------------------------------------------------------------------------
# Attention, in five kinds. Each maps x: (B, T, C) to (B, T, C), and no position sees a later one.
#
# rope: cos and sin of the T positions, or None. To generate token by token, each kind keeps what
# it needs of the past in a cache, a dict of tensors made by `new_cache`, and `Places` says where
# the tokens of x belong.


class Places(NamedTuple):
    """Positions of the T tokens that come next in B sequences."""

    start: int | None  # the first of them, if it is the same in all sequences
    at: torch.Tensor  # (B, T), or (1, T) if it is the same
    end: int  # one more than the last
    mask: torch.Tensor | None  # (B or 1, 1, T, end) of bool: positions up to a token's own; or all


def store(cache, new, at):
    """cache[b, :, at[b, t]] = new[b, :, t]. cache: (B, H, S, D), new: (B, H, T, D); at: (B, T)
    or (1, T), positions in the cache."""
    rows = torch.arange(len(new), device=new.device)[:, None]
    cache[rows, :, at] = new.transpose(1, 2).to(cache.dtype)


def remember(cache, new, places):
    """Write what is new, (B, H, T, D), to its places -> all up to there, (B, H, end, D)."""
    if places.start is None:
        store(cache, new, places.at)
    else:
        cache[:, :, places.start : places.end] = new
    return cache[:, :, : places.end].to(new.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to the past. With fewer heads of keys and values than of queries, each
    serves a group of queries (Ainslie et al. 2023), which makes the cache smaller.

    fast: use PyTorch's fused attention; the readable form gives the same (see the tests).
    """

    def __init__(self, config, fast=True):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_size, self.dropout, self.fast = config.head_size, config.dropout, fast
        self.qk_norm, self.qk_norm_joint = config.qk_norm, config.qk_norm_joint
        width, kv_width = self.n_head * self.head_size, self.n_kv_head * self.head_size
        self.q_proj = Linear(config.n_embd, width, config.bias or config.qkv_bias)
        self.k_proj = Linear(config.n_embd, kv_width, config.bias or config.qkv_bias)
        self.v_proj = Linear(config.n_embd, kv_width, config.bias or config.qkv_bias)
        self.o_proj = Linear(width, config.n_embd, config.bias)
        self.joined, self.kernels = None, False  # see Transformer.join and .use_kernels
        self.joinable = ("q_proj", "k_proj", "v_proj")
        if self.qk_norm or self.qk_norm_joint:  # (Henry et al. 2020): scores can not grow freely
            self.joinable = ()
            joint = self.qk_norm_joint
            self.q_norm = RMSNorm(width if joint else self.head_size, config.norm_eps)
            self.k_norm = RMSNorm(kv_width if joint else self.head_size, config.norm_eps)

    def project(self, x, rope):
        """x -> q: (B, H, T, D); k, v: (B, n_kv_head, T, D)"""
        if self.joined:
            y = F.linear(x, *self.joined).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            qk, v = y[:, : -self.n_kv_head], y[:, -self.n_kv_head :]
            qk = qk if rope is None else apply_rope(qk, *rope)
            return qk[:, : self.n_head], qk[:, self.n_head :], v
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for a in (q, k, v))
        if self.qk_norm and not self.qk_norm_joint:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q.contiguous(), *rope), apply_rope(k.contiguous(), *rope)
        return q, k, v

    def repeat_heads(self, k, v):
        """Repeat each head of keys and values for all queries of its group."""
        n = self.n_head // self.n_kv_head
        return (k, v) if n == 1 else (k.repeat_interleave(n, 1), v.repeat_interleave(n, 1))

    def attend(self, q, k, v):
        """Attention among T tokens."""
        if self.kernels and not (self.training and self.dropout):
            return kernels.flash_attention(q, k, v, causal=True)
        k, v = self.repeat_heads(k, v)
        if self.fast:
            return fast_attention(q, k, v, dropout=self.dropout if self.training else 0.0)
        return scaled_dot_product_attention(q, k, v, causal_mask(q.shape[2], q.device))

    def new_cache(self, zeros, B, length):
        """Keys and values of up to `length` tokens. zeros: a function that makes a tensor."""
        return {name: zeros((B, self.n_kv_head, length, self.head_size)) for name in ("k", "v")}

    def recall(self, cache, k, v, places):
        """Add k and v of T tokens to the cache -> keys and values (B, n_kv_head, S, D) to attend
        to, and the mask (B or 1, 1, T, S), or None for all."""
        return remember(cache["k"], k, places), remember(cache["v"], v, places), places.mask

    def forward(self, x, rope=None, cache=None, places=None):  # (B, T, C) -> (B, T, C)
        q, k, v = self.project(x, rope)
        if cache is not None:
            past_k, past_v, mask = self.recall(cache, k, v, places)
        if cache is None or (places.start == 0 and x.shape[1] > 1):
            y = self.attend(q, k, v)
        else:  # a group's queries become further queries of one head, so that no key is copied
            n, T = self.n_head // self.n_kv_head, x.shape[1]
            mask = mask.repeat(1, 1, n, 1) if mask is not None and T > 1 else mask
            y = F.scaled_dot_product_attention(
                q.reshape(len(x), self.n_kv_head, n * T, self.head_size), past_k, past_v, mask)
            y = y.reshape(q.shape)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class SlidingWindowAttention(CausalSelfAttention):
    """Attention to the last `window` positions only (Beltagy et al. 2020). The cost grows with T,
    not with its square, and the cache is a ring, which does not grow at all."""

    SLACK = 16  # slots beyond the window: `speculate` takes back fewer tokens than that

    def __init__(self, config, fast=True):
        super().__init__(config, fast)
        self.window = config.window

    def near(self, i, j):
        """Whether position i attends to position j (negative: there is none)."""
        return (0 <= j) & (j <= i) & (i - j < self.window)

    def attend(self, q, k, v):
        """In chunks as long as the window: a query's keys lie in its own and the previous one."""
        if self.kernels:
            return kernels.flash_attention(q, k, v, causal=True, window=self.window)
        k, v = self.repeat_heads(k, v)
        T, W, i = q.shape[2], self.window, torch.arange(q.shape[2], device=q.device)
        if not self.fast:
            return scaled_dot_product_attention(q, k, v, self.near(i[:, None], i))
        if T <= 2 * W:
            return F.scaled_dot_product_attention(q, k, v, self.near(i[:, None], i))
        n = -(-T // W)  # chunks
        i = torch.arange(n * W, device=q.device).view(n, W)
        mask = self.near(i[..., None], torch.cat((i - W, i), 1)[:, None])  # (n, W, 2 W)
        chunks, k, v = (F.pad(a, (0, 0, 0, n * W - T)).unflatten(2, (n, W)).flatten(0, 1)
                        for a in (q, k, v))  # (B H, n, W, D)
        k, v = (torch.cat((F.pad(a, (0, 0, 0, 0, 1, 0))[:, :-1], a), 2) for a in (k, v))
        y = F.scaled_dot_product_attention(chunks, k, v, mask[None])
        return y.flatten(1, 2)[:, :T].view_as(q)

    def new_cache(self, zeros, B, length):
        """A ring: position p lies in slot p % slots."""
        return super().new_cache(zeros, B, min(length, self.window + self.SLACK))

    def recall(self, cache, k, v, places):
        """As for full attention; the keys are those of the ring, followed by the new ones."""
        at, slots = places.at, cache["k"].shape[2]
        before = at[:, :1] - 1  # each slot holds the last position up to here with its remainder
        held = before - (before - torch.arange(slots, device=at.device)) % slots
        mask = self.near(at[..., None], torch.cat((held, at), 1)[:, None])  # (B, T, slots + T)
        found = []
        for name, new in (("k", k), ("v", v)):
            found.append(torch.cat((cache[name].to(new.dtype), new), 2))
            store(cache[name], new[:, :, -slots:], at[:, -slots:] % slots)
        return *found, mask[:, None]


def linear_attention(q, k, v, rope=None, state=None, chunk=64):
    """Attention with the kernel phi(q) . phi(k), phi = elu + 1, in place of exp(q . k)
    (Katharopoulos et al. 2020). The sums over the past are then a state of fixed size that can be
    carried along: with chunk=1 this is a recurrent network. Larger chunks compute the same, with
    a matrix of scores inside each chunk.

    q, k, v: (B, H, T, D) -> y: (B, H, T, D), state: (sum of phi(k) v^T: (B, H, D, D), sum of
    phi(k): (B, H, D)). Rotary positions apply to the numerator only, since a rotated sum could be
    0 in the denominator (Su et al. 2021).
    """
    B, H, T, D = q.shape
    q, k, v = F.elu(upcast(q)) + 1, F.elu(upcast(k)) + 1, upcast(v)
    rq, rk = (q, k) if rope is None else (apply_rope(q, *rope), apply_rope(k, *rope))
    S, z = state or (q.new_zeros(B, H, D, D), q.new_zeros(B, H, D))
    out = []
    for i in range(0, max(T, 1), chunk):
        a, b, ra, rb, c = (x[:, :, i : i + chunk] for x in (q, k, rq, rk, v))
        scores = (ra @ rb.mT).tril()
        norm = (a * (z[:, :, None] + b.cumsum(2))).sum(-1, keepdim=True)
        out.append((scores @ c + ra @ S) / norm)
        S, z = S + rb.mT @ c, z + b.sum(2)
    return torch.cat(out, 2), (S, z)


class LinearAttention(CausalSelfAttention):
    """Attention without softmax, in time proportional to T: see `linear_attention`."""

    def new_cache(self, zeros, B, length):
        """The state, in float32 at least; its size does not depend on the length."""
        shape = (B, self.n_head, self.head_size)
        return {"S": upcast(zeros((*shape, self.head_size))), "z": upcast(zeros(shape))}

    def forward(self, x, rope=None, cache=None, places=None):  # (B, T, C) -> (B, T, C)
        q, k, v = self.project(x, None)
        k, v = self.repeat_heads(k, v)
        y, state = linear_attention(q, k, v, rope, (cache["S"], cache["z"]) if cache else None)
        if cache is not None:
            cache["S"], cache["z"] = state
        return self.o_proj(y.to(x.dtype).transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, 2024): the keys and values of all heads are
    projected up from one small vector per token, and only that vector is cached. A rotation can
    not be moved past this projection, so `rope_size` further channels carry the position; all
    heads share their key.

    absorb: compute scores and sums in the small space, with the up-projections moved over to the
    query and the output. It is the same product in another order: cheaper with a cache.
    """

    def __init__(self, config):
        super().__init__()
        C, H, self.rank = config.n_embd, config.n_head, config.kv_rank
        self.n_head, self.head_size, self.dropout = H, config.head_size, config.dropout
        self.rope_size = config.rope_of("latent")
        self.q_proj = Linear(C, H * (self.head_size + self.rope_size), config.bias)
        self.kv_down = Linear(C, self.rank + self.rope_size, config.bias)
        self.kv_norm = RMSNorm(self.rank, config.norm_eps)
        self.k_up = Linear(self.rank, H * self.head_size)
        self.v_up = Linear(self.rank, H * self.head_size)
        self.o_proj = Linear(H * self.head_size, C, config.bias)

    def new_cache(self, zeros, B, length):
        return {"latent": zeros((B, 1, length, self.rank + self.rope_size))}

    def forward(self, x, rope=None, cache=None, places=None, absorb=None):  # as for the others
        B, T, _ = x.shape
        H, D, R = self.n_head, self.head_size, self.rope_size
        q, q_rope = self.q_proj(x).view(B, T, H, D + R).transpose(1, 2).split((D, R), -1)
        latent, k_rope = self.kv_down(x).split((self.rank, R), -1)
        latent, k_rope = self.kv_norm(latent)[:, None], k_rope[:, None]  # (B, 1, T, ...)
        if R and rope is not None:
            q_rope, k_rope = apply_rope(q_rope, *rope), apply_rope(k_rope, *rope)
        keys = torch.cat((latent, k_rope), -1)
        if cache is not None:
            keys = remember(cache["latent"], keys, places)
            latent, k_rope = keys.split((self.rank, R), -1)
        # q . (U l) = (U^T q) . l, and the sum of p (U l) is U (sum of p l)
        absorb = cache is not None if absorb is None else absorb
        if absorb:
            q = q @ self.k_up.weight.view(H, D, self.rank).to(q.dtype)  # (B, H, T, rank)
            k, v = keys.expand(B, H, -1, -1), latent.expand(B, H, -1, -1)
        else:
            k, v = (up(latent[:, 0]).unflatten(-1, (H, D)).transpose(1, 2)
                    for up in (self.k_up, self.v_up))
            k = torch.cat((k, k_rope.expand(B, H, -1, -1)), -1)
        y = F.scaled_dot_product_attention(
            torch.cat((q, q_rope), -1), k, v, places.mask if cache is not None else None,
            self.dropout if self.training else 0.0, cache is None, scale=1 / math.sqrt(D + R))
        if absorb:
            y = y @ self.v_up.weight.view(H, D, self.rank).mT.to(q.dtype)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def fft_convolution(u, h):
    """y[t] = sum over s <= t of h[t - s] u[s], in O(T log T). u: (B, T, C), h: (T, C) ->
    (B, T, C). Zeros up to twice the length keep the end from wrapping around to the beginning."""
    if not u.numel():  # the transform of nothing is not defined
        return u
    T = u.shape[1]
    spectrum = torch.fft.rfft(upcast(u), 2 * T, dim=1) * torch.fft.rfft(upcast(h), 2 * T, dim=0)
    return torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T].to(u.dtype)


class Hyena(nn.Module):
    """A long convolution between two gates, in place of attention (Poli et al. 2023; order 2):
    y = o(x0 * (h conv (x1 * v))). The filter h is as long as the text, and not stored: a small
    network computes it from the position, and a window, which decays at another rate for each
    channel, multiplies it."""

    BANDS, WIDTH = 8, 32  # frequencies that describe a position; units of the filter's network

    def __init__(self, config):
        super().__init__()
        C, self.block_size = config.n_embd, config.block_size
        self.in_proj = nn.ModuleList(Linear(C, C, config.bias) for _ in range(3))
        self.short = nn.Parameter(torch.randn(3, C, 3) / 3)  # three taps for each channel
        self.filter_in = Linear(2 * self.BANDS + 1, self.WIDTH, bias=True)
        self.filter_mid = Linear(self.WIDTH, self.WIDTH, bias=True)
        self.filter_out = Linear(self.WIDTH, C)
        self.skip = nn.Parameter(torch.ones(C))
        self.o_proj = Linear(C, C, config.bias)

    def filter(self, T):
        """h: (T, C)"""
        t = torch.arange(T, device=self.skip.device, dtype=torch.float32)[:, None]
        bands = torch.linspace(1e-4, self.BANDS - 1, self.BANDS, device=t.device)
        angles = 2 * math.pi * bands * t / self.block_size
        x = torch.cat((t / self.block_size, angles.cos(), angles.sin()), 1).to(self.skip.dtype)
        h = torch.sin(10 * self.filter_in(x))  # high frequencies, or h would be too smooth
        h = self.filter_out(torch.sin(10 * self.filter_mid(h)))
        # time constants from one step to two thousand
        decay = torch.linspace(0, math.log(5e-4), len(self.skip), device=t.device).exp()
        return h * torch.exp(-decay * t)

    def new_cache(self, zeros, B, length):
        """Past inputs of the short and of the long convolution."""
        C = len(self.skip)
        return {"short": zeros((B, 3, 2, C)), "long": zeros((B, 1, length, C))}

    def forward(self, x, rope=None, cache=None, places=None):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        u = torch.stack([project(x) for project in self.in_proj], 1)  # (B, 3, T, C)
        past = u.new_zeros(B, 3, 2, C) if cache is None else cache["short"].to(u.dtype)
        u = torch.cat((past, u), 2)
        taps = self.short[:, None].to(u.dtype).unbind(-1)  # three of (3, 1, C)
        x0, x1, v = (u[:, :, 2:] * taps[0] + u[:, :, 1:-1] * taps[1]
                     + u[:, :, :-2] * taps[2]).unbind(1)
        v = x1 * v
        if cache is not None:
            cache["short"] = u[:, :, -2:]
            past = remember(cache["long"], v[:, None], places)[:, 0]
        if cache is None or places.start == 0:
            y = fft_convolution(v, self.filter(T))
        else:  # for few tokens the plain sum; lag: (B or 1, T, S)
            lag = places.at[..., None] - torch.arange(places.end, device=x.device)
            h = self.filter(places.end)[lag.clamp(min=0)].masked_fill((lag < 0)[..., None], 0.0)
            y = torch.einsum("btsc,bsc->btc", h.expand(B, -1, -1, -1).to(v.dtype), past)
        return self.o_proj(x0 * (y + self.skip.to(v.dtype) * v))


ATTENTION = {"full": CausalSelfAttention, "sliding": SlidingWindowAttention,
             "linear": LinearAttention, "latent": LatentAttention, "hyena": Hyena}


# -----------------------------------------------------------------------------
# Feed-forward parts.


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x): a feed-forward part whose units are gated (Shazeer 2020)."""

    def __init__(self, d, d_ff, bias=False):
        super().__init__()
        self.w1 = Linear(d, d_ff, bias)
        self.w2 = Linear(d_ff, d, bias)
        self.w3 = Linear(d, d_ff, bias)
        self.joined, self.joinable, self.kernels = None, ("w1", "w3"), False

    def forward(self, x):  # (..., d) -> (..., d)
        if self.joined:
            gate, up = F.linear(x, *self.joined).chunk(2, -1)
        else:
            gate, up = self.w1(x), self.w3(x)
        if self.kernels and not self.joined:
            return self.w2(kernels.swiglu(gate, up))
        return self.w2(F.silu(gate) * up)  # silu(x) = x * sigmoid(x)


def relu2(x):
    """relu(x)^2 (So et al. 2021)"""
    return F.relu(x).square()


class FeedForward(nn.Module):
    """w2(f(w1 x)), f one of relu, gelu, gelu_tanh (its approximation in GPT-2), silu, relu2."""

    def __init__(self, d, d_ff, activation, bias=False):
        super().__init__()
        self.w1 = Linear(d, d_ff, bias)
        self.w2 = Linear(d_ff, d, bias)
        self.f = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu2": relu2,
                  "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}[activation]

    def forward(self, x):  # (..., d) -> (..., d)
        return self.w2(self.f(self.w1(x)))


class MixtureOfExperts(nn.Module):
    """Several feed-forward parts, the experts. A router sends each token to top_k of them, and
    all tokens go to the shared ones: more parameters at the same cost (Shazeer et al. 2017; Fedus
    et al. 2021). No token is ever dropped.

    The output is the experts' sum, weighted by the router's probabilities, which are scaled to add
    up to 1. Experts are kept equally busy by one of
      loss: E sum_i f_i P_i, with f_i the share of tokens and P_i the mean probability of expert i;
            its minimum, 1, is reached when both are uniform
      bias: a number for each expert, added only to choose experts, which `update_bias` raises for
            those that had too little to do (loss-free: Wang et al. 2024)
    """

    def __init__(self, config):
        super().__init__()
        self.n_expert, self.top_k, self.balance = config.n_expert, config.top_k, config.balance
        self.balance_weight, self.z_weight = config.balance_weight, config.router_z_weight
        self.router = Linear(config.n_embd, config.n_expert)
        self.experts, self.shared = (
            nn.ModuleList(SwiGLU(config.n_embd, config.d_ff, config.bias) for _ in range(n))
            for n in (config.n_expert, config.n_shared_expert))
        self.register_buffer("bias", torch.zeros(config.n_expert))
        self.load = 0.0  # tokens that went to each expert since the last step: (E,)
        self.loss = 0.0  # of the last forward pass in training, to be added to the model's

    def route(self, x):
        """x: (N, C) -> weights (N, top_k), ids of experts (N, top_k), and, in float32, the logits
        and probabilities (N, E)"""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(upcast(x), upcast(self.router.weight))
        p = softmax(logits)
        chosen = (p + self.bias).topk(self.top_k, -1).indices
        weights = p.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True), chosen, logits, p

    def forward(self, x):  # (..., C) -> (..., C)
        shape, x = x.shape, x.flatten(0, -2)
        weights, chosen, logits, p = self.route(x)
        order = chosen.flatten().argsort(stable=True)  # all that goes to expert 0, then 1, ...
        counts = torch.bincount(chosen.flatten(), minlength=self.n_expert)
        token = order // self.top_k
        parts = x[token].split(counts.tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts)])
        y = y * weights.flatten()[order, None].to(y.dtype)
        y = torch.zeros_like(x, dtype=y.dtype).index_add(0, token, y)
        for expert in self.shared:
            y = y + expert(x)
        if self.training:
            self.load = self.load + counts
            self.loss = self.z_weight * torch.logsumexp(logits, -1).square().mean()
            if self.balance == "loss":
                share = counts / counts.sum()
                self.loss = self.loss + self.balance_weight * self.balance_loss(share, p)
        return y.view(shape)

    def balance_loss(self, share, p):
        """share: (E,) of the tokens; p: (N, E) -> scalar"""
        return self.n_expert * (share * p.mean(0)).sum()

    @torch.no_grad()
    def update_bias(self):
        """After each step of the optimizer: move the bias against the load since the last."""
        if self.balance == "bias" and torch.is_tensor(self.load):
            self.bias += self.balance_weight * torch.sign(self.load.mean() - self.load)
        self.load = 0.0


# -----------------------------------------------------------------------------
# The model.


def make_norm(config, d):
    """The norm that the config asks for."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "layernorm":  # (Ba et al. 2016), as in nanoGPT without a bias by default
        return nn.LayerNorm(d, config.norm_eps, bias=config.bias)
    return RMSNorm(d, config.norm_eps)


class Block(nn.Module):
    """Attention, then the feed-forward part; each adds to what is there (see `add`)."""

    def __init__(self, config, layer=0):
        super().__init__()
        self.norm_place = config.norm_place
        self.attn_norm = make_norm(config, config.n_embd)
        self.attn = ATTENTION[config.attention_of(layer)](config)
        self.ffn_norm = make_norm(config, config.n_embd)
        if config.activation == "moe":
            self.ffn = MixtureOfExperts(config)
        elif config.activation == "swiglu":
            self.ffn = SwiGLU(config.n_embd, config.d_ff, config.bias)
        else:
            self.ffn = FeedForward(config.n_embd, config.d_ff, config.activation, config.bias)
        self.dropout = Dropout(config.dropout)

    def add(self, x, norm, part, *more):
        """pre: x + part(norm(x)), where nothing stands in the way of the gradient; post, as in
        2017: norm(x + part(x)), which makes deep models hard to train (Xiong et al. 2020);
        res_post: x + norm(part(x)), which adds vectors of a known size (Liu et al. 2021, OLMo 2).
        """
        if self.norm_place == "pre":
            return x + self.dropout(part(norm(x), *more))
        if self.norm_place == "post":
            return norm(x + self.dropout(part(x, *more)))
        return x + self.dropout(norm(part(x, *more)))

    def forward(self, x, rope=None, cache=None, places=None):  # (B, T, C) -> (B, T, C)
        x = self.add(x, self.attn_norm, self.attn, rope, cache, places)
        return self.add(x, self.ffn_norm, self.ffn)


class Cache:
    """What a model keeps of the tokens it has read, so that it need not read them again: one dict
    of tensors per layer, with room for `length` tokens of `batch` sequences. The first dimension
    of every tensor is the sequence."""

    def __init__(self, model, batch, length):
        like = getattr(model.embedding, "scale", model.embedding.weight)  # integers have a scale
        self.layers = [block.attn.new_cache(like.new_zeros, batch, length)
                       for block in model.blocks]
        self.lengths, self.device = [0] * batch, like.device  # tokens read of each sequence

    def places(self, T):
        """`Places` of the next T tokens."""
        agree = len(set(self.lengths)) == 1
        first = torch.tensor(self.lengths[: 1 if agree else None], device=self.device)[:, None]
        at, end = first + torch.arange(T, device=self.device), max(self.lengths) + T
        if agree and T == 1:
            return Places(self.lengths[0], at, end, None)
        mask = torch.arange(end, device=self.device) <= at[..., None]
        return Places(self.lengths[0] if agree else None, at, end, mask[:, None])

    def select(self, rows):
        """Keep these sequences only, in this order; one can be named several times."""
        if rows != list(range(len(self.lengths))):
            index = torch.tensor(rows, dtype=torch.int64, device=self.device)
            self.layers = [{k: x[index] for k, x in layer.items()} for layer in self.layers]
            self.lengths = [self.lengths[row] for row in rows]

    def append(self, other):
        """Add the sequences of another cache of the same model and length."""
        self.layers = [{k: torch.cat((x, theirs[k])) for k, x in layer.items()}
                       for layer, theirs in zip(self.layers, other.layers)]
        self.lengths = self.lengths + other.lengths


class Transformer(nn.Module):
    """The language model: ids of a text -> for each position, scores of the next id."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first_position = 0  # not 0 if ids are pieces of longer texts, as in ddp.py --sp
        self.quantized = None  # or int8, int4: see `quantize`
        self.activation_checkpointing = False  # True: keep only each block's input for backward
        # a unit variance suits the norms; as output weights it would make logits too large
        self.std = 1 / math.sqrt(config.n_embd) if config.tie_embeddings else 1.0
        self.embedding = Embedding(config.vocab_size, config.n_embd, self.std)
        if config.position == "learned":
            self.positions = Embedding(config.block_size, config.n_embd, self.std)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.kinds = [config.attention_of(i) for i in range(config.n_layer)]
        post = config.norm_place == "post"  # then the last block ends with a norm
        self.final_norm = nn.Identity() if post else make_norm(config, config.n_embd)
        self.head = Linear(config.n_embd, config.vocab_size)
        self.tie()
        # every block adds to the residual stream twice: start with small steps, as GPT-2 does
        for name, module in self.blocks.named_modules():
            if isinstance(module, Linear) and name.endswith((".o_proj", ".w2")):
                module.weight.data.mul_(1 / math.sqrt(2 * config.n_layer))

    def tie(self):
        """Let head and embedding share one matrix, if the config says so."""
        if self.config.tie_embeddings:
            for name in {"weight", "scale"} & set(self.head.state_dict()):
                setattr(self.head, name, getattr(self.embedding, name))

    def use_kernels(self, on=True):
        """Compute norms, attention and SwiGLU with kernels.py, or as it is written here."""
        global kernels
        if on:
            import kernels
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = on

    def forward(self, ids, cache=None, last=0, hidden=False):
        """ids: (B, T) int64, T at most block_size -> logits: (B, T, V)

        cache: a `Cache` that holds the tokens before these, and these as well afterwards.
        last: logits of only so many last positions, (B, last, V); 0: all.
        hidden: instead of logits, the input of the head, (B, T, C).
        """
        T, places, start = ids.shape[1], None, self.first_position
        if cache is None:
            at, end = torch.arange(start, start + T, device=ids.device)[None], start + T
        else:
            places = cache.places(T)
            at, end = places.at, places.end
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}")
        x = self.embed(ids, at)
        ropes = {kind: self.rope(kind, at) for kind in set(self.kinds)}
        for i, block in enumerate(self.blocks):
            rope = ropes[self.kinds[i]]
            if cache is not None:
                x = block(x, rope, cache.layers[i], places)
            elif self.activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        if cache is not None:
            cache.lengths = [length + T for length in cache.lengths]
        x = x[:, -last:]
        return self.final_norm(x) if hidden else self.predict(x)

    def embed(self, ids, at):
        """The input of the first block: ids (B, T) at positions (B or 1, T) -> (B, T, C)"""
        x = self.embedding(ids)
        if self.config.position == "learned":
            x = x + self.positions(at)
        elif self.config.position == "sinusoidal":
            x = x + (self.std * sinusoids(at, self.config.n_embd)).to(x.dtype)
        return self.dropout(x)

    def rope(self, kind, at):
        """cos and sin for whole heads at positions (B or 1, T), each (B or 1, 1, T, D); or None"""
        c, size = self.config, self.config.rope_of(kind)
        if not size:
            return None
        return whole_heads(*rope_angles(at[:, None], size, c.rope_theta, c.rope_scaling))

    def predict(self, x):
        """Output of the last block -> logits. (..., C) -> (..., V)"""
        return self.logits(self.final_norm(x))

    def logits(self, hidden):
        """Input of the head -> logits. (..., C) -> (..., V)"""
        logits, cap = self.head(hidden), self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap else logits

    def mixtures(self):
        """The blocks' mixtures of experts, if they have any."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MixtureOfExperts)]

    def auxiliary_loss(self):
        """What mixtures of experts add to the loss of the last forward pass; 0 without any."""
        return sum(ffn.loss for ffn in self.mixtures())

    def update_router_bias(self):
        """To be called after each step of the optimizer: see MixtureOfExperts."""
        for mixture in self.mixtures():
            mixture.update_bias()

    def join(self, on):
        """For generation: replace projections of the same input by one product, where the
        matrices are so small that the calls cost more than the arithmetic. Off: undo that."""
        for part in self.modules():
            if not hasattr(part, "joined"):
                continue
            linears, part.joined = [getattr(part, name) for name in part.joinable], None
            if on and linears and all(type(linear) is Linear for linear in linears) and \
                    sum(linear.weight.numel() for linear in linears) <= 2**20:
                bias = [linear.bias for linear in linears if linear.bias is not None]
                part.joined = (torch.cat([linear.weight for linear in linears]),
                               torch.cat(bias) if bias else None)

    def prefill(self, prompts, length):
        """Read prompts, lists of ids of unequal lengths -> (Cache for `length` tokens, logits of
        the next ids (B, V)). Equal prompts are read once."""
        # In a batch short prompts are padded at the end. The keys and values of the padding lie
        # beyond the text, and are overwritten as it grows; a state or a ring would keep them.
        can_pad = set(self.kinds) <= {"full", "latent"}

        def size(prompt):
            return max(5, len(prompt).bit_length()) if can_pad else len(prompt)

        cache, logits = Cache(self, 0, length), []
        distinct = sorted(dict.fromkeys(map(tuple, prompts)), key=len)
        for _, group in itertools.groupby(distinct, size):
            group = list(group)
            part, lengths = Cache(self, len(group), length), list(map(len, group))
            ids = torch.tensor([prompt + (0,) * (lengths[-1] - len(prompt)) for prompt in group],
                               device=cache.device)
            hidden = self(ids, part, hidden=True)
            logits.append(self.logits(hidden[range(len(group)), [n - 1 for n in lengths]]))
            part.lengths = lengths
            cache.append(part)
        rows = [distinct.index(tuple(prompt)) for prompt in prompts]
        cache.select(rows)
        return cache, torch.cat(logits)[rows]

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
                 generator=None, on_token=None, min_p=None):
        """Continue texts, token by token.

        ids: (B, T) int64 -> (B, T + n), n at most max_new_tokens; a text that has ended with its
        `stop` is filled up with it. Or a list of B lists of ids, of any lengths -> the same,
        continued.
        temperature, top_k, top_p, min_p: see `sample`. stop: an id, or a set of ids, that ends a
        text. generator: torch.Generator on the model's device, to repeat a sample. Each of these
        and max_new_tokens can be a list with one entry per text; the result for a text then
        depends on its own entries only.
        on_token: called with (number of the text, id) for each new id. Of texts longer than
        block_size the model sees the end. Raises ValueError for an empty text.
        """
        texts = ids.tolist() if torch.is_tensor(ids) else ids
        try:
            texts = [list(map(int, text)) for text in texts]
        except TypeError:
            raise ValueError("ids must be (B, T) or a list of texts; of one text, [ids]") from None
        if not all(texts):
            raise ValueError("an empty prompt can not be continued: give it one token at least")

        def each(x):
            return x if type(x) is list else [x] * len(texts)

        wishes = temperature, top_k, top_p, generator, min_p
        own_wishes = list(zip(*map(each, wishes))) if list in map(type, wishes) else None
        stops = list(map(id_set, each(stop)))
        ends = [len(text) + n for text, n in zip(texts, each(max_new_tokens))]
        limit = self.config.block_size
        rows = [i for i, text in enumerate(texts) if len(text) < ends[i]]
        with generating(self):
            if rows:
                cache, logits = self.prefill([texts[i][-limit:] for i in rows],
                                             min(limit, max(ends[i] for i in rows)))
            while rows:
                if own_wishes:
                    new = [sample(logits[j, None], *own_wishes[i]).item()
                           for j, i in enumerate(rows)]
                else:
                    new = sample(logits, *wishes).tolist()
                for i, token in zip(rows, new):
                    texts[i].append(token)
                    if on_token:
                        on_token(i, token)
                alive = [j for j, i in enumerate(rows)
                         if texts[i][-1] not in stops[i] and len(texts[i]) < ends[i]]
                rows = [rows[j] for j in alive]
                if any(len(texts[i]) > limit for i in rows):
                    # in a text that has outgrown the window every token has a new position
                    cache, logits = self.prefill([texts[i][-limit:] for i in rows], limit)
                elif rows:
                    cache.select(alive)
                    last = torch.tensor([texts[i][-1:] for i in rows], device=cache.device)
                    logits = self(last, cache, last=1)[:, 0]
        if not torch.is_tensor(ids):
            return texts
        length = max(map(len, texts), default=ids.shape[1])
        texts = [text + text[-1:] * (length - len(text)) for text in texts]
        return ids.new_tensor(texts).view(len(texts), length)


# -----------------------------------------------------------------------------
# Sampling.

COLD = 1e-6  # lower temperatures count as 0: logits divided by them could overflow


def id_set(stop):
    """None, an id of any integer type, or several -> a set of ids."""
    return {int(stop)} if hasattr(stop, "__index__") else set(stop or ())


@contextlib.contextmanager
def generating(*models):
    """Models in eval mode and with joined projections; afterwards as before, whatever happens:
    joined weights are copies, which the next training step would make stale."""
    were = [model.training for model in models]
    try:
        for model in models:
            model.eval().join(True)
        yield
    finally:
        for model, was_training in zip(models, were):
            model.join(False)
            model.train(was_training)


def token_probabilities(logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
    """The distribution that `sample` draws from. logits: (..., V) -> (..., V), float32."""
    if temperature < COLD:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = upcast(logits) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = softmax(ordered)
        drop = p.cumsum(-1) - p >= top_p  # the more likely ids are enough
        drop[..., 0] = False  # (for a top_p of 0)
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)
    p = softmax(logits)
    if min_p:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None, min_p=None):
    """Draw the next ids. logits: (B, V) -> (B,) int64

    temperature: logits are divided by it; 0 takes the most likely id. top_k: only the k most
    likely ids. top_p: only the fewest ids that together have at least this probability (Holtzman
    et al. 2020). min_p: only ids with at least this fraction of the likeliest id's probability
    (Nguyen et al. 2024).
    """
    if temperature < COLD:
        return logits.argmax(-1)
    p = token_probabilities(logits, temperature, top_k, top_p, min_p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.no_grad()
def speculate(target, draft, ids, max_new_tokens, gamma=4, temperature=1.0, top_k=None, top_p=None,
              stop=None, generator=None, on_token=None, min_p=None):
    """Continue a text with exactly the distribution of target.generate, in fewer calls of the
    target (Leviathan et al. 2023; Chen et al. 2023). The small model `draft` proposes gamma
    tokens, and one call of the target judges all of them, since it gives p for every position at
    once. A proposal x drawn from q is kept with probability min(1, p(x) / q(x)); in place of the
    first one rejected, an id is drawn from max(0, p - q), normalised. If all are kept, the call
    gives one further token.

    ids: (1, T) int64; the other arguments are those of `Transformer.generate`.
    -> ((1, T + n) int64, {"proposed": ..., "accepted": ..., "calls": ... of the target})
    Raises ValueError for models of different vocabularies, for attention with a state, which can
    not take tokens back, for a gamma out of range, or other ids.
    """
    if ids.ndim != 2 or len(ids) != 1 or not ids.numel():
        raise ValueError(f"ids of one text of shape (1, T) are needed, not {tuple(ids.shape)}")
    if draft.config.vocab_size != target.config.vocab_size:
        raise ValueError("the draft has not the vocabulary of the target")
    if {"linear", "hyena"} & {*target.kinds, *draft.kinds}:
        raise ValueError("the state of linear or hyena attention can not take guesses back")
    if not 0 < gamma < SlidingWindowAttention.SLACK:
        raise ValueError(f"gamma must be in 1 to {SlidingWindowAttention.SLACK - 1}, not {gamma}")
    text, device, done, stops = ids[0].tolist(), ids.device, False, id_set(stop)
    end = len(text) + max_new_tokens
    limit = min(end, target.config.block_size, draft.config.block_size)
    caches = Cache(target, 1, limit), Cache(draft, 1, limit)
    counts = {"proposed": 0, "accepted": 0, "calls": 0}

    def draw(p):
        return torch.multinomial(p, 1, generator=generator).item()

    def ask(model, cache, new, last):  # -> the probabilities after the last tokens of text + new
        unseen = torch.tensor([(text + new)[cache.lengths[0] :]], device=device)
        return token_probabilities(model(unseen, cache, last=last)[0],
                                   temperature, top_k, top_p, min_p)

    with generating(target, draft):
        while not done and len(text) < limit:
            n = min(gamma, limit - len(text) - 1)
            guesses, q = [], []
            for _ in range(n):
                q.append(ask(draft, caches[1], guesses, 1)[0])
                guesses.append(draw(q[-1]))
            p, kept = ask(target, caches[0], guesses, n + 1), 0
            while kept < n and torch.rand(1, generator=generator, device=device).item() * \
                    q[kept][guesses[kept]] < p[kept][guesses[kept]]:
                kept += 1
            last = draw((p[kept] - q[kept]).clamp(min=0) if kept < n else p[n])
            for token in guesses[:kept] + [last]:
                text.append(token)
                if on_token:
                    on_token(0, token)
                if done := token in stops:
                    break
            for name, more in (("proposed", n), ("accepted", kept), ("calls", 1)):
                counts[name] += more
            for cache in caches:  # what comes after the text will be overwritten
                cache.lengths = [min(cache.lengths[0], len(text) - 1)]
    if not done and len(text) < end:  # no room in the window is left for guesses
        before = len(text)
        text, = target.generate([text], end - before, temperature, top_k, top_p, stop,
                                generator, on_token, min_p)
        counts["calls"] += len(text) - before
    return torch.tensor([text], device=device), counts


# -----------------------------------------------------------------------------
# Quantization: weights as small integers. Every new token needs every weight once, so generation,
# one token at a time, is as fast as memory delivers them: bytes are time.

GROUP = 32  # int4: weights that share a scale


class QuantizedLinear(nn.Module):
    """A Linear whose weights are integers: weight = scale * integer + low. Not trainable.

    int8: -127 to 127, a scale for each row, no `low`. weight: (d_out, d_in) int8.
    int4: 0 to 15, scale and low for each GROUP weights of a row, the last group padded with
    zeros. weight: (d_out, d_in / 2) uint8, two in a byte, the first in its low half.
    No weight is off by more than half of its scale.
    """

    def __init__(self, linear, kind):
        super().__init__()
        w = linear.weight.detach().float()
        d_out, self.d_in = w.shape
        self.kind, self.bias = kind, linear.bias
        if kind == "int8":
            scale = (w.abs().amax(1) / 127).clamp(min=1e-30)
            weight, low = (w / scale[:, None]).round().to(torch.int8), None
        else:
            w = F.pad(w, (0, -self.d_in % GROUP)).unflatten(1, (-1, GROUP))
            low, high = w.aminmax(dim=-1)
            scale = ((high - low) / 15).clamp(min=1e-30)
            weight = ((w - low[..., None]) / scale[..., None]).round().to(torch.uint8).flatten(1)
            weight = weight[:, 0::2] | weight[:, 1::2] << 4
        for name, x in (("weight", weight), ("scale", scale), ("low", low)):
            self.register_buffer(name, x)
        self.packed = None  # int4: in the layout of PyTorch's CPU kernel, made at its first use
        self.fits = self.d_in % 32 == 0 if kind == "int8" else d_out % 16 == 0  # that kernel

    def nibbles(self, weight):
        """int4: bytes (..., d_in / 2) -> integers (..., d_in)"""
        return torch.stack((weight & 15, weight >> 4), -1).flatten(-2)

    def rows(self, ids=slice(None)):
        """These rows of the weights as float32: (..., d_in)"""
        weight, scale = self.weight[ids], self.scale[ids][..., None]
        if self.kind == "int8":
            return weight * scale
        weight = self.nibbles(weight).unflatten(-1, (-1, GROUP)) * scale + self.low[ids][..., None]
        return weight.flatten(-2)[..., : self.d_in]

    def kernel(self, x):
        """x W^T by PyTorch's CPU kernels for bfloat16 times integers, which read the integers
        themselves. x: (N, d_in) -> (N, d_out) float32."""
        x = x.bfloat16()
        if self.kind == "int8":
            one = torch.ones_like(self.scale, dtype=torch.bfloat16)  # the scale keeps its float32
            return torch._weight_int8pack_mm(x, self.weight, one).float() * self.scale
        if self.packed is None:
            scales = torch.stack((self.scale, self.low + 8 * self.scale), -1).transpose(0, 1)
            self.packed = (torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                self.nibbles(self.weight).int(), 1), scales.contiguous().bfloat16())
        x = F.pad(x, (0, self.weight.shape[1] * 2 - self.d_in))
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed[0], GROUP, self.packed[1]).float()

    def forward(self, x):  # (..., d_in) -> (..., d_out)
        few = 0 < x.numel() <= 32 * self.d_in  # for more, turning weights into floats is worth it
        if few and self.fits and x.device.type == "cpu" and has_kernel(self.kind):
            y = self.kernel(x.flatten(0, -2)).view(*x.shape[:-1], -1).to(x.dtype)
            return y if self.bias is None else y + self.bias
        return F.linear(x, self.rows().to(x.dtype), self.bias)


class QuantizedEmbedding(QuantizedLinear):
    """The table of an embedding that is tied to the head."""

    def forward(self, ids):  # (...) int64 -> (..., d)
        return self.rows(ids)


@functools.lru_cache
def has_kernel(kind):
    """Whether this PyTorch has the kernel, which is undocumented, and its results are right."""
    try:
        with torch.random.fork_rng([]):
            linear, x = QuantizedLinear(nn.Linear(64, 32, bias=False), kind), torch.randn(2, 64)
            return (linear.kernel(x) - x @ linear.rows().T).abs().max().item() < 0.1
    except (AttributeError, RuntimeError, TypeError):
        return False


def quantize(model, kind):
    """Make the weights of a Transformer's linear layers int8 or int4, in place -> the model.

    Gains, routers, Hyena's filters and embeddings stay as they are. The head, where errors matter
    most, becomes int8 in any case, together with an embedding that is tied to it.
    """
    if kind not in ("int8", "int4"):
        raise ValueError(f"a model can be quantized to int8 or int4, not {kind}")
    if model.quantized:
        raise ValueError(f"the model is quantized already, to {model.quantized}")
    kept = ("router", "k_up", "v_up",  # of these two LatentAttention uses the matrix
            "filter_in", "filter_mid", "filter_out")
    for parent in list(model.blocks.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and name not in kept:
                setattr(parent, name, QuantizedLinear(child, kind))
    if model.config.tie_embeddings:
        model.embedding = QuantizedEmbedding(model.head, "int8")
    model.head = QuantizedLinear(model.head, "int8")
    model.tie()
    model.quantized = kind
    return model.requires_grad_(False)


# -----------------------------------------------------------------------------
# Checkpoints.


def one_line(error):
    """What an exception says, in one line."""
    text = f"{error} is missing" if type(error) is KeyError else str(error)
    return " ".join((text or type(error).__name__).split())[:300]


def save_checkpoint(path, model, optimizer=None, step=0, best_val_loss=math.inf, rng=None,
                    args=None, tokenizer=None, template=None):
    """Write everything needed to use a model, or to go on training it, to one file.

    optimizer: anything with state_dict(), or a list of such; rng: dict of RNG states; args: dict
    of plain values; tokenizer: the text of its tokenizer.json; template: see `chat_template`.
    A module without a config is saved without one: see `into` of `load_checkpoint`.
    Whatever happens meanwhile, `path` is a whole checkpoint, the old or the new. Raises OSError.
    """
    if isinstance(optimizer, (list, tuple)):
        optimizer = [o.state_dict() for o in optimizer]
    elif optimizer:
        optimizer = optimizer.state_dict()
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    config = getattr(model, "config", None)
    checkpoint = {
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else None,
        "model": model.state_dict(), "optimizer": optimizer, "step": step,
        "best_val_loss": best_val_loss, "rng": rng, "args": args, "tokenizer": tokenizer,
        "template": template, "quantize": getattr(model, "quantized", None)}
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, (OSError, RuntimeError)):  # RuntimeError: torch's failed write
            raise OSError(f"could not write {path}: {one_line(error)}") from None
        raise


def load_checkpoint(path, device="cpu", into=None):
    """Read a checkpoint -> (Transformer in eval mode, the dict of `save_checkpoint`).

    into: a module of any kind that is to get the weights, and is returned in place of a new one.

    Only tensors and plain Python values are read, so a file from a stranger can not run code.
    Raises OSError, or ValueError for a file that is no checkpoint or contradicts itself.
    """
    if not os.path.exists(path):
        raise ValueError(f"there is no checkpoint {path}: python train.py makes one")
    open(path, "rb").close()  # raises OSError if it can not be read at all
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # what torch raises for broken files varies from one to the next
        raise ValueError(f"{path} is no checkpoint, or holds more than tensors and plain values: "
                         f"PyTorch reports {type(error).__name__}") from None
    try:
        if type(checkpoint) is not dict:
            raise ValueError("it holds no dict")
        state, kind, template = checkpoint["model"], *map(checkpoint.get, ("quantize", "template"))
        if into is not None:
            into.load_state_dict(state)
            return into, checkpoint
        if checkpoint["config"] is None:
            raise ValueError("it is of another kind of module: see `into`")
        if template is not None and not (
                type(template) is dict and set(template) == {*ROLES, "begin", "default_system"}
                and all(type(text) is str for text in template.values())
                and all(template[role].count("{content}") == 1 for role in ROLES)):
            raise ValueError("its chat template lacks a part, or a place for {content}")
        model = empty_model(TransformerConfig(**checkpoint["config"]), len(state))
        model = quantize(model, kind) if kind else model
        for name, want in model.state_dict().items():  # (`fill` compares shapes and names)
            x = state[name]
            if x.dtype != want.dtype and not (x.is_floating_point() and want.is_floating_point()):
                raise ValueError(f"{name} is of {x.dtype}, by its config of {want.dtype}")
            if x.untyped_storage().nbytes() < x.nbytes:  # strides of 0 make much out of few bytes
                raise ValueError(f"{name} has fewer bytes than numbers")
        return fill(model, state, device), checkpoint
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of this model: {one_line(error)}") from None


def empty_model(config, n_tensors):
    """A Transformer of shapes without numbers, for a file of so many tensors. Raises ValueError
    at once if these are too few: a small file must not cost minutes."""
    parts = config.n_layer * (config.n_expert if config.activation == "moe" else 1)
    if parts > n_tensors:
        raise ValueError(f"{parts} layers or experts need more than its {n_tensors} tensors")
    with torch.device("meta"):
        return Transformer(config)


def fill(model, state, device):
    """Give a model on the meta device the tensors of a state dict -> the model, in eval mode.
    This way no random numbers are drawn only to be overwritten."""
    model.load_state_dict(state, assign=True)
    model.tie()
    return model.to(device).eval()


def pick_device(name="auto"):
    """The best device there is, or the one asked for. Raises ValueError if it is not there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.zeros(1, device=name).item()  # (raises for "meta", which has no numbers)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} is not there: {one_line(error)}") from None
    return name


# -----------------------------------------------------------------------------
# Pruning: a smaller model out of a larger one.


@torch.no_grad()
def prune(model, ids, n_layer=0, n_embd=0, d_ff=0):
    """A smaller Transformer out of the most important parts of a model, to be trained a little
    more, best with the large one as its teacher (Muralidharan et al. 2024; Men et al. 2024).

    ids: (B, T) int64 of text, on which importance is measured. Kept are (0: all of them) the
    n_layer blocks that change the direction of their input most; the n_embd channels with the
    largest output of the norms, and as many heads as that width has, those with the largest
    output; in each block the d_ff units with the largest activation.
    Raises ValueError for models or sizes it does not fit.
    """
    c, D = model.config, model.config.head_size
    n_layer, n_embd, d_ff = n_layer or c.n_layer, n_embd or c.n_embd, d_ff or c.d_ff
    narrower = n_embd != c.n_embd
    if set(model.kinds) != {"full"} or c.activation == "moe" or c.norm == "none" \
            or model.quantized:
        raise ValueError("only models of full attention, with norms, without experts and not "
                         "int8 or int4 can be pruned")
    if narrower and (c.n_kv_head != c.n_head or c.n_head * D != c.n_embd or c.qk_norm_joint):
        raise ValueError("heads that are grouped or normalised together can not become fewer")
    if (narrower and n_embd % D) or not (
            0 < n_layer <= c.n_layer and 0 < n_embd <= c.n_embd and 0 < d_ff <= c.d_ff):
        raise ValueError(f"the sizes must be at most the model's: n_layer {c.n_layer}, n_embd "
                         f"{c.n_embd} (and a multiple of the head size, {D}), d_ff {c.d_ff}")
    change, heads, units, sizes, handles = [], [], [], [], []

    def watch(module, into, measure):
        handles.append(module.register_forward_hook(
            lambda _, args, y: into.append(measure(args[0].float(), y.float()))))

    for block in model.blocks:
        watch(block, change, lambda x, y: 1 - F.cosine_similarity(x, y, dim=-1).mean())
        watch(block.attn.o_proj, heads,
              lambda x, y: x.unflatten(-1, (-1, D)).norm(dim=-1).mean((0, 1)))
        watch(block.ffn.w2, units, lambda x, y: x.abs().mean((0, 1)))
        for norm in (block.attn_norm, block.ffn_norm):
            watch(norm, sizes, lambda x, y: y.abs().mean((0, 1)))
    model(ids)
    for handle in handles:
        handle.remove()

    def best(importance, n):  # indices of the n largest, in their order
        return torch.as_tensor(importance).topk(n).indices.sort().values

    channels, n_head = best(sum(sizes), n_embd), n_embd // D if narrower else c.n_head
    state = {name: x[..., channels] for name, x in model.state_dict().items()
             if not name.startswith("blocks.")}  # embeddings, head: (n, C); final_norm: (C,)
    for new, old in enumerate(best(change, n_layer).tolist()):
        inside = best(units[old], d_ff)
        width = torch.arange(c.n_head * D, device=ids.device).view(-1, D)
        width = width[best(heads[old], n_head)].flatten()
        kv_width = width if narrower else slice(None)
        rows = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width, "w1": inside,
                "w3": inside, "q_norm": slice(None), "k_norm": slice(None)}
        columns = {"o_proj": width, "w2": inside}
        for name, x in model.blocks[old].state_dict().items():
            part = name.split(".")[-2]
            x = x[rows.get(part, channels)]
            state[f"blocks.{new}.{name}"] = x[:, columns.get(part, channels)] if x.ndim > 1 else x
    small = Transformer(dataclasses.replace(
        c, n_layer=n_layer, n_embd=n_embd, d_ff=d_ff, n_head=n_head,
        n_kv_head=n_head if narrower else c.n_kv_head, kv_rank=0))
    small.load_state_dict(state)
    return small.to(ids.device).eval()


# -----------------------------------------------------------------------------
# Chat. A template says how messages become one text: for each role a text in which {content}
# stands for the message; "begin", which comes first; and "default_system", the system's message
# if none is given.

ROLES = ("system", "user", "assistant")
TEMPLATES = {  # what begins a conversation, and a message: of any role, or of each
    "chatml": ("", "<|im_start|>ROLE\n{content}<|im_end|>\n"),  # Qwen, SmolLM2
    "llama3": ("<|begin_of_text|>",
               "<|start_header_id|>ROLE<|end_header_id|>\n\n{content}<|eot_id|>"),
    "llama2": ("<s>", "{content}\n\n", "[INST] {content} [/INST]", " {content}</s>"),  # Mistral
    "plain": ("", "ROLE: {content}\n")}  # needs no special tokens


def chat_template(name="chatml", system=""):
    """One of the templates that models in use have."""
    begin, *texts = TEMPLATES[name]
    texts = texts if len(texts) > 1 else [texts[0].replace("ROLE", role) for role in ROLES]
    return dict(zip(ROLES, texts)) | {"begin": begin, "default_system": system}


def recognise_template(jinja_text):
    """The template that is equivalent to the chat_template of a tokenizer_config.json, or None.
    That is a program; it is searched for known marks, not run."""
    for mark, name in (("<|im_start|>", "chatml"), ("<|start_header_id|>", "llama3"),
                       ("[INST]", "llama2")):
        if mark in jinja_text:
            # a default system message that is plain text: no variable, no quote, no other mark
            system = re.search(r"<\|im_start\|>system(?:\\n|\n)"
                               r"((?:[^{}'\"<]|<(?!\|im_))*)<\|im_end\|>", jinja_text)
            return chat_template(name, system[1] if system else "")
    return None


def read_tokenizer(text, most=math.inf):
    """The text of a tokenizer.json -> bpe.Tokenizer of at most so many tokens, or ValueError."""
    from bpe import Tokenizer

    try:
        tokenizer = Tokenizer.from_json(text)
    except ValueError as error:
        raise ValueError(f"its tokenizer can not be used: {error}") from None
    if tokenizer.vocab_size > most:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens, and a model of {most}")
    return tokenizer


def encode_chat(tokenizer, template, messages, reply=True):
    """Ids of a conversation, a list of {"role": ..., "content": ...}; with reply, up to where the
    assistant's next message begins. Special tokens are recognised in the template only, so that
    nothing a user writes can end a message or begin another. Raises ValueError."""
    if template["default_system"] and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": template["default_system"]}, *messages]
    pieces = [template["begin"]]  # template and content in turn
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"a message's role is {', '.join(ROLES)}, not {message['role']!r}")
        head, tail = template[message["role"]].split("{content}")
        pieces[-1] += head
        pieces += [message["content"], tail]
    if reply:
        pieces[-1] += template["assistant"].split("{content}")[0]
    special = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
    ids, text = [], ""  # text: what stands between two special tokens, content and template
    for i, piece in enumerate(pieces):
        for part in re.split(f"({special})", piece) if special and i % 2 == 0 else [piece]:
            if i % 2 == 0 and part in tokenizer.special_tokens:
                ids += [*tokenizer.encode_ordinary(text), tokenizer.special_tokens[part]]
                text = ""
            else:
                text += part
    return ids + tokenizer.encode_ordinary(text)


def chat_stops(tokenizer, template):
    """Ids that end the assistant's message."""
    tail = template["assistant"].split("{content}")[1]
    stops = {i for text, i in tokenizer.special_tokens.items() if text in tail}
    return stops | ({tokenizer.eot_id} - {None})


# -----------------------------------------------------------------------------
# Models from outside, and models for others: folders in the format of Hugging Face's transformers,
# with config.json, model.safetensors (or several, with an index) and tokenizer.json.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
FAMILIES = {  # {model_type: (architecture, what all such models have)}
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True}),
    "olmo2": ("Olmo2ForCausalLM", {"qk_norm_joint": True, "norm_place": "res_post"}),
    "gpt2": ("GPT2LMHeadModel", {"position": "learned", "norm": "layernorm", "bias": True})}
# {our name: theirs}, for the numbers in config.json and for tensors ({}: the number of the layer)
NUMBERS = {"vocab_size": "vocab_size", "block_size": "max_position_embeddings",
           "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size", "head_size": "head_dim",
           "d_ff": "intermediate_size", "norm_eps": "rms_norm_eps"}
GPT2_NUMBERS = {"vocab_size": "vocab_size", "block_size": "n_positions", "n_layer": "n_layer",
                "n_head": "n_head", "n_embd": "n_embd", "d_ff": "n_inner",
                "norm_eps": "layer_norm_epsilon"}
OPTIONAL = "num_key_value_heads", "head_dim", "rms_norm_eps", "layer_norm_epsilon", "n_inner"
# what has to be replaced in our name of a tensor to have theirs
RENAMED = (("blocks.", "model.layers."), ("attn_norm", "input_layernorm"),
           ("ffn_norm", "post_attention_layernorm"), ("attn.", "self_attn."),
           ("ffn.w1", "mlp.gate_proj"), ("ffn.w2", "mlp.down_proj"), ("ffn.w3", "mlp.up_proj"),
           ("embedding.", "model.embed_tokens."), ("final_norm", "model.norm"),
           ("head.", "lm_head."))
OLMO2_RENAMED = (("attn_norm", "post_attention_layernorm"),
                 ("ffn_norm", "post_feedforward_layernorm"), *RENAMED)
GPT2_RENAMED = (("blocks.", "transformer.h."), ("attn_norm", "ln_1"), ("ffn_norm", "ln_2"),
                ("attn.o_proj", "attn.c_proj"), ("attn.q_proj", "attn.c_attn.q"),
                ("attn.k_proj", "attn.c_attn.k"), ("attn.v_proj", "attn.c_attn.v"),
                ("ffn.w1", "mlp.c_fc"), ("ffn.w2", "mlp.c_proj"), ("head.", "lm_head."),
                ("embedding.", "transformer.wte."), ("positions.", "transformer.wpe."),
                ("final_norm", "transformer.ln_f"))
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu",
                    "relu": "relu", "silu": "silu", "swish": "silu"}
# what we take for granted: the name of an option, and its values, the default first
NEEDS = (("hidden_act", "silu", "swish"), ("clip_qkv", None), ("partial_rotary_factor", 1))
GPT2_NEEDS = (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False),
              ("add_cross_attention", False), ("activation_function", *GPT2_ACTIVATIONS))
SCALING = {"default": (), "linear": ("factor",),
           "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                      "original_max_position_embeddings")}


def read_json(path):
    """The dict in a JSON file. Raises ValueError, or OSError."""
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} holds no JSON object: {error}") from None


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes with the length of a header, the header, of
    JSON, which gives each tensor's dtype, shape and place, and the tensors' bytes. Nothing in it
    is trusted: raises ValueError if a length, a shape or a place does not fit the file."""
    size, tensors, at = os.path.getsize(path), {}, 0
    try:
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            if n > min(size - 8, 100_000_000):
                raise ValueError("its header does not fit in it")
            header = json.loads(file.read(n))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (begin, end) = (DTYPES[entry["dtype"]], entry["shape"],
                                              entry["data_offsets"])
                if len(shape) > 64 or not all(type(x) is int and 0 <= x < 2**48
                                              for x in (*shape, begin, end)):
                    raise ValueError(f"{name} has sizes that are no numbers, or too large")
                if math.prod(shape) * dtype.itemsize != end - begin:
                    raise ValueError(f"{name} of shape {shape} can not have {end - begin} bytes")
                if begin != at or end > size - 8 - n:
                    raise ValueError("its tensors overlap, leave gaps, or go on behind its end")
                data = bytearray(end - begin)
                at += file.readinto(data)
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                tensors[name] = flat.view(shape)
            if at != size - 8 - n:
                raise ValueError("its tensors end before the file")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is no safetensors file: {one_line(error)}") from None
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file. Raises OSError."""
    names, header, at = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for name, x in tensors.items():
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def config_from(theirs):
    """Their config.json, a dict -> (TransformerConfig, family, the parts that have biases).
    Raises ValueError for what our model can not be, and whatever a dict of nonsense leads to."""
    family = theirs.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"its model_type is {family!r}; known are {', '.join(FAMILIES)}")

    ours = dict(FAMILIES[family][1])
    for name, key in (GPT2_NUMBERS if family == "gpt2" else NUMBERS).items():
        if key not in OPTIONAL or theirs.get(key) is not None:
            ours[name] = theirs[key]
    ours["tie_embeddings"] = theirs.get("tie_word_embeddings", family == "gpt2")
    for name, *values in GPT2_NEEDS if family == "gpt2" else NEEDS:
        if theirs.get(name, values[0]) not in values:
            raise ValueError(f"its {name} is {theirs[name]!r}, which is not supported")
    if family == "gpt2":
        activation = GPT2_ACTIVATIONS[theirs.get("activation_function", "gelu_new")]
        return TransformerConfig(**ours, activation=activation), family, ("attn", "ffn")
    ours.setdefault("norm_eps", 1e-6)
    ours.setdefault("head_size", 128 if family == "qwen3" else 0)
    rope = {"rope_theta": theirs.get("rope_theta", 10000.0)}
    for old_or_new in ("rope_scaling", "rope_parameters"):
        rope |= theirs.get(old_or_new) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SCALING or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"its rotary positions are of type {kind!r}, which is not supported")
    if SCALING[kind]:
        ours["rope_scaling"] = f"{kind}:" + ",".join(str(rope[name]) for name in SCALING[kind])
    window = theirs.get("sliding_window")
    windowed = family in ("qwen2", "qwen3") and theirs.get("use_sliding_window")
    if window and window < ours["block_size"] and (windowed or family == "mistral"):
        ours |= {"attention": "sliding", "window": window}
        if family != "mistral":
            layers = [kind.removesuffix("_attention") for kind in theirs["layer_types"]]
            if len(layers) != ours["n_layer"] or not set(layers) <= {"sliding", "full"}:
                raise ValueError("its layer_types are not sliding_ or full_attention per layer")
            ours["attention"] = ",".join(layers)
    biased = ("attn.q", "attn.k", "attn.v") if family == "qwen2" else ()
    if family in ("llama", "qwen3", "olmo2"):
        biased += ("attn",) * bool(theirs.get("attention_bias"))
        biased += ("ffn",) * bool(theirs.get("mlp_bias"))
        ours["bias"] = bool(biased)
    return TransformerConfig(**ours, rope_theta=float(rope["rope_theta"])), family, biased


def config_for(config):
    """-> (their config.json as a dict, family). Raises ValueError if there is no such family. The
    right one is the first in whose words the config, read back, is the same model."""
    c, n = config, config.n_layer
    layers = ["full" if kind == "sliding" and c.window >= c.block_size else kind
              for kind in map(c.attention_of, range(n))]
    activations = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
    kind, _, values = c.rope_scaling.partition(":")
    values = [float(x) if i < 3 else int(float(x)) for i, x in enumerate(values.split(",")) if x]
    for family, (architecture, _) in FAMILIES.items():
        theirs = {key: getattr(c, name)
                  for name, key in (GPT2_NUMBERS if family == "gpt2" else NUMBERS).items()}
        theirs |= {"model_type": family, "architectures": [architecture],
                   "torch_dtype": "float32", "tie_word_embeddings": c.tie_embeddings}
        if family == "gpt2":
            theirs["activation_function"] = activations.get(c.activation, "relu")
        else:
            theirs |= {"hidden_act": "silu", "rope_theta": c.rope_theta,
                       "attention_bias": c.bias, "mlp_bias": c.bias and family == "llama"}
            if values:
                theirs["rope_scaling"] = {"rope_type": kind, **dict(zip(SCALING[kind], values))}
            if "sliding" in layers:
                theirs |= {"sliding_window": c.window, "use_sliding_window": True,
                           "layer_types": [f"{layer}_attention" for layer in layers]}
        back = config_from(theirs)[0]
        same = all(getattr(c, name) == getattr(back, name) for name in (
            "activation", "position", "norm", "norm_place", "logit_cap", "qk_norm",
            "qk_norm_joint", "n_kv_head", "head_size"))
        biases = (back.bias or not c.bias) and (back.bias or back.qkv_bias or not c.qkv_bias)
        if same and biases and layers == [back.attention_of(i) for i in range(n)]:
            return theirs, family
    raise ValueError(f"transformers has no family of this kind among {', '.join(FAMILIES)}")


def their_names(model, family, biased):
    """{our name of a tensor: theirs} of all that a file of this model holds. biased: the parts of
    a block that have biases there, though ours may have them in more."""
    renamed = {"gpt2": GPT2_RENAMED, "olmo2": OLMO2_RENAMED}.get(family, RENAMED)
    names = {}
    for name in model.state_dict():
        part = re.sub(r"blocks\.\d+\.", "", name)
        extra = part.endswith(".bias") and "norm" not in part and not part.startswith(biased)
        if not extra and not (part == "head.weight" and model.config.tie_embeddings):
            names[name] = name
            for old, new in renamed:
                names[name] = names[name].replace(old, new)
    return names


def import_folder(folder):
    """A folder as transformers writes it -> Transformer in eval mode, float32.

    GPT-2, Llama 1 to 3, Mistral, Qwen 2, 2.5 and 3, OLMo 2, and what shares their architecture.
    Their rotary positions turn halves of a head, as ours do, so no rows are permuted. Raises
    ValueError for other models, and for tensors that are missing, left over or of another shape.
    """
    theirs = read_json(os.path.join(folder, "config.json"))
    index, files = os.path.join(folder, "model.safetensors.index.json"), ["model.safetensors"]
    try:
        if os.path.exists(index):
            files = sorted(set(read_json(index)["weight_map"].values()))
        config, family, biased = config_from(theirs)
        found = {}
        for name in files:
            if os.path.basename(name) != name:
                raise ValueError(f"{index} names {name}, which is not in its own folder")
            if not os.path.exists(os.path.join(folder, name)):
                raise ValueError(f"it has no {name} (.bin is not read: pickles can run code)")
            found |= read_safetensors(os.path.join(folder, name))
        if family == "gpt2":
            found = gpt2_apart(found)
        model = empty_model(config, len(found))
        names, state = their_names(model, family, biased), {}
        for ours, want in model.state_dict().items():
            if ours not in names:  # tied, or a bias that they do not have
                x = state["embedding.weight"] if ours == "head.weight" else torch.zeros(want.shape)
            elif (x := found.pop(names[ours], None)) is None:
                raise ValueError(f"it lacks the tensor {names[ours]}")
            if x.shape != want.shape or not x.is_floating_point():
                raise ValueError(f"{names[ours]} is {tuple(x.shape)} of {x.dtype}; by config.json "
                                 f"it is {tuple(want.shape)}")
            state[ours] = x.float().contiguous()
        tied = "lm_head.weight" if config.tie_embeddings else None
        for name in found:
            if name != tied and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{name} has no place in the model")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{folder} can not be imported: {one_line(error)}") from None
    return fill(model, state, "cpu")


def gpt2_apart(found):
    """GPT-2 has one matrix for queries, keys and values, and all of them (.c_) transposed."""
    tensors = {}
    for name, x in found.items():
        if name.endswith((".attn.bias", "masked_bias")):  # a mask, not learned
            continue
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        x = x.t() if ".c_" in name else x
        if ".c_attn." in name:
            for part, y in zip("qkv", x.chunk(3)):
                tensors[name.replace("c_attn", f"c_attn.{part}")] = y
        else:
            tensors[name] = x
    return tensors


def gpt2_together(tensors):
    """The inverse of `gpt2_apart`."""
    out = {}
    for name, x in tensors.items():
        whole = re.sub(r"c_attn\.[qkv]", "c_attn", name)
        out[whole] = torch.cat((out[whole], x)) if whole in out else x
    return {name: x.t() if ".c_" in name else x for name, x in out.items()}


def export_folder(model, folder, tokenizer=None):
    """Write a model as a folder that transformers opens -> its family there. tokenizer: the text
    of tokenizer.json. Raises ValueError if there is no such family, or if the folder exists and is
    not empty; OSError.
    """
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(f"{folder} is there already")
    if model.quantized:
        raise ValueError("a quantized model can not be exported: take the one it was made from")
    files = {"config.json": config_for(model.config)[0]}
    config, family, biased = config_from(files["config.json"])
    theirs = empty_model(config, math.inf)
    names, state = their_names(theirs, family, biased), model.state_dict()
    for ours in set(state) - set(names):
        if ours.endswith("bias") and state[ours].any():
            raise ValueError(f"{family} has no place for {ours}")
    shapes = theirs.state_dict()  # biases that only they have are zeros
    tensors = {name: state[ours] if ours in state else torch.zeros(shapes[ours].shape)
               for ours, name in names.items()}
    if tokenizer:
        t = read_tokenizer(tokenizer)
        ends = [text for text, i in t.special_tokens.items() if i == t.eot_id]
        files["config.json"] |= {"eos_token_id": t.eot_id, "bos_token_id": t.eot_id}
        files["tokenizer.json"] = json.loads(tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.block_size,
            **({"eos_token": ends[0], "bos_token": ends[0]} if ends else {})}
    temporary = os.path.normpath(folder) + ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        write_safetensors(os.path.join(temporary, "model.safetensors"),
                          gpt2_together(tensors) if family == "gpt2" else tensors)
        for name, data in files.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                json.dump(data, file, indent=2, ensure_ascii=False)
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return family


# -----------------------------------------------------------------------------
# Resource accounting: what a model costs.


def _parts(config):
    """{part: (its modules, the share of them that one token meets)}, of a model without numbers"""
    model = empty_model(config, math.inf)
    blocks, mixtures, shared = model.blocks, model.mixtures(), config.n_shared_expert
    norms = [norm for block in blocks for norm in (block.attn_norm, block.ffn_norm)]
    return {
        "embedding": ([model.embedding], 1),
        "positions": ([model.positions] if config.position == "learned" else [], 1),
        "attention": ([block.attn for block in blocks], 1),
        "feed-forward": ([block.ffn for block in blocks if not mixtures], 1),
        "experts": ([expert for m in mixtures for expert in m.experts + m.shared],
                    (config.top_k + shared) / (config.n_expert + shared)),
        "router": ([mixture.router for mixture in mixtures], 1),
        "norms": ([*norms, model.final_norm], 1),
        "head": ([model.head], 1)}


def _matrices(modules):
    """The weights of all linear layers that work on tokens."""
    return [m.weight for module in modules for name, m in module.named_modules()
            if isinstance(m, Linear) and "filter" not in name]


def count_parameters(config):
    """{part: number of parameters}. Tied matrices count once."""
    counts = {part: sum(p.numel() for module in modules for p in module.parameters())
              for part, (modules, _) in _parts(config).items()}
    if config.tie_embeddings:
        counts["head"] = 0
    return {part: n for part, n in counts.items() if n or part in ("positions", "head")}


def mixing_flops(c, kind, T):
    """FLOPs per token of a kind of attention beside its projections, over T tokens. With a mask,
    scores and sums of values count over the half (or the window) that it leaves."""
    W = min(T, c.window)
    width, seen = c.n_head * c.head_size, W - W * (W - 1) / 2 / T  # positions seen in a window
    return int({
        "full": 2 * 2 * width * T / 2,
        "sliding": 2 * 2 * width * seen,
        "linear": 2 * 2 * width * (min(T, 64) + c.head_size),  # inside a chunk, and the state
        "latent": 2 * (2 * width + c.n_head * c.rope_of("latent")) * T / 2,
        # three transforms of 2 T numbers per channel at about 5 n log2(n) / 2 each
        "hyena": c.n_embd * 3 * 2.5 * 2 * math.log2(2 * T)}[kind])


def count_flops(config, T=None):
    """{part: FLOPs per token} of a forward pass over T tokens (default block_size); training
    takes three times that. A multiplication and its addition are two. Counted are the products
    with weights (of experts, those a token meets) and what attention does beside them."""
    flops = {part: round(2 * sum(w.numel() for w in _matrices(modules)) * share)
             for part, (modules, share) in _parts(config).items() if _matrices(modules)}
    flops["attention, scores and values"] = sum(
        mixing_flops(config, config.attention_of(i), T or config.block_size)
        for i in range(config.n_layer))
    return flops


def info(config, batch_size, tflops):
    """Print what a model of this config costs."""
    parameters, flops = count_parameters(config), count_flops(config)
    total, forward = sum(parameters.values()), sum(flops.values())
    # kept for the backward pass of a token, roughly: the input and the output of each linear
    # layer, what the two norms of a block keep, and the logits
    kept = (2 * config.n_layer + 1) * 2 * config.n_embd + 2 * config.vocab_size
    for part, (modules, share) in _parts(config).items():
        if part in ("attention", "feed-forward", "experts"):
            kept += sum(sum(w.shape) for w in _matrices(modules)) * share
    memory = {"weights": 4 * total, "gradients": 4 * total, "optimizer (AdamW)": 8 * total,
              f"activations of {batch_size} texts, about":
                  4 * int(batch_size * config.block_size * kept)}
    print(", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()))
    for title, table in (("parameters", parameters), ("FLOPs per token, forward", flops),
                         ("bytes for training in float32", memory)):
        whole = sum(table.values())
        print(f"\n{title:40}{whole:16,}")
        for part, n in table.items():
            print(f"  {part:38}{n:16,}{n / whole:8.1%}")
    rate = tflops * 1e12 / (3 * forward)
    print(f"\nFLOPs per token, training: {3 * forward:,} (6 x parameters: {6 * total:,})\n"
          f"at {tflops:g} TFLOP/s: {rate:,.0f} tokens/s in training, "
          f"{total * 20 / rate / 3600:,.2f} hours for 20 tokens per parameter")


# -----------------------------------------------------------------------------
# The command line.

CKPT = os.path.join("out", "ckpt.pt")
COMMANDS = {"sample": 0, "chat": 0, "info": 0, "prune": 0, "quantize": 0, "import": 1, "export": 2}


def number(kind, low=0, high=math.inf):
    """A type for argparse: a finite int or float from low to high."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # for argparse's own messages
    return read


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    parser = argparse.ArgumentParser(description="Sample from a model, chat with it, make it "
                                     "smaller, account for its costs, bring it in or out.")
    add, positive = parser.add_argument, number(int, 1)
    add("command", nargs="?", default="sample", choices=COMMANDS)
    add("paths", nargs="*", help="import: the folder; export: the checkpoint, the folder to make")
    add("--ckpt", default=CKPT, metavar="FILE", help=f"default: {CKPT}")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--quantize", choices=("int8", "int4"), help="weights as integers")
    add("--out", metavar="FILE", help="prune, quantize, import: the checkpoint to write (default "
        "out/COMMAND.pt)")
    add = parser.add_argument_group("sample and chat").add_argument
    add("--prompt", help="text to continue (default: a new document)")
    add("--num_samples", type=positive, default=1)
    add("--max_new_tokens", type=positive, default=200, help="tokens to add (default 200)")
    add("--temperature", type=number(float), default=0.8, help="0: always the likeliest token")
    add("--top_k", type=positive, help="draw from the k likeliest tokens; info: "
        "experts that a token goes to")
    add("--top_p", type=number(float, 1e-9, 1), help="draw from the likeliest tokens that have "
        "this probability together")
    add("--min_p", type=number(float, 0, 1), help="draw from tokens with at least this fraction "
        "of the likeliest one's probability")
    add("--seed", type=number(int, -(2**63), 2**63 - 1), default=1337)
    add("--draft", metavar="CKPT", help="sample: a small model with the same tokenizer that "
        "guesses ahead; the distribution stays the same")
    add("--gamma", type=number(int, 1, SlidingWindowAttention.SLACK - 1), default=4,
        help="tokens that it guesses (default 4)")
    add("--system", help="chat: what the assistant is told to be")
    add("--template", choices=TEMPLATES, help="chat: in place of the one in the checkpoint")
    add = parser.add_argument_group("info, prune", "of a checkpoint, or of a model of these "
                                    "sizes").add_argument
    for field in dataclasses.fields(TransformerConfig):
        how = {"action": "store_true"} if field.type is bool else {"type": field.type,
                                                                   "metavar": "X"}
        if field.name != "top_k":  # the flag is there already
            add(f"--{field.name}", default=None, **how,
                help=f"{field.metadata['help']} (default {field.default!r})")
    add("--batch_size", type=positive, default=32, help="sequences (default 32)")
    add("--tflops", type=number(float, 1e-9), default=0.1, help="of the device (default 0.1)")
    args = parser.parse_args()
    if len(args.paths) != COMMANDS[args.command]:
        parser.error({0: f"{args.command} takes no paths: see --ckpt and --out",
                      1: "import takes one folder", 2: "export takes a checkpoint and a folder to "
                      "make"}[COMMANDS[args.command]])
    if args.command == "prune" and not (args.n_layer or args.n_embd or args.d_ff):
        parser.error("prune needs a size to come down to: --n_layer, --n_embd or --d_ff")
    try:
        run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        # (torch's: no memory, numbers that are not finite, ...)
        print(f"model.py: error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)


def run(args):
    """Do what the command line asks for."""
    if args.command == "info":
        names = [field.name for field in dataclasses.fields(TransformerConfig)]
        sizes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
        if args.ckpt != CKPT or (not sizes and os.path.exists(CKPT)):
            sizes = dataclasses.asdict(load_checkpoint(args.ckpt)[0].config) | sizes
        return info(TransformerConfig(**sizes), args.batch_size, args.tflops)
    if args.command == "import":
        return import_command(args)
    path, device = args.paths[0] if args.paths else args.ckpt, pick_device(args.device)
    model, checkpoint = load_checkpoint(path, device)
    if args.command == "export":
        family = export_folder(model, args.paths[1], checkpoint.get("tokenizer"))
        print(f"{args.paths[1]}: {family}, {n_parameters(model):,} parameters")
        return
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{path} holds no tokenizer: it was trained on ids of unknown meaning")
    tokenizer = read_tokenizer(checkpoint["tokenizer"], model.config.vocab_size)
    start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]  # a document begins after one
    ids = start + tokenizer.encode(args.prompt or "")
    if not ids:
        raise ValueError("this tokenizer has no end-of-text token to begin with: give a --prompt")
    if len(ids) > model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, of {model.config.block_size} at most")
    generator = torch.Generator(device).manual_seed(args.seed)
    how = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p,
               generator=generator)
    if args.command in ("prune", "quantize"):
        return smaller_command(args, model, checkpoint, ids, generator)
    if args.quantize and args.quantize != model.quantized:
        quantize(model, args.quantize)
    if args.command == "chat":
        template = chat_template(args.template) if args.template else checkpoint.get("template")
        return chat(model, tokenizer, template, args.system, args.max_new_tokens, **how)
    draft = None
    if args.draft:
        draft, theirs = load_checkpoint(args.draft, device)
        if theirs.get("tokenizer") != checkpoint["tokenizer"]:
            raise ValueError(f"{args.draft} has another tokenizer than {path}")
        if args.quantize and args.quantize != draft.quantized:
            quantize(draft, args.quantize)
    total, begin = collections.Counter(), time.perf_counter()
    for i in range(args.num_samples):
        print("---------------\n" if i else "", args.prompt or "", sep="", end="", flush=True)
        show, finish = printer(tokenizer, {tokenizer.eot_id})
        how |= {"stop": tokenizer.eot_id, "on_token": show}
        if draft:
            text, counts = speculate(model, draft, torch.tensor([ids], device=device),
                                     args.max_new_tokens, args.gamma, **how)
            total.update(counts, tokens=len(text[0]) - len(ids))
        else:
            model.generate([ids], args.max_new_tokens, **how)
        finish()
    if draft:
        print(f"{total['tokens'] / (time.perf_counter() - begin):.1f} tokens/s, "
              f"{total['accepted'] / max(1, total['proposed']):.0%} of guesses accepted, "
              f"{total['tokens'] / max(1, total['calls']):.2f} tokens per call of the target",
              file=sys.stderr)


def n_parameters(model):
    """Their number, shared matrices counted once."""
    return sum(p.numel() for p in model.parameters())


def printer(tokenizer, stops):
    """-> (function for `on_token` that prints the text of ids as they come, function that ends the
    line). A token can be half of a character, which waits for the rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(_, token):
        if token not in stops:
            # (ids that only fill up a vocabulary have no text)
            print(decoder.decode(tokenizer.vocab.get(token, b"")), end="", flush=True)

    return show, lambda: print(decoder.decode(b"", True), flush=True)


def chat(model, tokenizer, template, system, max_new_tokens, **how):
    """Talk, line by line from standard input, until its end."""
    if not template:
        raise ValueError("no chat template in this checkpoint (align.py sft): give a --template")
    if system is not None:
        template = template | {"default_system": system}
    messages, stops, limit = [], chat_stops(tokenizer, template), model.config.block_size
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, template, messages)
        while len(ids) + min(max_new_tokens, limit // 2) > limit and len(messages) > 2:
            messages = messages[2:]  # forget what was said first
            ids = encode_chat(tokenizer, template, messages)
        if len(ids) >= limit:
            print(f"(that is {len(ids)} tokens, and the model takes {limit} at most: say less)")
            messages.pop()
            continue
        show, finish = printer(tokenizer, stops)
        text = model.generate([ids], min(max_new_tokens, limit - len(ids)), stop=stops,
                              on_token=show, **how)[0]
        finish()
        reply = tokenizer.decode([i for i in text[len(ids) :] if i not in stops])
        messages.append({"role": "assistant", "content": reply.strip()})


def write(args, model, parts, said):
    """Save the model that a command has made, and say what it is. out/ is made if need be, but no
    folder that was asked for."""
    if not args.out:
        os.makedirs("out", exist_ok=True)
    path = args.out or os.path.join("out", f"{args.command}.pt")
    save_checkpoint(path, model, **parts)
    print(f"{path}: {said}")


@torch.no_grad()
def smaller_command(args, model, checkpoint, ids, generator):
    """`prune` and `quantize`: write a smaller checkpoint. Both look at what the model does with
    text of its own."""
    texts = torch.tensor(model.generate([ids] * 16, min(256, model.config.block_size) - len(ids),
                                        generator=generator), device=generator.device)
    parts = {name: checkpoint.get(name) for name in ("args", "tokenizer", "template")}
    if args.command == "prune":
        small = prune(model, texts, args.n_layer or 0, args.n_embd or 0, args.d_ff or 0)
        said = f"{n_parameters(small):,} of {n_parameters(model):,} parameters"
        return write(args, small, parts, said)

    def measure():  # -> bytes, of each tensor once; tokens per second; mean loss
        n_bytes = sum({x.data_ptr(): x.nbytes for x in model.state_dict().values()}.values())
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            model.generate([ids], 48, temperature=0)
            seconds.append(time.perf_counter() - begin)
        losses = [F.cross_entropy(model(row[None])[0, :-1], row[1:]).item() for row in texts]
        return n_bytes, 48 / min(seconds), sum(losses) / len(losses)

    n_bytes, rate, loss = measure()
    quantize(model, args.quantize or "int8")
    new_bytes, new_rate, new_loss = measure()
    write(args, model, parts, f"{model.quantized}, {new_bytes:,} bytes instead of {n_bytes:,} | "
          f"{new_rate:.1f} tokens/s instead of {rate:.1f} | loss {new_loss:.4f} nats instead of "
          f"{loss:.4f} ({new_loss - loss:+.4f})")


def import_command(args):
    """`import`: a folder of transformers -> a checkpoint."""
    folder = args.paths[0]
    model = import_folder(folder)
    parts, said = {}, f"{n_parameters(model):,} parameters"
    path = os.path.join(folder, "tokenizer.json")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            read_tokenizer(text, model.config.vocab_size)
            parts["tokenizer"], said = text, said + ", a tokenizer"
        except ValueError as error:
            print(f"{path} is left out: {error}", file=sys.stderr)
    jinja, path = (os.path.join(folder, name)
                   for name in ("chat_template.jinja", "tokenizer_config.json"))
    text = ""
    if os.path.exists(jinja):
        with open(jinja, encoding="utf-8") as file:
            text = file.read()
    elif os.path.exists(path):
        text = str(read_json(path).get("chat_template") or "")
    if template := recognise_template(text):
        parts["template"], said = template, said + ", a chat template"
    elif text:
        print("its chat template is of an unknown kind, and is left out", file=sys.stderr)
    write(args, model, parts, said)


if __name__ == "__main__":
    main()
