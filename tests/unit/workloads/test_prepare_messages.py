"""Conversations from source to rows: formats, what is left out and counted, packing, and the yardstick."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.dataset.format import is_held_out
from orchestrator.dataset.tokenizer import fetch_tokenizer
from orchestrator.errors import RunError, SpecError
from orchestrator.spec import DataSpec, canonical_json
from tests.unit.fakes import MemoryStore
from tests.unit.workloads import chat_templates as templates
from tests.unit.workloads.preparing import json_lines, parquet, prepare_here, put, talk
from workloads.prepare import prepare
from workloads.prepare.assemble import unigram_loss
from workloads.prepare.records import REASONS
from workloads.prepare.vocabulary import load_tokenizer

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = templates.byte_level("chatml", templates.CHATML, vocab_size=300)
    return templates.save(tmp_path_factory.mktemp("base"), tokenizer)


def data(**fields: Any) -> DataSpec:
    return DataSpec(
        train="s3://corpus/**", format="messages", **{"eval_fraction": 0.2, "sequence_length": 255, **fields}
    )


def conversations(rows: Any, tokenizer: Any) -> list[tuple[str, str]]:
    """(whole text, text of the targets) of every conversation in the rows, padding left out."""
    found = []
    for tokens, is_target, positions in zip(rows["tokens"], rows["is_target"], rows["positions"], strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
        for start, end in pairwise(starts):
            said = tokens[start:end][is_target[start:end]]
            if len(said):
                found.append((tokenizer.decode(tokens[start:end]), tokenizer.decode(said)))
    return found


# -- what comes out


def test_every_conversation_is_in_the_rows_once(memory_store: MemoryStore, base: Path, tmp_path: Path) -> None:
    records = [talk(number) for number in range(200)]
    made = prepare_here(data(), put(memory_store, json_lines(records)), base)
    tokenizer = load_tokenizer(base)
    seen = {"train": [], "eval": []}  # type: dict[str, list[tuple[str, str]]]
    for name, split in (("train", made.manifest.train), ("eval", made.manifest.eval)):
        rows = made.rows(split, tmp_path / name)
        assert rows["tokens"].shape[1] == 256
        seen[name] = conversations(rows, tokenizer)
        assert split.num_targets == rows["is_target"].sum()
        assert made.manifest.num_samples(split, 255) == len(rows["tokens"])
    for name, expected_here in (("train", False), ("eval", True)):
        mine = [
            r["messages"] for r in records if is_held_out(canonical_json(r["messages"]).decode(), 0.2) == expected_here
        ]
        whole = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in mine]
        said = ["".join(m["content"] + "<|im_end|>" for m in ms if m["role"] == "assistant") for ms in mine]
        assert sorted(seen[name]) == sorted(zip(whole, said, strict=True))
    assert len(seen["eval"]) > 20


def test_the_counts_are_those_of_the_rows(memory_store: MemoryStore, base: Path, tmp_path: Path) -> None:
    made = prepare_here(data(), put(memory_store, json_lines([talk(number) for number in range(200)])), base)
    counts, manifest = made.manifest.counts, made.manifest
    assert counts["train.samples"] + counts["eval.samples"] == 200
    assert not any("skipped" in name or "truncated" in name for name in counts)
    frequencies = []
    for name, split in (("train", manifest.train), ("eval", manifest.eval)):
        rows = made.rows(split, tmp_path / name)
        assert counts[f"{name}.target_tokens"] == split.num_targets == rows["is_target"].sum()
        padding = counts.get(f"{name}.padding_tokens", 0)
        pads = (rows["tokens"] == manifest.tokenizer.pad_id) & ~rows["is_target"]
        assert 0 < padding == pads.sum()  # the pad token is in no conversation here
        assert padding < 0.2 * rows["tokens"].size
        frequencies.append(np.bincount(rows["tokens"][rows["is_target"]], minlength=manifest.tokenizer.vocab_size))
        said = [text for _, text in conversations(rows, load_tokenizer(base))]
        assert split.num_bytes == sum(len(text.encode()) for text in said)
    assert manifest.unigram_loss == unigram_loss(*frequencies)
    assert (manifest.kind, manifest.row_tokens, manifest.dtype, manifest.classes) == ("packed", 256, "uint32", ())


def test_parquet_and_json_lines_give_the_same_rows(base: Path) -> None:
    records = [talk(number) for number in range(60)]
    shards = []
    for content, name in ((json_lines(records), "all.jsonl"), (parquet(records), "all.parquet")):
        made = prepare_here(data(), put(MemoryStore(), content, name), base)
        shards.append(
            [made.store.get(f"datasets/here/0123456789abcdef/{split}-00000.bin") for split in ("train", "eval")]
        )
        assert made.manifest.source["num_records"] == 60
    assert shards[0] == shards[1]


@pytest.mark.parametrize("write", [json_lines, parquet])
def test_prompt_and_completion_are_two_turns(base: Path, write: Any) -> None:
    plain = [
        {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n}"}]}
        for n in range(40)
    ]
    as_text = [{"prompt": f"ask {n}", "completion": f"say {n}"} for n in range(40)]
    as_lists = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in plain]
    name = "all.jsonl" if write is json_lines else "all.parquet"
    shards = [
        prepare_here(data(), put(MemoryStore(), write(records), name), base).manifest.train.shards
        for records in (plain, as_text, as_lists)
    ]
    assert shards[0] == shards[1] == shards[2]


def test_what_says_the_same_gives_the_same_rows(base: Path) -> None:
    """Contents as lists of texts, system by its newer name, empty tools, other fields, a mark at the file's start."""
    plain = json_lines([talk(number) for number in range(40)])
    changed = []
    for record in [talk(number) for number in range(40)]:
        messages = [
            {
                "role": {"system": "developer"}.get(message["role"], message["role"]),
                "content": [
                    {"type": "text", "text": part} for part in (message["content"][:3], message["content"][3:])
                ],
                "tool_calls": None,
                "name": "someone",
            }
            for message in record["messages"]
        ]
        changed.append({"messages": messages, "tools": [], "id": 7})
    first, second, third = (
        prepare_here(data(), put(MemoryStore(), content), base).manifest.train.shards
        for content in (plain, json_lines(changed), b"\xef\xbb\xbf" + plain)
    )
    assert first == second == third


