"""Networks out to MindIR and ONNX, checked after writing, with the record beside them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from .acceleration import decelerated
from .errors import ExportError, UserError, WeightsError
from .exported import Exported, private_copy, read_exported
from .files import replacing
from .modes import graph_mode, pynative_mode
from .verification import Agreement, as_arrays, compare
from .weights.files import METADATA, read_bytes
from .weights.record import EXPORTED, checked_record, read_record

FORMATS = ("mindir", "onnx")
CHECKED = 3  # images at once, with which an ONNX file is compared that takes any number; and one alone


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


def export(
    net: nn.Cell,
    path: Path,
    shape: tuple[int, int, int, int],
    record: dict[str, Any],
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    half: bool = False,
) -> Agreement:
    """Writes the network to `path` (.mindir or .onnx), runs what was written, and writes the record beside it (and into
    an ONNX file's metadata). Acceleration is off meanwhile: a file with our operators would name libraries of this
    machine.

    Args:
        shape: (B, C, H, W) of the images. A MindIR takes these only.
        dynamic_batch: an ONNX file takes any number of images.
        dynamic_size: an ONNX file takes any height and width, where the network allows it (see `sizes_are_fixed` in
            `mindska.onnx_graph`).
        half: an ONNX file computes in float16, but for SkaNet's neighbour search; it takes and gives float32.

    Returns:
        How far the written model's outputs are from the network's, at worst over several shapes.

    Raises:
        ExportError: the network cannot be exported, the written model does not compute what the network does, or a
            package is missing; nothing is left.
        SettingError: the images are too small for the network.
        WriteError: the file cannot be written. What was there before is intact.
    """
    check_packages(path.suffix[1:])
    if half and path.suffix != ".onnx":
        raise ExportError("Half precision is written to ONNX only")
    check_size = getattr(getattr(net, "net", net), "check_image_size", None)  # MindCV's other networks have none
    if check_size:
        check_size(*shape[2:])
    with decelerated(net):
        if path.suffix == ".mindir":
            with graph_mode():
                return _export(net, path, [shape], record, _write_mindir)
        from . import onnx_detection, onnx_segmentation  # noqa: F401  register their writers
        from .onnx_graph import onnx_model, sizes_are_fixed

        dynamic_size = dynamic_size and not sizes_are_fixed(net)
        batch, channels, *size = shape
        written = (None if dynamic_batch else batch, channels, *((None, None) if dynamic_size else size))

        def write(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any], outputs: dict) -> None:
            _save_onnx(onnx_model(net, written, outputs, half), path, record)

        shapes = [(max(batch, CHECKED) if dynamic_batch else batch, channels, *size)]
        if dynamic_size:
            shapes.append((1 if dynamic_batch else batch, channels, size[0] + 33, size[1] + 20))  # odd and even
        record = dict(record, input_shape=written, half=half)
        with pynative_mode():
            return _export(net, path, shapes, record, write, half)


def _export(
    net: nn.Cell,
    path: Path,
    shapes: Sequence[tuple[int, ...]],
    record: dict[str, Any],
    write: Callable[[nn.Cell, Path, np.ndarray, dict[str, Any], dict[str, tuple[int, ...]]], None],
    half: bool = False,
) -> Agreement:
    """`shapes`: of the images with which network and file are compared; of the first, one image alone as well."""
    rng = np.random.default_rng(0)
    cases = [(images, _outputs(net, images)) for images in (rng.standard_normal(s, dtype=np.float32) for s in shapes)]
    record = dict(dict(input_shape=list(shapes[0])), **record, inputs=["images"])
    images, expected = cases[0]
    record["outputs"] = _output_names(net, len(expected))
    record["input_shape"] = list(record["input_shape"])
    if record["input_shape"][0] is None:
        cases.append((images[:1], [output[:1] for output in expected]))
    try:
        text = json.dumps(checked_record(json.loads(json.dumps(record))), indent=1, allow_nan=False)
    except (WeightsError, ValueError, TypeError) as error:
        raise ExportError(f"The record of the network cannot be written: {error}") from error
    # The record is written first and moved to its place last: neither is there without the other.
    with replacing(record_path(path)) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
        with replacing(path) as temporary:
            try:
                write(net, temporary, images, record, dict(zip(record["outputs"], (out.shape for out in expected))))
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # MindSpore's own
                if isinstance(error, UserError):
                    raise
                raise ExportError(
                    f"This network cannot be exported to {path.suffix[1:]}: {str(error).strip()[:300]}"
                ) from error
            model = read_exported(temporary)
            run = _Runnables()
            return max(
                (compare(net, images, expected, model, run, half) for images, expected in cases),
                key=lambda agreement: agreement.difference,
            )


class _Runnables:
    """Models as functions, each made once."""

    def __init__(self) -> None:
        self.made: dict[bytes, Any] = {}

    def __call__(self, model: Exported) -> Any:
        if model.content not in self.made:
            self.made[model.content] = _runnable(model)
        return self.made[model.content]


def _outputs(net: nn.Cell, images: np.ndarray) -> list[np.ndarray]:
    outputs = as_arrays(net(Tensor(images)))
    if not all(np.isfinite(output).all() for output in outputs):
        raise ExportError("The network itself gives NaN or infinity for random images; are its weights damaged?")
    return outputs


def _output_names(net: nn.Cell, count: int) -> list[str]:
    inner = getattr(net, "net", net)
    if hasattr(inner, "head_maps"):  # a detector
        return [f"{kind}{level}" for kind in ("scores", "deltas") for level in range(count // 2)]
    if getattr(inner, "features_only", False):
        return [f"feature{i}" for i in range(count)]
    return ["logits" if getattr(inner, "num_classes", None) != 0 else "features"]


def open_model(path: Path) -> Any:
    """An exported model as a function: images (B, C, H, W) float32, in a shape that it takes -> list of arrays.

    Raises:
        ExportError: onnxruntime is missing, the file is no such model or not a plain one (see `mindska.exported`), or
            (from the function) the images have another shape.
    """
    return _runnable(read_exported(path))


def _onnxruntime() -> Any:
    check_packages("onnx", exporting=False)
    import onnxruntime

    return onnxruntime


def _runnable(model: Exported) -> Any:
    path = model.path
    try:
        if path.suffix == ".mindir":
            with private_copy(model) as copy:
                graph = nn.GraphCell(ms.load(str(copy)))

            def run(images: np.ndarray) -> list[np.ndarray]:
                return as_arrays(graph(Tensor(images)))

        else:
            runtime = _onnxruntime()
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
        if not fits(images.shape, model.input_shape):
            raise ExportError(
                f"{path} takes images of the shape {shape_text(model.input_shape)}; these have {images.shape}"
            )
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
            f"{path} takes images of the shape {shape_text(model.input_shape)}, but its record says "
            f"{shape_text(record['input_shape'])}: it is the record of another model"
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


def fits(shape: Sequence[int], input_shape: Sequence[Optional[int]]) -> bool:
    """Whether images of a shape are what a model takes; None in `input_shape`: any number."""
    return len(shape) == len(input_shape) and all(own in (None, side) for side, own in zip(shape, input_shape))


def shape_text(input_shape: Sequence[Optional[int]]) -> str:
    """A shape as (batch, 3, 256, 256), with a word for what is free."""
    words = (
        name if side is None else side for side, name in zip(input_shape, ("batch", "channels", "height", "width"))
    )
    return f"({', '.join(map(str, words))})"


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


def _write_mindir(net: nn.Cell, path: Path, images: np.ndarray, record: dict[str, Any], outputs: dict) -> None:
    net = net if len(outputs) == 1 else _Tuple(net)
    with _scratch_folder() as folder:
        ms.export(net, Tensor(images), file_name="model.mindir", file_format="MINDIR")
        content = (folder / "model.mindir").read_bytes()
    path.write_bytes(content)


def _save_onnx(model: Any, path: Path, record: dict[str, Any]) -> None:
    import onnx

    onnx.helper.set_model_props(model, {METADATA: json.dumps(record, allow_nan=False)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


class _Tuple(nn.Cell):
    """A network whose list of features becomes a tuple, as MindSpore exports it."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, x: Tensor) -> tuple:
        return tuple(self.net(x))
