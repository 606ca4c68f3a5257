"""The tree that the docstring draws is the tree that there is, and errors survive a trip between processes."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest

from orchestrator import errors
from orchestrator.errors import HeadwayError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, HeadwayError)]


def _drawn() -> dict[str, tuple[str | None, int]]:
    """Name to (parent, exit code), as the docstring draws it."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:[│ ]   )*(?:[├└]── )?)(\w+) +(\d+)\b", line)
        if match:
            depth = len(match[1]) // 4
            del above[depth:]
            tree[match[2]] = (above[-1] if above else None, int(match[3]))
            above.append(match[2])
    return tree


def test_the_docstring_draws_every_class_under_its_parent_with_its_exit_code() -> None:
    actual = {
        kind.__name__: (kind.__base__.__name__ if kind is not HeadwayError and kind.__base__ else None, kind.exit_code)
        for kind in CLASSES
    }
    assert _drawn() == actual


@pytest.mark.parametrize("kind", CLASSES)
def test_pickling_keeps_everything(kind: type[HeadwayError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("It broke.", next_step="Mend it.")))  # noqa: S301
    assert type(copy) is kind
    assert (copy.message, copy.next_step, copy.exit_code) == ("It broke.", "Mend it.", kind.exit_code)
    assert str(copy) == "It broke. Mend it."


def test_an_error_raised_in_another_process_reads_the_same_here() -> None:
    program = (
        "import pickle, sys; from orchestrator.errors import GateRefused; "
        "sys.stdout.buffer.write(pickle.dumps(GateRefused('Loss 5.0 is above 4.0.', next_step='Train longer.')))"
    )
    sent = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    error = pickle.loads(sent)  # noqa: S301  what the line above wrote
    assert isinstance(error, errors.GateRefused)
    assert str(error) == "Loss 5.0 is above 4.0. Train longer."


def test_without_a_next_step_only_the_message_shows() -> None:
    assert str(HeadwayError("It broke.")) == "It broke."


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (errors.RunError, 1),
        (errors.SpecError, 2),
        (errors.EmptySource, 2),
        (errors.GateRefused, 3),
        (errors.NotFound, 4),
        (errors.TargetError, 4),
        (errors.TimedOut, 5),
        (errors.Interrupted, 130),
    ],
)
def test_exit_codes_that_scripts_rely_on(kind: type[HeadwayError], exit_code: int) -> None:
    assert kind.exit_code == exit_code
