"""Exported models as strangers' files: a MindIR or ONNX file is read here, as protobuf, before a runtime sees it.

MindSpore runs what a MindIR says: its operator `Custom` loads a library that the file names. So nothing reaches a
runtime but graphs of the operators in the tables below: those that networks of ours are exported as, and other plain
ones, which compute from their inputs and attributes alone. No nested graphs and functions, no values in other files, no
extensions.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from google.protobuf.message import DecodeError
from mindspore.train import mind_ir_pb2

from .errors import ExportError, WeightsError, few, printable
from .weights.files import METADATA, read_bytes
from .weights.protobuf import Field, check_fields, message_classes


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


MINDIR_OPERATORS = _words(
    # what SkaNet, VAN, LSKA, SKNet and SK-ResNet are exported as, folded or not, with a classifier or without
    "Add AvgPool BatchMatMul BatchNorm BiasAdd Concat Conv2D Depend Div Erf ExpandDims Gather LayerNorm Load MakeTuple",
    "MatMul MaxPool Maximum Mul Muls ReLU ReduceMean Reshape Sigmoid Softmax Split Sqrt Stack StridedSlice Sub SumExt",
    "TopK Transpose TupleGetItem UpdateState",
    "BroadcastTo ResizeBilinearV2 Zeros",  # of segmenters
    # others that are as plain
    "Abs AddExt Cast ConcatExt DepthwiseConv2dNative Exp Flatten GatherD GeLU HSigmoid HSwish Identity ListGetItem Log",
    "LogSoftmax MakeList MeanExt Minimum Neg Pow RealDiv ReLU6 ReduceMax ReduceMin ReduceSum Rsqrt SiLU Square Squeeze",
    "SubExt Tanh",
)
MINDIR_ATTRIBUTES = _words(
    "N axis begin_norm_axis begin_params_axis ceil_mode checkpoint count_include_pad data_format dilation dilations",
    "divisor_override epsilon format group groups has_bias input_names is_training keep_dims kernel_size mode momentum",
    "num out_channel output_names output_num pad pad_list pad_mode shape side_effect_io side_effect_mem",
    "side_effect_propagate skip_mode sorted stride strides transpose_a transpose_b transpose_x1 transpose_x2 value",
)
ONNX_OPERATORS = _words(
    "Add AveragePool BatchNormalization Cast Concat Conv DequantizeLinear Div Erf Flatten Gather GatherElements Gemm",
    "GlobalAveragePool GlobalMaxPool Identity LayerNormalization MatMul Max MaxPool Mul QuantizeLinear ReduceMax",
    "ReduceSum Relu Reshape Sigmoid Softmax Split Sqrt Sub TopK Transpose",
    "Expand Pad Resize Shape Slice",  # of segmenters
    # what earlier versions wrote
    "ConcatFromSequence Constant GatherND ReduceMean ReduceSumSquare SequenceConstruct Softsign Squeeze",
    # others that are as plain
    "Abs ArgMax Clip Dropout Exp Gelu HardSigmoid HardSwish LeakyRelu Log LogSoftmax Min Neg Pow ReduceL2 ReduceMin",
    "Reciprocal Tanh Unsqueeze",
)
ONNX_DOMAINS = ("", "ai.onnx")
ATTRIBUTE_TYPES = _words(
    "UNDEFINED FLOAT UINT8 INT8 UINT16 INT16 INT32 INT64 STRING BOOL FLOAT16 DOUBLE UINT32 UINT64 BFLOAT16 TENSOR",
    "TENSORS TUPLE LIST UMONAD IOMONAD NONE",
)
ITEM_SIZES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2, 17: 8}  # of data types
MOST_VALUES = 2**31  # of a tensor


@dataclass(frozen=True)
class Exported:
    """An exported model that was read and found plain.

    Attributes:
        content: the file's bytes: what is run must be these, not the file as it may be later.
        input_shape: (B, C, H, W) of its only input, None where it takes any.
        record: the text of its record, where it lies in the file.
    """

    path: Path
    content: bytes
    input_shape: tuple[Optional[int], ...]
    record: Optional[str] = None


def read_exported(path: Path) -> Exported:
    """Reads a `.mindir` or `.onnx` file and refuses all that is not plain, before any runtime sees it.

    Raises:
        ExportError: it is damaged, or holds something that is not in this module's tables.
    """
    check = _check_mindir if path.suffix == ".mindir" else _check_onnx
    try:
        content = read_bytes(path)
        return check(path, content)
    except ExportError as error:
        raise ExportError(
            f"{path} was not opened: {error}. Only plain operators are run, never code or files that a model names"
        ) from None
    except (WeightsError, DecodeError, ValueError, UnicodeDecodeError) as error:
        raise ExportError(f"{path} is not a readable {path.suffix[1:]} model: {error}") from None


@contextmanager
def private_copy(model: Exported) -> Iterator[Path]:
    """The content that was checked, in a folder that nobody else can change and with nothing beside it."""
    with tempfile.TemporaryDirectory(prefix="mindska") as folder:
        copy = Path(folder) / f"model{model.path.suffix}"
        copy.write_bytes(model.content)
        yield copy


def _refuse(names: Iterable[str], what: str) -> None:
    if names := sorted(set(names)):
        raise ExportError(f"it has {what}: {few(names)}")


def _filled(message: Any, *fields: str) -> Iterator[str]:
    """Those of some fields that a message has."""
    present = {field.name for field, _ in message.ListFields()}
    return (name for name in fields if name in present and getattr(message, name))


def _check_mindir(path: Path, content: bytes) -> Exported:
    check_fields(content, mind_ir_pb2.ModelProto)
    model = mind_ir_pb2.ModelProto.FromString(content)
    graph = model.graph
    _refuse(_filled(model, "functions", "preprocessor", "parallel"), "more than one graph")
    _refuse(_filled(graph, "map_parameter", "bprop_filepath", "bprop_hash"), "more than a graph")
    _refuse((p.op_type for p in model.primitives if p.op_type not in MINDIR_OPERATORS), "operators that are not plain")
    for primitive in model.primitives:
        if primitive.name.partition(":")[0] != primitive.op_type:
            raise ExportError(f"it calls the operator {printable(primitive.op_type)} {printable(primitive.name)}")
        _check_attributes(primitive.attribute)
    known = {f"REF::{primitive.name}" for primitive in model.primitives}
    values = {parameter.name for parameter in graph.parameter} | {entry.name for entry in graph.input}
    for parameter in graph.parameter:
        _check_mindir_tensor(parameter, filled=True)
    for node in graph.node:
        if node.op_type != "Constant" and node.op_type not in known:
            raise ExportError(f"it has operators that are not plain: {printable(node.op_type)}")
        _refuse((name for name in node.input if name not in values), "inputs that are nowhere")
        values.update(node.output)
        constant = node.op_type == "Constant"
        for attribute in (*node.attribute, *node.node_attr, *node.primal_attr):
            _check_attributes([attribute], filled=constant and attribute.name == "value")
    _refuse((entry.name for entry in graph.output if entry.name not in values), "outputs that are nowhere")
    _check_attributes(graph.attribute, any_name=True)
    shapes = [tuple(tensor.dims) for entry in graph.input for tensor in entry.tensor]
    if len(graph.input) != 1 or len(shapes) != 1:
        raise ValueError(f"it has {len(graph.input)} inputs; expected one, the images")
    return Exported(path, content, shapes[0])


def _check_attributes(attributes: Iterable[Any], filled: bool = False, any_name: bool = False) -> None:
    """`filled`: the tensors have values."""
    attributes = list(attributes)
    if not any_name:
        _refuse((a.name for a in attributes if a.name not in MINDIR_ATTRIBUTES), "attributes that are not plain")
    waiting = attributes
    while waiting:
        attribute = waiting.pop()
        kind = mind_ir_pb2.AttributeProto.AttributeType.Name(attribute.type)
        if kind not in ATTRIBUTE_TYPES:
            raise ExportError(f"it has attributes that are not plain: {printable(attribute.name)} of the type {kind}")
        _refuse(_filled(attribute, "g", "graphs", "functor", "graph_holder", "ref_attr_name"), "graphs in attributes")
        for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
            _check_mindir_tensor(tensor, filled)
        waiting.extend(attribute.values)
        if attribute.HasField("seq_info") and attribute.seq_info.HasField("tuple_elem_item"):
            waiting.append(attribute.seq_info.tuple_elem_item)


def _check_mindir_tensor(tensor: Any, filled: bool) -> None:
    """`filled`: it must have its values; otherwise it says a type and a shape, and may have them."""
    values = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "external_data")
    _refuse(
        _filled(tensor, *values, "quant_params", "compression_type"), f"values of {printable(tensor.name)} elsewhere"
    )
    size = _values(tensor.dims)
    if (filled or tensor.raw_data) and size * ITEM_SIZES.get(tensor.data_type, 0) != len(tensor.raw_data):
        raise ValueError(
            f"the tensor {printable(tensor.name)} has the shape {tuple(tensor.dims)[:10]} but {len(tensor.raw_data):,} "
            f"bytes of values"
        )


def _values(dims: Iterable[int]) -> int:
    dims = list(dims)
    if len(dims) > 8 or min(dims, default=1) < 0 or math.prod(dims) > MOST_VALUES:
        raise ValueError(f"a tensor has the shape {tuple(dims[:10])}")
    return math.prod(dims)


# The part of ONNX's schema that says what a model runs and where its values lie.
ONNX = message_classes(
    "mindska_onnx",
    {
        "Text": [("key", 1, Field.TYPE_STRING, False), ("value", 2, Field.TYPE_STRING, False)],
        "OperatorSet": [("domain", 1, Field.TYPE_STRING, False), ("version", 2, Field.TYPE_INT64, False)],
        "Tensor": [
            ("dims", 1, Field.TYPE_INT64, True),
            ("data_type", 2, Field.TYPE_INT32, False),
            ("name", 8, Field.TYPE_STRING, False),
            ("external_data", 13, "Text", True),
            ("data_location", 14, Field.TYPE_INT32, False),
        ],
        "Attribute": [
            ("name", 1, Field.TYPE_STRING, False),
            ("t", 5, "Tensor", False),
            ("g", 6, Field.TYPE_BYTES, False),
            ("tensors", 10, "Tensor", True),
            ("graphs", 11, Field.TYPE_BYTES, True),
            ("ref_attr_name", 21, Field.TYPE_STRING, False),
            ("sparse_tensor", 22, Field.TYPE_BYTES, False),
            ("sparse_tensors", 23, Field.TYPE_BYTES, True),
        ],
        "Node": [
            ("op_type", 4, Field.TYPE_STRING, False),
            ("attribute", 5, "Attribute", True),
            ("domain", 7, Field.TYPE_STRING, False),
        ],
        "Dimension": [("dim_value", 1, Field.TYPE_INT64, False)],
        "Shape": [("dim", 1, "Dimension", True)],
        "TensorType": [("elem_type", 1, Field.TYPE_INT32, False), ("shape", 2, "Shape", False)],
        "Type": [("tensor_type", 1, "TensorType", False)],
        "ValueInfo": [("name", 1, Field.TYPE_STRING, False), ("type", 2, "Type", False)],
        "Graph": [
            ("node", 1, "Node", True),
            ("initializer", 5, "Tensor", True),
            ("input", 11, "ValueInfo", True),
            ("sparse_initializer", 15, Field.TYPE_BYTES, True),
        ],
        "Model": [
            ("ir_version", 1, Field.TYPE_INT64, False),
            ("graph", 7, "Graph", False),
            ("opset_import", 8, "OperatorSet", True),
            ("metadata_props", 14, "Text", True),
            ("training_info", 20, Field.TYPE_BYTES, True),
            ("functions", 25, Field.TYPE_BYTES, True),
        ],
    },
)


def _check_onnx(path: Path, content: bytes) -> Exported:
    check_fields(content, ONNX["Model"])
    model = ONNX["Model"].FromString(content)
    graph = model.graph
    _refuse(_filled(model, "functions", "training_info"), "more than one graph")
    _refuse(_filled(graph, "sparse_initializer"), "values that are not plain")
    _refuse((o.domain for o in model.opset_import if o.domain not in ONNX_DOMAINS), "operators of other domains")
    _refuse((n.domain for n in graph.node if n.domain not in ONNX_DOMAINS), "operators of other domains")
    _refuse((n.op_type for n in graph.node if n.op_type not in ONNX_OPERATORS), "operators that are not plain")
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            inner = _filled(attribute, "g", "graphs", "ref_attr_name", "sparse_tensor", "sparse_tensors")
            _refuse(inner, f"an attribute {printable(attribute.name)} that is not plain")
            tensors += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
    for tensor in tensors:
        _refuse(
            _filled(tensor, "external_data", "data_location"), f"values of {printable(tensor.name)} in another file"
        )
        _values(tensor.dims)
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [entry for entry in graph.input if entry.name not in weights]
    if len(inputs) != 1:
        raise ValueError(f"it has {len(inputs)} inputs; expected one, the images")
    shape = tuple(dimension.dim_value or None for dimension in inputs[0].type.tensor_type.shape.dim)
    return Exported(path, content, shape, next((t.value for t in model.metadata_props if t.key == METADATA), None))
