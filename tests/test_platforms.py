"""Every operator of our networks, forward and in training, is one that MindSpore states for Ascend, GPU and CPU.

The operators are read from the front end's last graph ("validate"). It comes before anything that knows the device:
MS_DEV_PRECOMPILE_ONLY stops there, so no kernel is selected, and the Python functions of MindSpore that the graph goes
through do not ask for the device. The statements are MindSpore's own, the "Supported Platforms" of its docstrings:
they say that a device has the operator, not how well it computes it.

``python tests/test_platforms.py`` prints the table, and checks the training step of every recipe.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from mindspore import ops
from mindspore.ops import auto_generate, operations

PROGRAM = Path(__file__).parent / "programs" / "recipe_step.py"
CONFIGS = Path(__file__).parents[1] / "configs"
PLATFORMS = {"Ascend", "GPU", "CPU"}

# The compiler's own, without a statement: they order, group, choose or copy values, and compute nothing.
STRUCTURE = {
    "MakeTuple": "groups values",
    "TupleGetItem": "takes one of a group",
    "Load": "reads a parameter",
    "UpdateState": "orders reads and writes of parameters",
    "Switch": "chooses a branch (of `if`)",
    "TensorMove": "copies a parameter's value before it is overwritten",
}
# Gradients have no statement (or, Conv2DBackpropInput, "Deprecated", which is meant for users): their forward's counts.
GRADIENT_OF = {
    "AvgPoolGrad": "AvgPool",
    "BatchNormGrad": "BatchNorm",
    "BiasAddGrad": "BiasAdd",
    "Conv2DBackpropFilter": "Conv2D",
    "Conv2DBackpropInput": "Conv2D",
    "GatherDGradV2": "GatherD",
    "LayerNormGrad": "LayerNorm",
    "MaxPoolGrad": "MaxPool",
    "ReluGrad": "relu",
    "SigmoidGrad": "Sigmoid",
    "SoftmaxBackward": "Softmax",
    "SplitWithSize": "Concat",
    "StridedSliceGrad": "StridedSlice",
}
ONLY_SKNET = {"MaxPoolGrad", "ReluGrad", "SoftmaxBackward"}
# What the public function compiles to when an operand is a number. No kernel has these names on CPU: there the back
# end turns them into Mul and RealDiv.
FORM_OF = {"Muls": "mul", "Divs": "div"}
DISTRIBUTED = {"AllReduce"}  # what more than one rank adds; compiling it takes a launcher


def stated(name: str) -> set[str]:
    """Platforms that MindSpore's documentation names for an operator or function; empty when it has no statement."""
    for home in (ops, operations, auto_generate):
        text = getattr(getattr(home, name, None), "__doc__", None) or ""
        lines = re.findall(r"Supported Platforms:\s*\n\s*(.*)", text)
        reference = re.search(r"Refer to :func:`mindspore\.ops\.(\w+)`", text)
        if lines:
            platforms = set.intersection(*(set(re.findall(r"``(\w+)``", line)) for line in lines))
        else:
            platforms = stated(reference[1]) if reference else set()
        if platforms:
            return platforms
    return set()


def supported(primitive: str) -> set[str]:
    """Platforms of a primitive of a compiled graph. LookupError: neither a statement nor a table covers it."""
    if primitive in STRUCTURE:
        return PLATFORMS
    platforms = stated(GRADIENT_OF.get(primitive) or FORM_OF.get(primitive) or primitive)
    if not platforms:
        raise LookupError(f"MindSpore states no platforms for {primitive}, and no table of this file covers it")
    return platforms


def compiled(graph: str, recipe: str = "skanet_nano_digits") -> str:
    """The graph of `programs/recipe_step.py`, in the recipe's precision, as MindSpore writes it."""
    with tempfile.TemporaryDirectory() as folder:
        only_validate = dict(MS_DEV_PRECOMPILE_ONLY="1", MS_DEV_SAVE_GRAPHS="1", MS_DEV_DUMP_IR_PASSES="validate")
        plain = dict(MINDSKA_KERNELS="off")  # as on Ascend and GPU
        environment = {**os.environ, **only_validate, **plain, "MS_DEV_SAVE_GRAPHS_PATH": folder}
        command = [sys.executable, str(PROGRAM), str(CONFIGS / f"{recipe}.yaml"), graph, "--compile"]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
        (file,) = Path(folder).glob("*_validate_*.ir")
        return file.read_text()


def unfit(ir: str) -> list[str]:
    """What of a graph Ascend does not take, or computes on its AI CPU, which is slow; as far as the graph shows it.

    Double precision, shapes that are not known, a top-k that is not sorted or not of float16 or float32.
    """
    found = [f"{kind} values" for kind in ("Float64", "Complex64") if f"Tensor[{kind}]" in ir]
    shapes = re.findall(r"Tensor\[\w+\], \(([-\d, ]*)\)|TupleShape\(([-\d, ()]*)\)>", ir)
    if any("-" in text for shape in shapes for text in shape):
        found.append("a shape that is not known")
    for attributes, dtype in re.findall(r" = TopK\(.*?\) (.*)\n\s*: \(<Tensor\[(\w+)\]", ir):
        if "sorted: Bool(1)" not in attributes or dtype not in ("Float16", "Float32"):
            found.append(f"TopK of {dtype} ({attributes})")
    return found


