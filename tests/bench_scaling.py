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

PUBLISHED = {"E": "1.8172 (0.0257)", "A": "477.84 (124.5)", "B": "2143.86 (1293.3)",
             "alpha": "0.34731 (0.0154)", "beta": "0.36718 (0.0206)", "objective": "0.00101827403"}

def isoflops(path):
    runs = S.load_runs(path)
    for method in ("minimum", "parabola"):
        fit = S.fit_isoflops(runs, method)
        ahead = ", ".join(f"N({C:.0e}) = {S.predict(fit, C).N:.4g}" for C in (1e23, 1e24))
        print(f"{method:9} N = {fit.N.coefficient:.4g} C^{fit.N.exponent:.4f}   D = "
              f"{fit.D.coefficient:.4g} C^{fit.D.exponent:.4f}   {ahead}")

def chinchilla(path):
    table, begin = S.columns(S.load_runs(path)), time.process_time()
    fit = S.fit_parametric(table["N"], table["D"], table["loss"])
    fits = S.bootstrap(table, fit, 4000)
    print(f"{len(table['N'])} runs, left out {len(fit.left_out)}, 4,000 resamples, "
          f"{time.process_time() - begin:.1f} CPU-seconds\n\n| | published re-fit | ours |\n"
          "|---|---|---|")
    for name, theirs in PUBLISHED.items():
        error = np.std([getattr(f, name) for f in fits])
        print(f"| {name} | {theirs} | {getattr(fit, name):.9g} ({error:.4g}) |")

def coverage(sets, noise):
    truth = S.Parametric(1.82, 480.0, 2100.0, 0.348, 0.366, 0.0, ())
    inside, begin = np.zeros((sets, 5)), time.process_time()
    for seed in range(sets):
        rng = np.random.default_rng(seed)
        C, ratio = 10 ** rng.uniform(18, 22, 240), 10 ** rng.uniform(0, 2.2, 240)
        N = np.sqrt(C / 6 / ratio)
        D = C / 6 / N
        table = {"N": N, "D": D, "C": C,
                 "loss": truth(N, D) * np.exp(noise * rng.standard_normal(240))}
        fits = S.bootstrap(table, S.fit_parametric(N, D, table["loss"]), 100, seed)
        low, high = np.quantile([fit[:5] for fit in fits], (0.1, 0.9), axis=0)
        inside[seed] = (low <= truth[:5]) & (truth[:5] <= high)
    seconds = (time.process_time() - begin) / sets
    print(f"{sets} sets, noise {noise}: {seconds:.2f} CPU-seconds each with 100 resamples; "
          "80% intervals contain " + ", ".join(
              f"{name} {share:.1%}" for name, share in zip(truth._fields, inside.mean(0))))

parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
parser.add_argument("--isoflops", type=isoflops, metavar="FILE")
parser.add_argument("--chinchilla", type=chinchilla, metavar="FILE")
parser.add_argument("--coverage", action="store_true")
for noise in (0.002, 0.01) if parser.parse_args().coverage else ():
    coverage(200, noise)
