"""The page on data names every reason to skip a record and the bounds that the code has; its examples are tried."""

from __future__ import annotations

import json
import re
from pathlib import Path

from orchestrator.dataset.packing import WINDOW
from tests.unit.workloads import chat_templates as templates
from workloads.prepare.chat import ChatTemplate
from workloads.prepare.labels import MAX_CLASSES
from workloads.prepare.records import REASONS, conversation_of

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()


def test_every_reason_is_in_the_table_and_no_other() -> None:
    table = PAGE.split("| reason | the record |")[1].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {word for cell in first_cells for word in re.findall(r"`(\w+)`", cell)} == {*REASONS, "too_long"}


def test_the_bounds_are_those_of_the_code() -> None:
    assert f"the {WINDOW} that are open" in PAGE
    assert f"up to {MAX_CLASSES}." in PAGE


def test_the_examples_are_records_and_their_targets_are_as_shown() -> None:
    messages, pair = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    assert conversation_of(pair) == conversation_of(messages)[1:]
    rendered = ChatTemplate(templates.byte_level("chatml", templates.CHATML)).render(conversation_of(messages))
    ((start, end),) = rendered.spans
    text = rendered.text
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown == f"{text[:start]}[{text[start:end]}]{text[end:]}"
