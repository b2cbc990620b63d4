"""Networks out to MindIR and ONNX, checked after writing, with the record beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .errors import UserError
from .models.layers.blocks import GELU, SQRT_HALF
from .weights.files import METADATA, replacing

FORMATS = ("mindir", "onnx")
TOLERANCE = 1e-4  # of the largest output: other libraries sum in another order


class ExportError(UserError, RuntimeError):
    """An export that failed, or that does not compute what the network does."""


def record_path(path: Path) -> Path:
    """Where the record of an exported model lies."""
    return path.with_name(f"{path.name}.json")


def export(net: nn.Cell, path: Path, shape: tuple[int, int, int, int], record: dict[str, Any]) -> float:
    """Writes the network for inputs (B, C, H, W) of one shape to `path` (.mindir or .onnx), runs what was written, and
    writes the record beside it (and into an ONNX file's metadata).

    Returns:
        The largest difference of the written model's outputs from the network's, over their largest magnitude.

    Raises:
        ExportError: the written model does not compute what the network does, or a package is missing; nothing is left.
        WriteError: the file cannot be written. What was there before is intact.
    """
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with graph_mode():
        result = net(Tensor(images))
        net = net if isinstance(result, Tensor) else _Tuple(net)
        expected = _as_list(result)
        if not all(np.isfinite(output).all() for output in expected):
            raise ExportError("The network itself gives NaN or infinity for random images; are its weights damaged?")
        outputs = ["logits"] if len(expected) == 1 else [f"feature{i}" for i in range(len(expected))]
        record = dict(record, input_shape=list(shape), inputs=["images"], outputs=outputs)
        # The record is written first and moved to its place last: neither is there without the other.
        with replacing(record_path(path)) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            with replacing(path) as temporary:
                (_write_mindir if path.suffix == ".mindir" else _write_onnx)(net, temporary, images, record)
                written = open_model(temporary)(images)
                scale = max(np.abs(output).max() for output in expected)
                difference = float(max(np.abs(a - b).max() for a, b in zip(written, expected)) / scale)
                if not difference <= TOLERANCE:
                    raise ExportError(
                        f"The exported model's outputs differ from the network's by {difference:.1e} of the largest, "
                        f"more than {TOLERANCE:.0e}; nothing was written"
                    )
    return difference


def open_model(path: Path) -> Any:
    """An exported model as a function: images (B, C, H, W) float32, in the shape it was exported for -> list of arrays.

    Raises:
        ExportError: onnxruntime is missing, or the file is no such model.
    """
    try:
        if path.suffix == ".mindir":
            graph = nn.GraphCell(ms.load(str(path)))
            return lambda images: _as_list(graph(Tensor(images)))
        session = _onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})
    except UserError:
        raise
    except Exception as error:  # either library's own, of many kinds
        raise ExportError(f"{path} is not a readable {path.suffix[1:]} model: {error}") from error


def read_model_record(path: Path) -> dict[str, Any]:
    """The record of an exported model: ONNX's metadata, or the JSON file beside it.

    Raises:
        ExportError: there is none.
    """
    if path.suffix == ".onnx":
        try:
            session = _onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except UserError:
            raise
        except Exception as error:
            raise ExportError(f"{path} is not a readable ONNX model: {error}") from error
        text = session.get_modelmeta().custom_metadata_map.get(METADATA)
        if text:
            return json.loads(text)
    if not record_path(path).is_file():
        raise ExportError(f"{path} has no record: {record_path(path)}, which scripts/export.py wrote, is missing")
    return json.loads(record_path(path).read_text(encoding="utf-8"))


@contextmanager
def graph_mode() -> Iterator[None]:
    """MindSpore's graph mode, for exports and for running what was exported."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)


def _as_list(outputs: Any) -> list[np.ndarray]:
    return [output.asnumpy() for output in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]


def _write_mindir(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    ms.export(net, Tensor(images), file_name=str(path), file_format="MINDIR")


def _write_onnx(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    try:
        import onnx
    except ImportError as error:
        raise ExportError("Exporting to ONNX needs two more packages: pip install 'mindska[onnx]'") from error
    with _erf_as_softsign(net):
        ms.onnx.export(net, Tensor(images), file_name=str(path))
    model = onnx.load(str(path))
    values = (*model.graph.input, *model.graph.output)
    _mend(model.graph, {value.name: name for value, name in zip(values, record["inputs"] + record["outputs"])})
    model.producer_name = "mindska"
    onnx.helper.set_model_props(model, {METADATA: json.dumps(record)})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


class _Tuple(nn.Cell):
    """A network whose list of features becomes a tuple: ONNX has no lists."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x: Tensor) -> tuple:
        return tuple(self.net(x))


@contextmanager
def _erf_as_softsign(net: nn.Cell) -> Iterator[None]:
    """MindSpore (2.8) cannot export erf, so a GELU goes out with a softsign in its place, which no network of ours has;
    `_mend` puts the erf back."""

    def construct(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + ops.softsign(x * SQRT_HALF))

    gelus = [cell for _, cell in net.cells_and_names() if isinstance(cell, GELU)]
    for cell in gelus:
        cell.construct = MethodType(construct, cell)
    try:
        yield
    finally:
        for cell in gelus:
            del cell.construct


def _mend(graph: Any, names: dict[str, str]) -> None:
    """Corrects what MindSpore (2.8) writes into ONNX, and renames some values."""
    for node in graph.node:
        if node.op_type == "Softsign":
            node.op_type = "Erf"
        for attribute in node.attribute:
            if node.op_type == "Conv" and attribute.name == "pads" and len(attribute.ints) == 4:
                top, bottom, left, right = attribute.ints  # MindSpore's order; ONNX: all begins, then all ends
                attribute.ints[:] = [top, left, bottom, right]
        # MindSpore's own option for the outputs' names forgets the nodes that go on from an output.
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("Running ONNX needs two more packages: pip install 'mindska[onnx]'") from error
    return onnxruntime
