"""Labelled texts from source to rows: classes, special tokens, what is too long, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, processors, trainers

from orchestrator.dataset.format import is_held_out
from orchestrator.errors import RunError
from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import FINGERPRINT, json_lines, parquet, prepare_here
from workloads.prepare.labels import Classes, class_names
from workloads.prepare.records import REASONS
from workloads.prepare.vocabulary import END_OF_TEXT, load_backend, load_tokenizer

WORDS = ["good", "bad", "film", "plot", "actor", "the", "a", "very"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer that puts [CLS] and [SEP] around a text, and whose tokenizer.json asks for cutting."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(WORDS * 5, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    directory = tmp_path_factory.mktemp("bert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)  # fmt: skip
    return directory


def data(**fields: Any) -> DataSpec:
    wanted = {"format": "jsonl", "label_field": "label", "eval_fraction": 0.2, "sequence_length": 8, "vocab_size": 300}
    return DataSpec(train="s3://corpus/**", **{**wanted, **fields})


def records(labels: list[Any], *, count: int = 100) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    return [
        {
            "text": " ".join(generator.choice(WORDS, 4)) + f" {number}",
            "label": labels[number % len(labels)],
            "id": number,
        }
        for number in range(count)
    ]


def put(store: MemoryStore, content: bytes, name: str = "all.jsonl") -> MemoryStore:
    store.at("corpus").upload(name, content)
    return store


def test_rows_are_the_texts_in_order_with_their_classes(memory_store: MemoryStore, bert: Path, tmp_path: Path) -> None:
    wanted = records(["pos", "neg", "meh"])
    made = prepare_here(data(), put(memory_store, json_lines(wanted)), bert)
    assert made.manifest.classes == ("meh", "neg", "pos")
    assert (made.manifest.kind, made.manifest.row_tokens) == ("labelled", 9)
    tokenizer = load_tokenizer(bert)
    for split, held_out in ((made.manifest.train, False), (made.manifest.eval, True)):
        mine = [record for record in wanted if is_held_out(record["text"], 0.2) == held_out]
        rows = made.rows(split, tmp_path / str(held_out))
        assert [made.manifest.classes[label] for label in rows["label"]] == [record["label"] for record in mine]
        for tokens, length, record in zip(rows["tokens"], rows["length"], mine, strict=True):
            expected = tokenizer(record["text"], truncation=True, max_length=8)["input_ids"]
            assert tokens[:length].tolist() == expected
            assert (expected[0], expected[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            assert tokens[length:].tolist() == [tokenizer.pad_token_id] * (8 - length)
        assert split.num_targets == len(mine)
        assert split.num_bytes == sum(len(record["text"].encode()) for record in mine)


def test_parquet_and_json_lines_give_the_same_rows(bert: Path) -> None:
    wanted = records(["pos", "neg"])
    shards = []
    for content, format_ in ((json_lines(wanted), "jsonl"), (parquet(wanted), "parquet")):
        made = prepare_here(data(format=format_), put(MemoryStore(), content, "all"), bert)
        shards.append([made.store.get(f"datasets/here/{FINGERPRINT}/{name}-00000.bin") for name in ("train", "eval")])
    assert shards[0] == shards[1]


def test_without_a_model_a_tokenizer_is_trained_that_marks_both_ends(memory_store: MemoryStore, tmp_path: Path) -> None:
    made = prepare_here(data(sequence_length=64), put(memory_store, json_lines(records(["pos", "neg"]))))
    backend = load_backend(memory_store.get(f"datasets/here/{FINGERPRINT}/tokenizer.json"))
    rows = made.rows(made.manifest.train, tmp_path / "rows")
    end = backend.token_to_id(END_OF_TEXT)
    assert made.manifest.tokenizer.end_of_text_id == end
    for tokens, length in zip(rows["tokens"], rows["length"], strict=True):
        assert tokens[0] == tokens[length - 1] == end
    texts = {
        backend.decode(tokens[:length].tolist()) for tokens, length in zip(rows["tokens"], rows["length"], strict=True)
    }
    assert texts <= {record["text"] for record in records(["pos", "neg"])}


def test_the_yardstick_is_how_often_each_class_comes(memory_store: MemoryStore, bert: Path, tmp_path: Path) -> None:
    made = prepare_here(data(), put(memory_store, json_lines(records(["a", "a", "b"]))), bert)
    train, held_out = (
        np.bincount(made.rows(split, tmp_path / "rows")["label"], minlength=2)
        for split in (made.manifest.train, made.manifest.eval)
    )
    share = (train + 1) / (train + 1).sum()
    assert made.manifest.unigram_loss == pytest.approx(-(held_out * np.log(share)).sum() / held_out.sum())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, -1], ("-1", "9", "10")),
        (["10", "9"], ("10", "9")),
        ([10, "9"], ("10", "9")),  # as texts, since not all are numbers
        (["ü", "a", "B"], ("B", "a", "ü")),
    ],
)
def test_classes_are_in_the_order_of_numbers_or_of_texts(
    memory_store: MemoryStore, bert: Path, labels: list[Any], classes: tuple[str, ...]
) -> None:
    assert prepare_here(data(), put(memory_store, json_lines(records(labels))), bert).manifest.classes == classes


def test_a_long_text_is_cut_or_skipped_and_counted(memory_store: MemoryStore, bert: Path, tmp_path: Path) -> None:
    wanted = records(["pos", "neg"])
    for number in range(30):
        wanted[number]["text"] = "very " * 20 + str(number)
    put(memory_store, json_lines(wanted))
    made = prepare_here(data(), memory_store, bert)
    counts = made.manifest.counts
    assert counts["train.truncated"] + counts["eval.truncated"] == 30
    assert counts["train.samples"] + counts["eval.samples"] == 100
    rows = made.rows(made.manifest.train, tmp_path / "rows")
    full = rows["length"] == 8
    assert (rows["tokens"][full][:, -1] == load_tokenizer(bert).sep_token_id).all()
    counts = prepare_here(data(long_samples="skip"), memory_store, bert).manifest.counts
    assert counts["train.skipped_too_long"] + counts["eval.skipped_too_long"] == 30
    assert counts["train.samples"] + counts["eval.samples"] == 70


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "no_label"),
        ({"text": "x", "label": None}, "no_label"),
        ({"text": "x", "label": True}, "no_label"),
        ({"text": "x", "label": 1.5}, "no_label"),
        ({"text": "x", "label": " "}, "no_label"),
        ({"label": "pos"}, "no_text"),
        ({"text": " ", "label": "pos"}, "no_text"),
        ({"text": 5, "label": "pos"}, "no_text"),
        ("text", "not_an_object"),
    ],
)
def test_a_bad_record_is_left_out_counted_and_named(
    memory_store: MemoryStore, bert: Path, record: Any, reason: str
) -> None:
    wanted: list[Any] = records(["pos", "neg"])
    wanted[1:1] = [record]
    made = prepare_here(data(), put(memory_store, json_lines(wanted)), bert)
    assert made.manifest.counts[f"skipped_{reason}"] == 1
    assert made.manifest.source["bad_records"] == [f"all.jsonl:2 {REASONS[reason]}"]


# -- classes that cannot be learned


def test_one_class_alone_is_refused(memory_store: MemoryStore, bert: Path) -> None:
    with pytest.raises(RunError, match=r"data.label_field 'label' holds one class alone, 'pos'"):
        prepare_here(data(), put(memory_store, json_lines(records(["pos"]))), bert)


def test_a_field_that_no_record_has_is_refused(memory_store: MemoryStore, bert: Path) -> None:
    with pytest.raises(RunError, match=r"data.label_field 'sort' holds no class in the training split"):
        prepare_here(data(label_field="sort"), put(memory_store, json_lines(records(["pos", "neg"]))), bert)


def test_too_many_classes_are_refused(memory_store: MemoryStore, bert: Path) -> None:
    with pytest.raises(RunError, match="holds more than 1000 classes, such as '1', '3'") as caught:
        prepare_here(data(label_field="id"), put(memory_store, json_lines(records(["pos"], count=1500))), bert)
    assert caught.value.next_step


def test_a_class_in_the_held_out_split_alone_is_refused(memory_store: MemoryStore, bert: Path) -> None:
    wanted = records(["pos", "neg"])
    held_out = next(record for record in wanted if is_held_out(record["text"], 0.2))
    held_out["label"] = "rare"
    with pytest.raises(RunError, match="classes in the held-out split that the training split lacks: 'rare'"):
        prepare_here(data(), put(memory_store, json_lines(wanted)), bert)


def test_classes_of_several_parts_are_put_together() -> None:
    parts = [
        Classes(counts={"train": {"2": 1}, "eval": {}}, all_numbers=True),
        Classes(counts={"train": {"10": 4}, "eval": {"2": 1}}, all_numbers=True),
    ]
    assert class_names(parts, "label") == ("2", "10")
    assert class_names([*parts, parts[0].model_copy(update={"all_numbers": False})], "label") == ("10", "2")
