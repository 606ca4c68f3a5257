"""The folder on a node's disk where what came from the store is kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "HEADWAY_CACHE"


def cache_directory() -> Path:
    """``HEADWAY_CACHE``, else ``~/.cache/headway``; shared by all processes of the node. It need not be there yet."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "headway")