def test_what_follows_the_last_answer_is_not_kept(base: Path) -> None:
    records = [talk(number) for number in range(40)]
    longer = [{"messages": [*r["messages"], {"role": "user", "content": "thanks"}]} for r in records]
    first, second = (
        prepare_here(data(), put(MemoryStore(), json_lines(each)), base).manifest for each in (records, longer)
    )
    assert first.train.shards == second.train.shards


def test_the_same_source_gives_the_same_bytes_twice(base: Path) -> None:
    content = json_lines([talk(number) for number in range(100)])
    first, second = (prepare_here(data(), put(MemoryStore(), content), base) for _ in range(2))
    assert first.store.objects == second.store.objects
    assert first.manifest.model_copy(update={"created_s": 0.0}) == second.manifest.model_copy(update={"created_s": 0.0})


def test_a_large_file_is_several_parts_that_name_its_lines(memory_store: MemoryStore, base: Path) -> None:
    records: list[Any] = [talk(number, words=8) for number in range(8000)]
    records[7990:7990] = [{"messages": []}]
    content = json_lines(records)
    assert len(content) > 2 * 2**20
    made = prepare_here(data(), put(memory_store, content), base)
    assert len(made.manifest.train.shards) == len(content) // 2**20
    assert made.manifest.source["bad_records"] == [f"all.jsonl:7991 {REASONS['no_messages']}"]
    counts = made.manifest.counts
    assert sum(counts[f"{split}.samples"] for split in ("train", "eval")) == 8000


# -- too long


def test_a_long_conversation_is_cut_and_counted(memory_store: MemoryStore, base: Path, tmp_path: Path) -> None:
    records = [talk(number) for number in range(60)]
    short = prepare_here(data(sequence_length=127), put(memory_store, json_lines(records)), base)
    counts = short.manifest.counts
    assert counts["train.truncated"] > 0
    assert counts["train.samples"] + counts["eval.samples"] == 60
    rows = short.rows(short.manifest.train, tmp_path / "rows")
    assert rows["tokens"].shape[1] == 128
    whole = prepare_here(data(sequence_length=1023), put(memory_store, json_lines(records)), base)
    texts = [
        text for text, _ in conversations(whole.rows(whole.manifest.train, tmp_path / "whole"), load_tokenizer(base))
    ]
    cut = [text for text, _ in conversations(rows, load_tokenizer(base))]
    assert len(cut) == len(texts)
    assert all(any(text.startswith(part.removesuffix("\ufffd").rstrip("\ufffd")) for text in texts) for part in cut)


