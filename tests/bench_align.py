"""
align.py beside its peers, by hand:

    pip install liger-kernel trl transformers
    python tests/bench_align.py losses
    python tests/bench_align.py rollouts --ckpt smol.pt --batch 16 --tokens 64
    python tests/bench_align.py code --humaneval HumanEval.jsonl.gz
    python tests/bench_align.py evals --ckpt smol.pt --folder SmolLM2-135M-Instruct \\
        --arc ARC-Easy_validation.jsonl --gsm8k test.jsonl --limit 100

losses: largest differences of loss and gradient to Liger's and TRL's, on shared random inputs in
float64. rollouts: model.py's cached generation, and sampling that reads all of the text anew for
each token. code: how many reference solutions pass. evals: `align.py eval`, and a plain loop over
transformers on the same prompts. Peers that are missing are named and skipped.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
import types

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import align as A
import model as M

def differences(name, ours, theirs, inputs):
    """A row of the table: |loss - loss| and the largest difference of gradients."""
    own = torch.autograd.grad(ours, inputs, retain_graph=True)
    other = torch.autograd.grad(theirs, inputs, retain_graph=True)
    off = max((a - b).abs().max().item() for a, b in zip(own, other))
    print(f"{name:44}{ours.item():12.6f}{abs(ours.item() - theirs.item()):12.1e}{off:12.1e}")

def losses(args):
    torch.manual_seed(0)
    B, T, C, V = 8, 12, 16, 50
    hidden = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, C, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(V, (B, T))
    mask = torch.arange(T) < torch.tensor([12, 1, 3, 7, 12, 9, 2, 5])[:, None]
    advantages = torch.randn(B, dtype=torch.float64)
    logits = hidden @ weight.T
    log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    old, ref = (log_probs.detach() + 0.4 * torch.randn(B, T, dtype=torch.float64) for _ in range(2))
    print(f"{'':44}{'loss':>12}{'difference':>12}{'gradient':>12}")
    differences("sft, F.cross_entropy", A.sft_loss(log_probs, mask), F.cross_entropy(
        logits.flatten(0, 1), ids.masked_fill(~mask, -100).flatten()), (hidden, weight))

    def ours(kind, beta):
        average = {"grpo": "response", "dr_grpo": "constant", "dapo": "token"}[kind]
        weights = A.token_weights(mask.double(), average, 20)
        each = A.policy_loss(log_probs, advantages, old, (0.2, 0.28))
        return (weights * (each + beta * A.kl_estimate(log_probs, ref))).sum()

    kinds = [(kind, beta) for kind in ("grpo", "dr_grpo", "dapo") for beta in (0.0, 0.04)]
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearGRPOLoss
    except ImportError as error:
        print(f"Liger is skipped: {error}")
    else:
        for kind, beta in kinds:
            theirs = LigerFusedLinearGRPOLoss(
                beta, compiled=False, use_ref_model=True, epsilon_low=0.2, epsilon_high=0.28,
                loss_type=kind, max_completion_length=20)
            loss, _ = theirs(hidden, weight, ids, mask.double(), advantages,
                             ref_per_token_logps=ref, old_per_token_logps=old)
            differences(f"{kind}, kl {beta}, Liger", ours(kind, beta), loss, (hidden, weight))
        theirs = LigerFusedLinearDPOLoss(beta=0.3, compiled=False, average_log_prob=False)
        before = hidden.detach() + 0.3 * torch.randn_like(hidden)
        target = ids.masked_fill(~mask, -100)
        loss, _ = theirs(weight, hidden, target, ref_input=before, ref_weight=weight.detach())
        models = (lambda x, h=h: h @ w.T for h, w in ((hidden, weight), (before, weight.detach())))
        sums = [A.sequence_log_probs(model, ids, ids, mask).view(2, -1) for model in models]
        differences("dpo, Liger", A.dpo_loss(*sums[0], *sums[1], 0.3), loss, (hidden, weight))
    try:
        from trl import GRPOTrainer
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except Exception as error:  # it imports much that can be missing
        print(f"TRL is skipped: {type(error).__name__} {str(error).splitlines()[0]}")
        return
    found = A.response_log_probs(lambda x: logits, ids, ids)["log_probs"].sum()
    theirs = selective_log_softmax(logits, ids).sum()
    differences("log-probs, TRL", found, theirs, (hidden, weight))
    differences("entropy, TRL", A.entropy(logits).sum(), entropy_from_logits(logits).sum(),
                (hidden, weight))
    anything = type("Any", (types.SimpleNamespace,), {"__getattr__": lambda *_: None})
    for kind, beta in kinds:  # what the method asks of its trainer, and no more
        trainer = anything(
            _get_per_token_logps_and_entropies=lambda *a, **k: (log_probs, log_probs * 0, None),
            top_entropy_quantile=1.0, importance_sampling_level="token", beta=beta, loss_type=kind,
            epsilon_low=0.2, epsilon_high=0.28, max_completion_length=20, use_vllm=False,
            model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
            accelerator=types.SimpleNamespace(gather=lambda x: x, num_processes=1,
                                              reduce=lambda x, reduction: x),
            args=anything(steps_per_generation=1), _entropy_bonus_enabled=False,
            _metrics={"train": collections.defaultdict(list)})
        loss = GRPOTrainer._compute_loss(trainer, None, {
            "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1].long(), "completion_ids": ids,
            "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": old,
            "ref_per_token_logps": ref, "num_items_in_batch": mask.sum()})
        differences(f"{kind}, kl {beta}, TRL", ours(kind, beta), loss, (hidden, weight))

def rollouts(args):
    model, _ = M.load_checkpoint(args.ckpt)
    prompts = torch.randint(model.config.vocab_size, (args.batch, args.prompt))
    for _ in range(args.repeat):
        begin = time.process_time()
        model.generate(prompts, args.tokens, generator=torch.Generator().manual_seed(0))
        cached = time.process_time() - begin
        begin, ids = time.process_time(), prompts
        with torch.no_grad():
            for _ in range(args.tokens):
                p = model(ids)[:, -1].softmax(-1)
                ids = torch.cat((ids, torch.multinomial(p, 1)), 1)
        uncached, n = time.process_time() - begin, args.batch * args.tokens
        print(f"cached {n / cached:9.1f} tokens per CPU-second | uncached {n / uncached:9.1f} | "
              f"{uncached / cached:.1f} x", flush=True)

def code(args):
    rows = A.read_rows(args.humaneval, lambda row: row)
    begin, passed = time.perf_counter(), 0
    for row in rows:
        verdict = A.run_code(row["prompt"] + row["canonical_solution"],
                             row["test"] + f"\ncheck({row['entry_point']})", timeout=30)
        passed += verdict.passed
        print("" if verdict else f"{row['task_id']}: {verdict.error}\n", end="")
    print(f"{passed} of {len(rows)} pass, {(time.perf_counter() - begin) / len(rows):.3f} s each")

def align(args, *flags):
    """The key: value lines of `align.py eval`, as a dict."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "align.py"), "eval", "--ckpt", args.ckpt, "--device",
         "cpu", "--limit", str(args.limit), *flags], stdout=subprocess.PIPE, encoding="utf-8",
        check=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    return lines | {"seconds": f"{time.perf_counter() - begin:.0f}"}

