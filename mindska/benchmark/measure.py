"""Measures variants: each in a process of its own, alternately."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image

from .. import builders
from ..config import parse_args
from ..data import TrainLoader, TrainTransform, open_dataset
from ..distributed.cores import share_of_cores
from ..export import export
from ..folding import fold
from ..names import task_of
from ..weights import methods
from . import WHAT
from .worker import ENGINES, Variant

PHOTOS = (500, 375), (4000, 3000)  # as in ImageNet, and of a telephone
SIZES, BATCHES = (160, 224, 256, 320, 384, 512), (1, 2, 4, 8, 16, 32)


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.seconds: list[float] = []
        environment = {**os.environ, "MINDSKA_KERNELS": "require" if variant.kernels else "off"}
        if variant.library != "mindska":
            environment.pop("MINDSKA_KERNELS")
        words = [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(asdict(variant))]
        if variant.ranks > 1:
            words = ["mpirun", "-n", str(variant.ranks), "--oversubscribe", *words]
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdin and self.process.stdout  # pipes
        self.requests, self.answers = self.process.stdin, self.process.stdout
        self.first = self._answer()

    def _answer(self) -> float:
        for line in self.answers:
            try:
                return json.loads(line)
            except ValueError:  # something that a library says
                continue
        raise SystemExit(
            f"error: {self.variant.name} of {self.variant.model} ({self.variant.what}) failed (exit status "
            f"{self.process.wait()}); see above"
        )

    def step(self) -> float:
        """One step's seconds."""
        self.requests.write("step\n")
        return self._answer()

    def end(self) -> int:
        """Ends the process and returns its peak memory."""
        self.requests.write("\n")
        memory = int(self._answer())
        self.requests.close()
        self.process.wait()
        return memory

    def close(self) -> dict[str, Any]:
        """Ends the process and returns what was measured."""
        memory = self.end()
        return dict(
            asdict(self.variant),
            name=self.variant.name,
            median=statistics.median(self.seconds),
            fastest=min(self.seconds),
            slowest=max(self.seconds),
            first=self.first,
            memory=memory,
        )


def gemm_rate() -> float:
    """Multiply-accumulates a second of NumPy's float32 matrix product: the best of several."""
    a = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = max(best, 2048**3 / (time.perf_counter() - start))
    return best


def warm_up(variant: Variant) -> int:
    """Steps before the rounds.

    In its first launches an operator of MindSpore tries one thread, two, four, ... up to the cores and once more, five
    launches each; a step then takes up to a third longer.
    """
    return min(31, 5 * (share_of_cores(1).bit_length() + 1) + 1) if variant.library == "mindska" else 3


def measure(variants: list[Variant], rounds: int) -> list[dict[str, Any]]:
    """Runs the variants alternately."""
    workers = []
    for variant in variants:
        print(f"  starting {variant.name} ({variant.model}, {variant.what}) ...", file=sys.stderr, flush=True)
        workers.append(Worker(variant))
    for worker in workers:
        for _ in range(warm_up(worker.variant)):
            worker.step()
    for _ in range(rounds):
        for worker in workers:
            # Not timed: after a pause the caches are cold, and memory that was given back has to be fetched again.
            worker.step()
            worker.seconds.append(worker.step())
    return [worker.close() for worker in workers]


