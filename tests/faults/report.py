"""Injects the faults and prints the table of outcomes: `python tests/faults/report.py` (ten minutes on two cores)."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What is injected, what must happen, and words in the names of the tests that show it.
FAULTS = (
    ("`kill -9` at 20 random moments of a run", "weights equal the uninterrupted run's to the bit", "killed_at_random"),
    ("`kill -9` while a checkpoint is written, 50 times", "the newest readable, nothing stray", "while_a_checkpoint"),
    ("newest checkpoint truncated or a bit flipped, 100 ways", "detected, named, the one before it taken",
     "every_damage damaged_newest no_checkpoint_can"),
    ("no room for a checkpoint", "the earlier one intact, message, exit code 1", "no_room"),
    ("no room for metrics, log, events, curves", "an error for the first, a warning for the others",
     "metrics_that_cannot goes_on_without"),
    ("SIGTERM, SIGINT, SIGUSR1 to mpirun", "update finished, checkpoint, exit code 75, goes on",
     "signal_ends signal_to_mpirun whole_story"),
    ("a rank or mpirun killed, a rank raising", "all gone within 60 s, traceback in the log",
     "killed_rank rank_that_fails one_rank_"),
    ("a batch whose loss is NaN or infinite", "nothing changes; counted; too many end the run",
     "without_a_finite too_many_skipped"),
    ("overflow under dynamic loss scaling", "scale halves, average and schedule stay",
     "overflow_halves scale_doubles accumulation_is"),
    ("damaged and unusual images", "replaced, counted, named; validation fails or leaves out",
     "damaged_images does_not_decode allowed_share fails_or_leaves"),
    ("the same seed twice, other numbers of workers", "the same losses for 52 steps", "same_seed"),
    ("evaluation on 2 and 3 ranks that do not divide the set", "the same counts as on one", "several_ranks"),
    ("hostile files", "refused before training, nothing executed, memory bounded",
     "hostile_file yaml_that refuses_before another_head"),
    ("resume with other settings or ranks", "refused with the difference, or sound and said",
     "other_settings another_number_of_ranks"),
    ("folders unwritable, vanishing, or in use", "clear errors, nothing overwritten",
     "folder_that_cannot lock_that_cannot vanishes second_run"),
    ("log and metrics after restarts", "one record, nothing lost or doubled",
     "killed_at_random half_a_row events_are_the_rows log_has_what"),
)  # fmt: skip
PATHS = (
    "tests/faults",
    "tests/test_distributed.py",
    "tests/test_commands.py::test_validation_on_several_ranks_is_the_same",
)


class Outcomes:
    """A pytest plugin that keeps each test's outcome."""

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.tests[report.nodeid] = report.outcome
        if report.failed:
            print(report.nodeid, report.longreprtext, sep="\n", file=sys.stderr)


def shown(words: str, tests: dict[str, str]) -> tuple[int, list[str]]:
    """How many tests (name -> outcome) have one of the words in their name, and why they do not show what they must."""
    found = {test: result for test, result in tests.items() if any(word in test for word in words.split())}
    missing = [f"no test is called {word}" for word in words.split() if not any(word in test for test in found)]
    return len(found), missing + [f"{test} {result}" for test, result in found.items() if result != "passed"]


def main() -> None:
    outcomes = Outcomes()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "--rootdir", str(ROOT), *(str(ROOT / path) for path in PATHS)], plugins=[outcomes])
    print("| | fault | what must happen | tests | outcome |\n|---|---|---|---|---|")
    failed = False
    for number, (fault, outcome, words) in enumerate(FAULTS, start=1):
        count, reasons = shown(words, outcomes.tests)
        failed |= bool(reasons)
        print(f"| {number} | {fault} | {outcome} | {count} | {'NOT SO' if reasons else 'as it must'} |")
        print(*(f"fault {number}: {reason}\n" for reason in reasons), sep="", end="", file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
