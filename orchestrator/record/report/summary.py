"""A report's figures as one small JSON object: what ``headway report --json`` prints and lists of runs are made from.

Pure. It is stored as ``runs/<run-id>/summary.json`` when a run has ended, so that hundreds of runs are compared without
reading their events.
"""

from __future__ import annotations

from typing import Any

from orchestrator.record.report.model import Report

FORMAT = "headway/summary/1"


def summary(report: Report) -> dict[str, Any]:
    """Everything but curves, samples and the time line. Seconds, hours, tokens per second, nats per target."""
    goodput, against, gate, cost = report.goodput, report.against, report.gate, report.cost
    return {
        "format": FORMAT,
        "run_id": report.run_id,
        "state": report.state,
        "reason": report.reason,
        "started_s": report.started_s,
        "ended_s": report.ended_s,
        "attempts": report.num_attempts,
        "version": report.version or None,
        "steps": report.step,
        "total_steps": report.total_steps,
        "tokens": report.tokens,
        "tokens_per_s": report.tokens_per_s,
        "mfu": goodput.mfu,
        "loss": report.final_loss,
        "eval_loss": report.eval_loss,
        "evaluation": {each.name: each.mine for each in report.evaluation},
        "gate": {"passed": gate.passed, "reasons": list(gate.reasons)} if gate is not None else None,
        "against": _against(report) if against is not None else None,
        "wall_s": goodput.wall_s,
        "goodput": goodput.goodput,
        "seconds": {str(part): seconds for part, seconds in goodput.seconds.items()},
        "worker_seconds": {str(part): seconds for part, seconds in goodput.worker_seconds.items()},
        "gpu_hours": goodput.gpu_hours,
        "cpu_hours": goodput.cpu_hours,
        "cost": {"currency": cost.currency, "total": cost.total, "gpu": cost.gpu, "cpu": cost.cpu} if cost else None,
        "restarts": [
            {
                "time_s": each.time_s,
                "attempt": each.attempt,
                "group": each.group,
                "reason": each.reason,
                "lost_steps": each.lost_steps,
                "lost_s": each.lost_s,
            }
            for each in goodput.restarts
        ],
        "lineage": [{"name": each.name, "value": each.value, "note": each.note} for each in report.lineage],
    }


def _against(report: Report) -> dict[str, Any]:
    against = report.against
    assert against is not None
    found = against.interval
    return {
        "version": against.name,
        "evaluation": {each.name: each.theirs for each in report.evaluation if each.theirs is not None},
        "same_samples": against.loss is not None,
        "difference": found.difference if found else None,
        "interval": [found.low, found.high] if found else None,
    }
