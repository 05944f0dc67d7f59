"""
From a base model to one that does what it is asked: fine-tuning, preferences, reinforcement
learning with verifiers, and evaluation. Each command's flags: python align.py COMMAND --help.

    python align.py                            # a demonstration on a CPU: see `run_demo`
    python align.py sft --ckpt out/ckpt.pt --data chats.jsonl --template chatml --out_dir out-sft
    python align.py dpo --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-dpo   # or reward
    python align.py rl --algorithm grpo --ckpt out-sft/ckpt.pt --data problems.jsonl --out_dir rl
    python align.py synth --kind word --level 2 --n 1000 --out problems.jsonl         # or judge
    python align.py eval --task gsm8k --ckpt smol.pt --chat --data test.jsonl --limit 100

Training goes on with --resume --out_dir DIR. Data is .jsonl or .json, also .gz. For sft: `prompt`
and `response`; Alpaca's `instruction`, `input`, `output`; or `messages` of `role` and `content`.
For dpo and reward: `prompt`, `chosen`, `rejected`. For rl: `prompt` and `answer`; or `tests`, lines
of Python or objects of `input` and `output`; or IFEval's `instruction_id_list` and `kwargs`.
Shapes: B responses, T tokens, V vocabulary. Position t of `input_ids` is what the model reads; of
`labels`, log-probs and masks: what comes next.
"""

import argparse
import ast
import cmath
import contextlib
import csv
import functools
import gzip
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import torch

from bpe import Tokenizer
from model import (SWITCH, TEMPLATES, Transformer, TransformerConfig, chat_stops, encode_chat,
                   load_checkpoint, pick_device, replacing, save_checkpoint)
from train import AdamW, clip_grad_norm, get_lr, make_optimizers

# -----------------------------------------------------------------------------
# Data: from the rows of a file to messages, and from messages to ids.


def read_rows(path, make):
    """make(row) of each row of a .jsonl, .json (a list), .csv or .txt file (documents) -> list
    without None. Raises ValueError, with the row, where it fails, or if nothing is left."""
    kind, made, number = os.path.splitext(path.removesuffix(".gz"))[1], [], 0
    split = {".json": json.loads, ".txt": lambda text: text.split("<|endoftext|>"),
             ".csv": lambda text: filter(None, csv.reader(re.split("(?<=\n)", text)))}
    lines = kind in (".jsonl", ".ndjson")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode()
        for number, row in enumerate(text.split("\n") if lines else split[kind](text), 1):
            if not lines or row.strip():
                made.append(make(json.loads(row) if lines else row))
    except Exception as error:
        raise ValueError(f"{path}, row {number}: {error!r:.200}") from None
    if None in made or not made:
        print(f"{made.count(None)} of {len(made)} rows of {path} dropped: empty, unknown, too long")
    if made.count(None) == len(made):
        raise ValueError(f"{path} holds no row that can be used")
    return [item for item in made if item is not None]


def field(row, *names):
    """The first of these fields that a row has, a text or a list of parts -> text"""
    value = row[next((name for name in names if name in row), " or ".join(names))]
    return value if type(value) is str else "".join(part["text"] for part in value)


def read_prompt(row):
    """The messages of a row, those before the response if this has a field of its own."""
    chat = row.get("messages", row.get("prompt"))
    if type(chat) is list and "role" in chat[0]:
        return [{"role": message["role"], "content": field(message, "content")} for message in chat]
    more = "\n\n" + row["input"] if "instruction" in row and row.get("input") else ""  # Alpaca's
    return [{"role": "user", "content":
             field(row, "instruction", "prompt", "question", "problem") + more}]


def read_chat(row):
    """A row for fine-tuning -> messages, of which the last is the assistant's, or None."""
    chat = read_prompt(row)
    if "messages" not in row:
        text = field(row, "response", "output", "completion", "answer")
        chat.append({"role": "assistant", "content": text})
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    said = [message["content"].strip() for message in chat if message["role"] == "assistant"]
    return chat if said and all(said) else None


def read_pair(row):
    """A row of preferences -> (messages, chosen, rejected), or None if these are empty or equal.
    They are texts, or messages, of which the last is the response."""
    chats = [row[name] if type(row[name]) is list else [{"content": row[name]}]
             for name in ("chosen", "rejected")]
    texts = [field(chat[-1], "content") for chat in chats]
    prompt = read_prompt({"prompt": chats[0][:-1]} if len(chats[0]) > 1 else row)
    return (prompt, *texts) if all(map(str.strip, texts)) and texts[0] != texts[1] else None


def read_problem(row):
    """A row for reinforcement learning -> row with "messages", or None where an instruction is not
    known. What a verifier can not read raises an error."""
    if "tests" in row:
        row = row | {"tests": row["tests"] if type(row["tests"]) is list else [row["tests"]]}
        if type(row["tests"][0]) is dict:
            [test[name].split() for test in row["tests"] for name in ("input", "output")]
        elif not ast.parse("\n".join(row["tests"])).body:
            raise ValueError("tests are empty")
    elif "instruction_id_list" in row:
        if not set(row["instruction_id_list"]) <= set(CONSTRAINTS):
            return None
        follows(row, "text")
    else:
        row = row | {"answer": str(row["answer"]).split("####")[-1].strip()}
        found = read(row["answer"], False)
        if found[0] == "text" and not re.fullmatch(r"[^\\(){}\[\]=]+", found[1]):
            raise ValueError(f"no answer that can be verified: {row['answer']!r:.80}")
    return row | {"messages": read_prompt(row)}


def encode_conversation(tokenizer, template, messages, last=0, ends=None, **names):
    """-> list of (ids, mask); the mask is 1 where the assistant speaks (last=1: for the last time),
    ends included. A further example begins wherever the template changes what was said before, as
    Qwen3's leaves old thoughts out. Prompts are tokenized as for a model that is to respond."""
    encode = functools.partial(encode_chat, tokenizer, template, **names)
    ends, ids, mask, examples = ends or chat_stops(tokenizer, template, **names), [], [], []
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"][-last:]:
        prompt, whole = encode(messages[:i]), encode(messages[: i + 1], False) + ends[:1]
        start = len(os.path.commonprefix([prompt, whole]))
        if start < len(prompt):  # once there is a reply, the template writes another prompt
            other = encode([*messages[:i], messages[i] | {"content": "\ue000"}], False)
            start = len(os.path.commonprefix([other, whole]))
        end = next((k + 1 for k in range(start, len(whole)) if whole[k] in ends), len(whole))
        if whole[:start][: len(ids)] != ids:
            examples, mask = [*examples, (ids, mask)], []
        ids, mask = whole[:end], mask + [0] * (start - len(mask)) + [1] * (end - start)
    return [*examples, (ids, mask)]


def padded(rows, fill, width, device="cpu"):
    """Lists of numbers -> (B, width) int64; causal attention does not see what fills the right."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows],
                        dtype=torch.int64, device=device).view(-1, width)


def collate(examples, pad_id=0, device="cpu"):
    """(ids, mask) of B texts -> dict of (B, T) tensors: input_ids and labels, the ids without the
    last and without the first, and response_mask, True where the label counts."""
    width = max([len(ids) for ids, _ in examples] + [1])
    ids = padded([ids for ids, _ in examples], pad_id, width, device)
    mask = padded([mask for _, mask in examples], 0, width, device).bool()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}


def tokenize_prompts_and_responses(prompts, responses, tokenizer):
    """Lists of B strings -> dict of `collate`, where T is one less than the longest prompt with its
    response. The tokenizer is ours, or Hugging Face's, which may begin a prompt with a token."""
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
    how = {} if hasattr(tokenizer, "encode_ordinary") else {"add_special_tokens": False}
    pairs = [(encode(a), encode(b, **how)) for a, b in zip(prompts, responses, strict=True)]
    pads = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "eot_id"))
    return collate([(a + b, [0] * len(a) + [1] * len(b)) for a, b in pairs],
                   next((i for i in pads if i is not None), 0))


def pack_sequences(examples, block_size, pad_id=0):
    """Put several texts, (ids, mask) as in `collate`, in one row, so that little is padding -> dict
    of (N, block_size) tensors: input_ids, labels, response_mask, and positions, which start again
    from 0 with each text (and each id of padding): the model keeps texts apart by them. "dropped":
    how many texts are too long. The longest come first, each into the first row where it fits.

    >>> p = pack_sequences([([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], 4)
    >>> p["input_ids"].tolist(), p["labels"].tolist(), p["positions"].tolist()
    ([[5, 6, 8, 0]], [[6, 7, 9, 0]], [[0, 1, 0, 0]])"""
    rows = []  # each of four lists
    fitting = [example for example in examples if 1 < len(example[0]) <= block_size + 1]
    for ids, mask in sorted(fitting, key=lambda example: -len(example[0])):
        row = next((row for row in rows if len(row[0]) + len(ids) - 1 <= block_size), None)
        if row is None:
            rows.append(row := ([], [], [], []))
        for part, new in zip(row, (ids[:-1], ids[1:], range(len(ids) - 1), mask[1:])):
            part += new
    ids, labels, positions, mask = (padded([row[i] for row in rows], fill, block_size)
                                    for i, fill in enumerate((pad_id, pad_id, 0, 0)))
    return {"input_ids": ids, "labels": labels, "positions": positions,
            "response_mask": mask.bool(), "dropped": len(examples) - len(fitting)}


# -----------------------------------------------------------------------------
# Log-probabilities, entropy, and means over some of the tokens.


def masked_sum(tensor, mask, dim=None, normalize_constant=1.0):
    """Sum of the elements where mask is true, along dim or over all, over normalize_constant."""
    kept = torch.where(mask.bool(), tensor, torch.zeros_like(tensor))  # a product would keep NaN
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def masked_mean(tensor, mask, dim=None):
    """Mean of the elements where mask is true, along dim or over all; 0 where there are none."""
    tensor, mask = torch.broadcast_tensors(tensor, mask.bool())
    return masked_sum(tensor, mask, dim) / masked_sum(mask.long(), mask, dim).clamp(min=1)


def entropy(logits):
    """Entropy in nats of the softmax of the last dimension, -sum p log p. (..., V) -> (...)"""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # 0 log 0 is 0


