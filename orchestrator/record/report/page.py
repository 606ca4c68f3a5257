"""A report as one HTML page that loads nothing: no script, no font, no image from anywhere. Pure."""

from __future__ import annotations

import base64
from dataclasses import replace
from importlib import resources

import yaml

from orchestrator.record.report import bars, words
from orchestrator.record.report.chart import Labels, chart
from orchestrator.record.report.curves import since, zoom_from
from orchestrator.record.report.judged import evaluation, samples
from orchestrator.record.report.markup import Child, Html, join, tag
from orchestrator.record.report.model import Curve, Lineage, Report, State
from orchestrator.record.report.series import Tick, ticks, time_ticks

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_ICON = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'>"
    "<path d='M1 1v6M1 4h6M7 1v6' stroke='#0072b2' fill='none'/></svg>"
)
SIGNS: dict[State, str] = {
    "done": "✓",
    "refused": "✕",
    "failed": "✕",
    "stopped": "■",
    "in flight": "▶",
    "waiting": "…",
}
IN_WORDS: dict[State, str] = {
    "done": "Done",
    "refused": "Refused by the gate",
    "failed": "Failed",
    "stopped": "Stopped",
    "in flight": "In flight",
    "waiting": "Waiting",
}
Figure = tuple[str, str, str]
"""Name, value, and what more there is to say."""


def to_html(report: Report) -> str:
    """The page."""
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    icon = base64.b64encode(_ICON.encode()).decode()
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{report.run_id}: {IN_WORDS[report.state].lower()}"),
        Html(f'<link rel="icon" href="data:image/svg+xml;base64,{icon}">'),
        Html(f"<style>{style}</style>"),
    )
    body = tag("main", _header(report), _key_figures(report), *_sections(report))
    foot = tag("footer", f"Made by Headway from the run's record, {words.moment(report.made_s)}.")
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', body, foot), lang='en')}\n"


def _sections(report: Report) -> list[Html]:
    return [
        _section("loss", "Loss", _loss(report), note="nats per token, by optimizer step"),
        _section("throughput", "Throughput", _throughput(report), note="tokens per second, over the life of the run"),
        _section("goodput", "Where the time went", _goodput(report), note=_goodput_note(report)),
        _section("timeline", "Time line", bars.time_line(report) if report.rows else _nothing("No attempt yet.")),
        _section("evaluation", "Evaluation", evaluation(report), note="the exported model on the held-out split"),
        *([_section("samples", "Samples", samples(report.samples))] if report.samples else []),
        _section("lineage", "Lineage", _lineage(report.lineage)),
        *([_section("run-file", "Run file", _run_file(report))] if report.run_file else []),
    ]


def _section(key: str, heading: str, content: Html, *, note: str = "") -> Html:
    quiet = tag("span", note, class_="quiet") if note else None
    return tag("section", tag("h2", heading, " ", quiet, id=key), content, aria_labelledby=key)


def _nothing(text: str) -> Html:
    return tag("p", text, class_="nothing")


def _header(report: Report) -> Html:
    state = report.state
    kind = state.replace(" ", "-")
    badge = tag("span", tag("span", SIGNS[state], aria_hidden="true"), " ", IN_WORDS[state], class_=f"badge {kind}")
    released = tag("span", "released as ", tag("b", report.version)) if report.version else None
    return tag(
        "header",
        tag("p", "Training run", class_="kicker"),
        tag("h1", report.run_id),
        tag("p", badge, released, tag("span", _when(report), class_="quiet"), class_="outcome"),
        tag("p", report.reason, class_=f"reason {kind}") if report.reason else None,
    )


def _when(report: Report) -> str:
    if report.started_s is None:
        return "no attempt has begun"
    begun = f"began {words.moment(report.started_s)}"
    return f"{begun}, ended {words.moment(report.ended_s)}" if report.ended_s else begun


# -- figures


def key_figures(report: Report) -> list[Figure]:
    """What a reader wants to know first; what is not known is left out."""
    goodput = report.goodput
    of_all = f"of {report.total_steps:,}" if report.total_steps and report.total_steps != report.step else ""
    found: list[Figure | None] = [
        _eval_loss(report),
        ("Steps", f"{report.step:,}", of_all),
        ("Tokens", words.count(report.tokens), "trained on") if report.tokens else None,
        ("Throughput", words.count(report.tokens_per_s), "tokens/s") if report.tokens_per_s else None,
        ("Duration", words.duration(goodput.wall_s), words.times(report.num_attempts, "attempt")),
        ("Goodput", words.share(goodput.goodput), "of all worker time"),
        ("GPU-hours", words.hours(goodput.gpu_hours), "") if goodput.gpu_hours else None,
        ("CPU-hours", words.hours(goodput.cpu_hours), "") if not goodput.gpu_hours else None,
        ("Cost", words.money(report.cost.total), report.cost.currency) if report.cost is not None else None,
        ("MFU", words.share(goodput.mfu), "of the devices' peak") if goodput.mfu is not None else None,
        ("Restarts", str(len(goodput.restarts)), ""),
    ]
    return [each for each in found if each is not None]


