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

An interrupted training run continues with --resume, which needs only --out_dir. Data is .jsonl or
.json, also as .gz. For sft: `prompt` and `response`, Alpaca's `instruction`, `input`, `output`, or
chats in `messages`; for dpo and reward: `prompt`, `chosen`, `rejected`; for rl: `prompt` and
`answer` (or `tests`, for Python code, or IFEval's `instruction_id_list` and `kwargs`).

Shapes: B responses, T tokens. As in train.py everything is shifted by one: position t of
`input_ids` is what the model reads; position t of `labels`, log-probs and masks is the token that
it should predict there.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import gzip
import inspect
import io
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import socket
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
# Data: from the rows of a file to messages, and from messages to ids.


def read_text(path):
    """The text of a file, decompressed if it is a .gz. Raises ValueError or OSError."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            return file.read().decode()
    except (UnicodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: {error}") from None


def read_rows(path):
    """Rows of a .jsonl file, or of a .json file that is a list -> list of (where, dict), `where`
    being file and line, for error messages. Raises ValueError for malformed rows, or OSError."""
    is_list = path.removesuffix(".gz").endswith(".json")
    rows, where, text = [], path, read_text(path)
    try:
        lines = json.loads(text) if is_list else text.split("\n")
        if type(lines) is not list:
            raise ValueError("it is no list of rows")
        for number, line in enumerate(lines, 1):
            where = f"{path}, {'row' if is_list else 'line'} {number}"
            if is_list or line.strip():
                rows.append((where, line if is_list else json.loads(line)))
                if type(rows[-1][1]) is not dict:
                    raise ValueError("a row must be an object")
    except (ValueError, RecursionError) as error:  # json calls each of our lines "line 1"
        raise ValueError(f"{where}: {str(error).replace('line 1 column', 'column')}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def field(row, where, *names, kind=str):
    """The first of these fields that a row has. Raises ValueError if it has none, or if the value
    is not of type `kind`."""
    for name in names:
        if name in row:
            if type(row[name]) is not kind:
                raise ValueError(f"{where}: {name} must be of type {kind.__name__}")
            return row[name]
    raise ValueError(f"{where}: it has none of the fields {', '.join(names)}")


def to_messages(turns, where):
    """A chat as {"role", "content"} or as ShareGPT's {"from", "value"} -> list of
    {"role": "system", "user" or "assistant", "content": text}"""
    messages = []
    for turn in turns:
        if type(turn) is not dict:
            raise ValueError(f"{where}: a message must be an object")
        role = field(turn, where, "role", "from").lower()
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: a role is system, user or assistant, not {role!r}")
        messages.append({"role": role, "content": field(turn, where, "content", "value")})
    return messages


def prompt_of(row, where):
    """The messages of a row that come before the response."""
    for name in ("messages", "conversations", "prompt"):
        if type(row.get(name)) is list:
            return to_messages(row[name], where)
    text = field(row, where, "instruction", "prompt", "question", "problem")
    if "instruction" in row and row.get("input"):  # Alpaca's
        text += "\n\n" + field(row, where, "input")
    return [{"role": "user", "content": text}]


def keep(items, wanted, what, why):
    """The items for which `wanted`, a list of bool, is true; says how many others are dropped.
    Raises ValueError if none is left."""
    kept = list(itertools.compress(items, wanted))
    if not kept:
        raise ValueError(f"none of {len(items)} {what} can be used: {why}")
    if len(kept) < len(items):
        print(f"{len(items) - len(kept)} of {len(items)} {what} dropped: {why}", flush=True)
    return kept


def read_conversations(path):
    """Data for fine-tuning -> list of chats, each a list of messages of which the last is the
    assistant's. Rows with an empty response are dropped."""
    chats = []
    for where, row in read_rows(path):
        chat = prompt_of(row, where)
        if not {"messages", "conversations"} & set(row):
            text = field(row, where, "response", "output", "completion", "answer")
            chat.append({"role": "assistant", "content": text})
        while chat and chat[-1]["role"] != "assistant":
            chat.pop()
        chats.append(chat)
    full = [chat and all(m["content"].strip() for m in chat if m["role"] == "assistant")
            for chat in chats]
    return keep(chats, full, f"rows of {path}", "a response is missing or empty")


def read_pairs(path):
    """Preference data -> list of (messages, chosen, rejected). Each of the two is a text, a
    message, or a whole dialogue, as messages or as one text as in Anthropic's files. Pairs with an
    empty response, or with twice the same, are dropped."""
    pairs = []
    for where, row in read_rows(path):
        sides = []
        for name in ("chosen", "rejected"):
            side = row.get(name)
            if type(side) is dict:
                side = [side]
            elif "prompt" not in row and type(side) is str and side.startswith("\n\nHuman: "):
                _, *parts = re.split(r"\n\n(Human|Assistant): ?", side)
                side = [{"role": role, "content": text}
                        for role, text in zip(parts[::2], parts[1::2])]
            sides.append(to_messages(side, where) if side and type(side) is list else
                         [{"content": field(row, where, name)}])
        prompt = sides[0][:-1] if len(sides[0]) > 1 else prompt_of(row, where)
        pairs.append((prompt, *(side[-1]["content"] for side in sides)))
    useful = [chosen.strip() and rejected.strip() and chosen != rejected
              for _, chosen, rejected in pairs]
    return keep(pairs, useful, f"pairs of {path}", "a response is empty, or both are the same")


def read_problems(path):
    """Data for reinforcement learning -> list of rows with "messages" added. Of GSM8K's answers
    only what follows #### is kept. Rows with an instruction not in CONSTRAINTS are dropped."""
    problems = []
    for where, row in read_rows(path):
        if not {"answer", "tests", "instruction_id_list", "answerKey"} & set(row):
            raise ValueError(f"{where}: it needs answer, tests or instruction_id_list")
        if "tests" in row:
            tests = row["tests"] if type(row["tests"]) is list else [row["tests"]]
            if not all(type(line) is str for line in tests) or not "".join(tests).strip():
                raise ValueError(f"{where}: tests must be Python code, or lines of it")
        if "instruction_id_list" in row:
            check_instructions(row, where)
        if "answer" in row:
            if type(row["answer"]) not in (int, float):
                field(row, where, "answer")
            row["answer"] = str(row["answer"]).split("####")[-1].strip()
        problems.append(row | {"messages": prompt_of(row, where), "n": 4})
    known = [set(row.get("instruction_id_list", ())) <= set(CONSTRAINTS) for row in problems]
    return keep(problems, known, f"problems of {path}", "an instruction is not known")


def check_instructions(row, where):
    """Raise ValueError unless a row has IFEval's instructions, and arguments that fit each."""
    names = field(row, where, "instruction_id_list", kind=list)
    if not all(type(name) is str for name in names) or \
            len(names) != len(field(row, where, "kwargs", kind=list)):
        raise ValueError(f"{where}: it needs names of instructions, and as many kwargs")
    for name, arguments in zip(names, row["kwargs"]):
        try:
            if name in CONSTRAINTS:
                check_constraint(name, arguments or {}, "text")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def make_template(name, tokenizer):
    """The chat template of this name: chatml, llama3, llama2, plain (see model.py); raw, which
    adds nothing but the end; or alpaca (Taori et al. 2023). A response ends with the tokenizer's
    end-of-text token where the tokenizer lacks the special tokens of the template."""
    raw = {"begin": "", "default_system": "", "system": "{content}\n\n",
           "user": "{content}", "assistant": "{content}"}
    alpaca = {"user": "### Instruction:\n{content}\n\n", "assistant": "### Response:\n{content}",
              "default_system": "Below is an instruction that describes a task. Write a response "
                                "that appropriately completes the request."}
    own = {"raw": raw, "alpaca": raw | alpaca}
    template = own[name] if name in own else chat_template(name)
    tail = template["assistant"].split("{content}")[1]
    if not any(token in tail for token in tokenizer.special_tokens):
        ends = [t for t, i in tokenizer.special_tokens.items() if i == tokenizer.eot_id]
        if not ends:
            raise ValueError("the tokenizer has no end-of-text token: a response could not end")
        template["assistant"] += ends[0]
    return template


def encode_conversation(tokenizer, template, messages, last_only=False):
    """A chat that ends with the assistant's message -> (ids, mask); the mask is 1 for the tokens
    of all that the assistant says (last_only: of its last message), ends included. Unlike in
    `encode_continuation`, a prompt and its response are tokenized separately, since that is how
    it will be when the model writes the response."""
    ids, mask, start = [], [], 0
    later = template | {"begin": "", "default_system": ""}
    end = later | {"assistant": "{content}" + template["assistant"].split("{content}")[1]}
    for i, message in enumerate(messages):
        if i == len(messages) - 1 or message["role"] == "assistant" and not last_only:
            head = encode_chat(tokenizer, later if start else template, messages[start:i])
            tail = encode_chat(tokenizer, end, [message], reply=False)
            ids, mask = ids + head + tail, mask + [0] * len(head) + [1] * len(tail)
            start = i + 1
    return ids, mask


def padded(rows, fill=0, device="cpu", width=1):
    """Lists of ids -> (B, T) int64, T at least `width`. Shorter rows are filled up on the right,
    where causal attention does not see it."""
    width = max([len(row) for row in rows] + [width])
    rows = [row + [fill] * (width - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)


def collate(examples, pad_id=0, device="cpu"):
    """(ids, mask) of B texts -> dict of (B, T) tensors: input_ids and labels, which are the ids
    without the last and without the first, and response_mask, True where the label counts."""
    ids = padded([ids for ids, _ in examples], pad_id, device)
    mask = padded([mask for _, mask in examples], 0, device).bool()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def tokenize_prompts_and_responses(prompts, responses, tokenizer):
    """Lists of B strings -> dict of input_ids, labels (int64) and response_mask (bool), (B, T),
    where T is one less than the longest prompt with its response; see `collate`. The row of an
    empty response has no True. The tokenizer is ours or one of Hugging Face's."""
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
    # Hugging Face's may begin each text with a special token: a response is not a text of its own
    special = "add_special_tokens" in inspect.signature(encode).parameters
    encode_response = functools.partial(encode, add_special_tokens=False) if special else encode
    pads = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "eot_id")]
    examples = []
    for prompt, response in zip(prompts, responses, strict=True):
        a, b = encode(prompt), encode_response(response)
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
    rows = []  # each of four lists, as named below
    fitting = [example for example in examples if 1 < len(example[0]) <= block_size + 1]
    for ids, mask in sorted(fitting, key=lambda example: -len(example[0])):
        # only the last rows are tried: with many texts the others are full
        row = next((row for row in rows[-200:] if len(row[0]) + len(ids) - 1 <= block_size), None)
        if row is None:
            rows.append(row := ([], [], [], []))
        for part, new in zip(row, (ids[:-1], ids[1:], range(len(ids) - 1), mask[1:])):
            part += new
    packed = {name: padded([row[i] for row in rows], pad_id if i < 2 else 0, width=block_size)
              for i, name in enumerate(("input_ids", "labels", "positions", "response_mask"))}
    return packed | {"response_mask": packed["response_mask"].bool(),
                     "dropped": len(examples) - len(fitting)}