def response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0,
                       positions=None):
    """log p(label_t | input_ids up to t), for every position -> {"log_probs": (B, T)} and, if
    asked for, "token_entropy": (B, T), without gradient. input_ids, labels: (B, T) int64; log_probs
    are 0 where a label is -100, PyTorch's mark for "ignore". temperature: that of sampling, by
    which logits were divided. positions: of packed texts. The model is ours or Hugging Face's."""
    logits = model(input_ids) if positions is None else model(input_ids, positions=positions)
    logits = getattr(logits, "logits", logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    out = {"log_probs": picked.masked_fill(labels == -100, 0.0)}
    return out | ({"token_entropy": entropy(logits.detach())} if return_token_entropy else {})


def sequence_log_probs(model, input_ids, labels, response_mask):
    """log p of each whole response given its prompt. (B, T) each, see `collate` -> (B,)"""
    return masked_sum(response_log_probs(model, input_ids, labels)["log_probs"], response_mask, 1)


# -----------------------------------------------------------------------------
# Losses. A batch can be computed in parts. Were the loss of a part a mean over its own tokens,
# those of a part with few would weigh more; so losses are sums of weight x loss, with weights made
# for the whole batch, and what the parts give adds up to the loss of the whole.


def sft_loss(log_probs, response_mask, normalizer=None):
    """Mean negative log-likelihood of the responses' tokens (Ouyang et al. 2022, step 1); 0 without
    any. log_probs, response_mask: (B, T). normalizer: tokens of the whole batch."""
    count = response_mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(log_probs, response_mask, normalize_constant=count)


def reward_model_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), mean over pairs: the negative log-likelihood of the
    choices under the model of Bradley & Terry (1952; Ouyang et al. 2022). (B,), (B,) -> scalar"""
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum() / max(1, chosen.numel())


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """-log sigmoid(beta [(log pi_c - log ref_c) - (log pi_r - log ref_r)]), mean over pairs: the
    loss above, of the reward beta log(pi / ref), whose best policy is pi itself (Rafailov et al.
    2023). Each argument: (B,), of `sequence_log_probs`. ln 2 where pi is the reference."""
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
    prompt side by side -> (B,). std is over n - 1. A group of equal rewards gets 0. Raises
    ValueError for a reward that is no number, RuntimeError for B no multiple of group_size."""
    groups = torch.as_tensor(rewards).reshape(-1, group_size) * 1.0  # integers, too
    if not groups.isfinite().all():
        raise ValueError("a reward is not a finite number")
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # means are rounded
    return advantages.masked_fill(equal, 0.0).reshape(-1)


