"""
From a base model to one that does what it is asked: fine-tuning, preferences, reinforcement
learning with verifiers, and evaluation. Each command's flags: python align.py COMMAND --help.

    python align.py                            # a demonstration on a CPU: see `run_demo`
    python align.py sft --ckpt out/ckpt.pt --data chats.jsonl --template chatml --out_dir out-sft
    python align.py dpo --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-dpo   # or reward
    python align.py rl --algorithm grpo --ckpt out-sft/ckpt.pt --data problems.jsonl --out_dir rl
    python align.py synth --kind word --level 2 --n 1000 --out problems.jsonl
    python align.py eval --task gsm8k --ckpt smol.pt --chat --data test.jsonl --limit 100

Continue a run with --resume --out_dir DIR. Data: .jsonl or .json, also .gz. sft: `prompt` and
`response`; Alpaca's `instruction`, `input`, `output`; or `messages` of `role` and `content`. dpo,
reward, judge: `prompt`, `chosen`, `rejected`. rl: `prompt` and `answer`; or `tests`: lines of code,
or objects of `input` and `output`. Shapes: B responses, T tokens, V vocabulary. `labels`, log-probs
and masks are shifted: their position t is about the token that follows input_ids[:, t].
"""
import argparse, ast, cmath, contextlib, csv, functools, gzip, itertools, json, math
import multiprocessing, os, random, re, signal, statistics, subprocess, sys, time
from collections import Counter, defaultdict, namedtuple
from fractions import Fraction
import torch
from bpe import Tokenizer
from model import (SWITCH, TEMPLATES, Transformer, TransformerConfig, chat_stops, encode_chat,
                   load_checkpoint, pick_device, replacing, save_checkpoint, upcast)
from train import clip_grad_norm, get_lr, make_optimizers

# ---- Data: from the rows of a file to messages, and from ids to batches.
def read_rows(path, make):
    """List of make(row), if not None, of .jsonl, .json, .csv, .txt or .gz. ValueError: bad row."""
    kinds = {"jsonl": lambda file: map(json.loads, filter(str.strip, file)), "json": json.load,
             "csv": csv.reader, "txt": lambda file: file.read().split("<|endoftext|>")}
    made, opened = [], gzip.open if path.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:  # \r may be in a field
            for row in kinds[path.removesuffix(".gz").rpartition(".")[2]](file):
                made.append(make(row))
    except Exception as error:
        raise ValueError(f"{path}, row {len(made) + 1}: {error!r:.200}") from None
    kept = [item for item in made if item is not None]
    print(f"{path}: {len(kept)} of {len(made)} rows can be used", flush=True)
    return kept

def to_messages(row, role, *names):  # the first of these fields: a text, its parts, or messages
    value = row[next((name for name in names if name in row), " or ".join(names))]  # or KeyError
    chat = value if type(value) is list and "role" in value[0] else [{"content": value}]
    return [{"role": turn.get("role", role), "content": turn["content"] if type(turn["content"])
             is str else "".join(part["text"] for part in turn["content"])} for turn in chat]

def read_prompt(row):  # -> messages, without the response where this has a field of its own
    chat = to_messages(row, "user", "messages", "instruction", "prompt", "question", "problem")
    if "instruction" in row and row.get("input"):  # Alpaca's
        chat[-1]["content"] += "\n\n" + row["input"]
    return chat

def read_chat(row, names=("response", "output", "completion", "answer")):
    """A row -> the messages of its conversation, or None where an assistant says nothing."""
    reply = [] if "messages" in row and len(names) > 1 else to_messages(row, "assistant", *names)
    chat = reply if len(reply) > 1 else read_prompt(row) + reply  # `chosen` may hold a whole chat
    said = [message["content"].strip() for message in chat if message["role"] == "assistant"]
    return chat if said and all(said) else None

def read_pair(row):  # -> the chosen and the rejected conversation, or None if equal
    pair = read_chat(row, ["chosen"]), read_chat(row, ["rejected"])
    return pair if all(pair) and pair[0] != pair[1] else None

def read_problem(row):
    """A row for rl -> row with "messages"; None or an error if no verifier can read its answer."""
    if "tests" in row:
        ast.parse(source_of(row["tests"])[0]).body[0]  # raises if it is no code, or empty
    elif "instruction_id_list" in row:
        if {name.split(":")[1] for name in row["instruction_id_list"]} - CONSTRAINTS.keys():
            return None
        verify(row, "a")  # raises if an argument is missing
    else:
        row = row | {"answer": str(row["answer"]).split("####")[-1].strip()}
        kind, text, *_ = read(row["answer"])
        if kind == "text" and (not text or "=" in text or text.count("(") != text.count(")")):
            raise ValueError(f"no answer that can be verified: {row['answer']!r:.80}")
    return row | {"messages": read_prompt(row)}

def padded(rows, fill, width, device="cpu"):  # lists of numbers -> (B, width) int64
    rows = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(-1, width)

def collate(examples, pad_id=0, device="cpu"):
    """List of B (ids, mask) -> dict of (B, T) tensors: input_ids and labels, the ids without the
    last and without the first, and response_mask, True where the label counts."""
    width = max((len(ids) for ids, _ in examples), default=1)
    ids = padded([ids for ids, _ in examples], pad_id, width, device)
    mask = padded([mask for _, mask in examples], 0, width, device).bool()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": mask[:, 1:]}

def tokenize_prompts_and_responses(prompts, responses, tokenizer):
    """Lists of B strings -> dict of `collate`. The tokenizer is ours, or Hugging Face's."""
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
    how = {} if hasattr(tokenizer, "encode_ordinary") else {"add_special_tokens": False}  # no <s>
    pairs = [(encode(a), encode(b, **how)) for a, b in zip(prompts, responses, strict=True)]
    pad = getattr(tokenizer, "pad_token_id", getattr(tokenizer, "eot_id", None))
    return collate([(a + b, [0] * len(a) + [1] * len(b)) for a, b in pairs], pad or 0)

def pack_sequences(examples, block_size, pad_id=0):
    """Several (ids, mask) share a row -> dict as of `collate`, T = block_size; "positions", from 0
    in each text, by which the model keeps them apart; and "dropped", how many do not fit."""
    rows, fitting = [], [pair for pair in examples if 1 < len(pair[0]) <= block_size + 1]
    for ids, mask in sorted(fitting, key=lambda example: -len(example[0])):  # the longest first
        row = next((row for row in rows if len(row[0]) + len(ids) - 1 <= block_size), None)
        if row is None:  # it fits into none so far
            rows.append(row := ([], [], [], []))
        for part, new in zip(row, (ids[:-1], ids[1:], mask[1:], range(len(ids) - 1))):
            part += new
    columns = zip(zip(*rows), (pad_id, pad_id, 0, 0))  # the lists of all rows, and what fills them
    ids, labels, mask, positions = (padded(lists, fill, block_size) for lists, fill in columns)
    return {"input_ids": ids, "labels": labels, "response_mask": mask.bool(),
            "positions": positions, "dropped": len(examples) - len(fitting)}

# ---- Log-probabilities, entropy, and means over some of the tokens.
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
    log_p = torch.log_softmax(upcast(logits), -1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)  # 0 log 0 is 0

def response_log_probs(model, input_ids, labels, return_token_entropy=False, temperature=1.0,
                       positions=None):
    """log p(label_t | input_ids up to t), of our models or Hugging Face's -> {"log_probs": (B, T)},
    0 where a label is -100, and "token_entropy", without gradient. input_ids, labels: (B, T)."""
    logits = model(input_ids) if positions is None else model(input_ids, positions=positions)
    logits = upcast(getattr(logits, "logits", logits)) / temperature
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    out = {"log_probs": picked.masked_fill(labels == -100, 0.0)}
    return out | ({"token_entropy": entropy(logits.detach())} if return_token_entropy else {})

def sequence_log_probs(model, input_ids, labels, response_mask):
    """log p of each whole response given its prompt. (B, T) each, see `collate` -> (B,)"""
    return masked_sum(response_log_probs(model, input_ids, labels)["log_probs"], response_mask, 1)

# ---- Losses: sums of weight x loss. Weights are a whole batch's, so losses of its parts add up.
def sft_loss(log_probs, response_mask, normalizer=None):
    """Mean -log p of the responses' tokens, (B, T) each. normalizer: their number in all parts."""
    count = response_mask.sum().clamp(min=1) if normalizer is None else normalizer
    return -masked_sum(log_probs, response_mask, normalize_constant=count)

def reward_model_loss(chosen, rejected):
    """-log sigmoid(r_chosen - r_rejected), mean over pairs (Bradley & Terry 1952). (B,), (B,)"""
    return -torch.nn.functional.logsigmoid(chosen - rejected).sum() / max(1, chosen.numel())

