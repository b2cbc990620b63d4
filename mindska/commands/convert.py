"""Converts weights: PyTorch, safetensors, Caffe or MindSpore files into .ckpt, .safetensors or .pth.

    mindska convert --model skanet_s --from model_best.pth.tar --to skanet_s.ckpt
    mindska convert --model sknet50 --from SKNet50.caffemodel --to sknet50.safetensors
    mindska convert --from skanet_s.ckpt --to back.pth

What the file is and whose names it uses is told from its content. Every weight is used and every parameter filled, or
the command fails and lists them. The result carries a record: model, source and its sha256, preprocessing, classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from mindska.arguments import Parser, add_model, add_overwrite, add_use_ema
from mindska.errors import SettingError, clear_errors, printable
from mindska.files import check_target, check_there, user_path
from mindska.names import OUR_NETWORKS

if TYPE_CHECKING:
    from mindska.weights import Weights


def parse(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(description=__doc__, aliases={"--ckpt_path": "--from"})
    add_model(
        parser, OUR_NETWORKS, "model of mindska; default: the one that the file names, or the only one that it fits"
    )
    parser.add_argument(
        "--from", dest="source", required=True, type=user_path, metavar="FILE", help="weights to convert"
    )
    parser.add_argument(
        "--to", dest="target", required=True, type=user_path, metavar="OUT",
        help="file to write: .ckpt, .safetensors, or .pth (with the authors' names)",
    )  # fmt: skip
    add_use_ema(parser, "take")
    parser.add_argument("--num_classes", type=int, help="drop the classifier, and put in a new one for so many classes")
    parser.add_argument(
        "--class_names", type=user_path, metavar="FILE", help="text file with the classes' names, one a line"
    )
    parser.add_argument(
        "--verify", action="store_true",
        help="compare the outputs with those of the tests' PyTorch reference on the source's weights (needs PyTorch)",
    )  # fmt: skip
    add_overwrite(parser)
    return parser.parse_args(arguments)


def renew_classifier(weights: Weights, num_classes: int) -> None:
    """Puts a classifier for other classes, with initial values, in the place of the file's."""
    from mindska.weights.convert import initial_classifier

    weights.parameters.update(initial_classifier(weights.model, num_classes, weights.parameters))


def read_class_names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} cannot be read: {error}; expected a text file with one name a line") from error


def verify(weights: Weights) -> dict[str, Any]:
    """The difference from the PyTorch reference, for the record; SettingError when it is too large."""
    from mindska.reference.verify import compare

    difference, bound = compare(weights)
    print(
        f"verified: outputs differ from the PyTorch reference's in float64 by {difference:.1e} "
        f"(rms over the standard deviation; bound {bound:.0e})"
    )
    if not difference <= bound:
        raise SettingError("the converted network does not compute what the reference does; nothing was written")
    return dict(difference=difference, bound=bound, against="PyTorch reference, float64")


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = parse(arguments)
    with clear_errors():
        check_target(options.target, options.overwrite)
        if options.verify and not find_spec("torch"):
            raise SettingError("--verify needs PyTorch (pip install torch)")
        class_names = read_class_names(options.class_names) if options.class_names else None
        check_there(options.source, "checkpoint")

    # Only now, since they load MindSpore, which takes seconds.
    from mindska.weights import open_weights
    from mindska.weights.write import write_weights

    with clear_errors():
        weights = open_weights(options.source, options.model, options.use_ema)
        record = dict(weights.record)
        origin = weights.source
        assert weights.dialect is not None  # the model is ours
        print(
            f"{printable(origin.path)}: {weights.model}, {origin.kind} with the names of {weights.dialect.name}, "
            f"{'averaged' if origin.averaged else 'raw'} weights, {len(weights.parameters)} tensors, "
            + (f"{weights.num_classes} classes" if weights.num_classes else "no classifier: a backbone")
        )
        num_classes = weights.num_classes if options.num_classes is None else options.num_classes
        if class_names is not None and len(class_names) != num_classes:
            raise SettingError(
                f"{options.class_names} has {len(class_names)} names, but the weights have {num_classes} classes"
            )
        weights.network()  # fits, or an error that lists what does not
        if options.verify:
            record["parity"] = verify(weights)
        if num_classes is not None and num_classes != weights.num_classes:
            print(
                (f"the classifier for {weights.num_classes} classes is dropped; " if weights.num_classes else "")
                + f"the one for {num_classes} starts from random values and must be trained"
            )
            renew_classifier(weights, num_classes)
            record.pop("class_names", None)
            record.update(num_classes=num_classes, classifier="initial values")
        if class_names is not None:
            record["class_names"] = class_names
        write_weights(options.target, weights.parameters, record)
        for name, value in weights.non_default_options.items():
            print(f"note: the network needs {name}={value!r}: pass it to create_model")
        print(f"wrote {printable(options.target)}, and read it again: the same to the bit")
