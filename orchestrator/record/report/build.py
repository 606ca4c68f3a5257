"""A run's record as a report. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.record.cost import Cost
from orchestrator.record.goodput import Goodput
from orchestrator.record.model import RunRecord, Submission
from orchestrator.record.report import time_line, words
from orchestrator.record.report.curves import loss_curve, number, throughput_curve
from orchestrator.record.report.model import Against, Facts, Gate, Lineage, Measured, Report, Sample, State
from orchestrator.release.gate import BITS_PER_BYTE

MAX_SAMPLES = 8
MAX_SUBMISSIONS = 8
MAX_SAMPLE_CHARACTERS = 2000
_OF_THE_SPLIT = ("num_targets", "unigram_loss", "pretrained_loss")  # they say nothing of the other version


def build(record: RunRecord, goodput: Goodput, facts: Facts | None = None, *, cost: Cost | None = None) -> Report:
    """The report of a run, however far it has come.

    Args:
        facts: what the store knows beside the record.
        cost: None where prices are not known.
    """
    facts = facts or Facts()
    spec, outcome = record.spec.get("spec", {}), record.outcome or {}
    told: dict[str, Any] = outcome.get("facts", {})
    state, reason = _state(record)
    started_s = min((attempt.claimed_s for attempt in record.attempts), default=None)
    loss = loss_curve(record)
    figures = _figures(record)
    steps = max(record.events_of("step"), key=lambda event: int(event["step"]), default={})
    training: Mapping[str, Any] = next(reversed([*record.events_of("training")]), {})
    return Report(
        run_id=record.run_id,
        name=str(spec.get("name", record.run_id)),
        task=str(spec.get("task", "")),
        state=state,
        reason=reason,
        made_s=record.read_s,
        started_s=goodput.start_s if started_s is not None else None,
        ended_s=number(outcome.get("ended_s")),
        version=str(told.get("version") or ""),
        step=int(told.get("steps") or steps.get("step", 0)),
        total_steps=training.get("total_steps"),
        tokens=told.get("tokens") or steps.get("tokens"),
        tokens_per_s=goodput.tokens_per_s,
        final_loss=number(told.get("final_loss")) or loss.last,
        eval_loss=figures.get("loss") or (loss.looks[-1][1] if loss.looks else None),
        goodput=goodput,
        cost=cost,
        loss=loss,
        throughput=throughput_curve(record, start_s=goodput.start_s),
        evaluation=tuple(_measured(figures, facts, spec.get("gate") or {})),
        against=facts.against,
        gate=_gate(record),
        samples=tuple(_samples(record)),
        rows=time_line.rows(record, goodput),
        num_attempts=len(record.attempts),
        incidents=time_line.incidents(record, goodput),
        num_checkpoints=facts.num_checkpoints,
        lineage=tuple(_lineage(record, facts)),
        run_file=_without_values(spec),
    )


def _state(record: RunRecord) -> tuple[State, str]:
    """How the run stands, and why."""
    if record.outcome is not None:
        return record.outcome["state"], str(record.outcome.get("reason", ""))
    if not record.attempts:
        return "waiting", ""
    newest = record.attempts[-1]
    if newest.state:
        return newest.state, newest.reason  # type: ignore[return-value]
    return "in flight", ""


def _figures(record: RunRecord) -> dict[str, float]:
    """Of the exported model's evaluation; empty while there is none."""
    told = (record.outcome or {}).get("facts", {}).get("evaluation")
    noted = next(reversed([*record.events_of("evaluation")]), {})
    found = told or {name: value for name, value in noted.items() if name not in ("time_s", "kind", "attempt")}
    return {name: value for name in found if (value := number(found[name])) is not None}


def _measured(figures: Mapping[str, float], facts: Facts, gate: Mapping[str, Any]) -> Iterator[Measured]:
    """Each figure beside that of the serving version and what the gate asks for. Counts compare to nothing."""
    most = {**(gate.get("max") or {}), **({"loss": gate["max_loss"]} if gate.get("max_loss") is not None else {})}
    least = gate.get("min") or {}
    theirs = _comparable(facts.against)
    for name, mine in figures.items():
        limits = [*([f"≤ {most[name]:g}"] if name in most else ()), *([f"≥ {least[name]:g}"] if name in least else ())]
        met = [*([mine <= most[name]] if name in most else ()), *([mine >= least[name]] if name in least else ())]
        yield Measured(
            name=name,
            mine=mine,
            theirs=number(theirs.get(name)),
            limit=" and ".join(limits),
            met=all(met) if met else None,
        )


