"""Networks out to MindIR and ONNX, checked after writing, with the record beside them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from .acceleration import decelerated
from .errors import ExportError, UserError, WeightsError
from .exported import Exported, private_copy, read_exported
from .files import replacing
from .models.layers.blocks import GELU, SQRT_HALF
from .verification import Agreement, compare
from .weights.files import METADATA, read_bytes
from .weights.record import EXPORTED, checked_record, read_record

FORMATS = ("mindir", "onnx")


def record_path(path: Path) -> Path:
    """Where the record of an exported model lies."""
    return path.with_name(f"{path.name}.json")


def check_packages(kind: str, exporting: bool = True) -> None:
    """ExportError when a package is missing that writing, or running, "onnx" or "mindir" needs: before the work."""
    if kind == "onnx":
        try:
            import onnxruntime  # noqa: F401

            if exporting:
                import onnx  # noqa: F401
        except ImportError as error:
            raise ExportError(f"ONNX needs more packages: pip install 'mindska[onnx]' ({error})") from error


def export(net: nn.Cell, path: Path, shape: tuple[int, int, int, int], record: dict[str, Any]) -> Agreement:
    """Writes the network for inputs (B, C, H, W) of one shape to `path` (.mindir or .onnx), runs what was written, and
    writes the record beside it (and into an ONNX file's metadata). Acceleration is off meanwhile: a file with our
    operators would name libraries of this machine.

    Returns:
        How far the written model's outputs are from the network's.

    Raises:
        ExportError: MindSpore cannot export the network, the written model does not compute what the network does, or a
            package is missing; nothing is left.
        SettingError: the images are too small for the network.
        WriteError: the file cannot be written. What was there before is intact.
    """
    check_packages(path.suffix[1:])
    check_size = getattr(getattr(net, "net", net), "check_image_size", None)  # MindCV's other networks have none
    if check_size:
        check_size(*shape[2:])
    with decelerated(net):
        return _export(net, path, shape, record)


def _export(net: nn.Cell, path: Path, shape: tuple[int, int, int, int], record: dict[str, Any]) -> Agreement:
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with graph_mode():
        result = net(Tensor(images))
        net = net if isinstance(result, Tensor) else _Tuple(net)
        expected = _as_list(result)
        if not all(np.isfinite(output).all() for output in expected):
            raise ExportError("The network itself gives NaN or infinity for random images; are its weights damaged?")
        outputs = ["logits"] if len(expected) == 1 else [f"feature{i}" for i in range(len(expected))]
        record = dict(record, input_shape=list(shape), inputs=["images"], outputs=outputs)
        try:
            text = json.dumps(checked_record(json.loads(json.dumps(record))), indent=1, allow_nan=False)
        except (WeightsError, ValueError, TypeError) as error:
            raise ExportError(f"The record of the network cannot be written: {error}") from error
        # The record is written first and moved to its place last: neither is there without the other.
        with replacing(record_path(path)) as beside:
            beside.write_text(text + "\n", encoding="utf-8")
            with replacing(path) as temporary:
                try:
                    (_write_mindir if path.suffix == ".mindir" else _write_onnx)(net, temporary, images, record)
                except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # MindSpore's own
                    if isinstance(error, UserError):
                        raise
                    raise ExportError(
                        f"MindSpore cannot export this network to {path.suffix[1:]}: {str(error).strip()[:300]}"
                    ) from error
                return compare(net, images, expected, read_exported(temporary), _runnable)


def open_model(path: Path) -> Any:
    """An exported model as a function: images (B, C, H, W) float32, in the shape it was exported for -> list of arrays.

    Raises:
        ExportError: onnxruntime is missing, the file is no such model or not a plain one (see `mindska.exported`), or
            (from the function) the images have another shape.
    """
    return _runnable(read_exported(path))


def _runnable(model: Exported) -> Any:
    path = model.path
    try:
        if path.suffix == ".mindir":
            with private_copy(model) as copy:
                graph = nn.GraphCell(ms.load(str(copy)))

            def run(images: np.ndarray) -> list[np.ndarray]:
                return _as_list(graph(Tensor(images)))

        else:
            check_packages("onnx", exporting=False)
            import onnxruntime as runtime

            options = runtime.SessionOptions()
            options.add_session_config_entry("session.load_model_format", "ONNX")
            options.log_severity_level = 4  # its errors are raised as well
            # Its fallback would print, between the predictions, that it tries the same again.
            session = runtime.InferenceSession(
                model.content, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            name = session.get_inputs()[0].name

            def run(images: np.ndarray) -> list[np.ndarray]:
                return session.run(None, {name: images})

    except UserError:
        raise
    except Exception as error:  # either library's own, of many kinds
        raise ExportError(f"{path} is not a readable {path.suffix[1:]} model: {str(error).strip()[:300]}") from error

    def checked(images: np.ndarray) -> list[np.ndarray]:
        if images.shape != model.input_shape:
            raise ExportError(f"{path} takes images of the shape {model.input_shape}; these have {images.shape}")
        try:
            return run(images)
        except Exception as error:
            raise ExportError(f"{path} cannot be run: {str(error).strip()[:300]}") from error

    return checked


def open_with_record(path: Path) -> tuple[Any, dict[str, Any]]:
    """An exported model as a function (see `open_model`), and its record: ONNX's metadata, or the JSON file beside it.

    Raises:
        ExportError: as `open_model`; there is no record, it is damaged, or is not this model's.
    """
    _refuse_without_record(path)
    model = read_exported(path)
    record = _record(model)
    if tuple(record["input_shape"]) != model.input_shape:
        raise ExportError(
            f"{path} takes images of the shape {model.input_shape}, but its record says {record['input_shape']}: it is "
            f"the record of another model"
        )
    return _runnable(model), record


def read_model_record(path: Path) -> dict[str, Any]:
    """The record of an exported model: ONNX's metadata, or the JSON file beside it.

    Raises:
        ExportError: there is none, or it is damaged.
    """
    _refuse_without_record(path)
    return _record(read_exported(path))


def _refuse_without_record(path: Path, inside: bool = True) -> None:
    """`inside`: an ONNX file may have it in itself."""
    if not (record_path(path).is_file() or (inside and path.suffix == ".onnx")):
        raise ExportError(f"{path} has no record: {record_path(path)}, which `mindska export` wrote, is missing")


def _record(model: Exported) -> dict[str, Any]:
    place, text = model.path, model.record
    try:
        if text is None:
            _refuse_without_record(model.path, inside=False)
            place = record_path(model.path)
            text = read_bytes(place).decode("utf-8")
        return read_record(text, EXPORTED)
    except UnicodeDecodeError as error:
        raise ExportError(f"{place} is no text in UTF-8: {error}") from error
    except WeightsError as error:
        raise ExportError(f"{place}: {error}") from None


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


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A temporary folder, made the current one: MindSpore's exports refuse paths with spaces, umlauts and the like, and
    leave files where they fail."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="mindska") as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def _write_mindir(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    with _scratch_folder() as folder:
        ms.export(net, Tensor(images), file_name="model.mindir", file_format="MINDIR")
        content = (folder / "model.mindir").read_bytes()
    path.write_bytes(content)


def _write_onnx(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any]) -> None:
    import onnx

    with _erf_as_softsign(net), _scratch_folder() as folder:
        ms.onnx.export(net, Tensor(images), file_name="model.onnx")
        model = onnx.load(str(folder / "model.onnx"))
    values = (*model.graph.input, *model.graph.output)
    _mend(model.graph, {value.name: name for value, name in zip(values, record["inputs"] + record["outputs"])})
    model.producer_name = "mindska"
    onnx.helper.set_model_props(model, {METADATA: json.dumps(record, allow_nan=False)})
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

    gelus: list[nn.Cell] = [cell for _, cell in net.cells_and_names() if isinstance(cell, GELU)]
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
