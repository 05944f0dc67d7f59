"""align.py: losses against the published formulae, masks, verifiers, evaluation, whole runs."""

import csv
import functools
import gzip
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import align as A
import bpe
import model as M


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def char_tokenizer(characters="0123456789+= abcdefghijklmnopqrstuvwxyz.,:?AB\n"):
    return bpe.Tokenizer({i: c.encode() for i, c in enumerate(characters)}, [], ["<|endoftext|>"],
                         r"[\s\S]", ignore_merges=True)


def tiny(vocab_size=60, block_size=32, **more):
    return M.Transformer(M.TransformerConfig(vocab_size=vocab_size, block_size=block_size,
                                             **dict(n_layer=2, n_head=2, n_embd=16) | more))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = char_tokenizer()
    path = tmp_path_factory.mktemp("base") / "base.pt"
    M.save_checkpoint(path, tiny(tokenizer.vocab_size, 48), tokenizer=tokenizer.to_json())
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def cli(line):
    args = A.parse_args(line.split())
    A.COMMANDS[args.command][0](args)


def fails(capsys, line, out=None):
    """Exit code and message of a command that does not succeed; what it prints comes into out."""
    before, sys.argv = sys.argv, ["align.py", *line.split()]
    try:
        with pytest.raises(SystemExit) as stopped:
            A.main()
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    out is None or out.append(printed.out)
    return stopped.value.code, printed.err


def batch(B=6, T=9):
    """Random log-probs and a mask of responses of unequal lengths, one of them empty."""
    new, old, ref = (-torch.rand(B, T, dtype=torch.float64) * 2 for _ in range(3))
    begin, length = torch.randint(0, 3, (B, 1)), torch.tensor([[0], [1], [2], [6], [4], [3]])
    t = torch.arange(T)
    return new.requires_grad_(), old, ref, (t >= begin) & (t < begin + length)


# ---- reductions and log-probs


def test_masked_reductions():
    x = torch.arange(6.0).view(2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert A.masked_sum(x, mask).item() == 2
    assert A.masked_sum(x, mask, normalize_constant=4.0) == 0.5
    assert A.masked_mean(x, mask).item() == 1
    assert A.masked_mean(x, mask, 1).tolist() == [1, 0]  # not NaN where nothing counts
    assert A.masked_mean(x, mask, dim=0).tolist() == [0, 0, 2]
    assert A.masked_sum(x, mask, dim=-1, normalize_constant=2).tolist() == [1, 0]
    x[0, 1] = math.nan
    assert A.masked_sum(x, mask).item() == 2  # what is masked does not matter
    assert A.masked_mean(torch.ones(2, 3), torch.ones(2, 1), dim=1).tolist() == [1, 1]


def test_entropy_is_stable():
    logits = torch.randn(3, 5, 11)
    p = logits.softmax(-1)
    torch.testing.assert_close(A.entropy(logits), -(p * p.log()).sum(-1))
    assert abs(A.entropy(torch.zeros(7)).item() - math.log(7)) < 1e-6
    assert A.entropy(torch.tensor([1e5, 0.0, -1e5])).item() == 0
    x = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    assert abs(A.entropy(x).item() - math.log(2)) < 1e-6
    assert A.entropy(torch.randn(4, 9, dtype=torch.bfloat16)).dtype == torch.float32


def test_tokenize_prompts_and_responses():
    tokenizer = char_tokenizer("abcdefg")
    out = A.tokenize_prompts_and_responses(["ab", "c", "a"], ["cd", "defg", ""], tokenizer)
    eot = tokenizer.eot_id
    assert out["input_ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [0, eot, eot, eot]]
    assert out["labels"].tolist() == [[1, 2, 3, eot], [3, 4, 5, 6], [eot] * 4]
    assert out["response_mask"].tolist() == [[False, True, True, False], [True] * 4, [False] * 4]
    for row, prompt, response in zip(range(3), ["ab", "c", "a"], ["cd", "defg", ""]):
        said = out["labels"][row][out["response_mask"][row]].tolist()
        assert tokenizer.decode(said) == response

    class WithBegin:  # as Hugging Face's Llama tokenizers
        pad_token_id, eos_token_id = None, 2

        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + [ord(c) for c in text]

    assert A.tokenize_prompts_and_responses(["a"], ["b"], WithBegin())["labels"].tolist() == \
        [[97, 98]]


def test_response_log_probs():
    model = tiny()
    ids, labels = torch.randint(60, (2, 3, 7))
    out = A.response_log_probs(model, ids, labels, return_token_entropy=True)
    expected = -F.cross_entropy(model(ids).transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(out["log_probs"], expected)
    torch.testing.assert_close(out["token_entropy"], A.entropy(model(ids)))
    assert set(A.response_log_probs(model, ids, labels)) == {"log_probs"}
    masked = A.response_log_probs(model, ids, labels.index_fill(1, torch.tensor(2), -100))
    torch.testing.assert_close(masked["log_probs"], expected.index_fill(1, torch.tensor(2), 0.0))
    colder = A.response_log_probs(model, ids, labels, temperature=0.5)["log_probs"]
    torch.testing.assert_close(colder, -F.cross_entropy((2 * model(ids)).transpose(1, 2), labels,
                                                        reduction="none"))


# ---- losses, by the formulae of the papers, TRL and Liger


def test_sft_loss_is_cross_entropy_over_response_tokens():
    logits = torch.randn(4, 6, 11, requires_grad=True)
    labels, mask = torch.randint(11, (4, 6)), torch.rand(4, 6) < 0.5
    log_probs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.masked_fill(~mask, -100).flatten())
    torch.testing.assert_close(A.sft_loss(log_probs, mask), expected, atol=1e-6, rtol=0)
    assert A.sft_loss(log_probs, torch.zeros_like(mask)).item() == 0


def gradient_in_parts(loss_of, x, sizes):
    """Loss and gradient, summed over parts of the rows."""
    total, at, gradient = 0.0, 0, torch.zeros_like(x)
    for n in sizes:
        loss = loss_of(slice(at, at + n))
        total += loss.item()
        gradient += torch.autograd.grad(loss, x)[0]
        at += n
    return total, gradient


def test_mistake_1_sft_accumulation_weighs_tokens_not_batches():
    new, _, _, mask = batch()
    whole = A.sft_loss(new, mask)
    expected = torch.autograd.grad(whole, new)[0]
    total, gradient = gradient_in_parts(lambda s: A.sft_loss(new[s], mask[s], mask.sum()), new,
                                        (3, 2, 1))
    assert abs(total - whole.item()) < 1e-9
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    naive = sum(A.sft_loss(new[s], mask[s]).item() for s in (slice(0, 3), slice(3, 6))) / 2
    assert abs(naive - whole.item()) > 0.01


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_mistake_2_grpo_normaliser_under_accumulation(loss_type):
    new, old, ref, mask = batch()
    advantages = torch.randn(6, dtype=torch.float64)

    def loss(s, normalizer=None):
        return A.grpo_loss(new[s], old[s], advantages[s], mask[s], ref[s], 0.1,
                           loss_type=loss_type, max_length=20, normalizer=normalizer)

    whole = loss(slice(None))
    expected = torch.autograd.grad(whole, new)[0]
    normalizer = A.grpo_normalizer(mask, loss_type, 20)
    total, gradient = gradient_in_parts(lambda s: loss(s, normalizer), new, (1, 3, 2))
    assert abs(total - whole.item()) < 1e-9
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    naive = (loss(slice(0, 1)) + loss(slice(1, 4)) + loss(slice(4, 6))).item() / 3
    assert abs(naive - whole.item()) > 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo_equals_the_published_formulae(beta, high):
    """TRL's: l = -min(c1 A, c2 A) + beta (exp(ref - lp) - (ref - lp) - 1), c1 = exp(lp - old),
    c2 = clamp(c1, 1 - eps_low, 1 + eps_high); grpo: ((l m).sum(-1) / m.sum(-1).clamp(1)).mean();
    dr_grpo: (l m).sum() / (B max_completion_length); dapo: (l m).sum() / m.sum()."""
    new, old, ref, mask = batch()
    A_ = torch.randn(6, dtype=torch.float64)
    c1 = torch.exp(new - old)
    c2 = torch.clamp(c1, 1 - 0.2, 1 + (0.2 if high is None else high))
    m = mask.double()
    for clip in (True, False):
        term = -torch.min(c1 * A_[:, None], c2 * A_[:, None]) if clip else -c1 * A_[:, None]
        l = term + beta * (torch.exp(ref - new) - (ref - new) - 1)
        expected = {"grpo": ((l * m).sum(-1) / m.sum(-1).clamp(min=1)).mean(), "dr_grpo":
                    (l * m).sum() / (6 * 9), "dapo": (l * m).sum() / m.sum()}
        for kind, value in expected.items():
            ours = A.grpo_loss(new, old, A_, mask, ref, beta, 0.2, high, kind, clip=clip)
            assert abs(ours.item() - value.item()) < 1e-9
            torch.testing.assert_close(*(torch.autograd.grad(x, new, retain_graph=True)[0] for x in
                                         (ours, value)), atol=1e-9, rtol=0)
    for wrong in ({"loss_type": "gpro"}, {"beta": 0.1}):
        with pytest.raises(ValueError, match="loss_type|reference_log_probs"):
            A.grpo_loss(new, old, A_, mask, **wrong)


def test_losses_do_not_mind_what_is_masked():
    new, old, ref, mask = batch()
    wild = old.masked_fill(~mask, -1e30)
    for loss in (A.grpo_loss(new, wild, torch.ones(6), mask),
                 A.ppo_loss(new, wild, torch.ones(6, 9), mask)):
        assert math.isfinite(loss.item())
        assert torch.autograd.grad(loss, new, retain_graph=True)[0].isfinite().all()
    nothing = torch.zeros_like(mask)
    for kind in ("grpo", "dr_grpo", "dapo"):
        assert A.grpo_loss(new, old, torch.ones(6), nothing, loss_type=kind).item() == 0


def test_ppo_equals_the_published_formula():
    """TRL's: masked_mean(max(-A r, -A clamp(r))) + vf_coef 0.5 masked_mean(max((v - R)^2,
    (clamp(v, v_old - c, v_old + c) - R)^2))."""
    new, old, _, mask = batch()
    A_, v, v_old, R = (torch.randn(6, 9, dtype=torch.float64) for _ in range(4))
    v.requires_grad_()
    r = torch.exp(new - old)
    pg = torch.max(-A_ * r, -A_ * torch.clamp(r, 0.8, 1.2))[mask].mean()
    near = torch.clamp(v, v_old - 0.3, v_old + 0.3)
    vf = 0.5 * torch.max((v - R) ** 2, (near - R) ** 2)[mask].mean()
    ours = A.ppo_loss(new, old, A_, mask, v, v_old, R, clip=0.2, value_clip=0.3, value_weight=0.1)
    for x in (new, v):
        torch.testing.assert_close(torch.autograd.grad(ours, x, retain_graph=True)[0],
                                   torch.autograd.grad(pg + 0.1 * vf, x, retain_graph=True)[0])
    assert abs(ours.item() - (pg + 0.1 * vf).item()) < 1e-9
    assert abs(A.ppo_loss(new, old, A_, mask).item() - pg.item()) < 1e-9
    total, _ = gradient_in_parts(lambda s: A.ppo_loss(new[s], old[s], A_[s], mask[s], v[s],
                                                      v_old[s], R[s], 0.2, 0.3, 0.1, mask.sum()),
                                 new, (4, 2))
    assert abs(total - ours.item()) < 1e-9
    for values in ((v,), (v, v_old)):
        with pytest.raises(ValueError, match="old_values and returns"):
            A.ppo_loss(new, old, A_, mask, *values)


def test_gae_is_the_sum_it_stands_for():
    """A_t = sum_l (gamma lam)^l delta_{t+l}; lam 1: the reward to go less the value."""
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64)
    gamma, lam, n = 0.9, 0.7, 6
    advantages, returns = A.gae(rewards, values, gamma, lam)
    after = torch.cat((values[:, 1:], torch.zeros(3, 1)), 1)
    delta = rewards + gamma * after - values
    for t in range(n):
        expected = sum((gamma * lam) ** (k - t) * delta[:, k] for k in range(t, n))
        torch.testing.assert_close(advantages[:, t], expected)
    torch.testing.assert_close(returns, advantages + values)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0]]).expand(3, 6)
    inner, _ = A.gae(rewards[:, 1:4], values[:, 1:4], gamma, lam)
    masked, returns = A.gae(rewards, values, gamma, lam, mask)
    torch.testing.assert_close(masked, F.pad(inner, (1, 2)))
    assert (returns[mask == 0] == 0).all()
    whole, _ = A.gae(rewards, values, 1.0, 1.0)
    torch.testing.assert_close(whole, rewards.flip(1).cumsum(1).flip(1) - values)


