"""Runs a program and says what it took: ``python -m tests.bench.measured FIGURES MODULE:FUNCTION ARGUMENTS…``.

FIGURES is the file that the peak memory is written to, in kB. It is Linux's VmHWM of this process: the most that was
ever resident, with the interpreter, imports and mapped files. The parent's own memory, which a child's ru_maxrss may
start from, is not in it.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    wall_s: float
    """From the start of the interpreter to its end."""
    peak_bytes: int


def run(program: str, *arguments: str) -> Cost:
    """Run ``program``, as ``module:function``, in a fresh interpreter that imports nothing else of weight.

    Raises:
        CalledProcessError: it failed; its output was shown on stderr.
    """
    with tempfile.NamedTemporaryFile("r") as figures:
        command = [sys.executable, "-m", "tests.bench.measured", figures.name, program, *arguments]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        return Cost(time.perf_counter() - started, int(figures.read()) * 1024)


def bare_bytes() -> int:
    """Peak memory of an interpreter that does nothing."""
    program = "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    out = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(out.split()[1]) * 1024


def _peak_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    figures_file, program = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    try:
        pkgutil.resolve_name(program)()
    except SystemExit as e:
        if e.code:
            raise
    Path(figures_file).write_text(str(_peak_kb()))