@contextlib.contextmanager
def separate_documents(model, positions):
    """Within this context the model reads rows of `pack_sequences`: attention stays inside a text
    (a block-diagonal mask), and positions count from its beginning. positions: (B, T).
    Raises ValueError for kinds of attention that can not be masked so."""
    if others := set(model.kinds) - {"full", "sliding"}:
        raise ValueError(f"{min(others)} attention can not be packed: use --no_packing")
    text = (positions == 0).cumsum(1)
    t = torch.arange(positions.shape[1], device=positions.device)
    mask = (text[:, :, None] == text[:, None]) & (t[:, None] >= t)  # (B, T, T)

    def attend(part, q, k, v):
        near = mask & (t[:, None] - t < part.window) if hasattr(part, "window") else mask
        return F.scaled_dot_product_attention(q, *part.repeat_heads(k, v), near[:, None],
                                              part.dropout if part.training else 0.0)

    parts = [block.attn for block in model.blocks]
    for part in parts:  # an attribute of the object hides the method of its class
        part.attend = functools.partial(attend, part)
    model.embed = lambda ids, at: Transformer.embed(model, ids, positions)
    model.rope = lambda kind, at: Transformer.rope(model, kind, positions)
    try:
        yield
    finally:
        del model.embed, model.rope
        for part in parts:
            del part.attend


# -----------------------------------------------------------------------------
# Log-probabilities, entropy, and means over some of the tokens.


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
    a label is -100, PyTorch's mark for "ignore", log_probs are 0. temperature: that of sampling,
    by which logits were divided."""
    logits = model(input_ids)
    logits = upcast(getattr(logits, "logits", logits)) / temperature
    ignored = labels == -100
    # logit - log Z: no (B, T, V) tensor of log-probabilities is needed
    picked = logits.gather(-1, labels.masked_fill(ignored, 0)[..., None])[..., 0]
    out = {"log_probs": (picked - torch.logsumexp(logits, -1)).masked_fill(ignored, 0.0)}
    if return_token_entropy:
        with torch.no_grad():
            out["token_entropy"] = entropy(logits)
    return out


# -----------------------------------------------------------------------------
# Losses. Each is a scalar to be minimised. With gradient accumulation every part of a batch must
# be divided by the number of tokens of the whole batch, not by its own, or the tokens of a part
# with few would weigh more. That number is `normalizer`: the losses of the parts then add up to
# the loss of the whole.


def sft_loss(log_probs, response_mask, normalizer=None):
    """Mean negative log-likelihood of the responses' tokens: -sum m log p / sum m (Ouyang et al.
    2022, step 1). log_probs, response_mask: (B, T). normalizer: tokens of the whole batch.
    With no token at all the loss is 0."""
    count = response_mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(log_probs, response_mask, normalize_constant=count)


def reward_model_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), mean over pairs: the negative log-likelihood of the
    choices under the model of Bradley & Terry (1952; Ouyang et al. 2022). (B,), (B,) -> scalar"""
    losses = -F.logsigmoid(chosen - rejected)
    return losses.sum() / max(1, losses.numel())


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """-log sigmoid(beta [(log pi_c - log ref_c) - (log pi_r - log ref_r)]), mean over pairs: the
    loss above, of the reward beta log(pi / ref), whose best policy is pi itself (Rafailov et al.
    2023). Each argument: (B,), log-probs of whole responses. ln 2 where pi is the reference."""
    return reward_model_loss(beta * (policy_chosen - reference_chosen),
                             beta * (policy_rejected - reference_rejected))