def test_dpo():
    pc, pr, rc, rr = -torch.rand(4, 5) * 30
    expected = -F.logsigmoid(0.3 * ((pc - pr) - (rc - rr))).mean()
    torch.testing.assert_close(A.dpo_loss(pc, pr, rc, rr, beta=0.3), expected, atol=1e-6, rtol=0)
    assert abs(A.dpo_loss(rc, rr, rc, rr).item() - math.log(2)) < 1e-7
    far = A.dpo_loss(torch.tensor([-1e4]), torch.tensor([0.0]), *torch.zeros(2, 1), beta=1.0)
    assert far.item() == 1e4  # no log(0)
    parts = sum(A.dpo_loss(pc[s], pr[s], rc[s], rr[s], 0.3) * n / 5 for s, n in
                ((slice(0, 1), 1), (slice(1, 5), 4)))
    torch.testing.assert_close(parts, expected, atol=1e-6, rtol=0)


def test_reward_model_loss():
    a, b = torch.randn(2, 7)
    torch.testing.assert_close(A.reward_model_loss(a, b), -torch.log(torch.sigmoid(a - b)).mean())


def test_group_advantages():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.0, 5.0, 1.0])
    ours = A.group_advantages(rewards, 3, 1e-4, True).view(4, 3)
    for row, r in zip(ours, rewards.view(4, 3)):
        if len(set(r.tolist())) == 1:
            assert row.tolist() == [0, 0, 0]
        else:
            torch.testing.assert_close(row, (r - r.mean()) / (r.std() + 1e-4))
    plain = A.group_advantages(rewards, 3, 1e-6, False).view(4, 3)
    torch.testing.assert_close(plain[3], torch.tensor([-2.0, 3.0, -1.0]))
    assert A.group_advantages(torch.ones(4), 1, 1e-6, True).tolist() == [0] * 4
    assert A.group_advantages([1, 0], 2).tolist()[0] > 0
    with pytest.raises(ValueError, match="groups of 5"):
        A.group_advantages(rewards, 5, 1e-6, True)


def test_policy_gradient_loss():
    new, old, _, _ = batch()
    a = torch.randn(6, 1, dtype=torch.float64)
    loss, _ = A.policy_gradient_loss(new, "no_baseline", raw_rewards=a)
    torch.testing.assert_close(loss, -a * new)
    loss, _ = A.policy_gradient_loss(new, "reinforce_with_baseline", advantages=a[:, 0])
    torch.testing.assert_close(loss, -a * new)
    loss, more = A.policy_gradient_loss(new, "grpo_clip", advantages=a, old_log_probs=old,
                                        cliprange=0.1)
    r = (new - old).exp()
    torch.testing.assert_close(loss, -torch.min(r * a, r.clamp(0.9, 1.1) * a))
    assert (more["clipped"] == (((r > 1.1) & (a > 0)) | ((r < 0.9) & (a < 0)))).all()
    # at the old policy, clipping changes nothing, and the gradient is that of REINFORCE
    g1 = torch.autograd.grad(A.policy_gradient_loss(new, "grpo_clip", advantages=a,
                                                    old_log_probs=new.detach(),
                                                    cliprange=0.2)[0].sum(), new)[0]
    torch.testing.assert_close(g1, -a.expand_as(new))
    with pytest.raises(ValueError, match="old_log_probs"):
        A.policy_gradient_loss(new, "grpo_clip", advantages=a, cliprange=0.1)
    with pytest.raises(ValueError, match="loss_type"):
        A.policy_gradient_loss(new, "reinforce", advantages=a)


