"""The report of a run: what it says, in HTML, in Markdown and as figures, however far the run has come."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from orchestrator.errors import NotFound, StoreError
from orchestrator.record import EventLog
from orchestrator.record.cost import cost_of
from orchestrator.record.goodput import account
from orchestrator.record.model import RunRecord
from orchestrator.record.report import Report, leave_report, read_report, summary, to_html, to_markdown
from orchestrator.record.report.build import build
from orchestrator.record.report.model import Against, Facts
from orchestrator.release.bootstrap import Interval
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.store import claim_attempt, layout
from orchestrator.target_settings import Prices
from tests import record_examples as examples
from tests.unit.fakes import MemoryStore

VOID = {"meta", "link", "br", "hr", "path", "line", "rect", "wbr"}
OURS = {
    "a", "article", "b", "body", "code", "dd", "desc", "details", "div", "dl", "dt", "figcaption", "figure", "footer",
    "h1", "h2", "h3", "head", "header", "html", "i", "li", "link", "main", "meta", "ol", "p", "path", "pre", "q",
    "section", "small", "span", "style", "summary", "svg", "table", "tbody", "td", "th", "thead", "title", "tr", "ul",
    "caption",
}  # fmt: skip
AGAINST = Against(
    name="code-lm@3",
    figures={"loss": 2.4, "perplexity": 11.02, "bits_per_byte": 0.9},
    same_split=True,
    loss=2.341,
    interval=Interval(difference=-0.0283, low=-0.0341, high=-0.0226),
)


def report_of(record: RunRecord, facts: Facts | None = None) -> Report:
    return build(record, account(record), facts)


class Page(HTMLParser):
    """Holds that elements are closed as they were opened, and notes what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.mark.parametrize("story", examples.STORIES)
