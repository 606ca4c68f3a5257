"""docs/examples/masked-lm: a task of one's own, with masks that are the same however a batch is split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from orchestrator.dataset.format import Split
from orchestrator.spec import load
from workloads.tasks import Samples, Task, TaskContext, load_task

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "masked-lm"
VOCAB, LENGTH, IGNORED = 60, 32, -100
TINY = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (8, LENGTH + 1))


@pytest.fixture(scope="module")
def task() -> Iterator[Task]:
    spec = load(EXAMPLE / "run.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        yield load_task(
            spec.task,
            TaskContext(architecture=TINY, vocab_size=VOCAB, end_of_text_id=0, sequence_length=LENGTH),
        )


def row_rng(first: int, row: int) -> np.random.Generator:
    return np.random.default_rng([7, first + row])


def samples(rows: Sequence[int], *, num_padding: int = 0) -> Samples:
    """``rows`` of the global batch, contiguous, then padding as BatchFeed makes it."""
    padded = [*rows, *[rows[0]] * num_padding]
    return Samples(rows={"tokens": TOKENS[padded]}, num_real=len(rows), row_rng=partial(row_rng, rows[0]))


def test_the_run_file_builds_its_model() -> None:
    spec = load(EXAMPLE / "run.yaml")
    assert spec.user_code
    assert spec.release is None


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_masks_do_not_depend_on_the_split(task: Task, cut: int) -> None:
    whole = task.collate(samples(range(8)))
    parts = [task.collate(samples(range(start, min(start + cut, 8)))) for start in range(0, 8, cut)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


def test_about_fifteen_in_a_hundred_are_targets_and_most_are_masked(task: Task) -> None:
    tokens = np.full((64, LENGTH + 1), 5)
    batch = task.collate(Samples(rows={"tokens": tokens}, num_real=64, row_rng=partial(row_rng, 0)))
    targets = batch["labels"] != IGNORED
    masked = batch["input_ids"] == VOCAB
    assert 0.12 < targets.float().mean() < 0.18
    assert 0.7 < masked.sum() / targets.sum() < 0.9
    assert not (masked & ~targets).any()
    assert (batch["input_ids"][~targets] == 5).all()
    assert (batch["labels"][targets] == 5).all()
    assert (tokens == 5).all()  # the reader's own rows are left as they are


def test_padding_rows_do_not_count(task: Task) -> None:
    model = task.build_model().eval()
    plain, padded = task.collate(samples(range(3))), task.collate(samples(range(3), num_padding=5))
    assert padded["input_ids"].shape == (8, LENGTH)
    assert task.num_targets(plain) == task.num_targets(padded) == int((plain["labels"] != IGNORED).sum()) > 0
    with torch.inference_mode():
        assert torch.allclose(task.loss_sum(model, plain), task.loss_sum(model, padded), rtol=1e-5)


def test_a_batch_without_targets_has_no_loss(task: Task) -> None:
    batch = task.collate(samples(range(2)))
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert task.num_targets(batch) == 0
    assert float(task.loss_sum(task.build_model(), batch).detach()) == 0.0


def test_the_loss_falls(task: Task) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    assert model.config.vocab_size == VOCAB + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = task.collate(samples(range(8)))
    losses = []
    for _ in range(12):
        loss = task.loss_sum(model, batch) / task.num_targets(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def test_figures(task: Task) -> None:
    split = Split(shards=(), num_tokens=1, num_bytes=1, num_files=1)
    figures = task.metrics({"loss": 0.0, "correct": 3.0}, num_targets=4, split=split)
    assert figures == {"loss": 0.0, "perplexity": 1.0, "masked_accuracy": 0.75}


def test_sums_of_an_evaluation_count_what_is_guessed_right(task: Task) -> None:
    batch = task.collate(samples(range(4)))
    model = task.build_model().eval()
    with torch.inference_mode():
        sums = task.eval_sums(model, batch)
        guessed = model(input_ids=batch["input_ids"]).logits.argmax(-1)
    assert sums["correct"] == int((guessed == batch["labels"]).sum())
    assert np.isfinite(sums["loss"])


def test_the_exported_tokenizer_knows_the_mask_token(task: Task, tmp_path: Path) -> None:
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<|endoftext|>": 0} | {f"t{i}": i for i in range(1, 60)}))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model").mkdir()
    task.save_assets(tmp_path / "model", tokenizer=tmp_path / "tokenizer.json", dtype="fp32")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert exported.mask_token_id == VOCAB
    assert exported(f"t3 {exported.mask_token} t4")["input_ids"] == [3, VOCAB, 4]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").architectures == ["BertForMaskedLM"]