def test_losses_of_lists_and_of_nothing():
    new, *_ = batch()
    listed, _ = A.policy_gradient_loss(new, "no_baseline", raw_rewards=[1, 0, 2, 0, 0, 1])
    assert torch.equal(listed, -torch.tensor([[1], [0], [2], [0], [0], [1]]) * new)
    none = torch.zeros(0, 3)
    for kind in ("grpo", "dr_grpo", "dapo"):
        assert A.grpo_loss(none, none, none[:, 0], none, loss_type=kind).item() == 0
    assert A.reward_model_loss(none[:, 0], none[:, 0]).item() == 0
    assert A.gae(none.T[:, :0], none.T[:, :0])[0].shape == (3, 0)


def test_policy_gradient_is_that_of_the_expected_reward():
    """Three answers, rewards known: E over many samples of the loss' gradient is -grad E[r]."""
    logits = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    expected = torch.autograd.grad(-(logits.softmax(0) * rewards).sum(), logits)[0]
    says = torch.multinomial(logits.detach().softmax(0), 200_000, replacement=True)
    log_probs = logits.log_softmax(0)[says][:, None]
    for kind, weights in (("no_baseline", {"raw_rewards": rewards[says]}),
                          ("reinforce_with_baseline", {"advantages": rewards[says] - 0.6})):
        loss, _ = A.policy_gradient_loss(log_probs, kind, **weights)
        gradient = torch.autograd.grad(loss.mean(), logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, atol=3e-3, rtol=0)


# ---- data


def test_pack_sequences_by_hand():
    packed = A.pack_sequences([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1]),
                               (list(range(9)), [1] * 9)], 4)
    assert packed.pop("dropped") == 1
    assert {name: x.tolist() for name, x in packed.items()} == {
        "input_ids": [[5, 6, 8, 0]], "labels": [[6, 7, 9, 0]], "positions": [[0, 1, 0, 0]],
        "response_mask": [[True, True, True, False]]}
    assert A.pack_sequences([], 4)["labels"].shape == (0, 4)


@pytest.mark.parametrize("more", [
    {}, {"position": "learned"}, {"attention": "sliding,full", "window": 3, "n_layer": 4},
    {"n_head": 4, "n_kv_head": 2, "norm_place": "post", "position": "sinusoidal"}])
def test_packed_losses_equal_unpacked_ones(more):
    model = tiny(**more)
    rng = random.Random(1)
    examples = []
    for _ in range(15):
        n = rng.randrange(2, 20)
        examples.append(([rng.randrange(60) for _ in range(n)],
                         [int(rng.random() < 0.6) for _ in range(n)]))
    packed, padded = A.pack_sequences(examples, 32), A.collate(examples)
    assert len(packed["labels"]) < 8

    def loss_and_gradient(b):
        log_probs = A.response_log_probs(model, b["input_ids"], b["labels"])["log_probs"]
        loss = A.sft_loss(log_probs, b["response_mask"])
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    expected = loss_and_gradient(padded)
    with A.separate_documents(model, packed["positions"]):
        ours = loss_and_gradient(packed)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)
    leaking = loss_and_gradient(packed)[0]  # and out of the context, they do see each other
    assert abs(leaking - expected[0]) > 1e-3
    with pytest.raises(ValueError, match="no_packing"):
        with A.separate_documents(tiny(attention="linear"), packed["positions"]):
            pass


def test_masks_cover_what_the_assistant_says():
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz: \n")
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "really"},
            {"role": "assistant", "content": "no"}]
    for name in ("plain", "raw"):
        template = A.make_template(name, tokenizer)
        ids, mask = A.encode_conversation(tokenizer, template, chat)
        said = tokenizer.decode([i for i, m in zip(ids, mask) if m])
        end = "\n<|endoftext|>" if name == "plain" else "<|endoftext|>"
        assert said == f"yes{end}no{end}"
        # what comes before is what a prompt would be
        prompt = M.encode_chat(tokenizer, template, chat[:2])
        assert ids[: len(prompt)] == prompt and not any(mask[: len(prompt)])
        assert tokenizer.decode(ids).count("be brief") == 1
        assert M.chat_stops(tokenizer, template) == {tokenizer.eot_id}


def test_what_people_write_is_no_special_token():
    tokenizer = char_tokenizer("abcdefghijklmnopqrstuvwxyz<|>")
    ids, mask = A.encode_conversation(tokenizer, A.make_template("raw", tokenizer), [
        {"role": "user", "content": "a<|endoftext|>"},
        {"role": "assistant", "content": "b<|endoftext|>"}])
    assert ids.count(tokenizer.eot_id) == 1 and ids[-1] == tokenizer.eot_id and mask[-1]


def test_formats_of_data(tmp_path, capsys):
    rows = [
        {"prompt": "p", "response": "r"}, {"instruction": "i", "input": "x", "output": "o"},
        {"instruction": "i", "input": "", "output": "o"}, {"prompt": "p", "response": " "},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}]
    chats = A.read_conversations(str(write(tmp_path / "a.jsonl", rows)))
    said = [[m["content"] for m in chat] for chat in chats]
    assert said == [["p", "r"], ["i\n\nx", "o"], ["i", "o"], ["u", "a"], ["u", "a"]]
    assert "1 of 6 rows" in capsys.readouterr().out
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert A.read_conversations(str(tmp_path / "a.json")) == chats

    human = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: ok\n\nAssistant: "
    pairs = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"chosen": human + "good", "rejected": human + "bad"},
        {"conversations": [{"from": "human", "value": "u"}], "chosen":
         {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
        {"prompt": "p", "chosen": "c", "rejected": "c"},
        {"chosen": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "c"}],
         "rejected": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "r"}]}]
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs)
    read = A.read_pairs(str(tmp_path / "p.jsonl.gz"))
    assert "1 of 5 pairs" in capsys.readouterr().out
    assert [([m["content"] for m in p], c, r) for p, c, r in read] == [
        (["p"], "c", "r"), (["hi", "yes?", "ok"], "good", "bad"), (["u"], "c", "r"),
        (["u"], "c", "r")]
    rows = [{"question": "q", "answer": "so 1+1\n#### 2"}, {"problem": "q", "answer": 3}]
    problems = A.read_problems(str(write(tmp_path / "g.jsonl", rows)))
    assert [p["answer"] for p in problems] == ["2", "3"]


@pytest.mark.parametrize("text, message", [
    ('{"prompt": "a", "response": "b"}\n{"prompt": 3, "response": "b"}',
     "line 2: prompt must be of type str"),
    ('{"prompt": "a", "response": "b"}\n\n{"prompt": ', "line 3"),
    ("[1]\n", "line 1: a row must be an object"),
    ('{"prompt": "a"}', "line 1: it has none of the fields response"), ("", "holds no rows"),
    ('{"messages": [{"role": "nobody", "content": "x"}]}', "role"),
    ('{"messages": [3]}', "line 1"), ("[" * 100_000, "line 1"), ("\x00\n", "line 1"),
    ('{"messages": []}', "a response is missing"),
    ('{"prompt": "a", "response": "b"}\n{"a": 1 2}',
     "line 2: Expecting ',' delimiter: column 9 ")])
def test_malformed_data_is_reported_with_its_line(tmp_path, base, capsys, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    code, error = fails(capsys, f"sft --ckpt {base} --data {path} --out_dir {tmp_path}/o")
    assert code == 1 and message in error and "bad.jsonl" in error and error.count("\n") == 1


GZIP = gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 1000)


@pytest.mark.parametrize("name, content", [
    ("bad.jsonl", b"\xff\xfe\x00"), ("cut.jsonl.gz", GZIP[:40]), ("no.jsonl.gz", b"no gzip"),
    ("missing.jsonl", None), ("x.json", b"5"), ("x.json", b'{"a": 1}'), ("x.json", b"null"),
    ("x.json", b"[1]")])
