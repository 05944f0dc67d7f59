"""
model.py's generation beside transformers', on the same machine, weights and prompts. By hand:

    pip install transformers
    python tests/bench_infer.py --ckpt out-ts/ckpt.pt                 # a model of our own
    python tests/bench_infer.py --folder SmolLM2-135M-Instruct --batch 1 16 --tokens 64
    python tests/bench_infer.py --ckpt big.pt --draft small.pt --repeat 7
    python tests/bench_infer.py --families                            # logits, both ways

Greedy, float32, with caches, in turn in one process; ratios are medians over the turns. The ids
have to be equal, but where two logits are closer than rounding. --draft: plain and speculative
decoding of ours alone, greedy and at temperature 0.8. --families: the largest difference of logits
between transformers' random models of each family and ours, imported from them, and between theirs
and what transformers reads from our exports.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import model as M

def in_turn(contestants, repeat):
    """{name: function that returns a number of tokens and a result} -> ({name: tokens per second
    of each turn}, {name: its last result}), the first turn being a rehearsal."""
    rates, results = {name: [] for name in contestants}, {}
    for turn in range(repeat + 1):
        for name, run in contestants.items():
            begin = time.perf_counter()
            n, results[name] = run()
            if turn:
                rates[name].append(n / (time.perf_counter() - begin))
    return rates, results

def report(rates, first):
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates[first]))
        print(f"    {name:28} {statistics.median(found):8.1f} tokens/s   {ratio:5.2f} x {first}",
              flush=True)

def beside_transformers(model, folder, prompts, tokens, repeat):
    """Ours, ours in int8 and int4, and theirs."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])

    def their_run():
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False,
                              pad_token_id=0)
        return out[:, length:].numel(), out[:, length:].tolist()

    def ours(model):
        def run():
            out = model.generate(prompts, tokens, temperature=0)
            return tokens * len(prompts), [text[len(p):] for text, p in zip(out, prompts)]
        return run

    contestants = {"transformers": their_run, "model.py": ours(model)}
    for kind in ("int8", "int4"):
        state = {name: x.clone() for name, x in model.state_dict().items()}
        copy = M.from_state(model.config, state)
        contestants[f"model.py, {kind}"] = ours(M.quantize(copy, kind))
    with torch.no_grad():
        rates, results = in_turn(contestants, repeat)
    report(rates, "transformers")
    int8, ours = rates["model.py, int8"], rates["model.py"]
    ratio = statistics.median(a / b for a, b in zip(int8, ours))
    print(f"    int8 beside our float32: {ratio:.2f} x")
    same = sum(a == b for a, b in zip(results["transformers"], results["model.py"]))
    print(f"    the same ids in {same} of {len(prompts)} texts")
    for prompt, a, b in zip(prompts, results["transformers"], results["model.py"]):
        if a != b:  # how close was it?
            i = next(i for i in range(tokens) if a[i] != b[i])
            two = model(torch.tensor([prompt + a[:i]]))[0, -1, [a[i], b[i]]]
            print(f"    at token {i}: logits {two.tolist()}")

def with_draft(model, draft, prompt, tokens, gamma, repeat):
    for temperature in (0, 0.8):
        counts = {"proposed": 0, "accepted": 0, "calls": 0}

        def plain():
            out = model.generate([prompt], tokens, temperature,
                                 generator=torch.Generator().manual_seed(1))
            return len(out[0]) - len(prompt), out[0]

        def speculative():
            out, found = M.speculate(model, draft, prompt, tokens, gamma, temperature,
                                     generator=torch.Generator().manual_seed(1))
            for k in counts:
                counts[k] += found[k]
            return len(out) - len(prompt), out

        rates, results = in_turn({"plain": plain, "speculative": speculative}, repeat)
        accepted = counts["accepted"] / counts["proposed"]
        print(f"  temperature {temperature}, gamma {gamma}: {accepted:.0%} accepted, "
              f"{(repeat + 1) * tokens / counts['calls']:.2f} tokens per call of the target"
              + (f", the same ids: {results['plain'] == results['speculative']}"
                 if not temperature else ""))
        report(rates, "plain")

