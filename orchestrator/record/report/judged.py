"""How good the model is: its figures beside those of the version to beat, the gate's decision, and samples. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.record.report import words
from orchestrator.record.report.markup import Html, join, table, tag
from orchestrator.record.report.model import Against, Gate, Report, Sample
from orchestrator.release.bootstrap import CONFIDENCE

LABELS = {
    "loss": "Loss (nats per target)",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "accuracy": "Accuracy",
    "f1": "F1 (macro)",
    "num_targets": "Targets evaluated",
    "unigram_loss": "Loss of a unigram model",
    "pretrained_loss": "Loss before training",
}


def label(name: str) -> str:
    return LABELS.get(name, name)


def head(report: Report) -> list[str]:
    """The columns of the evaluation's table: those that have something to say."""
    beside = [report.against.name, "Difference"] if report.against is not None else []
    return ["Figure", "This run", *beside, *(["Gate"] if any(row.limit for row in report.evaluation) else [])]


def cells(report: Report) -> list[list[str]]:
    """The evaluation's table as text."""
    columns = head(report)
    rows = []
    for each in report.evaluation:
        row = [label(each.name), words.figure(each.mine)]
        if report.against is not None:
            row += (
                ["–", ""] if each.theirs is None else [words.figure(each.theirs), words.signed(each.mine - each.theirs)]
            )
        if "Gate" in columns:
            row.append(f"{each.limit} {'✓ met' if each.met else '✕ missed'}" if each.limit else "")
        rows.append(row)
    return rows


def in_words(against: Against) -> str:
    """How this run compares with the version to beat."""
    if against.loss is None:
        where = "on the same held-out split" if against.same_split else "on its own held-out split"
        return f"{against.name} is compared by its figures on record, {where}."
    if against.interval is None:
        return "Both were evaluated on the same held-out samples, too few to say how sure the difference in loss is."
    found = against.interval
    return (
        f"Both were evaluated on the same held-out samples: the loss differs by {words.signed(found.difference)}, "
        f"and with {CONFIDENCE:.0%} confidence by between {words.signed(found.low)} and {words.signed(found.high)}."
    )


def evaluation(report: Report) -> Html:
    if not report.evaluation:
        return tag("p", "No evaluation: the run has not come that far.", class_="nothing")
    return join(
        [
            _decision(report.gate) if report.gate is not None else None,
            table(head(report), cells(report), caption="The exported model's figures"),
            tag("p", in_words(report.against), class_="quiet") if report.against is not None else None,
            _interval(report.against) if report.against is not None else None,
        ]
    )


def _decision(gate: Gate) -> Html:
    kind, sign, text = ("done", "✓", "Gate passed") if gate.passed else ("refused", "✕", "Gate refused")
    badge = tag("span", tag("span", sign, aria_hidden="true"), " ", text, class_=f"badge {kind}")
    reasons = tag("ul", *(tag("li", reason) for reason in gate.reasons)) if gate.reasons else None
    return tag("div", badge, reasons, class_="decision")


def _interval(against: Against) -> Html | None:
    """The difference in loss as a line with its interval, beside zero."""
    found = against.interval
    if found is None:
        return None
    reach = 1.15 * max(abs(found.low), abs(found.high), 1e-12)

    def place(value: float) -> float:
        return 50 + 50 * value / reach

    low, high = place(found.low), place(found.high)
    return tag(
        "div",
        tag("span", "better", class_="side"),
        tag(
            "div",
            tag("i", class_="zero", style="left:50%"),
            tag("i", class_="range", style=f"left:{low:.2f}%;width:{high - low:.2f}%"),
            tag("i", class_="at", style=f"left:{place(found.difference):.2f}%"),
            class_="scale",
        ),
        tag("span", "worse", class_="side"),
        class_="interval",
        role="img",
        aria_label=f"Difference in loss to {against.name}: {words.signed(found.difference)}, "
        f"between {words.signed(found.low)} and {words.signed(found.high)}; below zero is better",
    )


def samples(found: Sequence[Sample]) -> Html:
    if found and found[0].is_class:
        rows = ((tag("span", each.given, class_="text"), _said(each), each.expected) for each in found)
        return table(
            ("Text", "Model says", "Expected"), rows, caption="Held-out texts and their classes", class_="texts"
        )
    return tag("div", *(_completion(each) for each in found), class_="samples")


def _said(sample: Sample) -> Html:
    right = sample.answer == sample.expected
    return join(
        [tag("span", "✓ " if right else "✕ ", aria_label="right: " if right else "wrong: ", role="img"), sample.answer]
    )


def _completion(sample: Sample) -> Html:
    return tag(
        "article",
        tag("h3", "Prompt"),
        tag("pre", sample.given),
        tag("h3", "Model"),
        tag("pre", sample.answer or " ", class_="answer"),
        *((tag("h3", "Held-out text"), tag("pre", sample.expected)) if sample.expected else ()),
    )