def _eval_loss(report: Report) -> Figure | None:
    if report.eval_loss is None:
        return None
    against = report.against
    note = (
        "nats per token" if report.evaluation or not report.loss.looks else f"at step {report.loss.looks[-1][0]:,.0f}"
    )
    if against is not None and against.loss is not None:
        more = report.eval_loss - against.loss
        note = f"{words.figure(abs(more))} {'higher' if more > 0 else 'lower'} than {against.name}"
    return "Held-out loss", words.figure(report.eval_loss), note


def _key_figures(report: Report) -> Html:
    cards = (
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", note) if note else None))
        for name, value, note in key_figures(report)
    )
    return tag("dl", *cards, class_="cards")


# -- curves


def _loss(report: Report) -> Html:
    curve = report.loss
    if not curve.raw and not curve.looks:
        return _nothing("No step yet.")
    labels = Labels(
        key="loss-chart",
        title="Loss by step",
        description=_loss_in_words(curve),
        y_unit="loss",
        x_unit="step",
        raw="training",
        mark="went on from a checkpoint",
    )
    whole = chart(curve, labels, x_ticks=ticks, from_zero=False)
    first = zoom_from(curve)
    if first is None:
        return whole
    near = f"From step {first:,} on"
    text = "The same without its beginning."
    labels = replace(labels, key="loss-near", title=f"Loss, {near.lower()}", description=text)
    return tag(
        "div",
        tag("div", tag("h3", "All steps"), whole),
        tag("div", tag("h3", near), chart(since(curve, first), labels, x_ticks=ticks, x_low=first, from_zero=False)),
        class_="pair",
    )


def _loss_in_words(curve: Curve) -> str:
    last = f", {words.figure(curve.last)} at the last" if curve.last is not None else ""
    told = f"Training loss over {words.times(curve.num_points, 'step')}{last}."
    if not curve.looks:
        return told
    number = words.times(len(curve.looks), "look")
    return f"{told} Held-out loss {words.figure(curve.looks[-1][1])} at the newest of {number}."


def _throughput(report: Report) -> Html:
    curve = report.throughput
    if not curve.raw:
        return _nothing("No step yet.")
    overall = f", {words.count(report.tokens_per_s)} over all" if report.tokens_per_s else ""
    labels = Labels(
        key="throughput-chart",
        title="Tokens per second over time",
        description=f"Tokens per second of {words.times(curve.num_points, 'step')}{overall}.",
        y_unit="tokens/s",
        x_unit="since the start",
        raw="each step",
        mark="workers started again",
    )
    return chart(curve, labels, x_ticks=_time_ticks, x_high=report.goodput.wall_s, from_zero=True)


def _time_ticks(low: float, high: float) -> list[Tick]:
    return time_ticks(high)


def _goodput(report: Report) -> Html:
    return bars.goodput_bar(report) if report.goodput.wall_s > 0 else _nothing("No time has passed yet.")


def _goodput_note(report: Report) -> str:
    goodput = report.goodput
    if goodput.wall_s <= 0:
        return ""
    return f"{words.share(goodput.goodput)} of all worker time computed steps that count"


# -- where it came from


def _lineage(found: tuple[Lineage, ...]) -> Html:
    rows = [
        tag("div", tag("dt", each.name), tag("dd", _value(each), tag("small", each.note) if each.note else None))
        for each in found
    ]
    return tag("dl", *rows, class_="lineage")


def _value(each: Lineage) -> Child:
    code = tag("code", each.value)
    if not each.link.startswith(("https://", "http://")):  # whatever else a browser would follow, such as javascript:
        return code
    return join([code, tag("a", "CI job", href=each.link, rel="noopener noreferrer", class_="small")], " ")


def _run_file(report: Report) -> Html:
    text = yaml.safe_dump(dict(report.run_file), sort_keys=False, allow_unicode=True, width=100)
    return tag("details", tag("summary", "As Headway understood it"), tag("pre", text, tabindex="0"))
