"""What runs in a variant's own process, as a program: steps, each as it is asked for on standard input."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

ENGINES = dict(onnxruntime="ONNX Runtime", openvino="OpenVINO")
LIBRARIES = dict(ENGINES, pytorch="PyTorch", compiled="torch.compile")  # others than ours, as tables call them


@dataclass(frozen=True)
class Variant:
    """One thing to measure.

    `library`: "mindska", "pytorch", "compiled" (torch.compile), or one of `ENGINES`, which runs our exported ONNX file.
    """

    library: str
    model: str
    what: str
    size: int
    batch: int
    kernels: bool = True
    ranks: int = 1
    width: int = 0  # of the images, where it is not their height, `size`
    task: str = "classification"
    onnx_file: str = ""  # what an engine runs
    mindspore_first: bool = False  # imported before mindska
    cached: bool = False  # the compiled graph is kept for the next start, as train.py, validate.py and predict.py do

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.size, self.width or self.size

    @property
    def name(self) -> str:
        """What the tables call it."""
        if self.library != "mindska":
            return LIBRARIES[self.library]
        return f"mindska{'' if self.kernels else ', plain operators'}{', folded' if self.what == 'folded' else ''}"


def peak_memory(reset: bool = False) -> int:
    """The largest resident memory of this process, in bytes; since a call with `reset`, where the system has that."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError, IndexError):  # Linux: getrusage's would begin with the parent's memory there
        return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


CLASSES = dict(segmentation=21, detection=80)  # fewer than any of these networks has
OBJECTS = 10  # of an image


