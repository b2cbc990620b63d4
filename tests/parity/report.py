"""Prints the achieved figures: `python tests/parity/report.py` the table, `--models` one figure a model.

Differences are rms over the standard deviation of the authors' float64 figures; the bound is the tests' own.
"""

from __future__ import annotations

import io
import itertools
import os
import sys

os.environ.setdefault("GLOG_v", "3")

try:
    import families
    import figures
    import golden
except ImportError as error:
    raise SystemExit(f"error: the report needs the test extra: pip install -e '.[test]' ({error})") from None
import mindspore as ms
import numpy as np
from mindcv.models.registry import get_pretrained_cfg
from PIL import Image

from mindska.data import EvalTransform, Preprocessing
from mindska.models.factory import OUR_MODELS


def rows():
    """(what, measured, bound) of SkaNet and the pixels."""
    model = figures.MODEL
    for case in figures.CASES:
        taps, _ = figures.port_case(case)
        differences = golden.case_differences(taps, case)
        bound = "1e-3" if "ls005" in case else "5e-6"
        yield f"{case}: logits", f"{differences['logits']:.1e}", bound
        yield f"{case}: worst stage", f"{max(differences.values()):.1e}", bound
        yield f"{case}: neighbours unlike the float32 reference's", str(figures.different_neighbours(case)), ""
        yield (
            f"{case}: worst, reference given our neighbours",
            f"{max(figures.imposed_case(case).values()):.1e}",
            "5e-6",
        )
    meta, arrays = golden.golden(figures.TRAIN_CASE)
    loss, gradients, parameters = figures.port_gradients()
    names, expected = meta["grad_norm_names"], arrays["grad_norm_f64"]
    ours = np.array([np.linalg.norm(gradients[name].astype(np.float64)) for name in names])
    real = expected > 1e-6
    relative = np.abs(ours - expected)[real] / expected[real]
    yield f"{model}: training loss (absolute)", f"{abs(loss - arrays['losses_f64'][0]):.1e}", "1e-5"
    yield f"{model}: gradient norms of {real.sum()} parameters, median", f"{np.median(relative):.1e}", ""
    yield f"{model}: gradient norms, worst", f"{relative.max():.1e}", "1e-4"
    yield (
        f"{model}: gradients of {(~real).sum()} biases before a batch norm (absolute)",
        f"{ours[~real].max():.1e}",
        "1e-5",
    )
    for name in meta["bn"]:
        for statistic in ("running_mean", "running_var"):
            error = np.abs(parameters[f"{name}.{statistic}"] - arrays[f"bn/{name}/{statistic}_f64"]).max()
            yield f"{model}: {name}.{statistic} (absolute)", f"{error:.1e}", "1e-6"
    ms.set_context(mode=ms.GRAPH_MODE)
    ours, theirs = figures.sgd_losses()
    yield f"{model}: SGD losses, first two (absolute)", f"{np.abs(ours - theirs)[:2].max():.1e}", "1e-5"
    yield f"{model}: SGD losses, the next four (absolute)", f"{np.abs(ours - theirs)[2:].max():.1e}", "5e-3"
    run = figures.adamw_run()
    losses = np.abs(np.subtract(run.ours, run.theirs)).max()
    yield "skanet_nano: 20 AdamW losses (absolute)", f"{losses:.1e}", "1e-3"
    yield "skanet_nano: averaged weights after them (absolute)", f"{max(run.average.values()):.1e}", "1e-4"
    yield "JPEG to network input, 256x256 (absolute)", f"{pixels():.1e}", "1e-6"


def family_rows():
    """(what, measured, bound) of VAN, SKNet and the SK-ResNets."""
    for case in families.CASES:
        differences = golden.case_differences(families.port_taps(case), case)
        yield f"{case}: logits", f"{differences['logits']:.1e}", "5e-6"
        yield f"{case}: worst stage", f"{max(differences.values()):.1e}", "5e-6"
    for model in families.TRAINED:
        relative, _ = families.gradient_errors(model)
        yield f"{model}: gradient norms, median", f"{np.median(list(relative.values())):.1e}", ""
        yield f"{model}: gradient norms, worst", f"{max(relative.values()):.1e}", "1e-4"
        yield f"{model}: running statistics, worst", f"{families.statistics_error(model):.1e}", "2e-6"
        ms.set_context(mode=ms.GRAPH_MODE)
        ours, theirs = families.sgd_losses(model)
        ms.set_context(mode=ms.PYNATIVE_MODE)
        yield f"{model}: SGD losses, first two (absolute)", f"{np.abs(ours - theirs)[:2].max():.1e}", "1e-5"
        yield f"{model}: SGD losses, the next four (absolute)", f"{np.abs(ours - theirs)[2:].max():.1e}", "1e-3"


def model_rows():
    """(model, what its logits are compared with, difference) of every model that the README lists."""
    cases = {**{model: case for case, model in families.CASES.items()}, figures.MODEL: figures.CASES[0]}
    for model in sorted(OUR_MODELS):
        if model in cases:
            taps = figures.port_case(cases[model])[0] if model == figures.MODEL else families.port_taps(cases[model])
            yield model, "original", golden.case_differences(taps, cases[model])["logits"]
        elif not model.startswith("skanet"):
            yield model, "reference", families.random_case(model, get_pretrained_cfg(model)["input_size"][1:])


def pixels() -> float:
    """Largest difference of our evaluation pixels from Pillow's, normalised in float64."""
    rng = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((500, 375)).save(file, "jpeg")
    image = Image.open(file)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = EvalTransform(Preprocessing((256, 256), 0.9, "bicubic", mean, std))(image)
    resized = np.asarray(image.resize((378, 284), Image.Resampling.BICUBIC))[14:270, 61:317]
    return float(np.abs(ours - ((resized / 255 - mean) / std).transpose(2, 0, 1)).max())


def main() -> None:
    if "--models" in sys.argv[1:]:
        for model, against, difference in model_rows():
            print(f"| {model} | {difference:.1e} | {against} |", flush=True)
        return
    print("| figure | measured | bound |\n|---|---|---|")
    for what, measured, bound in itertools.chain(rows(), family_rows()):
        print(f"| {what} | {measured} | {bound} |")


if __name__ == "__main__":
    main()