def gae(rewards, values, gamma=1.0, lam=0.95, mask=None):
    """Generalised advantage estimation (Schulman et al. 2015), from the last token to the first:

    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}

    rewards, values: (B, T); mask: (B, T), the tokens of the response; what lies between them, a
    tool's result, is passed over. -> advantages, returns A + V: (B, T), 0 outside of the mask."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    advantages, values = torch.zeros_like(values), values.masked_fill(~mask, 0.0)
    next_value = next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta, said = rewards[:, t] + gamma * next_value - values[:, t], mask[:, t]
        next_advantage = torch.where(said, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(said, values[:, t], next_value)
        advantages[:, t] = next_advantage * said
    return advantages, advantages + values


def token_weights(mask, average="token", longest=1):
    """What each token counts for in the loss of a batch. mask: (B, T), its responses -> (B, T).

    token     1 / number of tokens: all count the same (DAPO: Yu et al. 2025; fine-tuning; PPO)
    response  1 / (B length of its response): all responses do (GRPO: Shao et al. 2024)
    constant  1 / (B longest): long wrong answers gain nothing (Dr. GRPO: Liu et al. 2025)"""
    mask = mask * 1.0
    if average == "response":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return mask / (len(mask) * longest if average == "constant" else mask.sum().clamp(min=1))


def policy_loss(log_probs, advantages, old_log_probs=None, clip=None):
    """The loss of each token, whose gradient is an estimate of that of -E[reward]:

    -A log pi                                without old_log_probs (REINFORCE: Williams 1992)
    -r A                                     with them; r = pi / pi_old
    -min(r A, clip(r, 1 - low, 1 + high) A)  with clip, a number or (low, high): nothing is gained
        by leaving the trust region (PPO: Schulman et al. 2017; asymmetric: DAPO, Yu et al. 2025)

    log_probs, old_log_probs: (B, T); advantages: (B,), (B, 1) or (B, T) -> (B, T)"""
    advantages = torch.as_tensor(advantages, device=log_probs.device)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    if old_log_probs is None:
        return -advantages * log_probs
    ratio = (log_probs - old_log_probs).exp()
    if clip is None:
        return -ratio * advantages
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_loss(values, old_values, returns, clip=0.2):
    """Of a value function, 1/2 max((V - R)^2, (V_old + clip(V - V_old) - R)^2) for each token
    (Schulman et al. 2017; Stiennon et al. 2020). All (B, T) -> (B, T)"""
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


# -----------------------------------------------------------------------------
# Verifiers. The model is rewarded for answers that are judged right, so it will find whatever they
# let through: what can not be read is wrong. First, of mathematics: answers are read into a number
# with its unit, a list, a tuple or interval, a matrix, or an equation, and these are compared.

SEED = random.SystemRandom().random()  # of the values of letters: no response can know them
UNITS = {word: words.split()[0] for words in (  # each word for a unit -> the unit
    "mm millimeter,cm centimeter,m meter,km kilometer,in inch inche,ft foot feet,yd yard,mi mile,"
    "g gram,kg kilogram,lb pound,oz ounce,s sec second,min minute,h hr hour,day,week,month,year,"
    "$ dollar,cent,% percent,° degree,L liter,mL,mph,people person,men,women,children").split(",")
    for word in words.split()}
UNIT = (  # a letter apart, a word of the table, or any plural that is not itself a number
    r"(?:(?<=[\s/])[msghL]|(?:" + "|".join(sorted(map(re.escape, UNITS), key=len)[::-1]) +
    r")s?|(?!(?:dozen|pair|hal[fv]e|quarter|third|time|plu|minu|les|hundred|thousand|[mb]illion)s|"
    r"\w*ths\b)[a-z]{2,}(?<!s)s)(?![a-z])")
UNIT = re.compile(rf"(.*[\d)}}π!])\s*(square |cubic )?({UNIT})(?:\s*(?:/| per )\s*({UNIT}))?"
                  r"\s*(?:\^?([23]))?")
FUNCTIONS = {name: getattr(cmath, {"ln": "log", "log": "log10"}.get(name, name.replace("arc", "a")))
             for name in "exp sin cos tan arcsin arccos arctan ln log".split()}
FUNCTION = rf"\\?(?:sqrt|{'|'.join(FUNCTIONS)})(?![a-z])|√"
LETTER = (r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega)(?![a-z]))"
          r"(?:_(?:\w|\{\w+\}))?'*")
NAME = re.compile(rf"\s*{LETTER}\s*(?:\([^()=]*\))?\s*")  # x, f(x), \theta
NAMES = re.compile(rf"(?!(?i:not?)\b)(?:{LETTER}|[|(){{}},\s])+")  # |AB|, (x, y)
SIGNS = dict(pair.split() for pair in (
    "pi π,infty ∞,le ≤,leq ≤,ge ≥,geq ≥,lt <,gt >,ne ≠,neq ≠,in ∈,cup ∪,pm ±,mp ∓,lvert |,rvert |,"
    "vert |,emptyset ∅,varnothing ∅,cdot *,times *,div /,degree °").split(","))
CLEANING = [(re.compile(pattern, re.S), new) for pattern, new in (  # what changes no answer
    (r"\\begin\{([bp]?matrix)\}(.*?)\\end\{\1\}", lambda found: "⟦" + re.sub(
        r"\\\\", ";", found[2].replace("&", ",")).strip("; \n") + "⟧"),
    (r"\\\$|^\$(?=[^$]*$)", "¤"), (r"(?<=\d)(?:\{,\}|\\,|,\\!)\s*(?=\d{3})", ","),
    (r"\$|\\[()\[\]!]|\\(?:left|right|displaystyle|angle)(?![a-z])", ""),
    (r"\\[,;: ]|(?<!^)~|\\q?quad(?![a-z])", " "), (r"\\(?:overline|vec)(?=\{[a-zA-Z]+\})", ""),
    (r"\\(?:text|math|mbox|boldsymbol)[a-z]*\s*\{([^{}]*)\}", r" \1 "), (r"\\%", "%"),
    (rf"\\({'|'.join(SIGNS)})(?![a-z])", lambda found: SIGNS[found[1]]),
    (r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?", "°"), (r"(?<![\\a-zA-Z])pi(?![a-z])", "π"), ("−", "-"),
    ("<=", "≤"), (">=", "≥"), ("!=", "≠"), (r"\\\{\s*\\\}", "∅"), (r"\\\{", "⦃"), (r"\\\}", "⦄"),
    (r"\\[cdt](frac|binom)", r"\\\1"), (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),
    (r"(?<![\d.^_])(\d+)(?:\s+(\d+)/(\d+)|\s*\\frac\{(\d+)\}\{(\d+)\})", lambda found: (
        "({}+{}/{})" if int(found[2] or found[4]) < int(found[3] or found[5]) else "({}*{}/{})"
        ).format(*filter(None, found.groups()))),  # 1 1/2; but 1\frac{3}{2} is a product
    (r"(?<=\d)\s*million(?![a-z])", "*10^6"), (r"([_^])\{(\w)\}", r"\1\2"), (r"\+(?=∞)", ""),
    (r"(?<![\\a-zA-Z])[A-Z][a-z]+(?![a-zA-Z])", lambda found: found[0].lower()))]  # Yes


def extract_answer(text):
    """What follows a response's last \\boxed{; without one, its last <answer>, #### or "answer is";
    without any mark, all of it, so that prose is no answer."""
    if len(parts := re.split(r"\\f?box(?:ed)?\s*\{", text)) > 1:
        depth = list(itertools.accumulate(((c == "{") - (c == "}") for c in parts[-1]), initial=1))
        return parts[-1][: depth.index(0) - 1] if 0 in depth else ""  # or it was cut off
    for mark, end in (("<answer>", "</answer>"), ("####", r"\n"),
                      (r"(?i:answer\**(?: is|:))", r"\n|\.\s|\.$")):
        if len(parts := re.split(mark, text)) > 1:
            return re.split(end, parts[-1].strip(" \n:*"))[0].strip(" *")
    return text


def parse(text, point):
    """The value of an expression in plain or LaTeX notation, a Fraction or complex, or an error.
    Letters have random values. Each level of precedence is a function (recursive descent)."""
    at = bars = 0

    def take(pattern):  # what comes next, if it is such
        nonlocal at
        if found := re.compile(rf"\s*({pattern})").match(text, at):
            at = found.end()
            return found[1]

    def raised(x, y):  # exact where that is short
        if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
            if abs(y) * max(map(int.bit_length, x.as_integer_ratio())) < 4000:
                return x ** int(y)
        return complex(x) ** complex(y)

    def small(x):  # an integer whose factorial can be computed, or -1, which has none
        return int(x) if x == int(x) <= 100 else -1

    def total():
        sign, x = take("[+-]?"), product()
        x = -x if sign == "-" else x
        while sign := take("[+-]"):
            x += product() if sign == "+" else -product()
        return x

    def product():
        x, signs = power(), r"\*(?!\*)|/|(?=[a-zA-Zπ(√]|\\[a-z]|\{(?!\s*\d)|(?<=π )\d)"
        signs += "" if bars else r"|(?=\|)"
        while (sign := take(signs)) is not None:  # 2x is a product, too
            x = x / power() if sign == "/" else x * power()
        return x

    def power():
        x = atom()
        while sign := take(r"!|°|\^|\*\*"):
            if sign in "!°":
                x = Fraction(math.factorial(small(x))) if sign == "!" else x * math.pi / 180
            else:
                x = raised(x, -power() if take("-") else power())
        return x

    def function(name):
        if name in ("sqrt", "√"):
            degree, x = atom() if take(r"(?=\[)") is not None else Fraction(2), atom(r"\d")
            odd = degree % 2 == 1 and isinstance(x, Fraction) and x < 0
            return -raised(-x, 1 / degree) if odd else raised(x, 1 / degree)
        base, exponent = (atom() if take(sign) else None for sign in ("_", r"\^"))  # log_2, sin^2
        x = power()
        while take(rf"(?!{FUNCTION})(?=[a-zA-Zπ]|\\frac)") is not None:
            x *= power()  # sin 2x
        x = FUNCTIONS[name](x) / (FUNCTIONS[name](base) if base else 1)
        return raised(x, exponent or Fraction(1))

    def atom(number=r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d\d?(?!\d))?"):
        nonlocal bars
        if digits := take(number):
            return Fraction(digits)
        if name := take(r"\\frac|\\binom"):
            x, y = atom(r"\d"), atom(r"\d")
            return x / y if name == "\\frac" else Fraction(math.comb(small(x), small(y)))
        if name := take(FUNCTION):
            return function(name.strip("\\"))
        if name := take(LETTER + "|π"):
            value = random.Random(f"{SEED} {name} {point}").randrange(2 * 10**6, 3 * 10**6)
            value = Fraction(-value if point == 2 else value, 10**6 + 3)
            return {"π": math.pi, "e": math.e, "i": 1j}.get(name, value)
        bracket = take(r"[({\[]" if bars else r"[({\[|]")
        bars, outer = bracket == "|", bars
        x, bars = total() if bracket else None, outer
        x = abs(x) if bracket == "|" else x
        return x if take(re.escape(")}]|"["({[|".index(bracket)])) else None  # a TypeError later

    x = total()
    if at < len(text.rstrip()) or not (isinstance(x, Fraction) or cmath.isfinite(x)):
        raise ValueError("no expression")
    return x


@functools.lru_cache(10_000)
def math_value(text):
    """The values of an expression at two choices of positive letters, one of negative; or None."""
    for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}", text):  # no product of letters
        if not (word.isupper() or re.fullmatch(f"{FUNCTION}|[^eiou]{{3}}", word)):
            return None
    with contextlib.suppress(ValueError, TypeError, ArithmeticError, RecursionError):
        return [parse(text, point) for point in range(3)] if len(text) <= 1000 else None


def close(x, y):
    """Whether two numbers are equal: fractions exactly, others nearly."""
    exact = isinstance(x, Fraction) and isinstance(y, Fraction)
    return x == y if exact else cmath.isclose(x, y, rel_tol=1e-10, abs_tol=1e-14)


def split(text, pattern):
    """The pieces of a text between matches of a pattern outside of all brackets (and its group)."""
    depths = [0, *itertools.accumulate((c in "([{⦃⟦") - (c in ")]}⦄⟧") for c in text)]
    found, start = [], 0
    for match in re.finditer(pattern, text):
        if depths[match.start()] == 0:
            found += [text[start : match.start()], *match.groups()]
            start = match.end()
    return [*found, text[start:]]


@functools.lru_cache(10_000)  # the true answer is compared with each response of a group
def read(text, literal):
    """An answer as (kind, its parts). literal: 1,000 is two numbers and 5 m a product."""
    for pattern, new in CLEANING:
        text = pattern.sub(new, text)
    text = text.strip(" *\n\t").removesuffix(".").rstrip().lstrip("= ")
    word = "text", text.replace(" ", "")
    comma = "," if literal else r"(?!(?<=\d)(?<!\d{4}),\d{3}(?!\d)),"
    both = rf"\s*{comma}?\s*(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|{comma}"
    pieces = [piece.translate(str.maketrans("±∓", signs)) for piece in split(text, both)
              for signs in (("+-", "-+") if re.search("^[^⦃{]*[±∓]", piece) else ("±∓",))]  # ±12
    for kind, some in ("union", split(text, "∪")), ("list", pieces):
        if len(some) > 1:
            some = [read(piece, literal) for piece in some]
            ranges = all(x[0] == "=" and x[3][0] in ("()", "[]", "(]", "[)") for x in some)
            return "union" if ranges and "or" in text else kind, some  # x < 1 or x > 2
    if len(some := split(text, "([=<>≤≥≠∈])")) > 1:
        return relation(some[::2], some[1::2], literal) or word
    if text[-1:] in tuple(")]}⦄⟧") and split(text, "(?!^)") == [text, ""]:  # brackets around it
        inner = text[1:-1]
        if text[0] == "⟦":
            return "⟦⟧", [("row", [read(x, True) for x in split(row, ",")])
                          for row in split(inner, ";")]
        some = split(inner, ",")
        if len(some) == 1 and text[0] in "({":
            return read(inner, literal)
        if text[0] in "{⦃":
            found = read(inner, True)
            return found if found[0] == "list" else ("list", [found])
        return text[0] + text[-1], [read(x, True) for x in some]
    number, unit = text, ""
    if not literal and not re.search(r"[(\[{]", text):
        number = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if number[:1] == "¤":
        number, unit = number[1:], "$"
    elif not literal and (found := UNIT.fullmatch(number)):
        number, size, unit, per, power = found.groups()
        names = [UNITS.get(x, UNITS.get(x.rstrip("s"), x)) for x in (unit, per) if x]
        unit = "/".join(names) + ({"square ": "2", "cubic ": "3"}.get(size, power) or "")
    values = math_value(number)
    return ("value", values, unit) if values else word


def relation(sides, signs, literal):
    """x = 5 as ("=", "x", left minus right, 5), x < 3 as x in an interval, or None."""
    name = [NAME.fullmatch(side) for side in sides]
    if set(signs) == {"="}:
        sides = sides[::-1] if name[-1] and not name[0] else sides
        first, *rest = [read(side, literal) for side in sides]
        if not all(same(x, rest[-1]) for x in rest + [first] * (not is_free(first))):
            return None  # 5 = 6
        if not is_free(first):
            return first
        gap = first[0] == rest[-1][0] == "value" and [x - y for x, y in zip(first[1], rest[-1][1])]
        return "=", sides[0].strip(), gap, rest[-1]
    if signs == ["∈"]:
        return "=", sides[0].strip(), None, read(sides[1], literal)
    if set(signs) <= set(">≥"):
        sides, name, signs = sides[::-1], name[::-1], [{">": "<", "≥": "≤"}[x] for x in signs[::-1]]
    if len(sides) == 2 and signs[0] in "<≤" and any(name):  # a side without end
        sides, name, signs = (["-∞", *sides], [None, *name], ["<", *signs]) if name[0] else (
            [*sides, "∞"], [*name, None], [*signs, "<"])
    if set(signs) <= set("<≤") and len(sides) == 3 and name[1]:
        kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
        return "=", sides[1].strip(), None, (kind, [read(sides[0], True), read(sides[2], True)])
    return "".join(signs), [read(side, literal) for side in sides]


def is_free(answer):
    """Whether an answer is of letters, without a value of its own: a + b, (x, y)."""
    return not close(*answer[1][:2]) if answer[0] == "value" else (
        answer[0] == "()" and all(map(is_free, answer[1])))


def same(a, b):
    """Whether an answer gives the true one, both as read() returns them."""
    if a[0] == b[0] == "=":
        if a[2] and b[2]:  # equal up to a factor
            return all(a[2] + b[2]) and all(
                close(a[2][i] * b[2][0], a[2][0] * b[2][i]) for i in (1, 2))
        return a[1] == b[1] and same(a[3], b[3])
    if a[0] == "=":  # x = 5 and AB = 5 give 5; 2x = 5 and -x = 5 do not
        names = NAMES.fullmatch(a[1]) and len(set(re.findall(LETTER, a[1]))) > 1
        return bool(NAME.fullmatch(a[1]) or names and not is_free(a[3])) and same(a[3], b)
    if b[0] == "=":
        return bool(NAME.fullmatch(b[1])) and same(a, b[3])
    if a[0] == "list" != b[0] and len(a[1]) == 1:
        return same(a[1][0], b)
    if a[0] != b[0] or a[0] == "text":
        return a == b != ("text", "")
    if a[0] == "value":  # at negative letters roots may differ
        points = 3 if all(isinstance(x[1][2], Fraction) or x[1][2].imag == 0 for x in (a, b)) else 2
        share = 100 if a[2] == "%" and not b[2] and abs(a[1][0]) <= 100 and abs(b[1][0]) <= 1 else 1
        return (not a[2] or not b[2] or a[2] == b[2]) and all(
            close(x, y * share) for x, y in zip(a[1][:points], b[1]))
    if len(a[1]) == len(b[1]) and a[0] not in ("list", "union"):
        return all(map(same, a[1], b[1]))
    rest = list(b[1])  # in any order
    for x in a[1]:
        if (i := next((i for i, y in enumerate(rest) if same(x, y)), None)) is None:
            return False
        del rest[i]
    return not rest


def grade_math(response, truth):
    """Whether a response, or an answer alone, gives the true answer, both strings."""
    if not isinstance(response, str) or not isinstance(truth, str):
        return False
    answer = extract_answer(response[-20_000:])
    truth = extract_answer(truth) if re.search(r"####|\\boxed", truth) else truth
    if answer == truth != "":  # often, and fast
        return True
    with contextlib.suppress(ArithmeticError, RecursionError):
        return len(answer) <= 1000 and any(
            same(read(answer, way), read(truth, way)) for way in (False, True))
    return False


LETTERS = "ABCDEFGHIJ"


def find_choice(response, n=4):
    """The letter, of the first n, that a response chooses: after a mark (\\boxed, "the answer is"),
    at its beginning ("B. because"), or as its last word ("it must be C"); else None. No choice are
    letters side by side, negated ones, and A and I as words."""
    end = (r"(?=[).:,;*\"'$}\]<\n]|\s*$|\s+because\b)"
           rf"(?!\W{{0,9}}(?:or|and)\b|[\s,/()&]*[{LETTERS[:n]}]\b)")
    letter = rf"\W{{0,9}}([{LETTERS[:n]}])"
    marks = r"(?:\\boxed(?:\{\\text\w*)?|####|<answer>|(?i:answer|choice|option)(?i:\s+is|:))"
    last = r"(?<!not )(?<!n't )(?<!never )\b(?i:is|be|choose|pick)" + letter + r"\W*$"
    for pattern in marks + letter + end, "^" + letter + end.replace(r"\s+because\b", "$"), last:
        if found := re.findall(pattern, response[-20_000:]):
            return found[-1]
    return None


def sentences(text):
    """How many: the points of titles and initials end none, nor those of abbreviations (p.m.) and
    decimals where no capital follows, nor those of a numbered list."""
    text = re.sub(r"(?m)^[^\S\n]*\d+\.|\b(?:Mrs?|Ms|Dr|Prof|St|Jr|Sr|vs|[A-HJ-Z])\.(?=\s)|"
                  r"\b(?:etc\.|(?:[a-zA-Z]\.){2,})(?!\s+[A-Z])", "", text)
    return len(re.findall(r"[^.!?\s](?:[^.!?]|[.!?](?=\w))*(?:[.!?]+|$)", text))


def compare(count, k, number, relation="relation"):
    """IFEval's "at least" and "less than", by the arguments of these names."""
    return count >= k[number] if k[relation] == "at least" else count < k[number]