def test_binary_truncated_and_wrong_files(tmp_path, base, capsys, name, content):
    path, text = tmp_path / name, tmp_path / name.replace("jsonl", "txt")
    if content:
        path.write_bytes(content)
        text.write_bytes(content)
    for command in (f"sft --data {path} --out_dir o", f"eval --task ppl --data {text}"):
        code, error = fails(capsys, f"{command} --ckpt {base}")
        assert code == 1 and name.split(".")[0] in error and error.count("\n") == 1


@pytest.mark.parametrize("tests", [[], "", " \n", ["", " "], [3], 5, None])
def test_problems_without_a_test_are_refused(tmp_path, tests):
    path = write(tmp_path / "p.jsonl", [{"prompt": "p", "tests": ["assert f() == 1"]},
                                        {"prompt": "p", "tests": tests}])
    with pytest.raises(ValueError, match="line 2: tests"):
        A.read_problems(str(path))
    write(path, [{"prompt": "p", "instruction_id_list": ["punctuation:no_comma"]}])
    with pytest.raises(ValueError, match="kwargs"):
        A.read_problems(str(path))


# ---- verifiers


@pytest.mark.parametrize("answer, truth", [
    ("1/2", "0.5"), (".5", "0.5"), (r"\frac{1}{2}", "0.5"),
    (r"The answer is \boxed{\dfrac12}.", "1/2"),
    ("1,234", "1234"), ("$1,234.00", "1234"), ("50%", "0.5"), (r"50\%", "50"), ("(1, 2)", "(1,2)"),
    ("2x+3", "3+2x"), (r"\frac{\sqrt{2}}{2}", r"1/\sqrt{2}"), ("x = 5", "5"), ("5 apples", "5"),
    ("she has 18 left.\n#### 18", "18"), ("-3", "-3.0"), ("1e5", "100000"),
    (r"1.5\times 10^{3}", "1500"), (r"\{1,2\}", r"\{2,1\}"), (r"\text{Yes}", "Yes"),
    (r"3\frac{1}{2}", "3.5"), ("The answer is 42.", "42"), ("10^{10}", "10000000000"),
    (r"90^\circ", "90"), ("Tom has 5 and 7, total 12.", "12"), (" 007", "7"), ("1{,}000", "1000"),
    (r"first \boxed{1}, then \boxed{\frac{3}{4}}", "0.75"), ("<answer>7</answer>", "7"),
    ("**Answer: 12**", "12"), (r"\left( 1, \frac{1}{2} \right)", "(1, 0.5)"), ("3 + 4 = 7", "7"),
    ("It costs $1,250.", "1250"), ("−5", "-5"), ("The answer is 5 dollars per day", "5"),
    ("so 72", "it is\n#### 72"), ("12\n", "12"), (r"2\pi", r"\pi 2"),
    (r"Final Answer: The final answer is $\frac12$. I hope it is correct.", "0.5"),
    ("The answer is 5. Wait, the answer is 6.", "6"), (r"The answer is \(\cfrac{1}{3}\).", "1/3"),
    (r"We get \[ x = \frac{3}{4}. \]", "0.75"), (r"\boxed{11,\! 111}", "11111"),
    (r"\boxed{x \le 2}", r"x \leq 2"), (r"x \in [-2,7]", "[-2, 7]"), ("f(x)=2x", "2x"),
    (r"\begin{pmatrix} 1 & \frac12 \\ 3 & 4 \end{pmatrix}",
     r"\begin{pmatrix}1&0.5\\3&4\end{pmatrix}"), ("1 1/2", "1.5"), ("It takes 2 1/3 cups.", "7/3"),
    (r"\boxed{1\,000}", "1000"), ("That is $5 million.", "5,000,000"), ("2xy", "2 xy"),
    ("5cm", "5"), (r"\boxed{f(x) = 2x}", "2x"), ("= 5", "5"), (r"Then $$x = \frac12$$", "0.5"),
    ("The answer is about 5", "5"), ("答案是6个", "6"), (r"\boxed{6个}", "6"),
    ("Final answer: The maximum of $f(x)$ is 19", "19"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)")])
def test_equal_answers(answer, truth):
    assert A.grade_math(answer, truth)


@pytest.mark.parametrize("answer, truth", [
    ("9^9^9^9", "1"), ("2", "3"), ("10**10**10", "1"), ("", "5"), ("", ""), ("0.333", "1/3"),
    ("18 19", "18"), (r"\boxed{5", "6"), ("1/0", "0"), ("dog", "god"), ("9" * 5000, "9"),
    ("0^{-1}", "0"), ("1e999999999", "1"), ("(-1)^{0.5}", "1"), ("A", "B"), ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"), (r"\boxed{18} no, \boxed{17}", "18"), ("{" * 900, "1"), ("-" * 900, "1"),
    (r"\boxed{" * 3000, "1"), ("\\sqrt{" * 150 + "}" * 150, "1"),
    ("__import__('os').system('id')", "0"), ("nan", "1"), ("inf", "1"),
    ("1" + "0" * 900 + "^" + "9" * 90, "1"), ("(((2^60)^60)^60)^60", "1"), (None, "1"),
    ("5", None), ("10^{400}", r"\pi"), ("5", r"\boxed{"), (r"\frac{34}{16}", "16"), ("3 + 4", "4"),
    ("x+2", "2"), (r"\frac{1+\sqrt{5}}{2}", "2"), (r"\boxed{a+3z=0}", "0"),
    (r"\boxed{x_1 = 2, x_2 = 3}", "3"), ("=" * 20_000, "1"), ("$" * 20_000, "1"),
    ("\\(" * 9_000, "1"), ("a_" * 9_000 + "=", "1"), ("{," * 400 + "1", "2"),
    (r"\(\)" * 2500 + "a" * 9_000 + "5", "1"), (r"\boxed{5!}", "5"), (r"\boxed{\ln 2}", "2"),
    (r"\boxed{x > 5}", "5"), ("x != 5", "5"), (r"\boxed{\pm 5}", "5"), ("x+y=5", "5"),
    ("10:05", "5"), (r"\boxed{(-\infty,5]}", "5"), ("1 000 000", "0"), ("2 3", "6"),
    (r"\boxed{2 3}", "23"), (r"\boxed{3π}", "3"), ("3π", "3"),
    ("\\boxed{" + "人 " * 400 + "/", "2"),
    ("1 1/2", "1/2"), ("It takes 1 1/2 cups", "1/2"), ("2", "2xy"), ("2ab", "2"), ("3pi", "3"),
    (r"\boxed{2 \sin x}", "2"), ("a+d", "b+c"), ("x+z", "2y"), ("5 million", "5"),
    (r"so \boxed{\frac{1}{2", "2")])
def test_unequal_or_hostile_answers(answer, truth):
    begin = time.perf_counter()
    assert A.grade_math(answer, truth) is False
    assert time.perf_counter() - begin < 1


def test_extract_answer():
    assert A.extract_answer(r"so \boxed{\frac{1}{2}} it is 3") == r"\frac{1}{2}"
    assert A.extract_answer("a 5, b 6 ate 2.") == "2" and A.extract_answer("nothing") is None
    assert A.extract_answer("Thus 12.5%.") == "12.5%"
    assert A.extract_answer("cost: $1,200.50") == "$1,200.50"
    assert A.extract_answer("x <answer> 4 </answer> y 5") == "4"
    assert A.extract_answer("the answer is 7. Then 8") == "7"
    assert A.extract_answer("work 1\n#### -3") == "-3"


@pytest.mark.parametrize("text, letter", [
    ("The answer is (B).", "B"), ("B", "B"), ("(C) because", "C"), ("D. photosynthesis", "D"),
    ("A dog ran", "A"), ("I think A or B", None), ("it must be C", "C"), (r"\boxed{D}", "D"),
    ("E", None), ("", None), ("First A seems right, but the correct answer is B", "B"),
    ("answer: C", "C")])
def test_choices(text, letter):
    assert A.find_choice(text) == letter
    assert A.verify({"answerKey": "B", "n": 4}, text) == (letter == "B")


CONSTRAINT_CASES = [
    ("keywords:existence", {"keywords": ["cat", "Dog"]}, "a dog and a CAT", "a dog"),
    ("keywords:frequency", {"keyword": "the", "frequency": 2, "relation": "at least"}, "The the",
     "the"), ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "category", "a Cat."),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
     "bA", "banana"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
     "One. Two!", "One"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words",
     "now three words"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:nth_paragraph_first_word",
     {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "hello"}, "a\n\nHello, b",
     "hello\n\nb"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "x\nP.S. y", "x"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "yes"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**",
     "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
     "SECTION 1 a SECTION 2 b", "SECTION 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<joy>> x", "<< >> x"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it\nx", "x"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'x the end."', "the end. x"),
    ("startend:quotation", {}, '"x"', 'x"'),
    ("change_case:capital_word_frequency",
     {"capital_frequency": 1, "capital_relation": "at least"}, "I AM", "no"),
    ("change_case:english_capital", {}, "ABC 1", "ABc"),
    ("change_case:english_lowercase", {}, "abc", "Abc"),
    ("punctuation:no_comma", {}, "a b", "a, b")]


@pytest.mark.parametrize("name, arguments, good, bad", CONSTRAINT_CASES)
def test_constraints(name, arguments, good, bad):
    assert A.check_constraint(name, arguments, good)
    assert not any(A.check_constraint(name, arguments, text) for text in (bad, " "))


def test_constraints_are_complete_and_checked():
    assert {name for name, *_ in CONSTRAINT_CASES} == set(A.CONSTRAINTS)
    assert A.check_constraint("punctuation:no_comma", {}, "Sure, here:\nno comma", loose=True)
    for name, arguments in (("no:such", {}), ("keywords:existence", {}),
                            ("keywords:existence", {"keywords": 3})):
        with pytest.raises(ValueError, match=name):
            A.check_constraint(name, arguments, "x")
    arguments = {k: v for _, arguments, *_ in CONSTRAINT_CASES for k, v in arguments.items()}
    begin = time.perf_counter()
    for text in ("<" * 4000, "*" + "a" * 9000, "a" + "\n" * 9000 + "a"):
        for name in A.CONSTRAINTS:
            A.check_constraint(name, arguments, text)
    assert time.perf_counter() - begin < 3


def test_unknown_instructions_are_dropped_and_arguments_checked(tmp_path, capsys):
    row = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]}
    unknown = row | {"instruction_id_list": ["language:response_language"]}
    path = write(tmp_path / "p.jsonl", [row, unknown])
    assert len(A.read_problems(str(path))) == 1 and "1 of 2 problems" in capsys.readouterr().out
    assert len(A.read_task("ifeval", str(path))) == 2
    write(path, [row, row | {"instruction_id_list": ["length_constraints:number_words"]}])
    for read in (A.read_problems, functools.partial(A.read_task, "ifeval")):
        with pytest.raises(ValueError, match="line 2: the arguments of length"):
            read(str(path))