def compare(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our variants of a model and PyTorch's beside them: forward and folded, then training."""
    results = []
    for group in (("forward", "folded"), ("train",)):
        variants = ours(model, options, group)
        if variants:
            first = variants[0]
            peers = others(group[0], model, first.image_size, first.batch, options)
            with tempfile.TemporaryDirectory() as folder:
                if options.engines and group[0] == "forward":
                    peers += engines(first, options.engines, Path(folder))
                results += measure(peers + variants, options.rounds)
    return results


def engines(ours: Variant, names: list[str], folder: Path) -> list[Variant]:
    """Deployment engines on the ONNX file of the same network, folded, for any number of images."""
    network, path = methods.create(ours.model).set_train(False), folder / f"{ours.model}.onnx"
    if ours.task == "classification":
        network = fold(network)
    export(network, path, (ours.batch, 3, *ours.image_size), {"model": ours.model}, dynamic_size=False)
    return [replace(ours, library=name, onnx_file=str(path)) for name in ENGINES if name in names]


DENSE_SIZES = dict(segmentation=(512, 512), detection=(512, 640))  # what segmenters and detectors are measured at


def own_size(model: str) -> tuple[int, int]:
    """(height, width) that a model's weights expect; segmenters and detectors are measured at `DENSE_SIZES`."""
    task = task_of(model)
    if task == "classification" or model.startswith("ssdlite_"):
        height, width = methods.card(model)["input_size"][1:]
        return height, width
    return DENSE_SIZES[task]


def asked_size(model: str, options: argparse.Namespace) -> tuple[int, int]:
    """(height, width) to measure at: what the command says, else the model's own."""
    return (options.image_resize[0], options.image_resize[-1]) if options.image_resize else own_size(model)


def scaling(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost against image size and batch, forward, and against the number of ranks, in training for us alone."""
    size, results = asked_size(model, options), []
    if options.what != ["train"]:
        for side, batch in [((side, side), options.batch) for side in SIZES] + [(size, batch) for batch in BATCHES]:
            variants = ours(model, options, ("forward", "folded"), side, batch)
            results += measure(others("forward", model, side, batch, options) + variants, options.rounds)
    ranks = 1
    while ranks <= share_of_cores(1) and "train" in options.what:
        results += measure(ours(model, options, ("train",), size, ranks=ranks), options.rounds)
        ranks *= 2
    return results


def starts(variants: list[Variant]) -> list[dict[str, Any]]:
    """Seconds until the first step has run (without imports), in a first start and in a second."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(MINDSKA_CACHE=folder, MINDSKA_COMPILE_CACHE="on", MINDSKA_KERNELS="auto")
        subprocess.run([sys.executable, "-c", "from mindska import kernels; kernels.libraries()"], check=True)
        for variant in variants:
            print(f"  starting {variant.name} ({variant.model}, {variant.what}) twice ...", file=sys.stderr, flush=True)
            seconds = []
            for _ in range(2):
                worker = Worker(variant)
                seconds.append(worker.first)
                worker.end()
            results.append(dict(asdict(variant), name=variant.name, first=seconds[0], second=seconds[1]))
    return results


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Meanwhile another process keeps the first core busy."""
    core = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def import_orders(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A forward step after `import mindska` and after `import mindspore, mindska`: with one rank and two, on an idle
    machine and with a busy core."""
    results, shape = [], (asked_size(model, options)[0], options.batch)
    for ranks in (1, 2):
        for busy in (False, True):
            with busy_core() if busy else contextlib.nullcontext():
                orders = [
                    Variant("mindska", model, "forward", *shape, ranks=ranks, mindspore_first=first)
                    for first in (False, True)
                ]
                results += [dict(result, busy=busy) for result in measure(orders, options.rounds)]
    return results


def loader_rate(recipe_file: Path, photo: tuple[int, int], rounds: int) -> float:
    """Images a second of the training data alone: JPEG files of `photo` (width, height) pixels, augmented as a
    recipe says, in batches, with as many workers as cores."""
    config = parse_args(["--config", str(recipe_file), "--data_dir", "unused"])
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(64):
            place = Path(folder) / "train" / f"class{i % 4}"
            place.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(photo, Image.Resampling.BICUBIC)
            noise.save(place / f"{i}.jpg", quality=90)
        loader = TrainLoader(
            open_dataset(config.dataset or "", folder, "train"),
            TrainTransform(builders.build_preprocessing(config), builders.build_augmentation(config)),
            32,
            num_classes=4,
            num_workers=share_of_cores(1),
            **builders.loading_options(config),
        )
        batches, seconds = loader.batches(0, None), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(4):
                next(batches)
            seconds.append(time.perf_counter() - start)
        batches.close()  # type: ignore[attr-defined]
        for thread in threading.enumerate():  # what is read ahead must not look for files that are gone
            if thread.name.startswith("data"):
                thread.join()
    return 4 * 32 / statistics.median(seconds[1:])


def ours(
    model: str,
    options: argparse.Namespace,
    what: tuple[str, ...] = WHAT,
    size: Optional[tuple[int, int]] = None,
    batch: Optional[int] = None,
    **further: Any,
) -> list[Variant]:
    """Our variants of a model that are asked for, among the steps `what`."""
    height, width = size or asked_size(model, options)
    shape = height, batch or options.batch
    further.update(task=task_of(model), **({"width": width} if width != height else {}))
    kernels = {"on": [True], "off": [False], "both": [True, False]}[options.kernels]
    # What is built on a backbone is not folded.
    asked = [step for step in what if step in options.what and (step != "folded" or task_of(model) == "classification")]
    return [Variant("mindska", model, step, *shape, on, **further) for step in asked for on in kernels]


def others(what: str, model: str, size: tuple[int, int], batch: int, options: argparse.Namespace) -> list[Variant]:
    """PyTorch's variants that are asked for."""
    names = ["pytorch"] * options.pytorch + ["compiled"] * options.compile
    width = size[1] if size[1] != size[0] else 0
    return [Variant(name, model, what, size[0], batch, width=width, task=task_of(model)) for name in names]
