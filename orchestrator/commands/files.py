"""``headway init`` and ``headway schema``."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.errors import EnvironmentUnusable, UsageError
from orchestrator.reporter import Result
from orchestrator.spec import json_schema
from orchestrator.starter import STARTER


def init(path: Path) -> Result:
    """Write the starter run file; an existing file is left alone."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as e:
        raise UsageError(f"{path} exists already.", next_step="Name another file: headway init other.yaml") from e
    except OSError as e:
        raise UsageError(
            f"{path} cannot be written: {e.strerror}.", next_step="Name a file in a folder of yours."
        ) from e
    try:
        with file:
            file.write(STARTER)
    except OSError as e:
        path.unlink()  # a half of it would stand in the way of the next try
        raise EnvironmentUnusable(f"{path} cannot be written: {e.strerror}.", next_step="Free some space there.") from e
    return {"path": str(path)}, f"Wrote {path}. Edit it, then: headway plan {path}"


def schema() -> Result:
    document = json_schema()
    return document, json.dumps(document, indent=2)