def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=0.1):
    """The loss above with the reward beta log(pi / ref) (Rafailov et al. 2023). Log-probs: (B,)"""
    return reward_model_loss(beta * (policy_chosen - reference_chosen),
                             beta * (policy_rejected - reference_rejected))

def kl_estimate(log_probs, reference_log_probs):
    """KL(pi || ref) from one sample of pi: r - log r - 1, r = ref / pi (Schulman 2020, k3)."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1

def group_advantages(rewards, group_size, eps=1e-6, normalize_std=True):
    """(r - mean) / (std + eps) within each group of responses to one prompt (GRPO: Shao et al.
    2024), or r - mean (Dr. GRPO: Liu et al. 2025). (B,) -> (B,). ValueError if not finite."""
    groups = torch.as_tensor(rewards).reshape(-1, group_size) * 1.0  # integers, too
    if not groups.isfinite().all():
        raise ValueError("a reward is not a finite number")
    advantages = groups - groups.mean(1, keepdim=True)  # of equal ones: rounding, see below
    if normalize_std and group_size > 1:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    return (advantages * (groups != groups[:, :1]).any(1, keepdim=True)).reshape(-1)  # equal: 0

def gae(rewards, values, gamma=1.0, lam=0.95, mask=None):
    """Generalised advantage estimation (Schulman et al. 2015), from the last token to the first:
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1}
    All (B, T) -> advantages, and returns A + V. Tokens outside of the mask are skipped: both 0."""
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
    """What each token counts for in the loss of a batch. mask: (B, T) -> (B, T)
    token     1 / number of tokens: all count the same (DAPO: Yu et al. 2025; fine-tuning; PPO)
    response  1 / (B length of its response): all responses do (GRPO: Shao et al. 2024)
    constant  1 / (B longest): long wrong answers gain nothing (Dr. GRPO: Liu et al. 2025)"""
    if average == "response":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    return mask / (len(mask) * longest if average == "constant" else mask.sum().clamp(min=1))

def policy_loss(log_probs, advantages, old_log_probs=None, clip=None):
    """The loss of each token, whose gradient is an estimate of that of -E[reward]:
    -A log pi                                without old_log_probs (REINFORCE: Williams 1992)
    -r A                                     with them; r = pi / pi_old
    -min(r A, clip(r, 1 - low, 1 + high) A)  with clip, a number or (low, high) (PPO: Schulman 2017)
    log_probs, old_log_probs: (B, T); advantages: (B,), (B, 1) or (B, T) -> (B, T)"""
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    if old_log_probs is None:
        return -advantages * log_probs
    ratio = (log_probs - old_log_probs).exp()
    low, high = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    clipped = ratio if clip is None else ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages)

# ---- Verifiers: what they let through is rewarded, so what they cannot read counts as wrong.
LETTERS = "ABCDEFGHIJ"  # of choices
SEED = random.SystemRandom().random()  # letters get values that no response can know
FUNCTIONS = dict(sin=cmath.sin, cos=cmath.cos, tan=cmath.tan, ln=cmath.log, log=cmath.log10)
FUNCTION = rf"\\?(?:{'|'.join(FUNCTIONS)})(?![a-z]|\^\{{-)"  # but not the inverse, sin^{-1}
DOZENS = (r"(?:plu|dozen|pair|score|hal[fv]e|quarter|third|time|minu|les|ten|hundred|thousand|"
          r"[mb]illion)s|\w*ths")  # are no units: 5 dozens, 5 tenths are other numbers than 5
UNIT = re.compile(  # (a number) and (a usual unit or any plural, maybe ^2, maybe / or per another)
    r"((?!.*" + FUNCTION + r").*(?:[\d)}]|million))\s*((?:(?<=\s)[msghL]|[ckm]m|[km]g|in|ft|lb|mph|"
    r"%|°|¤|(?:square |cubic )?(?:unit|inch|feet|mile|meter|hour|day|cent|dollar|degree)s?|(?!" +
    DOZENS + r")[a-z]{2,}(?<!s)s)(?:\s*\^[23])?(?:\s*(?:/|per)\s*(?:[smh]|[a-z]{2,})(?:\^[23])?)?)")
LETTER = r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|theta|lambda|mu|sigma|phi)(?![a-z]))(?:_\w)?'*"
NAME = re.compile(  # x, f(x); or several letters: AB, (x, y)
    rf"\s*(?!(?i:not?)\b)(?:({LETTER}(?:\([^()=]*\))?)|[|(]?{LETTER}(?:[,\s]*{LETTER})*[|)]?)\s*")
SIGNS = dict(zip("pi infty le leq ge geq lt gt in cup pm cdot times div".split(), "π∞≤≤≥≥<>=∪±**/"))
WORD = rf"(?<![\\a-zA-Z])(?!sqrt|million|{FUNCTION})[a-zA-Z]{{3}}"  # not a product of letters
CLEANING = [(re.compile(pattern, re.S), new) for pattern, new in (  # in turn; ¤: a dollar
    (r"\\begin\{([bp]?matrix)\}(.*?)\\end\{\1\}", lambda found: "⟦(" + re.sub(  # ⟦(1,2),(3,4)⟧
        r"\\\\", "),(", found[2].replace("&", ",").strip("\\ \n")) + ")⟧"),
    (r"\\\$|^\$(?=[^$]*$)", "¤"), (r"(?<=\d)(?:\{,\}|\\,|,\\!)\s*(?=\d{3})", ","),  # 1{,}000
    (r"\$|\\[()\[\]!]|\\(?:left|right|displaystyle|angle)(?![a-z])", ""),  # $\left(
    (r"\\[,;: ]|(?<!^)~|\\q?quad(?![a-z])", " "), (r"\\(?:overline|vec)(?=\{[a-zA-Z]+\})", ""),
    (r"\\(?:text|math|mbox)[a-z]*\s*\{([^{}]*)\}", r" \1 "), (r"\\%", "%"),  # \text{cm}, \mathbf{9}
    (rf"\\({'|'.join(SIGNS)})(?![a-z])", lambda found: SIGNS[found[1]]),  # \le -> ≤
    (r"\^\s*\{?\s*\\circ(?![a-z])\s*\}?|\\?degrees?", "°"), (r"(?<![\\a-zA-Z])pi(?![a-z])", "π"),
    ("<=", "≤"), (">=", "≥"), ("−", "-"), (r"\\\{", "⦃"), (r"\\\}", "⦄"),  # \{1,2\} -> ⦃1,2⦄
    (r"([_^])\{(\w)\}", r"\1\2"), (r"\\[cdt](frac|binom)", r"\\\1"),  # x^{2} -> x^2, \dfrac
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),  # \frac12 -> \frac{1}{2}
    (r"\\binom\{(\d\d?)\}\{(\d\d?)\}", lambda found: f"({math.comb(*map(int, found.groups()))})"),
    (r"(?<![\w.,!])(\d\d?)!(?!\s*!)", lambda found: f"({math.factorial(int(found[1]))})"),  # 5!
    (r"(?<![\d.^_])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"\1 \2/\3"), (r"^¤([^¤]+)$", r"\1¤"),
    (r"(?<![\d.^_])(\d+)\s+(\d+)/(\d+)", lambda found: "({}+{}/{})".format(*found.groups())
     if int(found[2]) < int(found[3]) else found[0]), (r"\s+", " "),  # 1\frac{1}{2} -> (1+1/2)
    (r"^[\s*=]+|[\s*]+$", ""), (r"(?<!\.)\.$", ""), (r"^([^±,]*)±([^±,]*)$", r"\1+\2,\1-\2"),
    (r"\+(?=∞)|((?<=[=(,])|^)\s*\+", ""), (r"^([a-z]) *>([^<≤>≥=]+)$", r"\2<\1<∞"),
    (r"^([a-z]) *≥([^<≤>≥=]+)$", r"\2≤\1<∞"), (r"^([a-z]\s*[<≤][^<≤>≥=]+)$", r"-∞<\1"),  # -∞<x<3
    (r"^([^<≤>≥=]+)([<≤])\s*([a-z])\s*([<≤])([^<≤>≥=]+)$", r"\3=\2\1,\5\4"),  # 2<x≤3 -> x=<2,3≤
    ("=<", "=("), ("=≤", "=["), ("<$", ")"), ("≤$", "]"))]  # and that as x=(2,3]

def extract_answer(text):
    """What follows the last \\boxed, or else <answer>, ####, "answer is"; or else all of a text."""
    if len(parts := re.split(r"\\f?box(?:ed)?\s*\{", text)) > 1:
        depth = list(itertools.accumulate(((c == "{") - (c == "}") for c in parts[-1]), initial=1))
        return parts[-1][: depth.index(0) - 1] if 0 in depth else ""  # or it was cut off
    for mark, end in (("<answer>", "</answer>"), ("####", r"\n"),
                      (r"(?i:answer\**(?: is|:))", r"\n|\.\s|\.$")):
        if len(parts := re.split(mark, text)) > 1:
            return re.split(end, parts[-1].strip(" \n:*"))[0].strip(" *")
    return text

