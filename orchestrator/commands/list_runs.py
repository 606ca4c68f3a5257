"""``headway list runs``: all runs beside each other.

A run that has ended left its figures in ``summary.json``, which is one small read. Of the others the events are not
read, as they may be many: their steps are those of the newest checkpoint.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.commands.show import state_of
from orchestrator.commands.text import Rows
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.record.report import words
from orchestrator.release.outcome import read_outcome
from orchestrator.store import Store, layout
from orchestrator.store.attempts import read_attempt

_PARALLEL = 16
_FIGURES = ("attempts", "steps", "loss", "eval_loss", "tokens_per_s", "goodput", "gpu_hours", "wall_s", "started_s")


def list_runs(store: Store) -> Rows:
    """The runs, those that began last first."""
    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="runs") as pool:
        rows = list(pool.map(lambda run_id: _row(store, run_id), store.list_folders("runs/")))
    return sorted(rows, key=lambda row: row["started_s"] or float("inf"), reverse=True)


def run_words(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people. Pure."""
    goodput, wall_s, started_s = row["goodput"], row["wall_s"], row["started_s"]
    return {
        "run": row["run"],
        "state": row["state"],
        "steps": row["steps"],
        "loss": row["loss"],
        "eval_loss": row["eval_loss"],
        "tokens/s": words.count(row["tokens_per_s"]) if row["tokens_per_s"] else None,
        "goodput": words.share(goodput) if goodput is not None else None,
        "gpu_hours": words.hours(row["gpu_hours"]) if row["gpu_hours"] else None,
        "duration": words.duration(wall_s) if wall_s is not None else None,
        "version": row["version"],
        "started": words.moment(started_s) if started_s is not None else None,
    }


def _row(store: Store, run_id: str) -> dict[str, Any]:
    """One that is damaged is a row that says so: it hides no other run."""
    for look in (_summary, _without_summary):
        with suppress(NotFound, IntegrityError, KeyError, TypeError, ValueError, AttributeError):
            found = look(store, run_id)
            figures = {name: found.get(name) for name in (*_FIGURES, "version")}
            return {"run": run_id, "state": found["state"], **figures}
    return {"run": run_id, "state": "damaged", **dict.fromkeys((*_FIGURES, "version"))}


def _summary(store: Store, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = store.get_json(layout.summary(run_id))
    return found


def _without_summary(store: Store, run_id: str) -> dict[str, Any]:
    """The same of a run that has not ended, or ended before there were summaries."""
    state, outcome = state_of(store, run_id), read_outcome(store, run_id)
    facts = outcome.facts if outcome else {}
    started_s = float(read_attempt(store, run_id, 1)["claimed_s"]) if state["attempts"] else None
    return {
        "state": state["state"],
        "attempts": state["attempts"],
        "steps": facts.get("steps") or next(iter(committed_steps(store, run_id)), None),
        "loss": facts.get("final_loss"),
        "eval_loss": facts.get("evaluation", {}).get("loss"),
        "version": facts.get("version"),
        "started_s": started_s,
        "wall_s": outcome.ended_s - started_s if outcome and started_s is not None else None,
    }
