"""Looks inside networks: draws what they attend to and where they err, with the figures as CSV and JSON.

    mindska analyze cam --ckpt_path skanet_s.ckpt --data_dir DATA --out pictures
    mindska analyze confusion --ckpt_path skanet_s.ckpt --data_dir DATA
    mindska analyze receptive_field --ckpt_path k7.ckpt k23.ckpt k53.ckpt --data_dir DATA --image_resize 512

Besides the options of the analysis (`mindska analyze cam --help`) it takes those of `mindska validate`: --ckpt_path,
--data_dir, --val_split, --class_map, --batch_size, --image_resize, --use_ema and so on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Optional

from mindska.arguments import Parser
from mindska.config import check_given, parse_args
from mindska.distributed import check_environment, distributed
from mindska.errors import ConfigError, SettingError, clear_errors
from mindska.files import check_there, check_writable, user_path
from mindska.names import check_model
from mindska.streams import print_result

ANALYSES = {
    "attention": "SKNet's choice of kernels, by class, unit and size of the object",
    "cam": "class activation maps: which part of an image the answer rests on",
    "neighbours": "SkaNet's graph: which nodes each node is compared with",
    "receptive_field": "how far the middle of a feature map sees, of several networks",
    "confusion": "which classes are taken for which; of segmenters, by pixels",
    "errors": "the most confident mistakes",
    "shape_bias": "answers for shape or texture, on images SHAPE/SHAPE1-TEXTURE1.png",
}
OTHERS = "Besides these it takes the options of `mindska validate`: --ckpt_path, --data_dir, --batch_size and so on."
SEVERAL = ("receptive_field", "shape_bias")  # which take several checkpoints
OWN_IMAGES = ("attention", "cam", "neighbours", "receptive_field")
NUMBER = dict(attention=4, cam=8, neighbours=8, receptive_field=50, errors=64)


def scale(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and 0 < value <= 100):
        raise ValueError
    return value


def node(text: str) -> tuple[float, float]:
    y, x = (float(part) for part in text.split(","))
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected shares of height and width from 0 to 1, such as 0.5,0.25")
    return y, x


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return value


def add_options(name: str, add: Any) -> None:
    """The options of one analysis."""
    add("--out", type=user_path, default=user_path("analysis"), metavar="DIR", help="folder to write to [%(default)s]")
    add("--format", choices=("png", "pdf", "svg"), default="png", help="of the pictures [%(default)s]")
    if name in OWN_IMAGES:
        add("--images", nargs="+", type=user_path, default=[], metavar="FILE|FOLDER",
            help="images to look at; default: those of the data set, in turn one of each class")  # fmt: skip
    if name in NUMBER:
        what = "mistakes that are shown" if name == "errors" else "single images"
        add("--number", type=positive, default=NUMBER[name], metavar="N", help=f"{what} [%(default)s]")
    if name == "attention":
        add("--scales", nargs="+", type=scale, default=[1.0, 1.25, 1.5], metavar="X",
            help="sizes of the object, by cropping the middle of the image [1.0 1.25 1.5]")  # fmt: skip
    if name == "cam":
        add("--method", choices=("gradcam", "eigencam", "scorecam"), default="gradcam", help="[%(default)s]")
        add("--stages", nargs="+", default=[], metavar="STAGE", help="names or numbers of features; default: the last")
        add("--target", default="", metavar="CLASS", help="class to explain; default: the network's answer")
    if name == "neighbours":
        add("--nodes", nargs="+", type=node, default=[(0.5, 0.5)], metavar="Y,X",
            help="places in the image, as shares of its height and width [0.5,0.5]")  # fmt: skip
    if name == "receptive_field":
        add("--stage", default="", metavar="STAGE", help="name or number of the feature; default: the last, of a "
            "segmenter its logits")  # fmt: skip
        add(
            "--models",
            nargs="+",
            default=[],
            metavar="NAME",
            help="models with initial weights, beside the checkpoints",
        )


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    choice = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS", title="analyses")
    for name, text in ANALYSES.items():
        one = choice.add_parser(name, help=text, description=f"{name}: {text}.", epilog=OTHERS, allow_abbrev=False)
        add_options(name, one.add_argument)
    options, rest = parser.parse_known_args(arguments)
    name, config = options.analysis, parse_args(rest, description=__doc__, command="validate")
    with clear_errors():
        models = getattr(options, "models", [])
        if config.ckpt_path or not models:
            check_given(config, "ckpt_path")
        if config.more_ckpt_paths and name not in SEVERAL:
            raise ConfigError(f"{name} looks into one network; ckpt_path names {1 + len(config.more_ckpt_paths)} files")
        for model in models:
            check_model(model)
        for place in getattr(options, "images", []):
            check_there(place, "image or folder")
        if name not in OWN_IMAGES or not options.images:
            check_given(config, "data_dir")
        if find_spec("matplotlib") is None:
            raise SettingError("The pictures are drawn by matplotlib, which is missing: pip install matplotlib")
        check_environment()
        options.out.mkdir(parents=True, exist_ok=True)
        check_writable(options.out / f"{name}.{options.format}")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska import builders
    from mindska.analysis.run import analyse

    with clear_errors(), distributed(builders.device_target(config)) as world, clear_errors():
        builders.set_up(config, world)
        for line in analyse(name, config, options, world):
            print_result(line)