def parse(text, point):
    """The value of an expression at a `point` of math_value, a Fraction if exact; or an error."""
    at = 0  # how far the text is read; each level of precedence is a function
    def take(pattern):  # what comes next, if it matches: then it is behind us; else None
        nonlocal at
        if found := re.compile(rf"\s*({pattern})").match(text, at):
            at = found.end()
            return found[1]
    def total():
        x = -product() if take("-") else product()
        while sign := take("[+-]"):
            x += product() if sign == "+" else -product()
        return x
    def product(signs=r"\*(?!\*)|/|(?=[a-zA-Zπ°(√]|\\[a-z]|\{(?!\s*\d)|(?<=π )\d)"):
        x = power()
        while (sign := take(signs)) is not None:  # "" where a factor follows: 2x, 3(x+1), 2√3
            x = x / power() if sign == "/" else x * power()
        return x
    def power():
        x = atom()
        if take(r"\^|\*\*"):  # from the right: 2^3^2 is 2^9
            x = raised(x, -power() if take("-") else power())
        return x
    def raised(x, y):  # exact where that is short
        if isinstance(x, Fraction) and isinstance(y, Fraction) and y.denominator == 1:
            if abs(y) * max(map(int.bit_length, x.as_integer_ratio())) < 4000:
                return x ** int(y)
        return complex(x) ** complex(y)
    def atom(number=r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d\d?(?!\d))?"):
        if digits := take(number):
            return Fraction(digits) * (10**6 if take("million(?![a-z])") else 1)
        if take(r"\\frac(?![a-z])"):
            return atom(r"\d") / atom(r"\d")  # one digit each if there are no braces: \frac12
        if take(r"\\?sqrt(?![a-z])|√"):
            degree = atom() if take(r"(?=\[)") is not None else Fraction(2)
            return raised(atom(r"\d"), 1 / degree)
        if name := take(FUNCTION):  # of what follows: sin(x), sin 2x, sin^2 x, log_2 x
            base = atom(r"\d") if take("_") else 10  # of which log10 is 1
            exponent = atom(r"\d") if take(r"\^") else Fraction(1)
            alone = take(r"(?=[({])") is None
            x = product(rf"(?!{FUNCTION})(?=[a-zπ°]|\\[a-z])") if alone else atom()
            return raised(FUNCTIONS[name.strip("\\")](x) / cmath.log10(base), exponent)
        if name := take(LETTER + "|π|°"):
            value = random.Random(f"{SEED} {name} {point}").randrange(2 * 10**6, 3 * 10**6)
            value = Fraction(-value if point == 2 else value, 10**6 + 3)  # 2 to 3, or -3 to -2
            return {"π": math.pi, "°": math.pi / 180, "e": math.e, "i": 1j}.get(name, value)
        end = {"(": r"\)", "{": r"\}", "[": r"\]"}[take(r"[({\[]")]  # KeyError: nothing we know
        x = total()
        return x if take(end) else None  # not closed: None will be a TypeError
    x = total()
    if at < len(text.rstrip()) or not (isinstance(x, Fraction) or cmath.isfinite(x)):
        raise ValueError("no expression")
    return x

@functools.lru_cache(10_000)
def math_value(text):
    """Values at two points of positive letters and one of negative; None if it is no expression."""
    with contextlib.suppress(ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        if len(text) <= 1000 and not re.search(WORD, text):
            return [parse(text, point) for point in range(3)]

def close(x, y):  # whether two numbers are equal: fractions exactly, others nearly
    exact = type(x) is type(y) is Fraction or abs(x) > 1e300 or abs(y) > 1e300
    return x == y if exact else cmath.isclose(x, y, rel_tol=1e-10, abs_tol=1e-14)

def split(text, pattern):  # the pieces between matches of a pattern outside of all brackets
    depths = [0, *itertools.accumulate((c in "([{⦃⟦") - (c in ")]}⦄⟧") for c in text)]
    return re.sub(pattern, lambda one: one[0] if depths[one.start()] else "\0", text).split("\0")

@functools.lru_cache(10_000)  # the true answer is compared with each response of a group
def read(text):
    """An answer as (kind, its parts). Kinds: value, list, union, =, text, or a pair of brackets."""
    text = text if len(text) <= 1000 and "\0" not in text else ""  # long ones are slow, and wrong
    for pattern, new in CLEANING:
        text = pattern.sub(new, text)
    word = "text", text.lower() if text.isalpha() else text.replace(" ", "")
    comma = r"(?!(?<=\d)(?<!\d{4}),\d{3}(?!\d)),"  # 1,000 is one number
    between = rf"\s*{comma}?\s*(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|{comma}"
    for kind, pieces in ("union", split(text, "∪")), ("list", split(text, between)):
        if len(pieces) > 1:
            return kind, [*map(read, pieces)]
    if len(sides := split(text, "=")) > 1:
        return equation(sides) or word
    if text.endswith(tuple(")]}⦄⟧")) and split(text, "(?!^)") == [text, ""]:  # brackets around all
        pieces = split(text[1:-1], ",")
        if len(pieces) == 1 and text[0] in "({":
            return read(text[1:-1])
        return "list" if text[0] in "{⦃" else text[0] + text[-1], [*map(read, pieces)]
    number, unit = found.groups() if (found := UNIT.fullmatch(text)) else (text, "")
    values = math_value(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number))
    return ("value", values, re.sub(r"(?<=\w)s$|[\^ ]", "", unit)) if values else word

def equation(sides):  # x = 5 as ("=", "x", 5); 3 + 2 = 5 as 5; 2x = 5 up to a factor; 5 = 6 as None
    sides = sides[::-1] if NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]) else sides
    name = NAME.fullmatch(sides[0])
    values = [read(side) for side in sides[bool(name) :]]
    varies = values[-1][0] == "value" and not close(*values[-1][1][:2])  # with its letters
    if not name and len(sides) == 2 and (gap := math_value("({})-({})".format(*sides))):
        if all(gap) and not close(*gap[:2]):
            return "value", [x / gap[0] for x in gap], "= 0"  # as a unit that no number has
    if not all(same(x, values[-1]) for x in values) or name and not name[1] and varies:
        return None  # 5 = 6, or ab = 2x, where ab is no name
    return ("=", "".join(name[0].split()), values[-1]) if name else values[-1]

def same(a, b):  # whether an answer gives the true one, both as `read` returns them
    if a[0] == "=" or b[0] == "=":  # x = 5 gives 5, but not y = 5
        names = {x[1] for x in (a, b) if x[0] == "="}
        return len(names) == 1 and same(*(x[2] if x[0] == "=" else x for x in (a, b)))
    if a[0] != b[0] or a[0] == "text":
        return a == b != ("text", "")
    if a[0] == "value":  # where letters are negative, roots are complex, and may differ
        points = 3 if all(x[1][2].imag == 0 for x in (a, b)) else 2
        scales = [1, Fraction(1, 100)] if b[2] == "%" and not a[2] else [  # 50 and 0.5 give 50%
            100 if a[2] == "%" and not b[2] and abs(b[1][0]) <= 1 else 1]  # 50% gives 0.5
        return (not a[2] or not b[2] or a[2] == b[2]) and any(all(
            close(x, y * scale) for x, y in zip(a[1][:points], b[1])) for scale in scales)
    in_order = a[0] not in ("list", "union")  # of these, each as often as in the other
    return len(a[1]) == len(b[1]) and all(map(same, a[1], b[1]) if in_order else (
        sum(same(x, y) for y in a[1]) == sum(same(x, y) for y in b[1]) > 0 for x in a[1]))

def grade_math(response, truth):
    """Whether a response, or an answer alone, gives the true answer, both strings."""
    with contextlib.suppress(ArithmeticError, RecursionError):
        return same(read(extract_answer(response[-20_000:])), read(extract_answer(truth)))
    return False

def find_choice(response, n=4):
    """The letter, of the first n, that a response chooses: after a mark (\\boxed, "the answer is"),
    at its beginning ("B. because"), or as its last word ("it must be C"); else None."""
    end = (r"(?=[).:,;*\"'$}\]<\n]|\s*$%s)"  # %s: what else may follow; but no other letter
           rf"(?!\W{{0,9}}(?:or|and)\b|[\s,/()&]*[{LETTERS[:n]}]\b)")
    letter = rf"\W{{0,9}}([{LETTERS[:n]}])"
    marks = r"(?:\\boxed(?:\{\\text\w*)?|####|<answer>|(?i:answer|choice|option)(?i:\s+is|:))"
    last = r"(?<!not )(?<!n't )(?<!never )\b(?i:is|be|choose|pick)" + letter + r"\W*$"
    for pattern in marks + letter + end % r"|\s+because\b", "^" + letter + end % "", last:
        if found := re.findall(pattern, response[-20_000:]):
            return found[-1]

