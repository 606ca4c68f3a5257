"""Records of conversations that give no sample: each is counted, named by its line, and told what is wrong with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import AttemptFailed
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads import chat_templates as templates
from tests.unit.workloads.preparing import json_lines, parquet, prepare_here, put, talk
from workloads.prepare.records import REASONS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = templates.byte_level("chatml", templates.CHATML, vocab_size=300)
    return templates.save(tmp_path_factory.mktemp("base"), tokenizer)


def data() -> DataSpec:
    return DataSpec(train="s3://corpus/**", format="messages", eval_fraction=0.2, sequence_length=255)


USER = {"role": "user", "content": "Hi"}
SAYS = {"role": "assistant", "content": "Hello"}
BAD: list[tuple[bytes, str]] = [
    (b'{"messages": "caf\xe9"}', "not_utf8"),
    (b'{"messages": [', "not_json"),
    (b"[" * 100_000, "not_json"),
    (b"null", "not_an_object"),
    (b"[1]", "not_an_object"),
    (b'{"text": "x"}', "no_messages"),
    (b'{"prompt": "x"}', "no_messages"),
    (b'{"messages": []}', "no_messages"),
    (b'{"messages": "x"}', "no_messages"),
    (b'{"messages": ["x"]}', "bad_message"),
    (json.dumps({"messages": [USER, {"role": "assistant"}]}).encode(), "bad_message"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]}).encode(), "bad_message"),
    (json.dumps({"messages": [{"role": "robot", "content": "x"}, SAYS]}).encode(), "unknown_role"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": None}]}).encode(), "bad_message"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": []}]}).encode(), "bad_message"),
    (json.dumps({"messages": [USER, {**SAYS, "content": None, "tool_calls": [{"name": "f"}]}]}).encode(), "tools"),
    (json.dumps({"messages": [USER, SAYS], "tools": [{"name": "f"}]}).encode(), "tools"),
    (json.dumps({"messages": [USER]}).encode(), "no_assistant_turn"),
    (json.dumps({"messages": [USER, {"role": "assistant", "content": " "}]}).encode(), "empty_answer"),
    (json.dumps({"prompt": "x", "completion": ""}).encode(), "empty_answer"),
    (json.dumps({"prompt": 5, "completion": "x"}).encode(), "bad_message"),
    (b'{"prompt": "half \\ud800", "completion": "x"}', "not_text"),
    (json.dumps({"messages": [SAYS, USER, SAYS]}).encode(), "assistant_first"),
    (json.dumps({"messages": [SAYS, *[USER, SAYS] * 5]}).encode(), "assistant_first"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_record_is_left_out_counted_and_named(
    memory_store: MemoryStore, base: Path, line: bytes, reason: str
) -> None:
    good = json_lines([talk(number) for number in range(100)])
    first, rest = good.split(b"\n", 1)
    made = prepare_here(data(), put(memory_store, first + b"\n\n" + line + b"\n" + rest), base)
    skipped = {name.split("skipped_")[-1]: count for name, count in made.manifest.counts.items() if "skipped_" in name}
    assert skipped == {reason: 1}
    (named,) = made.manifest.source["bad_records"]
    assert named.startswith(f"all.jsonl:3 {REASONS[reason]}")
    assert (made.manifest.source["num_records"], made.manifest.source["num_bad_records"]) == (101, 1)
    assert made.manifest.counts["train.samples"] + made.manifest.counts["eval.samples"] == 100


def test_what_is_told_of_a_record_says_what_is_wrong_with_it(memory_store: MemoryStore, tmp_path: Path) -> None:
    tokenizer = templates.byte_level("zephyr", templates.MISTRAL)
    good = [{"messages": [USER, {"role": "assistant", "content": f"Hello {number}"}]} for number in range(400)]
    bad = [b'{"messages": [}', json.dumps({"messages": [USER, USER, SAYS]}).encode()]
    bad += [json.dumps({"messages": [{"role": "robot", "content": "x"}, SAYS]}).encode()]
    put(memory_store, b"\n".join(bad) + b"\n" + json_lines(good))
    made = prepare_here(data(), memory_store, templates.save(tmp_path / "base", tokenizer))
    refused = "Conversation roles must alternate user/assistant/user/assistant/..."
    assert made.manifest.source["bad_records"] == [
        f"all.jsonl:1 {REASONS['not_json']}: Expecting value in column 15",
        f"all.jsonl:2 {REASONS['template_refuses']}: {refused}",
        f"all.jsonl:3 {REASONS['unknown_role']}: 'robot'",
    ]


def test_every_reason_is_one_that_is_explained() -> None:
    assert {reason for _, reason in BAD} <= set(REASONS)


def test_too_many_bad_records_fail_with_the_first_of_them(memory_store: MemoryStore, base: Path) -> None:
    records: list[Any] = [talk(number) for number in range(250)]
    records[10], records[20] = {"messages": [USER]}, {"text": "no conversation"}
    made = prepare_here(data(), put(memory_store, json_lines(records)), base)
    assert made.manifest.source["num_bad_records"] == 2
    records[30] = {"messages": [USER]}
    with pytest.raises(AttemptFailed, match=r"3 of 250 records cannot be used \(at most 1% may be\)") as caught:
        prepare_here(data(), put(memory_store, json_lines(records)), base)
    assert f"all.jsonl:11 {REASONS['no_assistant_turn']}; all.jsonl:21 {REASONS['no_messages']}" in caught.value.message
    assert caught.value.next_step


def test_a_parquet_file_that_is_none_is_skipped_and_two_fail(memory_store: MemoryStore, base: Path) -> None:
    put(memory_store, parquet([talk(number) for number in range(60)]), "good.parquet")
    put(memory_store, b"PAR1 nothing PAR1", "bad.parquet")
    made = prepare_here(data(), memory_store, base)
    (skipped,) = made.manifest.source["skipped"]
    assert skipped.startswith("bad.parquet: it is not parquet: ")
    assert made.manifest.counts["skipped_unreadable_file"] == 1
    put(memory_store, parquet([{"other": "column"}]), "worse.parquet")
    with pytest.raises(AttemptFailed, match="2 of 3 files"):
        prepare_here(data(), memory_store, base)