def test_code_that_is_right_passes():
    for code, tests in (
        ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(x=2) == 3"]),
        ("def f(a): a.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]"),
        ("class S:\n    def __init__(self): self.x = []\n"
         "    def push(self, a): self.x.append(a)\n    def __len__(self): return len(self.x)",
         "s = S()\ns.push(3)\nassert len(s) == 1 and s.x == [3]"),
        ("import math\nfrom collections import Counter\ndef g(n):\n    yield from range(n)\n"
         "def f(s): return Counter(s)\ndef h(x):\n    if x < 0: raise ValueError('no')\n"
         "    return x / 2, {x}",
         "assert list(g(3)) == [0, 1, 2]\nassert f('aab') == {'a': 2, 'b': 1}\n"
         "assert h(1) == (0.5, {1})\n"
         "try:\n    h(-1)\nexcept ValueError: pass\nelse: assert False\nassert math.pi > 3"),
        ("class N:\n    next = None\n    def __repr__(self): return 'N()'\n"
         "def length(n): return 1 + length(n.next) if n else 0\ndef half(x): return x / 2",
         "n = N()\nn.next = N()\nassert length(n) == 2 and str(n) == repr(n) == 'N()'\n"
         "assert half(fractions.Fraction(1, 3)) == fractions.Fraction(1, 6)\n"
         "assert half(decimal.Decimal(3)) == decimal.Decimal('1.5')"),
        ("def f(operation, self, function): return operation + self + function\n"
         "class S:\n    x = ()\n    def ask(self, x): return x\n"
         "    def __len__(self): return len(self.x)",
         "assert f(operation=1, self=2, function=3) == 6\ns = S()\n"
         "assert not s and s.ask(3) == 3")):
        verdict = A.run_code(code, tests)
        assert verdict and verdict.error == "", verdict


