"""
From a base model to one that does what it is asked: supervised fine-tuning, preferences,
reinforcement learning with verifiers, and evaluation.

    python align.py                       # a demonstration on a CPU: see `run_demo`
    python align.py sft --ckpt out/ckpt.pt --data instructions.jsonl --out_dir out-sft
    python model.py chat --ckpt out-sft/ckpt.pt
    python align.py dpo --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-dpo
    python align.py reward --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-reward
    python align.py rl --algorithm grpo --ckpt out-sft/ckpt.pt --data problems.jsonl --out_dir out
    python align.py synth --kind word --level 2 --n 1000 --out problems.jsonl
    python align.py synth --ckpt out-sft/ckpt.pt --data problems.jsonl --pairs --out pairs.jsonl
    python align.py judge --ckpt smol.pt --data pairs.jsonl
    python align.py eval --task gsm8k --ckpt smol.pt --chat --data test.jsonl --limit 100

After a demonstration, on what it left in out-align:

    python align.py rl --algorithm ppo --ckpt out-align/seed1/sft/ckpt.pt --out_dir out-ppo \\
        --data out-align/seed1/train.jsonl --max_new_tokens 4 --learning_rate 1e-3

Training is taken up by --resume, which needs --out_dir only. Data is .jsonl or .json, also as .gz.
For sft: `prompt` and `response`, Alpaca's `instruction`, `input`, `output`, or chats in
`messages`; for dpo and reward: `prompt`, `chosen`, `rejected`; for rl: `prompt` and `answer` (or
`tests`, for Python code, or IFEval's `instruction_id_list` and `kwargs`).

Shapes: B responses, T tokens. Everything about tokens is shifted by one, as in train.py: position
t of `input_ids` is what the model reads, position t of `labels`, log-probs and masks what it says.
"""

import argparse
import contextlib
import copy
import csv
import gzip
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from fractions import Fraction
from multiprocessing import get_context
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from bpe import Tokenizer
from model import (Transformer, TransformerConfig, chat_stops, chat_template, encode_chat,
                   load_checkpoint, pick_device, save_checkpoint, upcast)

# -----------------------------------------------------------------------------
# Data: files of rows, rows to messages, messages to ids.


def read_text(path):
    """The text of a file, or of a compressed one. Raises ValueError if it is none, or OSError."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read().decode()
    except (UnicodeError, EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f"{path}: {e}") from None


def read_rows(path):
    """Rows of a .jsonl file, or of a .json file that is a list -> list of (where, dict), `where`
    naming file and line for error messages. Raises ValueError for malformed ones, or OSError."""
    whole = path.removesuffix(".gz").endswith(".json")
    rows, where, text = [], path, read_text(path)
    try:
        lines = json.loads(text) if whole else text.split("\n")
        if type(lines) is not list:
            raise ValueError("it is no list of rows")
        for number, row in enumerate(lines, 1):
            where = f"{path}, {'row' if whole else 'line'} {number}"
            if whole or row.strip():
                row = row if whole else json.loads(row)
                if type(row) is not dict:
                    raise ValueError(f"a row must be an object, not {type(row).__name__}")
                rows.append((where, row))
    except (ValueError, RecursionError) as e:  # to json each line is line 1
        raise ValueError(f"{where}: {re.sub('line 1 (?=column)', '', str(e))}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def field(row, where, *names, kind=str):
    """The first of these fields that a row has; ValueError if it has none, or of another type."""
    for name in names:
        if name in row:
            if type(row[name]) is not kind:
                raise ValueError(f"{where}: {name} must be of type {kind.__name__}, not "
                                 f"{type(row[name]).__name__}")
            return row[name]
    raise ValueError(f"{where}: it has none of the fields {', '.join(names)}")


def to_messages(turns, where):
    """A chat in the usual forms ({"role", "content"}, or ShareGPT's {"from", "value"}) -> list of
    {"role": system, user or assistant, "content": ...}"""
    messages = []
    for turn in turns:
        if type(turn) is not dict:
            raise ValueError(f"{where}: a message must be an object, not {type(turn).__name__}")
        role = field(turn, where, "role", "from").lower()
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: a role is system, user or assistant, not {role!r}")
        messages.append({"role": role, "content": field(turn, where, "content", "value")})
    return messages


def prompt_of(row, where):
    """The messages that a row begins with."""
    for name in ("messages", "conversations", "prompt"):
        if type(row.get(name)) is list:
            return to_messages(row[name], where)
    text = field(row, where, "instruction", "prompt", "question", "problem")
    if "instruction" in row and row.get("input"):  # Alpaca's
        text += "\n\n" + field(row, where, "input")
    return [{"role": "user", "content": text}]


def read_conversations(path):
    """Data for fine-tuning -> (chats, each a list of messages that ends with the assistant's; the
    number of rows dropped because a response is empty)."""
    chats = []
    for where, row in (rows := read_rows(path)):
        chat = prompt_of(row, where)
        if not {"messages", "conversations"} & set(row):
            text = field(row, where, "response", "output", "completion", "answer")
            chat.append({"role": "assistant", "content": text})
        while chat and chat[-1]["role"] != "assistant":
            chat.pop()
        if chat and all(m["content"].strip() for m in chat if m["role"] == "assistant"):
            chats.append(chat)
    return chats, len(rows) - len(chats)


def read_pairs(path):
    """Data for preferences -> (list of (messages, chosen, rejected), the number of rows dropped
    because a response is empty or both are the same). A side is a text, a message, or a whole
    dialogue, as messages or as in Anthropic's files."""
    pairs = []
    for where, row in (rows := read_rows(path)):
        sides = []
        for name in ("chosen", "rejected"):
            value = [row[name]] if type(row.get(name)) is dict else row.get(name)
            if type(value) is str and value.startswith("\n\nHuman: ") and "prompt" not in row:
                _, *parts = re.split(r"\n\n(Human|Assistant): ?", value)
                value = [{"role": role, "content": text}
                         for role, text in zip(parts[::2], parts[1::2])]
            sides.append(to_messages(value, where) if value and type(value) is list else
                         [{"content": field(row, where, name)}])
        prompt = sides[0][:-1] if len(sides[0]) > 1 else prompt_of(row, where)
        chosen, rejected = (side[-1]["content"] for side in sides)
        if chosen.strip() and rejected.strip() and chosen != rejected:
            pairs.append((prompt, chosen, rejected))
    return pairs, len(rows) - len(pairs)


def read_problems(path):
    """Data for reinforcement learning: rows with an added "messages". GSM8K's answers are cut down
    to what follows ####."""
    problems = []
    for where, row in read_rows(path):
        if not {"answer", "tests", "instruction_id_list", "answerKey"} & set(row):
            raise ValueError(f"{where}: nothing to verify by: it needs answer, tests or "
                             "instruction_id_list")
        if type(row.get("answer", 0)) not in (int, float):
            field(row, where, "answer")
        if "tests" in row:
            lines = row["tests"] if type(row["tests"]) is list else [row["tests"]]
            if not all(type(line) is str for line in lines) or not any(map(str.strip, lines)):
                raise ValueError(f"{where}: tests must be Python code, or lines of it")
        if "answer" in row:
            row = row | {"answer": str(row["answer"]).split("####")[-1].strip()}
        problems.append(row | {"messages": prompt_of(row, where)})
    return problems


def make_template(name, tokenizer):
    """The chat template of this name (see model.py): chatml, llama3, llama2, plain; raw, which
    adds nothing but the end; or alpaca (Taori et al. 2023). Ends are marked by the tokenizer's
    end-of-text token if it has not what the template uses. Raises ValueError without any."""
    own = {"begin": "", "system": "{content}\n\n", "default_system": ""}
    if name == "raw":
        template = own | {"user": "{content}", "assistant": "{content}"}
    elif name == "alpaca":
        template = own | {
            "default_system": "Below is an instruction that describes a task. Write a response "
                              "that appropriately completes the request.",
            "user": "### Instruction:\n{content}\n\n", "assistant": "### Response:\n{content}"}
    else:
        template = chat_template(name)
    tail = template["assistant"].split("{content}")[1]
    if not any(token in tail for token in tokenizer.special_tokens):
        ends = [t for t, i in tokenizer.special_tokens.items() if i == tokenizer.eot_id]
        if not ends:
            raise ValueError("the tokenizer has no end-of-text token: a response could not end")
        template["assistant"] += ends[0]
    return template


def encode_example(tokenizer, template, prompt, response):
    """Messages, and what the assistant says to them -> (ids, mask), the mask being 1 for the
    response, its end included. Both are tokenized one by one here, unlike in `score`, since that
    is how it will be when the model writes the response."""
    head = encode_chat(tokenizer, template, prompt)
    alone = {"begin": "", "default_system": "",
             "assistant": "{content}" + template["assistant"].split("{content}")[1]}
    tail = encode_chat(tokenizer, alone, [{"role": "assistant", "content": response}], reply=False)
    return head + tail, [0] * len(head) + [1] * len(tail)


def encode_conversation(tokenizer, template, messages):
    """A chat that ends with the assistant's message -> (ids, mask) of all that it says."""
    ids, mask, start = [], [], 0
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            example = encode_example(tokenizer, template, messages[start:i], message["content"])
            ids, mask = ids + example[0], mask + example[1]
            start, template = i + 1, template | {"begin": "", "default_system": ""}
    return ids, mask


def padded(rows, fill=0, device="cpu"):
    """Lists of ids -> (B, T) int64. Shorter ones are filled up on the right, where causal
    attention does not see it."""
    width = max([len(row) for row in rows] + [1])
    rows = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)


def collate(examples, pad_id=0, device="cpu"):
    """(ids, mask) of several texts -> dict of (B, T) tensors: input_ids and labels, ids without
    the last and without the first, and response_mask, True where the label is to be learned."""
    ids = padded([ids for ids, _ in examples], pad_id, device)
    mask = padded([mask for _, mask in examples], 0, device).bool()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def tokenize_prompts_and_responses(prompts, responses, tokenizer):
    """Lists of B strings -> dict of input_ids, labels (int64) and response_mask (bool), (B, T),
    T one less than the longest prompt and response have together; see `collate`. An empty response
    has no True in its row."""
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
    pads = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "eot_id")]
    examples = []
    for prompt, response in zip(prompts, responses, strict=True):
        a, b = encode(prompt), encode(response)
        examples.append((a + b, [0] * len(a) + [1] * len(b)))
    return collate(examples, next((i for i in pads if i is not None), 0))


def pack_sequences(examples, block_size, pad_id=0):
    """Put several texts in one row, so that little is padding.

    examples: list of (ids, mask), as in `collate` -> dict of (N, block_size) tensors: input_ids,
    labels, response_mask, and positions, which start again from 0 with each text (and with each id
    of padding); `separate_documents` keeps texts from seeing each other. "dropped" is the number
    of texts that are too long. The longest come first, each into the first row where it fits
    (first-fit decreasing, at most 11/9 of the least number of rows).

    >>> p = pack_sequences([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], 4)
    >>> p["input_ids"].tolist(), p["labels"].tolist(), p["positions"].tolist()
    ([[5, 6, 8, 0]], [[6, 7, 9, 0]], [[0, 1, 0, 0]])
    """
    rows = []  # each of four lists, of which all but response_mask are named above
    fitting = [e for e in examples if 1 < len(e[0]) <= block_size + 1]
    for ids, mask in sorted(fitting, key=lambda e: -len(e[0])):
        # only the last rows are tried: with many texts the others are full
        row = next((row for row in rows[-200:] if len(row[0]) + len(ids) - 1 <= block_size), None)
        if row is None:
            rows.append(row := ([], [], [], []))
        for part, new in zip(row, (ids[:-1], ids[1:], range(len(ids) - 1), mask[1:])):
            part += new
    filled = [[part + [fill] * (block_size - len(part)) for part, fill in
               zip(row, (pad_id, pad_id, 0, 0))] for row in rows]
    parts = torch.tensor(filled, dtype=torch.int64).view(-1, 4, block_size).unbind(1)
    return {"input_ids": parts[0], "labels": parts[1], "positions": parts[2],
            "response_mask": parts[3].bool(), "dropped": len(examples) - len(fitting)}


@contextlib.contextmanager
def separate_documents(model, positions):
    """Within this context the model reads rows of `pack_sequences`: attention stays inside a text
    (a block-diagonal mask), and positions count from its beginning. positions: (B, T).
    Raises ValueError for kinds of attention that can not be masked so."""
    if others := set(model.kinds) - {"full", "sliding"}:
        raise ValueError(f"{min(others)} attention can not be kept inside of a packed text: use "
                         "--no_packing")
    text = (positions == 0).cumsum(1)
    t = torch.arange(positions.shape[1], device=positions.device)
    mask = (text[:, :, None] == text[:, None]) & (t[:, None] >= t)  # (B, T, T)

    def attend_inside(part):
        near = mask & (t[:, None] - t < part.window) if hasattr(part, "window") else mask

        def attend(q, k, v):
            return F.scaled_dot_product_attention(q, *part.repeat_heads(k, v), near[:, None],
                                                  part.dropout if part.training else 0.0)
        return attend

    parts = [block.attn for block in model.blocks]
    for part in parts:  # an attribute of the object hides the method of its class
        part.attend = attend_inside(part)
    model.embed = lambda ids, at: Transformer.embed(model, ids, positions)
    model.rope = lambda kind, at: Transformer.rope(model, kind, positions)
    try:
        yield
    finally:
        del model.embed, model.rope
        for part in parts:
            del part.attend


# -----------------------------------------------------------------------------
# Log-probabilities, entropy, and means over some tokens only.


def masked_sum(tensor, mask, dim=None, normalize_constant=1.0):
    """Sum of the elements where mask is true, along dim or over all, over normalize_constant."""
    kept = torch.where(mask.bool(), tensor, torch.zeros_like(tensor))  # a product would keep NaN
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def masked_mean(tensor, mask, dim=None):
    """Mean of the elements where mask is true, along dim or over all; 0 where there are none."""
    tensor, mask = torch.broadcast_tensors(tensor, mask.bool())
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(tensor, mask, dim) / count.clamp(min=1)


