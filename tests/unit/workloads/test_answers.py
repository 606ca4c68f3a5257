"""A model's answers to held-out samples: text that it goes on with, or classes; and that nothing fails over them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_model import END_OF_TEXT, make_tokenizer
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.bases import TINY
from tests.unit.workloads.test_sequence_classification import samples as labelled
from tests.unit.workloads.test_sequence_classification import task_from_scratch
from workloads.answers import held_out_answers
from workloads.tasks import Samples, TaskContext
from workloads.tasks.causal_lm import CausalLM

TOKENIZER = make_tokenizer()
LENGTH = 24


def causal_lm() -> CausalLM:
    context = TaskContext(
        architecture={"model_type": "llama", **TINY},
        vocab_size=TOKENIZER.get_vocab_size(),
        end_of_text_id=TOKENIZER.token_to_id(END_OF_TEXT),
        sequence_length=LENGTH,
    )
    return CausalLM(context)


def rows(**arrays: Any) -> Samples:
    return Samples(rows=arrays, num_real=len(arrays["tokens"]), row_rng=np.random.default_rng)


def test_text_is_gone_on_with_by_the_likeliest_tokens() -> None:
    task = causal_lm()
    torch.manual_seed(3)
    model = task.build_model().eval()
    ids = TOKENIZER.encode("def __init__(self, name):\n    self.name = name\n" * 3).ids[: LENGTH + 1]
    first, again = (task.answers(model, rows(tokens=np.array([ids] * 6)), TOKENIZER.decode) for _ in range(2))
    assert len(first) == 4
    assert first == again
    assert first[0]["prompt"] + first[0]["expected"] == TOKENIZER.decode(ids)
    assert first[0]["completion"]


def test_a_conversation_is_cut_where_the_assistant_speaks() -> None:
    tokens = np.arange(1, 13)[None, :]
    is_target = np.array([[0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0]], dtype=bool)
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]])
    found = causal_lm()._parts(rows(tokens=tokens, is_target=is_target, positions=positions), 0)
    assert found == ([1, 2, 3], [4, 5])


def test_a_text_is_given_a_class() -> None:
    task = task_from_scratch("bert")
    torch.manual_seed(3)
    found = task.answers(task.build_model().eval(), labelled([(1, [5, 6, 7]), (0, [8, 9])]), str)
    assert [(each["text"], each["expected"]) for each in found] == [("[5, 6, 7]", "good"), ("[8, 9]", "bad")]
    assert {each["predicted"] for each in found} <= {"bad", "good", "odd"}


def test_no_evaluation_fails_over_its_answers(memory_store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    broken: Any = SimpleNamespace(fingerprint="gone")
    assert held_out_answers(broken, causal_lm(), None, broken, memory_store) == []
    assert "There are no samples of the model's answers" in caplog.text
