"""The page on data names every reason to skip a record and the bounds that the code has; its examples are tried."""

from __future__ import annotations

import json
import re
from pathlib import Path

from orchestrator.dataset.given import END_OF_TEXT
from orchestrator.dataset.packing import WINDOW
from orchestrator.dataset.source import DEPENDENCY_FOLDERS, LEFT_OUT
from tests.unit.workloads import chat_templates as templates
from workloads.prepare.chat import ChatTemplate
from workloads.prepare.cutting import MAX_PART_BYTES, MIN_PART_BYTES
from workloads.prepare.labels import MAX_CLASSES
from workloads.prepare.records import REASONS, conversation_of
from workloads.prepare.vocabulary import TOKENIZER_SAMPLE_BYTES

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text()


def test_every_reason_is_in_the_table_and_no_other() -> None:
    table = PAGE.split("| reason | the record |")[1].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert {word for cell in first_cells for word in re.findall(r"`(\w+)`", cell)} == {*REASONS, "too_long"}


def test_the_bounds_are_those_of_the_code() -> None:
    assert f"the {WINDOW} that are open" in PAGE
    assert f"up to {MAX_CLASSES}." in PAGE
    assert f"between {MIN_PART_BYTES // 2**20} MiB and\n{MAX_PART_BYTES // 2**20} MiB" in PAGE
    assert f"first {TOKENIZER_SAMPLE_BYTES // 2**20} MiB of the training split" in PAGE


def test_what_a_source_tree_leaves_out_is_listed() -> None:
    table = PAGE.split("| reason | files |")[1].split("\n\n")[0]
    rows = [row.split("|") for row in table.splitlines()[2:]]
    assert [re.findall(r"`(\w+)`", row[1]) for row in rows] == [[reason] for reason in LEFT_OUT]
    (folders,) = (row[2] for row in rows if "dependency" in row[1])
    assert set(re.findall(r"`([\w-]+)`", folders)) == DEPENDENCY_FOLDERS


def test_the_usual_ends_of_text_are_listed_in_their_order() -> None:
    listed = PAGE.split("the first of these that the tokenizer has is taken:")[1].split(". Without")[0]
    assert tuple(re.findall(r"`([^`]+)`", listed)) == END_OF_TEXT


def test_the_examples_are_records_and_their_targets_are_as_shown() -> None:
    messages, pair = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL))
    assert conversation_of(pair) == conversation_of(messages)[1:]
    rendered = ChatTemplate(templates.byte_level("chatml", templates.CHATML)).render(conversation_of(messages))
    ((start, end),) = rendered.spans
    text = rendered.text
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert shown == f"{text[:start]}[{text[start:end]}]{text[end:]}"