def entropy(logits):
    """Entropy in nats of the softmax of the last dimension, -sum p log p. (..., V) -> (...)"""
    log_p = torch.log_softmax(upcast(logits), -1)
    # 0 log 0 is 0, not NaN
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0):
    """log p(label_t | input_ids up to t), for every position -> {"log_probs": (B, T)} and, if
    asked for, "token_entropy": (B, T), without gradient. input_ids, labels: (B, T) int64; where
    a label is -100, which elsewhere marks what is not to be learned, log_probs are 0.
    temperature: that of sampling, by which logits were divided."""
    logits = model(input_ids)
    logits = upcast(getattr(logits, "logits", logits)) / temperature
    left_out = labels == -100
    # logit - log Z: no (B, T, V) tensor of log-probabilities is needed
    picked = logits.gather(-1, labels.masked_fill(left_out, 0)[..., None])[..., 0]
    out = {"log_probs": (picked - torch.logsumexp(logits, -1)).masked_fill(left_out, 0.0)}
    if return_token_entropy:
        with torch.no_grad():
            out["token_entropy"] = entropy(logits)
    return out


# -----------------------------------------------------------------------------
# Losses. Each is a scalar to be minimised. Under gradient accumulation the number that a loss is
# divided by must be that of the whole batch, not of its part, or the tokens of a part with few
# would weigh more: `normalizer`, with which the losses of the parts add up to that of the whole.


def sft_loss(log_probs, response_mask, normalizer=None):
    """Mean negative log-likelihood of the responses' tokens: -sum m log p / sum m (Ouyang et al.
    2022, step 1). log_probs, response_mask: (B, T). normalizer: tokens of all parts of the batch.
    With no token at all the loss is 0."""
    count = response_mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(log_probs, response_mask, normalize_constant=count)


def reward_model_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), mean over pairs: the negative log-likelihood of the
    choices, if they follow Bradley & Terry (1952; Ouyang et al. 2022). (B,), (B,) -> scalar"""
    losses = -F.logsigmoid(chosen - rejected)
    return losses.sum() / max(1, losses.numel())


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """-log sigmoid(beta [(log pi_c - log ref_c) - (log pi_r - log ref_r)]), mean over pairs: the
    loss above, of the reward beta log(pi / ref), whose best policy is pi itself (Rafailov et al.
    2023). Each argument: (B,), log-probs of whole responses. ln 2 where pi is the reference."""
    return reward_model_loss(beta * (policy_chosen - reference_chosen),
                             beta * (policy_rejected - reference_rejected))


def kl_estimate(log_probs, reference_log_probs):
    """KL(pi || ref) by one sample from pi: r - log r - 1 with r = ref / pi. Not biased, and never
    negative (Schulman 2020, k3). Same shapes -> same shape."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def group_advantages(rewards, group_size, eps=1e-6, normalize_std=True):
    """(r - mean) / (std + eps) within each group of responses to one prompt (GRPO: Shao et al.
    2024), or r - mean without normalize_std (Dr. GRPO: Liu et al. 2025). rewards: (B,), responses
    to one prompt one after the other -> (B,). std is that of a sample, over n - 1. Groups of equal
    rewards get 0. Raises ValueError if B is no multiple of group_size."""
    rewards = torch.as_tensor(rewards) * 1.0  # of integers, too
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards are no groups of {group_size}")
    groups = rewards.reshape(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    same = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # a mean can be rounded
    return advantages.masked_fill(same, 0.0).reshape(rewards.shape)


def policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None,
                         old_log_probs=None, cliprange=None):
    """The loss of each token, whose gradient is an estimate of that of -E[reward].

    no_baseline:              -reward log pi (REINFORCE: Williams 1992)
    reinforce_with_baseline:  -A log pi: the same in expectation, with less variance
    grpo_clip:                -min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old: steps that
                              would leave the trust region earn nothing more (PPO: Schulman et al.
                              2017; asymmetric: DAPO, Yu et al. 2025)
    grpo_no_clip:             -r A

    policy_log_probs, old_log_probs: (B, T); raw_rewards, advantages: (B,), (B, 1) or (B, T);
    cliprange: one number, or (low, high).
    -> ((B, T), {"clipped": (B, T) of bool, where the clipped term was the smaller}) Raises
    ValueError for another loss_type, or if what it needs is missing.
    """
    given = {"raw_rewards": raw_rewards, "advantages": advantages,
             "old_log_probs": old_log_probs, "cliprange": cliprange}
    needs = {"no_baseline": ["raw_rewards"], "reinforce_with_baseline": ["advantages"],
             "grpo_clip": ["advantages", "old_log_probs", "cliprange"],
             "grpo_no_clip": ["advantages", "old_log_probs"]}
    if loss_type not in needs:
        raise ValueError(f"loss_type must be one of {', '.join(needs)}, not {loss_type!r}")
    if missing := [name for name in needs[loss_type] if given[name] is None]:
        raise ValueError(f"{loss_type} needs {', '.join(missing)}")
    weights = torch.as_tensor(raw_rewards if loss_type == "no_baseline" else advantages,
                              device=policy_log_probs.device)
    weights = weights[:, None] if weights.ndim == 1 else weights
    if not loss_type.startswith("grpo"):
        return -weights * policy_log_probs, {}
    ratio = torch.exp(policy_log_probs - old_log_probs)
    if loss_type == "grpo_no_clip":
        return -ratio * weights, {}
    low, high = cliprange if isinstance(cliprange, (tuple, list)) else (cliprange, cliprange)
    clipped = ratio.clamp(1 - low, 1 + high) * weights
    return -torch.minimum(ratio * weights, clipped), {"clipped": clipped < ratio * weights}


def grpo_normalizer(response_mask, loss_type="grpo", max_length=None):
    """What `grpo_loss` divides by, of the whole batch. response_mask: (B, T)."""
    if loss_type == "dapo":
        return response_mask.sum().clamp(min=1)
    longest = max_length or response_mask.shape[1]
    return max(1, len(response_mask) * (longest if loss_type == "dr_grpo" else 1))


def grpo_loss(log_probs, old_log_probs, advantages, response_mask, reference_log_probs=None,
              beta=0.0, clip_low=0.2, clip_high=None, loss_type="grpo", max_length=None,
              normalizer=None, clip=True):
    """Group relative policy optimization (Shao et al. 2024). With l the clipped loss of each token
    (`policy_gradient_loss`) plus beta times `kl_estimate`, and m the mask:

    grpo     1/B sum_i (sum_t m l / sum_t m): each response counts the same
    dr_grpo  1/(B max_length) sum m l: no longer reward for long wrong answers (Liu et al. 2025);
             it goes with advantages that are not divided by their standard deviation
    dapo     sum m l / sum m: each token counts the same (Yu et al. 2025); it goes with
             clip_high=0.28

    log_probs, old_log_probs, reference_log_probs, response_mask: (B, T); advantages: (B,).
    clip=False: -r A without any clipping. normalizer: that of `grpo_normalizer` for the whole
    batch, if this is a part of it. -> scalar. Raises ValueError for another loss_type, or beta
    without reference_log_probs.
    """
    if loss_type not in ("grpo", "dr_grpo", "dapo"):
        raise ValueError(f"loss_type must be grpo, dr_grpo or dapo, not {loss_type!r}")
    if beta and reference_log_probs is None:
        raise ValueError("beta needs reference_log_probs")
    mask = response_mask.bool()
    # tokens that do not count must not overflow, either
    new, old = (x.masked_fill(~mask, 0.0) for x in (log_probs, old_log_probs))
    losses, _ = policy_gradient_loss(
        new, "grpo_clip" if clip else "grpo_no_clip", advantages=advantages, old_log_probs=old,
        cliprange=(clip_low, clip_low if clip_high is None else clip_high))
    if beta:
        losses = losses + beta * kl_estimate(new, reference_log_probs.masked_fill(~mask, 0.0))
    if normalizer is None:
        normalizer = grpo_normalizer(mask, loss_type, max_length)
    total = masked_mean(losses, mask, 1).sum() if loss_type == "grpo" else masked_sum(losses, mask)
    return total / normalizer


def gae(rewards, values, gamma=1.0, lam=0.95, mask=None):
    """Generalised advantage estimation (Schulman et al. 2015), from the last token to the first:

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

    rewards, values: (B, T); mask: (B, T), the tokens of the response, after which nothing comes.
    -> advantages, returns A + V, both (B, T) and 0 outside of the mask.
    """
    mask = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    rewards, values = rewards * mask, values.masked_fill(mask == 0, 0.0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, (advantages + values) * mask


def ppo_loss(log_probs, old_log_probs, advantages, response_mask, values=None, old_values=None,
             returns=None, clip=0.2, value_clip=0.2, value_weight=0.1, normalizer=None):
    """Proximal policy optimization (Schulman et al. 2017; Stiennon et al. 2020), mean over tokens:

    -min(r A, clip(r, 1 - clip, 1 + clip) A), and with values, those of the value function,
    + value_weight/2 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)

    All but the numbers: (B, T). normalizer: tokens of all parts of the batch. -> scalar
    """
    mask = response_mask.bool()
    new, old = (x.masked_fill(~mask, 0.0) for x in (log_probs, old_log_probs))
    losses, _ = policy_gradient_loss(new, "grpo_clip", advantages=advantages, old_log_probs=old,
                                     cliprange=clip)
    if values is not None:
        if old_values is None or returns is None:
            raise ValueError("values need old_values and returns")
        near = old_values + (values - old_values).clamp(-value_clip, value_clip)
        worse = torch.maximum((values - returns).square(), (near - returns).square())
        losses = losses + value_weight / 2 * worse
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return masked_sum(losses, mask, normalize_constant=count)


# -----------------------------------------------------------------------------
# Verifiers. Answers come from a model that is rewarded for being judged right: each verifier reads
# them as a stranger's text, within bounds, and what it can not read is wrong.

MAX_BITS = 4096  # of an exact number; 9^9^9^9 would fill any memory
NUMBER = r"-?\$?(?:\d[\d,]*\.?\d*|\.\d+)(?:\s?/\s?\d+)?(?:\\?%)?"


def last_boxed(text):
    """What is inside the last \\boxed{...}, its braces paired; None without one that is closed."""
    opened, best = [], (-1, None)
    for m in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\}", text):
        if m[0] != "}":
            opened.append((m.end(), m[1]))
        elif opened:
            start, boxed = opened.pop()
            if boxed and start > best[0]:
                best = start, text[start : m.start()]
    return best[1]


def extract_answer(text):
    """The answer that a response gives: what is in its last \\boxed{}, or <answer> tags, or after
    its last ####, or "answer is"; else its last number; else None.

    >>> extract_answer("3 + 4 = 7, so the answer is $7$."), extract_answer("I had 5 and ate 2")
    ('$7$', '2')
    """
    text = text[-20_000:]
    if (boxed := last_boxed(text)) is not None:
        return boxed.strip()
    for pattern in (r"(?s:<answer>((?:(?!<answer>).)*?)</answer>)", r"####([^\n]*)",
                    r"(?i:answer\s+is:?|answer:)[ *]*([^\n]+)"):
        if found := re.findall(pattern, text):
            # up to the end of the sentence
            return re.sub(r"(?<=\S)\.(?:\s.*)?$", "", found[-1].strip(), flags=re.S).strip("* ")
    found = re.findall(NUMBER, text)
    return found[-1].rstrip(",.") if found else None


def normalize_answer(text):
    """Take off what does not change a mathematical answer: $, \\left, spaces, units, ..."""
    text = text.strip().rstrip(".").replace("\\!", "").replace("−", "-")
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:left|right|,|;|:|\$| |quad)|\^\s*\{?\\circ\}?|°|\$|£|€", " ", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("{,}", ",")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # thousands
    text = text.split("=")[-1]  # x = 5, 3 + 4 = 7
    text = re.sub(r"(?<=[\d.}%)])\s*[a-zA-Z]{2,}(?:[ /]+[a-zA-Z]+)*\s*$", "", text)  # 5 apples
    return re.sub(r"\s+", " ", text).strip()


def bounded(x):
    """x, if it is a Fraction of at most MAX_BITS or a finite float; else ValueError."""
    if isinstance(x, Fraction) and max(map(int.bit_length, x.as_integer_ratio())) <= MAX_BITS or \
            isinstance(x, float) and math.isfinite(x):
        return x
    raise ValueError("too large, or no real number")


