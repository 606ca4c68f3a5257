"""FLOPs of a token, against a count by hand."""

from __future__ import annotations

import transformers
from torch import nn

from workloads.flops import flops_per_token

WIDTH, LAYERS, MLP, VOCABULARY, LENGTH = 32, 2, 64, 100, 16
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * MLP + 2 * WIDTH
ATTENTION = 12 * LAYERS * WIDTH * LENGTH


def llama(**fields: object) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=2,
        vocab_size=VOCABULARY, **fields,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def test_rows_that_are_looked_up_cost_nothing_and_the_output_does() -> None:
    expected = 6 * (LAYERS * BLOCK + WIDTH + VOCABULARY * WIDTH) + ATTENTION
    assert flops_per_token(llama(tie_word_embeddings=False), sequence_length=LENGTH) == expected
    assert flops_per_token(llama(tie_word_embeddings=True), sequence_length=LENGTH) == expected


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model = llama(tie_word_embeddings=False)
    for parameter in model.parameters():
        parameter.requires_grad = False
    expected = 4 * (LAYERS * BLOCK + WIDTH + VOCABULARY * WIDTH) + ATTENTION
    assert flops_per_token(model, sequence_length=LENGTH) == expected


def test_what_is_not_known_is_not_guessed() -> None:
    assert flops_per_token(nn.Linear(2, 2), sequence_length=LENGTH) is None
    config = transformers.MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=2,
    )  # fmt: skip
    assert flops_per_token(transformers.MixtralForCausalLM(config), sequence_length=LENGTH) is None
