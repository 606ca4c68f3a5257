"""The results of a sweep as JSON, and the table of docs/reliability.md from it.

python -m tests.faults.report results.json [more.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.sweep import Result

HARMS = ("torn_accepted", "committed_lost", "wrong_bytes", "overwritten")
HEADINGS = (
    "fault",
    "injections",
    "committed",
    "reported as failed",
    "no answer",
    "did not end",
    *(h.replace("_", " ") for h in HARMS),
)


def write_results(path: Path, seed: int, results: Iterable[Result]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"seed": seed, "injections": [_entry(result) for result in results]}
    path.write_text(json.dumps(document, indent=1))


def _entry(result: Result) -> dict[str, Any]:
    return {
        "kind": result.scenario.kind,
        "name": result.scenario.name,
        "fault": str(result.scenario.fault),
        "struck": result.struck,
        "saved": result.saved,
        "is_there": result.is_there,
        "resumed_step": result.resumed_step,
        "did_not_end": result.did_not_end,
        **asdict(result.verdict),
        "seconds": round(result.seconds, 2),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each kind of fault, and the sum. Pure."""
    kinds = list(dict.fromkeys(one["kind"] for one in found))
    rows = [_row(kind, [one for one in found if one["kind"] == kind]) for kind in kinds]
    lines = [HEADINGS, ("---", *["---:"] * (len(HEADINGS) - 1)), *rows, _row("**all**", found)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _row(kind: str, found: list[dict[str, Any]]) -> tuple[Any, ...]:
    committed = sum(one["is_there"] for one in found)
    silent = sum(not one["is_there"] and one["saved"] == "no answer" for one in found)
    broken = sum(bool(one["did_not_end"]) for one in found)
    failed = len(found) - committed - silent - broken
    return (kind, len(found), committed, failed, silent, broken, *(sum(one[harm] for one in found) for harm in HARMS))


if __name__ == "__main__":
    documents = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    injections = [one for document in documents for one in document["injections"]]
    print(table(injections))
    seeds = sorted({document["seed"] for document in documents})
    print(f"\nSeeds {seeds}; {sum(one['seconds'] for one in injections):.0f} s.")
