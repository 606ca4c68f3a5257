"""Conversations in one row do not see each other, in every architecture that is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from orchestrator.dataset.rows import conversation_entries, packed_row, unpack_packed
from orchestrator.errors import SpecError
from workloads.tasks import Samples, TaskContext
from workloads.tasks.causal_lm import CausalLM
from workloads.tasks.packing import MODEL_TYPES, require_apart

VOCAB, LENGTH, WINDOW = 96, 32, 6
LENGTHS = (11, 1, 14, 4)
"""Of the conversations in a row; the longest goes beyond the sliding window. Padding fills the rest."""
WANTED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "ffn_hidden_size": 48,
    "rotary_dim": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    **dict.fromkeys(("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"), 0.0),
    **dict.fromkeys(("residual_dropout", "router_jitter_noise", "input_jitter_noise", "embedding_dropout"), 0.0),
}


def tiny(model_type: str) -> CausalLM:
    known = transformers.CONFIG_MAPPING[model_type]()
    fields = {name: value for name, value in WANTED.items() if hasattr(known, name)}
    context = TaskContext(
        architecture={"model_type": model_type, **fields},
        vocab_size=VOCAB,
        end_of_text_id=0,
        sequence_length=LENGTH,
        sample_kind="packed",
    )
    return CausalLM(context)


def build(task: CausalLM) -> torch.nn.Module:
    torch.manual_seed(0)
    return task.build_model()


def conversation(length: int, seed: int) -> Any:
    """Of random tokens, of which the second half are targets."""
    tokens = np.random.default_rng(seed).integers(5, VOCAB, length)
    return conversation_entries(tokens.tolist(), np.arange(length) >= length // 2)


def packed(*conversations: Any) -> Samples:
    row = packed_row(conversations, row_tokens=LENGTH + 1, pad_id=0)
    return Samples(rows=unpack_packed(row[None]), num_real=1, row_rng=np.random.default_rng)


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert isinstance(found, torch.Tensor)
    return found.detach()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_no_token_sees_another_conversation(model_type: str, training: bool, attention: str) -> None:
    task = tiny(model_type)
    task.check()
    model: Any = build(task).train(training)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {model_type}, which takes eager")
    model.set_attn_implementation(attention)
    if training and model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = [conversation(length, seed) for seed, length in enumerate(LENGTHS)]
    batch = task.collate(packed(*parts))
    whole = logits(model, batch)
    first = LENGTHS[0]
    other = logits(model, task.collate(packed(conversation(first, seed=99), *parts[1:])))
    # An expert multiplies its tokens of all conversations at once; how many there are decides the order of its sums.
    has_experts = any("expert" in name for name, _ in model.named_modules())
    torch.testing.assert_close(whole[:, first:], other[:, first:], rtol=0, atol=1e-6 if has_experts else 0)
    assert not torch.allclose(whole[:, :first], other[:, :first], atol=1e-3)

    alone, counted, start = torch.zeros(()), 0, 0
    for part in parts:
        own = task.collate(packed(part))
        alone = alone + task.loss_sum(model, own).detach()
        counted += task.num_targets(own)
        unpacked = model(input_ids=own["input_ids"][:, : len(part)], use_cache=False).logits.detach()
        torch.testing.assert_close(whole[:, start : start + len(part)], unpacked, rtol=1e-5, atol=1e-5)
        start += len(part)
    assert task.num_targets(batch) == counted > 0
    torch.testing.assert_close(task.loss_sum(model, batch).detach(), alone, rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_conversation_is_that_without_packing_at_all() -> None:
    task = tiny("llama")
    model = build(task).eval()
    part = conversation(14, seed=5)
    tokens = torch.from_numpy(part & ((1 << 30) - 1)).long()[None]
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=tokens[:, :-1]).logits[0, 6:], tokens[0, 7:], reduction="sum"
    )
    batch = task.collate(packed(conversation(9, seed=6), part))
    found = task.loss_sum(model, batch) - task.loss_sum(model, task.collate(packed(conversation(9, seed=6))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_targets_are_counted_token_by_token() -> None:
    """A hand-written mask: C conversation starts, T target, . prompt, _ padding."""
    is_target = [
        np.array([False, False, True, True]),
        np.array([True, False, True]),  # the first token of a conversation follows nothing, whatever is asked
    ]
    samples = packed(conversation_entries([5, 6, 7, 8], is_target[0]), conversation_entries([9, 10, 11], is_target[1]))
    task = tiny("llama")
    batch = task.collate(samples)
    # inputs     5  6  7  8  9  10  11  padding
    # mask       C  .  T  T  C  .   T   _ …
    assert batch["labels"][0].tolist() == [-100, 7, 8, -100, -100, 11] + [-100] * (LENGTH - 6)
    assert batch["position_ids"][0, :8].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert task.num_targets(batch) == 3
    changed = packed(
        conversation_entries([50, 60, 7, 8], is_target[0]), conversation_entries([9, 10, 11], is_target[1])
    )
    assert task.num_targets(task.collate(changed)) == 3
    padded = Samples(rows={k: np.repeat(v, 2, 0) for k, v in samples.rows.items()}, num_real=1, row_rng=samples.row_rng)
    assert task.num_targets(task.collate(padded)) == 3


def test_a_stream_has_no_positions() -> None:
    rows = {"tokens": np.arange(2 * (LENGTH + 1)).reshape(2, LENGTH + 1)}
    batch = tiny("llama").collate(Samples(rows=rows, num_real=2, row_rng=np.random.default_rng))
    assert set(batch) == {"input_ids", "labels"}
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize("model_type", ["mamba", "opt", "bloom", "gpt_oss", "qwen3_next"])
def test_other_architectures_are_refused(model_type: str) -> None:
    with pytest.raises(SpecError, match=r"not known to keep them apart.*Use a model of another type: apertus"):
        require_apart(transformers.CONFIG_MAPPING[model_type]())


def test_attention_that_passes_over_positions_is_refused() -> None:
    config = transformers.LlamaConfig(attn_implementation="flash_attention_2")
    with pytest.raises(SpecError, match="attention by flash_attention_2 is not known to keep them apart"):
        require_apart(config)


def test_code_of_ones_own_is_refused() -> None:
    with pytest.raises(SpecError, match="models with code of their own, as OwnLlama is, are not known to keep them"):
        require_apart(transformers.LlamaConfig(), own_class="OwnLlama")


def test_a_model_of_several_parts_is_refused() -> None:
    """Its text part alone would do."""
    require_apart(transformers.Gemma3Config().get_text_config())
    with pytest.raises(SpecError, match="models of the type gemma3 are not known"):
        require_apart(transformers.Gemma3Config())


def test_a_layer_of_another_kind_is_refused() -> None:
    config = transformers.Qwen3Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(SpecError, match="layers of the type linear_attention"):
        require_apart(config)


def test_what_is_refused_does_mix_conversations() -> None:
    """Else the refusal would be for nothing."""
    task = tiny("opt")
    model = build(task).eval()
    parts = [conversation(length, seed) for seed, length in enumerate(LENGTHS)]
    whole = logits(model, task.collate(packed(*parts)))
    other = logits(model, task.collate(packed(conversation(LENGTHS[0], seed=99), *parts[1:])))
    assert not torch.allclose(whole[:, LENGTHS[0] :], other[:, LENGTHS[0] :], atol=1e-3)


def test_the_list_is_of_types_that_transformers_has() -> None:
    assert set(transformers.CONFIG_MAPPING) >= MODEL_TYPES
    assert Path(__file__).name in str(require_apart.__globals__["__doc__"])