def kl_estimate(log_probs, reference_log_probs):
    """KL(pi || ref) from one sample of pi: r - log r - 1 with r = ref / pi. Unbiased, and never
    negative (Schulman 2020, k3). Same shapes -> same shape."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def group_advantages(rewards, group_size, eps=1e-6, normalize_std=True):
    """(r - mean) / (std + eps) within each group of responses to one prompt (GRPO: Shao et al.
    2024), or r - mean without normalize_std (Dr. GRPO: Liu et al. 2025). rewards: (B,), those of a
    prompt side by side -> (B,). std is the sample's, over n - 1. A group of equal rewards gets 0.
    Raises ValueError if B is no multiple of group_size."""
    rewards = torch.as_tensor(rewards) * 1.0  # integers, too
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards are no groups of {group_size}")
    groups = rewards.reshape(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    # the mean of equal numbers can be rounded to another number
    same = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantages.masked_fill(same, 0.0).reshape(rewards.shape)


def policy_gradient_loss(policy_log_probs, loss_type, raw_rewards=None, advantages=None,
                         old_log_probs=None, cliprange=None):
    """The loss of each token, whose gradient is an estimate of that of -E[reward].

    no_baseline:              -reward log pi (REINFORCE: Williams 1992)
    reinforce_with_baseline:  -A log pi: the same in expectation, with less variance
    grpo_clip:                -min(r A, clip(r, 1 - low, 1 + high) A), r = pi / pi_old: nothing is
                              gained by leaving the trust region (PPO: Schulman et al. 2017;
                              asymmetric: DAPO, Yu et al. 2025)
    grpo_no_clip:             -r A

    policy_log_probs, old_log_probs: (B, T); raw_rewards, advantages: (B,), (B, 1) or (B, T);
    cliprange: one number, or (low, high). Raises ValueError if what a loss_type needs is missing.
    -> ((B, T), {"clipped": (B, T) of bool, where the clipped term was the smaller})
    """
    given = {"raw_rewards": raw_rewards, "advantages": advantages, "old_log_probs": old_log_probs,
             "cliprange": cliprange}
    needs = {"no_baseline": ["raw_rewards"], "reinforce_with_baseline": ["advantages"],
             "grpo_clip": ["advantages", "old_log_probs", "cliprange"],
             "grpo_no_clip": ["advantages", "old_log_probs"]}
    if loss_type not in needs:
        raise ValueError(f"loss_type must be one of {', '.join(needs)}, not {loss_type!r}")
    if missing := [name for name in needs[loss_type] if given[name] is None]:
        raise ValueError(f"{loss_type} needs {', '.join(missing)}")
    weights = torch.as_tensor(given[needs[loss_type][0]], device=policy_log_probs.device)
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
    """What `grpo_loss` divides by, for a whole batch. response_mask: (B, T)."""
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
    dr_grpo  1/(B max_length) sum m l: long wrong answers are no longer favoured (Liu et al. 2025);
             to be used with advantages that are not divided by their standard deviation
    dapo     sum m l / sum m: each token counts the same (Yu et al. 2025); use clip_high=0.28

    log_probs, old_log_probs, reference_log_probs, response_mask: (B, T); advantages: (B,).
    clip=False: -r A without any clipping. normalizer: that of `grpo_normalizer` for the whole
    batch, if this is a part of it. -> scalar
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

    -min(r A, clip(r, 1 - clip, 1 + clip) A), and with the values of a value function
    + value_weight/2 max((V - R)^2, (V_old + clip(V - V_old, -value_clip, value_clip) - R)^2)

    All but the numbers: (B, T). normalizer: tokens of the whole batch. -> scalar
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
# Verifiers. The model is rewarded for answers that are judged right, so it will find whatever a
# verifier lets through: each reads answers as a stranger's text, within bounds, and counts what it
# can not read as wrong.

MAX_BITS = 4096  # of an exact number; 9^9^9^9 would fill any memory
NUMBER = (r"-?\$?(?:\d+ \d+/\d+|(?:\d[\d,]*\.?\d*|\.\d+)(?:\s?/\s?\d+)?)(?:\\?%)?"
          r"(?: (?:hundred|thousand|million|billion)\b)?")
TOKEN = (r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+\b)?|\\[a-zA-Z]+|\\%|\*\*|"
         r"[-+*/^(){}\[\]%√π]|[a-zA-Z]")
PYTHON = {"{": "(", "}": ")", "^": "**", "\\times": "*", "\\cdot": "*", "\\div": "/",
          "%": "/100", "\\%": "/100", "\\pi": "π", "√": "sqrt", "\\sqrt": "sqrt", "\\frac": "frac"}


def extract_answer(text):
    """The answer that a response gives: what is in its last \\boxed{}, or <answer> tags, or after
    its last ####, or "answer is"; else its last number; else None.

    >>> extract_answer("3 + 4 = 7, so the answer is $7$."), extract_answer("I had 5 and ate 2")
    ('$7$', '2')
    """
    text = text[-20_000:]
    if boxes := re.findall(r"\\(?:boxed|fbox)\s*\{((?:(?!\\boxed|\\fbox).)*)", text, re.S):
        depth = 1
        for i, c in enumerate(boxes[-1]):
            depth += (c == "{") - (c == "}")
            if depth == 0:
                return boxes[-1][:i].strip()
        return None  # it was cut off
    for pattern in (r"(?s:<answer>((?:(?!<answer>).)*?)</answer>)", r"####([^\n]*)",
                    r"(?im)^.*(?:answer\s+is:?|answer:)[ *]*([^\n]+)"):
        if found := re.findall(pattern, text):
            # up to the end of the sentence
            return re.sub(r"(?<=\S)\.(?:\s.*)?$", "", found[-1].strip(), flags=re.S).strip("* ")
    for left, right in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        head, _, after = text.replace("$$", "$").rpartition(right)
        _, begun, formula = head.rpartition(left)
        if begun and re.search(r"[\\^=<>]", formula) and not re.search(r"[\d$]", after):
            return formula  # LaTeX, after which there is no other number
    found = re.findall(NUMBER, text)
    return found[-1].rstrip(",.") if found else None


# What does not change a mathematical answer, and what takes its place. A left side is taken off if
# it is a name, f(x) or arithmetic (x = 5, 3 + 4 = 7); but 2x + z = 1 is not 1.
CLEANING = [(re.compile(pattern, re.S), new) for pattern, new in (
    (r"\\!\s*|(?<=\d)\s*\{,\s*\}\s*(?=\d)", ""), ("−", "-"), (r"\\[cdt]frac", r"\\frac"),
    (r"\\leq?(?![a-z])|≤", "<="), (r"\\geq?(?![a-z])|≥", ">="),
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"), (r"\\approx|≈", "="),
    (r"\\(?:text(?:bf|normal)?|mathrm|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<!\\)\\(?:left|right|q?quad)(?![a-z])|(?<!\\)\\[,;:$ ()\[\]]", " "),
    (r"\^\s*\{?\\circ\}?|[°$£€]", " "),
    (r"(?<=\d)[, ](?=\d{3}(?!\d))", ""),  # 1,000 and 1 000
    (r"(?<=\d) ?hundred\b", "*10^2"), (r"(?<=\d) ?thousand\b", "*10^3"),
    (r"(?<=\d) ?million\b", "*10^6"), (r"(?<=\d) ?billion\b", "*10^9"),
    (r"^\s*[a-zA-Z]\s*\\in(?![a-z])", ""),
    (r"^(?:\s*(?:\\?[a-zA-Z][\w' ]*(?:_\{\w+\})?(?:\([^()]*\))?\s*|"
     r"(?:\\[a-zA-Z]+|[^a-zA-Z=<>])*)(?<!!)=)+", ""),
    # 5 apples, 5 cm; but 2xy and 2 sin x are no units
    (r"(?<=[\d.}%)])(?:\s*(?:[ckm]m|[km]g|m[lLi]|ft|in|lbs?|oz|hrs?|[ap]m|st|nd|rd|th)\b|"
     r"\s*(?!sin|cos|tan|log|sqrt)(?:[a-zA-Z]{4,}|(?<=\s)[a-zA-Z]{3}\b))"
     r"(?:[ /]+[a-zA-Z]+)*\s*$", ""),
    (r"\s+", " "))]


def normalize_answer(text):
    """An answer without what does not change it: $, \\left, thousands separators, units, ...

    >>> normalize_answer(r"$x = 1{,}200 \\text{ apples}$.")
    '1200'
    """
    for kind, rows in re.findall(r"(?s)\\begin\{([bp]?matrix)\}(.*?)\\end\{\1\}", text):
        tuples = [f"({row.replace('&', ',')})" for row in rows.strip().split(r"\\")]
        text = text.replace(rf"\begin{{{kind}}}{rows}\end{{{kind}}}", f"({', '.join(tuples)})")
    for pattern, new in CLEANING:
        text = pattern.sub(new, text)
    return text.lstrip().rstrip(" .")


def to_python(text):
    """An expression in plain or LaTeX notation as one of Python's. Raises ValueError.

    >>> to_python(r"2\\frac{1}{3}"), to_python("2x^{3}"), to_python(r"\\sqrt[3]8")
    ('frac[2](1)(3)', '2*x**(3)', 'sqrt[3](8)')
    """
    text = re.sub(r"(?<![\d.])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"(?<![\d.])(\d+)\s*\\frac", r"\\frac[\1]", text)  # a mixed number: 2 1/3
    # \frac12 is \frac{1}{2}
    text = re.sub(r"((?:\\frac|\\sqrt|√)(?:\[\d+\])?)\s*(\\pi|\w)", r"\1{\2}", text)
    text = re.sub(r"(\\frac(?:\[\d+\])?\{(?:[^{}]|\{[^{}]*\})*\})\s*(\\pi|\w)",
                  r"\1{\2}", text)
    tokens = re.findall(TOKEN, text)
    if len(text) > 1000 or "".join(tokens) != "".join(text.split()) or \
            re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2}|\d\s+\d", text):  # words, two numbers
        raise ValueError("not an expression")
    out = ""
    for token, before in zip(tokens, ["", *tokens]):
        ended = before[-1:].isdigit() or before.isalpha() or before in (")", "}", "\\pi")
        if ended and (token[0].isalnum() or token in ("(", "\\frac", "\\sqrt", "\\pi", "√")):
            out += "*"  # 2x is a product
        out += PYTHON.get(token) or (str(int(token)) if token.isdigit() else token)  # 007
    return out


def size(x):
    """Bits of a Fraction; 0 for a finite float; infinite for nan, inf and complex numbers."""
    if isinstance(x, Fraction):
        return max(map(int.bit_length, x.as_integer_ratio()))
    return 0 if isinstance(x, float) and math.isfinite(x) else math.inf


def power(base, exponent):
    """base ** exponent. Its size is looked at before anything is computed."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if size(base) * abs(exponent) > MAX_BITS:
            raise ValueError("too large")
        return base ** int(exponent)
    return float(base) ** float(exponent)


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: power}