@torch.no_grad()
def families():
    """Random models of transformers' families, imported, and exported again."""
    import transformers as hf

    gpt2 = dict(vocab_size=99, n_embd=48, n_layer=2, n_head=3, n_positions=64)
    base = dict(vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=64)
    two, tied = dict(num_key_value_heads=2), dict(tie_word_embeddings=True)
    llama3 = dict(rope_type="llama3", rope_theta=5e3, factor=8.0, low_freq_factor=1.0,
                  high_freq_factor=4.0, original_max_position_embeddings=32)
    window = dict(use_sliding_window=True, sliding_window=9)
    cases = [(hf.GPT2Config, gpt2 | changes) for changes in (
        {}, dict(n_inner=70, layer_norm_epsilon=1e-3), dict(tie_word_embeddings=False))]
    cases += [(kind, base | changes) for kind, *more in (
        (hf.LlamaConfig, {}, {**two, **tied, "rms_norm_eps": 1e-3}, dict(head_dim=16),
         dict(rope_parameters=llama3)),
        (hf.MistralConfig, {**two, "sliding_window": 7},
         dict(num_key_value_heads=1, sliding_window=None),
         {**two, "head_dim": 20, "sliding_window": 4096}),
        (hf.Qwen2Config, two,
         {**tied, **window, "num_key_value_heads": 4, "max_window_layers": 1}),
        (hf.Qwen3Config, {**two, "head_dim": 16}, {**two, **tied, "head_dim": 12},
         {**two, **window, "head_dim": 16, "max_window_layers": 2}),
    ) for changes in more]
    worst = [0.0, 0.0]
    for kind, changes in cases:
        load = dict(attn_implementation="eager")
        theirs = hf.AutoModelForCausalLM.from_config(kind(**changes), **load).eval().float()
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
        ids = torch.randint(99, (2, 50))
        expected = theirs(ids).logits
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(os.path.join(folder, "a"))
            ours, more = M.import_folder(os.path.join(folder, "a"))
            M.export_folder(ours, os.path.join(folder, "b"), more)
            again = hf.AutoModelForCausalLM.from_pretrained(os.path.join(folder, "b"), **load)
            found = [(x - expected).abs().max().item()
                     for x in (ours(ids), again.float().eval()(ids).logits)]
        worst = [max(pair) for pair in zip(worst, found)]
        print(f"  {theirs.config.model_type:8} imported {found[0]:.1e}, exported {found[1]:.1e} "
              f"(largest logit {expected.abs().max():.1f})", flush=True)
    print(f"{len(cases)} models: logits differ by {worst[0]:.1e} at most where imported, by "
          f"{worst[1]:.1e} where exported again")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ckpt", metavar="FILE")
    parser.add_argument("--folder", metavar="DIR", help="as transformers has them")
    parser.add_argument("--draft", metavar="FILE")
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--gamma", type=int, nargs="+", default=[4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.families:
        families()
        return
    if not (args.ckpt or args.folder):
        parser.error("give --ckpt, --folder or --families")
    model = M.load_checkpoint(args.ckpt)[0] if args.ckpt else M.import_folder(args.folder)[0]
    n = sum(p.numel() for p in model.parameters())
    print(f"{n / 1e6:.1f} million parameters, {torch.get_num_threads()} threads, "
          f"{args.tokens} new tokens")
    # prompts of 8 to 38 tokens that the model itself finds likely
    texts = model.generate([[i] for i in range(max(args.batch))], 38,
                           generator=torch.Generator().manual_seed(0))
    prompts = [text[: 8 + 2 * (7 * i % 16)] for i, text in enumerate(texts)]
    if args.draft:
        draft = M.load_checkpoint(args.draft)[0]
        for gamma in args.gamma:
            with_draft(model, draft, prompts[0], args.tokens, gamma, args.repeat)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or os.path.join(temporary, "exported")
        if not args.folder:
            M.export_folder(model, folder, {})
        for batch in args.batch:
            print(f"  batch {batch}")
            beside_transformers(model, folder, prompts[:batch], args.tokens, args.repeat)

if __name__ == "__main__":
    main()