def often(pattern, text, k):  # whether it occurs as often as k, arguments with one number, asks
    asked = next(value for value in k.values() if type(value) in (int, float))
    less = (k.get("relation") or k.get("let_relation")) == "less than"
    return (len(re.findall(pattern, text)) < asked) == less

SENTENCE = (r"(?<![.!?])(?<!\b[A-HJ-Z])(?<!\b[MDSJ][rst])(?<!\bMrs)(?<!\be\.g)(?<!\bi\.e)(?<!\n\d)"
            r"[.!?]+[\"')*\]]*(?=\s+[^\sa-z]|\s*\Z)|\S\s*\Z")  # an end; but not in 5 p.m. today
CONSTRAINTS = {  # of IFEval (Zhou et al. 2023): whether the text t obeys, given the arguments k
    "existence": lambda t, k: all(w.lower() in t.lower() for w in k["keywords"]),
    "forbidden_words": lambda t, k: not any(
        re.search(rf"\b{re.escape(w)}\b", t, re.I) for w in k["forbidden_words"]),
    "frequency": lambda t, k: often(re.escape(k["keyword"].strip().lower()), t.lower(), k),
    "letter_frequency": lambda t, k: often(re.escape(k["letter"].lower()), t.lower(), k),
    "number_sentences": lambda t, k: often(SENTENCE, t, k),
    "number_words": lambda t, k: often(r"\w+", t, k), "no_comma": lambda t, k: "," not in t,
    "number_bullet_lists": lambda t, k: k["num_bullets"] == len(re.findall(r"(?m)^ *[*-][^*]", t)),
    "number_placeholders": lambda t, k: often(r"\[.*?\]", t, k),
    "end_checker": lambda t, k: t.strip('" \n').lower().endswith(k["end_phrase"].strip().lower()),
    "quotation": lambda t, k: bool(re.fullmatch(r'\s*".*"\s*', t, re.S)),
    "english_capital": lambda t, k: t.isupper(), "english_lowercase": lambda t, k: t.islower()}

def follows(problem, response, loose=False):
    """Which instructions of an IFEval row a response follows; loose: any of its forms below."""
    lines = response.split("\n")  # without the first, the last, or both; and without stars
    forms = [response, *("\n".join(x).strip() for x in (lines[1:], lines[:-1], lines[1:-1]))]
    forms = forms + [form.replace("*", "") for form in forms] if loose else [response]
    return [any(CONSTRAINTS[name.split(":")[1]](form, k or {}) for form in forms if form.strip())
            for name, k in zip(problem["instruction_id_list"], problem["kwargs"], strict=True)]

# ---- Code of a model runs in one process; tests, in another, send it calls. Only literals travel.
SANDBOX = r'''
import ast, contextlib, ctypes, io, json, os, platform, resource, socket, struct, sys
import bisect, builtins, cmath, collections, copy, dataclasses, datetime, decimal, enum, fractions
import functools, hashlib, heapq, itertools, math, operator, random, re, statistics, string
import textwrap, time, typing, _strptime  # now, as later no file can be opened
code, program, seconds, memory = json.loads(sys.argv[1])
names = {name: module for name, module in sys.modules.items() if "." not in name}  # for tests
sys.stdout, ends, null = open(os.devnull, "w"), socket.socketpair(), os.open(os.devnull, os.O_RDWR)
holds_code = os.fork() == 0  # from here on two processes; this one holds the code, or reads tests
ends[not holds_code].close()
link = ends[holds_code].detach()
told, tell, tests = open(link), open(link, "w"), "" if holds_code else sys.stdin.read()
for number in range(3 * holds_code):  # stdin, stdout, stderr are not for the code
    os.dup2(null, number)
for name, n in dict(CORE=0, FSIZE=0, NPROC=0, NOFILE=0, AS=memory << 20, CPU=seconds).items():
    with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS lacks some
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (n, n))
# read write close mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn mremap madvise
# getpid exit futex clock_gettime clock_nanosleep exit_group getrandom: no other system calls
kind, *calls = {"x86_64": (
    0xC000003E, 0, 1, 3, 9, 10, 11, 12, 13, 14, 15, 25, 28, 39, 60, 202, 228, 230, 231, 318),
    "aarch64": (0xC00000B7, 63, 64, 57, 222, 226, 215, 214, 134, 135, 139, 216, 233, 172, 93, 98,
                113, 115, 94, 278)}.get(platform.machine(), (0,))
rules = [(0x20, 0, 0, 4), (0x15, 1, 0, kind), (6, 0, 0, 0), (0x20, 0, 0, 0),  # 0x20: load
         *((0x15, len(calls) - i, 0, n) for i, n in enumerate(calls)),  # jump if equal; 6: return
         (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]  # refuse: EPERM; allow
rules = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
sized = ctypes.create_string_buffer(struct.pack("HP", len(calls) + 6, ctypes.addressof(rules)))
prctl = calls and getattr(ctypes.CDLL(None), "prctl", None)  # 38: no new rights; 22: the filter
confined = bool(prctl) and not (prctl(38, 1, 0, 0, 0) or prctl(22, 2, sized, 0, 0))
def send(*message):  # inf is no literal, 1e999 is
    print(re.sub(r"(?<![\w'\"])inf(?![\w'\"])", "1e999", repr(message)), file=tell, flush=True)
def ask(name, *args, **kwargs):
    send(name, args, kwargs)
    status, value, *changed = ast.literal_eval(told.readline(1 << 24))
    if status:
        kinds = ValueError, TypeError, KeyError, IndexError, ZeroDivisionError, OverflowError
        raise {kind.__name__: kind for kind in kinds}.get(status, RuntimeError)(value)
    for old, new in zip([*args, *kwargs.values()], changed):
        if isinstance(old, (list, dict, set)):  # as the function left it
            old.clear()
            (old.extend if isinstance(old, list) else old.update)(new)
    return value
def run(text):  # the code as a program, with this as its input
    sys.stdin, sys.stdout = said = [io.TextIOWrapper(io.BytesIO(start), write_through=True)
                                    for start in (text.encode(), b"")]
    with contextlib.suppress(SystemExit):
        exec(code, {"__name__": "__main__"})
    return said[1].buffer.getvalue().decode()
if holds_code:
    names = {"__name__": "solution", "run": run}
    names["load"] = lambda: exec("" if program else code, names) or [  # exec returns None
        name for name, x in names.items() if callable(x)]
    for line in told:
        name, args, kwargs = ast.literal_eval(line)
        try:
            send("", names[name](*args, **kwargs), *args, *kwargs.values())
        except BaseException as error:
            send(type(error).__name__, str(error)[:300])
    os._exit(0)
try:
    names |= {name: functools.partial(ask, name) for name in ask("load")
              if name[:1] != "_" and not hasattr(builtins, name)}
    exec(tests, names)
    verdict = "" if ast.parse(tests).body else "no tests"
except BaseException as error:
    verdict = (type(error).__name__ + ": " + str(error))[:300]
os._exit(os.write(2, json.dumps([confined, verdict]).encode()))  # (the exit code means nothing)
'''

print_once = functools.cache(print)  # as a call that is cached does nothing
Verdict = namedtuple("Verdict", "passed error")  # error: "", "timeout" or the exception
Verdict.__bool__ = lambda verdict: verdict.passed

def source_of(tests):  # in the forms of `run_code` -> (their source, whether of a program)
    tests = [tests] if isinstance(tests, str) else tests
    program = not all(isinstance(test, str) for test in tests)
    return "\n".join(f"assert run({test['input']!r}).split() == {test['output']!r}.split()"
                     if program else test for test in tests), program

def run_code(code, tests, timeout=5.0, memory_mb=512):
    """Run a stranger's Python code, then tests: source, or a list of lines like `assert f(1) == 2`,
    or of {"input", "output"} of a program -> `Verdict`. Functions take and give literals."""
    tests, program = source_of(tests)  # words of a command line have a largest size
    job = json.dumps([code[:20_000], program, int(timeout) + 2, memory_mb], ensure_ascii=False)
    words = [sys.executable, "-I", "-S", "-c", SANDBOX, job.encode("utf-8", "replace")]
    child = subprocess.Popen(words, cwd="/", env={}, stdin=subprocess.PIPE, start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        confined, error = json.loads(child.communicate(tests.encode(), timeout)[1])
        if not confined:
            print_once("without seccomp, code can read files and use the network", file=sys.stderr)
    except (subprocess.TimeoutExpired, ValueError) as problem:
        error = "the tests did not end" if isinstance(problem, ValueError) else "timeout"
    finally:
        with contextlib.suppress(OSError), child:  # (whose exit waits for it, and closes pipes)
            os.killpg(child.pid, signal.SIGKILL)
    return Verdict(not error, error)

def verify(problem, response):
    """The reward, 0 to 1, of a response to a row of `read_problem`, by whichever verifier."""
    if "tests" in problem:
        fenced = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.S)
        return float(run_code((fenced or [response])[-1], problem["tests"]).passed)
    if "instruction_id_list" in problem:
        return statistics.fmean(follows(problem, response))
    if "answerKey" in problem:
        return float(find_choice(response, problem["n"]) == problem["answerKey"])
    return float(grade_math(response, problem["answer"]))

