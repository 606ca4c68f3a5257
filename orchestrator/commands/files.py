"""``headway init`` and ``headway schema``."""

from __future__ import annotations

import json
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.reporter import Result
from orchestrator.spec import json_schema
from orchestrator.starter import STARTER


def init(path: Path) -> Result:
    """Write the starter run file; an existing file is left alone."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(STARTER)
    except FileExistsError as e:
        raise UsageError(f"{path} exists already.", next_step="Name another file: headway init other.yaml") from e
    except OSError as e:
        raise UsageError(f"{path} cannot be written: {e.strerror}.") from e
    return {"path": str(path)}, f"Wrote {path}. Edit it, then: headway plan {path}"


def schema() -> Result:
    document = json_schema()
    return document, json.dumps(document, indent=2)