def targets(variant: Variant) -> list[Any]:
    """What images are compared with in training, NumPy arrays; as the training transforms make them."""
    import numpy as np

    rng, (height, width), batch = np.random.default_rng(1), variant.image_size, variant.batch
    if variant.task == "classification":
        return [np.arange(batch, dtype=np.int32)]
    if variant.task == "segmentation":
        blocks = rng.integers(0, CLASSES["segmentation"], (batch, -(-height // 16), -(-width // 16)))
        return [blocks.repeat(16, 1).repeat(16, 2)[:, :height, :width].astype(np.int32)]
    corners = rng.uniform(0, 0.7, (batch, OBJECTS, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.1, 0.3, (batch, OBJECTS, 2))], 2)
    boxes = (boxes * [width, height, width, height]).astype(np.float32)
    labels = rng.integers(0, CLASSES["detection"], (batch, OBJECTS)).astype(np.int32)
    arrays = [boxes, labels, np.full((batch, 2), (height, width), np.int32)]
    if variant.model.startswith("mask_rcnn_"):
        masks = np.zeros((batch, OBJECTS, height, width), bool)
        for image, some in zip(masks, boxes.astype(int)):
            for mask, (left, top, right, bottom) in zip(image, some):
                mask[top:bottom, left:right] = True
        arrays.append(np.packbits(masks, axis=3))
    return arrays


def pytorch_step(variant: Variant, images: Any) -> Callable[[], Any]:
    """A step of the PyTorch reference; in training with AdamW."""
    # Without mindska's start: MindSpore, and what mindska sets before it is loaded, would change PyTorch's threads.
    package = types.ModuleType("mindska")
    package.__path__ = [str(Path(__file__).parent.parent)]
    sys.modules.setdefault("mindska", package)
    import numpy as np
    import torch

    from mindska import reference

    net: Any = reference.create(variant.model)
    batch = torch.from_numpy(images)
    run = torch.compile(net) if variant.library == "compiled" else net
    if variant.what != "train":
        net.eval()

        def forward() -> Any:
            with torch.no_grad():
                return run(batch)

        return forward
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    compared = targets(variant)
    if variant.task != "detection":  # detectors match objects in NumPy
        compared = [torch.from_numpy(array).long() for array in compared]
    elif variant.model.startswith("mask_rcnn_"):
        from mindska.reference.detection import KEY_NOISE

        compared.append(np.random.default_rng(0).random((variant.batch, 2 * KEY_NOISE), dtype=np.float32))

    def loss() -> Any:
        if variant.task == "classification":
            return torch.nn.functional.cross_entropy(run(batch), compared[0])
        losses = net.losses(batch, *compared)
        return sum(losses.values()) if isinstance(losses, dict) else losses

    def train() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return train


def engine_step(variant: Variant, images: Any) -> Callable[[], Any]:
    """A forward pass of a deployment engine, with a thread a core as ours."""
    from mindska.distributed.cores import share_of_cores

    threads = share_of_cores(1)
    if variant.library == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(variant.onnx_file, options, ["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        return lambda: session.run(None, feed)
    import openvino

    wanted = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(variant.onnx_file, "CPU", wanted)
    return lambda: model(images)


def mindska_step(variant: Variant, images: Any) -> Callable[[], Any]:
    """A step of ours in graph mode; in training the trainer's own, with AdamW, over the ranks that were started."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from mindska import builders
    from mindska.compile_cache import compile_cached
    from mindska.config import Config
    from mindska.distributed import world
    from mindska.folding import fold
    from mindska.training import TrainStep, build_optimizer
    from mindska.weights.methods import create

    ms.set_context(mode=ms.GRAPH_MODE)
    net, batch = create(variant.model), Tensor(images)
    if variant.what != "train":
        net.set_train(False)
        net = fold(net) if variant.what == "folded" else net
        if variant.cached:
            compile_cached(net, batch, options=variant.what)
        return lambda: finished(net(batch))
    config = Config(model=variant.model, opt="adamw", ema=False)
    net.set_train(True)
    optimizer = build_optimizer(config, net, [1e-4] * 1000)
    loss = builders.build_loss(config) if variant.task == "classification" else None
    step = TrainStep(net, loss, optimizer, builders.build_step_options(config), world().size)
    compared = [Tensor(array) for array in targets(variant)]
    noise = Tensor(np.random.default_rng(0).random((len(images), net.noise_size), dtype=np.float32))
    step.set_train(True)
    if variant.cached:
        compile_cached(step, batch, *compared, noise, options=variant.what)
    return lambda: step(batch, *compared, noise)[0].asnumpy()


def finished(outputs: Any) -> None:
    """Waits until all outputs are there."""
    for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
        if isinstance(output, (tuple, list)):
            finished(output)
        else:
            output.asnumpy()


def work(variant: Variant) -> None:
    """Answers each line on standard input with the seconds of one step, and an empty one with the peak memory."""
    if variant.library == "mindska":
        if variant.mindspore_first:
            import mindspore  # noqa: F401
        from mindska.distributed import broadcast_object, distributed

        with distributed("CPU") as world:

            def ask() -> bool:
                return broadcast_object(bool(sys.stdin.readline().strip()) if world.rank == 0 else None)

            answer(variant, ask, silent=world.rank > 0)
    else:
        if variant.library not in ENGINES:
            import torch  # noqa: F401

        answer(variant, lambda: bool(sys.stdin.readline().strip()))


def answer(variant: Variant, asked: Callable[[], bool], silent: bool = False) -> None:
    """Runs a step whenever it is asked for; prints the seconds of each, and in the end the peak memory."""
    import numpy as np

    def report(value: float) -> None:
        if not silent:
            print(json.dumps(value), flush=True)

    images = np.random.default_rng(0).standard_normal((variant.batch, 3, *variant.image_size), dtype=np.float32)
    before, start = peak_memory(reset=True), time.perf_counter()
    makers = dict(dict.fromkeys(ENGINES, engine_step), mindska=mindska_step)
    step = makers.get(variant.library, pytorch_step)(variant, images)
    step()
    report(time.perf_counter() - start)
    while asked():
        start = time.perf_counter()
        step()
        report(time.perf_counter() - start)
    report(peak_memory() - before)


if __name__ == "__main__":
    work(Variant(**json.loads(sys.argv[1])))