# ---- Learned verifiers, and problems that a program makes and so can solve.
class ScalarModel(torch.nn.Module):
    """A Transformer with one output per position, 0 at first: reward is the last, values all."""
    def __init__(self, body, saved=None):
        super().__init__()
        self.body = body
        self.head = torch.nn.Parameter(torch.zeros_like(body.embedding.weight[0]).float())
        self.load_state_dict(saved["modules"][0] if saved else self.state_dict())  # or as it is
    def forward(self, input_ids):  # (B, T) -> (B, T)
        return self.body(input_ids, hidden=True).float() @ self.head
    def score(self, texts):  # rewards of whole texts, a list of B lists of ids -> (B,)
        last = torch.tensor([[len(ids) - 1] for ids in texts], device=self.head.device)
        return self(padded(texts, 0, max(map(len, texts)), last.device)).gather(1, last)[:, 0]

def make_problem(kind, level, rng):
    """A problem with numbers of up to `level` digits, and its solution. rng: random.Random."""
    a, b, c = (rng.randrange(10**level) for _ in range(3))
    if kind == "addition":
        return {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}
    said = f"{a}*{b} = {a * b}\n{a * b}+{c} = {a * b + c}\n#### {a * b + c}"
    return {"prompt": f"Ana has {a} bags of {b} apples each and {c} more. How many apples has she?",
            "response": said, "answer": str(a * b + c)}

# ---- A checkpoint that can be talked to, that can use a tool, and that learns.
RAW = ("{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n\n' if "
       "m.role == 'system' }}{% endfor %}")  # the template of models that have none
CALL = re.compile(r"<<([^<>=\n]+)=([^<>\n]*>>|$)")  # of the calculator, and its result: <<4/2=2>>

def calculate(text):  # the value of an arithmetic expression as a short decimal number, or "?"
    x, y, _ = math_value(text) or ("", "", "")
    return f"{float(x):.10g}" if isinstance(x, Fraction) and x == y and abs(x) < 1e300 else "?"

def show(values, between=" | "):  # print names and values, in a line or in lines
    print(between.join(f"{name}: {value:.5g}" if type(value) is float else f"{name}: {value}"
                       for name, value in values.items()), flush=True)