def evaluate(node):
    """The value of a Python expression, as parsed by `ast`, that is arithmetic: a Fraction where
    it is exact, else a float. Single letters stand for arbitrary fixed numbers, so that 2x + 3 and
    3 + 2x come out equal. Raises ValueError for everything else and for what is too large."""
    match node:
        case ast.Constant(int() | float() as number):
            x = Fraction(str(number))
        case ast.Name("π"):
            x = math.pi
        case ast.Name(letter) if len(letter) == 1:
            x = Fraction(ord(letter) ** 5 % 100_003 + 2, 97)
        case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
            x = evaluate(operand) * (1 if isinstance(sign, ast.UAdd) else -1)
        case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
            x = OPERATORS[type(sign)](evaluate(left), evaluate(right))
        case ast.Call(ast.Call(ast.Name("frac"), [top]), [bottom]):
            x = evaluate(top) / evaluate(bottom)
        case ast.Call(ast.Call(ast.Subscript(ast.Name("frac"), whole), [top]), [bottom]):
            x = evaluate(whole) + evaluate(top) / evaluate(bottom)
        case ast.Call(ast.Name("sqrt"), [inside]):
            x = power(evaluate(inside), Fraction(1, 2))
        case ast.Call(ast.Subscript(ast.Name("sqrt"), degree), [inside]):
            x = power(evaluate(inside), 1 / evaluate(degree))
        case _:
            raise ValueError("not arithmetic")
    if size(x) > MAX_BITS:
        raise ValueError("too large, or no real number")
    return x


@functools.lru_cache(10_000)  # the true answer is compared with each response of a group
def math_value(text):
    """The value of a normalized answer, or None. Nothing of it is ever run: Python's parser makes
    a tree of it, of which `evaluate` computes what it knows."""
    try:
        return evaluate(ast.parse(to_python(text), mode="eval").body)
    except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        return None


def same_answer(a, b):
    """Whether two normalized answers are equal: as text, as numbers, or element by element."""
    if len({re.sub(r" (?!\d)|(?<!\d) ", "", text) for text in (a, b)}) == 1:
        return True
    unions = a.split(r"\cup"), b.split(r"\cup")  # of intervals
    if len(unions[0]) == len(unions[1]) > 1:
        return all(same_answer(p.strip(), q.strip()) for p, q in zip(*unions))
    x, y = math_value(a), math_value(b)
    if x is not None and y is not None:
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        with contextlib.suppress(OverflowError):  # a Fraction too large for a float
            return math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12)
        return False
    ends, parts = [], []
    for text in (a, b):  # (1, (2, 3)) -> the ends ( and ), the parts 1 and (2, 3)
        inside = re.fullmatch(r"\\?([(\[{])(.*?)\\?([)\]}])", text) or ["", "", text, ""]
        ends.append((inside[1], inside[3]))
        parts.append([part.strip() for part in re.split(r",(?![^(\[{]*[)\]}])", inside[2])])
    if ends[0] != ends[1] or not 1 < len(parts[0]) == len(parts[1]) <= 50:
        return False
    if ends[0][0] == "{":  # a set, in any order
        return all(any(map(same_answer, [p] * len(others), others))
                   for some, others in (parts, parts[::-1]) for p in some)
    return all(map(same_answer, *parts))


def grade_math(answer, truth):
    """Whether a response, or an answer alone, gives the true answer, both strings: 1/2, 0.5, 50%,
    \\frac{1}{2} and \\boxed{\\tfrac12} are equal, and so are 1,234 and 1234, (1, 2) and (1,2),
    2x+3 and 3+2x."""
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
        # the last number of what is an expression as a whole is not its value: 3 + 4, x > 5
        whole = math_value(normalize_answer(answer)) is not None or \
            not re.search(r"(?<![\w\\}])[a-zA-Z]{2}|[^\W\d_a-zA-Zπ]", answer)
        candidates = [answer] if whole else [answer, *candidates]
    wanted = normalize_answer(truth)
    for candidate in candidates:
        if not candidate or not wanted or len(candidate) > 1000:
            continue
        found = normalize_answer(candidate)
        pairs = [(found, wanted)]
        if ("%" in found) != ("%" in wanted):  # "how many percent": 20 and 20%
            pairs.append([re.sub(r"\\?%", "", text) for text in (found, wanted)])
        if number := re.fullmatch(r"(?:.* (?:is|are|equals) )?(?:[^\W\d_]|[ ,:])*(?<![a-zA-Zπ])"
                                  rf"({NUMBER})(?![a-zA-Zπ])(?:[^\W\d_]|[ ,])*", found):
            pairs.append((normalize_answer(number[1]), wanted))  # words around one number
        if any(same_answer(*pair) for pair in pairs):
            return True
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
        t.lower().count(k["keyword"].strip().lower()), k, "frequency"),
    "keywords:forbidden_words": lambda t, k: not any(
        re.search(rf"\b{re.escape(w)}\b", t, re.I) for w in k["forbidden_words"]),
    "keywords:letter_frequency": lambda t, k: compare(
        t.lower().count(k["letter"].lower()), k, "let_frequency", "let_relation"),
    "length_constraints:number_sentences": lambda t, k: compare(
        len(re.findall(r"[^.!?\s](?:[^.!?]|[.!?](?=\w))*(?:[.!?]+|$)",  # 0.5 is no end
                       re.sub(r"(?m)^[^\S\n]*\d+\.", "", t))), k, "num_sentences"),
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
        len(re.findall(r"^[^\S\n]*(?:\*[^*]|-)", t, re.M)) == k["num_bullets"]),
    "detectable_format:constrained_response": lambda t, k: bool(
        re.search(r"My answer is (yes|no|maybe)\.", t)),
    "detectable_format:number_highlighted_sections": lambda t, k: k["num_highlights"] <= len(
        re.findall(r"\*\*[^\S\n]*[^\s*][^\n*]*\*\*|\*[^\S\n]*[^\s*][^\n*]*\*", t)),
    "detectable_format:multiple_sections": lambda t, k: k["num_sections"] <= len(
        re.findall(rf"{re.escape(k['section_spliter'])}\s?\d+", t)),
    "detectable_format:json_format": lambda t, k: is_json(t),
    "detectable_format:title": lambda t, k: bool(re.search(r"<<[^\S\n]*[^\s>][^\n>]*>>", t)),
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
        raise ValueError(f"the arguments of {name} do not fit: {error!r}") from None


