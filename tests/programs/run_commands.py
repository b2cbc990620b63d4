"""Runs commands of mindska one after another in this process.

On standard input: JSON of [[command, words, file for its output], ...]; a word with * stands for files, as in a shell.
On standard output: a line of JSON for each, [exit status, what it printed, seconds].
"""

import contextlib
import io
import json
import sys
import time
import traceback
from pathlib import Path

from mindska.commands import main

out = sys.stdout
for command, words, file in json.load(sys.stdin):
    words = [each for word in words for each in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    begun, printed, code = time.perf_counter(), io.StringIO(), 0
    errors = io.StringIO() if file else printed
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            main([command, *words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            print(ended.code, file=errors)
        except BaseException:
            code = 1
            traceback.print_exc(file=errors)
    if file:
        with open(file, "w") as target:  # noqa: PTH123
            target.write(printed.getvalue())
    print(
        json.dumps([code or 0, errors.getvalue() if file else printed.getvalue(), time.perf_counter() - begun]),
        file=out,
        flush=True,
    )