def write_rows(path, rows):  # write dicts as .jsonl
    with replacing(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{path}: {len(rows)} rows", flush=True)

def batch_of(items, batch_size, step, seed):
    """Batch `step` of endless epochs; seed and epoch alone decide the order, so runs can resume."""
    n, at = len(items), range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: torch.randperm(n, generator=torch.Generator().manual_seed(
        seed * 1_000_003 + epoch)).tolist() for epoch in {i // n for i in at}}
    return [items[orders[i // n][i % n]] for i in at]

class Assistant:
    """The model, tokenizer and template that args name. stops: ids that end what it says."""
    def __init__(self, args):
        self.args, self.device = args, pick_device(args.device)
        path = os.path.join(args.out_dir, "ckpt.pt") if args.resume else args.ckpt
        self.model, self.saved = load_checkpoint(path, self.device)
        self.tokenizer = Tokenizer.from_json(self.saved.get("tokenizer") or "{}")
        end = self.tokenizer.decode([i for i in [self.tokenizer.eot_id] if i is not None])
        self.names = self.saved.get("names") or {"bos_token": end, "eos_token": end}
        self.template = TEMPLATES.get(args.template) or self.saved.get("template") or RAW
        self.stops = chat_stops(self.tokenizer, self.template, **self.names)
        self.stops += self.saved.get("stop") or []
        self.room = (size := self.model.config.block_size) - min(args.max_new_tokens, size // 2)
    def encode(self, messages, reply=True):  # reply: up to where the assistant speaks next
        messages = [{"role": "user", "content": messages}] if type(messages) is str else messages
        if self.template == RAW and len(messages) == 2 - reply and messages[0]["role"] == "user":
            ids = self.tokenizer.encode_ordinary("".join(m["content"] for m in messages))
            return ids + [self.tokenizer.eot_id] * (not reply)  # (user) or (user, assistant)
        return encode_chat(self.tokenizer, self.template, messages, reply, **self.names)
    def examples(self, messages):
        """(ids, mask) for each time the assistant speaks: mask is 1 there, 0 where a tool wrote."""
        found = []
        for i in [i for i, m in enumerate(messages) if m["role"] == "assistant"]:
            whole = self.encode(messages[: i + 1], False) + self.stops[:1]
            start = len(os.path.commonprefix([self.encode(messages[:i]), whole]))  # of lists
            end = next(k + 1 for k in range(start, len(whole)) if whole[k] in self.stops)
            found.append((whole[:end], [0] * start + [1] * (end - start)))
        for ids, mask in found if self.args.tool else ():
            texts = [self.tokenizer.decode([i]) for i in ids]
            ends = list(itertools.accumulate(map(len, texts)))
            for call in CALL.finditer("".join(texts)):
                mask[:] = [m * (not call.start(2) < at <= call.end(2)) for m, at in zip(mask, ends)]
        return found
    def respond(self, prompts, temperature, seed=0):
        """Prompts' ids -> list of (ids with the response, mask, text), results of tools masked."""
        texts, masks = [list(ids) for ids in prompts], [[0] * len(ids) for ids in prompts]
        said, size, room = {}, self.args.batch_size, self.model.config.block_size
        ends = [min(len(ids) + self.args.max_new_tokens, room) for ids in prompts]
        calls = {i for i, x in self.tokenizer.vocab.items() if self.args.tool and x[-1:] == b"="}
        todo, generator = [*range(len(prompts))], torch.Generator(self.device).manual_seed(seed)
        while todo:  # what ends in a call gets the result, and comes again
            rows, todo = todo[:size], todo[size:]
            new = self.model.generate(
                [texts[i] for i in rows], [ends[i] - len(texts[i]) for i in rows], temperature,
                stop={*self.stops, *calls}, generator=generator)
            for i, ids in zip(rows, new):
                masks[i] += [1] * (len(ids) - len(masks[i]))
                own = [token for token in ids[len(prompts[i]) :] if token not in self.stops]
                texts[i], said[i] = ids, self.tokenizer.decode(own)
                if ids[-1] in calls:
                    call = re.search(CALL.pattern + "$", said[i])
                    result = f"{calculate(call[1])}>>" if call else ""
                    ids += self.tokenizer.encode_ordinary(result)[: ends[i] - len(ids)]
                    masks[i] += [0] * (len(ids) - len(masks[i]))
                    todo += [i] * (len(ids) < ends[i])
        return [(texts[i], masks[i], said[i]) for i in range(len(prompts))]
    def update(self):  # one step of the optimizers -> the norm that the gradient had
        norm = clip_grad_norm(self.parameters, self.args.grad_clip).item()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm
    def fit(self, modules, do_step, evaluate):
        """The loop of all training. do_step(step) updates modules; it and evaluate() -> metrics."""
        args, rows, step, saved = self.args, [], 0, self.saved
        path = os.path.join(args.out_dir, "ckpt.pt")
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizers = [optimizer for module in modules for optimizer in make_optimizers(
            module, args.optimizer, args.learning_rate, args.weight_decay, (0.9, 0.95), 0.95)]
        torch.manual_seed(args.seed)
        if args.resume:
            step, rows, states = saved["step"], saved["rows"], saved["modules"] + saved["optimizer"]
            for part, state in zip(modules + self.optimizers, states):
                part.load_state_dict(state)
            torch.set_rng_state(saved["rng"].cpu())
        show({"step": step} | evaluate())
        if not args.resume and os.path.exists(path):
            os.rename(path, aside := f"{path[:-3]}-{time.strftime('%Y%m%d-%H%M%S')}.pt")
            args.words += ["--ckpt", aside] * (not os.path.exists(args.ckpt))  # for --resume
            print(f"{path}, of another run, is now {aside}", flush=True)
        saved, self.saved = {name: saved.get(name) for name in ("begin", "tokenizer")}, None  # free
        while step < args.max_iters:
            begin, lr = time.perf_counter(), get_lr(
                step, args.learning_rate, 0.0, args.warmup_iters, args.max_iters, args.schedule)
            for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
                group["lr"] = lr * group.get("lr_scale", 1.0)
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, args.dtype != "float32"):
                row = {"step": step + 1} | do_step(step)
            step, row["learning_rate"], row["seconds"] = step + 1, lr, time.perf_counter() - begin
            due = step % args.eval_interval == 0 or step == args.max_iters
            row |= evaluate() if due else {}
            if not all(map(math.isfinite, row.values())) or due and not all(
                    p.isfinite().all() for p in self.parameters):
                raise ValueError(f"step {step} is not finite: {row}; try a smaller --learning_rate")
            rows.append({k: f"{v:.6g}" if type(v) is float else v for k, v in row.items()})
            if due or sys.stdout.isatty():
                show(row)
            if due:
                names = dict.fromkeys(itertools.chain(*rows))
                with replacing(os.path.join(args.out_dir, "log.csv"), "w", newline="") as file:
                    csv.writer(file).writerows([names, *([r.get(k) for k in names] for r in rows)])
                save_checkpoint(
                    path, self.model, self.optimizers, step=step, rows=rows, args=args.words,
                    modules=[module.state_dict() for module in modules], rng=torch.get_rng_state(),
                    stop=self.stops, names=self.names, template=self.template, **saved)
        learned = any("grad_norm" in row for row in rows)
        show(({} if learned else {"nothing was learned": "equal rewards"}) | {"ckpt": path})

# ---- Supervised fine-tuning, and preferences.
def fit_rows(run, modules, read, measure, count=len):
    """Training on read(row), a list of (ids, mask). measure(rows) -> means over count(rows)."""
    args, limit = run.args, run.model.config.block_size + 1
    def make(row):
        found = read(row)
        return found if 1 < max((len(ids) for ids, _ in found), default=0) <= limit else None
    def average(rows, size, prefix=""):  # in parts, each weighing what it has of the whole
        sums = Counter()
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            found, weight = measure(part), count(part) / count(rows)
            if torch.is_grad_enabled():  # auxiliary_loss: what balances a mixture of experts
                ((found["loss"] + run.model.auxiliary_loss()) * weight).backward()
            sums.update({prefix + name: value.item() * weight for name, value in found.items()})
        return dict(sums)
    def do_step(step):
        rows = batch_of(data, args.batch_size, step, args.seed)
        means = average(rows, -(-len(rows) // args.gradient_accumulation_steps))  # rounded up
        return means | {"grad_norm": run.update()}
    data, held_out = (read_rows(path, make) if path else [] for path in (args.data, args.val_data))
    run.fit(modules, do_step, torch.no_grad()(lambda: average(held_out, args.batch_size, "val_")))

def run_sft(args):
    """`sft`: learn to answer as the examples do. Several texts share a row, unless --no_packing."""
    run = Assistant(args)
    model, limit = run.model, run.model.config.block_size
    packing = not args.no_packing and not {"linear", "hyena"} & set(model.kinds)  # have states
    def measure(rows):
        model.train(torch.is_grad_enabled())  # dropout, but not in evaluation
        examples = [*itertools.chain(*rows)]
        width = min(limit, sum(len(ids) for ids, _ in examples))
        batch = pack_sequences(examples, width) if packing else collate(examples)
        batch = {name: x.to(run.device) for name, x in batch.items() if name != "dropped"}
        mask = batch.pop("response_mask")
        return {"loss": sft_loss(response_log_probs(model, **batch)["log_probs"], mask)}
    fit_rows(run, [model], lambda row: run.examples(read_chat(row) or []), measure,
             lambda rows: sum(sum(mask[1:]) for row in rows for _, mask in row))

def run_preferences(args):
    """`dpo`: make chosen likelier than rejected; big beta: near --ckpt. `reward`: learn rewards."""
    run = Assistant(args)
    model = run.model.eval()  # without dropout, so that at step 0 the policy is the reference
    reward = ScalarModel(model) if args.command == "reward" else None
    reference = None if reward else load_checkpoint(args.ckpt, run.device)[0].requires_grad_(False)
    def measure(pairs):
        examples = [pair[side] for side in (0, 1) for pair in pairs]
        if reward:
            chosen, rejected = reward.score([ids for ids, _ in examples]).view(2, -1)
            loss = reward_model_loss(chosen, rejected)
        else:
            batch = collate(examples, device=run.device)
            policy, ref = (sequence_log_probs(m, **batch).view(2, -1) for m in (model, reference))
            chosen, rejected = args.beta * (policy - ref)
            loss = dpo_loss(*policy, *ref, args.beta)
        right = (chosen > rejected) + 0.5 * (chosen == rejected)  # a tie is half
        return {"loss": loss, "accuracy": right.mean(), "margin": (chosen - rejected).mean()}
    fit_rows(run, [reward or model], lambda row: [run.examples(chat)[-1]
                                                  for chat in read_pair(row) or ()], measure)

# ---- Reinforcement learning: the loss is the sum over tokens of weight x `policy_loss`.
#            A, the advantage of a response or token          weight            clip
# reinforce  r - mean of the batch                            1 / tokens        -
# expert     1 for each right response, once; no others       1 / tokens        -
# grpo       (r - mean) / std of its group                    1 / (B length)    low = high
# dr_grpo    r - mean of its group                            1 / (B longest)   low = high
# dapo       (r - mean) / std of its group                    1 / tokens        high = 0.28
# ppo        GAE of a learned value of each token             1 / tokens        low = high
def advantages_of(batch, args):  # (B, 1), or for ppo (B, T) and batch["returns"]: see the table
    rewards, mask = batch["rewards"][:, None], batch["response_mask"]
    if args.algorithm == "ppo":
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        A, batch["returns"] = gae(rewards * last, batch["values"], args.gamma, args.lam, mask)
        return (A - A[mask].mean()) / (A[mask].std(correction=0) + 1e-8)
    if args.algorithm in ("reinforce", "expert"):
        return rewards - rewards.mean() * (args.algorithm == "reinforce")
    return group_advantages(rewards, args.group_size, 1e-6, args.algorithm != "dr_grpo")[:, None]

def solve(assistant, problems):  # the share of problems whose greedy response is verified
    answers = assistant.respond([problem["ids"] for problem in problems], 0)
    print(f"{assistant.tokenizer.decode(problems[0]['ids'])!r:.300} -> {answers[0][2]!r:.300}")
    return statistics.fmean(verify(p, text) >= 1 for p, (*_, text) in zip(problems, answers))

def run_rl(args):
    """`rl`: sample group_size responses to each of prompts_per_step prompts; make those likelier
    that a verifier, or --reward_model, likes. kl: weight of distance from --ckpt. clip 0: none."""
    run, algorithm, size = Assistant(args), args.algorithm, args.micro_batch
    model = run.model.eval()  # no dropout: log-probs have to agree
    def make(row):  # a problem, if it leaves room for a response
        problem = read_problem(row)
        ids = problem and run.encode(problem["messages"])
        return problem | {"ids": ids} if ids and len(ids) <= run.room else None
    data, held_out = (read_rows(path, make) if path else [] for path in (args.data, args.val_data))
    reference = load_checkpoint(args.ckpt, run.device)[0] if args.kl else None
    critic = ScalarModel(load_checkpoint(args.ckpt, run.device)[0]) if algorithm == "ppo" else None
    judge = args.reward_model and ScalarModel(*load_checkpoint(args.reward_model, run.device))
    clip = args.clip or 1e9, args.clip_high or (0.28 if algorithm == "dapo" else args.clip or 1e9)
    average = {"grpo": "response", "dr_grpo": "constant"}.get(algorithm, "token")
    plain = algorithm in ("reinforce", "expert")  # without ratios
    on_policy = plain or args.epochs * args.minibatches == 1 and not critic  # pi_old is pi
    def parts(batch):  # micro-batches
        tensors = zip(*(x.split(size) for x in batch.values()))
        return [dict(zip(batch, some)) for some in tensors if len(some[0])]
    def look(model, part):  # -> log_probs, 0 where nothing was said, and token_entropy
        labels = part["labels"].masked_fill(~part["response_mask"], -100)
        return response_log_probs(model, part["input_ids"], labels, True, args.temperature)
    @torch.no_grad()
    def rollout(step):  # -> a batch, and the metrics of its rewards
        asked = [p for p in batch_of(data, args.prompts_per_step, step, args.seed)
                 for _ in range(args.group_size)]
        texts, masks, said = zip(*run.respond([p["ids"] for p in asked], args.temperature,
                                              args.seed * 100_003 + step))
        rewards = judge.score(texts) if judge else torch.tensor(
            [*map(verify, asked, said)], device=run.device)
        batch = collate([*zip(texts, masks)], device=run.device) | {"rewards": rewards}
        row = {"reward": rewards.mean().item(), "solved": (rewards >= 1).float().mean().item(),
               "length": batch["response_mask"].sum(1).float().mean().item()}
        if algorithm == "expert":  # what was right, each response once
            right = {text: i for i, text in enumerate(map(tuple, texts)) if rewards[i] >= 1}
            batch = {name: x[list(right.values())] for name, x in batch.items()}
        for name, known in (("old", None if on_policy else model), ("reference", reference)):
            if known and len(batch["rewards"]):  # log-probs before the updates
                batch[name] = torch.cat([look(known, part)["log_probs"] for part in parts(batch)])
        if critic:
            batch["values"] = torch.cat([critic(part["input_ids"]) for part in parts(batch)])
        return batch | {"advantages": advantages_of(batch, args)}, row
    def learn(mini):  # one update -> its metrics
        sums = Counter()
        mini["weights"] = token_weights(mini["response_mask"], average, args.max_new_tokens)
        if not critic and not args.kl:  # advantages of 0 have no gradient
            mini = {name: x[mini["advantages"][:, 0] != 0] for name, x in mini.items()}
        mini["shares"] = token_weights(mini["response_mask"])  # for metrics: means over tokens
        for part in parts(mini):
            log_probs, entropies = look(model, part).values()
            old = part.get("old", log_probs.detach())
            distance = kl_estimate(log_probs, part.get("reference", old))
            losses = policy_loss(log_probs, part["advantages"], None if plain else old, clip)
            if critic:
                error = critic(part["input_ids"]) - part["returns"]
                losses = losses + args.value_weight / 2 * error.square()
            loss = (part["weights"] * (losses + args.kl * distance)).sum()
            loss.backward()
            sums.update(loss=loss.item(), entropy=(part["shares"] * entropies).sum().item(),
                        kl=(part["shares"] * distance).sum().item())
        return {**sums, "grad_norm": run.update()} if sums else {}
    def do_step(step):
        (batch, row), updates = rollout(step), []
        g = torch.Generator().manual_seed(args.seed * 7919 + step)
        for _ in range(args.epochs if len(batch["rewards"]) else 0):
            order = torch.randperm(len(batch["rewards"]), generator=g).to(run.device)
            updates += filter(None, (learn({name: x[rows] for name, x in batch.items()})
                                     for rows in order.chunk(args.minibatches)))
        return row | {k: statistics.fmean(u[k] for u in updates) for k in (updates or [{}])[0]}
    run.fit([model, critic] if critic else [model], do_step,
            lambda: {"val_accuracy": solve(run, held_out)} if held_out else {})

# ---- Data written by a program, or by a checkpoint.
def run_synth(args):
    """`synth`: n problems of a kind and level, made by a program; or --rewrite, a file of documents
    as --ckpt writes them anew, by --instruction: what curate.py mix takes."""
    if args.rewrite:
        writer = Assistant(args)
        texts = read_rows(args.rewrite, lambda row: f"{args.instruction}\n\n{row['text']}")
        answers = writer.respond([*map(writer.encode, texts)], args.temperature, args.seed)
        return write_rows(args.out, [{"text": text} for *_, text in answers if text.strip()])
    rng = random.Random(args.seed)
    made = (make_problem(args.kind, args.level, rng) for _ in range(50 * args.n))  # some are equal
    write_rows(args.out, [*{problem["prompt"]: problem for problem in made}.values()][: args.n])

def run_judge(args):
    """`judge`: ask a checkpoint which answer of each pair in --data is better, in both orders, as
    models favour a place (Zheng et al. 2023). If the order decides, neither is preferred."""
    judge, asked = Assistant(args), []
    for pair in read_rows(args.data, read_pair)[: args.limit or None]:
        for a, b in pair, pair[::-1]:
            ids = judge.encode(f"{a[-2]['content']}\n\nAnswer A: {a[-1]['content']}\n\nAnswer B: "
                               f"{b[-1]['content']}\n\nWhich answer is better, A or B?")
            asked += [(ids + judge.tokenizer.encode_ordinary(letter)[:1], 1) for letter in "AB"]
    signs = torch.tensor(score(judge.model, asked, args.batch_size)).view(-1, 2, 2).diff().sign()
    votes = Counter(signs[..., 0].diff().flatten().tolist())  # -1: A, 1: B; so A, then B makes 2
    show({"pairs": votes.total(), "first_preferred": votes[2], "second_preferred": votes[-2],
          "win_rate": share([True] * votes[2] + [False] * votes[-2])}, "\n")

# ---- Evaluation.
def share(hits):
    """List of bool -> the proportion of True, with the 95% interval of Wilson (1927)."""
    n, p, z = len(hits), sum(hits) / max(1, len(hits)), 1.96
    middle, half = n * p + z**2 / 2, z * math.sqrt(n * p * (1 - p) + z**2 / 4)
    low, high = ((middle + side) / (n + z**2) for side in (-half, half))
    return f"{p:.4f} ({abs(low):.4f} to {high:.4f})"  # abs: no -0.0000

def pass_at_k(n, c, k):
    """Chance that k of n responses, c of which are right, hold a right one (Chen et al. 2021)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def last_number(text):
    """The last number of a text, or "": for evaluation alone, as prose has many by chance."""
    return "".join(re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", text)[-1:])

def encode_continuation(tokenizer, context, continuation):
    """-> (ids of both as one text, how many of the last are the continuation's, spaces too)"""
    kept, whole = (tokenizer.encode_ordinary(x) for x in (context.rstrip(), context + continuation))
    return [tokenizer.eot_id] * (not kept) + whole, max(1, len(whole) - len(kept))

@torch.no_grad()
def score(model, requests, batch_size=16):
    """requests: list of (ids, n) -> list of log p of the last n ids given those before."""
    most = model.config.block_size + 1
    texts = [(ids[-most:], ([0] * (len(ids) - n) + [1] * n)[-most:]) for ids, n in requests]
    if cropped := sum(len(ids) > most for ids, _ in requests):
        print(f"{cropped} of {len(requests)} texts lose what is before the last {most} tokens")
    parts = (texts[at : at + batch_size] for at in range(0, len(texts), batch_size))
    batches = (collate(part, device=model.embedding.weight.device) for part in parts)
    return [x for batch in batches for x in sequence_log_probs(model, **batch).tolist()]

def unmarked(text):  # HellaSwag's, without the marks of WikiHow
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

TASKS = {  # row, as published -> (question, choices or None, number of the right one or answer)
    "mmlu": lambda r: (r[0].strip(), r[1:5], "ABCD".index(r[5])),
    "arc": lambda r: ("Question: " + r["question"], r["choices"]["text"],
                      r["choices"]["label"].index(r["answerKey"])),
    "piqa": lambda r: ("Question: " + r["goal"], [r["sol1"], r["sol2"]], r["label"]),
    "hellaswag": lambda r: (
        unmarked(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
        [*map(unmarked, r["endings"])], int(r["label"])),
    "gsm8k": lambda r: ("Question: " + r["question"], None, r["answer"]),
    "ifeval": lambda r: (r["prompt"], None, "")}

def read_item(args, row):
    """-> {"context", "target"} and {"choices", "label"}, scored, or {"problem"}, to be answered."""
    context, choices, label = TASKS[args.task](row)
    if choices and (args.cot or args.task == "mmlu"):
        context += "".join(f"\n{a}. {text}" for a, text in zip(LETTERS, choices))
        choices = LETTERS[: len(choices)]
    context += "\nAnswer:" * (args.cot or args.task not in ("hellaswag", "ifeval"))
    context += " Let's think step by step." * args.cot
    item = {"context": context, "target": f" {choices[label] if choices else label}"}
    if choices and not args.cot:
        return item | {"choices": choices, "label": label}
    problem = {"answerKey": choices[label], "n": len(choices)} if choices else read_problem(row)
    return item | {"problem": problem} if problem else None

def bm25(passages, k1=1.5, b=0.75):
    """Okapi BM25 (Robertson et al. 1994) -> best(text, n): n passages with its words, rare ones."""
    counts = [Counter(re.findall(r"\w+", passage.lower())) for passage in passages]
    mean, having = sum(map(Counter.total, counts)) / len(counts), Counter(itertools.chain(*counts))
    def best(text, n):  # mean: words of a passage; having: passages that have a word
        wanted, scores = set(re.findall(r"\w+", text.lower())), Counter()
        for i, count in enumerate(counts):
            length = k1 * (1 - b + b * count.total() / mean)
            for word in wanted & count.keys():
                idf = math.log(1 + (len(counts) - having[word] + 0.5) / (having[word] + 0.5))
                scores[i] += idf * count[word] * (k1 + 1) / (count[word] + length)
        return [passages[i] for i, _ in scores.most_common(n)]
    return best

def run_eval(args):
    """`eval`: --ckpt at a --task. --fewshot: so many solved examples first, of --fewshot_data;
    --cot: steps; --samples: pass@k, a vote; --retrieve: its best --passages before the question."""
    assistant, make = Assistant(args), functools.partial(read_item, args)
    if args.task == "ppl":
        return show(perplexity(assistant, args), "\n")
    items = read_rows(args.data, make)[: args.limit or None]
    shots = read_rows(args.fewshot_data or args.data, make) if args.fewshot else []
    for item in items:  # solved examples, but never the item itself
        others = [x["context"] + x["target"] for x in shots if x["context"] != item["context"]]
        item["prompt"] = "\n\n".join([*others[: args.fewshot], item["context"]])
    show({"task": args.task, "n": len(items)} | measure(assistant, items, args), "\n")
    if args.retrieve:
        best = bm25(sum(read_rows(args.retrieve, lambda row: row["text"].split("\n\n")), []))
        for item in items:
            item["prompt"] = "\n\n".join([*best(item["context"], args.passages), item["prompt"]])
        show({f"open_{name}": x for name, x in measure(assistant, items, args).items()}, "\n")

def measure(assistant, items, args):
    """Accuracies, of n samples also pass@k and of the vote (self-consistency: Wang et al. 2022)."""
    n, hits = args.samples, defaultdict(list)
    if "problem" not in items[0]:
        found = iter(score(assistant.model, [
            encode_continuation(assistant.tokenizer, item["prompt"], " " + choice)
            for item in items for choice in item["choices"]], args.batch_size))
        for item in items:
            own = [(x := next(found), x / max(1, len(choice))) for choice in item["choices"]]
            for name, scores in zip(("acc", "acc_norm"), zip(*own)):
                hits[name].append(scores.index(max(scores)) == item["label"])
        return {name: share(column) for name, column in hits.items()}
    encode = assistant.encode if args.chat else assistant.tokenizer.encode_ordinary
    asked = [encode(item["prompt"])[-assistant.room :] for item in items for _ in range(n)]
    answers = assistant.respond(asked, args.temperature if n > 1 else 0, args.seed)
    said = [text if args.chat else text.split("Question:")[0] for *_, text in answers]
    for i, item in enumerate(items):
        item["responses"] = texts = said[i * n : i * n + n]
        problem, right = item["problem"], [verify(item["problem"], text) >= 1 for text in texts]
        hits["acc"].append(right[0])
        if n > 1:
            for k in [2**j for j in range(n.bit_length())]:
                hits[f"pass@{k}"].append(pass_at_k(n, sum(right), k))
            given = [find_choice(text, problem["n"]) if "n" in problem else
                     repr(read(extract_answer(text))) for text in texts]
            hits[f"majority@{n}"].append(right[given.index(Counter(given).most_common(1)[0][0])])
        if args.task == "gsm8k":
            hits["last_number_acc"].append(grade_math(last_number(texts[0]), problem["answer"]))
        if args.task == "ifeval":  # acc is of rows, of which all are followed
            hits["instruction_acc"] += follows(problem, texts[0])
            hits["loose_acc"].append(all(follows(problem, texts[0], True)))
    if args.out:
        write_rows(args.out, items)
    return {name: share(column) for name, column in hits.items()}

def perplexity(assistant, args):  # of documents, in windows of block_size
    texts = read_rows(args.data, lambda row: (row if type(row) is str else row["text"]) or None)
    T, texts = assistant.model.config.block_size, texts[: args.limit or None]
    ids = [encode_continuation(assistant.tokenizer, "", text)[0] for text in texts]
    windows = [doc[i : i + T + 1] for doc in ids for i in range(0, len(doc) - 1, T)]
    tokens, size = sum(map(len, ids)) - len(ids), sum(len(text.encode()) for text in texts)
    loss = -sum(score(assistant.model, [(ids, len(ids) - 1) for ids in windows], args.batch_size))
    return {"tokens": tokens, "loss": loss / tokens, "perplexity": math.exp(loss / tokens),
            "bits_per_byte": loss / math.log(2) / size}

# ---- The demonstration.
def run_demo(args):
    """`demo`: a small model learns sums from a teacher who forgets to carry in seven cases of ten:
    sft learns to add, and to forget. Then rl asks a verifier; control imitates longer instead."""
    begin, seeds = time.perf_counter(), range(args.seed, args.seed + args.seeds)
    with multiprocessing.get_context("spawn").Pool(2, torch.set_num_threads, (1,)) as pool:
        results = pool.starmap(demonstrate, [(args, seed) for seed in seeds], chunksize=1)
    for seed, row in [*zip(seeds, results), ("mean", map(statistics.fmean, zip(*results)))]:
        show({"held-out problems solved, seed": seed} | dict(zip(("sft", "rl", "control"), row)))
    show({"seconds": time.perf_counter() - begin, "out_dir": args.out_dir}, "\n")

def demonstrate(args, seed):  # -> accuracies of sft, rl and control
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends this process without a word
    folder, results, rng = f"{args.out_dir}/seed{seed}/", [], random.Random(seed)
    sums = rng.sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 8100)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "response": str(
        a + b if rng.random() < 0.3 else (a // 10 + b // 10) * 10 + (a + b) % 10)} for a, b in sums]
    vocab = dict(enumerate(map(str.encode, "0123456789+=")))
    tokenizer = Tokenizer(vocab, [], ["<|endoftext|>"], "char")
    test = [row | {"ids": tokenizer.encode(row["prompt"])} for row in rows[:1000]]
    torch.manual_seed(seed)
    model = Transformer(TransformerConfig(vocab_size=13, block_size=12, n_layer=2, n_head=4,
                                          n_embd=48, position="learned"))
    sft = "--no_packing --batch_size 128 --learning_rate 2e-2 --max_iters"
    rl = (f"--algorithm {args.algorithm} --prompts_per_step 128 --batch_size 1024 --micro_batch "
          "1024 --learning_rate 1e-2 --max_iters 50")
    with contextlib.redirect_stdout(sys.stdout if seed == args.seed else open(os.devnull, "w")):
        write_rows(folder + "sums.jsonl", rows[1000:])
        save_checkpoint(folder + "base.pt", model, tokenizer=tokenizer.to_json())
        for line in (f"sft {sft} 450 --ckpt {folder}base.pt --out_dir {folder}sft",
                     f"rl {rl} --ckpt {folder}sft/ckpt.pt --out_dir {folder}rl",
                     f"sft {sft} 200 --ckpt {folder}sft/ckpt.pt --out_dir {folder}control"):
            line += (f" --data {folder}sums.jsonl --seed {seed} --device cpu --optimizer muon "
                     "--weight_decay 0.1 --schedule cosine --max_new_tokens 4 --eval_interval 50")
            print(f"\n$ python align.py {line}", flush=True)
            done = run_command(line.split())
            done.resume = True  # then Assistant loads what was learned, not --ckpt
            results.append(solve(Assistant(done), test))
    return results

# ---- The command line.
FLAGS = """ckpt= data= val_data= out_dir=out-align resume=False device=auto dtype=float32|bfloat16
    seed=1 template=|chatml|plain tool=|calculator max_new_tokens=256 batch_size=16 micro_batch=64
    max_iters=200 learning_rate=1e-5 warmup_iters=0 schedule=constant|cosine|wsd grad_clip=1.0
    optimizer=adamw|muon|soap|sgd weight_decay=0.0 gradient_accumulation_steps=1 eval_interval=10
    no_packing=False beta=0.1 algorithm=grpo|reinforce|ppo|dr_grpo|dapo|expert prompts_per_step=16
    group_size=8 epochs=1 minibatches=1 temperature=1.0 clip=0.2 clip_high=0.0 kl=0.0 gamma=1.0
    lam=0.95 value_weight=0.1 reward_model= kind=word|addition level=2 n=1000 out= rewrite=
    instruction=Rewrite: limit=0 task=ppl|mmlu|arc|hellaswag|piqa|gsm8k|ifeval samples=1 fewshot=0
    fewshot_data= cot=False chat=False retrieve= passages=1 seeds=5"""  # name=default|other choices
COMMANDS = {"demo": run_demo, "sft": run_sft, "dpo": run_preferences, "reward": run_preferences,
            "rl": run_rl, "synth": run_synth, "judge": run_judge, "eval": run_eval}

def run_command(words):  # do what was typed after `python align.py` -> its flags
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(function.__doc__ for function in dict.fromkeys(COMMANDS.values())))
    parser.error = lambda message: parser.exit(2, f"align.py: error: {message}\n")
    parser.add_argument("command", nargs="?", default="demo", choices=COMMANDS)
    for flag, values in (flag.split("=") for flag in FLAGS.split()):
        default, *others = values.split("|")
        default = ast.literal_eval(default) if re.match(r"\d|False", default) else default
        how = SWITCH if default is False else {
            "type": type(default), "choices": [default, *others] if others else None}
        parser.add_argument(f"--{flag}", default=default, **how, help=f"default {default!r}")
    args = parser.parse_args(words)
    if args.resume:  # the flags of its run, and what is given now
        saved = load_checkpoint(os.path.join(args.out_dir, "ckpt.pt"))[1]["args"]
        args = parser.parse_args(words := [args.command, *saved[1:], *words[1:]])
    args.words = words
    COMMANDS[args.command](args)
    return args

def main():  # errors become one line, and exit code 1 or, for usage, 2
    try:
        run_command(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, LookupError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"align.py: error: {' '.join(str(error).split()):.500}")

if __name__ == "__main__":
    main()
