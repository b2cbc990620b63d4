"""Measures the speed of our networks, and of the PyTorch references beside them, on this machine.

    python scripts/benchmark.py                                  five models, with and without the C++ operators
    python scripts/benchmark.py --models sknet50 --what forward folded --kernels both --compile
    python scripts/benchmark.py --models skanet_s --scaling      cost against image size, batch and ranks
    python scripts/benchmark.py --starts                         the first step of a first and of a second start
    python scripts/benchmark.py --loader                         images a second of the training data alone

Every variant is a process of its own; one after the other runs two steps, of which the second is timed, round by round:
a slow minute of the machine meets all of them. Printed: how many times as fast as PyTorch each is; then the median of
the rounds with the spread from the fastest to the slowest, the ratio of PyTorch's median to it, peak memory above the
empty process, the time of the first step (compilation), and the share of the machine's matrix-product rate
(multiply-accumulates as scripts/count.py counts them; a training step has three times the forward's).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Optional

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "tests" / "parity"
MODELS = ("skanet_s", "van_tiny_lska_k7", "van_tiny_lska_k23", "van_tiny_lska_k53", "sknet50")
WHAT = ("forward", "folded", "train")
PHOTOS = (500, 375), (4000, 3000)  # as in ImageNet, and of a telephone
SIZES, BATCHES = (160, 224, 256, 320, 384, 512), (1, 2, 4, 8, 16, 32)


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
    cached: bool = False  # the compiled graph is kept for the next start, as train.py, validate.py and predict.py do

    @property
    def name(self) -> str:
        """What the tables call it."""
        if self.library != "mindska":
            return "PyTorch" if self.library == "pytorch" else "torch.compile"
        return f"mindska{'' if self.kernels else ', plain operators'}{', folded' if self.what == 'folded' else ''}"


# What runs in a variant's own process


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
    sys.path.insert(0, str(REFERENCES))
    import torch
    import torch_skanet
    import torch_sknet
    import torch_van

    modules = {"skanet": torch_skanet, "van": torch_van}
    net = modules.get(variant.model.split("_")[0], torch_sknet).create(variant.model)
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

    from mindska import recipe
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
    step = TrainStep(net, recipe.loss(config), optimizer, recipe.step_options(config), world().size)
    labels = Tensor(np.arange(len(images), dtype=np.int32))
    noise = Tensor(np.random.default_rng(0).random((len(images), net.noise_size), dtype=np.float32))
    step.set_train(True)
    if variant.cached:
        compile_cached(step, batch, labels, noise, options=variant.what)
    return lambda: step(batch, labels, noise)[0].asnumpy()


def work(variant: Variant) -> None:
    """Answers each line on standard input with the seconds of one step, and an empty one with the peak memory."""
    if variant.library == "mindska":
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


# What measures them


class Worker:
    """A variant in a process of its own."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.seconds = variant, []
        environment = {**os.environ, "MINDSKA_KERNELS": "require" if variant.kernels else "off"}
        if variant.library != "mindska":
            environment.pop("MINDSKA_KERNELS")
        words = [sys.executable, __file__, "--worker", json.dumps(asdict(variant))]
        if variant.ranks > 1:
            words = ["mpirun", "-n", str(variant.ranks), "--oversubscribe", *words]
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.first = self._answer()

    def _answer(self) -> float:
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:  # something that a library says
                continue
        raise SystemExit(f"error: {self.variant.name} of {self.variant.model} ({self.variant.what}) failed; see above")

    def step(self) -> float:
        """One step's seconds."""
        self.process.stdin.write("step\n")
        return self._answer()

    def end(self) -> int:
        """Ends the process and returns its peak memory."""
        self.process.stdin.write("\n")
        memory = self._answer()
        self.process.stdin.close()
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
    import numpy as np

    a = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = max(best, 2048**3 / (time.perf_counter() - start))
    return best


def macs(model: str, size: int) -> int:
    """Multiply-accumulates of one image, pairwise distances included; counted by scripts/count.py."""
    words = [sys.executable, str(ROOT / "scripts" / "count.py"), model, "--image_resize", str(size)]
    row = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1].split("|")
    return int(1e9 * (float(row[4]) + float(row[5])))


def warm_up(variant: Variant) -> int:
    """Steps before the rounds.

    In its first launches an operator of MindSpore tries one thread, two, four, ... up to the cores and once more, five
    launches each; a step then takes up to a third longer.
    """
    return min(31, 5 * (cores().bit_length() + 1) + 1) if variant.library == "mindska" else 3


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


