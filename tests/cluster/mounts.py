"""Taking mounts away."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.shell import run


def unmount_under(directory: Path) -> None:
    """Take away every mount under a folder, the innermost first."""
    inside = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split()[4].encode().decode("unicode_escape")  # a space is written as \040
        if Path(place).is_relative_to(directory):
            inside.append(place)
    for place in sorted(inside, key=len, reverse=True):
        run(["umount", "--lazy", place])