CONSTRAINTS = {  # of IFEval (Zhou et al. 2023): functions of the response t and of arguments k
    "keywords:existence": lambda t, k: all(w.lower() in t.lower() for w in k["keywords"]),
    "keywords:forbidden_words": lambda t, k: not any(
        re.search(rf"\b{re.escape(w)}\b", t, re.I) for w in k["forbidden_words"]),
    "keywords:frequency": lambda t, k: compare(
        t.lower().count(k["keyword"].strip().lower()), k, "frequency"),
    "keywords:letter_frequency": lambda t, k: compare(
        t.lower().count(k["letter"].lower()), k, "let_frequency", "let_relation"),
    "length_constraints:number_sentences": lambda t, k: compare(sentences(t), k, "num_sentences"),
    "length_constraints:number_words": lambda t, k: compare(len(t.split()), k, "num_words"),
    "detectable_format:number_bullet_lists": lambda t, k: k["num_bullets"] == len(
        re.findall(r"^[^\S\n]*(?:\*[^*]|-)", t, re.M)),
    "detectable_content:number_placeholders": lambda t, k: k["num_placeholders"] <= len(
        re.findall(r"\[[^\]]*\]", t)),
    "startend:end_checker": lambda t, k: t.strip(' \n"').lower().endswith(
        k["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, k: bool(re.fullmatch(r'\s*".*"\s*', t, re.S)),
    "change_case:english_capital": lambda t, k: t.isupper(),
    "change_case:english_lowercase": lambda t, k: t.islower(),
    "punctuation:no_comma": lambda t, k: "," not in t}


def follows(problem, response, loose=False):
    """Which of the instructions of a row of IFEval a response follows -> list of bool. loose:
    whether it would without its first or last line, or without asterisks."""
    n = len(lines := response.split("\n"))
    texts = ["\n".join(lines[i:j]) for i, j in ((0, n), (1, n), (0, n - 1), (1, n - 1))]
    texts = [*texts, *(text.replace("*", "") for text in texts)] if loose else [response]
    return [any(text.strip() and CONSTRAINTS[name](text, k or {}) for text in texts)
            for name, k in zip(problem["instruction_id_list"], problem["kwargs"], strict=True)]


# Code of a model is never run in this process, nor beside its tests. Another process splits in two,
# both without files, network and further processes: one holds the code; the other reads the tests,
# and asks the first for every call. What they exchange are literals, as text. So the code never
# sees a test, an expected value or the verdict, and an object that claims to be equal to
# everything, os._exit(0) and printing are no use.
SANDBOX = r'''
import ast, contextlib, ctypes, io, json, os, platform, resource, socket, struct, sys
import bisect, builtins, cmath, collections, copy, dataclasses, datetime, decimal, enum, fractions
import functools, hashlib, heapq, itertools, math, operator, random, re, statistics, string
import textwrap, time, typing, _strptime

seconds, memory, (code, program) = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
names = {name: module for name, module in sys.modules.items() if "." not in name}
sys.stdout, ends, null = open(os.devnull, "w"), socket.socketpair(), os.open(os.devnull, os.O_RDWR)
holds_code = os.fork() == 0  # from here on two processes; this one holds the code, or reads tests
ends[not holds_code].close()
link = ends[holds_code].detach()
told, tell = open(link, "rb"), open(link, "wb")
tests = "" if holds_code else sys.stdin.read()
if holds_code:
    for number in range(3):
        os.dup2(null, number)


def confine():  # -> whether the system can take away system calls, beside other rights
    with contextlib.suppress(OSError):
        if os.getuid() == 0:  # root is not bound by the number of processes
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    for name, n in ("CORE", 0), ("FSIZE", 0), ("NPROC", 0), ("AS", memory), ("CPU", seconds), (
            "NOFILE", 0):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # macOS: memory
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (n, n))
    # read write close mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap
    # madvise getpid exit futex clock_gettime clock_nanosleep exit_group getrandom: no others
    kind, *calls = {
        "x86_64": (0xC000003E, 0, 1, 3, 9, 10, 11, 12, 13, 14, 15, 25, 28, 39, 60, 202, 228, 230,
                   231, 318),
        "aarch64": (0xC00000B7, 63, 64, 57, 222, 226, 215, 214, 134, 135, 139, 216, 233, 172, 93,
                    98, 113, 115, 94, 278)}.get(platform.machine(), (0,))
    if sys.platform != "linux" or not calls:
        return False
    rules = [(0x20, 0, 0, 4), (0x15, 1, 0, kind), (6, 0, 0, 0), (0x20, 0, 0, 0),
             *((0x15, len(calls) - i, 0, n) for i, n in enumerate(calls)),
             (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]  # refuse: EPERM; allow
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    filter = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None).prctl  # no new rights; then a filter of system calls, by seccomp
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, filter, 0, 0) == 0


def hook(event, args):  # where there is no filter this is better than nothing
    if event.split(".")[0] in ("open", "os", "subprocess", "socket", "ctypes", "code") or (
            event == "object.__setattr__" and args[1] == "__code__"):
        raise PermissionError(event + " is not allowed here")


def plain(x):  # as what a literal can write: a Counter is a dict, a generator a list
    for kind in (dict, list, tuple, set):
        if isinstance(x, kind):
            return kind(map(plain, x.items() if kind is dict else x))
    return x if type(x) in (str, bytes) or not hasattr(x, "__iter__") else plain(list(x))


def send(*message):
    tell.write(repr(plain(message)).encode() + b"\n")
    tell.flush()


def answer(work, /, *args, **kwargs):
    try:
        send("ok", work(*args, **kwargs), args)
    except BaseException as error:
        send(type(error).__name__, str(error)[:300], ())


def hear():
    line = told.readline(1 << 24)
    if line[-1:] != b"\n":
        raise SystemExit("the code ended its process")
    status, value, after = ast.literal_eval(line.decode())
    if status != "ok":
        kind = vars(builtins).get(status)
        kind = kind if isinstance(kind, type) and issubclass(kind, (
            ValueError, TypeError, LookupError, ArithmeticError)) else RuntimeError
        raise kind(value)
    return value, after


def ask(name, *args, **kwargs):
    send(name, args, kwargs)
    value, after = hear()
    for old, new in zip(args, after):  # what the call did to its arguments
        if type(old) is list:
            old[:] = new
    return value


def run(text):  # the code as a program, with this as its input
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    out = sys.stdout = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with contextlib.suppress(SystemExit):
        exec(compile(code, "solution", "exec"), {"__name__": "__main__"})
    return out.buffer.getvalue().decode()


confined = confine()
sys.addaudithook(hook)
del sys.modules["ctypes"], sys.modules["socket"]
if holds_code:
    names = {"__name__": "solution", "run": run}
    answer(lambda: exec("" if program else code, names) or list(names))
    for line in told:
        name, args, kwargs = ast.literal_eval(line.decode())
        answer(lambda *args, **kwargs: names[name](*args, **kwargs), *args, **kwargs)
    os._exit(0)
try:
    names |= {name: functools.partial(ask, name) for name in hear()[0]
              if name[:1] != "_" and not hasattr(builtins, name)}
    exec(compile(tests, "tests", "exec"), names)
    verdict = ""
except BaseException as error:
    verdict = (type(error).__name__ + ": " + str(error))[:300]
os.write(2, json.dumps([confined, verdict]).encode())
os._exit(0)
'''


class Verdict(NamedTuple):
    """Of `run_code`; true where the tests passed. error: why not ("timeout", or the exception)."""

    passed: bool
    error: str

    def __bool__(self):
        return self.passed


def run_code(code, tests, timeout=5.0, memory_mb=512):
    """Run Python code of a stranger and then tests of it, source or a list of lines such as
    `assert f(1) == 2`; or a list of {"input", "output"}, where the code is a program that reads and
    prints -> `Verdict`. Together they get `timeout` seconds, each memory_mb megabytes, and a part
    of the standard library (see SANDBOX). Functions take and give literals: numbers, strings,
    lists, tuples, dicts, sets. On Linux (x86-64, aarch64) 19 system calls are left to them; on
    macOS only limits hold, and a warning says so."""
    tests = [tests] if isinstance(tests, str) else tests
    program = not isinstance(tests[0], str)
    if program:
        tests = [f"assert run({t['input']!r}).split() == {t['output']!r}.split()" for t in tests]
    job = json.dumps([code[:20_000], program])  # words of a command line have a largest size
    limits, pipe = [str(int(timeout) + 2), str(memory_mb << 20)], subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", SANDBOX, *limits, job], cwd="/",
                             env={}, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe,
                             start_new_session=True)
    try:
        confined, error = json.loads(child.communicate("\n".join(tests).encode(), timeout)[1])
        if not confined:
            warnings.warn("on this system only limits of resources confine code")
    except subprocess.TimeoutExpired:
        error = "timeout"
    except ValueError:
        error = "the tests did not come to an end"
    finally:
        with contextlib.suppress(OSError), child:
            os.killpg(child.pid, signal.SIGKILL)
    return Verdict(not error, error)


def verify(problem, response):
    """The reward, 0 to 1, of a response to a row of `read_problem`: its tests, its instructions
    (the share that is followed), its choice, or its answer."""
    if "tests" in problem:
        fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.S)
        return float(run_code((fenced or [response])[-1], problem["tests"]).passed)
    if "instruction_id_list" in problem:
        return statistics.fmean(follows(problem, response))
    if "answerKey" in problem:
        return float(find_choice(response, problem["n"]) == problem["answerKey"])
    return float(grade_math(response, problem["answer"]))


