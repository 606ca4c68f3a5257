"""Checkpoints in a DeepSpeed loop without Headway: the program of docs/checkpoints.md, run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoint.catalog import committed, committed_steps
from orchestrator.checkpoint.verify import verify
from orchestrator.store import Store

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
RUN_TIMEOUT_S = 300


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    path = tmp_path / "train.py"
    path.write_text(code)
    return path


def run(program: Path, store: Store, *, num_steps: int, num_ranks: int = 2) -> dict[int, str]:
    """What it printed of each step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environ = {**os.environ, "STORE": store.uri, "NUM_STEPS": str(num_steps), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, str(program)], env=environ, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {int(step): rest for step, rest in re.findall(r"^step (\d+) (.+)$", done.stdout, flags=re.M)}


def losses(printed: dict[int, str]) -> dict[int, float]:
    return {step: float(text.split()[1]) for step, text in printed.items()}


def test_the_program_goes_on_where_it_was(program: Path, store: Store) -> None:
    unbroken = run(program, store.at(store.bucket, f"{store.prefix}unbroken"), num_steps=25)
    assert list(unbroken) == list(range(1, 26))

    first = run(program, store, num_steps=12)
    assert committed_steps(store, "my-run") == [10, 5]
    second = run(program, store, num_steps=20)
    assert list(second) == list(range(11, 21))
    # The dropout and the learning rate too, to the last printed digit.
    assert first | second == {step: unbroken[step] for step in range(1, 21)}

    program.write_text(program.read_text().replace('"stage": 3', '"stage": 1'))
    other_stage = run(program, store, num_steps=25)
    expected = {step: loss for step, loss in losses(unbroken).items() if step > 20}
    assert losses(other_stage) == pytest.approx(expected, rel=1e-4)

    other_size = run(program, store, num_steps=27, num_ranks=1)
    assert list(other_size) == [26, 27]
    for folder in committed(store, "my-run"):
        verify(store, folder)