def by_step(results: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """The results by model, size, batch and step, "forward" or "train"."""
    groups: dict[tuple, list] = {}
    for result in results:
        step = "train" if result["what"] == "train" else "forward"
        groups.setdefault((result["model"], result["size"], result["batch"], step), []).append(result)
    return groups


def summary(results: list[dict[str, Any]]) -> str:
    """How many times as fast as PyTorch the variants are, as Markdown; "" without PyTorch."""
    names = list(dict.fromkeys(r["name"] for r in results if r["library"] != "pytorch"))
    lines = [f"| model | step | PyTorch | {' | '.join(names)} |", "|---|---" + "|---" * (len(names) + 1) + "|"]
    for (model, size, batch, step), group in by_step(results).items():
        medians = {r["name"]: r["median"] for r in group}
        if "PyTorch" not in medians:
            return ""
        ratios = [f"{medians['PyTorch'] / medians[name]:.2f}" if name in medians else "—" for name in names]
        lines.append(
            f"| `{model}`, {size}, batch {batch} | {step} | {medians['PyTorch']:.3f} s | {' | '.join(ratios)} |"
        )
    return "\n".join(lines) + "\n\n"


def table(results: list[dict[str, Any]], rate: float, costs: dict[tuple[str, int], int]) -> str:
    """All of the results as Markdown."""
    lines = [
        "| model | step | variant | seconds (fastest to slowest) | speed-up | memory | first step | of GEMM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, size, batch, step), group in by_step(results).items():
        reference = next((r for r in group if r["library"] == "pytorch"), None)
        for r in group:
            cost = costs[model, size] * batch * (3 if step == "train" else 1)
            ratio = f"{reference['median'] / r['median']:.2f}" if reference else "—"
            memory = f"{r['memory'] / 2**30:.2f} GB"
            if reference and r is not reference and reference["memory"]:
                memory += f" ({r['memory'] / reference['memory']:.2f})"
            lines.append(
                f"| `{model}`, {size}, batch {batch} | {step} | {r['name']} | {r['median']:.3f} "
                f"({r['fastest']:.3f} to {r['slowest']:.3f}) | {ratio} | {memory} | {r['first']:.1f} s "
                f"| {100 * cost / r['median'] / rate:.0f} % |"
            )
    return "\n".join(lines)


def own_size(model: str) -> int:
    """The size that a model's weights expect."""
    from mindcv.models.registry import get_pretrained_cfg

    import mindska  # noqa: F401

    return get_pretrained_cfg(model)["input_size"][1]


def scaling(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost against image size and batch, forward, and against the number of ranks, in training for us alone."""
    size, results = options.image_resize or own_size(model), []
    if options.what != ["train"]:
        for case in [(size, options.batch) for size in SIZES] + [(size, batch) for batch in BATCHES]:
            variants = others("forward", model, *case, options) + ours(model, options, ("forward", "folded"), *case)
            results += measure(variants, options.rounds)
    ranks = 1
    while ranks <= cores() and "train" in options.what:
        results += measure(ours(model, options, ("train",), size, ranks=ranks), options.rounds)
        ranks *= 2
    return results


def scaling_table(results: list[dict[str, Any]]) -> str:
    """The results of `scaling` as Markdown."""
    lines = [
        "| model | step | size | batch | ranks | library | seconds | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rate = r["batch"] * r["ranks"] / r["median"]
        row = (f"`{r['model']}`", r["what"], r["size"], r["batch"], r["ranks"], r["name"])
        lines.append("| " + " | ".join(map(str, row)) + f" | {r['median']:.3f} | {rate:.1f} |")
    return "\n".join(lines)


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


def starts_table(results: list[dict[str, Any]]) -> str:
    """The results of `starts` as Markdown."""
    lines = ["| model | step | variant | first start | second start |", "|---|---|---|---|---|"]
    for r in results:
        step = "train" if r["what"] == "train" else "forward"
        lines.append(f"| `{r['model']}` | {step} | {r['name']} | {r['first']:.1f} s | {r['second']:.1f} s |")
    return "\n".join(lines)


def loader_rate(photo: tuple[int, int], rounds: int) -> float:
    """Images a second of the training data alone: JPEG files of `photo` (width, height) pixels, augmented as in
    configs/skanet_s.yaml, in batches, with as many workers as cores."""
    import numpy as np
    from PIL import Image

    from mindska import recipe
    from mindska.config import parse_args
    from mindska.data import TrainLoader, TrainTransform, open_dataset

    config = parse_args(["--config", str(ROOT / "configs" / "skanet_s.yaml"), "--data_dir", "unused"])
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for i in range(64):
            place = Path(folder) / "train" / f"class{i % 4}"
            place.mkdir(parents=True, exist_ok=True)
            noise = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(photo, Image.BICUBIC)
            noise.save(place / f"{i}.jpg", quality=90)
        loader = TrainLoader(
            open_dataset(config.dataset, folder, "train"),
            TrainTransform(recipe.preprocessing(config), recipe.augmentation(config)),
            32,
            num_classes=4,
            num_workers=cores(),
            **recipe.loading(config),
        )
        batches, seconds = loader.batches(0, None), []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(4):
                next(batches)
            seconds.append(time.perf_counter() - start)
    return 4 * 32 / statistics.median(seconds[1:])


def ours(
    model: str,
    options: argparse.Namespace,
    what: tuple[str, ...] = WHAT,
    size: Optional[int] = None,
    batch: Optional[int] = None,
    **further: Any,
) -> list[Variant]:
    """Our variants of a model that are asked for, among the steps `what`."""
    shape = size or options.image_resize or own_size(model), batch or options.batch
    kernels = {"on": [True], "off": [False], "both": [True, False]}[options.kernels]
    asked = [step for step in what if step in options.what]
    return [Variant("mindska", model, step, *shape, on, **further) for step in asked for on in kernels]


def others(what: str, model: str, size: int, batch: int, options: argparse.Namespace) -> list[Variant]:
    """PyTorch's variants that are asked for."""
    names = ["pytorch"] * options.pytorch + ["compiled"] * options.compile
    return [Variant(name, model, what, size, batch) for name in names]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def parse(arguments: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--image_resize", type=int, metavar="N", help="size in pixels; default: the model's own")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images a step (default: 8)")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="default: all")
    parser.add_argument(
        "--kernels", choices=("on", "off", "both"), default="both", help="C++ operators (default: both)"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="steps of each variant, not with --starts (default: 7)"
    )
    parser.add_argument("--no_pytorch", dest="pytorch", action="store_false", help="leave PyTorch out")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--scaling", action="store_true", help="cost against size, batch and ranks instead")
    parser.add_argument("--starts", action="store_true", help="first step of a first and a second start instead")
    parser.add_argument("--loader", action="store_true", help="images a second of the training data alone instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.worker:
        from mindska.models.factory import OUR_MODELS

        unknown = [name for name in options.models if name not in OUR_MODELS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], OUR_MODELS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(OUR_MODELS)}"
            parser.error(f"{unknown[0]} is not a model of mindska; {hint}")
        for name in ("rounds", "batch", "image_resize"):
            value = getattr(options, name)
            if value is not None and value < 1:
                parser.error(f"--{name} is {value}; expected at least 1")
    return options


def main(arguments: Optional[list[str]] = None) -> None:
    options = parse(arguments)
    if options.worker:
        work(Variant(**json.loads(options.worker)))
        return
    if options.loader:
        for photo in PHOTOS:
            rate = loader_rate(photo, options.rounds)
            print(f"{photo[0]}x{photo[1]} pixels: {rate:.0f} images/s on {cores()} cores, {platform.machine()}")
        return
    machine = f"{platform.machine()}, {cores()} cores"
    if options.starts:
        results = starts([variant for model in options.models for variant in ours(model, options, cached=True)])
        text = starts_table(results)
        finish(options, dict(machine=machine, results=results), f"{machine}, without imports\n\n{text}")
        return
    rate = gemm_rate()
    results: list[dict[str, Any]] = []
    for model in options.models:
        if options.scaling:
            results += scaling(model, options)
            continue
        for group in (("forward", "folded"), ("train",)):
            variants = ours(model, options, group)
            if variants:
                first = variants[0]
                reference = others(group[0], model, first.size, first.batch, options)
                results += measure(reference + variants, options.rounds)
    machine += f", GEMM {2 * rate / 1e9:.0f} GFLOP/s"
    if options.scaling:
        text = scaling_table(results)
    else:
        costs = {key: macs(*key) for key in {(r["model"], r["size"]) for r in results}}
        text = summary(results) + table(results, rate, costs)
    figures = dict(machine=machine, gemm=rate, results=results)
    finish(options, figures, f"{machine}, float32, median of {options.rounds} rounds\n\n{text}")


def finish(options: argparse.Namespace, figures: dict[str, Any], text: str) -> None:
    """Prints the text, and writes the figures where they were asked for."""
    print(text)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
