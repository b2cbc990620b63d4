"""Injects the faults and prints the table of outcomes: `python tests/faults/report.py` (ten minutes).

A test that shows what must happen at a fault is marked `@pytest.mark.fault(KEY)`, with the key of a row below.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# Key -> what is injected, and what must happen.
FAULTS = {
    "killed": (
        "`kill -9` at 20 random moments of a run",
        "weights equal the uninterrupted run's to the bit",
    ),
    "killed-writing": (
        "`kill -9` while a checkpoint is written, 50 times",
        "the newest readable, nothing stray",
    ),
    "damaged-checkpoint": (
        "newest checkpoint truncated or a bit flipped, 100 ways",
        "detected, named, the one before it taken",
    ),
    "no-room": (
        "no room for a checkpoint",
        "the earlier one intact, message, exit code 1",
    ),
    "no-room-records": (
        "no room for metrics, log, events, curves",
        "an error for the first, a warning for the others",
    ),
    "signals": (
        "SIGTERM, SIGINT, SIGHUP, SIGUSR1 to mpirun",
        "update finished, checkpoint, exit code 75, the same command resumes",
    ),
    "lost-rank": (
        "a rank, mpirun, the scheduler or the terminal killed, a rank raising, nobody reads on",
        "all gone within 60 s, a checkpoint where ranks live on, traceback in the log",
    ),
    "not-finite": (
        "a batch whose loss is NaN or infinite",
        "nothing changes; counted; too many end the run",
    ),
    "overflow": (
        "overflow under dynamic loss scaling",
        "scale halves, average and schedule stay",
    ),
    "images": (
        "damaged and unusual images",
        "replaced, counted, named; validation fails or leaves out",
    ),
    "same-seed": (
        "the same seed twice, other numbers of workers",
        "the same losses for 52 steps",
    ),
    "uneven-ranks": (
        "evaluation on 2 and 3 ranks that do not divide the set",
        "the same counts as on one",
    ),
    "hostile-weights": (
        "hostile files of weights: code, bombs, damaged bytes, objects that pose as arrays",
        "refused before anything is made of them, nothing executed, memory bounded",
    ),
    "other-settings": (
        "resume with other settings or ranks",
        "refused with the difference, or sound and said",
    ),
    "folders": (
        "folders unwritable, vanishing, or in use",
        "clear errors, nothing overwritten",
    ),
    "one-record": (
        "log and metrics after restarts",
        "one log, nothing lost or doubled",
    ),
    "operators": (
        "other channels, NHWC, wrong ranks, sizes or types for a C++ operator",
        "refused with the shapes before anything runs, in both modes; nothing outside is read",
    ),
    "caches": (
        "a library or graph of the cache that is cut, changed or not ours; no room; a cache that others can write",
        "not loaded, said, built anew or not used",
    ),
    "cache-deleted": (
        "the cache deleted during a run",
        "the run continues",
    ),
    "pixels": (
        "16-bit, float and signed images",
        "scaled by their type, or an error with file and range",
    ),
    "links": (
        "links and loops in data folders",
        "each real folder once, in its own class, reported",
    ),
    "unlistable": (
        "folders that cannot be listed, shares that are away, system folders",
        "an error with the folder's name; what is passed over is counted",
    ),
    "other-data": (
        "ranks that see different data",
        "one error on all ranks, with the difference",
    ),
    "class-order": (
        "class folders whose order is ambiguous, weights that name no classes",
        "refused; a class map decides",
    ),
    "scale-255": (
        "mean and std on a scale of 0 to 255",
        "converted and said, or refused",
    ),
    "decoders": (
        "whatever a decoder raises; formats, pipes and devices that are no photos",
        "unreadable, never started",
    ),
    "image-bombs": (
        "images and strips of hundreds of megapixels",
        "refused or cropped first, memory bounded",
    ),
    "exported": (
        "a `.mindir` or `.onnx` that runs code, reads files or nests graphs",
        "refused before a runtime sees it",
    ),
    "records": (
        "records, keys and names of strangers",
        "typed and bounded, escaped, ten shown",
    ),
    "values": (
        "complex, integer, NaN, infinite or expanded weights",
        "refused by name, never saved",
    ),
    "averaged": (
        "averaged and raw weights in one file; an average that is worse",
        "averaged unless told, and said; the better are best",
    ),
    "unlike": (
        "averaging what does not belong together",
        "refused, with what differs",
    ),
    "environment": (
        "other operators, versions, mode or processor on resume",
        "refused with the difference, or asked for and said",
    ),
    "damaged-records": (
        "settings.json, records or metrics damaged or missing",
        "compared with the checkpoint; set aside; a message",
    ),
    "other-run": (
        "a folder begun again under a living run",
        "it ends within a row; nothing of the other run is touched",
    ),
    "other-validation": (
        "another validation set on resume",
        "best starts anew, and this is logged",
    ),
    "first-weights": (
        "the first weights moved, changed or left out on resume",
        "the run continues",
    ),
    "ranges": (
        "numbers that float32 cannot hold, units of other tools",
        "refused with the bounds or the hint",
    ),
    "nothing-to-learn": (
        "one class; a batch of one under batch norms of 1x1",
        "an error that says so",
    ),
    "strangers": (
        "strangers at rank 0's port: silent, noisy, huge, many, with a wrong key",
        "the world forms undelayed; missing ranks are named",
    ),
    "scheduler-port": (
        "the scheduler's port taken by another program",
        "once more at another port, said",
    ),
    "silent-rank": (
        "a rank silent for longer than MindSpore waits by default",
        "the run continues",
    ),
    "hosts": (
        "odd host names, IPv6, junk in the launcher's variables",
        "it works, or a message",
    ),
    "threads": (
        "other imports first, a quota of CPU time, more threads asked for than cores, a busy core",
        "operators use the cores that there are",
    ),
    "no-classifier": (
        "weights without a classifier, of other classes or channels",
        "said as what they are, with what to do",
    ),
    "training-state": (
        "optimiser state and counters in a checkpoint",
        "left out by name, said once",
    ),
    "wrappers": (
        "prefixes and containers of training tools around weights",
        "read, or the place is named",
    ),
    "shards": (
        "weights in several files; one missing, outside, or unlike the index",
        "read whole, or refused",
    ),
    "no-weights": (
        "a pointer, page, archive, folder or pipe in the place of weights",
        "named as what it is",
    ),
    "permissions": (
        "files and folders that may not be read or written",
        "one message with the path, before the work, in every command",
    ),
    "umask": (
        "umask 077, 027, 002",
        "files and caches have the mode that it leaves",
    ),
    "output": (
        "names and results that a terminal or a disk cannot take",
        "escaped, or a message that has the result",
    ),
    "only-shown": (
        "curves or events that raise anything; stdout or stderr closed, full or unread",
        "the run and the validation end well, checkpoints first",
    ),
    "best-vanished": (
        "the best weights deleted during a run",
        "written again, the same to the bit",
    ),
    "settings-of-ranks": (
        "a mistake in the settings under mpirun",
        "said once, without MPI's pages, before MindSpore is loaded",
    ),
    "too-small": (
        "images too small for the network",
        "refused before compiling, with the smallest size; no files are left",
    ),
    "swapped-neighbours": (
        "neighbours swapped by rounding in an export of SkaNet",
        "accepted where they are as near; a wrong export is found",
    ),
    "missing-package": (
        "a package or compiler that is missing or fails without a word",
        "told before the work; the compiler's exit status",
    ),
    "look-alike": (
        "class names that only look alike, a key twice in YAML",
        "told apart; refused with the lines",
    ),
    "half-made": (
        "an environment that was half made (no python3-venv, Ctrl-C)",
        "made anew; nothing of others is removed",
    ),
    "compiling": (
        "Ctrl-C or SIGTERM while the network compiles",
        "ends within seconds, nothing is left",
    ),
    "mistakes": (
        "a misspelt command, option, recipe or model, a missing file",
        "told in half a second, with the nearest name",
    ),
    "mindcv-recipe": (
        "a recipe of MindCV with keys that have no meaning here",
        "all named at once; --ignore_unknown passes over them",
    ),
    "other-classes": (
        "weights of other classes, in another order, or without names",
        "a new classifier, or rows in the data's order, and logged; the rest is kept",
    ),
    "frozen": (
        "frozen parts that do not exist, or are all",
        "refused with those that exist; what is frozen does not move by a bit",
    ),
    "longer": (
        "a longer run whose schedule depends on its length",
        "refused with the way out; where it does not depend, the same to the bit",
    ),
    "plateau": (
        "a run that stops right after `plateau` lowered its learning rate; a damaged state",
        "resumes to the bit; an error",
    ),
    "device": (
        "an optimiser or batch norm that the device does not have",
        "told before the data is opened, with what to take",
    ),
    "lists": (
        "lists of images: wrong lines and labels, files outside of the data",
        "refused with the lines",
    ),
    "tar": (
        "hostile and damaged tar files",
        "refused; what is lost is named",
    ),
    "looked-through": (
        "a data set with unreadable and double images, classes that differ",
        "`check_data` names them; exit status 1 where training would fail",
    ),
    "one-rank": (
        "a validation image that one rank cannot read",
        "one error on all ranks",
    ),
    "several": (
        "a damaged checkpoint among several",
        "named in the table, the others evaluated, an error at the end",
    ),
    "wrong-onnx": (
        "an ONNX graph that computes something else",
        "not written",
    ),
    "half": (
        "float16 of weights that it cannot hold",
        "refused by name, nothing written",
    ),
    "int8": (
        "8 bits with a validation set of other classes",
        "refused with both lists",
    ),
    "uploads": (
        "uploads to the demo: no images, too large, of other pages; clients that stop",
        "refused or shown; the page goes on serving",
    ),
    "html": (
        "HTML in class names",
        "shown as text",
    ),
    "mask-files": (
        "masks in palettes, 16 or few bits, several channels, JPEG, WebP, floats, black and white",
        "read as their numbers, or refused with file and remedy before training",
    ),
    "mask-numbers": (
        "masks with numbers beyond the classes, shifted labels, another size than their image's, turned images",
        "refused with file, what was found and expected; never resized, never replaced",
    ),
    "pairs": (
        "masks missing, listed in another order, of equal names; names in any locale",
        "paired by name, or refused with the names",
    ),
    "whole-set": (
        "mean IoU over batches or ranks, absent classes, ignored pixels",
        "one table of the whole set; n/a where nothing counts",
    ),
    "ignored-batch": (
        "a batch of ignored pixels only; batch norms that see one value",
        "loss and gradients 0; refused with the reason",
    ),
    "any-image": (
        "images of any size, kind and order of colours, for segmenters and detectors",
        "converted, padded inside and cropped, or refused with the order that is expected",
    ),
    "corner-rule": (
        "a resize by another corner rule in an exported segmenter",
        "not written",
    ),
    "coco-ids": (
        "COCO's ids with holes, repeated, in another order, parents among the categories",
        "matched by name and id, mapped back; said",
    ),
    "coco-boxes": (
        "boxes without area, in corner form, beyond the border",
        "left out and counted, refused, or cut",
    ),
    "coco-masks": (
        "polygons of two points, run lengths as lists or text, damaged ones, no area or iscrowd",
        "all forms give the same mask; what is none is named; defaults",
    ),
    "coco-files": (
        "sizes that contradict the files, turned JPEGs, names of Windows, images that are not there",
        "filled in or refused; listed at the start",
    ),
    "coco-figures": (
        "no truth, no detections, ids from 0, false alarms on empty images, repeated images, more than 100 objects",
        "n/a, 0, 1.0, counted, once, and the limit is said",
    ),
    "many-objects": (
        "images without objects, thousands of objects",
        "finite losses; bounded memory, the same result",
    ),
    "dense-runs": (
        "runs of segmentation and detection killed, a batch that is NaN, two ranks",
        "weights equal to the bit, nothing changed, the figures of one rank",
    ),
    "detector-input": (
        "objects without an area, batches without objects, targets, masks or noise of another shape",
        "no object; finite losses; refused with found and expected",
    ),
    "detector-ranks": (
        "ranks with other numbers of objects; boxes in half precision",
        "as one process; boxes stay in float32",
    ),
    "analysis": (
        "analyses of networks, stages or classes that do not exist, classes without images, unreadable images",
        "named, with those that do; left out and said",
    ),
    "corruptions": (
        "a corruption, severity or class missing in ImageNet-C's layout; no package that makes them",
        "named before the work; what to install",
    ),
    "idx-files": (
        "an idx file that is cut, lies in its header, is damaged or belongs to another set",
        "an error before training with the file, what was found and expected; no memory on the header's word",
    ),
    "other-tasks": (
        "a setting that has no meaning for the task",
        "refused, with the tasks that it is for",
    ),
    "sequence": (
        "a wrong plan of a folded network; its weights changed; its gradient",
        "refused before anything runs; the new weights count; an error that says what to do",
    ),
    "first-import": (
        "any module of the package as the first import of a program",
        "it can be imported",
    ),
}


class Outcomes:
    """A pytest plugin that keeps the outcome of each test, and of which faults it is."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self.faults: dict[str, list[str]] = {key: [] for key in FAULTS}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("fault"):
                for key in mark.args:
                    self.faults[key].append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
        if report.failed:
            print(report.nodeid, report.longreprtext, sep="\n", file=sys.stderr)

    def reasons(self, key: str) -> list[str]:
        """Why the tests of a fault do not show what they must; none where they do."""
        if not self.faults[key]:
            return ["no test has this mark"]
        results = {test: self.tests.get(test, "did not run") for test in self.faults[key]}
        return [f"{test} {result}" for test, result in results.items() if result != "passed"]


def main() -> None:
    outcomes = Outcomes()
    words = ["-q", "-m", "fault", "--rootdir", str(ROOT), str(ROOT / "tests")]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*words, "--collect-only"], plugins=[outcomes])  # here: the workers below collect for themselves
        pytest.main([*words, "-n", "3", "--dist", "loadfile"], plugins=[outcomes])
    print("| | fault | what must happen | tests | outcome |\n|---|---|---|---|---|")
    failed = False
    for number, (key, (fault, expected)) in enumerate(FAULTS.items(), start=1):
        reasons = outcomes.reasons(key)
        failed |= bool(reasons)
        count = len(outcomes.faults[key])
        print(f"| {number} | {fault} | {expected} | {count} | {'NOT SO' if reasons else 'as it must'} |")
        print(*(f"{key}: {reason}\n" for reason in reasons), sep="", end="", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
