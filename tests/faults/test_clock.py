"""A writer whose clock is wrong: it saves right or says what to do, and retention goes by the server's clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoint.catalog import committed_steps, find
from orchestrator.checkpoint.retention import pin
from orchestrator.checkpoint.verify import verify
from orchestrator.store import Store
from tests.faults.ranks import num_wrong_in_store
from tests.unit.checkpoint.saving import RUN, save
from tests.unit.checkpoint.saving import new_group as claimed

TWO_DAYS_S = 2 * 86400
SOURCE = Path(__file__).with_name("shifted_clock.c")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "shifted_clock.so"
    # The compiler that DeepSpeed's own op needs, so it is there.
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)], check=True)
    return library


def save_with_clock(shim: Path, store: Store, *, shift_s: int, step: int, keep: int) -> dict[str, Any]:
    environ = {**os.environ, "LD_PRELOAD": str(shim), "CLOCK_SHIFT_S": str(shift_s)}
    command = [sys.executable, "-m", "tests.faults.lone_save", store.uri, str(step), str(keep)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(done.stdout)
    assert abs(said["clock_s"] - time.time() - shift_s) < 60
    return said


@pytest.mark.parametrize(
    ("shift_s", "pinned_s", "kept"),
    [(600, 300.0, [3, 1]), pytest.param(-600, 0.0, [3], marks=pytest.mark.full)],
)
def test_retention_goes_by_the_servers_clock(
    shim: Path, store: Store, shift_s: int, pinned_s: float, kept: list[int]
) -> None:
    """A reader's pin holds although it ended long ago by the writer's clock, and ends although it has not begun."""
    group = claimed(store)
    save(store, group, 1, keep=3)
    pin(store, RUN, 1, "reader", reason="it is read", for_s=pinned_s)
    save(store, group, 2, keep=3)
    assert save_with_clock(shim, store, shift_s=shift_s, step=3, keep=1)["error"] == ""
    assert committed_steps(store, RUN) == kept
    assert num_wrong_in_store(store, find(store, RUN, 3)) == 0


@pytest.mark.full
@pytest.mark.parametrize("shift_s", [TWO_DAYS_S, -TWO_DAYS_S])
def test_a_clock_that_is_days_off_is_named(shim: Path, store: Store, shift_s: int) -> None:
    """The server refuses what was signed more than a quarter of an hour away from its own time."""
    group = claimed(store)
    save(store, group, 1)
    save(store, group, 2)
    error = save_with_clock(shim, store, shift_s=shift_s, step=3, keep=1)["error"]
    assert "RequestTimeTooSkewed" in error
    assert "Set this machine's clock right" in error
    assert committed_steps(store, RUN) == [2, 1]
    for step in (2, 1):
        verify(store, find(store, RUN, step))
