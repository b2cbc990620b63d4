"""A folded network in evaluation as one C++ operator, `mindska_sequence`: nothing of MindSpore's between its operators.

MindSpore takes tens to hundreds of microseconds from one operator to the next, which for one image is most of the time.
So what the accelerated cells of a folded network call one after the other is written down once for the images' shape: a
plan of operators, of the places of their tensors, and of buffers that are used again as soon as they are free. There is
one function a kind of cell that writes it, as in `onnx_graph`. The weights are the network's own parameters.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from ..kernels import operators
from ..kernels.build import keep_library, library
from ..kernels.signatures import signatures
from ..models.layers.backbone import Backbone
from ..models.layers.blocks import ConvMlp, LayerNorm2d, PatchEmbed
from ..models.layers.graph import MaxRelativeConv
from ..models.layers.pooling import StemPool
from ..models.layers.pyramid import Stage
from ..models.skanet import SkaNet
from ..models.sknet import ConvNorm, SelectiveKernel, SKNet, SKUnit
from ..models.van import VAN, LargeKernelAttention
from .folded import FoldedBlock, FoldedSplitKernelAttention
from .form import AcceleratedForm, plain_class_of
from .layers import conv_kind, has_odd_kernel_and_keeps_size, min_pixels
from .pyramid import FUSED_MLP_MIN_PIXELS, transposed_position_array

MARK = 0x6D736B31  # sequence.cc: the first number of a plan
IMAGES, CONSTANTS, PLAN, ARENA, RESULT, WEIGHTS = range(6)  # places; a weight's is WEIGHTS + its number
UNIT = 16  # floats of the arena
KEPT_PLANS = 16  # of a network, for as many shapes of images
NO_GRADIENT = (
    "A folded network in evaluation has no gradient on the CPU: take that of the network before it is folded, or of "
    "mindska.acceleration.decelerate(network)"
)
WRITERS: dict[type, Callable[..., Any]] = {}  # exact class of a cell, without acceleration -> what writes it


class NotWritten(Exception):
    """A cell, or a shape, for which there is no sequence."""


@dataclass(eq=False)
class Buffer:
    """Memory of the arena or of the result. `first` and `last`: the numbers of the steps that write and read it."""

    size: int
    first: int
    last: int
    place: int = ARENA
    offset: int = 0  # in floats


@dataclass(frozen=True)
class Value:
    """A tensor that a step has written, or the images (`buffer` is None): a part of a buffer from `start` on."""

    shape: tuple[int, ...]
    buffer: Optional[Buffer] = None
    start: int = 0

    def reshape(self, *shape: int) -> Value:
        """The same numbers in another shape."""
        assert math.prod(shape) == math.prod(self.shape)
        return Value(shape, self.buffer, self.start)


@dataclass(frozen=True)
class Constant:
    """Numbers that belong to the plan: a part of its array of constants."""

    shape: tuple[int, ...]
    start: int


Input = Union[Value, Parameter, Constant]


@dataclass
class Step:
    """An operator and its inputs (numbers as lists of int) and outputs."""

    operator: str
    inputs: list[Union[Input, list[int]]]
    outputs: list[Value]


@dataclass
class Plan:
    """What `mindska_sequence` needs besides images and weights.

    Attributes:
        plan: (P,) int32. constants: (N,) float32.
        shapes: those of the network's outputs, which lie one after the other in the operator's.
        arena: floats of the buffers.
    """

    plan: Tensor
    constants: Tensor
    shapes: tuple[tuple[int, ...], ...]
    arena: int

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Of the operator's output."""
        return self.shapes[0] if len(self.shapes) == 1 else (sum(map(math.prod, self.shapes)),)

    @property
    def parts(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """(first, end, shape) of each of the network's outputs in the operator's."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes]).tolist()
        return tuple((end - math.prod(shape), end, shape) for end, shape in zip(ends, self.shapes))


def writes(*cells: type) -> Callable:
    """Registers a function as the writer of some classes of cells."""

    def register(function: Callable) -> Callable:
        WRITERS.update(dict.fromkeys(cells, function))
        return function

    return register


@dataclass
class Writer:
    """A plan that is being written."""

    weights: dict[int, int]  # id of a parameter -> its number
    steps: list[Step] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    constants: list[np.ndarray] = field(default_factory=list)
    known_constants: dict[Any, Constant] = field(default_factory=dict)

    def __call__(self, operator: str, *inputs: Input, **numbers: int) -> Any:
        """Adds a step; returns its output, or a list of several.

        Args:
            numbers: those that the operator's signature names.
        """
        signature, given = signatures()[operator], iter(inputs)
        taken = [[int(numbers[n]) for n in t.numbers] if t.numbers else next(given) for t in signature.inputs]
        shapes = [(len(i),) if isinstance(i, list) else tuple(i.shape) for i in taken]
        outputs, number = [], len(self.steps)
        for read in taken:
            if isinstance(read, Value) and read.buffer:
                read.buffer.last = number
        for shape in signature.infer(shapes, numbers):
            self.buffers.append(Buffer(math.prod(shape), number, number))
            outputs.append(Value(tuple(shape), self.buffers[-1]))
        self.steps.append(Step(operator, taken, outputs))
        return outputs[0] if len(outputs) == 1 else outputs

    def write(self, cell: nn.Cell, x: Value, **options: Any) -> Value:
        """The output of a cell for x.

        Raises:
            NotWritten: there is no writer for such a cell.
        """
        writer = WRITERS.get(plain_class_of(cell))
        if not writer:
            raise NotWritten(type(cell).__name__)
        return writer(self, cell, x, **options)

    def constant(self, key: Any, array: Callable[[], np.ndarray]) -> Constant:
        """Float32 numbers, once for a key."""
        if key not in self.known_constants:
            values = np.ascontiguousarray(array(), np.float32)
            start = sum(c.size for c in self.constants)
            self.constants.append(values.reshape(-1))
            self.known_constants[key] = Constant(values.shape, start)
        return self.known_constants[key]

    def full(self, value: float, count: int) -> Constant:
        """(count,), all `value`."""
        return self.constant((value, count), lambda: np.full(count, value))

    def bias(self, conv: nn.Conv2d) -> Input:
        """A convolution's bias (O,): zeros where it has none."""
        return conv.bias if conv.has_bias else self.full(0, conv.out_channels)

    def pointwise(self, conv: nn.Conv2d, x: Value, epilogue: str, other: Optional[Value] = None) -> Value:
        """epilogue(conv(x)), of a 1x1 convolution; see `operators.PointwiseEpilogue`."""
        ones, number = self.full(1, conv.out_channels), operators.EPILOGUES.index(epilogue)
        return self("pointwise_epilogue", x, conv.weight, ones, self.bias(conv), other or ones, epilogue=number)

    def finish(self, outputs: Sequence[Value]) -> Plan:
        """The plan whose result is these values."""
        size = 0
        for output in outputs:
            buffer = output.buffer
            assert buffer and buffer.place == ARENA and math.prod(output.shape) == buffer.size
            buffer.place, buffer.offset = RESULT, size
            size += buffer.size
        arena = self._place_buffers()
        self.full(1, 1)  # there is at least one constant
        constants = np.concatenate(self.constants)
        words: list[int] = []
        for step in self.steps:
            words += [len(step.operator) + len("mindska_"), *f"mindska_{step.operator}".encode()]
            words.append(len(step.inputs) + len(step.outputs))
            types = ["float32"] * len(step.inputs) + [t.type for t in signatures()[step.operator].outputs]
            for value, kind in zip([*step.inputs, *step.outputs], types):
                words += self._tensor(value, kind == "int32")
        header = [MARK, 0, constants.size, size, arena // UNIT, len(self.steps)]
        lists = [value for step in self.steps for value in step.inputs if isinstance(value, list)]
        start, lists_at = len(header) + len(words), {}
        for numbers in lists:
            lists_at[id(numbers)] = start
            start += len(numbers)
        header[1] = start
        resolved = [lists_at[word.number] if isinstance(word, _ListStart) else word for word in words]
        array = np.array([*header, *resolved, *(n for numbers in lists for n in numbers)], np.int32)
        return Plan(Tensor(array), Tensor(constants), tuple(output.shape for output in outputs), arena)

    def _tensor(self, value: Union[Input, list[int]], is_int32: bool) -> list[Any]:
        """A tensor in the words of the plan."""
        if isinstance(value, list):
            return [PLAN, _ListStart(id(value)), 1, 1, len(value)]
        shape = tuple(value.shape)
        if isinstance(value, Constant):
            place, offset = CONSTANTS, value.start
        elif isinstance(value, Parameter):
            if id(value) not in self.weights:
                raise NotWritten(f"{value.name} has come since")
            place, offset = WEIGHTS + self.weights[id(value)], 0
        elif value.buffer is None:
            place, offset = IMAGES, value.start
        else:
            place, offset = value.buffer.place, value.buffer.offset + value.start
            offset = offset // UNIT if place == ARENA else offset
        return [place, offset, int(is_int32), len(shape), *shape]

    def _place_buffers(self) -> int:
        """Gives every buffer of the arena its offset, the largest first, each as far in front as it fits; returns the
        floats of the arena."""
        placed: list[Buffer] = []
        for buffer in sorted((b for b in self.buffers if b.place == ARENA), key=lambda b: -b.size):
            offset = 0
            for other in sorted(placed, key=lambda b: b.offset):
                if other.first <= buffer.last and buffer.first <= other.last:
                    if offset + buffer.size <= other.offset:
                        break
                    offset = max(offset, other.offset + -(-other.size // UNIT) * UNIT)
            buffer.offset = offset
            placed.append(buffer)
        return max((b.offset + -(-b.size // UNIT) * UNIT for b in placed), default=0)


@dataclass(frozen=True)
class _ListStart:
    """Stands for the place of a list of numbers in the plan."""

    number: int


@writes(nn.Identity)
def _identity(plan: Writer, cell: nn.Identity, x: Value) -> Value:
    return x


@writes(nn.Conv2d)
def _conv(plan: Writer, cell: nn.Conv2d, x: Value, relu: bool = False) -> Value:
    kind, dilation, stride = conv_kind(cell), cell.dilation[0], cell.stride[0]
    if kind == "pointwise":
        return plan.pointwise(cell, x, "relu") if relu else plan("pointwise", x, cell.weight, plan.bias(cell))
    batch, _, height, width = x.shape
    if kind == "depthwise" and not relu:
        return plan("depthwise", x, cell.weight, plan.bias(cell), dilation=dilation)
    if kind == "grouped" or (kind == "winograd" and batch * height * width >= min_pixels(cell)):
        return plan(kind, x, cell.weight, plan.bias(cell), dilation=dilation, relu=relu)
    if not has_odd_kernel_and_keeps_size(cell) or cell.kernel_size[0] != cell.kernel_size[1]:
        raise NotWritten(f"a convolution of {cell.kernel_size}")
    return plan("strided", x, cell.weight, plan.bias(cell), stride=stride, dilation=dilation, relu=relu)


@writes(nn.Dense)
def _dense(plan: Writer, cell: nn.Dense, x: Value) -> Value:
    if cell.activation_flag:
        raise NotWritten("a linear layer with an activation")
    return plan("dense", x, cell.weight, cell.bias if cell.has_bias else plan.full(0, cell.out_channels))


@writes(LayerNorm2d)
def _layer_norm(plan: Writer, cell: LayerNorm2d, x: Value) -> Value:
    return plan("layer_norm", x, cell.gamma, cell.beta, plan.full(cell.epsilon, 1))


@writes(nn.AvgPool2d)
def _avg_pool(plan: Writer, cell: nn.AvgPool2d, x: Value) -> Value:
    side, stride = ({*(n if isinstance(n, tuple) else (n,))} for n in (cell.kernel_size, cell.stride))
    if side != stride or len(side) > 1 or cell.pad_mode.lower() != "valid":
        raise NotWritten("a mean over windows that overlap")
    return plan("avg_pool", x, size=side.pop())


@writes(StemPool)
def _stem_pool(plan: Writer, cell: StemPool, x: Value) -> Value:
    before, after = (1, 1) if cell.padded else (0, None)
    high, wide = ((side + before + (1 - side % 2 if after is None else after) - 3) // 2 + 1 for side in x.shape[2:])
    return plan("max_pool", x, top=before, left=before, high=high, wide=wide)


@writes(nn.MaxPool2d)
def _max_pool(plan: Writer, cell: nn.MaxPool2d, x: Value) -> Value:
    # Of MindCV's stem: 3x3, stride 2, "same".
    sides = [{*(n if isinstance(n, tuple) else (n,))} for n in (cell.kernel_size, cell.stride)]
    if sides != [{3}, {2}] or cell.pad_mode.lower() != "same":
        raise NotWritten("a maximum over other windows")
    (height, width), half = x.shape[2:], [-(-side // 2) for side in x.shape[2:]]
    return plan("max_pool", x, top=height % 2, left=width % 2, high=half[0], wide=half[1])


@writes(PatchEmbed)
def _patch_embed(plan: Writer, cell: PatchEmbed, x: Value) -> Value:
    return plan.write(cell.norm, plan.write(cell.proj, x))


@writes(nn.SequentialCell)
def _sequential(plan: Writer, cell: nn.SequentialCell, x: Value) -> Value:
    for layer in cell:
        x = plan.write(layer, x)
    return x


@writes(ConvMlp)
def _mlp_with_shortcut(plan: Writer, cell: ConvMlp, x: Value) -> Value:
    """x + mlp(x), as `FusedConvMlp.with_shortcut`."""
    fc1, dwconv, fc2 = cell.fc1, cell.dwconv, cell.fc2
    if x.shape[2] * x.shape[3] >= FUSED_MLP_MIN_PIXELS:
        weights = [p for layer in (fc1, dwconv, fc2) for p in (layer.weight, layer.bias)]
        return plan("fused_mlp_residual", x, *weights, plan.full(1, fc2.out_channels), x)
    hidden = plan("pointwise", x, fc1.weight, fc1.bias)
    hidden = plan("depthwise_gelu", hidden, dwconv.weight, dwconv.bias, dilation=dwconv.dilation[0])
    return plan.pointwise(fc2, hidden, "add", x)


@writes(FoldedBlock)
def _folded_block(plan: Writer, cell: FoldedBlock, x: Value) -> Value:
    absent = plan.full(0, 1)
    shortcut = plan("residual", x, absent, absent, cell.shortcut, plan.full(1, 1))
    y = plan.write(cell.spatial, plan.pointwise(cell.proj_1, x, "gelu"))
    return plan.write(cell.mlp, plan.pointwise(cell.proj_2, y, "add", shortcut))


@writes(LargeKernelAttention)
def _large_kernel(plan: Writer, cell: LargeKernelAttention, x: Value) -> Value:
    y = plan.write(cell.dw_d_conv, plan.write(cell.dw_conv, x))
    return plan.pointwise(cell.pw_conv, y, "mul", x)


@writes(FoldedSplitKernelAttention)
def _split_kernel(plan: Writer, cell: FoldedSplitKernelAttention, x: Value) -> Value:
    first, second = cell.dw_conv1, cell.dw_conv2
    y = plan(
        "split_depthwise",
        plan.write(cell.graph, x),
        *(first.weight, first.bias, second.weight, second.bias),
        dilation1=first.dilation[0],
        dilation2=second.dilation[0],
        identity=0,
    )
    return plan.pointwise(cell.pw_conv, y, "silu_mul", x)


@writes(MaxRelativeConv)
def _max_relative(plan: Writer, cell: MaxRelativeConv, x: Value) -> Value:
    y = plan.write(cell.pool, x)
    sizes = x.shape[1], x.shape[2] * x.shape[3], y.shape[2] * y.shape[3]
    position = plan.constant(("position", *sizes), lambda: transposed_position_array(*sizes))
    interleaved, _ = plan("max_relative", x, y, position, k=cell.search.k, dilation=cell.search.dilation)
    return plan.pointwise(cell.conv, plan.write(cell.norm, interleaved), "gelu")


@writes(ConvNorm)
def _conv_norm(plan: Writer, cell: ConvNorm, x: Value) -> Value:
    if conv_kind(cell.conv) == "pointwise":
        return plan.write(cell.norm, plan.pointwise(cell.conv, x, "relu" if cell.relu else "none"))
    return plan.write(cell.norm, plan.write(cell.conv, x, relu=cell.relu))


@writes(SelectiveKernel)
def _selective_kernel(plan: Writer, cell: SelectiveKernel, x: Value) -> Value:
    if cell.num_paths != 2:
        raise NotWritten(f"{cell.num_paths} paths")
    batch, channels, parts = x.shape[0], x.shape[1] // 2, [x, x]
    if cell.split_input:
        parts = [plan("slice_channels", x, first=i * channels, count=channels) for i in range(2)]
    first, second = (plan.write(path, part) for path, part in zip(cell.paths, parts))
    logits = plan.write(cell.fc2, plan.write(cell.fc1, plan("mean_of_sum", first, second)))
    return plan("weighted_sum", first, second, plan("softmax", logits.reshape(batch, 2, cell.cout)))


@writes(SKUnit)
def _sk_unit(plan: Writer, cell: SKUnit, x: Value) -> Value:
    y, increase = plan.write(cell.sk, plan.write(cell.reduce, x)), cell.increase
    if conv_kind(increase.conv) == "pointwise" and not increase.relu:
        return plan.pointwise(increase.conv, plan.write(increase.norm, y), "add_relu", plan.write(cell.proj, x))
    return plan("add_relu", plan.write(increase, y), plan.write(cell.proj, x))


@writes(Stage)
def _stage(plan: Writer, cell: Stage, x: Value) -> Value:
    for layer in (cell.patch_embed, *cell.blocks, cell.norm):
        x = plan.write(layer, x)
    return x


def _outputs(plan: Writer, net: Backbone, x: Value) -> list[Value]:
    """The network's outputs: of `forward_stages`, or of `forward_head`."""
    features = []
    for cells in net.stage_cells():
        for cell in cells:
            x = plan.write(cell, x)
        features.append(x)
    if net.features_only:
        return features
    if net.global_pool:
        x = plan.write(net.classifier, plan(f"global_{net.global_pool}_pool", x))
    return [x]


class Sequences:
    """The plans of a network, by the shape of its images.

    `number` stands for it where graph mode takes numbers only.
    """

    of_number: ClassVar[weakref.WeakValueDictionary[int, Sequences]] = weakref.WeakValueDictionary()
    count: ClassVar[int] = 0

    def __init__(self, net: Backbone) -> None:
        self.net = weakref.ref(net)
        self.weights = tuple(net.get_parameters())  # in the order of the operator's inputs
        self.plans: dict[tuple[int, ...], Optional[Plan]] = {}
        Sequences.count += 1
        self.number = Sequences.count
        Sequences.of_number[self.number] = self

    def plan(self, shape: Sequence[int]) -> Optional[Plan]:
        """The plan for images of this shape; None where there is none."""
        shape = tuple(shape)
        if shape not in self.plans:
            if len(self.plans) == KEPT_PLANS:
                del self.plans[next(iter(self.plans))]
            self.plans[shape] = self._written(shape)
        return self.plans[shape]

    def known_plan(self, shape: Sequence[int]) -> Plan:
        """As `plan`, where there is one."""
        plan = self.plan(shape)
        assert plan
        return plan

    def _written(self, shape: tuple[int, ...]) -> Optional[Plan]:
        net = self.net()
        if net is None or len(shape) != 4 or min(shape) < 1 or shape[1] != net.in_channels:
            return None
        if net.why_too_small(*shape[2:]) or any(p.dtype != ms.float32 for p in self.weights):
            return None
        writer = Writer({id(parameter): number for number, parameter in enumerate(self.weights)})
        try:
            return writer.finish(_outputs(writer, net, Value(shape)))
        except NotWritten:
            return None

    def operator(self) -> ops.Custom:
        """mindska_sequence as a primitive of MindSpore: (images, constants, plan, weights...) -> result."""

        def shapes(*found: list[int]) -> list[int]:
            keep_library("sequence")
            return list(self.known_plan(found[0]).result_shape)

        def types(*found: ms.Type) -> ms.Type:
            return ms.float32

        made = ops.Custom(f"{library('sequence')}:mindska_sequence", shapes, types, func_type="aot")
        made.add_prim_attr("network", self.number)  # see `operators.operator`
        return made


@constexpr
def has_plan(number: int, shape: tuple[int, ...]) -> bool:
    sequences = Sequences.of_number.get(number)
    return sequences is not None and sequences.plan(shape) is not None


@constexpr
def plan_tensors(number: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    plan = Sequences.of_number[number].known_plan(shape)
    return plan.constants, plan.plan


@constexpr
def result_parts(number: int, shape: tuple[int, ...]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    return Sequences.of_number[number].known_plan(shape).parts


class RunSequence(nn.Cell):
    """`Sequences.operator`, which has no gradient."""

    def __init__(self, sequences: Sequences) -> None:
        super().__init__()
        self.forward = sequences.operator()

    def construct(self, x: Tensor, constants: Tensor, plan: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        return self.forward(x, constants, plan, *weights)

    def bprop(self, x: Tensor, constants: Tensor, plan: Tensor, weights: tuple, out: Tensor, dout: Tensor) -> Any:
        raise ValueError(NO_GRADIENT)


class SequencedBackbone(AcceleratedForm, Backbone):
    """In evaluation, a folded network in one operator, which has no gradient."""

    plain = Backbone.construct
    in_training = plain
    sequence_weights: tuple[Parameter, ...]

    @classmethod
    def supports(cls, cell: Backbone) -> bool:
        return not any(isinstance(part, nn.BatchNorm2d) for _, part in cell.cells_and_names())

    def prepare(self) -> None:
        self.sequences = Sequences(self)
        self.sequence_number = self.sequences.number
        self.sequence = RunSequence(self.sequences)
        self.__dict__["sequence_weights"] = self.sequences.weights  # a cell would take them for its own again

    def _make_head(self, num_classes: int, global_pool: str) -> None:
        super()._make_head(num_classes, global_pool)
        self.prepare()  # the classifier has other parameters

    def uses_plain(self, x: Tensor) -> bool:
        return self.training or not self.accepts(x) or not has_plan(self.sequence_number, x.shape)

    def in_inference(self, x: Tensor, noise: Optional[Tensor] = None) -> Union[Tensor, list[Tensor]]:
        constants, plan = plan_tensors(self.sequence_number, x.shape)
        result = self.sequence(x, constants, plan, self.sequence_weights)
        if not self.features_only:
            return result
        features = []
        for first, end, shape in result_parts(self.sequence_number, x.shape):
            features.append(result[first:end].reshape(shape))
        return features


class SequencedSkaNet(SequencedBackbone, SkaNet):
    plain_class = SkaNet


class SequencedVAN(SequencedBackbone, VAN):
    plain_class = VAN


class SequencedSKNet(SequencedBackbone, SKNet):
    plain_class = SKNet