def power(base, exponent):
    """base ** exponent. Sizes are looked at before anything is computed."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if max(map(int.bit_length, base.as_integer_ratio())) * abs(exponent) > MAX_BITS:
            raise ValueError("too large")
        return base ** int(exponent)
    return bounded(float(base) ** float(exponent))


class MathParser:
    """The value of an expression in plain or LaTeX notation, by precedence climbing: a Fraction
    where it is exact, else a float. Single letters stand for arbitrary fixed numbers, so that
    2x + 3 and 3 + 2x come out equal. Raises ValueError, ArithmeticError or RecursionError for all
    else, and for what is too large."""

    TOKEN = re.compile(r"\d+\.?\d*|\.\d+|\\[a-zA-Z]+|\\%|\*\*|[-+*/^(){}\[\]%√π]|[a-zA-Z]")
    CLOSING = {"{": "}", "(": ")", "[": "]"}
    BINDING = {"+": 1, "-": 1, "*": 2, "\\times": 2, "\\cdot": 2, "/": 2, "\\div": 2, "^": 4,
               "**": 4, "": 0, "}": 0, ")": 0, "]": 0, "%": 0, "\\%": 0}

    def __init__(self, text):
        tokens = self.TOKEN.findall(text)
        if len(text) > 1000 or "".join(tokens) != "".join(text.split()) or \
                re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2}", text):  # words
            raise ValueError("not an expression")
        self.tokens = ["", *reversed(tokens)]  # the last is the next, the first the end

    def take(self, *wanted):
        """The next token, if it is one of these, else ''."""
        return self.tokens.pop() if self.tokens[-1] in wanted else ""

    def value(self, least=0):
        """What begins here, as far as operators bind more tightly than `least`."""
        if sign := self.take("+", "-"):
            x = self.value(3) if sign == "+" else -self.value(3)
        else:
            x = self.atom()
        while (binding := self.BINDING.get(op := self.tokens[-1], 2)) > least:
            if self.take("^", "**"):  # from right to left
                x = power(x, self.group() if self.tokens[-1] == "{" else self.value(3))
                continue
            self.take(*self.BINDING)
            y = self.value(binding)
            if op in ("+", "-"):
                x = x + y if op == "+" else x - y
            elif op in ("/", "\\div"):
                x = x / y
            elif op == "\\frac" and isinstance(x, Fraction) and x.denominator == 1:
                x = x + (y if x >= 0 else -y)  # 1\frac12
            else:  # also without a sign, as in 2x or 3\sqrt{2}
                x = x * y
            bounded(x)
        return x

    def atom(self):
        if self.tokens[-1] in self.CLOSING:
            x = self.group()
        elif self.take("\\frac"):
            x = self.argument() / self.argument()
        elif self.take("\\sqrt", "√"):
            degree = self.group() if self.tokens[-1] == "[" else Fraction(2)
            x = power(self.argument(), 1 / degree)
        elif self.take("\\pi", "π"):
            x = math.pi
        elif self.tokens[-1].isalpha():
            x = Fraction(ord(self.tokens.pop()) * 7919 % 1009 + 2, 97)
        else:
            x = Fraction(self.tokens.pop())  # raises ValueError for what is no number
        return bounded(x / 100 if self.take("%", "\\%") else x)

    def group(self):
        closing, x = self.CLOSING[self.tokens.pop()], self.value()
        if not self.take(closing):
            raise ValueError(f"{closing} is missing")
        return x

    def argument(self):
        """Of \\frac or \\sqrt: a group, or one digit or letter, as in \\frac12."""
        if self.tokens[-1] == "{":
            return self.group()
        if self.tokens[-1][:1].isdigit() and len(self.tokens[-1]) > 1:
            token = self.tokens.pop()
            self.tokens += [token[1:], token[0]]
        return self.atom()


def math_value(text):
    """The value of a normalized answer, or None."""
    try:
        parser = MathParser(re.sub(r"(\d)\s*[eE]([+-]?\d+)\b", r"\1*10^{\2}", text))
        x = parser.value()
        return x if parser.tokens == [""] else None
    except (ValueError, ArithmeticError, RecursionError):
        return None


def split_list(text):
    """'(1, (2, 3))' -> ('(', ')', ['1', '(2, 3)']); without brackets these are ''."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    first = last = ""
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}":
        first, text, last = text[0], text[1:-1], text[-1]
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return first, last, [part.strip() for part in parts]


def same_answer(a, b, depth=0):
    """Whether two normalized answers are equal: as text, as numbers, or element by element."""
    if a.replace(" ", "") == b.replace(" ", ""):
        return True
    x, y = math_value(a), math_value(b)
    if x is not None and y is not None:
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        with contextlib.suppress(OverflowError):  # a Fraction too large for a float
            return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
        return False
    (*brackets, left), (*others, right) = split_list(a), split_list(b)
    if brackets != others or not 1 < len(left) == len(right) <= 50 or depth > 5:
        return False
    if brackets[0] != "{":
        return all(same_answer(p, q, depth + 1) for p, q in zip(left, right))
    for p in left:  # a set: in any order
        match = next((q for q in right if same_answer(p, q, depth + 1)), None)
        if match is None:
            return False
        right.remove(match)
    return True


def grade_math(answer, truth):
    """Whether a response, or an answer alone, gives the true answer, both strings: 1/2, 0.5, 50%,
    \\frac{1}{2} and \\boxed{\\tfrac12} are equal, and so are 1,234 and 1234, (1, 2) and (1,2),
    2x+3 and 3+2x. Nothing is evaluated but by `MathParser`, within its bounds."""
    if not isinstance(answer, str) or not isinstance(truth, str):
        return False
    if answer.strip() == truth.strip() != "":
        return True
    if answer.isdecimal() and truth.isdecimal() and len(answer + truth) < 1000:  # fast
        return int(answer) == int(truth)
    if "####" in truth or "\\boxed" in truth:
        truth = extract_answer(truth) or ""
    candidates = [extract_answer(answer) or ""]
    if len(answer) <= 200 and not re.search(r"\n|\\boxed|####|(?i:answer)", answer):
        candidates.insert(0, answer)
    wanted = normalize_answer(truth)
    for candidate in candidates:
        if not candidate or not wanted or len(candidate) > 1000:
            continue
        found = normalize_answer(candidate)
        if same_answer(found, wanted):
            return True
        if ("%" in found) != ("%" in wanted) and \
                same_answer(re.sub(r"\\?%", "", found), re.sub(r"\\?%", "", wanted)):
            return True  # "how many percent": 20 and 20%
        numbers = re.findall(NUMBER, found)
        if len(numbers) == 1 and math_value(found) is None and math_value(wanted) is not None \
                and same_answer(normalize_answer(numbers[0]), wanted):
            return True  # words around one number
    return False


LETTERS = "ABCDEFGHIJ"


def find_choice(response, n=4):
    """The letter, of the first n, that a response to a multiple-choice question chooses: "The
    answer is (B)", "B", "B. because", or the only capital letter that stands alone; else None."""
    letters = LETTERS[:n]
    for pattern in (rf"(?i:answer|choice|option)(?i:\s+is)?:?[\s*(\"$\\boxed{{]*([{letters}])\b",
                    rf"^[\s*(]*([{letters}])(?=[.):,*\s]*$|[.):,*])"):
        if found := re.findall(pattern, response):
            return found[-1]
    found = set(re.findall(rf"\b([{letters}])\b(?!')", response))
    return found.pop() if len(found) == 1 else None


def grade_choice(response, label, n=4):
    """Whether `find_choice` finds the letter `label`."""
    return find_choice(response, n) == label


def is_json(text):
    """Whether a text is JSON, a fence around it aside."""
    try:
        json.loads(re.sub(r"^```(?:json|JSON)?|```$", "", text.strip()).strip())
        return True
    except (ValueError, RecursionError):
        return False


def blocks(text, separator):
    """Parts of a text between separators, without the empty ones at its ends."""
    parts = [part.strip() for part in text.strip().split(separator)]
    return parts[not parts[0] : len(parts) - (not parts[-1])]


def compare(count, k, number, relation="relation"):
    """IFEval's "at least" and "less than", by the arguments of these names."""
    return count >= k[number] if k[relation] == "at least" else count < k[number]