def test_long_conversations_may_be_skipped(memory_store: MemoryStore, base: Path) -> None:
    records = [talk(number) for number in range(60)]
    made = prepare_here(data(sequence_length=127, long_samples="skip"), put(memory_store, json_lines(records)), base)
    cut = prepare_here(data(sequence_length=127), put(memory_store, json_lines(records)), base)
    counts = made.manifest.counts
    for split in ("train", "eval"):
        assert counts[f"{split}.skipped_too_long"] == cut.manifest.counts[f"{split}.truncated"]
        assert (
            counts[f"{split}.samples"] + counts[f"{split}.skipped_too_long"] == cut.manifest.counts[f"{split}.samples"]
        )
    assert made.manifest.source["bad_records"] == []  # too long is not bad, however many there are


def test_a_conversation_cut_before_its_answer_is_skipped(memory_store: MemoryStore, base: Path) -> None:
    records = [talk(number) for number in range(60)]
    asked = {"role": "user", "content": "why " * 300}
    records += [{"messages": [asked, {"role": "assistant", "content": f"because {number}"}]} for number in range(20)]
    counts = prepare_here(data(), put(memory_store, json_lines(records)), base).manifest.counts
    assert counts["train.skipped_no_target_left"] + counts["eval.skipped_no_target_left"] == 20
    assert counts["train.samples"] + counts["eval.samples"] == 60


def test_where_all_are_too_long_that_is_said(memory_store: MemoryStore, base: Path) -> None:
    put(memory_store, json_lines([talk(number) for number in range(60)]))
    with pytest.raises(RunError, match=r"the train split holds no text \(left out: \d+ too_long\)") as caught:
        prepare_here(data(sequence_length=16, long_samples="skip"), memory_store, base)
    assert "sequence_length" in caught.value.next_step


# -- the tokenizer


def test_the_dataset_carries_the_whole_tokenizer(memory_store: MemoryStore, base: Path, tmp_path: Path) -> None:
    made = prepare_here(data(), put(memory_store, json_lines([talk(number) for number in range(60)])), base)
    tokenizer = made.manifest.tokenizer
    assert {"tokenizer_config.json", "chat_template.jinja"} <= set(tokenizer.files)
    fetched = load_tokenizer(fetch_tokenizer(made.store, made.manifest, tmp_path / "tokenizer"))
    original = load_tokenizer(base)
    assert (fetched.chat_template, fetched.special_tokens_map) == (original.chat_template, original.special_tokens_map)
    assert tokenizer.vocab_size == len(original)
    assert tokenizer.end_of_text_id == original.eos_token_id
    assert tokenizer.pad_id == original.pad_token_id
    assert not any(str(tmp_path.parent).encode() in content for content in made.store.objects.values())


def test_a_model_without_a_chat_template_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    put(memory_store, json_lines([talk(1)]))
    plain = templates.save(tmp_path / "plain", templates.byte_level("chatml", None))
    with pytest.raises(SpecError, match="needs a chat template") as caught:
        prepare_here(data(), memory_store, plain)
    assert "chat_template.jinja" in caught.value.next_step


def test_conversations_without_a_pretrained_model_are_refused(memory_store: MemoryStore) -> None:
    put(memory_store, json_lines([talk(1)]))
    from orchestrator.dataset.source import list_source

    with pytest.raises(SpecError, match="messages needs the chat template of a pretrained model"):
        prepare(data(), "here", list_source("s3://corpus/**", memory_store), memory_store)


def test_a_directory_without_a_tokenizer_is_refused(memory_store: MemoryStore, tmp_path: Path) -> None:
    put(memory_store, json_lines([talk(1)]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SpecError, match="its tokenizer cannot be loaded"):
        prepare_here(data(), memory_store, tmp_path)


def test_a_text_is_a_stream_of_the_pretrained_tokens(memory_store: MemoryStore, base: Path) -> None:
    texts = [f"alpha beta {number} 🙂" for number in range(40)]
    for number, text in enumerate(texts):
        put(memory_store, text.encode(), f"{number:02d}.txt")
    spec = DataSpec(train="s3://corpus/**", eval_fraction=0.2)
    made = prepare_here(spec, memory_store, base)
    tokenizer = load_tokenizer(base)
    (shard,) = made.manifest.train.shards
    tokens = np.frombuffer(memory_store.get(f"datasets/here/0123456789abcdef/{shard.file}"), dtype="<u2").tolist()
    mine = [text for number, text in enumerate(texts) if not is_held_out(f"{number:02d}.txt", 0.2)]
    assert tokens == [
        token
        for text in mine
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert made.manifest.tokenizer.vocab_size == len(tokenizer)
    assert made.manifest.kind == "stream"