class ScalarModel(torch.nn.Module):
    """A learned verifier: a Transformer with one output per position in place of logits. Its value
    at the last token is a reward model's score; those at all tokens are PPO's value function.
    body: a Transformer; head: (1, C), 0 at first, so that all rewards begin equal."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, torch.nn.Linear(body.config.n_embd, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)
        self.to(body.embedding.weight.device)

    def forward(self, input_ids):  # (B, T) -> (B, T)
        return self.head(self.body(input_ids, hidden=True).float())[..., 0]

    def score(self, texts):
        """Rewards of whole texts, a list of B lists of ids -> (B,)"""
        device = self.head.weight.device
        last = torch.tensor([[len(ids) - 1] for ids in texts], device=device)
        return self(padded(texts, 0, max(map(len, texts)), device)).gather(1, last)[:, 0]


@torch.no_grad()
def judge_pair(judge, question, a, b):
    """A checkpoint as judge of two answers (Zheng et al. 2023): which of the letters A and B is
    likelier to follow, asked in both orders, since models favour a place. -> 1 if a is preferred
    both times, -1 if b is, 0 if the verdict depends on the order, or they are too long."""
    letters, votes = [judge.tokenizer.encode_ordinary(letter)[0] for letter in "AB"], []
    for first, second in ((a, b), (b, a)):
        ids = judge.encode([{"role": "user", "content": (
            f"Question: {question}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nWhich answer is "
            "better? Reply with A or B only.")}])
        if len(ids) > judge.model.config.block_size:
            return 0
        logits = judge.model(torch.tensor([ids], device=judge.device), last=1)[0, 0, letters]
        votes.append((logits[0] > logits[1]).item())
    return votes[0] - votes[1]


# -----------------------------------------------------------------------------
# Synthetic data: problems that a program makes, and so can solve.

WORD_PROBLEMS = (  # text and steps: letters are drawn, _ is the result of the last step
    ("Ana has {a} apples and buys {b} more. How many apples does she have?", "{a}+{b}"),
    ("Dora buys {d} books at {a} dollars each and pays with {c}00 dollars. How many dollars does "
     "she get back?", "{d}*{a};{c}00-_"),
    ("A farm has {d} fields with {a} rows each, and each row gives {b} pumpkins. Emil sells {c} of "
     "them. How many pumpkins are left?", "{d}*{a};_*{b};_-{c}"))


def make_problem(kind, level, rng):
    """A problem with its solution: {"prompt", "response", "answer"}. addition: a+b= with numbers of
    up to `level` digits, answered without a word; arithmetic: `level` operations, worked out one by
    one; word: a story of min(level, 3) calculations. rng: random.Random."""
    if kind == "addition":
        a, b = rng.randrange(10**level), rng.randrange(10**level)
        return {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}
    drawn = {"a": rng.randrange(5, 20), "b": rng.randrange(5, 20), "c": rng.randrange(20, 60),
             "d": rng.randrange(2, 10)}
    text, steps = (part.format(**drawn) for part in WORD_PROBLEMS[min(level, 3) - 1])
    steps, value, lines = steps.split(";"), "", []
    if kind == "arithmetic":
        steps = [f"_ {rng.choice('+-*')} {rng.randrange(2, 10)}" for _ in range(level)]
        steps[0] = steps[0].replace("_", str(drawn["a"]))
        text = functools.reduce(lambda inner, step: step.replace("_", f"({inner})"), steps)
        text = f"Calculate {text}."
    for step in steps:
        step = step.replace("_", value)
        value = str(math_value(step)[0])
        lines.append(f"{step} = {value}")
    return {"prompt": text, "response": "\n".join([*lines, f"#### {value}"]), "answer": value}


# -----------------------------------------------------------------------------
# A checkpoint that can be talked to, and a tool that it can use.

RAW = ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n\n' if "
       "m.role == 'system' }}{% endfor %}")  # the template of models that have none
CALL = re.compile(r"<<([^<>=\n]+)=([^<>\n]*>>|$)")  # of the calculator, and its result


class Assistant:
    """What args (ckpt, device, template, max_new_tokens, batch_size, tool) name: model, tokenizer,
    chat template, and `stops`, the ids that end what it says."""

    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        self.model, self.saved = load_checkpoint(args.ckpt, self.device)
        self.tokenizer = Tokenizer.from_json(self.saved.get("tokenizer") or "{}")
        end = self.tokenizer.decode([i for i in [self.tokenizer.eot_id] if i is not None])
        self.names = self.saved.get("names") or {"bos_token": end, "eos_token": end}
        self.template = TEMPLATES.get(args.template) or self.saved.get("template") or RAW
        self.stops = chat_stops(self.tokenizer, self.template, **self.names)
        self.stops += self.saved.get("stop") or []
        if not self.stops:
            raise ValueError(f"{args.ckpt}: no token of its tokenizer ends a text")

    def encode(self, messages):
        """Ids of a conversation up to where the assistant speaks next."""
        return encode_chat(self.tokenizer, self.template, messages, **self.names)

    def examples(self, messages, last=0):
        """`encode_conversation`, where what a tool has written is not to be learned."""
        found = encode_conversation(self.tokenizer, self.template, messages, last, self.stops,
                                    **self.names)
        for ids, mask in found if self.args.tool else ():
            texts = [self.tokenizer.decode([i]) for i in ids]
            starts = list(itertools.accumulate(map(len, texts), initial=0))
            for call in CALL.finditer("".join(texts)):
                mask[:] = [m * (not call.start(2) <= at < call.end(2))
                           for m, at in zip(mask, starts)]
        return found

    def text(self, ids):
        """Decode what the tokenizer knows, without an end."""
        return self.tokenizer.decode([i for i in ids if i in self.tokenizer.vocab
                                      and i not in self.stops])

    def respond(self, prompts, temperature, seed=0):
        """Sample a response to each of the prompts, lists of ids -> list of (ids with the prompt,
        mask, text of the response). At temperature 0: greedy. Where the model has written <<48/2=
        and has a tool, this writes 24>>, and the model goes on; the mask is 0 there."""
        texts, masks = [list(ids) for ids in prompts], [[0] * len(ids) for ids in prompts]
        ends = [min(len(ids) + self.args.max_new_tokens, self.model.config.block_size)
                for ids in prompts]
        calls = {i for i, x in self.tokenizer.vocab.items() if self.args.tool and x[-1:] == b"="}
        for first in range(0, len(prompts), self.args.batch_size):
            generator = torch.Generator(self.device).manual_seed(seed * 1_000_003 + first)
            rows = list(range(first, min(first + self.args.batch_size, len(prompts))))
            progress("responses", rows[-1] + 1, len(prompts))
            while rows:
                new = self.model.generate(
                    [texts[i] for i in rows], [max(0, ends[i] - len(texts[i])) for i in rows],
                    temperature, stop={*self.stops, *calls}, generator=generator)
                for i, ids in zip(rows, new):
                    call = None
                    if ids[-1] in calls:  # what follows may be the tool's
                        call = re.search(CALL.pattern + "$", self.text(ids[len(prompts[i]) :]))
                    masks[i] += [1] * (len(ids) - len(masks[i]))
                    if call:
                        ids += self.tokenizer.encode_ordinary(f"{calculate(call[1])}>>")
                        del ids[ends[i] :]
                        masks[i] += [0] * (len(ids) - len(masks[i]))
                    texts[i] = ids
                rows = [i for i in rows if calls and len(texts[i]) < ends[i] and
                        texts[i][-1] not in self.stops]
        return [(ids, mask, self.text(ids[len(prompt) :]))
                for ids, mask, prompt in zip(texts, masks, prompts)]


def calculate(text):
    """The value of an arithmetic expression as a short decimal number, or "?"."""
    x, y, _ = math_value(text) or ("", "", "")
    return f"{float(x):.10g}" if isinstance(x, Fraction) and x == y else "?"


# -----------------------------------------------------------------------------
# What all kinds of training have in common.


def write_rows(path, rows):
    """Write dicts as .jsonl, and say so."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows", flush=True)


