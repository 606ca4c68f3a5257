"""Runs ``headway`` as a person does, and holds what it says to what every command promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from orchestrator import cli

BIN = Path(sys.executable).parent
_SETTINGS = ("AWS_", "HEADWAY_", "RAY_")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command came to."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def assert_done(self) -> Said:
        assert self.code == 0, f"{self.arguments} exited {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self

    def assert_refused(self, code: int, *words: str) -> Said:
        """It ended in one message with a next step, which says all of ``words``, and no traceback."""
        assert self.code == code, f"{self.arguments} exited {self.code}, not {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        messages = [line for line in self.err.splitlines() if line.startswith("headway: ")]
        assert len(messages) == 1, self.err
        message = self.err[self.err.index("headway: ") :]
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        if "--json" in self.arguments:
            assert self.json["exit_code"] == code
            assert self.json["error"] in message
            assert self.json["next_step"] in message
        else:
            assert self.out == ""
        return self

    def assert_next_step(self, *words: str) -> Said:
        _, _, step = self.err.partition("  → ")
        assert step, self.err
        for word in words:
            assert word in step, f"{word!r} is not in {step!r}"
        return self


def in_process(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command line in this process, which sees what a test has set in its environment."""

    def call(*arguments: str) -> Said:
        capsys.readouterr()
        code = cli.run(list(arguments))
        out, err = capsys.readouterr()
        return Said(arguments=arguments, code=code, out=out, err=err)

    return call


def environment(**settings: str) -> dict[str, str]:
    """A child's environment: this one's without any setting of S3, Ray or Headway, and with the programs beside it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{kept.get('PATH', os.defpath)}", **settings}


def start(
    *arguments: str | Path,
    directory: Path,
    settings: dict[str, str] | None = None,
    out: int | IO[str] = subprocess.PIPE,
    err: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "headway"), *map(str, arguments)],
        cwd=directory,
        env=environment(**(settings or {})),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        text=True,
        # A fork of this process, which takes 0.15 s once it has imported torch: only where it is needed.
        preexec_fn=_heed_ctrl_c if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else None,
    )


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background is born ignoring it


def finish(child: subprocess.Popen[str], *, timeout_s: float = 60.0) -> Said:
    """Wait for a started command; one that takes longer is killed and fails the test."""
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"{child.args} was not done after {timeout_s:.0f} s:\n{out}\n{err}") from None
    arguments = tuple(child.args[1:]) if isinstance(child.args, list) else ()
    return Said(arguments=arguments, code=child.returncode, out=out, err=err)


def headway(
    *arguments: str | Path, directory: Path, settings: dict[str, str] | None = None, timeout_s: float = 60.0
) -> Said:
    """Run one command to its end."""
    return finish(start(*arguments, directory=directory, settings=settings), timeout_s=timeout_s)