def primitives(ir: str) -> dict[str, set[str]]:
    found = defaultdict(set)
    for line in re.findall(r"^\s*%\d+\(.*", ir, re.MULTILINE):
        # `%7(CNode_9) = PrimFunc_Mul(%5, %6) ... forward_node_name: "Div_12"`, or a call: `%7(CNode_9) = %5[@...]()`
        primitive = re.search(r"\) = (?:PrimFunc_)?(?:([A-Za-z]\w*)\(|%\d+\[@)", line)
        assert primitive, f"a line of MindSpore's graph that this test cannot read: {line}"
        if primitive[1]:
            forward = re.search(r'forward_node_name: "(\w+)_\d+"', line)
            found[primitive[1]].update([forward[1]] if forward else [])
    return found


def missing_platforms(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Platforms that are not stated for a primitive of a graph."""
    missing = {primitive: PLATFORMS - supported(primitive) for primitive in set(found) | DISTRIBUTED}
    return {primitive: platforms for primitive, platforms in missing.items() if platforms}


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, graph, some",
    [
        ("skanet_nano_digits", "train", {"Conv2D", "TopK", "Erf", "Conv2DBackpropInput"}),
        ("van", "forward", {"Conv2D", "Erf", "Cast"}),
        ("sknet26", "forward", {"MaxPool", "Softmax", "Cast"}),
        ("sk_resnet18", "train", {"Conv2DBackpropInput", "MaxPoolGrad", "Cast"}),
    ],
)
def test_every_operator_is_stated_for_every_platform(recipe, graph, some):
    ir = compiled(graph, recipe)
    found = primitives(ir)
    assert some <= set(found), "the graph was not read"
    assert not missing_platforms(found) and not unfit(ir)
    if (recipe, graph) == ("skanet_nano_digits", "train"):
        covered = {*STRUCTURE, *GRADIENT_OF, *FORM_OF} - ONLY_SKNET
        assert covered <= set(found), f"not in the graph any more: {covered - set(found)}"
        gradients = GRADIENT_OF.keys() - ONLY_SKNET
        assert {name: found[name] for name in gradients} == {name: {GRADIENT_OF[name]} for name in gradients}


TOP_K = """  %3(a) = TopK(%1, I64(4)) primitive_attrs: {sorted: Bool(1)} cnode_attrs: {checkpoint: Bool(1)}
      : (<Tensor[Float32], (2, 256, 16)>, <Int64, NoShape>) -> (<Tuple[Tensor[Float32],Tensor[Int32]]>)
"""


@pytest.mark.parametrize(
    "change, word",
    [
        (("Tensor[Float32], (2", "Tensor[Float64], (2"), "Float64 values"),
        (("(2, 256, 16)", "(-1, 256, 16)"), "not known"),
        (("(2, 256, 16)", "(2, 256, -1)"), "not known"),
        (("sorted: Bool(1)", "sorted: Bool(0)"), "TopK of Float32"),
        (("Tensor[Float32], (2", "Tensor[Int64], (2"), "TopK of Int64"),
    ],
)
def test_what_ascend_does_not_take_is_seen(change, word):
    assert not unfit(TOP_K)
    assert word in " ".join(unfit(TOP_K.replace(*change)))


def test_tables_cover_only_what_has_no_statement():
    assert not [name for name in {**STRUCTURE, **GRADIENT_OF, **FORM_OF} if stated(name)]


def test_a_missing_platform_is_seen():
    assert supported("FlashAttentionScore") == {"Ascend"}  # its own docstring
    assert supported("FFT") == {"Ascend", "CPU"}  # "Refer to mindspore.ops.fft"
    assert supported("Erf") == PLATFORMS


@pytest.mark.parametrize("name", ["NoSuchOperator", "SeluGrad"])
def test_an_operator_without_statement_is_an_error(name):
    with pytest.raises(LookupError, match=name):
        supported(name)


def test_a_line_that_cannot_be_read_is_an_error():
    assert primitives("  %1(x) = PrimFunc_Mul(%0, %0)\n  # %2(y) = Add(\n  %3(z) = %2[@f]()\n") == {"Mul": set()}
    with pytest.raises(AssertionError, match="cannot read"):
        primitives("  %1(x) = <new notation>")


if __name__ == "__main__":
    every: set[str] = set()
    for path in (path for path in sorted(CONFIGS.glob("*.yaml")) if "\nmodel:" in path.read_text()):
        graph = compiled("train", path.stem)
        every |= set(primitives(graph))
        problems = [
            *unfit(graph),
            *(f"{k} lacks {', '.join(v)}" for k, v in missing_platforms(primitives(graph)).items()),
        ]
        print(f"{path.stem:24} {'; '.join(problems) or 'every operator is stated for Ascend, GPU and CPU'}", flush=True)
    for name in sorted(every | DISTRIBUTED):
        basis = GRADIENT_OF.get(name) or FORM_OF.get(name) or STRUCTURE.get(name, "")
        print(f"{name:24} {' '.join(sorted(supported(name))):16} {basis}")
