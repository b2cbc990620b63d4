"""INT8 models: onnxruntime's own static quantisation of an exported network, calibrated with one's own images."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mindspore import Tensor, nn

from .data import EvalLoader, EvalTransform, Preprocessing, open_dataset
from .data.datasets import Dataset, image_files
from .data.images import read_image
from .errors import DataError, ExportError, few
from .evaluation import EvalStep, Result, evaluate
from .export import export, open_model, record_path
from .files import replacing
from .modes import pynative_mode
from .weights.files import METADATA

# What has weights, and the ReLU that goes with it. The rest stays in float32: softmax, norms, GELU, sums, and SkaNet's
# neighbour search, whose distances would be ties.
QUANTISED = ("Conv", "Gemm", "Relu")
BATCH = 16


@dataclass(frozen=True)
class Quantised:
    """What came of a quantisation.

    Attributes:
        images: with which it was calibrated.
        agreement: of these, the percentage whose likeliest class is the one before.
        before, after: accuracy on a validation set, where there is one.
    """

    images: int
    agreement: float
    before: Optional[Result] = None
    after: Optional[Result] = None

    def __str__(self) -> str:
        said = f"calibrated with {self.images} images, of which {self.agreement:.1f} % keep their class"
        return said + (f"\nfloat32: {self.before}\nint8:    {self.after}" if self.before else "")


def calibration_images(folder: Path, preprocessing: Preprocessing, most: int) -> list[np.ndarray]:
    """At most so many images below a folder, evenly over their names; (C, H, W) float32, as the network takes them.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    paths = image_files(folder)
    if not paths:
        raise DataError(f"No image below {folder}; expected some that are like those that the network will see")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int))
    transform = EvalTransform(preprocessing)
    return [transform(read_image(paths[i])) for i in chosen]


def export_int8(
    net: nn.Cell,
    path: Path,
    shape: tuple[int, int, int, int],
    record: dict[str, Any],
    images: Sequence[np.ndarray],
    validation: Optional[Dataset] = None,
    **dynamic: bool,
) -> Quantised:
    """Writes a folded network as an ONNX file of 8-bit weights (per channel) and values, and its record beside it.

    Args:
        shape, dynamic: see `mindska.export.export`.
        images: (C, H, W) float32 each, to calibrate with.
        validation: images on which the accuracy before and after is measured (see `validation_images`).

    Raises:
        ExportError: the network cannot be exported or quantised; nothing is left.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = ({"images": batch} for batch in _batches(images, shape[0]))

        def get_next(self) -> Optional[dict[str, np.ndarray]]:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory(prefix="mindska") as folder:
        exact, prepared = Path(folder) / "float32.onnx", Path(folder) / "prepared.onnx"
        export(net, exact, shape, record, **dynamic)
        record = dict(json.loads(record_path(exact).read_text(encoding="utf-8")), int8=True)
        with replacing(record_path(path)) as beside, replacing(path) as temporary:
            try:
                # Folded as it is, it needs shapes alone.
                quant_pre_process(str(exact), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
                quantize_static(
                    str(prepared),
                    str(temporary),
                    Images(),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=list(QUANTISED),
                    per_channel=True,
                    activation_type=QuantType.QInt8,
                    weight_type=QuantType.QInt8,
                )
            except Exception as error:  # onnxruntime's own, of many kinds
                raise ExportError(f"onnxruntime cannot quantise the network: {str(error).strip()[:300]}") from error
            _write_records(temporary, beside, record)
            return _compared(exact, temporary, images, record, validation)


def _write_records(model_path: Path, beside: Path, record: dict[str, Any]) -> None:
    import onnx

    text = json.dumps(record, indent=1, allow_nan=False)
    beside.write_text(text + "\n", encoding="utf-8")
    model = onnx.load(str(model_path))
    model.producer_name = "mindska"
    onnx.helper.set_model_props(model, {METADATA: text})
    onnx.checker.check_model(model)
    onnx.save(model, str(model_path))


def _compared(
    exact: Path, path: Path, images: Sequence[np.ndarray], record: dict[str, Any], validation: Optional[Dataset]
) -> Quantised:
    run, run_int8, batch = open_model(exact), open_model(path), record["input_shape"][0] or BATCH
    same = total = 0
    for part in _batches(images, batch):
        before, after = run(part)[0], run_int8(part)[0]
        if not np.isfinite(after).all():
            raise ExportError("The quantised network gives NaN or infinity; nothing was written")
        same, total = same + int((before.argmax(1) == after.argmax(1)).sum()), total + len(part)
    found = Quantised(len(images), 100 * same / total)
    if validation is None:
        return found
    loader = EvalLoader(validation, EvalTransform(Preprocessing(**record["preprocessing"])), batch)
    return replace(found, before=_accuracy(run, loader), after=_accuracy(run_int8, loader))


def _batches(images: Sequence[np.ndarray], batch: int) -> Iterator[np.ndarray]:
    """Images in batches of one size; the last is filled up with the first images."""
    padded = [*images, *(images[i % len(images)] for i in range(-len(images) % batch))]
    return (np.stack(padded[i : i + batch]) for i in range(0, len(padded), batch))


def validation_images(data_dir: Path, record: dict[str, Any]) -> Dataset:
    """The validation images of a folder, `val/CLASS/*`, in the order of the network's classes.

    Raises:
        DataError: it is no such folder, or has other classes.
    """
    names = record.get("class_names")
    dataset = open_dataset("imagenet", data_dir, "val", trained_on=names)
    if names and dataset.class_names != names or len(dataset.class_names) != record["num_classes"]:
        raise DataError(
            f"{data_dir} has {len(dataset.class_names)} classes ({few(dataset.class_names, 5)}), the network "
            f"{record['num_classes']} ({few(names or ['without names'], 5)}): its accuracy there says nothing"
        )
    return dataset


def _accuracy(run: Callable, loader: EvalLoader) -> Result:
    with pynative_mode():
        step = EvalStep(lambda images: Tensor(run(images.asnumpy())[0]))
        step.prepared = True  # there is no graph to compile
        return evaluate(step, loader, lambda sums: sums)