FORGERIES = {
    "wrong": "def f(x): return x",
    "syntax": "def f(:",
    "prints": "print(2); print('[true, \"\"]')\ndef f(x): return 1",
    "leaves": "import os\nos._exit(0)",
    "leaves when called": "import sys\ndef f(x): sys.exit(0)",
    "equal to all": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\n"
    "def f(x): return E(5)",
    "object equal to all": "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "patches": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.eval = print\n"
    "def f(x): return 1",
    "shadows": "def all(x): return True\ndef isinstance(*a): return True\ndef f(x): return 1",
    "writes a verdict": "import os\nos.write(1, b'[true, \"\"]\\n' * 9)\ndef f(x): return 1",
    "writes answers": "import os\n"
    "os.write(1, b'[\"ok\", [\"list\", [[\"dict\", []]]]]\\n' * 9)\ndef f(x): return 1",
    "writes handles": "import os\nos.write(1, b'[\"ok\", [\"list\", [[\"dict\", [[\"tuple\", "
    "[\"f\", [\"handle\", 0]]]]]]]]\\n' * 9)\ndef f(x): return 1",
    "stops": "def f(x): raise StopIteration",
    "lies about its class": "class E:\n    __class__ = int\n    def __eq__(s, o): return True\n"
    "def f(x): return E()",
    "huge decimal": "import decimal\ndef f(x): return decimal.Decimal('1e999999999')",
    "forged fraction": "import sys\nm = sys.modules['__main__']\ndef f(x):\n    m.tell.write("
    "b'[\"ok\", [\"list\", [[\"Fraction\", \"1e999999999\"]]]]\\n')\n    m.tell.flush()",
    "crafted": "import sys\nc = (lambda: 0).__code__.replace(co_code=b'00')\ndef f(x): return 2",
    "frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_locals.update(error=None)\n        frame = frame.f_back\n    return 1",
    "raises": "def f(x): raise SystemExit(0)",
    "files": "def f(x): return len(open('/etc/passwd').read()) * 0 + 2",
    "writes files": "open('stolen', 'w').write('x')\ndef f(x): return 2",
    "network": "import socket\nsocket.socket()\ndef f(x): return 2",
    "process": "import subprocess\ndef f(x): return 2",
    "shell": "import os\nos.system('true')\ndef f(x): return 2",
    "fork": "import os\nos.fork()\ndef f(x): return 2",
    "kill": "import os\nos.kill(os.getppid(), 9)\ndef f(x): return 2",
    "ctypes": "import ctypes\ndef f(x): return 2",
    "memory": "x = 'a' * 10**10\ndef f(x): return 2",
    "depth": "def f(x): return f(x)",
    "prints without end": "while True: print('x' * 1000)",
    "endless": "def f(x):\n    while True: pass",
    "hook": "import gc\nfor o in gc.get_objects():\n    if getattr(o, '__name__', '') == 'hook':\n"
    "        o.__code__ = (lambda event, args: None).__code__\nopen('/etc/passwd')\n"
    "def f(x): return 2",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_code_that_cheats_fails(name):
    begin = time.perf_counter()
    verdict = A.run_code(FORGERIES[name], "assert all([f(1) == 2]) and isinstance(f(1), int)",
                         timeout=1.5)
    assert not verdict and verdict.passed is False and verdict.error
    assert time.perf_counter() - begin < 5 and (verdict.error == "timeout" or name != "endless")


def test_the_verdict_comes_from_what_a_problem_has():
    assert A.verify({"answer": "2"}, "1 + 1 = 2") == 1 and A.verify({"answer": "2"}, "3") == 0
    assert A.verify({"answerKey": "E", "n": 5}, "(E)") == 1
    assert (A.verify({"instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
                      "kwargs": [{}, None]}, "a") == 0.5)
    fenced = "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nas you asked"
    assert A.verify({"tests": ["assert f(2) == 4"]}, fenced) == 1


# ---- synthetic data


def test_problems_are_true():
    rng = random.Random(0)
    for kind, levels in (("addition", (1, 2, 3)), ("arithmetic", (1, 2, 4)), ("word", (1, 2, 3))):
        for level in levels:
            for _ in range(50):
                p = A.make_problem(kind, level, rng)
                assert A.grade_math(p["response"], p["answer"])
                assert not A.grade_math(str(int(p["answer"]) + 1), p["answer"])
                if kind != "word":  # eval, of what we made ourselves
                    text = p["prompt"].removeprefix("Calculate ").rstrip(".=")
                    assert eval(text) == int(p["answer"]), p
                if kind == "arithmetic":
                    assert p["response"].count("\n") == level
    problems = A.make_problems("addition", 1, 500, 0)
    assert len(problems) == 100 == len({p["prompt"] for p in problems})


# ---- evaluation


class Scripted(torch.nn.Module):
    """Stands in for a model: knows the log-probs of the next id after each id."""

    def __init__(self, table):
        super().__init__()
        self.embedding = M.Embedding(*table.shape)
        self.head = M.Linear(table.shape[1], table.shape[1])
        self.head.weight.data = torch.eye(table.shape[1])
        self.table, self.config = table, M.TransformerConfig(vocab_size=len(table), block_size=64)

    def forward(self, ids, hidden=False, last=0):
        return self.table[ids]


def test_mistake_7_scoring_tokenizes_context_and_continuation_as_one():
    """ " b" is one token: tokenize("a") + tokenize(" b") is right by luck; with the space on the
    left it is another one."""
    vocab = {0: b"a", 1: b" ", 2: b"b", 3: b" b", 4: b"ab"}
    tokenizer = bpe.Tokenizer(vocab, [(b" ", b"b"), (b"a", b"b")], ["<|endoftext|>"], r"[\s\S]+")
    assert A.encode_continuation(tokenizer, "a", " b") == ([0, 3], 1)
    assert A.encode_continuation(tokenizer, "a ", "b") == ([0, 3], 1)  # not [0, 1] + [2]
    assert A.encode_continuation(tokenizer, "a", "b")[0] == [4]  # not [0] + [2]
    assert A.encode_continuation(tokenizer, "", "b") == ([tokenizer.eot_id, 2], 1)
    log_p = torch.randn(6, 6).log_softmax(-1)
    ((score, _),) = A.score(Scripted(log_p), [A.encode_continuation(tokenizer, "a ", "b")])
    assert abs(score - log_p[0, 3].item()) < 1e-6


def test_score_equals_one_by_one():
    for more in ({}, {"logit_cap": 5.0}):
        model = tiny(**more).eval()
        requests = [(torch.randint(60, (n,)).tolist(), k) for n, k in
                    ((5, 2), (9, 4), (3, 1), (40, 3), (9, 8))]
        requests += [(requests[0][0][:-1] + [i], 1) for i in (1, 2)]  # the last id differs
        for (ids, n), (log_p, greedy) in zip(requests, A.score(model, requests, batch_size=3)):
            ids = ids[-33:]
            expected = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)[-n:]
            target = torch.tensor(ids[-n:])
            assert abs(log_p - expected.gather(1, target[:, None]).sum().item()) < 1e-4
            assert greedy == bool((expected.argmax(-1) == target).all())


def test_wilson_and_pass_at_k():
    low, high = A.wilson(50, 100)
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert (A.wilson(0, 10)[0] == pytest.approx(0) and 0.2 < A.wilson(0, 10)[1] < 0.4 and
            A.wilson(0, 0) == (0, 1))
    for n in (5, 10, 19, 23):
        assert A.share([False] * n)[8:14] == "0.0000" and A.wilson(n, n)[1] <= 1
    assert A.pass_at_k(10, 0, 5) == 0 and A.pass_at_k(10, 6, 5) == 1
    draws = [any(i < 3 for i in random.Random(s).sample(range(10), 4)) for s in range(20_000)]
    assert abs(A.pass_at_k(10, 3, 4) - statistics.mean(draws)) < 0.01


