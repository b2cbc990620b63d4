"""What runs in a variant's own process, as a program: steps, each as it is asked for on standard input."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable


@dataclass(frozen=True)
class Variant:
    """One thing to measure: `library` is "pytorch", "compiled" (torch.compile) or "mindska"."""

    library: str
    model: str
    what: str
    size: int
    batch: int
    kernels: bool = True
    ranks: int = 1
    mindspore_first: bool = False  # imported before mindska
    cached: bool = False  # the compiled graph is kept for the next start, as train.py, validate.py and predict.py do

    @property
    def name(self) -> str:
        """What the tables call it."""
        if self.library != "mindska":
            return "PyTorch" if self.library == "pytorch" else "torch.compile"
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


def pytorch_step(variant: Variant, images: Any) -> Callable[[], Any]:
    """A step of the PyTorch reference; in training with AdamW."""
    # Without mindska around it: MindSpore, and what mindska sets before it is loaded, would change PyTorch's threads.
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import reference
    import torch

    net = reference.create(variant.model)
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
    labels = torch.arange(len(images))

    def train() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(run(batch), labels).backward()
        optimizer.step()

    return train


def mindska_step(variant: Variant, images: Any) -> Callable[[], Any]:
    """A step of ours in graph mode; in training the trainer's own, with AdamW, over the ranks that were started."""
    import mindcv
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from mindska import builders
    from mindska.compile_cache import compile_cached
    from mindska.config import Config
    from mindska.distributed import world
    from mindska.folding import fold
    from mindska.training import TrainStep, build_optimizer

    ms.set_context(mode=ms.GRAPH_MODE)
    net, batch = mindcv.create_model(variant.model), Tensor(images)
    if variant.what != "train":
        net.set_train(False)
        net = fold(net) if variant.what == "folded" else net
        if variant.cached:
            compile_cached(net, batch, options=variant.what)
        return lambda: net(batch).asnumpy()
    config = Config(model=variant.model, opt="adamw", ema=False)
    net.set_train(True)
    optimizer = build_optimizer(config, net, [1e-4] * 1000)
    step = TrainStep(net, builders.build_loss(config), optimizer, builders.build_step_options(config), world().size)
    labels = Tensor(np.arange(len(images), dtype=np.int32))
    noise = Tensor(np.random.default_rng(0).random((len(images), net.noise_size), dtype=np.float32))
    step.set_train(True)
    if variant.cached:
        compile_cached(step, batch, labels, noise, options=variant.what)
    return lambda: step(batch, labels, noise)[0].asnumpy()


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
        import torch  # noqa: F401

        answer(variant, lambda: bool(sys.stdin.readline().strip()))


def answer(variant: Variant, asked: Callable[[], bool], silent: bool = False) -> None:
    """Runs a step whenever it is asked for; prints the seconds of each, and in the end the peak memory."""
    import numpy as np

    def report(value: float) -> None:
        if not silent:
            print(json.dumps(value), flush=True)

    images = np.random.default_rng(0).standard_normal((variant.batch, 3, variant.size, variant.size), dtype=np.float32)
    before, start = peak_memory(reset=True), time.perf_counter()
    step = (mindska_step if variant.library == "mindska" else pytorch_step)(variant, images)
    step()
    report(time.perf_counter() - start)
    while asked():
        start = time.perf_counter()
        step()
        report(time.perf_counter() - start)
    report(peak_memory() - before)


if __name__ == "__main__":
    work(Variant(**json.loads(sys.argv[1])))