# Model-written code is never run in this process. It is run by two child processes that talk over
# a socket, both without files, network and further processes. One holds the code to be judged. The
# other runs the tests, and has to ask the first for every call; answers are plain values. So the
# code never sees a test, an expected value or the verdict: frames, patched builtins, objects that
# claim to be equal to everything, os._exit(0) and printing are no use. What this source does, in
# turn: load what may be imported, give up all rights, run the code or the tests, and serve.
SANDBOX = r'''
import sys, os, json, resource
import abc, array, bisect, cmath, collections, collections.abc, contextlib, copy, dataclasses
import datetime, decimal, enum, fractions, functools, heapq, io, itertools, math, numbers, operator
import random, re, statistics, string, textwrap, time, types, typing, unicodedata, builtins
import _strptime, calendar, hashlib, keyword, pprint, queue, secrets, struct, traceback

memory, seconds, role = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
modules = {name: module for name, module in sys.modules.items() if "." not in name}
kinds = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, collections.deque,
                                          bytes, bytearray)}
exact = {fractions.Fraction: fractions.Fraction, decimal.Decimal: decimal.Decimal,
         datetime.date: datetime.date.fromisoformat,
         datetime.datetime: datetime.datetime.fromisoformat}  # how to read what str() has written
readers = {kind.__name__: read for kind, read in exact.items()}
most = 1 << 24  # bytes of an answer
told, tell = open(1, "rb"), open(1, "wb")  # the socket


def confine():
    if os.getuid() == 0:  # root is not bound by the number of processes
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    for name, n in (("CORE", 0), ("FSIZE", 1 << 16), ("NPROC", 0), ("AS", memory),
                    ("CPU", seconds), ("NOFILE", 0)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS: memory
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (n, n))

    def hook(event, args):
        # constants only, which the code can not change
        if event not in ("compile", "exec", "builtins.id", "sys._getframe", "time.sleep",
                         "sys._getframemodulename", "object.__getattr__", "object.__setattr__",
                         "object.__delattr__", "builtins.input", "array.__new__", "sys.excepthook",
                         "sys.unraisablehook", "sys._current_frames", "function.__new__") or \
                event == "object.__setattr__" and args[1] == "__code__":
            raise PermissionError(event + " is not allowed here")
    sys.addaudithook(hook)


def load(name, source, names):
    # what `import` does: a module of this name, which has these names from the start
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(names, __builtins__=builtins)
    types.FunctionType(compile(source, name, "exec"), vars(module))()
    return module


def send(*message):
    tell.write(json.dumps(message).encode() + b"\n")
    tell.flush()


def encode(x, number_of):  # for JSON: a plain value as it is, others as [kind, content]
    if x is None or type(x) in (bool, int, float, str):
        return x
    if type(x) is complex:
        return ["complex", [x.real, x.imag]]
    if type(x) in exact:
        return [type(x).__name__, str(x)]
    for name, kind in kinds.items():
        if isinstance(x, kind):
            return [name, [encode(y, number_of) for y in (x.items() if kind is dict else x)]]
    return ["handle", number_of(x)]  # a function or object, which stays where it is


def decode(x, handle):
    if type(x) is not list:
        return x
    kind, content = x
    if kind in kinds:
        return kinds[kind]([decode(y, handle) for y in content])
    if kind in readers:
        return readers[kind](content)
    return handle(content) if kind == "handle" else complex(*content)


def serve():
    # in the process of the code: do what the tests ask for, (operation, arguments, by name)
    objects = []

    def number_of(x):
        objects.append(x)
        return len(objects) - 1

    def names_of(source):
        return {name: x for name, x in vars(load("solution", source, {})).items() if
                type(name) is str and name[:2] != "__" and not isinstance(x, types.ModuleType)}

    operations = {"load": names_of, "getattr": getattr, "setattr": setattr, "list": list,
                  "len": len, "getitem": operator.getitem, "eq": operator.eq, "str": str,
                  "repr": repr, "bool": bool,
                  "call": lambda function, /, *args, **kwargs: function(*args, **kwargs)}
    for line in told:
        try:
            operation, *request = json.loads(line)
            args, kwargs = (decode(x, objects.__getitem__) for x in request)
            result = operations[operation](*args, **kwargs)
            send("ok", encode([result, *args[1:]], number_of))
        except BaseException as error:
            send(type(error).__name__, str(error)[:300])


def number_of(x):
    if type(x) is not Handle:
        raise TypeError("only plain values can be given to the code")
    return x._number


def request(operation, /, *args, **kwargs):
    # in the process of the tests: have the code do something
    send(operation, encode(args, number_of), encode(kwargs, number_of))
    line = told.readline(most)
    if not line.endswith(b"\n"):
        raise SystemExit("the code ended its process" if len(line) < most else "too much")
    status, answer = json.loads(line)
    if status != "ok":
        kind = vars(builtins).get(status)
        known = isinstance(kind, type) and issubclass(kind, Exception) and \
            not issubclass(kind, (UnicodeError, AssertionError, StopIteration))
        raise (kind if known else RuntimeError)(str(answer))
    result, *after = decode(answer, Handle)
    for old, new in zip(args[1:], after):  # what the call did to its arguments
        if isinstance(old, (list, dict, set, collections.deque)):
            old.clear()
            getattr(old, "extend" if hasattr(old, "extend") else "update")(new)
    return result


def ask(handle, operation, /, *args, **kwargs):
    return request(operation, handle, *args, **kwargs)


class Handle:  # stands for a function or object in the process of the code
    def __init__(self, number):
        object.__setattr__(self, "_number", number)

    __getattr__ = functools.partialmethod(ask, "getattr")
    __setattr__ = functools.partialmethod(ask, "setattr")
    __str__ = functools.partialmethod(ask, "str")
    __repr__ = functools.partialmethod(ask, "repr")
    __call__ = functools.partialmethod(ask, "call")
    __len__ = functools.partialmethod(ask, "len")
    __bool__ = functools.partialmethod(ask, "bool")
    __getitem__ = functools.partialmethod(ask, "getitem")
    __hash__ = object.__hash__

    def __iter__(self):
        return iter(ask(self, "list"))

    def __eq__(self, other):  # never equal to a value from here, whatever it claims
        return type(other) is Handle and ask(self, "eq", other) is True


if role == "tests":
    program, source = json.load(sys.stdin)
sys.stdin, sys.stdout = io.StringIO(""), open(os.devnull, "w")
sys.stderr = sys.stdout
confine()
if role == "solution":
    serve()
    os._exit(0)
error = ""
try:
    names = request("load", source)
    load("tests", program, modules | {
        name: value for name, value in names.items()
        if not hasattr(builtins, name) and name not in modules and name[:2] != "__"})
except BaseException as problem:
    error = (type(problem).__name__ + ": " + str(problem))[:300]
os.write(2, json.dumps(error).encode())
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
        raise OSError("code can only be run where the system limits processes: Linux or macOS")
    tests = tests if isinstance(tests, str) else "\n".join(tests)
    command = [sys.executable, "-I", "-S", "-c", SANDBOX, str(memory_mb << 20),
               str(math.ceil(timeout) + 1)]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    started, (ours, theirs) = [], socket.socketpair()
    try:
        with ours, theirs:  # from here on only the children have them
            for role, stdin, stdout, stderr in (("solution", null, ours, null),
                                                ("tests", pipe, theirs, pipe)):
                started.append(subprocess.Popen(
                    [*command, role], cwd="/", env={}, start_new_session=True, stdin=stdin,
                    stdout=stdout, stderr=stderr))
        job = json.dumps([tests, code]).encode()
        error = json.loads(started[1].communicate(job, timeout)[1])
    except subprocess.TimeoutExpired:
        error = "timeout"
    except ValueError:
        error = "the tests did not come to an end"
    finally:
        for process in started:
            with contextlib.suppress(OSError), process:  # which closes its pipes, and waits
                os.killpg(process.pid, signal.SIGKILL)
    return Verdict(error == "", error)


def follows(problem, response, loose=False):
    """Which of the instructions of a row of IFEval a response follows: list of bool."""
    return [check_constraint(name, arguments or {}, response, loose) for name, arguments in
            zip(problem["instruction_id_list"], problem["kwargs"], strict=True)]


def verify(problem, response):
    """The reward, 0 to 1, of a response to a row of `read_problems`: its tests, its instructions
    (the share that is followed), its choices, or its answer. Never raises for what a response
    says."""
    if "tests" in problem:
        fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.S)
        return float(run_code((fenced or [response])[-1], problem["tests"]).passed)
    if "instruction_id_list" in problem:
        return statistics.fmean(follows(problem, response) or [0.0])
    if "answerKey" in problem:
        return float(find_choice(response, problem["n"]) == problem["answerKey"])
    return float(grade_math(response, problem["answer"]))


# A learned verifier: a Transformer with one output per position in place of logits. Its value at
# the last token is the score of a reward model; those at all tokens are PPO's value function.


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
    if kind == "addition":
        a, b = rng.randrange(10**level), rng.randrange(10**level)
        return {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b),
                "level": level}
    value, lines = rng.randrange(1, 20), []
    if kind == "arithmetic":
        steps, text = [f"_ {rng.choice('+-*')} {rng.randrange(2, 10)}" for _ in range(level)], ""
        for step in steps:
            text = step.replace("_", f"({text})" if text else str(value))
        prompt = f"Calculate {text}."
    else:
        text, steps = rng.choice([p for p in WORD_PROBLEMS if len(p[1]) == min(level, 3)])
        drawn = {"n": rng.choice(("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima")),
                 "a": rng.randrange(5, 20), "b": rng.randrange(5, 20), "c": rng.randrange(20, 60),
                 "d": rng.randrange(2, 10), "e": rng.randrange(5, 50)}
        prompt, steps = text.format(**drawn), [step.format(**drawn) for step in steps]
    for step in steps:
        step = step.replace("_", str(value))
        value = math_value(step)
        lines.append(f"{step} = {value}")
    response = "\n".join([*lines, f"#### {value}"])
    return {"prompt": prompt, "response": response, "answer": str(value), "level": level}


def make_problems(kind, level, n, seed):
    """n distinct problems, or fewer if there are no more."""
    rng, problems = random.Random(seed), {}
    for _ in range(50 * n):
        if len(problems) < n:
            problem = make_problem(kind, level, rng)
            problems.setdefault(problem["prompt"], problem)
    return list(problems.values())


# -----------------------------------------------------------------------------
# What all kinds of training have in common.


def write_text(path, text):
    """Write a file that takes its name only once it is whole: a killed run leaves no half."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(f"{path}.tmp", "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise


def write_rows(path, rows):
    """Write dicts as .jsonl."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_log(folder):
    """Rows of log.csv: list of dicts of strings."""
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def show(row):
    """A row of the log, as a line."""
    print(" | ".join(f"{name} {value:.4g}" if type(value) is float else f"{name} {value}"
                     for name, value in row.items()), flush=True)


def load_model(path, device, template=None):
    """-> (model, tokenizer, chat template, checkpoint) of a checkpoint; template: the name of
    another one. Raises ValueError if it can not be trained or talked to."""
    model, checkpoint = load_checkpoint(path, device)
    if not checkpoint.get("tokenizer"):
        raise ValueError(f"{path} holds no tokenizer: it was trained on ids of unknown meaning")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"])
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{path} has a tokenizer of more ids than the model knows")
    own = None if template else checkpoint.get("template")
    return model, tokenizer, own or make_template(template or "raw", tokenizer), checkpoint


def batch_of(items, batch_size, step, seed):
    """Batch number `step`: epochs follow each other, each a permutation of the items that depends
    on seed and epoch alone, so that a run can be resumed."""
    batch = []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(at, len(items))
        if not batch or i == 0:
            order = list(items)
            random.Random(f"{seed} {epoch}").shuffle(order)
        batch.append(order[i])
    return batch


def scheduled(step, args):
    """The learning rate of a step: linear warm-up, then constant or a cosine down to 0."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / (args.warmup_iters + 1)
    if args.schedule == "constant":
        return args.learning_rate
    done = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def optimizers_for(model, args):
    """AdamW, or Muon (written out in train.py) with AdamW for all but the hidden matrices."""
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        muon = args.optimizer == "muon" and name.startswith("blocks.") and "router" not in name
        if p.requires_grad:
            (vectors if p.ndim < 2 else hidden if muon and p.ndim == 2 else matrices).append(p)
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                               {"params": vectors, "weight_decay": 0.0}],
                              args.learning_rate, (0.9, 0.95))
    if not hidden:
        return [adamw]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError("--optimizer muon needs PyTorch 2.9 or later")
    return [torch.optim.Muon(hidden, args.learning_rate, args.weight_decay, 0.95,
                             adjust_lr_fn="match_rms_adamw"), adamw]


class Run:
    """What the commands that train share: the model, from --ckpt or from an interrupted run, its
    tokenizer, template and optimizers, and the loop. Whoever trains further modules adds them to
    `others` and their optimizers to `optimizers`; `more` is saved with the flags."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        torch.manual_seed(args.seed)
        self.path = os.path.join(args.out_dir, "ckpt.pt")
        source = self.path if args.resume else args.ckpt
        self.model, self.tokenizer, self.template, saved = load_model(source, self.device,
                                                                      args.template)
        if self.model.quantized:
            raise ValueError(f"{source} is quantized: train the checkpoint that it was made from")
        self.saved = saved if args.resume else None
        self.stops = chat_stops(self.tokenizer, self.template)
        self.optimizers, self.others, self.more = optimizers_for(self.model, args), [], {}
        self.autocast = functools.partial(torch.autocast, torch.device(self.device).type,
                                          torch.bfloat16, enabled=args.dtype == "bfloat16")

    def log_probs(self, model, batch, **how):
        """`response_log_probs` in the dtype of training."""
        with self.autocast():
            return response_log_probs(model, batch["input_ids"], batch["labels"], **how)

    def update(self, params):
        """One step of the optimizers -> the norm that the gradient of params had."""
        norm = nn.utils.clip_grad_norm_(params, self.args.grad_clip or math.inf).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.model.update_router_bias()
        return norm

    def save(self, step, rows):
        """Write log.csv, then ckpt.pt, which model.py chats with and --resume goes on from. A run
        killed between the two has rows too many, which --resume leaves out."""
        names = dict.fromkeys(name for row in rows for name in row)
        lines = [names, *([row.get(name, "") for name in names] for row in rows)]
        write_text(os.path.join(self.args.out_dir, "log.csv"),
                   "".join(",".join(map(str, line)) + "\n" for line in lines))
        save_checkpoint(self.path, self.model, self.optimizers + self.others, step,
                        args=vars(self.args) | self.more, tokenizer=self.tokenizer.to_json(),
                        template=self.template)

    def fit(self, do_step, evaluate):
        """The loop of every kind of training: learning rate, step, log, evaluation, checkpoint.
        do_step(step) -> metrics, after it has changed the parameters; evaluate() -> metrics.
        SIGINT and SIGTERM end it after a step, and leave a checkpoint."""
        args, rows, stopped, step = self.args, [], [], 0
        if self.saved:
            try:
                for part, state in zip(self.optimizers + self.others, self.saved["optimizer"],
                                       strict=True):
                    part.load_state_dict(state)
                step = int(self.saved["step"])
                rows = [row for row in read_log(args.out_dir) if int(row["step"]) <= step]
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise ValueError(f"{self.path} can not be resumed: {error}") from None
            self.saved = None  # its memory is free again
        else:
            show({"step": 0} | evaluate())
        os.makedirs(args.out_dir, exist_ok=True)
        previous = {s: signal.signal(s, lambda number, _: stopped.append(number))
                    for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while step < args.max_iters and not stopped:
                begin, lr = time.perf_counter(), scheduled(step, args)
                for group in [g for optimizer in self.optimizers for g in optimizer.param_groups]:
                    group["lr"] = lr
                step, row = step + 1, {"step": step + 1} | do_step(step)
                if not all(map(math.isfinite, row.values())):
                    raise ValueError(f"at step {step} the numbers are no longer finite: {row}; try"
                                     " a smaller --learning_rate")
                row |= {"learning_rate": lr, "seconds": time.perf_counter() - begin}
                due = step % args.eval_interval == 0 or step == args.max_iters
                if due and not stopped:
                    row |= evaluate()
                rows.append({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
                if step % args.log_interval == 0 or due or stopped:
                    show(row)
                if due or stopped:
                    self.save(step, rows)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stopped:
            print(f"stopped after step {step}; --resume goes on", flush=True)
            sys.exit(130)


def fit_rows(run, load, measure, count=len):
    """The training of sft, dpo and reward. load(path) -> list of rows; measure(rows) -> dict of
    scalars, means over these rows, of which "loss" is minimised; count(rows): what a mean over
    them is divided by."""
    args = run.args
    data, held_out = load(args.data), load(args.val_data) if args.val_data else []
    print(f"{len(data):,} rows, {len(held_out):,} held out | {run.device}", flush=True)
    params = [p for module in (run.model, *run.others) for p in module.parameters()]

    def average(rows, size):  # in parts of `size` rows, each weighing what it has of the whole
        sums, whole = Counter(), count(rows)
        for i in range(0, len(rows), size):
            found, share = measure(rows[i : i + size]), count(rows[i : i + size]) / whole
            auxiliary = found.pop("auxiliary_loss", 0)  # of mixtures of experts; it is not logged
            if torch.is_grad_enabled():
                ((found["loss"] + auxiliary) * share).backward()
            for name, value in found.items():
                sums[name] += value.item() * share
        return dict(sums)

    def do_step(step):
        rows = batch_of(data, args.batch_size, step, args.seed)
        means = average(rows, -(-len(rows) // args.gradient_accumulation_steps))
        return means | {"grad_norm": run.update(params)}

    @torch.no_grad()
    def evaluate():
        means = average(held_out, args.batch_size)
        return {f"val_{name}": value for name, value in means.items()}

    run.fit(do_step, evaluate)


# -----------------------------------------------------------------------------
# Supervised fine-tuning; preferences by a reward model, and by DPO, which does without.


def run_sft(args):
    """`sft`: learn to answer as the examples do."""
    run = Run(args)
    model, limit = run.model, run.model.config.block_size

    def load(path):
        examples = [encode_conversation(run.tokenizer, run.template, chat)
                    for chat in read_conversations(path)]
        return keep(examples, [0 < len(ids) - 1 <= limit for ids, _ in examples],
                    f"examples of {path}", f"longer than {limit} tokens")

    def tokens(examples):  # how many are to be learned
        return sum(sum(mask[1:]) for _, mask in examples)

    def measure(examples):
        model.train(torch.is_grad_enabled())
        if args.no_packing:
            batch, apart = collate(examples, device=run.device), contextlib.nullcontext()
        else:
            packed = pack_sequences(examples, min(limit, sum(len(ids) for ids, _ in examples)))
            batch = {name: x.to(run.device) for name, x in packed.items() if name != "dropped"}
            apart = separate_documents(model, batch["positions"])
        with apart:
            log_probs = run.log_probs(model, batch)["log_probs"]
        return {"loss": sft_loss(log_probs, batch["response_mask"]),
                "auxiliary_loss": model.auxiliary_loss()}

    fit_rows(run, load, measure, tokens)


def encode_pairs(run, path):
    """Pairs of a file, those that fit -> list of [(ids, mask) of prompt + chosen, of prompt +
    rejected]."""
    pairs = [[encode_conversation(run.tokenizer, run.template,
                                  [*prompt, {"role": "assistant", "content": text}], True)
              for text in sides] for prompt, *sides in read_pairs(path)]
    limit = run.model.config.block_size
    return keep(pairs, [max(len(ids) for ids, _ in pair) - 1 <= limit for pair in pairs],
                f"pairs of {path}", f"longer than {limit} tokens")


def preferences(chosen, rejected):
    """Scores (n,), (n,) -> how often the chosen is greater (a tie is half), and by how much."""
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
    def load(path):  # -> list of (pair, its log-likelihoods by the reference), computed once
        pairs = encode_pairs(run, path)
        found = in_chunks(pairs, args.batch_size, "reference",
                          lambda some: log_likelihoods(reference, some).T.tolist())
        return list(zip(pairs, found))

    def measure(rows):
        policy = log_likelihoods(model, [pair for pair, _ in rows])
        before = torch.tensor([numbers for _, numbers in rows], device=run.device).T
        return {"loss": dpo_loss(*policy, *before, args.beta),
                **preferences(*args.beta * (policy - before).detach()),
                "chosen_log_prob": policy[0].mean(), "rejected_log_prob": policy[1].mean()}

    fit_rows(run, load, measure)


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

    fit_rows(run, functools.partial(encode_pairs, run), measure)


# -----------------------------------------------------------------------------
# Reinforcement learning.

ALGORITHMS = ("reinforce", "ppo", "grpo", "dr_grpo", "dapo", "expert")


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
    """Problems of a file whose prompts leave room for a response -> list with "ids" added."""
    problems, limit = read_problems(path), run.model.config.block_size
    for problem in problems:
        problem["ids"] = encode_chat(run.tokenizer, run.template, problem["messages"])
    room = min(run.args.max_new_tokens, limit // 2)
    return keep(problems, [0 < len(p["ids"]) <= limit - room for p in problems],
                f"problems of {path}", f"their prompts and {room} tokens do not fit into {limit}")


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
        run.optimizers += optimizers_for(critic.body, args)
        run.optimizers.append(torch.optim.AdamW(critic.head.parameters(), weight_decay=0.0))
        run.others = [critic]
    params = [p for optimizer in run.optimizers for group in optimizer.param_groups
              for p in group["params"]]
    # how the tokens of a minibatch are averaged: as in dapo, unless the algorithm says otherwise
    loss_type = algorithm if algorithm in ("grpo", "dr_grpo") else "dapo"
    clip_high = args.clip_high
    if clip_high is None:
        clip_high = 0.28 if algorithm == "dapo" else args.clip
    # with one update a batch, the policy that learns is the one that has written the responses
    on_policy = args.epochs * args.minibatches == 1 and not critic
    examples = []  # (problem, response, reward) to be shown

    def parts(batch):
        for i in range(0, len(batch["input_ids"]), args.micro_batch):
            yield {name: x[i : i + args.micro_batch] for name, x in batch.items()}

    def look(model, part):
        return run.log_probs(model, part, temperature=args.temperature,
                             return_token_entropy=torch.is_grad_enabled())

    def values_of(part):
        with run.autocast():
            return critic(part["input_ids"])

    @torch.no_grad()
    def rollout(step):  # -> a batch with rewards, and its texts as lists of ids
        asked = [p for p in batch_of(problems, args.prompts_per_step, step, args.seed)
                 for _ in range(args.group_size)]
        answers = respond(model, run.tokenizer, [p["ids"] for p in asked], run.stops,
                          args.max_new_tokens, args.temperature, args.seed * 100_003 + step)
        texts, said = zip(*answers)
        batch = collate([(ids, [0] * len(p["ids"]) + [1] * (len(ids) - len(p["ids"])))
                         for p, ids in zip(asked, texts)], device=run.device)
        if reward_model:
            rewards = torch.cat([reward_model.score(texts[i : i + args.micro_batch], run.device)
                                 for i in range(0, len(texts), args.micro_batch)])
        else:
            rewards = torch.tensor([*map(verify, asked, said)], device=run.device)
        examples[:] = list(zip(asked, said, rewards.tolist()))[:: args.group_size]
        return batch | {"rewards": rewards}, texts

    @torch.no_grad()
    def prepare(batch):  # what the losses need to know from before the updates
        found = []
        for part in parts(batch):
            found.append({"old": look(model, part)["log_probs"]} if not on_policy else {})
            if reference:
                found[-1]["reference"] = look(reference, part)["log_probs"]
            if critic:
                found[-1]["values"] = values_of(part)
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
            return ppo_loss(log_probs, old, advantages, mask, values_of(part), part["values"],
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
        return {**sums, "grad_norm": run.update(params)} if sums else {}

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
        prepare(batch)
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
# Long work in chunks that can be resumed; synthetic data and judging by a checkpoint.


def in_chunks(items, size, what, work, path=None, key=None):
    """-> a result for each item; work(chunk) computes those of a chunk. With a path, results are
    appended to that file, a chunk per line, below `key`: a dict, "command" first, of all that they
    depend on. A run with the same key goes on where an interrupted one stopped; another key starts
    anew. Raises ValueError if the file was not written by this command."""
    chunks = []
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
        if sys.stderr.isatty():
            print(f"\r{what}: {len(results):,} of {len(items):,}", file=sys.stderr,
                  end="" if len(results) < len(items) else "\n", flush=True)
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
    problems = [p | {"ids": encode_chat(tokenizer, template, p["messages"])}
                for p in problems[: args.limit]]
    problems = keep(problems, [0 < len(p["ids"]) < model.config.block_size for p in problems],
                    f"prompts of {args.data}", "empty, or longer than the context")

    def rows_for(problem, texts):
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        messages = problem["messages"]
        row = {"prompt": messages if len(messages) > 1 else messages[0]["content"],
               **({"answer": problem["answer"]} if "answer" in problem else {})}
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
        asked = [problem["ids"] for problem in chunk for _ in range(args.samples)]
        answers = iter(respond(model, tokenizer, asked, stops, args.max_new_tokens,
                               args.temperature, args.seed * 100_003 + problems.index(chunk[0])))
        return [rows_for(problem, [next(answers)[1] for _ in range(args.samples)])
                for problem in chunk]

    kept = args.out + ".part"
    found = in_chunks(problems, args.batch_size, "prompts", work, kept, vars(args))
    rows = list(itertools.chain(*found))
    write_rows(args.out, rows)
    os.remove(kept)
    print(f"{args.out}: {len(rows)} rows, for {sum(map(bool, found))} of {len(found)} prompts")


def run_judge(args):
    """`judge`: a checkpoint compares the two answers of each pair of a file."""
    judge = load_model(args.ckpt, pick_device(args.device), args.template)[:3]
    pairs = read_pairs(args.data)[: args.limit]

    def work(chunk):
        return [judge_pair(*judge, messages[-1]["content"], a, b) for messages, a, b in chunk]

    votes = in_chunks(pairs, 16, "pairs", work, args.out, vars(args))
    wins, losses = votes.count(1), votes.count(-1)
    report({"pairs": len(votes), "first_preferred": wins, "second_preferred": losses,
            "undecided": votes.count(0), "win_rate": share([True] * wins + [False] * losses)})


# -----------------------------------------------------------------------------
# Evaluation.


def wilson(k, n, z=1.96):
    """95% confidence interval of a proportion, k of n (Wilson 1927) -> (low, high). Unlike
    p +- z s it stays within 0 and 1, and is not empty for k = 0."""
    if n == 0:
        return 0.0, 1.0
    p, denominator = k / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / denominator
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / denominator
    return max(0.0, middle - half), min(1.0, middle + half)  # of rounding


def share(hits):
    """List of bool -> the proportion of True and its interval: '0.5000 (0.0945 to 0.9055)'."""
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
    """requests: list of (ids, n), from `encode_continuation` -> list of (log p of the last n ids
    given those before, whether each of them is the likeliest). Texts longer than block_size lose
    their beginning. Texts that differ only in their last id are read once."""
    device, limit = model.embedding.weight.device, model.config.block_size
    rows, out = {}, [None] * len(requests)
    for i, (ids, n) in enumerate(requests):
        ids = ids[-(limit + 1) :]
        n = min(n, len(ids) - 1)
        rows.setdefault((tuple(ids[:-1]), n), []).append((i, ids[len(ids) - n :]))
    ordered = sorted(rows.items(), key=lambda row: -len(row[0][0]))  # a batch: of similar lengths
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
    rows, names = [], [path]
    if os.path.isdir(path):
        names = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.endswith(".csv")]
    for name in names:
        subject = re.sub(r"_(dev|val|test)\.csv$", "", os.path.basename(name)).replace("_", " ")
        lines = io.StringIO(read_text(name), newline="")  # cells can hold any other line break
        rows += [(f"{name}, row {i}", {"subject": subject, "cells": cells})
                 for i, cells in enumerate(csv.reader(lines), 1)]
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
    label, header = row.get("label"), {}
    if task == "mmlu":
        cells, texts = row["cells"], list("ABCD")
        if len(cells) != 6 or cells[5] not in texts:
            raise ValueError(f"{where}: it needs a question, four choices, and one of A to D")
        context, label = lettered(cells[0].strip(), cells[1:5]), texts.index(cells[5])
        header = {"header": "The following are multiple choice questions (with answers) about "
                            f"{row['subject']}.\n\n"}
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
        activity, a, b = (field(row, where, name) for name in ("activity_label", "ctx_a", "ctx_b"))
        texts = [f"{activity}: {a} {b.capitalize()}", *field(row, where, "endings", kind=list)]
        context, *texts = (  # without the marks of WikiHow
            re.sub(r"\[.*?\]", "", str(text).strip().replace(" [title]", ". ")).replace("  ", " ")
            for text in texts)
        label = int(label) if str(label).isdecimal() else label
    elif task == "arithmetic" and "completion" in row:  # right if it is the likeliest
        context = field(row, where, "context")
        texts, label = [field(row, where, "completion").strip()], 0
    elif task == "ifeval":
        check_instructions(row, where)
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
            "target": " " + texts[label]} | header


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
    """Put n solved examples (of the same subject, in MMLU) before the context of each item, but
    never the item itself."""
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
    results = in_chunks(items, max(1, args.batch_size // texts), args.task, work, args.out, key)
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
    if "answer" in problems[0]:  # lm-evaluation-harness' two filters
        for name, which, pattern in (("strict_match", 0, r"#### (-?[0-9.,]+)"),
                                     ("flexible_extract", -1, r"-?[$0-9.,]{2,}|-?[0-9]+")):
            said = [(re.findall(pattern, texts[0]) or [""])[which] for texts in results]
            values[name] = share([re.sub(r"[,$]|\.$", "", a) == re.sub(r"[,$]|\.$", "", b)
                                  for a, b in zip(said, (p["answer"] for p in problems))])
    if n == 1:
        return values
    for k in sorted({2**j for j in range(n.bit_length())} | {n}):
        values[f"pass@{k}"] = f"{statistics.mean(pass_at_k(n, sum(h), k) for h in right):.4f}"
    votes = []
    for problem, texts in zip(problems, results):
        said = [find_choice(text, problem["n"]) if "answerKey" in problem else
                normalize_answer((extract_answer(text) or "")[:1000]) for text in texts]
        most = Counter(filter(None, said)).most_common(1)
        votes.append(bool(most) and verify(problem, most[0][0]) >= 1)
    return values | {f"majority@{n}": share(votes)}


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
    found = in_chunks(requests, 8 * args.batch_size, "windows",
                      lambda chunk: score(model, chunk, args.batch_size), args.out, key)
    total, tokens = -sum(p for p, _ in found), sum(n for _, n in requests)
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return {"tokens": tokens, "loss": f"{total / tokens:.4f}",
            "perplexity": f"{math.exp(min(700, total / tokens)):.4f}",
            "word_perplexity": f"{math.exp(min(700, total / words)):.4f}",
            "bits_per_byte": f"{total / math.log(2) / size:.4f}"}


# -----------------------------------------------------------------------------
# The demonstration.

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
    begin = time.perf_counter()
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [(args.out_dir, seed, args.algorithm, seed == args.seed) for seed in seeds]
    with get_context("spawn").Pool(min(2, args.seeds), torch.set_num_threads, (1,)) as pool:
        results = pool.starmap(demonstrate, jobs, chunksize=1)
    means = [[statistics.mean(column) for column in zip(*table)] for table in zip(*results)]
    table = [("held-out problems solved", ["sft", args.algorithm, "control"], ">12"),
             *((f"seed {seed}", row, "12.1%") for seed, (row, _) in zip(seeds, results)),
             ("mean", means[0], "12.1%"), ("seconds of training", means[1], "12.1f")]
    print()
    for title, cells, form in table:
        print(f"{title:26}" + "".join(f"{cell:{form}}" for cell in cells))
    plot_demo(args.out_dir, seeds, args.algorithm)
    print(f"\nseconds: {time.perf_counter() - begin:.1f}\nout_dir: {args.out_dir}", flush=True)


def demonstrate(out_dir, seed, algorithm, aloud):
    """One seed -> (accuracies, seconds) of sft, the algorithm, and the control. Its output is
    shown if `aloud`, else written to output.txt."""
    folder = os.path.join(out_dir, f"seed{seed}", "")
    accuracies, seconds = [], {}
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
    test = [problem | {"ids": tokenizer.encode(problem["prompt"]), "n": 4}
            for problem in problems[:500]]

    def command(name, line):  # does and shows what could have been typed
        line += (f" --out_dir {folder}{name} --val_data {folder}valid.jsonl --device cpu --seed "
                 f"{seed} --log_interval 1000")
        print(f"\n$ python align.py {line}", flush=True)
        args = parse_args(line.split())
        COMMANDS[args.command][0](args)
        seconds[name] = [float(row["seconds"]) for row in read_log(args.out_dir)]
        trained = load_model(f"{folder}{name}/ckpt.pt", "cpu")[0]
        accuracies.append(solve(trained, tokenizer, test, {tokenizer.eot_id}, 4))

    sft = f"sft --data {folder}shown.jsonl {DEMO['sft']}"
    with open(os.devnull if aloud else folder + "output.txt", "w", encoding="utf-8") as output, \
            contextlib.redirect_stdout(sys.stdout if aloud else output):
        command("sft", f"{sft} --ckpt {folder}base.pt --max_iters 450 --eval_interval 150")
        command(algorithm, f"rl --algorithm {algorithm} --ckpt {folder}sft/ckpt.pt --data "
                           f"{folder}train.jsonl {DEMO[algorithm]}")
        steps = round(sum(seconds[algorithm]) / statistics.median(seconds["sft"]))
        command("control", f"{sft} --ckpt {folder}sft/ckpt.pt --max_iters {steps} "
                           f"--eval_interval {max(1, steps // 5)}")
    return accuracies, [sum(times) for times in seconds.values()]


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
    "optimizer": (("adamw", "muon"), "adamw", "muon: of hidden matrices, the rest adamw"),
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


def build_parser(resumed=False):
    """The command line; to resume a run only --out_dir is required."""
    parser = argparse.ArgumentParser(description="From a base model to one that does what it is "
                                     "asked. Without a command: the demonstration.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command, (_, text, flags, defaults) in COMMANDS.items():
        p = commands.add_parser(command, help=text, description=text)
        for flag in flags.split():
            name = flag.rstrip("!")
            kind, default, meaning = FLAGS[name]
            default = defaults.get(name, default)
            if kind is bool:
                p.add_argument(f"--{name}", action="store_true", help=meaning)
                continue
            p.add_argument(f"--{name}", default=default, help=meaning if default is None else
                           f"{meaning} (default: {default})",
                           required=flag == "out_dir!" or flag.endswith("!") and not resumed,
                           **{"choices" if type(kind) is tuple else "type": kind})
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


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        try:
            args = parse_args(sys.argv[1:])
            COMMANDS[args.command][0](args)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, csv.Error) as error:
        print(f"align.py: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