@torch.no_grad()
def evals(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    if args.arc:
        print("ARC, ours: ", align(args, "--task", "arc", "--data", args.arc), flush=True)
        begin, hits = time.perf_counter(), []
        for question, choices, label in A.read_rows(args.arc, A.TASKS["arc"])[: args.limit]:
            context = question + "\nAnswer:"
            scores, start = [], len(tokenizer(context)["input_ids"])
            for choice in choices:  # one by one, without padding
                whole = tokenizer(context + " " + choice)["input_ids"]
                log_p = model(torch.tensor([whole])).logits[0, start - 1 : -1].log_softmax(-1)
                scores.append(log_p.gather(1, torch.tensor(whole[start:])[:, None]).sum().item())
            by_length = [s / len(choice) for s, choice in zip(scores, choices)]
            hits.append([way.index(max(way)) == label for way in (scores, by_length)])
        acc, norm, seconds = *(sum(x) / len(hits) for x in zip(*hits)), time.perf_counter() - begin
        print(f"ARC, transformers: acc {acc:.4f} acc_norm {norm:.4f} seconds {seconds:.0f}")
    if args.gsm8k:
        kept = os.path.join(args.out, "gsm8k.jsonl")
        print("GSM8K, ours: ", align(args, "--task", "gsm8k", "--data", args.gsm8k, "--chat",
                                     "--max_new_tokens", str(args.tokens), "--out", kept))
        said = A.read_rows(kept, lambda row: row)
        begin, same = time.perf_counter(), 0
        for row in said:
            text = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}],
                                                 tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt")
            out = model.generate(**ids, max_new_tokens=args.tokens, do_sample=False,
                                 repetition_penalty=1.0)[0, ids["input_ids"].shape[1] :]
            same += tokenizer.decode(out, skip_special_tokens=True) == row["responses"][0]
        print(f"GSM8K, transformers: {same} of {len(said)} texts equal ours | seconds "
              f"{time.perf_counter() - begin:.0f}", flush=True)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("losses", "rollouts", "code", "evals"))
    for name in ("ckpt", "folder", "arc", "gsm8k", "humaneval"):
        parser.add_argument(f"--{name}")
    for name, default in zip("limit out batch prompt tokens repeat".split(),
                             (100, ".", 16, 64, 256, 3)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    {"losses": losses, "rollouts": rollouts, "code": code, "evals": evals}[args.what](args)

if __name__ == "__main__":
    main()
