"""A report as Markdown, for the summary of a CI job. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from orchestrator.record.report import judged, words
from orchestrator.record.report.bars import shares
from orchestrator.record.report.markup import plain
from orchestrator.record.report.model import Incident, Report, Sample
from orchestrator.record.report.page import IN_WORDS, SIGNS, key_figures

MAX_INCIDENTS = 20
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|!~&$@])")


def to_markdown(report: Report) -> str:
    """GitHub's Markdown, some kilobytes of it. What came from outside cannot be anything but text."""
    parts = [
        f"## {SIGNS[report.state]} {IN_WORDS[report.state]}: {safe(report.run_id)}",
        f"> {safe(report.reason)}" if report.reason else "",
        f"Released as **{safe(report.version)}**." if report.version else "",
        _table(("", ""), ((name, f"**{value}** {note}".strip()) for name, value, note in key_figures(report))),
        *_evaluation(report),
        *_goodput(report),
        *_incidents(report),
        *_samples(report.samples),
        "### Lineage",
        _table(
            ("", ""), ((each.name, safe("; ".join(filter(None, (each.value, each.note))))) for each in report.lineage)
        ),
        f"Made by Headway from the run's record, {words.moment(report.made_s)}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def safe(text: str) -> str:
    """Text on one line that is no markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain(text).split()))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _evaluation(report: Report) -> list[str]:
    if not report.evaluation:
        return []
    rows = ([safe(cell) for cell in row] for row in judged.cells(report))
    gate = report.gate
    decision = "" if gate is None else "Gate passed." if gate.passed else "**Gate refused:**"
    return [
        "### Evaluation",
        _table([safe(name) for name in judged.head(report)], rows),
        safe(judged.in_words(report.against)) if report.against is not None else "",
        decision,
        "\n".join(f"- {safe(reason)}" for reason in gate.reasons) if gate is not None else "",
    ]


def _goodput(report: Report) -> list[str]:
    goodput, found = report.goodput, shares(report.goodput)
    if not found:
        return []
    head = ("went to", "share of worker time", "wall time")
    rows = ((part, words.share(length), words.duration(goodput.seconds[part])) for part, length in found.items())
    return [f"### Where the time went: goodput {words.share(goodput.goodput)}", _table(head, rows)]


def _incidents(report: Report) -> list[str]:
    if not report.incidents:
        return []
    shown = report.incidents[-MAX_INCIDENTS:]
    left_out = len(report.incidents) - len(shown)
    lines = [_incident(each, report.goodput.start_s) for each in shown]
    return ["### Restarts", f"The last {len(shown)} of {len(report.incidents)}." if left_out else "", "\n".join(lines)]


def _incident(each: Incident, start_s: float) -> str:
    cost = f" ({each.cost})" if each.cost else ""
    reason = f": {safe(each.reason)}" if each.reason else ""
    return f"- after {words.duration(max(0.0, each.time_s - start_s))}: **{safe(each.title)}**{cost}{reason}"


def _samples(samples: Sequence[Sample]) -> list[str]:
    if not samples:
        return []
    if samples[0].is_class:
        rows = ((safe(each.given), safe(each.answer), safe(each.expected)) for each in samples)
        return ["### Samples", _table(("text", "model says", "expected"), rows)]
    found = samples[0]
    return ["### Sample", _fenced(f"{found.given}▍{found.answer}"), "Behind ▍ stands what the model wrote."]


def _fenced(text: str) -> str:
    """A block that nothing inside can end."""
    text = plain(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
