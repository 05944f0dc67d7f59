"""model.py's parts against PyTorch's own, and its checkpoints and command line."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model as M
from bpe import EOT, Tokenizer

SMALL = dict(vocab_size=50, block_size=16, n_layer=2, n_head=4, n_embd=32)
GPT2 = dict(activation="gelu", norm="layernorm", position="learned", tie_embeddings=True, bias=True)
VARIANTS = {"llama": {}, "grouped": {"n_kv_head": 2}, "multi-query": {"n_kv_head": 1}, "gpt2": GPT2}


def check_close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**changes):
    return M.Transformer(M.TransformerConfig(**{**SMALL, **changes})).eval()


# ---- parts


def test_linear_and_embedding():
    x = torch.randn(2, 3, 8)
    for bias in (False, True):
        ours = M.Linear(8, 5, bias)
        assert ours.weight.shape == (5, 8) and (ours.bias is not None) == bias
        check_close(ours(x), x @ ours.weight.T + (ours.bias if bias else 0))
    wide = M.Linear(400, 600).weight
    assert abs(wide.std().item() - math.sqrt(2 / 1000)) < 2e-3
    assert wide.abs().max() <= 3 * math.sqrt(2 / 1000) + 1e-6
    table, ids = M.Embedding(7, 4), torch.tensor([[1, 6], [0, 1]])
    assert torch.equal(table(ids), table.weight[ids])


def test_norms():
    x = torch.randn(2, 3, 8)
    ours = M.RMSNorm(8, eps=1e-5)
    ours.weight.data = torch.randn(8)
    check_close(ours(x), F.rms_norm(x, (8,), ours.weight, 1e-5))
    big = (torch.randn(4, 8) * 1e3).to(torch.bfloat16)  # squares are taken in float32
    assert ours(big).dtype == torch.bfloat16
    check_close(ours(big).float(), F.rms_norm(big.float(), (8,), ours.weight, 1e-5), 1e-2)
    for shape in ((2, 3, 8), (8,), (2, 0, 8)):  # the backward pass by hand
        a = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        w = torch.randn(8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, w: M._RMSNorm.apply(a, w, 1e-5), (a, w))
        check_close(M._RMSNorm.apply(a, w, 1e-5), M.rms_norm(a, w, 1e-5), 1e-14)
    layer = M.LayerNorm(8, bias=True)
    check_close(layer(x), (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt())


def test_softmax_is_stable():
    x = torch.tensor([[1e4, 1e4 + 1, -1e4], [0.0, -math.inf, 2.0]])
    check_close(M.softmax(x), torch.softmax(x, -1))
    check_close(M.softmax(x + 1e3, dim=0)[:, [0, 2]], torch.softmax(x + 1e3, 0)[:, [0, 2]])


def test_rope_depends_on_distance_only_and_keeps_lengths():
    q, k = torch.randn(8), torch.randn(8)
    cos, sin = M.rope_angles(torch.arange(50), 8)
    for interleaved in (False, True):
        qs, ks = (M.apply_rope(x.expand(50, 8), cos, sin, interleaved) for x in (q, k))
        check_close(qs.norm(dim=-1), q.norm().expand(50), 1e-5)
        check_close(qs[7] @ ks[3], qs[44] @ ks[40], 1e-4)
        check_close(qs[0], q)


def test_mistake_3_rotary_layouts_are_not_the_same():
    """Half-split and interleaved pair other channels; they agree after a permutation of channels."""
    x = torch.randn(2, 5, 8)
    cos, sin = M.rope_angles(torch.arange(5), 8)
    half, inter = M.apply_rope(x, cos, sin), M.apply_rope(x, cos, sin, interleaved=True)
    assert not torch.allclose(half, inter, atol=1e-2)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # from interleaved to half-split
    check_close(M.apply_rope(x[..., order], cos, sin), inter[..., order])
    # by complex numbers, as the paper has it
    turned = torch.view_as_complex(x.view(2, 5, 4, 2)) * torch.complex(cos, sin)
    check_close(inter, torch.view_as_real(turned).flatten(-2))


def test_attention_equals_pytorch():
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 5)
    mask = torch.rand(6, 9) > 0.4
    mask[2] = False  # attends to nothing
    mask[3] = True
    ours = M.scaled_dot_product_attention(q, k, v, mask)
    rows = [i for i in range(6) if mask[i].any()]
    check_close(ours[:, :, rows], F.scaled_dot_product_attention(q, k, v, mask)[:, :, rows])
    assert (ours[:, :, 2] == 0).all()
    check_close(M.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("name", VARIANTS)
def test_fast_attention_equals_readable(name):
    config = M.TransformerConfig(**{**SMALL, **VARIANTS[name]})
    fast = M.CausalSelfAttention(config)
    slow = M.CausalSelfAttention(config, fast=False)
    slow.load_state_dict(fast.state_dict())
    x, rope = torch.randn(2, 16, 32), M.rope_angles(torch.arange(16), 8)
    check_close(fast(x, rope), slow(x, rope), 1e-5)


def test_grouped_heads_are_repeated_heads():
    grouped = M.CausalSelfAttention(M.TransformerConfig(**SMALL, n_kv_head=2))
    full = M.CausalSelfAttention(M.TransformerConfig(**SMALL))
    state = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        state[name] = state[name].view(2, 8, 32).repeat_interleave(2, 0).reshape(32, 32)
    full.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    check_close(grouped(x), full(x), 1e-5)


def test_swiglu():
    ffn, x = M.SwiGLU(8, 12), torch.randn(3, 8)
    gate = x @ ffn.w1.weight.T
    check_close(ffn(x), (gate * torch.sigmoid(gate) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T)


# ---- the model


KINDS = (*M.ATTENTION, "sliding,sliding,full", "hyena,linear")
COMBINATIONS = [  # all that the flags allow; those of grouped heads and QK-norm in one go
    {"attention": attention, "position": position, "norm": norm, "norm_place": place,
     "activation": activation, **more}
    for attention in KINDS for position in M.CHOICES["position"]
    for norm, place in (("rmsnorm", "pre"), ("layernorm", "post"), ("none", "pre"))
    for activation in ("swiglu", "relu2", "moe")
    for more in ({}, {"n_kv_head": 2}, {"qk_norm": True, "logit_cap": 10.0, "bias": True})]


@pytest.mark.parametrize("kind", KINDS)
def test_causality_of_every_combination(kind):
    tried = 0
    for changes in [c for c in COMBINATIONS if c["attention"] == kind]:
        try:
            model = tiny(**changes, window=5)
        except ValueError:  # refused: see test_configs_that_make_no_model
            continue
        ids = torch.randint(50, (2, 16))
        before = model(ids)
        assert before.shape == (2, 16, 50) and before.isfinite().all()
        changed = ids.clone()
        changed[:, 9] = (ids[:, 9] + 1) % 50
        after = model(changed)
        torch.testing.assert_close(after[:, :9], before[:, :9], atol=1e-5, rtol=0, msg=str(changes))
        assert not torch.allclose(after[:, 9:], before[:, 9:], atol=1e-4), changes
        tried += 1
    assert tried >= 36


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", M.CHOICES["position"])
def test_cached_equals_uncached(kind, position):
    model = tiny(attention=kind, position=position, window=5, block_size=40)
    ids = torch.randint(50, (3, 40))
    whole = model(ids)
    cache = M.Cache(model, 3, 40)
    sizes = (7, 1, 1, 4, 1, 9, 1, 16)  # prefill, tokens one by one, and several at once
    parts = [model(part, cache) for part in ids.split(sizes, 1)]
    check_close(torch.cat(parts, 1), whole, 1e-5)
    assert cache.lengths == [40, 40, 40]
    # sequences of unequal length: each has its own position
    cache = M.Cache(model, 2, 40)
    model(ids[:2, :5], cache)
    for layer, other in zip(cache.layers, [model_cache(model, ids[1:2, :11], layer)
                                           for layer in range(2)]):
        for name in layer:
            layer[name][1] = other[name][0]
    cache.lengths = [5, 11]
    for i in range(6):
        new = torch.stack((ids[0, 5 + i], ids[1, 11 + i]))[:, None]
        logits = model(new, cache)[:, 0]
        check_close(logits[0], whole[0, 5 + i], 1e-5)
        check_close(logits[1], whole[1, 11 + i], 1e-5)


def model_cache(model, ids, layer):
    cache = M.Cache(model, 1, 40)
    model(ids, cache)
    return cache.layers[layer]


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("T", [3, 9, 10, 11, 25, 40])
def test_sliding_window_is_masked_full_attention(T, heads):
    config = M.TransformerConfig(**{**SMALL, "n_kv_head": heads, "window": 5, "block_size": 64})
    sliding, full = M.SlidingWindowAttention(config), M.CausalSelfAttention(config)
    full.load_state_dict(sliding.state_dict())
    x, rope = torch.randn(2, T, 32), M.rope_angles(torch.arange(T), 8)
    i = torch.arange(T)
    mask = (i[:, None] >= i) & (i[:, None] - i < 5)
    q, k, v = full.project(x, rope)
    y = M.scaled_dot_product_attention(q, *full.repeat_heads(k, v), mask)
    check_close(sliding(x, rope), full.o_proj(y.transpose(1, 2).reshape(2, T, 32)), 1e-5)
    readable = M.SlidingWindowAttention(config, fast=False)
    readable.load_state_dict(sliding.state_dict())
    check_close(sliding(x, rope), readable(x, rope), 1e-5)


def test_linear_attention_parallel_is_recurrent_is_its_formula():
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    for rope in (None, M.rope_angles(torch.arange(20), 8)):
        parallel, state = M.linear_attention(q, k, v, rope, chunk=20)
        for chunk in (1, 7):  # 1: a recurrent network
            y, last = M.linear_attention(q, k, v, rope, chunk=chunk)
            check_close(y, parallel, 1e-5)
            check_close(last[0], state[0], 1e-4)
        a, b = F.elu(q) + 1, F.elu(k) + 1
        ra, rb = (a, b) if rope is None else (M.apply_rope(a, *rope), M.apply_rope(b, *rope))
        for t in (0, 5, 19):
            weights = torch.einsum("bhd,bhsd->bhs", ra[:, :, t], rb[:, :, : t + 1])
            norm = torch.einsum("bhd,bhsd->bhs", a[:, :, t], b[:, :, : t + 1]).sum(-1)
            expected = torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : t + 1]) / norm[..., None]
            check_close(parallel[:, :, t], expected, 1e-5)


def test_latent_attention_absorbed_is_naive():
    for position in ("rope", "learned"):
        attn = M.LatentAttention(M.TransformerConfig(**SMALL, attention="latent", position=position))
        x, rope = torch.randn(2, 16, 32), M.rope_angles(torch.arange(16), 4)
        check_close(attn(x, rope, absorb=True), attn(x, rope, absorb=False), 1e-5)
    # the cache is smaller than that of keys and values: rank + rope_size instead of 2 C
    assert M.Cache(tiny(attention="latent"), 1, 9).layers[0]["latent"].shape == (1, 1, 9, 8 + 4)


def test_hyena_fft_is_direct_convolution():
    u, h = torch.randn(2, 13, 4), torch.randn(13, 4)
    y = M.fft_convolution(u, h)
    for t in range(13):
        check_close(y[:, t], sum(h[t - s] * u[:, s] for s in range(t + 1)), 1e-5)


def moe(**changes):
    return M.MixtureOfExperts(M.TransformerConfig(**{**SMALL, "activation": "moe", "n_expert": 5, **changes}))


@pytest.mark.parametrize("changes", [{}, {"top_k": 1}, {"top_k": 5}, {"n_shared_expert": 2}])
def test_experts_are_a_loop_over_experts_and_no_token_is_lost(changes):
    ffn, x = moe(**changes), torch.randn(3, 7, 32)
    flat = x.flatten(0, 1)
    weights, chosen, _, p = ffn.route(flat)
    check_close(weights.sum(-1), torch.ones(21))
    expected = sum(e(flat) for e in ffn.shared) + torch.zeros_like(flat)
    for i, expert in enumerate(ffn.experts):
        share = (weights * (chosen == i)).sum(-1, keepdim=True)
        expected = expected + share * expert(flat)
    check_close(ffn(x).flatten(0, 1), expected, 1e-5)
    assert ffn.load.sum() == 21 * ffn.top_k  # each token went to top_k experts
    assert (chosen.sort(-1).values.diff(dim=-1) > 0).all()  # and never twice to one


def test_balance_loss_is_least_for_uniform_routing_and_the_bias_evens_the_load():
    ffn = moe(n_expert=4)
    uniform = torch.full((8, 4), 0.25)
    check_close(ffn.balance_loss(torch.full((4,), 0.25), uniform), torch.tensor(1.0))
    skew = torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert ffn.balance_loss(skew, skew.expand(8, 4)) > 1.5
    ffn = moe(n_expert=4, balance="bias", balance_weight=0.002)
    ffn.router.weight.data[0] += 0.2  # too attractive
    x = torch.randn(512, 32) + 0.5
    ffn(x)
    before = ffn.load.max() / ffn.load.mean()
    for _ in range(300):
        ffn.update_bias()
        ffn(x)
    assert before > 1.5 and ffn.load.max() / ffn.load.mean() < 1.25
    ffn.update_bias()
    assert ffn.load.sum() == 0
    # the bias chooses, but does not weigh
    weights, chosen, _, p = ffn.route(x)
    picked = p.gather(-1, chosen)
    check_close(weights, picked / picked.sum(-1, keepdim=True))


def test_router_losses_reach_the_model():
    model = tiny(activation="moe").train()
    assert model.auxiliary_loss() == 0
    model(torch.randint(50, (2, 16)))
    loss = model.auxiliary_loss()
    loss.backward()
    assert loss > 0 and model.blocks[1].ffn.router.weight.grad.abs().sum() > 0
    assert tiny().train().auxiliary_loss() == 0


def test_logit_cap_and_norm_places():
    ids = torch.randint(50, (2, 16))
    free, capped = tiny(), tiny(logit_cap=2.0)
    capped.load_state_dict(free.state_dict())
    check_close(capped(ids), 2 * torch.tanh(free(ids) / 2), 1e-5)
    assert isinstance(tiny(norm_place="post").final_norm, torch.nn.Identity)
    post = tiny(norm_place="post").blocks[0](torch.randn(1, 5, 32))
    check_close(post.square().mean(-1), torch.ones(1, 5), 1e-3)  # the norm comes last


@pytest.mark.parametrize("changes", [{}, {"activation": "moe"}, {"attention": "hyena"}])
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(changes):
    model, ids = tiny(**changes, n_layer=4).train(), torch.randint(50, (2, 16))
    results = []
    for model.activation_checkpointing in (False, True):
        kept = {}

        def pack(x):
            kept[x.data_ptr()] = x.numel()
            return x

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids).square().mean() + model.auxiliary_loss()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append((loss.item(), gradients, sum(kept.values())))
    assert results[0][0] == results[1][0] and results[1][2] < 0.6 * results[0][2]
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b)


def test_first_loss_is_that_of_a_guess():
    loss = F.cross_entropy(tiny(n_embd=128)(torch.randint(50, (8, 16))).flatten(0, 1),
                           torch.randint(50, (128,)))
    assert abs(loss.item() - math.log(50)) < 0.8


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_and_flop_formulas(name):
    model = tiny(**VARIANTS[name])
    counted = sum(M.count_parameters(model.config).values())
    assert counted == sum(p.numel() for p in model.parameters())
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, dtype=torch.int64))
    flops = M.count_flops(model.config)
    products = sum(n for part, n in flops.items() if part != "attention, scores and values")
    attention = 4 * 2 * 32 * 16  # of all pairs of positions, as PyTorch counts; ours takes half
    found = counter.get_total_flops() / 16
    assert found in (products, products + attention)
    assert flops["attention, scores and values"] == attention // 2


@pytest.mark.parametrize("changes", [
    {"attention": "latent"}, {"attention": "sliding"}, {"attention": "linear"}, {"attention": "hyena"},
    {"activation": "moe", "n_shared_expert": 1}, {"activation": "relu"}, {"norm": "none"},
    {"qk_norm": True}, {"norm_place": "post", "position": "sinusoidal"}])
def test_parameters_and_flops_of_every_part(changes):
    model = tiny(**changes, window=5)
    assert sum(M.count_parameters(model.config).values()) == sum(p.numel() for p in model.parameters())
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, dtype=torch.int64))
    per_token = counter.get_total_flops() / 16
    flops = M.count_flops(model.config)
    products = sum(n for part, n in flops.items() if part != "attention, scores and values")
    # what PyTorch counts of attention depends on the kernel: none, all pairs, or our half of them
    assert products <= per_token <= products + 2.2 * flops["attention, scores and values"] + 9000
    if changes.get("activation") == "moe":  # 3 of 9 experts are met
        assert flops["experts"] == 2 * 2 * 3 * 3 * 32 * model.config.d_ff
    mixing = model.blocks[0].attn.mixing_flops
    if changes.get("attention") in ("sliding", "linear", "hyena"):
        assert mixing(1024) < 2.1 * mixing(256)  # grows hardly or not at all with the length
    else:
        assert mixing(1024) == 4 * mixing(256)


def test_dropout_only_in_training():
    model, ids = tiny(dropout=0.5), torch.randint(50, (2, 16))
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match="17 tokens"):
        tiny()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("bad", [
    {"n_head": 5}, {"n_kv_head": 3}, {"n_layer": 0}, {"vocab_size": -1}, {"activation": "tanh"},
    {"position": "alibi"}, {"norm": "batch"}, {"dropout": 1.0}, {"n_embd": 36, "n_head": 12},
    {"n_embd": 32.0}, {"attention": "hyena", "n_kv_head": 2}, {"attention": "full,latent", "qk_norm": True},
    {"attention": "sparse"}, {"activation": "moe", "n_expert": 4, "top_k": 5}, {"norm_place": "mid"},
    {"window": 0}, {"logit_cap": -1.0}])
def test_configs_that_make_no_model(bad):
    with pytest.raises(ValueError):
        M.TransformerConfig(**{**SMALL, **bad})


@pytest.mark.parametrize("changes", [{}, GPT2, {"qk_norm": True}])
def test_pruning_what_does_nothing_changes_nothing(changes):
    """Parts that are made useless are the ones that go, and the rest computes the same."""
    model, ids = tiny(**changes, n_layer=3, d_ff=24), torch.randint(50, (4, 16))
    for part in (model.blocks[1].attn.o_proj, model.blocks[1].ffn.w2):  # an idle block
        part.weight.data.zero_()
        if part.bias is not None:
            part.bias.data.zero_()
    for block in model.blocks:  # idle units
        block.ffn.w1.weight.data[::2] = 0
        if block.ffn.w1.bias is not None:
            block.ffn.w1.bias.data[::2] = 0
    small = M.prune(model, ids, n_layer=2, d_ff=12)
    assert small.config.n_layer == 2 and small.config.d_ff == 12
    check_close(small(ids), model(ids), 1e-5)
    narrow = M.prune(model, ids, n_embd=16)
    assert narrow.config.n_head == 2 and narrow(ids).shape == (4, 16, 50)
    assert set(narrow.embedding.weight[0].tolist()) < set(model.embedding.weight[0].tolist())
    for bad in ({"n_embd": 20}, {"n_layer": 4}, {"d_ff": 99}):
        with pytest.raises(ValueError):
            M.prune(model, ids, **bad)
    with pytest.raises(ValueError, match="full attention"):
        M.prune(tiny(attention="hyena"), ids, n_layer=1)


# ---- sampling


def test_sample():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, 4)
    assert (M.sample(logits, temperature=0) == 0).all()
    share = lambda **how: torch.bincount(M.sample(logits, **how), minlength=4) / 4000
    check_close(share(), logits[0].exp(), 0.03)
    check_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), 0.03)
    check_close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), 0.03)
    check_close(share(top_p=0.5), torch.tensor([1.0, 0, 0, 0]))
    check_close(share(top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    sharp = logits[0].div(0.5).softmax(-1)
    check_close(share(temperature=0.5), sharp, 0.03)
    assert share(top_k=99).sum() == 1
    check_close(share(min_p=0.5), torch.tensor([0.625, 0.375, 0, 0]), 0.03)


def test_generate():
    model, ids = tiny(), torch.randint(50, (3, 4))
    make = lambda seed, **how: model.generate(
        ids, 30, generator=torch.Generator().manual_seed(seed), **how)
    out = make(1)
    assert out.shape == (3, 34) and torch.equal(out[:, :4], ids)  # beyond block_size, too
    assert torch.equal(out, make(1)) and not torch.equal(out, make(2))
    greedy = model.generate(ids, 3, temperature=0)
    for _ in range(3):
        ids = torch.cat((ids, model(ids)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(greedy, ids)


def test_generate_stops_each_sequence_at_its_stop():
    model, ids, seen = tiny(), torch.randint(50, (3, 4)), []
    stop = int(model.generate(ids, 1, temperature=0)[0, -1])
    out = model.generate(ids, 12, temperature=0, stop=stop, on_token=lambda i, new: seen.append((i, new)))
    assert (out[0, 4:] == stop).all()
    for i in range(3):
        said = [token for j, token in seen if j == i]
        assert out[i, 4 : 4 + len(said)].tolist() == said and set(out[i, 4 + len(said) :].tolist()) <= {stop}
    assert model.generate(ids[:1], 12, temperature=0, stop=stop).shape == (1, 5)


ALL_KINDS = ["full", "sliding", "linear", "latent", "hyena", "sliding,linear,full"]


@pytest.mark.parametrize("attention", ALL_KINDS)
def test_generate_in_a_batch_equals_alone(attention):
    """Prompts of unequal lengths, which end at different times and outgrow the window."""
    model = tiny(attention=attention, window=5)
    prompts = [torch.randint(50, (n,)).tolist() for n in (3, 9, 1, 9, 14)] + [[7, 8, 9]] * 2
    counts = [12, 5, 20, 9, 3, 4, 0]
    together = model.generate(prompts, counts, temperature=0)
    for prompt, n, out in zip(prompts, counts, together):
        text = list(prompt)
        for _ in range(n):  # without any cache
            text.append(model(torch.tensor([text[-16:]]))[0, -1].argmax().item())
        assert out == text == model.generate([prompt], n, temperature=0)[0]
    assert prompts[0] == together[0][:3] and len(prompts[0]) == 3  # ours were not changed


def test_generate_takes_each_request_as_it_is():
    model = tiny()
    prompts = [[1, 2, 3], [4], [5, 6], [1, 2, 3]]
    requests = [dict(temperature=0.7, top_k=20, top_p=None, min_p=None, seed=3, n=9),
                dict(temperature=0, top_k=None, top_p=None, min_p=None, seed=0, n=5),
                dict(temperature=1.5, top_k=None, top_p=0.9, min_p=None, seed=3, n=7),
                dict(temperature=1.0, top_k=None, top_p=None, min_p=0.2, seed=8, n=6)]
    stop = model.generate([prompts[1]], 3, temperature=0)[0][-1]

    def ask(prompts, requests):
        how = {k: [r[k] for r in requests] for k in ("temperature", "top_k", "top_p", "min_p")}
        return model.generate(prompts, [r["n"] for r in requests], **how, stop=[None, {stop, 49}, None, None]
                              if len(prompts) == 4 else None,
                              generator=[torch.Generator().manual_seed(r["seed"]) for r in requests])

    together = ask(prompts, requests)
    assert len(together[1]) <= 4 and together[1][-1] == stop
    for i in (0, 2, 3):
        assert together[i] == ask([prompts[i]], [requests[i]])[0]
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate([[1], []], 3)


def chi_square_p(observed, expected):
    """P of counts that differ so much or more, if drawn from `expected` (Wilson and Hilferty 1931)."""
    keep = expected > 5
    x = ((observed - expected)[keep].square() / expected[keep]).sum().item()
    df = int(keep.sum()) - 1
    z = ((x / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
                                 {"min_p": 0.1}])
def test_mistake_4_speculative_decoding_keeps_the_distribution(how):
    """Of the first two new tokens together, of 2,000 draws, against the target's own p."""
    sizes = dict(vocab_size=7, block_size=8, n_embd=16, n_head=2)
    target, draft = tiny(n_layer=1, **sizes), tiny(n_layer=1, **sizes)
    for model in (target, draft):  # far from uniform, and from one another
        model.head.weight.data *= 2.5
    prompt = torch.tensor([[3, 1]])
    p = M.token_probabilities(target(prompt)[0, -1], **how)
    after = torch.stack([M.token_probabilities(target(torch.tensor([[3, 1, i]]))[0, -1], **how) for i in range(7)])
    expected = (p[:, None] * after).flatten()
    counts, generator, accepted = torch.zeros(49), torch.Generator().manual_seed(5), 0
    for _ in range(2000):
        out, stats = M.speculate(target, draft, prompt, 3, gamma=2, generator=generator, **how)
        counts[7 * out[0, 2] + out[0, 3]] += 1
        accepted += stats["accepted"] / stats["proposed"] / 2000
    assert not counts[expected == 0].any()
    assert chi_square_p(counts, 2000 * expected) > 1e-3
    assert 0.05 < accepted < 0.95