# What an instruction of IFEval (Zhou et al. 2023) demands, by its name: a function of the response
# t and of its arguments k. Words and sentences are found by regular expressions, where the
# original uses a tokenizer; language:response_language, which needs a classifier, is not here.
CONSTRAINTS = {
    "keywords:existence": lambda t, k: all(w.lower() in t.lower() for w in k["keywords"]),
    "keywords:frequency": lambda t, k: compare(
        t.lower().count(k["keyword"].lower()), k, "frequency"),
    "keywords:forbidden_words": lambda t, k: not any(
        re.search(rf"\b{re.escape(w)}\b", t, re.I) for w in k["forbidden_words"]),
    "keywords:letter_frequency": lambda t, k: compare(
        t.lower().count(k["letter"].lower()), k, "let_frequency", "let_relation"),
    "length_constraints:number_sentences": lambda t, k: compare(
        len(re.findall(r"[^.!?\s][^.!?]*(?:[.!?]+|$)", t)), k, "num_sentences"),
    "length_constraints:number_words": lambda t, k: compare(
        len(re.findall(r"\w+", t)), k, "num_words"),
    "length_constraints:number_paragraphs": lambda t, k: (
        len(parts := blocks(t, "***")) == k["num_paragraphs"] and all(parts)),
    "length_constraints:nth_paragraph_first_word": lambda t, k: (
        len(parts := [p.strip() for p in t.split("\n\n") if p.strip()]) == k["num_paragraphs"]
        and 1 <= k["nth_paragraph"] <= len(parts) and [k["first_word"].lower()] ==
        re.findall(r"[^\s'\".,!?]+", parts[k["nth_paragraph"] - 1].lower())[:1]),
    "detectable_content:number_placeholders": lambda t, k: (
        len(re.findall(r"\[[^\]]*\]", t)) >= k["num_placeholders"]),
    "detectable_content:postscript": lambda t, k: bool(re.search(
        {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(
            k["postscript_marker"], re.escape(k["postscript_marker"].lower())), t.lower())),
    "detectable_format:number_bullet_lists": lambda t, k: (
        len(re.findall(r"^\s*(?:\*[^*]|-)", t, re.M)) == k["num_bullets"]),
    "detectable_format:constrained_response": lambda t, k: bool(
        re.search(r"My answer is (yes|no|maybe)\.", t)),
    "detectable_format:number_highlighted_sections": lambda t, k: k["num_highlights"] <= len(
        re.findall(r"\*\*[^\n*]*[^\n*\s][^\n*]*\*\*|\*[^\n*]*[^\n*\s][^\n*]*\*", t)),
    "detectable_format:multiple_sections": lambda t, k: k["num_sections"] <= len(
        re.findall(rf"{re.escape(k['section_spliter'])}\s?\d+", t)),
    "detectable_format:json_format": lambda t, k: is_json(t),
    "detectable_format:title": lambda t, k: bool(re.search(r"<<[^\n>]*[^\n>\s][^\n>]*>>", t)),
    "combination:two_responses": lambda t, k: (
        len(parts := blocks(t, "******")) == 2 and all(parts) and parts[0] != parts[1]),
    "combination:repeat_prompt": lambda t, k: t.strip().lower().startswith(
        k["prompt_to_repeat"].strip().lower()),
    "startend:end_checker": lambda t, k: t.strip().strip('"').lower().endswith(
        k["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, k: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda t, k: compare(
        sum(map(str.isupper, re.findall(r"[\w'-]+", t))), k, "capital_frequency",
        "capital_relation"),
    "change_case:english_capital": lambda t, k: t.isupper(),
    "change_case:english_lowercase": lambda t, k: t.islower(),
    "punctuation:no_comma": lambda t, k: "," not in t,
}


def check_constraint(name, arguments, response, loose=False):
    """Whether a response follows an instruction of CONSTRAINTS. loose: whether it would without
    its first or last line, or without asterisks. An empty response follows none.
    Raises ValueError for an unknown name or arguments that do not fit it."""
    if name not in CONSTRAINTS:
        raise ValueError(f"the instruction {name!r} is not known")
    versions = [response]
    if loose:
        lines = response.split("\n")
        versions += ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
        versions += [version.replace("*", "") for version in versions]
    try:
        return any(bool(t.strip()) and CONSTRAINTS[name](t, arguments) for t in versions)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the arguments of {name} do not fit: {type(error).__name__} {error}") \
            from None


# Model-written code is never run in this process. It is run by two child processes, both without
# files, network and further processes. One holds the code to be judged; the other runs the tests,
# and has to ask the first for every call, which answers in plain values. So the code never sees a
# test, an expected value or the verdict: frames, patched builtins, objects that claim to be equal
# to everything, os._exit(0) and printing are no use. What this source does, in turn: load what may
# be imported, give up all rights, import the code or the tests as a module, and serve.
SANDBOX = r'''
import sys, os, json, resource, io
import abc, array, bisect, cmath, collections, collections.abc, contextlib, copy, dataclasses
import datetime, decimal, enum, fractions, functools, heapq, itertools, math, numbers, operator
import random, re, statistics, string, textwrap, time, types, typing, unicodedata, builtins
import _strptime, calendar, hashlib, keyword, pprint, queue, secrets, struct, traceback
import importlib.abc, importlib.util

modules = {name: module for name, module in sys.modules.items() if "." not in name}
containers = {kind.__name__: kind
              for kind in (list, tuple, set, frozenset, dict, collections.deque)}


def confine(descriptors):
    if os.getuid() == 0:  # root is not bound by the number of processes
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        except OSError:
            pass
    memory, seconds = map(int, sys.argv[2:])
    for name, n in (("CORE", 0), ("FSIZE", 1 << 16), ("NPROC", 0), ("AS", memory),
                    ("CPU", seconds), ("NOFILE", descriptors)):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (n, n))
        except (OSError, ValueError, AttributeError):
            pass  # macOS does not limit memory
    def hook(event, args):
        # constants only: nothing that the code could change
        if event not in ("compile", "exec", "builtins.id", "sys._getframe", "time.sleep",
                         "sys._getframemodulename", "object.__getattr__", "object.__setattr__",
                         "object.__delattr__", "builtins.input", "array.__new__", "sys.excepthook",
                         "sys.unraisablehook", "sys._current_frames", "code.__new__") or \
                event == "object.__setattr__" and args[1] == "__code__":
            raise PermissionError(event + " is not allowed here")
    sys.addaudithook(hook)


class Given(importlib.abc.InspectLoader):  # a module from source that is in memory
    def __init__(self, source):
        self.source = source

    def get_source(self, name):
        return self.source


def load(name, source, **names):
    """Import source as a module of this name, which has these names from the start."""
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, Given(source)))
    vars(module).update(names)
    sys.modules[name] = module
    module.__loader__.exec_module(module)
    return module


def encode(x, number_of, depth=0):  # for JSON: [name of the kind, value]
    if depth > 100:
        raise ValueError("nested too deeply")
    if x is None or type(x) in (bool, int, str):
        return ["plain", x]
    if type(x) in (float, complex):
        return [type(x).__name__, repr(x)]
    if type(x) in (bytes, bytearray):
        return ["bytes", x.hex()]
    for name, kind in containers.items():
        if isinstance(x, kind):
            return [name, [encode(y, number_of, depth + 1)
                           for y in (x.items() if kind is dict else x)]]
    return ["handle", number_of(x)]


def decode(x, handle):
    kind, value = x
    if kind in containers:
        return containers[kind]([decode(y, handle) for y in value])
    return {"plain": lambda x: x, "float": float, "complex": complex, "bytes": bytes.fromhex,
            "handle": handle}[kind](value)


def send(file, *message):
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def solution(requests, answers):
    """Run the code, then do what it is asked for: operation, arguments, keyword arguments."""
    sys.stdin, sys.stdout = io.StringIO(""), sys.stderr
    objects = []
    operations = {"get": getattr, "list": list, "eq": operator.eq,
                  "call": lambda function, *args, **kwargs: function(*args, **kwargs)}

    def number_of(x):
        objects.append(x)
        return len(objects) - 1

    [source] = json.loads(requests.readline())
    confine(3)
    try:
        names = {name: x for name, x in vars(load("solution", source)).items() if
                 type(name) is str and name[:2] != "__" and not isinstance(x, type(sys))}
        send(answers, "ok", encode(names, number_of))
        for line in requests:
            try:
                operation, *request = json.loads(line)
                args, kwargs = (decode(x, objects.__getitem__) for x in request)
                result = operations[operation](*args, **kwargs)
                send(answers, "ok", encode(result, number_of), encode(args[1:], number_of))
            except Exception as error:
                send(answers, type(error).__name__, str(error)[:300])
    except BaseException as error:
        send(answers, type(error).__name__, str(error)[:300])


def tests(program, source, ask, told):
    """Run the tests -> why they do not pass, or None. They see the names that the code defines;
    functions and objects of the code are Handles."""
    most = 1 << 24

    def number_of(x):
        if type(x) is not Handle:
            raise TypeError("only plain values can be given to the code")
        return x._number

    def answer():
        line = told.readline(most)
        if not line.endswith(b"\n"):
            raise SystemExit("the code ended its process" if len(line) < most else "too much")
        status, *rest = json.loads(line)
        if status == "ok":
            return [decode(x, Handle) for x in rest]
        kind = getattr(builtins, status, None) if type(status) is str else None
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or \
                issubclass(kind, (UnicodeError, AssertionError, StopIteration)):
            kind = RuntimeError
        raise kind(str(rest[0]) if rest else "")

    def request(operation, *args, **kwargs):
        send(ask, operation, encode(args, number_of), encode(kwargs, number_of))
        return answer()

    class Handle:  # of a function or object over there
        def __init__(self, number):
            self._number = int(number)

        def __getattr__(self, name):
            return request("get", self, name)[0]

        def __call__(self, *args, **kwargs):
            result, after = request("call", self, *args, **kwargs)
            for old, new in zip(args, after):  # what the call did to its arguments
                if isinstance(old, (list, dict, set, collections.deque)):
                    old.clear()
                    getattr(old, "extend" if hasattr(old, "extend") else "update")(new)
            return result

        def __iter__(self):
            return iter(request("list", self)[0])

        def __len__(self):
            try:
                return self.__getattr__("__len__")()
            except AttributeError:  # the kind that list() expects
                raise TypeError("it has no length") from None

        def __getitem__(self, key):
            return self.__getattr__("__getitem__")(key)

        def __bool__(self):
            return True

        def __eq__(self, other):  # never equal to a value from here, whatever it claims
            return type(other) is Handle and request("eq", self, other)[0] is True

        __hash__ = object.__hash__

    confine(max(ask.fileno(), told.fileno()) + 1)
    try:
        send(ask, source)
        load("tests", program, **modules, **{
            name: value for name, value in answer()[0].items()
            if not hasattr(builtins, name) and name not in modules and name[:2] != "__"})
    except BaseException as problem:
        return (type(problem).__name__ + ": " + str(problem))[:300]


sys.setrecursionlimit(3000)
if sys.argv[1] == "solution":
    solution(os.fdopen(0, "rb"), os.fdopen(1, "wb"))
else:
    program, source, ask, told = json.loads(sys.stdin.read())
    verdict, sys.stdout = sys.stdout, open(os.devnull, "w")
    error = tests(program, source, os.fdopen(ask, "wb"), os.fdopen(told, "rb"))
    verdict.write(json.dumps([error is None, error or ""]))
    verdict.flush()
os._exit(0)
'''


class Verdict(NamedTuple):
    """Of `run_code`; true where the tests passed. error: why not ("timeout", or the exception)."""

    passed: bool
    error: str

    def __bool__(self):
        return self.passed


def run_code(code, tests, timeout=5.0, memory_mb=512):
    """Run Python code and then tests of it -> `Verdict`.

    code: source that defines functions, of a stranger. tests: source, or a list of lines such as
    `assert f(1) == 2`. Both get `timeout` seconds together, memory_mb megabytes each, a part of
    the standard library, no files, no network, no processes (see SANDBOX). Tests hand plain values
    to the code (numbers, strings, lists, ...) and get such, or objects with methods to call.
    Raises OSError where there are no such limits (Windows).
    """
    if os.name != "posix":
        raise OSError("code can only be run where the operating system limits processes: Linux "
                      "or macOS")
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    started = []

    def start(role, **more):
        command = [sys.executable, "-I", "-S", "-c", SANDBOX, role, str(memory_mb << 20),
                   str(math.ceil(timeout) + 1)]
        started.append(subprocess.Popen(command, cwd=folder, env={}, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, **more))
        return started[-1]

    with tempfile.TemporaryDirectory() as folder:
        try:
            solution = start("solution")
            pipes = solution.stdin.fileno(), solution.stdout.fileno()
            tester = start("tests", pass_fds=pipes)
            solution.stdin.close()  # the other child has them now
            solution.stdout.close()
            job = json.dumps([tests, code, *pipes]).encode()
            passed, error = json.loads(tester.communicate(job, timeout)[0])
        except subprocess.TimeoutExpired:
            passed, error = False, "timeout"
        except ValueError:
            passed, error = False, "the tests did not come to an end"
        finally:
            for process in started:
                with contextlib.suppress(OSError), process:  # which closes its pipes, and waits
                    os.killpg(process.pid, signal.SIGKILL)
    return Verdict(passed is True, error)


def extract_code(response):
    """The last fenced block of a response, or all of it."""
    fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.S)
    return fenced[-1] if fenced else response


def verify(problem, response):
    """The reward, 0 to 1, of a response to a row of `read_problems`: its tests, its instructions
    (the share that is followed), its choices, or its answer. Never raises for what a response
    says."""
    if "tests" in problem:
        return float(run_code(extract_code(response), problem["tests"]).passed)
    if "instruction_id_list" in problem:
        return statistics.fmean(follows(problem, response) or [0.0])
    if "answerKey" in problem:
        return float(grade_choice(response, problem["answerKey"]))
    return float(grade_math(response, problem["answer"]))


def follows(problem, response, loose=False):
    """Which of the instructions of a row of IFEval a response follows: list of bool."""
    return [check_constraint(name, arguments or {}, response, loose) for name, arguments in
            zip(problem["instruction_id_list"], problem["kwargs"], strict=True)]


# A learned verifier: a Transformer that says one number at each position, in place of logits. Read
# at the last token it is a reward model, read at all tokens it is PPO's value function.


class ScalarModel(nn.Module):
    """body: a Transformer; head: (1, C), 0 at first, so that all rewards begin equal."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Linear(body.config.n_embd, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.to(body.embedding.weight.device)

    def forward(self, input_ids):
        """(B, T) -> (B, T)"""
        return upcast(self.head(upcast(self.body(input_ids, hidden=True))))[..., 0]

    def score(self, ids, device):
        """Rewards of whole texts, a list of B lists of ids -> (B,)"""
        last = torch.tensor([[len(row) - 1] for row in ids], device=device)
        return self(padded(ids, device=device)).gather(1, last)[:, 0]


def load_reward_model(path, device):
    """A checkpoint of `python align.py reward` -> ScalarModel. Raises ValueError for another."""
    body, checkpoint = load_checkpoint(path, device)
    weight = (checkpoint.get("args") or {}).get("reward_head")
    if not torch.is_tensor(weight) or weight.shape != (1, body.config.n_embd):
        raise ValueError(f"{path} is no reward model: python align.py reward makes one")
    model = ScalarModel(body)
    model.head.weight.data.copy_(weight)
    return model.eval()


JUDGE = """Question: {question}

Answer A: {a}

Answer B: {b}

Which answer is better? Reply with A or B only."""


@torch.no_grad()
def judge_pair(model, tokenizer, template, question, a, b):
    """A checkpoint as judge of two answers (Zheng et al. 2023): which of the letters A and B is
    likelier to follow, asked in both orders, since models favour a place. -> 1 if a is preferred
    both times, -1 if b is, 0 if the verdict depends on the order."""
    votes = []
    for first, second in ((a, b), (b, a)):
        text = JUDGE.format(question=question, a=first, b=second)
        ids = encode_chat(tokenizer, template, [{"role": "user", "content": text}])
        if len(ids) > model.config.block_size:
            return 0
        letters = [tokenizer.encode_ordinary(letter)[0] for letter in "AB"]
        ids = torch.tensor([ids], device=model.embedding.weight.device)
        logits = model(ids, last=1)[0, 0, letters]
        votes.append((logits[0] > logits[1]).item())
    return votes[0] - votes[1]


# -----------------------------------------------------------------------------
# Synthetic data: problems that a program makes, and so can solve.

WORD_PROBLEMS = (  # (text, steps): numbers in braces are drawn, _ is the result of the last step
    ("{n} has {a} apples and buys {b} more. How many apples does {n} have?", ("{a}+{b}",)),
    ("{n} had {c} stickers and gave {b} to a friend. How many stickers are left?", ("{c}-{b}",)),
    ("A box holds {a} pencils, and {n} has {d} boxes. How many pencils are there?", ("{a}*{d}",)),
    ("{n} buys {d} books at {a} dollars each and pays with {c}00 dollars. How many dollars does "
     "{n} get back?", ("{d}*{a}", "{c}00-_")),
    ("{n} reads {a} pages on Monday and {b} on Tuesday; the book has {c}00 pages. How many pages "
     "are left?", ("{a}+{b}", "{c}00-_")),
    ("A farm has {d} fields with {a} rows each, and each row gives {b} pumpkins. {n} sells {e} "
     "of them. How many pumpkins are left?", ("{d}*{a}", "_*{b}", "_-{e}")),
)


def make_problem(kind, level, rng):
    """A problem with its verified solution: {"prompt", "response", "answer", "level"}.

    addition: a+b= with numbers of up to `level` digits, answered without a word
    arithmetic: an expression of `level` operations + - *, worked out one by one
    word: a story of min(level, 3) calculations
    rng: random.Random. The last line of a response is "#### answer", as in GSM8K, but for sums.
    """
    lines, value = [], ""
    if kind == "addition":
        a, b = rng.randrange(10**level), rng.randrange(10**level)
        prompt, value = f"{a}+{b}=", a + b
    elif kind == "arithmetic":
        value = rng.randrange(1, 20)
        text = str(value)
        for i in range(level):
            step = f"{rng.choice('+-*')} {rng.randrange(2, 10)}"
            text = f"({text}) {step}" if i else f"{text} {step}"
            before, value = value, math_value(f"{value} {step}")
            lines.append(f"{before} {step} = {value}")
        prompt = f"Calculate {text}."
    else:
        text, steps = rng.choice([p for p in WORD_PROBLEMS if len(p[1]) == min(level, 3)])
        drawn = {"n": rng.choice(("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima")),
                 "a": rng.randrange(5, 20), "b": rng.randrange(5, 20), "c": rng.randrange(20, 60),
                 "d": rng.randrange(2, 10), "e": rng.randrange(5, 50)}
        for step in steps:
            step = step.format(**drawn).replace("_", str(value))
            value = math_value(step)
            lines.append(f"{step}={value}")
        prompt = text.format(**drawn)
    response = "\n".join([*lines, f"#### {value}"]) if lines else str(value)
    return {"prompt": prompt, "response": response, "answer": str(value), "level": level}


def make_problems(kind, level, n, seed):
    """n distinct problems, or fewer if there are no more."""
    rng, problems = random.Random(seed), {}
    for _ in range(50 * n):
        problem = make_problem(kind, level, rng)
        problems.setdefault(problem["prompt"], problem)
        if len(problems) == n:
            break
    return list(problems.values())


# -----------------------------------------------------------------------------
# Training: what its kinds have in common.


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file that takes the name `path` only once it is whole: a killed run leaves no half."""
    temporary = os.fspath(path) + ".tmp"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_rows(path, rows):
    """Write dicts as .jsonl."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Progress:
    """A line on a terminal that says how far a long step is; nothing where there is none."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, total, time.monotonic()

    def __call__(self, done):
        if sys.stderr.isatty():
            left = (time.monotonic() - self.start) / max(1, done) * (self.total - done)
            print(f"\r{self.what}: {done:,} of {self.total:,}, {left:.0f} s left \x1b[K",
                  file=sys.stderr, end="\n" if done >= self.total else "", flush=True)


def load_model(path, device, template=None):
    """-> (model, tokenizer, chat template, checkpoint) of a checkpoint; template: the name of
    another one. Raises ValueError if it can not be trained or talked to."""
    model, checkpoint = load_checkpoint(path, device)
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{path} holds no tokenizer: it was trained on ids of unknown meaning")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path} has a tokenizer of {tokenizer.vocab_size:,} ids, and a model of "
                         f"{model.config.vocab_size:,}")
    if template or not checkpoint.get("template"):
        return model, tokenizer, make_template(template or "raw", tokenizer), checkpoint
    return model, tokenizer, checkpoint["template"], checkpoint