def test_a_page_is_whole_and_loads_nothing(story: str) -> None:
    text = to_html(report_of(examples.STORIES[story]()))
    page = Page(text)
    assert page.tags <= OURS
    assert len(page.ids) == len(set(page.ids))
    assert page.headings[0] == "h1"
    assert page.headings.count("h1") == 1
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    links = [value for name, value in page.attributes if name in ("href", "src")]
    assert all(link.startswith(("data:", "https://github.com/example/")) for link in links)
    assert not re.search(r"@import|url\(", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    text.encode()
    to_markdown(report_of(examples.STORIES[story]())).encode()


def test_what_comes_from_outside_stays_text() -> None:
    report = report_of(examples.hostile())
    page = Page(to_html(report))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert not [value for name, value in page.attributes if name == "href" and "javascript" in value]
    lines = to_markdown(report).splitlines()
    fences = [index for index, line in enumerate(lines) if line.startswith("```")]
    outside = [line for index, line in enumerate(lines) if not fences[0] < index < fences[1]]
    assert not re.search(r"(?<!\\)[<`\[]", "\n".join(line for line in outside if not line.startswith("```")))
    assert len({line.count(" | ") for line in outside if line.startswith("| ")}) <= 4, "no cell ends a row"


def test_a_fence_in_a_sample_does_not_end_the_block() -> None:
    record = examples.whole(total_steps=400)
    answer = {"prompt": "a\n````\n<b>", "completion": "```", "expected": ""}
    events = [{**each, "samples": [answer]} if each["kind"] == "samples" else each for each in record.events]
    text = to_markdown(report_of(replace(record, events=tuple(events))))
    block = text.split("### Sample")[1]
    assert "`````text\na\n````\n<b>▍```\n`````" in block


def test_the_figures_of_a_whole_run() -> None:
    record = examples.whole()
    found = report_of(record, Facts(against=AGAINST))
    assert (found.state, found.version, found.step, found.num_attempts) == ("done", "code-lm@4", 6000, 2)
    assert found.eval_loss == examples.EVALUATION["loss"]
    assert len([each for each in found.incidents if each.is_restart]) == 2
    facts = summary(found)
    json.dumps(facts, allow_nan=False)
    assert facts["against"]["evaluation"] == {"loss": 2.341, "perplexity": 11.02, "bits_per_byte": 0.9}
    assert facts["against"]["interval"] == [-0.0341, -0.0226]
    assert sum(facts["seconds"].values()) == pytest.approx(facts["wall_s"])
    page = Page(to_html(found)).text
    for words in ("Gate passed", "≤ 2.5 ✓ met", "0.0283 lower than code-lm@3", "lost to rollback", "GPU-hours", "MFU"):
        assert words in page
    assert "rank 2 was silent: backward, step 2043" in page


def test_figures_of_other_held_out_texts_are_not_compared() -> None:
    other = replace(AGAINST, same_split=False, loss=None, interval=None)
    rows = {each.name: each.theirs for each in report_of(examples.whole(), Facts(against=other)).evaluation}
    assert rows == {
        "loss": None, "perplexity": None, "bits_per_byte": 0.9, "unigram_loss": None, "num_targets": None,
    }  # fmt: skip


def test_a_refused_run_says_why() -> None:
    report = report_of(examples.refused(), Facts(against=AGAINST))
    page = Page(to_html(report)).text
    assert "Refused by the gate" in page
    assert page.count("is above gate.max_loss 2.5") == 2, "at the top and beside the figures"
    assert "released as" not in page
    markdown = to_markdown(report)
    assert markdown.startswith("## ✕ Refused by the gate: code-lm-34c43bef\n\n> eval loss 2.61 is above")


def test_a_failed_run_says_why_and_shows_its_curve() -> None:
    page = Page(to_html(report_of(examples.failed())))
    assert "The loss of step 412 is nan" in page.text
    assert "No evaluation" in page.text
    assert "svg" in page.tags


def test_a_run_without_a_step_says_so() -> None:
    for record in (examples.begun(), examples.waiting()):
        page = Page(to_html(report_of(record))).text
        assert page.count("No step yet.") == 2
        assert "NaN" not in page
    assert "Waiting" in page
    assert "no attempt has begun" in page


def test_what_it_cost_by_a_table_of_prices() -> None:
    record = examples.whole()
    goodput = account(record)
    cost = cost_of(record, goodput, Prices(currency="EUR", gpu_hour={"a100": 3.0}))
    assert cost is not None
    report = build(record, goodput, cost=cost)
    assert summary(report)["cost"]["total"] == pytest.approx(3.0 * goodput.gpu_hours)
    assert f"{3.0 * goodput.gpu_hours:.2f}" in Page(to_html(report)).text
    assert "EUR" in to_markdown(report)


def test_values_that_may_be_secret_are_left_out() -> None:
    record = examples.whole(total_steps=400)
    spec = {**record.spec["spec"], "env": {"TOKEN": "hush"}, "notify": {"webhook": "https://hooks.example/hush"}}
    text = to_html(report_of(replace(record, spec={**record.spec, "spec": spec})))
    assert "hush" not in text
    assert "TOKEN" in text


def test_the_page_of_a_long_run_is_small() -> None:
    record = examples.whole(total_steps=20_000)
    steps = [event for event in record.events if event["kind"] == "step"]
    others = [event for event in record.events if event["kind"] != "step"]
    last_s = steps[-1]["time_s"]
    more = [
        {**steps[index % len(steps)], "step": 20_000 + index, "time_s": last_s + index * 1e-3, "attempt": 2}
        for index in range(1, 300_001)
    ]
    text = to_html(report_of(replace(record, events=(*others, *steps, *more), read_s=last_s + 400.0)))
    assert len(text.encode()) < 200_000


# -- in the store


@pytest.fixture
def ended(memory_store: MemoryStore) -> MemoryStore:
    """A store with a run that has ended."""
    run_id = examples.RUN_ID
    memory_store.create_json(layout.run_spec(run_id), examples.whole(total_steps=400).spec)
    attempt = claim_attempt(memory_store, run_id, facts={"job": "j", "host": "h"})
    events = EventLog(memory_store, attempt, "pipeline")
    events.append("stage_started", stage="prepare")
    events.close()
    commit_outcome(memory_store, Outcome.failed(run_id, attempt=1, reason="no files"))
    return memory_store


def test_a_report_is_left_once(ended: MemoryStore) -> None:
    leave_report(ended, examples.RUN_ID)
    page = ended.get(layout.report(examples.RUN_ID))
    assert b"no files" in page
    assert ended.get_json(layout.summary(examples.RUN_ID))["state"] == "failed"
    leave_report(ended, examples.RUN_ID, now_s=9e9)
    assert ended.get(layout.report(examples.RUN_ID)) == page


def test_a_report_that_was_cut_off_is_finished(ended: MemoryStore) -> None:
    ended.create(layout.report(examples.RUN_ID), b"of an attempt that died")
    leave_report(ended, examples.RUN_ID)
    assert ended.get_json(layout.summary(examples.RUN_ID))["run_id"] == examples.RUN_ID


def test_no_run_fails_over_its_report(ended: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    ended.fail["create"] = StoreError("down")
    with caplog.at_level(logging.WARNING):
        leave_report(ended, examples.RUN_ID)
    assert "is not stored: down" in caplog.text
    with pytest.raises(NotFound):
        ended.get(layout.summary(examples.RUN_ID))


def test_what_is_gone_is_left_out(ended: MemoryStore) -> None:
    report = read_report(ended, examples.RUN_ID, now_s=2e9)
    assert report.against is None
    assert "Source" not in [each.name for each in report.lineage]