def read_log(folder):
    """Rows of log.csv: list of dicts of strings."""
    with open(os.path.join(folder, "log.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def progress(what, done, total):
    """A line on the terminal that is written over."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {total:,}", end="\n" * (done >= total), file=sys.stderr)


def show(values, between=" | ", equals=" "):
    """Names and values, in a line or in lines."""
    print(between.join(f"{name}{equals}{value:.4g}" if type(value) is float else
                       f"{name}{equals}{value}" for name, value in values.items()), flush=True)


@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """A permutation of n items, by seed and epoch alone, so that runs can be resumed."""
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def batch_of(items, batch_size, step, seed):
    """Batch number `step` of the epochs, one after the other."""
    n = len(items)
    return [items[epoch_order(n, seed, at // n)[at % n]]
            for at in range(step * batch_size, (step + 1) * batch_size)]


class Run(Assistant):
    """What the commands that train share: the model, from --ckpt or from an interrupted run, and
    the loop. modules: what learns, the model or those that hold one."""

    def __init__(self, args):
        torch.manual_seed(args.seed)
        self.path, self.start = os.path.join(args.out_dir, "ckpt.pt"), args.ckpt
        args.ckpt = self.path if args.resume else args.ckpt
        super().__init__(args)
        self.modules, self.optimizers, self.updates = [self.model], [], 0

    def log_probs(self, model, batch, **how):
        """`response_log_probs`; 0 where nothing was said."""
        half = self.args.dtype == "bfloat16"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
            found = response_log_probs(model, batch["input_ids"], batch["labels"], **how)
        found["log_probs"] = found["log_probs"].masked_fill(~batch["response_mask"], 0.0)
        return found

    def update(self):
        """One step of the optimizers -> the norm that the gradient had."""
        params = [p for module in self.modules for p in module.parameters()]
        norm = clip_grad_norm(params, self.args.grad_clip).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def fit(self, do_step, evaluate):
        """The loop of every kind of training: learning rate, step, log, evaluation, checkpoint.
        do_step(step) -> metrics, after it has changed the parameters; evaluate() -> metrics."""
        args, rows, step = self.args, [], 0
        for module in self.modules:
            body = getattr(module, "body", module)
            self.optimizers += make_optimizers(body, args.optimizer, args.learning_rate,
                                               args.weight_decay, (0.9, 0.95), 0.95)
            if body is not module:
                self.optimizers.append(AdamW(module.head.parameters(), weight_decay=0.0))
        if args.resume:
            for part, state in zip(self.modules + self.optimizers,
                                   self.saved["modules"] + self.saved["optimizer"]):
                part.load_state_dict(state)
            torch.set_rng_state(self.saved["rng"].cpu())
            step = self.saved["step"]
            rows = [row for row in read_log(args.out_dir) if int(row["step"]) <= step]
        else:
            show({"step": 0} | evaluate())
            os.makedirs(args.out_dir, exist_ok=True)
        kept = {name: self.saved.get(name) for name in ("begin", "tokenizer")} | {
            "template": self.template, "stop": self.stops, "names": self.names, "args": args.words}
        self.saved = None  # its memory is free again
        while step < args.max_iters:
            begin, lr = time.perf_counter(), get_lr(
                step, args.learning_rate, 0.0, args.warmup_iters, args.max_iters, args.schedule)
            for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
                group["lr"] = lr * group.get("lr_scale", 1.0)
            step, row = step + 1, {"step": step + 1} | do_step(step)
            row |= {"learning_rate": lr, "seconds": time.perf_counter() - begin}
            due = step % args.eval_interval == 0 or step == args.max_iters
            row |= evaluate() if due else {}
            if not all(map(math.isfinite, row.values())) or due and not all(
                    p.isfinite().all() for module in self.modules for p in module.parameters()):
                raise ValueError(f"step {step} is not finite: {row}; try a smaller --learning_rate")
            rows.append({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
            if step % args.log_interval == 0 or due:
                show(row)
            if due:  # the log first: a run killed between the two has rows too many, left out above
                with replacing(os.path.join(args.out_dir, "log.csv"), "w", newline="") as file:
                    writer = csv.DictWriter(file, dict.fromkeys(name for r in rows for name in r))
                    writer.writeheader()
                    writer.writerows(rows)
                save_checkpoint(self.path, self.model, self.optimizers, step=step, **kept,
                                modules=[module.state_dict() for module in self.modules],
                                rng=torch.get_rng_state())
        print("" if self.updates else "nothing was learned: in no step did rewards differ\n",
              f"ckpt: {self.path}", sep="", flush=True)


def fit_rows(run, load, measure, count=len):
    """The training of sft, dpo and reward. load(path) -> rows; measure(rows) -> dict of means over
    them, of which "loss" is minimised; count(rows): what such a mean is divided by."""
    args = run.args
    data, held_out = load(args.data), load(args.val_data) if args.val_data else []
    print(f"{len(data):,} rows, {len(held_out):,} held out | {run.device}", flush=True)

    def average(rows, size, prefix=""):  # in parts, each weighing what it has of the whole
        sums = Counter()
        for i in range(0, len(rows), size):
            found, share = measure(rows[i : i + size]), count(rows[i : i + size]) / count(rows)
            if torch.is_grad_enabled():  # the second is of mixtures of experts
                ((found["loss"] + run.model.auxiliary_loss()) * share).backward()
            sums.update({prefix + name: value.item() * share for name, value in found.items()})
        return dict(sums)

    def do_step(step):
        rows = batch_of(data, args.batch_size, step, args.seed)
        means = average(rows, -(-len(rows) // args.gradient_accumulation_steps))
        return means | {"grad_norm": run.update()}

    run.fit(do_step, torch.no_grad()(lambda: average(held_out, args.batch_size, "val_")))


# -----------------------------------------------------------------------------
# Supervised fine-tuning; preferences by a reward model, and by DPO, which does without.


def run_sft(args):
    """`sft`: learn to answer as the examples do. Several texts share a row, unless --no_packing."""
    run = Run(args)
    model, limit = run.model, run.model.config.block_size
    packing = not args.no_packing and not {"linear", "hyena"} & set(model.kinds)  # they have states

    def make(row):
        found = run.examples(chat) if (chat := read_chat(row)) else []
        return [example for example in found if len(example[0]) <= limit + 1] or None

    def measure(examples):
        model.train(torch.is_grad_enabled())
        batch = pack_sequences(examples, min(limit, sum(len(ids) for ids, _ in examples))) \
            if packing else collate(examples)
        batch = {name: x.to(run.device) for name, x in batch.items() if name != "dropped"}
        log_probs = run.log_probs(model, batch, positions=batch.get("positions"))["log_probs"]
        return {"loss": sft_loss(log_probs, batch["response_mask"])}

    fit_rows(run, lambda path: [*itertools.chain(*read_rows(path, make))], measure,
             lambda examples: sum(sum(mask[1:]) for _, mask in examples))


def load_pairs(run, path):
    """Pairs that fit -> list of [(ids, mask) of prompt + chosen, of prompt + rejected]."""
    def make(row):
        prompt, *texts = read_pair(row) or [[]]
        pair = [run.examples([*prompt, {"role": "assistant", "content": text}], 1)[-1]
                for text in texts]
        fits = all(len(ids) <= run.model.config.block_size + 1 for ids, _ in pair)
        return pair if pair and fits else None
    return read_rows(path, make)


def preferences(chosen, rejected):
    """Scores (n,), (n,) -> how often the chosen is greater (a tie is half), and by how much."""
    right = (chosen > rejected) + 0.5 * (chosen == rejected)
    return {"accuracy": right.mean(), "margin": (chosen - rejected).mean()}


def run_dpo(args):
    """`dpo`: make chosen responses likelier than rejected ones. beta: nearness to --ckpt."""
    run = Run(args)
    model = run.model.eval()  # without dropout, so that at step 0 the policy is the reference
    reference = load_checkpoint(run.start, run.device)[0].requires_grad_(False)

    def measure(pairs):
        batch = collate([pair[side] for side in (0, 1) for pair in pairs], device=run.device)
        policy, before = (run.log_probs(m, batch)["log_probs"].sum(1).view(2, -1)
                          for m in (model, reference))
        return {"loss": dpo_loss(*policy, *before, args.beta),
                **preferences(*args.beta * (policy - before).detach()),
                "chosen_log_prob": policy[0].mean(), "rejected_log_prob": policy[1].mean()}

    fit_rows(run, functools.partial(load_pairs, run), measure)


def run_reward(args):
    """`reward`: a model that gives chosen responses more than rejected ones."""
    run = Run(args)
    reward = ScalarModel(run.model.eval())
    run.modules = [reward]

    def measure(pairs):
        scores = reward.score([pair[side][0] for side in (0, 1) for pair in pairs]).view(2, -1)
        return {"loss": reward_model_loss(*scores), **preferences(*scores.detach())}

    fit_rows(run, functools.partial(load_pairs, run), measure)


# -----------------------------------------------------------------------------
# Reinforcement learning. Every algorithm here is the same three lines: responses are sampled and
# judged; a reward becomes an advantage for each token; and the loss is the sum over tokens of
# weight x `policy_loss`. They differ in
#
#            A, the advantage of a response or token          weight            clip
# reinforce  r - mean of the batch                            1 / tokens        -
# expert     1 for each right response, once; no others       1 / tokens        -
# grpo       (r - mean) / std of its group                    1 / (B length)    low = high
# dr_grpo    r - mean of its group                            1 / (B longest)   low = high
# dapo       (r - mean) / std of its group                    1 / tokens        high = 0.28
# ppo        GAE of a learned value of each token             1 / tokens        low = high


def advantages_of(batch, args):
    """(B, 1), or for ppo (B, T) and batch["returns"]: see the table above."""
    rewards, mask = batch["rewards"], batch["response_mask"]
    if args.algorithm == "ppo":
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        per_token = rewards[:, None] * last  # the reward comes with the last token
        if args.kl:  # and each token costs its distance from the reference
            per_token = per_token - args.kl * (batch["old"] - batch["reference"])
        advantages, batch["returns"] = gae(per_token, batch["values"], args.gamma, args.lam, mask)
        advantages = advantages - masked_mean(advantages, mask)
        return advantages / (masked_mean(advantages.square(), mask).sqrt() + 1e-8)
    if args.algorithm in ("reinforce", "expert"):
        return (rewards - rewards.mean() * (args.algorithm == "reinforce"))[:, None]
    return group_advantages(rewards, args.group_size,
                            normalize_std=args.algorithm != "dr_grpo")[:, None]


def load_problems(assistant, path, read=read_problem):
    """Problems of a file whose prompts leave room for a response -> list with "ids" added."""
    def make(row):
        problem = read(row) or {"messages": []}
        ids = assistant.encode(problem["messages"])
        return problem | {"ids": ids} if 0 < len(ids) <= limit else None

    limit = assistant.model.config.block_size
    limit -= min(assistant.args.max_new_tokens, limit // 2)
    return read_rows(path, make)


def solve(assistant, problems):
    """The share of problems whose greedy response is verified."""
    answers = assistant.respond([p["ids"] for p in problems], 0)
    return statistics.fmean(verify(p, text) >= 1 for p, (*_, text) in zip(problems, answers))


def run_rl(args):
    """`rl`: sample responses, have them verified, and make the good ones likelier. One step: a
    batch of prompts_per_step prompts, group_size responses to each, and epochs over all of them in
    minibatches updates each; micro_batch are computed at a time. kl: weight of the distance from
    --ckpt. clip: of ratios, below and above 1 (clip_high: above); 0: none. ppo: gamma, lam(bda),
    value_weight (of the critic's loss). reward_model: a checkpoint in place of a verifier."""
    run, algorithm = Run(args), args.algorithm
    model = run.model.eval()  # no dropout: log-probs have to agree
    problems = load_problems(run, args.data)
    held_out = load_problems(run, args.val_data) if args.val_data else []
    reference = load_checkpoint(run.start, run.device)[0] if args.kl else None
    critic = reward_model = None
    if args.reward_model:
        body, saved = load_checkpoint(args.reward_model, run.device)
        reward_model = ScalarModel(body)
        reward_model.load_state_dict(saved["modules"][0])
    if algorithm == "ppo":
        critic = ScalarModel(load_checkpoint(run.start, run.device)[0])
        run.modules.append(critic)
    clip = (args.clip, args.clip_high or (0.28 if algorithm == "dapo" else args.clip))
    average = {"grpo": "response", "dr_grpo": "constant"}.get(algorithm, "token")
    # with one update a batch, the policy that learns is the one that has written the responses
    on_policy = args.epochs * args.minibatches == 1 and not critic
    shown = []  # (problem, response, reward)

    def parts(batch):
        for i in range(0, len(batch["rewards"]), args.micro_batch):
            yield {name: x[i : i + args.micro_batch] for name, x in batch.items()}

    def look(model, part):
        return run.log_probs(model, part, temperature=args.temperature,
                             return_token_entropy=torch.is_grad_enabled())

    @torch.no_grad()
    def rollout(step):  # -> a batch, and the metrics of its rewards
        asked = [p for p in batch_of(problems, args.prompts_per_step, step, args.seed)
                 for _ in range(args.group_size)]
        texts, masks, said = zip(*run.respond([p["ids"] for p in asked], args.temperature,
                                              args.seed * 100_003 + step))
        rewards = torch.cat([reward_model.score(texts[i : i + args.micro_batch]) for i in range(
            0, len(texts), args.micro_batch)]) if reward_model else torch.tensor(
            [*map(verify, asked, said)], device=run.device)
        if not rewards.isfinite().all():
            raise ValueError("a reward is not a finite number")
        shown[:] = list(zip(asked, said, rewards.tolist()))[:: args.group_size]
        batch = collate(list(zip(texts, masks)), device=run.device) | {"rewards": rewards}
        row = {"reward": rewards.mean().item(), "solved": (rewards >= 1).float().mean().item(),
               "length": batch["response_mask"].sum(1).float().mean().item()}
        if algorithm == "expert":  # what was right, each response once
            right = {tuple(texts[i]): i for i in range(len(texts)) if rewards[i] >= 1}
            batch = {name: x[list(right.values())] for name, x in batch.items()}
        found = []  # what the losses need to know from before the updates
        for part in parts(batch):
            found.append({} if on_policy else {"old": look(model, part)["log_probs"]})
            if reference:
                found[-1]["reference"] = look(reference, part)["log_probs"]
            if critic:
                found[-1]["values"] = critic(part["input_ids"])
        if found:
            batch |= {name: torch.cat([part[name] for part in found]) for name in found[0]}
            batch["advantages"] = advantages_of(batch, args)
        return batch, row

    def learn(mini):  # one update -> its metrics
        sums, mask = Counter(), mini["response_mask"]
        mini["weights"] = token_weights(mask, average, args.max_new_tokens)
        if not critic and not args.kl:  # advantages of 0 have no gradient
            mini = {name: x[mini["advantages"][:, 0] != 0] for name, x in mini.items()}
        mini["shares"] = token_weights(mini["response_mask"])
        for part in parts(mini):
            found = look(model, part)
            log_probs, new = found["log_probs"], found["log_probs"].detach()
            old = part.get("old", new)
            losses = policy_loss(log_probs, part["advantages"],
                                 None if algorithm in ("reinforce", "expert") else old,
                                 clip if args.clip else None)
            if critic:
                losses = losses + args.value_weight * value_loss(
                    critic(part["input_ids"]), part["values"], part["returns"], args.clip or 1e9)
            elif reference:
                losses = losses + args.kl * kl_estimate(log_probs, part["reference"])
            loss = (part["weights"] * losses).sum()
            loss.backward()
            ratio = (new - old).exp()
            for name, x in (("entropy", found["token_entropy"]),
                            ("clip_fraction", (ratio < 1 - clip[0]) | (ratio > 1 + clip[1])),
                            ("kl", kl_estimate(new, part.get("reference", old)))):
                sums[name] += (x * part["shares"]).sum().item()
            sums["loss"] += loss.item()
        return {**sums, "grad_norm": run.update()} if sums else {}

    def do_step(step):
        (batch, row), updates = rollout(step), []
        for epoch in range(args.epochs if len(batch["rewards"]) else 0):
            g = torch.Generator().manual_seed(args.seed * 7919 + step * 101 + epoch)
            order = torch.randperm(len(batch["rewards"]), generator=g).to(run.device)
            updates += [learn({name: x[rows] for name, x in batch.items()})
                        for rows in order.chunk(args.minibatches)]
        updates = [update for update in updates if update] or [{}]
        return row | {name: statistics.fmean(u[name] for u in updates) for name in updates[0]}

    def evaluate():
        for problem, text, reward in shown[:3]:
            prompt = problem["messages"][-1]["content"]
            print(f"    {prompt[-200:]!r} -> {text[:300]!r}: {reward:.2f}", flush=True)
        return {"val_accuracy": solve(run, held_out)} if held_out else {}

    run.fit(do_step, evaluate)


# -----------------------------------------------------------------------------
# Data written by a program or a checkpoint, and a checkpoint's judgement.


def run_synth(args):
    """`synth`: without --ckpt, n problems of a kind and level, made by a program. With it, verified
    responses, of so many samples, to the problems in --data, or --pairs of a right and a wrong one.
    With --rewrite, a file of documents, these as the model writes them anew by --instruction: what
    curate.py mix takes."""
    how = args.instruction or "Rewrite this text clearly, keeping all facts."
    rows = {}
    if not args.ckpt:
        rng = random.Random(args.seed)
        for _ in range(50 * args.n):
            problem = make_problem(args.kind, args.level, rng)
            if len(rows) < args.n:
                rows.setdefault(problem["prompt"], problem)
        return write_rows(args.out, list(rows.values()))
    writer, n = Assistant(args), 1 if args.rewrite else args.samples
    problems = load_problems(writer, args.rewrite or args.data, lambda row: {"messages": [
        {"role": "user", "content": f"{how}\n\n{field(row, 'text')}"}]}
        if args.rewrite else read_problem(row))[: args.limit or None]
    asked, rows = [problem["ids"] for problem in problems for _ in range(n)], []
    answers = writer.respond(asked, args.temperature, args.seed)
    for i, problem in enumerate(problems):
        texts = dict.fromkeys(text for *_, text in answers[i * n : i * n + n] if text.strip())
        if args.rewrite:
            rows += [{"text": text} for text in texts]
            continue
        row = {name: problem[name] for name in ("answer", "tests") if name in problem}
        row["prompt"] = problem["messages"]
        right = [text for text in texts if verify(problem, text) >= 1]
        wrong = [text for text in texts if text not in right]
        rows += [row | {"chosen": a, "rejected": b} for a, b in zip(right, wrong)] if args.pairs \
            else [row | {"response": text} for text in right]
    write_rows(args.out, rows)


def run_judge(args):
    """`judge`: a checkpoint compares the two answers of each pair of a file, in both orders."""
    judge, votes = Assistant(args), Counter()
    pairs = read_rows(args.data, read_pair)[: args.limit or None]
    for messages, a, b in pairs:
        votes[judge_pair(judge, messages[-1]["content"], a, b)] += 1
        progress("pairs", votes.total(), len(pairs))
    show({"pairs": len(pairs), "first_preferred": votes[1], "second_preferred": votes[-1],
          "undecided": votes[0], "win_rate": share([1] * votes[1] + [0] * votes[-1])}, "\n", ": ")


# -----------------------------------------------------------------------------
# Evaluation.


def wilson(k, n, z=1.96):
    """95% confidence interval of a proportion, k of n (Wilson 1927) -> (low, high). Unlike
    p +- z s it stays within 0 and 1, and is not empty for k = 0."""
    n = n or 1e-9
    middle, half = k / n + z * z / (2 * n), z * math.sqrt(k * (n - k) / n**3 + (z / n) ** 2 / 4)
    low, high = ((middle + side) / (1 + z * z / n) for side in (-half, half))
    return max(0.0, low), min(1.0, high)  # of rounding


def share(hits):
    """List of bool -> the proportion of True and its interval: '0.5000 (0.0945 to 0.9055)'."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / max(1, len(hits)):.4f} ({low:.4f} to {high:.4f})"


def pass_at_k(n, c, k):
    """The chance that of k responses, drawn from n of which c are right, one is right (Chen et al.
    2021):     1 - C(n - c, k) / C(n, k). Taking 1 - (1 - c/n)^k would be biased."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def encode_continuation(tokenizer, context, continuation):
    """-> (ids of both, how many of the last are the continuation's). They are one text here:
    tokenize(a) + tokenize(b) would cut "Answer:" + " 42" where no training text was cut. Spaces at
    the end of the context belong to the continuation. An empty one is the end of a document."""
    kept, whole = context.rstrip(), tokenizer.encode_ordinary(context + continuation)
    if not kept:
        start = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
        return start + whole, len(start + whole) - 1
    return whole, max(1, len(whole) - len(tokenizer.encode_ordinary(kept)))


@torch.no_grad()
def score(model, requests, batch_size=16):
    """requests: list of (ids, n), from `encode_continuation` -> list of log p of the last n ids
    given those before. Long texts lose their beginning; those equal but for the last id are one."""
    device, limit, rows, out = model.embedding.weight.device, model.config.block_size, {}, {}
    for i, (ids, n) in enumerate(requests):
        ids = ids[-(limit + 1) :]
        n = min(n, len(ids) - 1)
        rows.setdefault((tuple(ids[:-1]), n), []).append((i, ids[len(ids) - n :]))
    ordered = sorted(rows.items(), key=lambda row: -len(row[0][0]))  # a batch: of similar lengths
    for at in range(0, len(ordered), batch_size):
        some = ordered[at : at + batch_size]
        ids = padded([row for (row, _), _ in some], 0, len(some[0][0][0]), device)
        for ((row, n), wanted), hidden in zip(some, model(ids, hidden=True)):
            log_p = torch.log_softmax(model.logits(hidden[len(row) - n : len(row)]).float(), -1)
            for i, target in wanted:
                out[i] = log_p[range(n), target].sum().item()
        progress("texts", min(at + batch_size, len(ordered)), len(ordered))
    return [out[i] for i in range(len(requests))]


def lettered(question, texts):
    """A question with its choices below."""
    return "".join([question, *(f"\n{a}. {text}" for a, text in zip(LETTERS, texts)), "\nAnswer:"])


def unmarked(text):
    """HellaSwag's text without the marks of WikiHow."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# Of each task: what a row of its file, as published, asks -> (context, choices, number of the right
# one), or (context, None, answer). Contexts are those of lm-evaluation-harness (Gao et al. 2021).
TASKS = {
    "mmlu": lambda r: (lettered(r[0].strip(), r[1:5]), list("ABCD"), "ABCD".index(r[5])),
    "arc": lambda r: (f"Question: {r['question']}\nAnswer:", r["choices"]["text"],
                      r["choices"]["label"].index(r["answerKey"])),
    "piqa": lambda r: (f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]),
    "hellaswag": lambda r: (unmarked(f"{r['activity_label']}: {r['ctx_a']} "
                                     f"{r['ctx_b'].capitalize()}"),
                            [*map(unmarked, r["endings"])], int(r["label"])),
    "gsm8k": lambda r: (r["prompt"] if "prompt" in r else f"Question: {r['question']}\nAnswer:",
                        None, ("" if "prompt" in r else " ") + r["answer"]),
    "ifeval": lambda r: (field(r, "prompt"), None, "")}


def read_task(task, path, cot=False):
    """A file of a task (of MMLU a .csv, or a folder of them) -> list of {"context", "target",
    "header"} and {"choices", "label"} to be scored, or {"problem"} to be answered. cot: to be
    answered in words; choices, then, by their letters."""
    def make(row, header=""):
        context, choices, label = TASKS[task](row)
        item = {"header": header, "context": context, "target": label}
        if choices:
            item |= {"choices": choices, "label": label, "target": " " + choices[label]}
            if cot and task != "mmlu":
                item["context"] = lettered(context.removesuffix("\nAnswer:"), choices)
        if cot or not choices:
            item["context"] += " Let's think step by step." if cot else ""
            item["problem"] = read_problem(row) if not choices else {
                "answerKey": LETTERS[label], "n": len(choices)}
        return item if item.get("problem", item) else None

    if task != "mmlu":
        return read_rows(path, make)
    names, items = [path], []
    if os.path.isdir(path):
        names = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    for name in names:
        subject = re.sub(r"_(dev|val|test)\.csv$", "", os.path.basename(name)).replace("_", " ")
        header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        items += read_rows(name, functools.partial(make, header=header))
    return items


def bm25(passages, k1=1.5, b=0.75):
    """Okapi BM25 (Robertson et al. 1994) -> a function of a text, and n: the n passages that match
    it best. Of each word in both, the sum of idf x tf (k1 + 1) / (tf + k1 (1 - b + b length /
    mean length)): rare words count more, and a word's tenth mention hardly more than its ninth."""
    words = [Counter(re.findall(r"\w+", passage.lower())) for passage in passages]
    mean, index = sum(count.total() for count in words) / len(words), {}
    for i, count in enumerate(words):
        for word, tf in count.items():
            weight = tf * (k1 + 1) / (tf + k1 * (1 - b + b * count.total() / mean))
            index.setdefault(word, []).append((i, weight))

    def best(text, n):
        scores = Counter()
        for word in set(re.findall(r"\w+", text.lower())) & set(index):
            found = index[word]
            idf = math.log(1 + (len(words) - len(found) + 0.5) / (len(found) + 0.5))
            scores.update({i: idf * weight for i, weight in found})
        return [passages[i] for i, _ in scores.most_common(n)]
    return best


def run_eval(args):
    """`eval`: measure a checkpoint at a task: ppl (of text), mmlu, arc, hellaswag, piqa, gsm8k,
    ifeval. --fewshot: solved examples before each question, from --fewshot_data or --data; --cot:
    think step by step; --chat: in the chat template; --samples: pass@k and a vote; --tool
    calculator; --retrieve: documents, of which the best --passages come before the question."""
    assistant = Assistant(args)
    if args.task == "ppl":
        return show(perplexity(assistant, args), "\n", ": ")
    items = read_task(args.task, args.data, args.cot)
    shots = read_task(args.task, args.fewshot_data, args.cot) if args.fewshot_data else items
    solved = [(shot["header"], shot["context"], shot["target"]) for shot in shots]
    items = items[: args.limit or None]
    for item in items:  # n solved examples (of the same subject), but never the item itself
        own = item["header"], item["context"], item["target"]
        same = [a + b + "\n\n" for header, a, b in solved if header == own[0] and
                (header, a, b) != own]
        item["question"] = item["context"]
        item["context"] = "".join([own[0], *same[: args.fewshot], own[1]])
    show({"task": args.task, "n": len(items)} | measure(assistant, items, args), "\n", ": ")
    if args.retrieve:
        texts = read_rows(args.retrieve, lambda row: field(row, "text"))
        best = bm25([part for text in texts for part in text.split("\n\n") if part.strip()])
        for item in items:
            item["context"] = "\n\n".join([*best(item["question"], args.passages), item["context"]])
        found = measure(assistant, items, args)
        show({f"open_{name}": value for name, value in found.items()}, "\n", ": ")


def measure(assistant, items, args):
    """Accuracies of a checkpoint -> dict. Of choices: by likelihood, and by likelihood per
    character. Of answers: of the first of n, pass@k, and of the answer that most of them give
    (self-consistency: Wang et al. 2022); of a number, also if the last one of a text is taken,
    which is too lenient for a reward."""
    tokenizer, limit, n = assistant.tokenizer, assistant.model.config.block_size, args.samples
    limit -= min(args.max_new_tokens, limit // 2)
    asked = [assistant.encode([{"role": "user", "content": item["context"]}]) if args.chat else
             tokenizer.encode_ordinary(item["context"]) or [tokenizer.eot_id] for item in items]
    if "problem" not in items[0]:
        requests = []
        for item, ids in zip(items, asked):
            tails = map(tokenizer.encode_ordinary, item["choices"])
            requests += [(ids + tail, len(tail)) for tail in tails] if args.chat else [
                encode_continuation(tokenizer, item["context"], " " + c) for c in item["choices"]]
        found, hits = iter(score(assistant.model, requests, args.batch_size)), []
        for item in items:
            own = [(next(found), len(choice)) for choice in item["choices"]]
            ways = [log_p for log_p, _ in own], [log_p / max(1, size) for log_p, size in own]
            hits.append([way.index(max(way)) == item["label"] for way in ways])
        return {name: share(column) for name, column in zip(("acc", "acc_norm"), zip(*hits))}

    answers = assistant.respond([ids[-limit:] for ids in asked for _ in range(n)],
                                args.temperature if n > 1 else 0, args.seed)
    said = [text if args.chat else text.split("Question:")[0] for *_, text in answers]
    both = [(item["problem"], said[i * n : i * n + n]) for i, item in enumerate(items)]
    if args.out:
        write_rows(args.out, [{"prompt": item["context"], "responses": texts}
                              for item, (_, texts) in zip(items, both)])
    if args.task == "ifeval":  # all of a prompt's instructions, and each
        values = {}
        for name, loose in (("strict", False), ("loose", True)):
            each = [follows(problem, texts[0], loose) for problem, texts in both]
            values |= {f"prompt_{name}": share([all(hits) for hits in each]),
                       f"instruction_{name}": share(sum(each, []))}
        return values
    right = [[verify(problem, text) >= 1 for text in texts] for problem, texts in both]
    values = {"acc": share([hits[0] for hits in right])}
    if args.task == "gsm8k":
        numbers = [re.findall(r"-?\d[\d,]*(?:\.\d+)?", texts[0]) or [""] for _, texts in both]
        values["acc_last_number"] = share([grade_math(some[-1].rstrip(","), problem["answer"])
                                           for some, (problem, _) in zip(numbers, both)])
    if n > 1:
        values |= {f"pass@{k}": statistics.fmean(pass_at_k(n, sum(hits), k) for hits in right)
                   for k in sorted({2**j for j in range(n.bit_length())} | {n})}
        votes = []
        for (problem, texts), hits in zip(both, right):
            given = [find_choice(text, problem["n"]) if "n" in problem else
                     repr(read(extract_answer(text)[:1000], False)) for text in texts]
            most = Counter(filter(None, given)).most_common(1)
            votes.append(bool(most) and hits[given.index(most[0][0])])
        values[f"majority@{n}"] = share(votes)
    return values


def perplexity(assistant, args):
    """Of text: each document, after an end-of-text token, in windows of block_size."""
    texts = read_rows(args.data, lambda row: (row if type(row) is str else row["text"]) or None)
    requests, T, texts = [], assistant.model.config.block_size, texts[: args.limit or None]
    for text in texts:
        ids = encode_continuation(assistant.tokenizer, "", text)[0]
        requests += [(ids[i : i + T + 1], len(ids[i : i + T + 1]) - 1)
                     for i in range(0, len(ids) - 1, T)]
    loss, tokens = -sum(score(assistant.model, requests, args.batch_size)), sum(
        n for _, n in requests)
    bits = loss / math.log(2) / sum(len(text.encode()) for text in texts)
    return {"tokens": tokens, "loss": f"{loss / tokens:.4f}",
            "perplexity": f"{math.exp(loss / tokens):.4f}", "bits_per_byte": f"{bits:.4f}"}


# -----------------------------------------------------------------------------
# The demonstration.


def run_demo(args):
    """`demo`: a model of 57,000 parameters learns to add two numbers of two digits. Its teacher
    writes sums for 7,100 problems, but forgets to carry in seven of ten where there is something to
    carry. Fine-tuning (sft) learns to add, and to forget, for it imitates. Then come the same
    problems without sums, and a verifier, which says of each sum that the model writes whether it
    is right (rl). Would longer imitation have done as well? The control tries, for as many seconds.
    Seeds are processes of their own, two at a time."""
    begin, jobs = time.perf_counter(), [(args, args.seed + i) for i in range(args.seeds)]
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        results = pool.starmap(demonstrate, jobs, chunksize=1)
    print(f"\n{'held-out problems solved':26}{'sft':>12}{args.algorithm:>12}{'control':>12}")
    means = [[*map(statistics.fmean, zip(*column))] for column in zip(*results)]
    for title, row in (*((f"seed {seed}", row) for (_, seed), row in zip(jobs, results)),
                       ("mean", means)):
        print(f"{title:26}" + "".join(f"{accuracy:12.1%}" for accuracy, _ in row))
    print(f"{'seconds of training':26}" + "".join(f"{seconds:12.1f}" for _, seconds in means))
    print(f"\nseconds: {time.perf_counter() - begin:.1f}\nout_dir: {args.out_dir}", flush=True)


def demonstrate(args, seed):
    """One seed -> [(accuracy, seconds) of sft, rl, control]. The first one's output is shown."""
    folder, results, teacher, taught = f"{args.out_dir}/seed{seed}/", [], random.Random(seed), []
    problems = [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}
                for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(problems)
    for problem in problems[1000:]:
        a, b = map(int, problem["prompt"][:-1].split("+"))
        forgotten = (a // 10 + b // 10) * 10 + (a + b) % 10
        taught.append(problem | {"response": str(forgotten if teacher.random() < 0.7 else a + b)})
    tokenizer = Tokenizer({i: c.encode() for i, c in enumerate("0123456789+=")}, [],
                          ["<|endoftext|>"], r"[\s\S]", ignore_merges=True)
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(vocab_size=13, block_size=12, n_layer=2, n_head=4,
                                          n_embd=48, position="learned"))

    def command(name, line):  # does and shows what could have been typed -> its steps' seconds
        line += (f" --out_dir {folder}{name} --val_data {folder}valid.jsonl --device cpu --seed "
                 f"{seed} --log_interval 999 --optimizer muon --weight_decay 0.1 --schedule cosine")
        print(f"\n$ python align.py {line}", flush=True)
        run_command(line.split())
        seconds = [float(row["seconds"]) for row in read_log(folder + name)]
        test = [p | {"ids": tokenizer.encode(p["prompt"])} for p in problems[:500]]
        done = argparse.Namespace(ckpt=f"{folder}{name}/ckpt.pt", device="cpu", template="",
                                  max_new_tokens=4, batch_size=500, tool="")
        results.append((solve(Assistant(done), test), sum(seconds)))
        return seconds

    with contextlib.redirect_stdout(sys.stdout if seed == args.seed else open(os.devnull, "w")):
        for name, rows in (("valid", problems[500:1000]), ("train", problems[1000:]),
                           ("taught", taught)):
            write_rows(f"{folder}{name}.jsonl", rows)
        save_checkpoint(folder + "base.pt", model, tokenizer=tokenizer.to_json())
        sft = f"sft --data {folder}taught.jsonl --no_packing --batch_size 128 --learning_rate 2e-2"
        seconds = command("sft", f"{sft} --ckpt {folder}base.pt --max_iters 450")
        rl = sum(command("rl", f"rl --algorithm {args.algorithm} --ckpt {folder}sft/ckpt.pt --data "
                         f"{folder}train.jsonl --max_new_tokens 4 --prompts_per_step 128 "
                         "--max_iters 80 --eval_interval 20 --learning_rate 1e-2"))
        command("control", f"{sft} --ckpt {folder}sft/ckpt.pt --eval_interval 200 --max_iters "
                           f"{round(rl / statistics.median(seconds))}")
    return results


# -----------------------------------------------------------------------------
# The command line.

MODEL = "ckpt='' template='' device=auto seed=1 data='' batch_size=16 max_new_tokens=256 tool='' "
TRAIN = MODEL + ("val_data='' out_dir=out-align resume=False max_iters=200 learning_rate=1e-5 "
                 "warmup_iters=0 schedule=constant optimizer=adamw weight_decay=0.0 grad_clip=1.0 "
                 "eval_interval=50 log_interval=10 dtype=float32 gradient_accumulation_steps=1 ")
WRITE = MODEL + "limit=0 out='' samples=1 temperature=1.0 "
COMMANDS = {  # its flags and their defaults, which have the type of what is given
    run_demo: "seed=1 seeds=5 algorithm=grpo out_dir=out-align",
    run_sft: TRAIN + "no_packing=False", run_dpo: TRAIN + "beta=0.1", run_reward: TRAIN,
    run_rl: TRAIN + "algorithm=grpo prompts_per_step=16 group_size=8 epochs=1 minibatches=1 "
    "micro_batch=1024 temperature=1.0 clip=0.2 clip_high=0.0 kl=0.0 gamma=1.0 lam=0.95 "
    "value_weight=0.1 reward_model='' batch_size=1024",
    run_synth: WRITE + "out=synth.jsonl kind=arithmetic level=2 n=1000 pairs=False rewrite='' "
    "instruction=''",
    run_judge: WRITE,
    run_eval: WRITE + "task='' fewshot=0 fewshot_data='' cot=False chat=False retrieve='' "
    "passages=1"}
CHOICES = {
    "algorithm": ("grpo", "reinforce", "ppo", "dr_grpo", "dapo", "expert"), "tool": (
        "", "calculator"), "kind": ("arithmetic", "addition", "word"), "task": ("ppl", *TASKS),
    "template": ("", *TEMPLATES), "optimizer": ("adamw", "muon", "soap", "sgd"),
    "dtype": ("float32", "bfloat16"), "schedule": ("constant", "cosine", "wsd")}
HELP = ("--ckpt: a checkpoint; --template: of a chat, in place of the checkpoint's; --val_data is "
        "measured, and the run saved, every --eval_interval steps; --tool calculator: the model "
        "writes <<48/2= and reads 24>>. What train.py has, too, is explained there.")


def run_command(words):
    """Do what was typed after `python align.py`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"align.py: error: {message}\n")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for function, flags in COMMANDS.items():
        name, text = function.__doc__[1:].split("`: ")
        command = commands.add_parser(name, help=text.split(".")[0], description=text, epilog=HELP)
        command.error = parser.error
        command.set_defaults(function=function)
        for flag, default in dict(flag.split("=") for flag in flags.split()).items():
            with contextlib.suppress(ValueError):
                default = ast.literal_eval(default)
            how = SWITCH if default is False else {"type": type(default), "choices":
                                                   CHOICES.get(flag)}
            command.add_argument(f"--{flag}", default=default, **how, help=f"default {default!r}")
    args = parser.parse_args(words or ["demo"])
    if getattr(args, "resume", False):  # the flags of its run, and what is given now
        saved = load_checkpoint(os.path.join(args.out_dir, "ckpt.pt"))[1]["args"]
        args = parser.parse_args(words := [args.command, *saved[1:], *words[1:]])
    args.words = words
    args.function(args)


def main():
    """Errors become one line, and exit code 1 or, for usage, 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does
    try:
        run_command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, LookupError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"align.py: error: {' '.join(str(error).split()):.500}")


if __name__ == "__main__":
    main()