def batch_of(items, batch_size, step, seed):
    """Batch number `step` of a fixed order, in which nothing comes twice before all has come once:
    each epoch is another permutation. It depends on nothing else, so a run can be taken up."""
    batch, at = [], step * batch_size
    while len(batch) < batch_size:
        epoch, i = divmod(at + len(batch), len(items))
        order = list(range(len(items)))
        random.Random(f"{seed} {epoch}").shuffle(order)
        batch += [items[j] for j in order[i : i + batch_size - len(batch)]]
    return batch


def scheduled(step, args):
    """The learning rate of a step: up in a straight line, then level or down a cosine."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / (args.warmup_iters + 1)
    if args.schedule == "constant":
        return args.learning_rate
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def read_log(folder):
    """Rows of log.csv: list of dicts of strings."""
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Run:
    """What the commands that train share: the model, from --ckpt or from where a run was stopped,
    its tokenizer, template and optimizers, and the loop."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        torch.manual_seed(args.seed)
        self.path = os.path.join(args.out_dir, "ckpt.pt")
        source = self.path if args.resume else args.ckpt
        self.model, self.tokenizer, self.template, checkpoint = load_model(
            source, self.device, args.template)
        if self.model.quantized:
            raise ValueError(f"{source} is quantized: train the checkpoint that it was made from")
        self.stops = chat_stops(self.tokenizer, self.template)
        self.step = checkpoint["step"] if args.resume else 0
        self.state = checkpoint.get("optimizer")
        self.optimizers, self.others, self.more = self.optimizers_for(self.model), [], {}

    def optimizers_for(self, model):
        """SGD, AdamW, or Muon (written out in train.py) with AdamW for what is no hidden matrix.
        Raises ValueError if this PyTorch has no Muon."""
        a, matrices = self.args, []
        if a.optimizer == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise ValueError("--optimizer muon needs PyTorch 2.9 or later")
            matrices = [p for name, p in model.blocks.named_parameters()
                        if p.ndim == 2 and p.requires_grad and "router" not in name]
        hidden = set(map(id, matrices))
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in hidden]
        groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": a.weight_decay},
                  {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
        if a.optimizer == "sgd":
            return [torch.optim.SGD(groups, a.learning_rate, 0.95)]
        adamw = torch.optim.AdamW(groups, a.learning_rate, (0.9, 0.95))
        return [adamw] if not matrices else [
            torch.optim.Muon(matrices, a.learning_rate, a.weight_decay, 0.95,
                             adjust_lr_fn="match_rms_adamw"), adamw]

    def autocast(self):
        """The context of matrix products in bfloat16, if asked for."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16,
                              enabled=self.args.dtype == "bfloat16")

    def log_probs(self, model, batch, **how):
        """`response_log_probs` in the dtype of training."""
        with self.autocast():
            return response_log_probs(model, batch["input_ids"], batch["labels"], **how)

    def keep_fitting(self, items, lengths, what):
        """Those of `items` whose length is at most block_size; says how many were not."""
        limit = self.model.config.block_size
        kept = [item for item, n in zip(items, lengths) if n <= limit]
        if len(kept) < len(items):
            print(f"{len(items) - len(kept)} of {len(items)} {what} dropped: longer than "
                  f"{limit} tokens", flush=True)
        if not kept:
            raise ValueError(f"none of {len(items)} {what} fits into {limit} tokens")
        return kept

    def update(self, params):
        """One step of the optimizers -> the norm that the gradient of params had."""
        norm = nn.utils.clip_grad_norm_(params, self.args.grad_clip or math.inf).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.update_router_bias()
        return norm

    def save(self, step, rows):
        """log.csv, then ckpt.pt, which model.py chats with and --resume goes on from. A run that
        is killed between the two has rows too many, which --resume leaves out."""
        with replacing(os.path.join(self.args.out_dir, "log.csv")) as file:
            names = dict.fromkeys(name for row in rows for name in row)
            writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        save_checkpoint(self.path, self.model, self.optimizers + self.others, step,
                        args=vars(self.args) | self.more, tokenizer=self.tokenizer.to_json(),
                        template=self.template)

    def fit(self, do_step, evaluate):
        """The loop of every kind of training: learning rate, step, log, evaluation, checkpoint.
        do_step(step) -> metrics, after it has moved the parameters; evaluate() -> metrics.
        SIGINT and SIGTERM end it after a step, and leave a checkpoint."""
        args, rows, stopped, step = self.args, [], [], self.step
        if step:
            try:
                for part, state in zip(self.optimizers + self.others, self.state, strict=True):
                    part.load_state_dict(state)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{self.path} can not be resumed: {error}") from None
            rows = [row for row in read_log(args.out_dir) if int(row["step"]) <= step]
        os.makedirs(args.out_dir, exist_ok=True)
        previous = {s: signal.signal(s, lambda number, _: stopped.append(number))
                    for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if not step:
                show({"step": 0} | evaluate())
            while step < args.max_iters and not stopped:
                begin, lr = time.perf_counter(), scheduled(step, args)
                for group in [g for optimizer in self.optimizers for g in optimizer.param_groups]:
                    group["lr"] = lr
                row = {"step": step + 1} | do_step(step)
                if not all(map(math.isfinite, row.values())):
                    raise ValueError(f"at step {step + 1} the numbers are no longer finite: {row};"
                                     " try a smaller --learning_rate")
                step += 1
                row |= {"learning_rate": lr, "seconds": time.perf_counter() - begin}
                evaluated = step % args.eval_interval == 0 or step == args.max_iters
                if evaluated and not stopped:
                    row |= evaluate()
                rows.append({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
                if step % args.log_interval == 0 or evaluated or stopped:
                    show(row)
                if evaluated or stopped:
                    self.save(step, rows)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stopped:
            print(f"stopped after step {step}; --resume goes on", flush=True)
            sys.exit(130)


def show(row):
    """A row of the log, as a line."""
    print(" | ".join(f"{name} {value:.4g}" if type(value) is float else f"{name} {value}"
                     for name, value in row.items()), flush=True)


def averages(rows, size, measure, count=len, backward=False):
    """What measure(part) says of parts of `size` rows -> its mean over all rows. backward: the
    gradient of "loss", too. Each part weighs as much as count(part) is of count(rows), so that the
    parts add up to what the whole batch would give."""
    sums, whole = Counter(), count(rows)
    for i in range(0, len(rows), size):
        part = rows[i : i + size]
        found, share = measure(part), count(part) / whole
        auxiliary = found.pop("auxiliary_loss", 0)  # of mixtures of experts; it is not logged
        if backward:
            ((found["loss"] + auxiliary) * share).backward()
        for name, value in found.items():
            sums[name] += value.item() * share
    return dict(sums)


def fit_rows(run, data, held_out, measure, count=len):
    """The training of sft, dpo and reward: batches of `data`, in parts, and all of `held_out`."""
    args = run.args
    params = [p for module in (run.model, *run.others) for p in module.parameters()]

    def do_step(step):
        rows = batch_of(data, args.batch_size, step, args.seed)
        size = -(-len(rows) // args.gradient_accumulation_steps)
        found = averages(rows, size, measure, count, backward=True)
        return found | {"grad_norm": run.update(params)}

    @torch.no_grad()
    def evaluate():
        found = averages(held_out, args.batch_size, measure, count)
        return {f"val_{name}": value for name, value in found.items()}

    run.fit(do_step, evaluate)


# -----------------------------------------------------------------------------
# Supervised fine-tuning.


def run_sft(args):
    """`sft`: learn to answer as the examples do."""
    run = Run(args)
    model = run.model

    def load(path):  # -> list of (row, how many of its tokens are to be learned)
        chats, empty = read_conversations(path)
        if empty:
            print(f"{empty} rows of {path} dropped: an empty response", flush=True)
        if not chats:
            raise ValueError(f"{path} has no row with a response")
        examples = [encode_conversation(run.tokenizer, run.template, chat) for chat in chats]
        examples = run.keep_fitting(examples, [len(ids) - 1 for ids, _ in examples],
                                    f"examples of {path}")
        if args.no_packing:
            return [(example, sum(example[1][1:])) for example in examples]
        packed = pack_sequences(examples, model.config.block_size)
        return [({name: packed[name][i] for name in packed if name != "dropped"}, int(mask.sum()))
                for i, mask in enumerate(packed["response_mask"])]

    def tokens(rows):
        return sum(n for _, n in rows)

    def measure(rows):
        model.train(torch.is_grad_enabled())
        rows = [row for row, _ in rows]
        if args.no_packing:
            batch, apart = collate(rows, device=run.device), contextlib.nullcontext()
        else:
            batch = {name: torch.stack([row[name] for row in rows]).to(run.device)
                     for name in rows[0]}
            apart = separate_documents(model, batch["positions"])
        with apart:
            log_probs = run.log_probs(model, batch)["log_probs"]
        return {"loss": sft_loss(log_probs, batch["response_mask"]),
                "auxiliary_loss": model.auxiliary_loss()}

    data, held_out = load(args.data), load(args.val_data) if args.val_data else []
    print(f"{len(data):,} rows, {tokens(data):,} tokens to be learned | {run.device}", flush=True)
    fit_rows(run, data, held_out, measure, tokens)


# -----------------------------------------------------------------------------
# Preferences: a reward model, and DPO, which does without.


def encode_pairs(run, path):
    """Pairs of a file, those that fit -> list of ((ids, mask) of prompt + chosen, of prompt +
    rejected)."""
    pairs, useless = read_pairs(path)
    if useless:
        print(f"{useless} rows of {path} dropped: an empty response, or both the same", flush=True)
    if not pairs:
        raise ValueError(f"{path} has no pair with two responses")
    encoded = [[encode_example(run.tokenizer, run.template, prompt, text) for text in sides]
               for prompt, *sides in pairs]
    lengths = [max(len(ids) for ids, _ in pair) - 1 for pair in encoded]
    return run.keep_fitting(encoded, lengths, f"pairs of {path}")


def preferences(chosen, rejected):
    """Of two tensors (n,): how often the first is greater (equal ones are half right), by how
    much."""
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    return {"accuracy": right.mean(), "margin": (chosen - rejected).mean()}


def run_dpo(args):
    """`dpo`: make chosen responses likelier than rejected ones, compared with where it began."""
    run = Run(args)
    model = run.model.eval()  # without dropout, so that at step 0 the policy is the reference
    reference = load_model(args.ckpt, run.device)[0] if args.resume else model

    def log_likelihoods(model, pairs):  # -> (2, n): of the chosen, of the rejected responses
        batch = collate([pair[side] for side in (0, 1) for pair in pairs], device=run.device)
        log_probs = run.log_probs(model, batch)["log_probs"]
        return masked_sum(log_probs, batch["response_mask"], 1).view(2, -1)

    @torch.no_grad()
    def load(path):  # -> list of (pair, its log-likelihoods by the reference), for good
        pairs, rows = encode_pairs(run, path), []
        progress = Progress("reference", len(pairs))
        for i in range(0, len(pairs), args.batch_size):
            some = pairs[i : i + args.batch_size]
            rows += zip(some, log_likelihoods(reference, some).T.tolist())
            progress(len(rows))
        return rows

    def measure(rows):
        policy = log_likelihoods(model, [pair for pair, _ in rows])
        before = torch.tensor([numbers for _, numbers in rows], device=run.device).T
        return {"loss": dpo_loss(*policy, *before, args.beta),
                **preferences(*args.beta * (policy - before).detach()),
                "chosen_log_prob": policy[0].mean(), "rejected_log_prob": policy[1].mean()}

    fit_rows(run, load(args.data), load(args.val_data) if args.val_data else [], measure)


def run_reward(args):
    """`reward`: a model that gives chosen responses more than rejected ones."""
    run = Run(args)
    reward = ScalarModel(run.model.eval())
    run.optimizers.append(torch.optim.AdamW(reward.head.parameters(), weight_decay=0.0))
    run.others = [reward.head]
    run.more = {"reward_head": reward.head.weight.detach()}

    def measure(pairs):
        with run.autocast():
            scores = reward.score([pair[side][0] for side in (0, 1) for pair in pairs],
                                  run.device).view(2, -1)
        return {"loss": reward_model_loss(*scores), **preferences(*scores.detach())}

    fit_rows(run, encode_pairs(run, args.data),
             encode_pairs(run, args.val_data) if args.val_data else [], measure)


# -----------------------------------------------------------------------------
# Reinforcement learning.


def respond(model, tokenizer, prompts, stops, max_new_tokens, temperature, seed, batch_size=1024):
    """Sample a response to each of the prompts, lists of ids, by the cached generation of model.py
    -> list of (ids with the prompt, text of the response without its end). At temperature
    0: greedy."""
    out = []
    for i in range(0, len(prompts), batch_size):
        some = prompts[i : i + batch_size]
        generator = torch.Generator(model.embedding.weight.device)
        generator.manual_seed(seed * 1_000_003 + i)
        room = [min(max_new_tokens, model.config.block_size - len(ids)) for ids in some]
        texts = model.generate(some, room, temperature, stop=stops, generator=generator)
        for prompt, ids in zip(some, texts):
            said = ids[len(prompt) : len(ids) - (ids[-1] in stops)]
            out.append((ids, tokenizer.decode([i for i in said if i in tokenizer.vocab])))
    return out


def encode_problems(run, path):
    """Problems of a file whose prompts leave room for a response -> list with an added "ids"."""
    problems = read_problems(path)
    for problem in problems:
        problem["ids"] = encode_chat(run.tokenizer, run.template, problem["messages"])
    problems = [problem for problem in problems if problem["ids"]]
    room = min(run.args.max_new_tokens, run.model.config.block_size // 2)
    return run.keep_fitting(problems, [len(p["ids"]) + room for p in problems],
                            f"problems of {path}")


def solve(model, tokenizer, problems, stops, max_new_tokens):
    """The share of problems whose greedy response is verified."""
    answers = respond(model, tokenizer, [p["ids"] for p in problems], stops, max_new_tokens, 0, 0)
    return statistics.mean(float(verify(p, text) >= 1) for p, (_, text) in zip(problems, answers))


def run_rl(args):
    """`rl`: sample responses, have them verified, and make the good ones likelier. One step is: a
    batch of prompts, args.group_size responses to each, and args.epochs passes over all of them in
    args.minibatches updates each."""
    run = Run(args)
    model, algorithm = run.model.eval(), args.algorithm  # no dropout: log-probs have to agree
    problems = encode_problems(run, args.data)
    held_out = encode_problems(run, args.val_data) if args.val_data else []
    reward_model = load_reward_model(args.reward_model, run.device) if args.reward_model else None
    reference = load_model(args.ckpt, run.device)[0] if args.kl else None
    critic = ScalarModel(copy.deepcopy(model)) if algorithm == "ppo" else None
    if critic:
        run.optimizers += run.optimizers_for(critic.body)
        run.optimizers.append(torch.optim.AdamW(critic.head.parameters(), weight_decay=0.0))
        run.others = [critic]
    params = [p for optimizer in run.optimizers for group in optimizer.param_groups
              for p in group["params"]]
    # the tokens of a minibatch are weighed as dapo does, if the algorithm says nothing else
    loss_type = algorithm if algorithm in ("grpo", "dr_grpo") else "dapo"
    clip_high = args.clip_high
    if clip_high is None:
        clip_high = 0.28 if algorithm == "dapo" else args.clip
    once = args.epochs * args.minibatches == 1 and not critic  # then the policy is still the old
    examples = []

    def parts(batch):
        for i in range(0, len(batch["input_ids"]), args.micro_batch):
            yield {name: x[i : i + args.micro_batch] for name, x in batch.items()}

    def look(model, part):
        return run.log_probs(model, part, temperature=args.temperature,
                             return_token_entropy=torch.is_grad_enabled())

    @torch.no_grad()
    def rollout(step):  # -> a batch with rewards, and its texts as lists of ids
        asked = [p for p in batch_of(problems, args.prompts_per_step, step, args.seed)
                 for _ in range(args.group_size)]
        answers = respond(model, run.tokenizer, [p["ids"] for p in asked], run.stops,
                          args.max_new_tokens, args.temperature, args.seed * 100_003 + step)
        texts = [ids for ids, _ in answers]
        batch = collate([(ids, [0] * len(p["ids"]) + [1] * (len(ids) - len(p["ids"])))
                         for p, ids in zip(asked, texts)], device=run.device)
        if reward_model:
            rewards = torch.cat([reward_model.score(texts[i : i + args.micro_batch], run.device)
                                 for i in range(0, len(texts), args.micro_batch)])
        else:
            rewards = torch.tensor([verify(p, said) for p, (_, said) in zip(asked, answers)],
                                   device=run.device)
        batch["rewards"] = rewards
        examples[:] = [(p, said, reward) for p, (_, said), reward in
                       zip(asked, answers, rewards.tolist())][:: args.group_size]
        return batch, texts

    @torch.no_grad()
    def look_back(batch):  # what the losses need of the models before the updates
        found = []
        for part in parts(batch):
            found.append({} if once else {"old": look(model, part)["log_probs"]})
            if reference:
                found[-1]["reference"] = look(reference, part)["log_probs"]
            if critic:
                with run.autocast():
                    found[-1]["values"] = critic(part["input_ids"])
        batch |= {name: torch.cat([part[name] for part in found]) for name in found[0]}
        rewards, mask = batch["rewards"], batch["response_mask"]
        if algorithm == "ppo":
            given = torch.zeros_like(batch["old"])  # the reward comes with the last token
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
            given[torch.arange(len(mask)), last] = rewards
            if reference:  # and each token costs its distance from the reference
                given -= args.kl * (batch["old"] - batch["reference"])
            advantages, batch["returns"] = gae(given, batch["values"], args.gamma, args.lam, mask)
            advantages = advantages - masked_mean(advantages, mask)
            std = masked_mean(advantages.square(), mask).sqrt()
            batch["advantages"] = advantages / (std + 1e-8)
        elif algorithm == "reinforce":  # the baseline is the mean of the batch
            batch["advantages"] = rewards - rewards.mean()
        elif algorithm != "expert":
            batch["advantages"] = group_advantages(rewards, args.group_size,
                                                   normalize_std=algorithm != "dr_grpo")

    def loss_of(part, log_probs, old, normalizer):
        mask, advantages = part["response_mask"], part.get("advantages")
        if algorithm == "expert":
            return sft_loss(log_probs, mask, normalizer)
        if algorithm == "ppo":
            with run.autocast():
                values = critic(part["input_ids"])
            return ppo_loss(log_probs, old, advantages, mask, values, part["values"],
                            part["returns"], args.clip, args.clip, args.value_weight, normalizer)
        if algorithm == "reinforce":
            losses, _ = policy_gradient_loss(log_probs, "reinforce_with_baseline",
                                             advantages=advantages)
            if reference:
                losses = losses + args.kl * kl_estimate(log_probs, part["reference"])
            return masked_sum(losses, mask, normalize_constant=normalizer)
        return grpo_loss(log_probs, old, advantages, mask, part.get("reference"), args.kl,
                         args.clip, clip_high, loss_type, args.max_new_tokens, normalizer,
                         clip=not args.no_clip)

    def learn(mini):  # one update -> its metrics
        sums = Counter()
        normalizer = grpo_normalizer(mini["response_mask"], loss_type, args.max_new_tokens)
        if algorithm not in ("ppo", "expert") and not args.kl:
            # advantages of 0 have no gradient; they have been counted in the normalizer
            some = mini["advantages"] != 0
            mini = {name: x[some] for name, x in mini.items()}
        tokens = mini["response_mask"].sum().clamp(min=1)
        for part in parts(mini):
            found = look(model, part)
            new, mask = found["log_probs"].detach(), part["response_mask"]
            old = part.get("old", new)
            loss = loss_of(part, found["log_probs"], old, normalizer)
            loss.backward()
            ratio = torch.exp(new - old)
            clipped = (ratio < 1 - args.clip) | (ratio > 1 + clip_high)
            sums["loss"] += loss.item()
            for name, x in (("entropy", found["token_entropy"]),
                            ("clip_fraction", clipped.float()),
                            ("kl", kl_estimate(new, part.get("reference", old)))):
                sums[name] += (masked_sum(x, mask) / tokens).item()
        return {**sums, "grad_norm": run.update(params)} if sums else None

    def do_step(step):
        batch, texts = rollout(step)
        rewards, lengths = batch["rewards"], batch["response_mask"].sum(1).float()
        row = {"reward": rewards.mean().item(), "solved": (rewards >= 1).float().mean().item(),
               "length": lengths.mean().item()}
        if algorithm == "expert":  # what was right, each response once
            right = {tuple(ids): i for i, ids in enumerate(texts) if rewards[i] >= 1}
            if not right:
                return row
            batch = {name: x[list(right.values())] for name, x in batch.items()}
        look_back(batch)
        updates = []
        for epoch in range(args.epochs):
            g = torch.Generator().manual_seed(args.seed * 7919 + step * 101 + epoch)
            order = torch.randperm(len(batch["rewards"]), generator=g).to(run.device)
            updates += [learn({name: x[rows] for name, x in batch.items()})
                        for rows in order.chunk(args.minibatches)]
        updates = [update for update in updates if update]
        return row | {name: statistics.fmean(update[name] for update in updates)
                      for name in (updates[0] if updates else ())}

    def evaluate():
        for problem, text, reward in examples[: args.show]:
            prompt = problem["messages"][-1]["content"]
            print(f"    {prompt[-200:]!r} -> {text[:300]!r}: {reward:.2f}", flush=True)
        return {"val_accuracy": solve(model, run.tokenizer, held_out, run.stops,
                                      args.max_new_tokens)} if held_out else {}

    run.fit(do_step, evaluate)


# -----------------------------------------------------------------------------
# Work in chunks that can be taken up again; synthetic data and judging by a checkpoint.


def in_chunks(items, size, path, key, work, what):
    """[result for each item], work(chunk) giving those of a chunk. With a path, each chunk's are
    kept there as they come, and those of a run that was stopped are not computed again; `key`, of
    which "command" is first, is what the results depend on: another one begins anew.
    Raises ValueError if the file at `path` is not from this command."""
    chunks, progress = [], Progress(what, len(items))
    if path:
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                first, *lines = file.read().split("\n")
            if first and not first.startswith('{"command": "%s"' % key["command"]):
                raise ValueError(f"{path} is not from align.py {key['command']}: it is left alone")
            with contextlib.suppress(ValueError):  # the last line can be half a line
                if json.loads(first) == key:
                    chunks.extend(map(json.loads, lines))
        write_rows(path, [key, *chunks])
    results = list(itertools.chain(*chunks))
    while len(results) < len(items):
        chunk = work(items[len(results) : len(results) + size])
        results += chunk
        if path:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(chunk, ensure_ascii=False) + "\n")
        progress(len(results))
    return results


def run_synth(args):
    """`synth`: problems from a program; or, from a checkpoint, verified responses to them
    (rejection sampling), or pairs of a better and a worse one."""
    if not args.ckpt:
        rows = make_problems(args.kind, args.level, args.n, args.seed)
        write_rows(args.out, rows)
        print(f"{args.out}: {len(rows)} problems")
        return
    device = pick_device(args.device)
    model, tokenizer, template, _ = load_model(args.ckpt, device, args.template)
    stops = chat_stops(tokenizer, template)
    judge = load_model(args.judge, device)[:3] if args.judge else None
    problems = [row | {"messages": prompt_of(row, where)} for where, row in
                read_rows(args.data)] if judge else read_problems(args.data)
    problems = list(enumerate(problems[: args.limit]))

    def rows_for(problem, texts):
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        messages = problem["messages"]
        row = {"prompt": messages if len(messages) > 1 else messages[0]["content"]}
        row |= {"answer": problem["answer"]} if "answer" in problem else {}
        if judge:
            both = [(a, b, judge_pair(*judge, messages[-1]["content"], a, b))
                    for a, b in zip(texts[::2], texts[1::2])]
            pairs = [(a, b) if verdict > 0 else (b, a) for a, b, verdict in both if verdict]
        else:
            right = [text for text in texts if verify(problem, text) >= 1]
            if not args.pairs:
                return [row | {"response": text} for text in right]
            pairs = zip(right, [text for text in texts if text not in right])
        return [row | {"chosen": a, "rejected": b} for a, b in pairs]

    def work(chunk):
        prompts = [encode_chat(tokenizer, template, p["messages"]) for _, p in chunk]
        fits = [0 < len(ids) < model.config.block_size for ids in prompts]
        asked = [ids for ids, fit in zip(prompts, fits) if fit for _ in range(args.samples)]
        answers = iter(respond(model, tokenizer, asked, stops, args.max_new_tokens,
                               args.temperature, args.seed * 100_003 + chunk[0][0]))
        return [rows_for(p, [next(answers)[1] for _ in range(args.samples)]) if fit else []
                for (_, p), fit in zip(chunk, fits)]

    kept = args.out + ".part"
    found = in_chunks(problems, args.batch_size, kept, vars(args), work, "prompts")
    rows = list(itertools.chain(*found))
    write_rows(args.out, rows)
    os.remove(kept)
    print(f"{args.out}: {len(rows)} rows, for {sum(map(bool, found))} of {len(found)} prompts")


def run_judge(args):
    """`judge`: a checkpoint compares the two answers of each pair of a file."""
    judge = load_model(args.ckpt, pick_device(args.device), args.template)[:3]
    pairs = read_pairs(args.data)[0][: args.limit]
    if not pairs:
        raise ValueError(f"{args.data} has no two answers to a prompt")

    def work(chunk):
        return [judge_pair(*judge, messages[-1]["content"], a, b) for messages, a, b in chunk]

    votes = in_chunks(pairs, 16, args.out, vars(args), work, "pairs")
    wins, losses = votes.count(1), votes.count(-1)
    report({"pairs": len(votes), "first_preferred": wins, "second_preferred": losses,
            "undecided": votes.count(0), "win_rate": share([True] * wins + [False] * losses)})


# -----------------------------------------------------------------------------
# Evaluation.


def wilson(k, n, z=1.96):
    """95% confidence interval of a share of which k of n were seen (Wilson 1927): unlike
    p +- z s it does not leave 0 to 1, and is not empty for k = 0. -> (low, high)"""
    if n == 0:
        return 0.0, 1.0
    p, denominator = k / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / denominator
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator
    return max(0.0, middle - half), min(1.0, middle + half)  # of rounding


def share(hits):
    """List of bool -> '0.5000 (0.0945 to 0.9055)': how many are true, and the interval."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / max(1, len(hits)):.4f} ({low:.4f} to {high:.4f})"


def report(values):
    """A line `name: value` for each."""
    print("\n".join(f"{name}: {value}" for name, value in values.items()))


def pass_at_k(n, c, k):
    """The chance that of k responses, drawn from n of which c are right, one is right (Chen et al.
    2021):     1 - C(n - c, k) / C(n, k). Taking 1 - (1 - c/n)^k would be biased."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def encode_continuation(tokenizer, context, continuation):
    """-> (ids of both, how many of the last are the continuation's). Both are tokenized as one
    text, as in training data: tokenize(a) + tokenize(b) would cut "Answer:" + " 42" where no
    training text was cut. Spaces at the end of the context belong to the continuation then. An
    empty context is the end of a document."""
    kept = context.rstrip()
    whole = tokenizer.encode_ordinary(context + continuation)
    if not kept:
        start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        return start + whole, len(start + whole) - 1
    return whole, max(1, len(whole) - len(tokenizer.encode_ordinary(kept)))


@torch.no_grad()
def score(model, requests, batch_size=16):
    """requests: list of (ids, n), of `encode_continuation` -> list of (log p of the last n ids
    given those before, whether they are the likeliest all along). What is longer than block_size
    loses its beginning. What differs in the last id only is read once."""
    device, limit = model.embedding.weight.device, model.config.block_size
    rows, out = {}, [None] * len(requests)
    for i, (ids, n) in enumerate(requests):
        ids = ids[-(limit + 1) :]
        n = min(n, len(ids) - 1)
        rows.setdefault((tuple(ids[:-1]), n), []).append((i, ids[len(ids) - n :]))
    ordered = sorted(rows.items(), key=lambda row: -len(row[0][0]))  # rows of a batch: alike long
    for at in range(0, len(ordered), batch_size):
        some = ordered[at : at + batch_size]
        hidden = model(padded([list(row) for (row, _), _ in some], device=device), hidden=True)
        for ((row, n), wanted), h in zip(some, hidden):
            logits = upcast(model.head(h[len(row) - n : len(row)]))  # no others are needed
            if cap := model.config.logit_cap:
                logits = cap * torch.tanh(logits / cap)
            log_p = torch.log_softmax(logits, -1)
            for i, target in wanted:
                target = torch.tensor(target, device=device)
                out[i] = (log_p.gather(1, target[:, None]).sum().item(),
                          bool((log_p.argmax(1) == target).all()))
    return out


def read_mmlu(path):
    """Rows of a .csv of MMLU, or of all in a folder, in the form of `read_rows`."""
    rows = []
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else [os.path.basename(path)]:
        if name.endswith(".csv"):
            name = os.path.join(path, name) if os.path.isdir(path) else path
            subject = re.sub(r"_(dev|val|test)\.csv$", "", os.path.basename(name))
            with open(name, encoding="utf-8", newline="") as file:
                rows += [(f"{name}, row {i}", {"subject": subject, "cells": cells})
                         for i, cells in enumerate(csv.reader(file), 1)]
    if not rows:
        raise ValueError(f"{path} holds no .csv of questions")
    return rows


def lettered(question, texts):
    """A question with its choices below."""
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, texts))
    return f"{question}{choices}\nAnswer:"


def read_item(task, row, where):
    """One row of a task's file -> {"context", "choices", "label", "target"}, to be scored, or
    {"context", "problem", "target"}, to be answered. Contexts and targets are those of
    lm-evaluation-harness (Gao et al. 2021). Raises ValueError for rows without what they need."""
    label, more = row.get("label"), {}
    if task == "mmlu":
        cells, texts = row["cells"], list("ABCD")
        if len(cells) != 6 or cells[5] not in texts:
            raise ValueError(f"{where}: it needs a question, four choices, and one of A to D, not "
                             f"{str(cells)[:80]}")
        context, label = lettered(cells[0].strip(), cells[1:5]), texts.index(cells[5])
        more = {"header": "The following are multiple choice questions (with answers) about "
                          f"{row['subject'].replace('_', ' ')}.\n\n"}
    elif task == "arc" or (task == "arithmetic" and "choices" in row):
        choices = field(row, where, "choices", kind=dict)
        texts, labels = (field(choices, where, name, kind=list) for name in ("text", "label"))
        if len(texts) != len(labels) or row.get("answerKey") not in labels or \
                not all(type(text) is str for text in texts):
            raise ValueError(f"{where}: it needs as many labels as texts, and one as answerKey")
        context = f"Question: {field(row, where, 'question')}\nAnswer:"
        label = labels.index(row["answerKey"])
    elif task == "piqa":
        context = f"Question: {field(row, where, 'goal')}\nAnswer:"
        texts = [field(row, where, name) for name in ("sol1", "sol2")]
    elif task == "hellaswag":
        def clean(text):  # of the marks of WikiHow
            text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
            return text.replace("  ", " ")

        names = ("activity_label", "ctx_a", "ctx_b")
        activity, a, b = (field(row, where, name) for name in names)
        context = clean(f"{activity}: {a} {b.capitalize()}")
        texts = [clean(str(text)) for text in field(row, where, "endings", kind=list)]
        label = int(label) if str(label).isdecimal() else label
    elif task == "arithmetic" and "completion" in row:  # right if it is the likeliest
        context = field(row, where, "context")
        texts, label = [field(row, where, "completion").strip()], 0
    elif task == "ifeval":
        names = field(row, where, "instruction_id_list", kind=list)
        if len(names) != len(field(row, where, "kwargs", kind=list)):
            raise ValueError(f"{where}: as many kwargs are needed as instructions")
        return {"context": field(row, where, "prompt"), "problem": row, "target": ""}
    else:  # gsm8k, and problems of `synth`
        answer = field(row, where, "answer")
        question = field(row, where, "prompt", "question", "problem")
        item = {"context": question, "target": answer} if "prompt" in row else {
            "context": f"Question: {question}\nAnswer:", "target": " " + answer}
        return item | {"problem": {"answer": answer.split("####")[-1].strip()}}
    if type(label) is not int or not 0 <= label < len(texts):
        raise ValueError(f"{where}: label must be one of the choices' numbers, not {label!r}")
    return {"context": context, "choices": texts, "label": label,
            "target": " " + texts[label]} | more


def read_task(task, path, cot=False):
    """A file (or, for mmlu, a folder of .csv) in the published format -> list of `read_item`. cot:
    to be answered in words; choices, then, by their letters."""
    rows = read_mmlu(path) if task == "mmlu" else read_rows(path)
    items = [read_item(task, row, where) for where, row in rows]
    for item in items if cot else ():
        if "label" in item:
            if task != "mmlu":
                question = item["context"].removesuffix("\nAnswer:")
                item["context"] = lettered(question, item["choices"])
            item["problem"] = {"answerKey": LETTERS[item["label"]], "n": len(item["choices"])}
        item["context"] += " Let's think step by step."
    return items


def add_shots(items, shots, n):
    """Put n solved examples before the context of each item, of its own subject if there are any,
    and never the item itself."""
    for item in items:
        same = (s["context"] + s["target"] + "\n\n" for s in shots if
                s.get("header") == item.get("header") and
                (s["context"], s["target"]) != (item["context"], item["target"]))
        item["context"] = "".join([item.get("header", ""), *itertools.islice(same, n),
                                   item["context"]])


def run_eval(args):
    """`eval`: measure a checkpoint at a task."""
    device = pick_device(args.device)
    model, tokenizer, template, _ = load_model(args.ckpt, device, args.template)
    if args.task == "ppl":
        report(evaluate_text(model, tokenizer, args))
        return
    items = read_task(args.task, args.data, args.cot)
    add_shots(items, read_task(args.task, args.fewshot_data, args.cot) if args.fewshot_data else
              [dict(item) for item in items], args.fewshot)
    items = items[: args.limit]
    stops = chat_stops(tokenizer, template)

    def ids_of(item):
        if args.chat:
            return encode_chat(tokenizer, template, [{"role": "user", "content": item["context"]}])
        return tokenizer.encode_ordinary(item["context"]) or [tokenizer.eot_id or 0]

    def request(item, choice):
        if not args.chat:
            return encode_continuation(tokenizer, item["context"], " " + choice)
        tail = tokenizer.encode_ordinary(choice)
        return ids_of(item) + tail, len(tail)

    def scored(chunk):  # -> [[number of the choice by log p, by log p per character, greedy], ...]
        requests = [request(item, choice) for item in chunk for choice in item["choices"]]
        found, results = iter(score(model, requests, args.batch_size)), []
        for item in chunk:
            own = [next(found) for _ in item["choices"]]
            by_length = [p / max(1, len(text)) for (p, _), text in zip(own, item["choices"])]
            results.append([max(range(len(own)), key=lambda i: own[i][0]),
                            max(range(len(own)), key=by_length.__getitem__), own[0][1]])
        return results

    def answered(chunk):  # -> [[response, ...], ...]
        limit = model.config.block_size - min(args.max_new_tokens, model.config.block_size // 2)
        prompts = [ids_of(item)[-limit:] for item in chunk for _ in range(args.samples)]
        texts = [text if args.chat else text.split("Question:")[0] for _, text in
                 respond(model, tokenizer, prompts, stops, args.max_new_tokens,
                         args.temperature if args.samples > 1 else 0,
                         args.seed * 100_003 + items.index(chunk[0]), args.batch_size)]
        return [texts[i : i + args.samples] for i in range(0, len(texts), args.samples)]

    # a chunk is some args.batch_size texts, of four choices each
    work, texts = (answered, args.samples) if "problem" in items[0] else (scored, 4)
    key = {k: v for k, v in vars(args).items() if k not in ("out", "batch_size", "device")}
    results = in_chunks(items, max(1, args.batch_size // texts), args.out, key, work, args.task)
    summary = summarize_scores if work is scored else \
        summarize_instructions if args.task == "ifeval" else summarize_answers
    report({"task": args.task, "n": len(items)} | summary(items, results))


def summarize_scores(items, results):
    """Accuracy by likelihood, and by likelihood per character."""
    if len(items[0]["choices"]) == 1:
        return {"acc": share([greedy for *_, greedy in results])}
    return {name: share([numbers[i] == item["label"] for numbers, item in zip(results, items)])
            for i, name in enumerate(("acc", "acc_norm"))}


def summarize_instructions(items, results):
    """IFEval's four accuracies, of the rows whose instructions are known."""
    kept = [(item["problem"], texts[0]) for item, texts in zip(items, results)
            if set(item["problem"]["instruction_id_list"]) <= set(CONSTRAINTS)]
    values = {}
    for name, loose in (("strict", False), ("loose", True)):
        each = [follows(problem, text, loose) for problem, text in kept]
        values[f"prompt_{name}"] = share([all(hits) for hits in each])
        values[f"instruction_{name}"] = share(list(itertools.chain(*each)))
    return values | {"left_out": len(items) - len(kept)}


def summarize_answers(items, results):
    """Accuracy of the first of n responses, pass@k, and accuracy of the answer that most of them
    give (self-consistency: Wang et al. 2022)."""
    problems, n = [item["problem"] for item in items], len(results[0])
    right = [[verify(problem, text) >= 1 for text in texts]
             for problem, texts in zip(problems, results)]
    values = {"acc": share([hits[0] for hits in right])}
    if all("answer" in problem for problem in problems):  # lm-evaluation-harness' two filters
        for name, which, pattern in (("strict_match", 0, r"#### (-?[0-9.,]+)"),
                                     ("flexible_extract", -1, r"-?[$0-9.,]{2,}|-?[0-9]+")):
            pairs = [((re.findall(pattern, texts[0]) or [""])[which], problem["answer"])
                     for problem, texts in zip(problems, results)]
            values[name] = share([re.sub(r"[,$]|\.$", "", a) == re.sub(r"[,$]|\.$", "", b)
                                  for a, b in pairs])
    if n > 1:
        for k in sorted({2**j for j in range(n.bit_length())} | {n}):
            chances = [pass_at_k(n, sum(hits), k) for hits in right]
            values[f"pass@{k}"] = f"{statistics.mean(chances):.4f}"
        values[f"majority@{n}"] = share([verify(problem, majority(problem, texts)) >= 1
                                         for problem, texts in zip(problems, results)])
    return values


def majority(problem, texts):
    """The answer that most of the texts give; "" if none gives any."""
    if "answerKey" in problem:
        said = [find_choice(text, problem["n"]) for text in texts]
    else:
        said = [normalize_answer(extract_answer(text) or "") for text in texts]
    return Counter(filter(None, said)).most_common(1)[0][0] if any(said) else ""


def evaluate_text(model, tokenizer, args):
    """Perplexity of text: each document, after an end-of-text token, in windows of block_size."""
    if args.data.removesuffix(".gz").endswith((".jsonl", ".json")):
        texts = [field(row, where, "text") for where, row in read_rows(args.data)]
    else:
        texts = read_text(args.data).split("<|endoftext|>")
    texts = [text for text in texts if text.strip()][: args.limit]
    requests, T = [], model.config.block_size
    for text in texts:
        ids = [tokenizer.eot_id] if tokenizer.eot_id is not None else []
        ids += tokenizer.encode_ordinary(text)
        windows = [ids[i : i + T + 1] for i in range(0, len(ids) - 1, T)]
        requests += [(window, len(window) - 1) for window in windows]
    if not requests:
        raise ValueError(f"{args.data} holds no text")
    key = {name: getattr(args, name) for name in ("command", "task", "ckpt", "data", "limit")}
    found = in_chunks(requests, 8 * args.batch_size, args.out, key,
                      lambda chunk: score(model, chunk, args.batch_size), "windows")
    total, tokens = -sum(p for p, _ in found), sum(n for _, n in requests)
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return {"tokens": tokens, "loss": f"{total / tokens:.4f}",
            "perplexity": f"{math.exp(min(700, total / tokens)):.4f}",
            "word_perplexity": f"{math.exp(min(700, total / words)):.4f}",
            "bits_per_byte": f"{total / math.log(2) / size:.4f}"}


# -----------------------------------------------------------------------------
# The demonstration.

ALGORITHMS = ("reinforce", "ppo", "grpo", "dr_grpo", "dapo", "expert")
MUON = "--optimizer muon --weight_decay 0.1"
RL = f"--schedule cosine --max_new_tokens 4 --eval_interval 15 {MUON}"
GRPO = f"--max_iters 80 --prompts_per_step 128 --group_size 8 --learning_rate 1e-2 {RL}"
DEMO = dict.fromkeys(ALGORITHMS, GRPO) | {  # the flags of each command
    "sft": f"--no_packing --batch_size 128 --learning_rate 2e-2 --schedule cosine {MUON}",
    "ppo": f"--max_iters 80 --prompts_per_step 256 --group_size 4 --minibatches 2 --lam 1 "
           f"--learning_rate 7e-3 {RL}",
    "expert": f"--max_iters 12 --prompts_per_step 512 --group_size 8 --minibatches 16 "
              f"--learning_rate 7e-3 {RL} --eval_interval 2"}


def run_demo(args):
    """`demo`: a model of 57,000 parameters learns to add two numbers of two digits.

    Its teacher writes sums for 7,100 problems, but forgets to carry in seven of ten where there is
    something to carry. Fine-tuning (sft) learns to add, and to forget, for it imitates. Then come
    the same problems without sums, and a verifier, which says of each sum that the model writes
    whether it is right (rl). Would longer imitation have done as well? The control tries, for as
    many seconds. Seeds are processes of their own, two at a time.
    """
    begin, names = time.perf_counter(), ["sft", args.algorithm, "control"]
    seeds = range(args.seed, args.seed + args.seeds)
    with get_context("spawn").Pool(min(2, args.seeds), torch.set_num_threads, (1,)) as pool:
        # of the first seed all is shown
        results = pool.starmap(demonstrate, [(args.out_dir, seed, args.algorithm,
                                              seed == args.seed) for seed in seeds], chunksize=1)
    accuracies, seconds = (list(zip(*table)) for table in zip(*results))
    print(f"\n{'held-out problems solved':26}" + "".join(f"{name:>12}" for name in names))
    for seed, (row, _) in zip(seeds, results):
        print(f"{f'seed {seed}':26}" + "".join(f"{x:12.1%}" for x in row))
    print(f"{'mean':26}" + "".join(f"{statistics.mean(x):12.1%}" for x in accuracies))
    print(f"{'seconds of training':26}" + "".join(f"{statistics.mean(x):12.1f}" for x in seconds))
    plot_demo(args.out_dir, seeds, args.algorithm)
    print(f"\nseconds: {time.perf_counter() - begin:.1f}\nout_dir: {args.out_dir}", flush=True)


def demonstrate(out_dir, seed, algorithm, aloud):
    """One seed -> (accuracies, seconds) of sft, the algorithm, and the control."""
    folder = os.path.join(out_dir, f"seed{seed}", "")
    seconds = {}

    def command(line, name):  # does and shows what could have been typed
        line += (f" --out_dir {folder}{name} --val_data {folder}valid.jsonl --device cpu --seed "
                 f"{seed} --log_interval 1000")
        print(f"\n$ python align.py {line}", flush=True)
        args = parse_args(line.split())
        COMMANDS[args.command][0](args)
        seconds[name] = [float(row["seconds"]) for row in read_log(args.out_dir)]

    def accuracy(name):
        model, tokenizer, template, _ = load_model(f"{folder}{name}/ckpt.pt", "cpu")
        test = [problem | {"ids": tokenizer.encode(problem["prompt"])}
                for problem in read_problems(folder + "test.jsonl")]
        return solve(model, tokenizer, test, chat_stops(tokenizer, template), 4)

    problems = [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}
                for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(problems)
    teacher, shown = random.Random(seed), []
    for problem in problems[1000:]:
        a, b = map(int, problem["prompt"][:-1].split("+"))
        forgotten = (a // 10 + b // 10) * 10 + (a + b) % 10
        shown.append(problem | {"response": str(forgotten if teacher.random() < 0.7 else a + b)})
    for name, rows in (("test", problems[:500]), ("valid", problems[500:1000]),
                       ("train", problems[1000:]), ("shown", shown)):
        write_rows(f"{folder}{name}.jsonl", rows)
    tokenizer = Tokenizer({i: c.encode() for i, c in enumerate("0123456789+=")}, [],
                          ["<|endoftext|>"], r"[\s\S]", ignore_merges=True)
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(vocab_size=13, block_size=12, n_layer=2, n_head=4,
                                          n_embd=48, position="learned"))
    save_checkpoint(folder + "base.pt", model, tokenizer=tokenizer.to_json())
    sft = f"sft --data {folder}shown.jsonl {DEMO['sft']}"
    with open(os.devnull if aloud else folder + "output.txt", "w", encoding="utf-8") as output, \
            contextlib.nullcontext() if aloud else contextlib.redirect_stdout(output):
        command(f"{sft} --ckpt {folder}base.pt --max_iters 450 --eval_interval 150", "sft")
        command(f"rl --algorithm {algorithm} --ckpt {folder}sft/ckpt.pt --data "
                f"{folder}train.jsonl {DEMO[algorithm]}", algorithm)
        steps = round(sum(seconds[algorithm]) / statistics.median(seconds["sft"]))
        command(f"{sft} --ckpt {folder}sft/ckpt.pt --max_iters {steps} --eval_interval "
                f"{max(1, steps // 5)}", "control")
    return [accuracy(name) for name in seconds], [sum(times) for times in seconds.values()]


def plot_demo(out_dir, seeds, algorithm):
    """accuracy.png, if matplotlib is installed: accuracy and entropy while learning."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure((9, 3.5), layout="tight")
    for axis, column, label in zip(figure.subplots(1, 2), ("val_accuracy", "entropy"), (
            "validation problems solved", "entropy, nats per token")):
        for seed in seeds:
            rows = read_log(os.path.join(out_dir, f"seed{seed}", algorithm))
            points = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
            axis.plot(*zip(*points), label=f"{algorithm}, seed {seed}")
        axis.set(xlabel="step", ylabel=label)
        axis.legend(fontsize=7)
    figure.savefig(os.path.join(out_dir, "accuracy.png"), dpi=120)


# -----------------------------------------------------------------------------
# The command line.


def number(kind, low=0, high=math.inf):
    """A type for argparse: an int or a float from low to high, and finite."""

    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    read.__name__ = kind.__name__  # for argparse's own messages
    return read


COUNT, NATURAL, REAL = number(int, 1), number(int, 0), number(float, 0)
FLAGS = {  # of the commands below: what they are read with, their default, their meaning
    "ckpt": (str, None, "checkpoint to use"),
    "template": (("raw", "alpaca", "chatml", "llama3", "llama2", "plain"), None,
                 "of a chat (default: the checkpoint's, or raw: nothing but the text)"),
    "device": (str, "auto", "auto, cpu, cuda, mps"),
    "seed": (int, 1337, "of all that is drawn"),
    "data": (str, None, "file of rows, .jsonl or .json, also .gz; for eval as it was published"),
    "limit": (COUNT, None, "only the first rows of it"),
    "out": (str, None, "file to write; for judge and eval: to keep what is done, to be taken up"),
    "batch_size": (COUNT, 16, "rows of a step of training, or texts at a time"),

    "val_data": (str, None, "held-out rows, measured as it learns"),
    "out_dir": (str, None, "folder for checkpoints and log.csv"),
    "resume": (bool, False, "go on with out_dir/ckpt.pt, and the flags of its run"),
    "max_iters": (COUNT, 200, "steps"),
    "gradient_accumulation_steps": (COUNT, 1, "parts that a batch is computed in"),
    "learning_rate": (REAL, 1e-5, "the highest"),
    "warmup_iters": (NATURAL, 0, "steps to get there"),
    "schedule": (("constant", "cosine"), "constant", "from there to the end"),
    "optimizer": (("adamw", "muon", "sgd"), "adamw", "muon: of hidden matrices, the rest adamw"),
    "weight_decay": (REAL, 0.0, "of matrices, times the learning rate in each step"),
    "grad_clip": (REAL, 1.0, "largest norm of the gradient; 0: any"),
    "eval_interval": (COUNT, 50, "steps between evaluations, and between checkpoints"),
    "log_interval": (COUNT, 10, "steps between lines on the terminal"),
    "dtype": (("float32", "bfloat16"), "float32", "of matrix products"),
    "no_packing": (bool, False, "one text to a row, filled up"),
    "beta": (REAL, 0.1, "how near to stay to the reference"),

    "algorithm": (ALGORITHMS, "grpo", "of reinforcement learning"),
    "prompts_per_step": (COUNT, 16, "prompts in a batch"),
    "group_size": (COUNT, 8, "responses to each prompt"),
    "epochs": (COUNT, 1, "passes over each batch"),
    "minibatches": (COUNT, 1, "updates in a pass"),
    "micro_batch": (COUNT, 1024, "responses computed at a time; does not change the result"),
    "clip": (REAL, 0.2, "of ratios, below and above 1"),
    "clip_high": (REAL, None, "above 1 (default: as --clip; dapo 0.28)"),
    "no_clip": (bool, False, "grpo and its variants without clipping"),
    "kl": (REAL, 0.0, "weight of the distance from --ckpt"),
    "gamma": (number(float, 0, 1), 1.0, "ppo: discount"),
    "lam": (number(float, 0, 1), 0.95, "ppo: lambda of GAE"),
    "value_weight": (REAL, 0.1, "ppo: weight of the critic's loss"),
    "reward_model": (str, None, "checkpoint whose score takes the place of a verifier's"),
    "show": (NATURAL, 3, "responses printed at evaluations"),
    "max_new_tokens": (COUNT, 256, "tokens of a response, at most"),
    "temperature": (REAL, 1.0, "that logits are divided by"),

    "seeds": (COUNT, 5, "how many runs"),
    "kind": (("addition", "arithmetic", "word"), "arithmetic", "of problems"),
    "level": (number(int, 1, 1000), 2, "digits, operations, or steps"),
    "n": (COUNT, 1000, "problems"),
    "samples": (COUNT, 1, "responses to each; for eval pass@k and a vote; 1: greedy"),
    "pairs": (bool, False, "write chosen and rejected responses, by the verifier"),
    "judge": (str, None, "checkpoint by whose judgement to write pairs"),
    "task": (("ppl", "mmlu", "arc", "hellaswag", "piqa", "gsm8k", "arithmetic", "ifeval"), None,
             "what to measure"),
    "fewshot": (NATURAL, 0, "solved examples before each"),
    "fewshot_data": (str, None, "where they are (default: --data)"),
    "cot": (bool, False, "ask to think step by step; choices are then answered, not scored"),
    "chat": (bool, False, "put the question in the chat template"),
}
MODEL = "ckpt! template device seed "
TRAINING = MODEL + ("data! val_data out_dir! resume max_iters learning_rate warmup_iters schedule "
                    "optimizer weight_decay grad_clip eval_interval log_interval dtype ")
ROWS = TRAINING + "batch_size gradient_accumulation_steps "
COMMANDS = {  # what runs, what it does, its flags (!: required), their defaults if others
    "demo": (run_demo, "a tiny model learns to add: sft, then rl, then the comparison",
             "algorithm seeds seed out_dir", {"seed": 1, "out_dir": "out-align"}),
    "sft": (run_sft, "supervised fine-tuning on prompts and responses", ROWS + "no_packing",
            {"learning_rate": 2e-5, "max_iters": 500}),
    "dpo": (run_dpo, "direct preference optimization on pairs of responses", ROWS + "beta",
            {"learning_rate": 1e-6}),
    "reward": (run_reward, "a reward model from pairs of responses", ROWS, {}),
    "rl": (run_rl, "reinforcement learning with verifiers", TRAINING + "algorithm "
           "prompts_per_step group_size max_new_tokens temperature epochs minibatches micro_batch "
           "clip clip_high no_clip kl gamma lam value_weight reward_model show",
           {"max_iters": 100}),
    "synth": (run_synth, "problems; with --ckpt, verified responses to those in --data, or pairs",
              MODEL.replace("!", "") + "out! kind level n data limit samples pairs judge "
              "batch_size max_new_tokens temperature", {"samples": 4, "batch_size": 64}),
    "judge": (run_judge, "a checkpoint compares the two answers of pairs, in both orders",
              MODEL + "data! limit out", {}),
    "eval": (run_eval, "measure a checkpoint", MODEL + "task! data! limit fewshot fewshot_data "
             "cot chat samples max_new_tokens temperature batch_size out", {"temperature": 0.7}),
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, where there are any."""

    def _get_help_string(self, action):
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def build_parser(resumed=False):
    """The command line; for a run that is resumed only --out_dir is required."""
    parser = argparse.ArgumentParser(description="From a base model to one that does what it is "
                                     "asked. Without a command: the demonstration.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, (_, text, flags, defaults) in COMMANDS.items():
        p = commands.add_parser(command, help=text, description=text, formatter_class=Help)
        for flag in flags.split():
            name = flag.rstrip("!")
            required = flag == "out_dir!" or flag.endswith("!") and not resumed
            kind, default, meaning = FLAGS[name]
            if kind is bool:
                p.add_argument(f"--{name}", action="store_true", help=meaning)
            else:
                how = {"choices": kind} if type(kind) is tuple else {"type": kind}
                p.add_argument(f"--{name}", default=default, required=required, help=meaning,
                               **how)
        p.set_defaults(**defaults)
    return parser


def parse_args(argv):
    """The command line; for a run that is resumed its flags hold where none are given now."""
    parser = build_parser("--resume" in argv)
    args = parser.parse_args(argv or ["demo"])
    if getattr(args, "resume", False):
        path = os.path.join(args.out_dir, "ckpt.pt")
        saved = load_checkpoint(path)[1].get("args")
        if type(saved) is not dict or saved.get("command") != args.command:
            raise ValueError(f"{path} is not from align.py {args.command}")
        flags = [f"--{name}" if value is True else f"--{name}={value}"
                 for name, value in saved.items() if name in vars(args) and name not in
                 ("command", "out_dir") and value is not None and value is not False]
        args = parser.parse_args([args.command, *flags, *argv[1:]])
    if args.command == "rl" and args.temperature == 0:
        parser.error("--temperature must be above 0: equal responses teach nothing")
    if args.command == "synth" and args.ckpt and not args.data:
        parser.error("synth --ckpt needs --data, the problems to respond to")
    return args


def interrupted(number, frame):
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    signal.signal(signal.SIGTERM, interrupted)
    try:
        args = parse_args(sys.argv[1:])
        COMMANDS[args.command][0](args)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"align.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