def _comparable(against: Against | None) -> dict[str, Any]:
    """The other version's figures that may stand beside this run's: of other held-out texts, only bits per byte."""
    if against is None:
        return {}
    found = {
        name: value
        for name, value in against.figures.items()
        if name not in _OF_THE_SPLIT and (against.same_split or name == BITS_PER_BYTE)
    }
    return {**found, **({"loss": against.loss} if against.loss is not None else {})}


def _gate(record: RunRecord) -> Gate | None:
    told = (record.outcome or {}).get("facts", {}).get("gate")
    found = told or next(reversed([*record.events_of("gate")]), None)
    return None if found is None else Gate(passed=bool(found["passed"]), reasons=tuple(map(str, found["reasons"])))


def _samples(record: RunRecord) -> Iterator[Sample]:
    event = next(reversed([*record.events_of("samples")]), None)
    for found in (event or {}).get("samples", ())[:MAX_SAMPLES]:
        is_class = "predicted" in found
        yield Sample(
            given=_cut(found.get("text" if is_class else "prompt", "")),
            answer=_cut(found.get("predicted" if is_class else "completion", "")),
            expected=_cut(found.get("expected", "")),
            is_class=is_class,
        )


def _cut(text: object) -> str:
    whole = str(text)
    return whole if len(whole) <= MAX_SAMPLE_CHARACTERS else f"{whole[:MAX_SAMPLE_CHARACTERS]} …"


def _lineage(record: RunRecord, facts: Facts) -> Iterator[Lineage]:
    """From what was released back to who sent it."""
    spec, told = record.spec, (record.outcome or {}).get("facts", {})
    if told.get("version"):
        yield Lineage(name="Version", value=told["version"], note=f"headway show {told['version']}")
    if told.get("checkpoint"):
        yield Lineage(name="Checkpoint", value=told["checkpoint"])
    if told.get("export"):
        yield Lineage(name="Export", value=told["export"])
    fingerprint = _fingerprint(record)
    if fingerprint:
        yield Lineage(name="Dataset", value=fingerprint, note=_dataset_note(facts.dataset))
    if facts.dataset and facts.dataset.get("source"):
        yield Lineage(name="Source", value=facts.dataset["source"], note=_source_note(facts.dataset))
    base = told.get("base") or spec.get("base_fingerprint")
    if base:
        yield Lineage(name="Base model", value=base)
    yield Lineage(name="Code", value=spec.get("code_digest") or "a task of Headway's own")
    yield Lineage(name="Headway", value=spec.get("headway", "unknown"))
    for submission in record.submissions[-MAX_SUBMISSIONS:]:
        yield _submitted(submission)


def _submitted(submission: Submission) -> Lineage:
    """Who sent it where and when, and from which CI job."""
    facts = submission.facts
    ci = facts.get("ci") or {}
    told = [f"{name} {ci[name]}" for name in ("repository", "workflow", "commit", "actor") if ci.get(name)]
    when = f"{words.moment(submission.submitted_s)}, to {facts.get('target', 'a target')}"
    return Lineage(
        name="Submitted",
        value=str(facts.get("by") or submission.submission_id),
        note="; ".join([when, *([f"{ci.get('system', 'CI')}: {', '.join(told)}"] if ci else [])]),
        link=str(ci.get("url", "")),
    )


def _fingerprint(record: RunRecord) -> str:
    told = (record.outcome or {}).get("facts", {}).get("dataset")
    noted = next(record.events_of("dataset"), {}).get("fingerprint")
    return str(told or noted or record.spec.get("dataset_fingerprint", ""))


def _dataset_note(dataset: Mapping[str, Any] | None) -> str:
    if not dataset:
        return ""
    return (
        f"{words.count(dataset['train_tokens'])} tokens to train on, {words.count(dataset['eval_tokens'])} held out, "
        f"vocabulary of {dataset['vocabulary']:,}"
    )


def _source_note(dataset: Mapping[str, Any]) -> str:
    files = dataset.get("num_files")
    return f"{words.times(files, 'file')}, {words.count(dataset.get('num_bytes') or 0)} bytes" if files else ""


def _without_values(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The run file without values that may be secret: a report is passed on."""
    hidden: dict[str, Any] = {}
    if spec.get("env"):
        hidden["env"] = dict.fromkeys(spec["env"], "…")
    if (spec.get("notify") or {}).get("webhook"):
        hidden["notify"] = {**spec["notify"], "webhook": "…"}
    return {**spec, **hidden}
