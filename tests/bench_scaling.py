"""
scaling.py beside what is published. Run by hand:

    python tests/bench_scaling.py --isoflops isoflops_curves.json   # Hoffmann et al.'s 72 runs
    python tests/bench_scaling.py --chinchilla svg_extracted_data.csv
    python tests/bench_scaling.py --coverage

1. Approach 2 on a list of runs with parameters, compute_budget and final_loss.
2. Approach 3 on the points that Besiroglu et al. (2024) read off Hoffmann et al.'s (2022):
   github.com/epoch-research/analyzing-chinchilla, data/svg_extracted_data.csv. Theirs beside ours.
3. Over 200 sets of 240 noisy points: how often the 80% intervals contain the truth.
"""

import argparse
import os
import sys
import time

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import scaling as S


def isoflops(path):
    runs = S.load_runs(path)
    for method in ("minimum", "parabola"):
        fit = S.fit_isoflops(runs, method)
        ahead = ", ".join(f"N({C:.0e}) = {float(fit.N(C)):.4g}" for C in (1e23, 1e24))
        print(f"{method:9} N = {fit.N.coefficient:.4g} C^{fit.N.exponent:.4f}   D = "
              f"{fit.D.coefficient:.4g} C^{fit.D.exponent:.4f}   {ahead}")


def chinchilla(path):
    table = S.columns(S.load_runs(path))
    N, D, loss = table["N"], table["D"], table["loss"]
    begin = time.process_time()
    fit = S.fit_parametric(N, D, loss)
    fits = S.bootstrap_parametric(fit, N, D, loss, 4000)
    print(f"{len(N)} runs, left out {len(fit.left_out)}, 4,000 resamples, "
          f"{time.process_time() - begin:.1f} CPU-seconds\n\n| | published re-fit | ours |\n"
          "|---|---|---|")
    published = {"E": "1.8172 (0.0257)", "A": "477.84 (124.5)", "B": "2143.86 (1293.3)",
                 "alpha": "0.34731 (0.0154)", "beta": "0.36718 (0.0206)",
                 "objective": "0.00101827403"}
    for name, theirs in published.items():
        error = "" if name == "objective" else f" ({np.std([getattr(f, name) for f in fits]):.4g})"
        print(f"| {name} | {theirs} | {getattr(fit, name):.9g}{error} |")


def coverage(sets, noise):
    truth = 1.82, 480.0, 2100.0, 0.348, 0.366
    inside = np.zeros((sets, 5))
    begin = time.process_time()
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        C, ratio = 10 ** rng.uniform(18, 22, 240), 10 ** rng.uniform(0, 2.2, 240)
        N = np.sqrt(C / 6 / ratio)
        D = C / 6 / N
        loss = S.Parametric(*truth, 0.0, ())(N, D) * np.exp(noise * rng.standard_normal(240))
        fit = S.fit_parametric(N, D, loss)
        fits = S.bootstrap_parametric(fit, N, D, loss, 100, seed)
        for i, true in enumerate(truth):
            low, high = S.interval([f[i] for f in fits])
            inside[seed, i] = low <= true <= high
    seconds = (time.process_time() - begin) / sets
    print(f"{sets} sets, noise {noise}: {seconds:.2f} CPU-seconds each with 100 resamples; 80% "
          "intervals contain " + ", ".join(f"{name} {share:.1%}" for name, share in zip(
              S.Parametric._fields, inside.mean(0))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--isoflops", metavar="FILE")
    parser.add_argument("--chinchilla", metavar="FILE")
    parser.add_argument("--coverage", action="store_true")
    args = parser.parse_args()
    if args.isoflops:
        isoflops(args.isoflops)
    if args.chinchilla:
        chinchilla(args.chinchilla)
    if args.coverage:
        for noise in (0.002, 0.01):
            coverage(200, noise)


if __name__ == "__main__":
    main()