@pytest.mark.parametrize("attention", ALL_KINDS)
def test_speculative_decoding_greedy_equals_the_target_alone(attention):
    target, draft = tiny(attention=attention, window=5), tiny(n_layer=1, attention=attention)
    draft.load_state_dict(target.state_dict(), strict=False)  # so that some guesses are right
    ids = torch.randint(50, (1, 3))
    for gamma in (1, 4, 15):
        for n in (1, 2, 13, 30):
            alone = target.generate(ids, n, temperature=0)
            out, stats = M.speculate(target, draft, ids, n, gamma, temperature=0)
            assert torch.equal(out, alone)
            assert stats["accepted"] <= stats["proposed"] and stats["calls"] <= n
    out, stats = M.speculate(target, target, ids, 12, 3, temperature=0)
    assert stats["accepted"] == stats["proposed"] and stats["calls"] == 3
    stop, said = alone[0, 8].item(), []
    out, _ = M.speculate(target, draft, ids, 20, temperature=0, stop=stop, on_token=lambda _, t: said.append(t))
    assert torch.equal(out, target.generate(ids, 20, temperature=0, stop=stop)) and said == out[0, 3:].tolist()
    for bad in (dict(gamma=0), dict(gamma=16)):
        with pytest.raises(ValueError, match="gamma"):
            M.speculate(target, draft, ids, 4, **bad)
    with pytest.raises(ValueError, match="vocabulary"):
        M.speculate(target, tiny(vocab_size=51), ids, 4)