def test_tasks_are_read_as_published(tmp_path):
    arc = write(tmp_path / "arc.jsonl", [{"id": "1", "question": "Why?", "answerKey": "2",
                                          "choices": {"text": ["x", "yy"], "label": ["1", "2"]}}])
    (item,) = A.read_task("arc", str(arc))
    assert item == {"context": "Question: Why?\nAnswer:", "choices": ["x", "yy"], "label": 1,
                    "target": " yy"}
    piqa = write(tmp_path / "piqa.jsonl", [{"goal": "Do", "sol1": "a", "sol2": "b", "label": 0}])
    assert A.read_task("piqa", str(piqa))[0]["context"] == "Question: Do\nAnswer:"
    swag = write(tmp_path / "h.jsonl", [{"activity_label": "Cook", "ctx_a": "A man [header] sits.",
                                         "ctx_b": "he", "endings":
                                         ["runs [step] x.", "b", "c", "d"], "label": "2"}])
    (item,) = A.read_task("hellaswag", str(swag))
    assert (item["context"] == "Cook: A man sits. He" and item["choices"][0] == "runs x." and
            item["label"] == 2)
    folder = tmp_path / "mmlu"
    folder.mkdir()
    (folder / "high_school_art_dev.csv").write_text(
        '"Q, one?",w,x,y,z,C\nQ2\u2028,w,x,y,z,A\n', "utf-8")
    items = A.read_task("mmlu", str(folder))
    A.add_shots(items, [dict(i) for i in items], 1)
    head = "The following are multiple choice questions (with answers) about high school art.\n\n"
    first = "Q, one?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert items[1]["context"] == head + first + " C\n\nQ2\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert items[0]["context"].endswith(first) and items[0]["context"].count("Q, one?") == 1
    math_ = write(tmp_path / "g.jsonl", [{"question": "q?", "answer": "1+1\n#### 2"}])
    (item,) = A.read_task("gsm8k", str(math_))
    assert item["problem"]["answer"] == "2" and item["target"] == " 1+1\n#### 2"
    assert A.read_task("arc", str(arc), cot=True)[0]["problem"] == {"answerKey": "B", "n": 2}
    for task, row in (
        ("arc", {"question": "q", "choices": {"text": ["a"], "label": []}, "answerKey": "A"}),
        ("piqa", {"goal": "g", "sol1": "a", "sol2": "b", "label": 2}),
        ("gsm8k", {"question": "q"}), ("arc", {"question": "q", "answer": "#### 2"}),
        ("hellaswag", {"endings": []}),
        ("ifeval", {"prompt": "x"})):
        with pytest.raises(ValueError, match="line 1"):
            A.read_task(task, str(write(tmp_path / "bad.jsonl", [row])))
    (folder / "high_school_art_dev.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="four choices"):
        A.read_task("mmlu", str(folder))


def test_eval_counts_by_likelihood_and_by_length(tmp_path, capsys, monkeypatch):
    tokenizer = char_tokenizer("Q:ab ")
    log_p = torch.full((7, 7), -2.0)
    # "a" is likelier than "b", and than "aaa"
    log_p[tokenizer.encode(" ")[0], tokenizer.encode("a")[0]] = -0.5
    model = Scripted(log_p.log_softmax(-1))
    monkeypatch.setattr(A, "load_model", lambda *_:
                        (model, tokenizer, A.make_template("raw", tokenizer), {}))
    rows = [{"question": "ab", "choices": {"text": ["aaaaaa", "b"], "label": ["A", "B"]},
             "answerKey": key} for key in "ABB"]
    path = write(tmp_path / "arc.jsonl", rows)
    monkeypatch.setattr(A, "read_item", lambda task, row, where: {
        "context": "Q:", "choices": row["choices"]["text"],
        "label": "AB".index(row["answerKey"]), "target": ""})
    cli(f"eval --task arc --ckpt x --data {path} --device cpu")
    out = capsys.readouterr().out  # b is likelier; per character, aaaaaa
    assert "\nacc: 0.6667" in out and "\nacc_norm: 0.3333" in out


def test_generation_is_judged_voted_and_taken_up_again(tmp_path, base, capsys, monkeypatch):
    said = iter(["4", "5 é", "4", "7", "7", "6 é"])
    calls = []

    def respond(model, tokenizer, prompts, *_):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [(p, next(said)) for p in prompts]

    monkeypatch.setattr(A, "respond", respond)
    path = write(tmp_path / "p.jsonl",
                 [{"question": "2+2", "answer": "4"}, {"question": "1+5", "answer": "6"}])
    command = (f"eval --task gsm8k --ckpt {base} --data {path} --samples 3 --batch_size 3 "
               f"--device cpu --out {tmp_path}/kept.jsonl")
    with pytest.raises(KeyboardInterrupt):
        cli(command)
    with open(tmp_path / "kept.jsonl", "a") as file:
        file.write('[["half')  # as a killed run may leave it
    capsys.readouterr()
    cli(command)
    out = capsys.readouterr().out
    assert calls == [3, 3, 3]  # the first question was not asked again
    assert "\nacc: 0.5000" in out and "pass@3: 1.0000" in out and "majority@3: 0.5000" in out
    assert f"pass@1: {(2 / 3 + 1 / 3) / 2:.4f}" in out
    before = (tmp_path / "kept.jsonl").read_bytes()
    cli(command)
    assert len(calls) == 3 and (tmp_path / "kept.jsonl").read_bytes() == before


@pytest.mark.parametrize("command", ["eval --task gsm8k", "eval --task ppl", "judge"])
def test_a_file_of_somebody_else_is_not_replaced(tmp_path, base, capsys, command):
    rows = [{"prompt": "2+2", "answer": "4", "chosen": "4", "rejected": "5", "text": "1+1"}] * 2
    path = write(tmp_path / "own.jsonl", rows)
    before = path.read_bytes()
    code, error = fails(capsys, f"{command} --ckpt {base} --data {path} --device cpu --out {path}")
    assert code == 1 and "own.jsonl is not from align.py" in error
    assert path.read_bytes() == before
    other, more = tmp_path / "other.jsonl", "--max_new_tokens 2" if "gsm" in command else ""
    other.write_text("")  # nothing to lose
    for _ in range(2):
        cli(f"{command} --ckpt {base} --data {path} --device cpu --out {other} {more}")
        assert len(other.read_text().splitlines()) == 2  # what it depends on, and one chunk


def test_perplexity_of_text(tmp_path, base, capsys):
    text = "one plus one is two. " * 9
    (tmp_path / "t.txt").write_text(text + "<|endoftext|>abc")
    cli(f"eval --task ppl --ckpt {base} --data {tmp_path}/t.txt --device cpu")
    out = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    model, checkpoint = M.load_checkpoint(base)
    tokenizer, total = bpe.Tokenizer.from_json(checkpoint["tokenizer"]), 0.0
    for document in (text, "abc"):
        ids = [tokenizer.eot_id] + tokenizer.encode(document)
        for i in range(0, len(ids) - 1, 48):
            x = torch.tensor([ids[i : i + 49]])
            total += F.cross_entropy(model(x[:, :-1])[0], x[0, 1:], reduction="sum").item()
    n = len(text) + 3
    assert int(out["tokens"]) == n and abs(float(out["loss"]) - total / n) < 1e-3
    assert abs(float(out["bits_per_byte"]) - total / n / math.log(2)) < 1e-3


# ---- runs


def sums(n, **more):
    """n problems of one digit; `more`: fields in place of theirs."""
    problems = [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b), **more}
                for a in range(10) for b in range(10)]
    random.Random(0).shuffle(problems)
    return problems[:n]


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def train(kind, ckpt, data, folder, flags=""):
    """-> rows of log.csv"""
    cli(f"{kind} --ckpt {ckpt} --data {data} --out_dir {folder} --device cpu {flags}")
    return log_of(folder)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "sums.jsonl", sums(60))
    train("sft", base, data, folder / "sft", "--max_iters 40 --batch_size 8 --learning_rate 2e-2 "
          "--optimizer muon --log_interval 20")
    return folder / "sft" / "ckpt.pt", data


def test_sft_learns_and_leaves_a_model_that_talks(trained):
    rows = log_of(trained[0].parent)
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"]) and len(rows) == 40
    model, tokenizer, template, checkpoint = A.load_model(str(trained[0]), "cpu")
    assert checkpoint["template"]["assistant"] == "{content}<|endoftext|>"
    stops = M.chat_stops(tokenizer, template)
    ((ids, text),) = A.respond(model, tokenizer, [tokenizer.encode("1+1=")], stops, 8, 0, 0)
    # it has learned what an answer looks like
    assert ids[-1] == tokenizer.eot_id and text.isdigit()
    assert not list(trained[1].parent.rglob("*.tmp"))


def test_packing_and_accumulation_do_not_change_training(tmp_path, base):
    data = write(tmp_path / "d.jsonl", sums(8))
    losses = {}
    for name, flags in (("plain", "--no_packing"), ("packed", ""),
                        ("parts", "--gradient_accumulation_steps 3")):
        rows = train("sft", base, data, tmp_path / name, "--max_iters 4 --batch_size 8 "
                     f"--learning_rate 1e-3 {flags}")
        losses[name] = sum([[float(row["loss"]), float(row["grad_norm"])] for row in rows], [])
    assert losses["parts"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["packed"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.parametrize("kind, flags", [
    ("sft", "--batch_size 4"),
    ("rl", "--algorithm ppo --max_new_tokens 3 --kl 0.1 --prompts_per_step 4 --group_size 2")])
def test_resume_is_exact(tmp_path, trained, kind, flags):
    flags += " --learning_rate 1e-3 --eval_interval 3"
    whole = train(kind, *trained, tmp_path / "whole", f"{flags} --max_iters 6")
    train(kind, *trained, tmp_path / "part", f"{flags} --max_iters 3")
    cli(f"{kind} --out_dir {tmp_path}/part --resume --max_iters 6")  # the rest is known
    part = log_of(tmp_path / "part")
    assert [r["loss"] for r in whole] == [r["loss"] for r in part] and len(part) == 6


def test_resume_and_help_know_flags_that_are_0(tmp_path, trained, capsys):
    names = "grad_clip show lam gamma clip value_weight temperature seed".split()
    flags = " ".join(f"--{name} 0" for name in names).replace("temperature 0", "temperature 0.5")
    train("rl", *trained, tmp_path / "rl", "--algorithm ppo --max_iters 1 --prompts_per_step 2 "
          f"--group_size 2 --max_new_tokens 2 {flags}")
    args = vars(A.parse_args(f"rl --out_dir {tmp_path}/rl --resume --lam 0.5".split()))
    assert [args[name] for name in names] == [0, 0, 0.5, 0, 0, 0, 0.5, 0]
    with pytest.raises(SystemExit):
        A.parse_args(["rl", "--help"])
    assert "(default: 0)" in capsys.readouterr().out


def test_dpo_begins_at_ln_2_and_prefers_the_chosen(tmp_path, trained, capsys):
    pairs = [{"prompt": p["prompt"], "chosen": p["answer"], "rejected": str(int(p["answer"]) + 1)}
             for p in sums(100)]
    train_, test = write(tmp_path / "a.jsonl", pairs[:80]), write(tmp_path / "b.jsonl", pairs[80:])
    rows = train("dpo", trained[0], train_, tmp_path / "dpo", f"--val_data {test} --max_iters 30 "
                 "--learning_rate 2e-3 --eval_interval 15 --gradient_accumulation_steps 2")
    assert abs(float(rows[0]["loss"]) - math.log(2)) < 1e-6
    # ties, before anything is learned
    assert "val_accuracy 0.5 | val_margin 0 " in capsys.readouterr().out
    assert float(rows[-1]["margin"]) > 0.1 and float(rows[-1]["accuracy"]) > 0.8
    assert float(rows[-1]["val_margin"]) > 0 and rows[-1]["val_chosen_log_prob"]


def test_reward_model_learns_and_serves(tmp_path, trained):
    pairs = [{"prompt": p["prompt"], "chosen": p["answer"], "rejected": "no"} for p in sums(40)]
    pairs = write(tmp_path / "a.jsonl", pairs)
    rows = train("reward", trained[0], pairs, tmp_path / "rm", f"--val_data {pairs} --max_iters "
                 "15 --learning_rate 1e-2")
    assert abs(float(rows[0]["loss"]) - math.log(2)) < 1e-6
    assert float(rows[-1]["val_accuracy"]) == 1
    reward = A.load_reward_model(str(tmp_path / "rm" / "ckpt.pt"), "cpu")
    texts = ("1+1=2<|endoftext|>", "1+1=no<|endoftext|>")
    good, bad = reward.score([char_tokenizer().encode(text) for text in texts], "cpu")
    assert good > bad
    train("rl", *trained, tmp_path / "rl", f"--reward_model {tmp_path}/rm/ckpt.pt --max_iters 2 "
          "--prompts_per_step 2 --group_size 2 --max_new_tokens 3")
    with pytest.raises(ValueError, match="no reward model"):
        A.load_reward_model(str(trained[0]), "cpu")


@pytest.mark.parametrize("algorithm", A.ALGORITHMS)
def test_rl_makes_rewarded_answers_likelier(tmp_path, trained, algorithm, capsys):
    """The same answer is right for all: every algorithm has to find it."""
    data = write(tmp_path / "p.jsonl", sums(30, answer="1"))
    more = "--minibatches 2 --kl 0.01" if algorithm in ("ppo", "grpo") else ""
    rows = train("rl", trained[0], data, tmp_path / "rl", f"--algorithm {algorithm} --val_data "
                 f"{data} --max_iters 12 --prompts_per_step 16 --group_size 8 --max_new_tokens 3 "
                 f"--learning_rate 5e-3 --eval_interval 12 --micro_batch 48 {more}")
    assert statistics.mean(float(r["reward"]) for r in rows[-3:]) > float(rows[0]["reward"]) + 0.2
    assert {"reward", "solved", "length", "entropy", "kl", "clip_fraction",
            "grad_norm"} <= set(rows[0])
    assert "'1': 1.00" in capsys.readouterr().out  # answers are shown


def test_micro_batches_do_not_change_rl(tmp_path, trained):
    losses = []
    for size in (1024, 5):
        rows = train("rl", *trained, tmp_path / str(size), "--algorithm dapo --max_iters 4 "
                     "--prompts_per_step 4 --group_size 4 --max_new_tokens 3 --learning_rate 1e-3 "
                     f"--micro_batch {size} --minibatches 2")
        losses.append([(float(r["loss"]), float(r["grad_norm"])) for r in rows])
    assert sum(losses[0], ()) == pytest.approx(sum(losses[1], ()), abs=1e-4)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "expert"])
