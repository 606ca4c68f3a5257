"""``headway show A B``: two runs, or two versions, side by side: what differs, and what each came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.commands.show_model import version_facts, version_number
from orchestrator.commands.text import cell, table
from orchestrator.errors import UsageError
from orchestrator.record.report import read_report, summary
from orchestrator.reporter import Result
from orchestrator.store import Store

Facts = dict[str, Any]
_FIGURES = (
    "state", "steps", "tokens", "loss", "eval_loss", "tokens_per_s", "mfu", "goodput", "wall_s", "gpu_hours",
    "cpu_hours", "attempts", "version",
)  # fmt: skip


def compare(store: Store, first: str, second: str, *, find_run: Callable[[Store, str], str]) -> Result:
    """
    Args:
        find_run: a run's id from itself or its name.

    Raises:
        UsageError: one of the two is no run and no version, or they are one of each.
    """
    if ("@" in first) != ("@" in second):
        raise UsageError(
            f"{first} and {second} are a version and a run.",
            next_step="Give two runs, or two versions: headway show MODEL@1 MODEL@2",
        )
    look = _version if "@" in first else lambda store, name: _run(store, find_run(store, name))
    one, other = look(store, first), look(store, second)
    parts = {part: side_by_side(one[part], other[part]) for part in one if part != "name"}
    facts = {"names": [one["name"], other["name"]], **parts}
    return facts, _text(facts)


def side_by_side(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every name of the two, with both values. Pure."""
    return {name: [one.get(name), other.get(name)] for name in dict.fromkeys([*one, *other])}


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``(dotted name, value)`` of every leaf. Pure."""
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _run(store: Store, run_id: str) -> Facts:
    report = read_report(store, run_id, now_s=time.time())
    found = summary(report)
    lineage = {each.name.lower(): each.value for each in report.lineage if each.name in ("Dataset", "Code", "Headway")}
    return {
        "name": run_id,
        "run file": {**dict(flat(report.run_file)), **lineage},
        "figures": {name: found[name] for name in _FIGURES},
        "seconds": found["seconds"],
        "evaluation": found["evaluation"],
    }


def _version(store: Store, name: str) -> Facts:
    facts = version_facts(store, name.partition("@")[0], version_number(name))
    left_out = ("files", "evaluation", "format", "nonce", "model", "number")
    return {
        "name": name,
        "came from": dict(flat({key: value for key, value in facts.items() if key not in left_out})),
        "evaluation": facts["evaluation"],
    }


def _text(facts: Facts) -> str:
    """What differs of where they came from; of figures all."""
    first, second = facts["names"]
    blocks = []
    for part, pairs in facts.items():
        if part == "names":
            continue
        is_origin = part in ("run file", "came from")
        rows = [
            {part: name, first: cell(one), f"{second} " if second == first else second: cell(other)}
            for name, (one, other) in pairs.items()
            if (one != other if is_origin else (one or other))
        ]
        blocks.append(table(rows) if rows else f"{part}: the same" if is_origin else f"{part}: none yet")
    return "\n\n".join(blocks)