# ---- checkpoints


def test_checkpoint_round_trip(tmp_path):
    model = tiny(**GPT2)
    optimizer = torch.optim.AdamW(model.parameters())
    M.save_checkpoint(tmp_path / "c.pt", torch.compile(model), optimizer, 7, 1.5, {"cpu": torch.get_rng_state()},
                      {"lr": 1}, "tok")
    again, checkpoint = M.load_checkpoint(tmp_path / "c.pt")
    ids = torch.randint(50, (2, 16))
    assert torch.equal(again(ids), model(ids)) and again.config == model.config and not again.training
    assert (checkpoint["step"], checkpoint["best_val_loss"], checkpoint["tokenizer"]) == (7, 1.5, "tok")
    assert again.head.weight is again.embedding.weight
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in checkpoint["model"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def broken_checkpoint(**changes):
    model = tiny()
    return {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "step": 0} | changes


@pytest.mark.parametrize("content", [
    b"", b"not a checkpoint", {"model": {}}, [1, 2], broken_checkpoint(config={"n_layer": "x"}),
    broken_checkpoint(config={**SMALL, "n_embd": 64}), broken_checkpoint(model={"a": torch.ones(2)}),
    broken_checkpoint(config={**SMALL, "surprise": 1}), broken_checkpoint(model=5)])
def test_broken_checkpoints_are_refused_in_one_line(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / "c.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="c.pt is no checkpoint") as error:
        M.load_checkpoint(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_can_not_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Evil()}, "c.pt")
    with pytest.raises(ValueError):
        M.load_checkpoint("c.pt")
    assert not (tmp_path / "pwned").exists()


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    M.save_checkpoint(tmp_path / "c.pt", tiny(), step=1)

    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not write .*c.pt"):
        M.save_checkpoint(tmp_path / "c.pt", tiny(), step=2)
    assert M.load_checkpoint(tmp_path / "c.pt")[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


# ---- the command line


def run(*args, cwd):
    command = [sys.executable, os.path.join(ROOT, "model.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", timeout=120)


def test_command_line_samples(tmp_path):
    tokenizer = Tokenizer({i: bytes([i]) for i in range(256)}, [], [EOT])
    (tmp_path / "out").mkdir()
    M.save_checkpoint(tmp_path / "out/ckpt.pt", tiny(vocab_size=257), tokenizer=tokenizer.to_json())
    args = ("--prompt", "héllo", "--max_new_tokens", 9, "--num_samples", 2, "--top_k", 5, "--top_p", 0.9)
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.split("\n---------------\n")
    assert first.startswith("héllo") and second.startswith("héllo") and first != second.rstrip("\n")
    assert run(*args, cwd=tmp_path).stdout == result.stdout  # the seed decides
    result = run("info", cwd=tmp_path)
    assert result.returncode == 0 and "vocab_size=257" in result.stdout
    result = run("prune", "--n_layer", 1, "--out", "small.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert M.load_checkpoint(tmp_path / "small.pt")[0].config.n_layer == 1


def test_command_line_info_of_gpt2(tmp_path):
    sizes = "--n_layer 12 --n_head 12 --n_embd 768 --vocab_size 50257 --block_size 1024 --activation gelu"
    flags = "--norm layernorm --position learned --tie_embeddings"
    result = run("info", *sizes.split(), *flags.split(), cwd=tmp_path)
    # nanoGPT's 124 million: without biases, 124,337,664 of them
    assert result.returncode == 0 and "124,337,664" in result.stdout


@pytest.mark.parametrize("args, code, message", [
    ((), 1, "python train.py"), (("--ckpt", "no.pt"), 1, "no.pt"), (("info", "--n_head", "7"), 1, "n_head"),
    (("--device", "cuda:77"), 1, "cuda:77"), (("--top_k", "0"), 2, "top_k"),
    (("--temperature", "-1"), 2, "temperature"), (("dance",), 2, "dance")])
def test_bad_input_gets_one_line(tmp_path, args, code, message):
    result = run(*args, cwd=tmp_path)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code and message in lines[-1] and "Traceback" not in result.stderr
    assert code == 2 or len(lines) == 1