def test_equal_rewards_change_nothing(tmp_path, trained, algorithm):
    data = write(tmp_path / "p.jsonl", sums(10, answer="impossible"))
    train("rl", trained[0], data, tmp_path / "rl", f"--algorithm {algorithm} --max_iters 2 "
          "--prompts_per_step 4 --group_size 4 --max_new_tokens 3")
    before, after = (M.load_checkpoint(path)[0].state_dict()
                     for path in (trained[0], tmp_path / "rl" / "ckpt.pt"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_long_prompts_are_dropped_and_counted(tmp_path, trained, capsys):
    sides = {"chosen": "1", "rejected": "2"}
    rows = sums(5, **sides) + [{"prompt": "1" * 100, "response": "1", "answer": "1", **sides}] * 2
    data = write(tmp_path / "d.jsonl", rows)
    for kind in ("sft", "dpo", "reward", "rl --max_new_tokens 4 --group_size 2"):
        train(kind, trained[0], data, tmp_path / kind.split()[0], "--max_iters 1")
        assert "2 of 7" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of 2"):
        train("sft", trained[0], write(tmp_path / "long.jsonl", rows[5:]), tmp_path / "x")


def test_synthetic_data_from_a_checkpoint(tmp_path, trained, capsys):
    out = tmp_path / "r.jsonl"

    def synthesize(flags):
        cli(f"synth --out {out} {flags}")
        return [json.loads(line) for line in out.read_text().splitlines()]

    common = f"--ckpt {trained[0]} --data {trained[1]} --samples 6 --max_new_tokens 4 --device cpu"
    rows = synthesize(common)
    assert rows and all(A.grade_math(r["response"], r["answer"]) for r in rows)
    assert "dropped" not in capsys.readouterr().out
    rows = synthesize(common + " --pairs")
    assert rows and all(A.grade_math(r["chosen"], r["answer"]) and
                        not A.grade_math(r["rejected"], r["answer"]) for r in rows)
    assert not os.path.exists(str(out) + ".part")
    cli(f"judge --ckpt {trained[0]} --data {out} --template plain --device cpu")
    assert f"pairs: {len(rows)}" in capsys.readouterr().out
    synthesize(common + f" --judge {trained[0]}")
    assert len(synthesize("--kind word --level 2 --n 20")) == 20 == len(A.read_problems(str(out)))


def test_a_judge_that_only_likes_a_place_decides_nothing(monkeypatch):
    tokenizer = char_tokenizer("".join(map(chr, range(32, 127))) + "\n")
    a, b = (tokenizer.encode(c)[0] for c in "AB")
    model = tiny(tokenizer.vocab_size, 512)
    template = A.make_template("raw", tokenizer)
    for marked, verdict in (("", 0), ("Answer A: good", 1), ("Answer A: bad", -1)):

        def forward(ids, last=0, marked=marked):
            logits = torch.zeros(1, 1, tokenizer.vocab_size)
            logits[0, 0, a if marked in tokenizer.decode(ids[0].tolist()) else b] = 1.0
            return logits

        monkeypatch.setattr(model, "forward", forward)
        assert A.judge_pair(model, tokenizer, template, "which {a}?", "good", "bad") == verdict


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, A.__file__, "--help"], stdout=write,
                          stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_usage(tmp_path, base, capsys):
    common = f"--ckpt {base} --data x.jsonl --out_dir {tmp_path}/o"
    for line in (f"sft {common} --batch_size 0", f"sft {common} --learning_rate -1", "nothing",
                 f"rl {common} --lam 2", f"rl {common} --temperature 0", "eval --task arc",
                 f"synth --ckpt {base} --out x", "sft --resume", f"sft --out_dir {tmp_path}/o",
                 "synth --kind addition --out x --level 5000"):
        assert fails(capsys, line)[0] == 2
    for line in (f"sft {common}", "sft --ckpt no.pt --data x --out_dir o",
                 f"sft {common} --resume"):
        code, error = fails(capsys, line)
        assert code == 1 and error.startswith("align.py: error: ") and error.count("\n") == 1
    M.save_checkpoint(tmp_path / "mute.pt", tiny())
    code, error = fails(capsys, f"sft --ckpt {tmp_path}/mute.pt --data x --out_dir o")
    assert code == 1 and "no tokenizer" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed(tmp_path, trained, capsys, monkeypatch, number):
    update = A.Run.update

    def interrupted(run, *args):
        calls.append(os.kill(os.getpid(), number) if len(calls) == 9 else None)
        return update(run, *args)

    calls = []
    monkeypatch.setattr(A.Run, "update", interrupted)
    code, error = fails(capsys, f"sft --ckpt {trained[0]} --data {trained[1]} --out_dir "
                        f"{tmp_path}/s --device cpu --max_iters 100000", out := [])
    assert code == 130 and "--resume" in out[0] and "Traceback" not in error
    step = M.load_checkpoint(tmp_path / "s" / "ckpt.pt")[1]["step"]
    assert step == 10
    rows = train("sft", *trained, tmp_path / "s", f"--resume --max_iters {step + 2}")
    assert [int(r["step"]) for r in rows] == list(range(1, step + 3))
