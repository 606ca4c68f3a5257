"""A file system of a few bytes, for what happens when it is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.needed import lacks


@contextmanager
def small_disk(path: Path, num_bytes: int) -> Iterator[None]:
    """Mount one over ``path``. Skips the test, except in CI, where mounting is not permitted: only root may, and not in
    every container, and a full disk that is not real would show nothing."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if mounted.returncode != 0:
        lacks("the right to mount a small file system", mounted.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)
