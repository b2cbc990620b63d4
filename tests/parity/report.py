"""Prints the table of achieved figures: `python tests/parity/report.py`.

Differences are rms over the standard deviation of the authors' float64 figures; the bound is the tests' own.
"""

from __future__ import annotations

import os

os.environ.setdefault("GLOG_v", "3")

import figures
import numpy as np


def rows():
    """(what, measured, bound) of each line."""
    for case in figures.CASES:
        taps, _ = figures.port_case(case)
        differences = figures.case_differences(taps, case)
        bound = "1e-3" if "ls005" in case else "5e-6"
        yield f"{case}: logits", f"{differences['logits']:.1e}", bound
        yield f"{case}: worst stage", f"{max(differences.values()):.1e}", bound
        yield f"{case}: neighbours unlike the float32 reference's", str(figures.different_neighbours(case)), ""
        yield (
            f"{case}: worst, reference given our neighbours",
            f"{max(figures.imposed_case(case).values()):.1e}",
            "5e-6",
        )
    meta, arrays = figures.golden(figures.TRAIN_CASE)
    loss, gradients, parameters = figures.port_gradients()
    names, expected = meta["grad_norm_names"], arrays["grad_norm_f64"]
    ours = np.array([np.linalg.norm(gradients[name].astype(np.float64)) for name in names])
    real = expected > 1e-6
    relative = np.abs(ours - expected)[real] / expected[real]
    yield "training loss (absolute)", f"{abs(loss - arrays['losses_f64'][0]):.1e}", "1e-5"
    yield f"gradient norms of {real.sum()} parameters: median", f"{np.median(relative):.1e}", ""
    yield "gradient norms: worst", f"{relative.max():.1e}", "1e-4"
    yield f"gradients of {(~real).sum()} biases before a batch norm (absolute)", f"{ours[~real].max():.1e}", "1e-5"
    for name in meta["bn"]:
        for statistic in ("running_mean", "running_var"):
            error = np.abs(parameters[f"{name}.{statistic}"] - arrays[f"bn/{name}/{statistic}_f64"]).max()
            yield f"{name}.{statistic} (absolute)", f"{error:.1e}", "1e-6"


def main() -> None:
    print("| figure | measured | bound |\n|---|---|---|")
    for what, measured, bound in rows():
        print(f"| {what} | {measured} | {bound} |")


if __name__ == "__main__":
    main()
