"""Networks of mindska as ONNX graphs: one function a kind of cell, which writes its equation in ONNX's operators.

MindSpore's own exporter (2.8) writes operators of opset 11 for one shape, with sequences and `auto_pad`, which other
runtimes refuse or compute otherwise. Here the number of images stays free, and so do height and width where the
network's equations allow; pads are explicit; and nothing is written but operators that onnxruntime, OpenVINO, OpenCV
and TensorRT know. `mindska.export` compares every file with the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import numpy as np
from mindspore import Parameter, nn
from onnx import ModelProto, TensorProto, helper, numpy_helper

from .acceleration.folded import FoldedBlock, FoldedSplitKernelAttention
from .errors import ExportError
from .models.layers.backbone import Backbone
from .models.layers.blocks import GELU, SQRT_HALF, Attention, Block, ConvMlp, LayerNorm2d, PatchEmbed
from .models.layers.graph import MaxRelativeConv, NearestNodes, relative_position
from .models.layers.pooling import StemPool
from .models.layers.pyramid import Stage
from .models.skanet import SplitKernelAttention
from .models.sknet import ConvNorm, SelectiveKernel, SKUnit
from .models.van import LargeKernelAttention

OPSET, IR_VERSION = 17, 8  # the first with LayerNormalization; runtimes of 2022 and later read it
DIMENSIONS = ("batch", "channels", "height", "width")
WRITERS: dict[type, Callable[[OnnxGraph, Any, Any], Any]] = {}  # exact class of a cell -> what writes it
FIXED_SIZES: dict[type, str] = {NearestNodes: "SkaNet's relative position belongs to one height and width"}


def sizes_are_fixed(net: nn.Cell) -> str:
    """Why a network is exported for one height and width; empty where both can stay free."""
    for _, cell in net.cells_and_names():
        if type(cell) in FIXED_SIZES:
            return FIXED_SIZES[type(cell)]
    backbone = getattr(net, "backbone", getattr(net, "net", net))
    if isinstance(getattr(backbone, "pool", None), nn.MaxPool2d):
        return "MindCV's stem pads by whether height and width are even"
    return ""


class OnnxGraph:
    """A graph that is being written. Values are names.

    Args:
        names: of the cells, by which their nodes are called.
        size: height and width of the images; None where they are free.
        half: values and weights are float16, but inside `float32`.
    """

    def __init__(self, names: dict[int, str], size: Sequence[Optional[int]], half: bool) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.names, self.scope, self.size = names, "", tuple(size)
        self.dtype = np.float16 if half else np.float32
        self.counts: dict[str, int] = {}

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or a list of several."""
        name = f"{self.scope}/{operator}"
        self.counts[name] = number = self.counts.get(name, -1) + 1
        name = f"{name}_{number}" if number else name
        results = [name if outputs == 1 else f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, results, name=name, **attributes))
        return results[0] if outputs == 1 else results

    def write(self, cell: nn.Cell, x: Any) -> Any:
        """The output of a cell for x; of some cells, both are lists.

        Raises:
            ExportError: there is no writer for such a cell.
        """
        writer = WRITERS.get(type(cell))
        if not writer:
            raise ExportError(f"There is no way to write a {type(cell).__name__} to ONNX")
        outer, self.scope = self.scope, self.names.get(id(cell), self.scope)
        result = writer(self, cell, x)
        self.scope = outer
        return result

    def constant(self, values: Any, name: str, dtype: Any = None) -> str:
        """Values under a name, once; `dtype`: by default that of the graph's values.

        Raises:
            ExportError: float16 cannot hold them.
        """
        if name not in self.initializers:
            with np.errstate(over="ignore"):
                array = np.asarray(values).astype(dtype or self.dtype)
            if array.dtype == np.float16 and not np.isfinite(array).all():
                raise ExportError(f"{name} has values above 65,504, which float16 cannot hold; export it in float32")
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def parameter(self, parameter: Parameter, shape: Sequence[int] = ()) -> str:
        """A parameter under its own name; `shape`: another one."""
        values = parameter.asnumpy()
        return self.constant(values.reshape(shape) if shape else values, parameter.name)

    def scalar(self, value: float) -> str:
        return self.constant(value, f"{value:.9g}:{np.dtype(self.dtype).name}")

    def integers(self, *values: int) -> str:
        return self.constant(values, f"integers:{','.join(map(str, values))}", np.int64)

    def reshape(self, x: str, *shape: int) -> str:
        """x in another shape; -1 stands for the batch."""
        return self("Reshape", x, self.integers(*shape))

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Parts of x along its axis 1."""
        return self("Split", x, self.integers(*sizes), outputs=len(sizes), axis=1)

    @contextmanager
    def float32(self) -> Iterator[None]:
        before, self.dtype = self.dtype, np.float32
        yield
        self.dtype = before

    def cast(self, x: str, dtype: Any) -> str:
        return self("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def writes(*cells: type) -> Callable:
    """Registers a function as the writer of some classes of cells."""

    def register(function: Callable) -> Callable:
        WRITERS.update(dict.fromkeys(cells, function))
        return function

    return register


@writes(nn.Identity)
def _identity(graph: OnnxGraph, cell: nn.Identity, x: str) -> str:
    return x


@writes(nn.Conv2d)
def _conv(graph: OnnxGraph, cell: nn.Conv2d, x: str) -> str:
    padding = cell.padding
    top, bottom, left, right = (padding,) * 4 if isinstance(padding, int) else padding
    return graph(
        "Conv",
        x,
        graph.parameter(cell.weight),
        *([graph.parameter(cell.bias)] if cell.has_bias else []),
        kernel_shape=list(cell.kernel_size),
        strides=list(cell.stride),
        dilations=list(cell.dilation),
        group=cell.group,
        pads=[top, left, bottom, right],
    )


@writes(nn.BatchNorm2d)
def _batch_norm(graph: OnnxGraph, cell: nn.BatchNorm2d, x: str) -> str:
    values = (graph.parameter(p) for p in (cell.gamma, cell.beta, cell.moving_mean, cell.moving_variance))
    return graph("BatchNormalization", x, *values, epsilon=cell.eps)


@writes(nn.Dense)
def _dense(graph: OnnxGraph, cell: nn.Dense, x: str) -> str:
    bias = [graph.parameter(cell.bias)] if cell.has_bias else []
    return graph("Gemm", x, graph.parameter(cell.weight), *bias, transB=1)


@writes(LayerNorm2d)
def _layer_norm(graph: OnnxGraph, cell: LayerNorm2d, x: str) -> str:
    x = graph("Transpose", x, perm=[0, 2, 3, 1])
    x = graph(
        "LayerNormalization", x, graph.parameter(cell.gamma), graph.parameter(cell.beta), axis=-1, epsilon=cell.epsilon
    )
    return graph("Transpose", x, perm=[0, 3, 1, 2])


@writes(GELU)
def _gelu(graph: OnnxGraph, cell: GELU, x: str) -> str:
    error = graph("Erf", graph("Mul", x, graph.scalar(SQRT_HALF)))
    return graph("Mul", graph("Mul", x, graph.scalar(0.5)), graph("Add", error, graph.scalar(1.0)))


@writes(nn.AvgPool2d)
def _avg_pool(graph: OnnxGraph, cell: nn.AvgPool2d, x: str) -> str:
    side, stride = ([n, n] if isinstance(n, int) else list(n) for n in (cell.kernel_size, cell.stride))
    return graph("AveragePool", x, kernel_shape=side, strides=stride)


@writes(StemPool)
def _stem_pool(graph: OnnxGraph, cell: StemPool, x: str) -> str:
    # Caffe's rounds up: a last window hangs over where the side is even. Padded at the end by one, it does not hang
    # over; and where the side is odd, the padding is in no window.
    pads = [1, 1, 1, 1] if cell.padded else [0, 0, 1, 1]
    return graph("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=pads)


@writes(nn.MaxPool2d)
def _max_pool(graph: OnnxGraph, cell: nn.MaxPool2d, x: str) -> str:
    # Of MindCV's stem, behind a convolution of stride 2: 3x3, stride 2, "same".
    high, wide = (-(-side // 2) for side in graph.size if side)
    return graph("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[high % 2, wide % 2, 1, 1])


@writes(PatchEmbed)
def _patch_embed(graph: OnnxGraph, cell: PatchEmbed, x: str) -> str:
    graph.size = tuple(side and -(-side // cell.proj.stride[0]) for side in graph.size)
    return graph.write(cell.norm, graph.write(cell.proj, x))


@writes(ConvMlp)
def _mlp(graph: OnnxGraph, cell: ConvMlp, x: str) -> str:
    for layer in (cell.fc1, cell.dwconv, cell.act, cell.fc2):
        x = graph.write(layer, x)
    return x


@writes(Attention)
def _attention(graph: OnnxGraph, cell: Attention, x: str) -> str:
    y = x
    for layer in (cell.proj_1, cell.act, cell.spatial, cell.proj_2):
        y = graph.write(layer, y)
    return graph("Add", x, y)


@writes(Block)
def _block(graph: OnnxGraph, cell: Block, x: str) -> str:
    branches = (cell.norm1, cell.attn, cell.layer_scale_1), (cell.norm2, cell.mlp, cell.layer_scale_2)
    for norm, branch, layer_scale in branches:
        y = graph.write(branch, graph.write(norm, x))
        x = graph("Add", x, graph("Mul", graph.parameter(layer_scale, (-1, 1, 1)), y))
    return x


@writes(FoldedBlock)
def _folded_block(graph: OnnxGraph, cell: FoldedBlock, x: str) -> str:
    y = x
    for layer in (cell.proj_1, cell.act, cell.spatial, cell.proj_2):
        y = graph.write(layer, y)
    x = graph("Add", graph("Mul", x, graph.parameter(cell.shortcut, (-1, 1, 1))), y)
    return graph("Add", x, graph.write(cell.mlp, x))


@writes(nn.SequentialCell)
def _sequence(graph: OnnxGraph, cell: nn.SequentialCell, x: str) -> str:
    for layer in cell:
        x = graph.write(layer, x)
    return x


@writes(LargeKernelAttention)
def _large_kernel(graph: OnnxGraph, cell: LargeKernelAttention, x: str) -> str:
    y = graph.write(cell.dw_d_conv, graph.write(cell.dw_conv, x))
    return graph("Mul", x, graph.write(cell.pw_conv, y))


@writes(SplitKernelAttention, FoldedSplitKernelAttention)
def _split_kernel(graph: OnnxGraph, cell: Union[SplitKernelAttention, FoldedSplitKernelAttention], x: str) -> str:
    split = graph.write(cell.graph, x)
    untouched, five, seven = graph.split(split, cell.splits)
    y = graph("Concat", untouched, graph.write(cell.dw_conv1, five), graph.write(cell.dw_conv2, seven), axis=1)
    whole = isinstance(cell, SplitKernelAttention)
    gate = graph.write(cell.pw_conv, graph("Add", y, split) if whole else y)
    y = graph("Mul", graph("Mul", gate, graph("Sigmoid", gate)), x)
    return graph.write(cell.norm, y) if whole else y


@writes(MaxRelativeConv)
def _max_relative(graph: OnnxGraph, cell: MaxRelativeConv, x: str) -> str:
    channels, (height, width) = cell.conv.in_channels // 2, graph.size
    assert height and width
    reduction = 1 if isinstance(cell.pool, nn.Identity) else cell.pool.kernel_size
    high, wide = reduction if isinstance(reduction, tuple) else (reduction, reduction)
    n, m = height * width, (height // high) * (width // wide)
    queries = graph.reshape(x, -1, channels, n)
    keys = graph.reshape(graph.write(cell.pool, x), -1, channels, m)
    k = cell.search.k
    index = _nearest(graph, cell.search, queries, keys, channels, n, m)  # (B, N, k)
    # GatherElements rather than GatherND, which OpenCV 4 does not know.
    zeros = graph.constant(np.zeros((1, channels, 1)), f"zeros:{channels}", np.int64)
    index = graph("Add", graph.reshape(index, -1, 1, n * k), zeros)  # (B, C, N * k)
    found = graph.reshape(graph("GatherElements", keys, index, axis=2), -1, channels, n, k)
    nearest = graph("ReduceMax", found, axes=[3], keepdims=0)  # (B, C, N)
    pairs = (graph.reshape(value, -1, channels, 1, n) for value in (queries, graph("Sub", nearest, queries)))
    interleaved = graph.reshape(graph("Concat", *pairs, axis=2), -1, 2 * channels, height, width)
    return graph.write(cell.act, graph.write(cell.norm, graph.write(cell.conv, interleaved)))


def _nearest(graph: OnnxGraph, cell: NearestNodes, queries: str, keys: str, channels: int, n: int, m: int) -> str:
    """Indices (B, N, k) of the nearest of the keys (B, C, M) of each of the queries (B, C, N), always in float32."""
    half, outer = graph.dtype == np.float16, graph.scope
    graph.scope = graph.names[id(cell)]
    with graph.float32():
        if half:
            queries, keys = graph.cast(queries, np.float32), graph.cast(keys, np.float32)

        def unit(x: str) -> str:
            norm = graph("Sqrt", graph("ReduceSum", graph("Mul", x, x), graph.integers(1), keepdims=1))
            return graph("Div", x, graph("Max", norm, graph.scalar(1e-12)))

        queries, keys = unit(queries), unit(keys)
        position = graph.constant(relative_position(channels, n, m), f"relative_position:{channels}:{n}:{m}")
        squares = graph("ReduceSum", graph("Mul", keys, keys), graph.integers(1), keepdims=1)  # (B, 1, M)
        twice = graph("Transpose", graph("Mul", queries, graph.scalar(2.0)), perm=[0, 2, 1])  # (B, N, C)
        closeness = graph("Sub", graph("MatMul", twice, keys), graph("Add", squares, position))  # (B, N, M)
        dilation = min(cell.dilation, m // cell.k)
        last = (cell.k - 1) * dilation + 1  # of the nearest, that counts
        if last == m:  # OpenCV 4 does not sort all of an axis: there is one more, which is the farthest
            farthest = graph("Sub", graph("Gather", closeness, graph.integers(0), axis=2), graph.scalar(1e30))
            closeness = graph("Concat", closeness, farthest, axis=2)
    index = graph("TopK", closeness, graph.integers(last), outputs=2, axis=-1)[1]
    if dilation > 1:
        index = graph("Gather", index, graph.integers(*range(0, last, dilation)), axis=2)
    graph.scope = outer
    return index


@writes(ConvNorm)
def _conv_norm(graph: OnnxGraph, cell: ConvNorm, x: str) -> str:
    x = graph.write(cell.norm, graph.write(cell.conv, x))
    return graph("Relu", x) if cell.relu else x


@writes(SelectiveKernel)
def _selective_kernel(graph: OnnxGraph, cell: SelectiveKernel, x: str) -> str:
    paths, channels = cell.num_paths, cell.cout
    parts = graph.split(x, [path.conv.in_channels for path in cell.paths]) if cell.split_input else [x] * paths
    outputs = [graph.write(path, part) for path, part in zip(cell.paths, parts)]
    total = outputs[0]
    for output in outputs[1:]:
        total = graph("Add", total, output)
    logits = graph.write(cell.fc2, graph.write(cell.fc1, graph("GlobalAveragePool", total)))
    weights = graph("Softmax", graph.reshape(logits, -1, paths, channels), axis=1)  # (B, paths, C)
    shares = [graph.reshape(part, -1, channels, 1, 1) for part in graph.split(weights, [1] * paths)]
    selected = graph("Mul", outputs[0], shares[0])
    for output, share in zip(outputs[1:], shares[1:]):
        selected = graph("Add", selected, graph("Mul", output, share))
    return selected


@writes(SKUnit)
def _sk_unit(graph: OnnxGraph, cell: SKUnit, x: str) -> str:
    y = graph.write(cell.increase, graph.write(cell.sk, graph.write(cell.reduce, x)))
    return graph("Relu", graph("Add", y, graph.write(cell.proj, x)))


@writes(Stage)
def _stage(graph: OnnxGraph, cell: Stage, x: str) -> str:
    for layer in (cell.patch_embed, *cell.blocks, cell.norm):
        x = graph.write(layer, x)
    return x


def backbone_features(graph: OnnxGraph, net: Backbone, x: str) -> list[str]:
    """What `forward_stages` returns."""
    features = []
    for cells in net.stage_cells():
        for cell in cells:
            x = graph.write(cell, x)
        features.append(x)
    return features


def _head(graph: OnnxGraph, net: Backbone, x: str) -> str:
    """What `forward_head` returns."""
    if not net.global_pool:
        return x
    x = graph("GlobalMaxPool" if net.global_pool == "max" else "GlobalAveragePool", x)
    return graph.write(net.classifier, graph("Flatten", x, axis=1))


def onnx_model(
    net: nn.Cell,
    shape: Sequence[Optional[int]],
    outputs: dict[str, tuple[int, ...]],
    half: bool = False,
) -> ModelProto:
    """A network of mindska, without acceleration and in evaluation, as an ONNX model.

    Args:
        shape: (B, C, H, W) of the input, "images"; None where it is free.
        outputs: name -> shape of the network's outputs for some images.
        half: weights and values are float16, but for the input, the outputs and SkaNet's neighbour search.

    Raises:
        ExportError: the network is not one of mindska's, or float16 cannot hold a weight.
    """
    wrapped, net = net, getattr(net, "net", net)
    if not isinstance(net, Backbone) and type(net) not in WRITERS:
        raise ExportError(
            f"{type(net).__name__} is not one of mindska's networks, and only these are written to ONNX; "
            f"mindspore.onnx.export may write it"
        )
    graph = OnnxGraph({id(cell): name for name, cell in net.cells_and_names()}, shape[2:], half)
    x = graph.cast("images", np.float16) if half else "images"
    if isinstance(net, Backbone):
        features = backbone_features(graph, net, x)
        results = (
            [features[i] for i in wrapped.return_index] if net.features_only else [_head(graph, net, features[-1])]
        )
    else:
        written = graph.write(net, x)
        results = written if isinstance(written, list) else [written]
    last: dict[str, Any] = dict(op_type="Cast", to=TensorProto.FLOAT) if half else dict(op_type="Identity")
    graph.nodes += [
        helper.make_node(inputs=[x], outputs=[name], name=name, **last) for x, name in zip(results, outputs)
    ]
    free_size = shape[2] is None
    values = [
        helper.make_tensor_value_info(
            name,
            TensorProto.FLOAT,
            [
                "batch" if i == 0 and shape[0] is None else f"{name}_{DIMENSIONS[i]}" if i > 1 and free_size else side
                for i, side in enumerate(sides)
            ],
        )
        for name, sides in outputs.items()
    ]
    images = helper.make_tensor_value_info(
        "images", TensorProto.FLOAT, [side or name for side, name in zip(shape, DIMENSIONS)]
    )
    return helper.make_model(
        helper.make_graph(graph.nodes, "network", [images], values, list(graph.initializers.values())),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="mindska",
    )
