"""Engines on tiny random models of several architectures, and sequences that run in them side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from tests.tiny_model import END_OF_TEXT, make_tokenizer
from workloads.serve.admission import EngineSettings
from workloads.serve.engine import Generation, Piece
from workloads.serve.tokens import Tokens
from workloads.serve.transformers_engine import TransformersEngine

CONTEXT_TOKENS = 128
VOCAB_SIZE = 384
_SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {
    **_SIZES,
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SCALED = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama, eager": {"model_type": "llama", "attn_implementation": "eager", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": None},
    "mistral, a window as long as its context": {"model_type": "mistral", **_LLAMA, "sliding_window": CONTEXT_TOKENS},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB_SIZE,
        "n_positions": CONTEXT_TOKENS,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "mixture of experts": {
        "model_type": "qwen3_moe",
        **_LLAMA,
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
ALONE: dict[str, dict[str, Any]] = {
    "mistral, a window": {"model_type": "mistral", **_LLAMA, "sliding_window": 8},
    "llama, positions by length": {"model_type": "llama", **_LLAMA, "rope_parameters": _SCALED},
    "mamba": {"model_type": "mamba", **_SIZES, "state_size": 4, "bos_token_id": None, "eos_token_id": None},
    "bloom": {"model_type": "bloom", "vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 4,
              "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
}  # fmt: skip


def make_model(kind: str, *, seed: int = 1) -> Any:
    fields = dict({**CONFIGS, **ALONE}[kind])
    options = {name: fields.pop(name) for name in ("attn_implementation",) if name in fields}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**fields)
    return transformers.AutoModelForCausalLM.from_config(config, **options).eval()


def make_engine(model: Any, **settings: Any) -> TransformersEngine:
    tokenizer = make_tokenizer(VOCAB_SIZE)
    chat_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    tokens = Tokens(tokenizer, chat_tokenizer, model.config, model.generation_config)
    return TransformersEngine(model, tokens, EngineSettings(num_threads=1, **settings))


async def follow(engine: TransformersEngine, wanted: Generation) -> list[Piece]:
    return [piece async for piece in engine.generate(wanted)]


def together(
    engine: TransformersEngine, wanted: Sequence[Generation], *, after: Sequence[int] = ()
) -> list[list[Piece] | BaseException]:
    """What comes of sequences side by side; or their errors.

    Args:
        after: how many tokens of the first one come before each of them begins; all at once by default.
    """

    async def run() -> list[list[Piece] | BaseException]:
        reached = [asyncio.Event() for _ in wanted]

        async def first() -> list[Piece]:
            pieces: list[Piece] = []
            try:
                async for piece in engine.generate(wanted[0]):
                    pieces.append(piece)
                    for number, wait in enumerate(after):
                        if len(pieces) >= wait:
                            reached[number].set()
            finally:
                for event in reached:
                    event.set()
            return pieces

        async def later(number: int) -> list[Piece]:
            if after:
                await reached[number].wait()
            return await follow(engine, wanted[number])

        return await asyncio.gather(
            first(), *(later(number) for number in range(1, len(wanted))), return_exceptions=True
        )

    return asyncio.run(run())


def text(pieces: list[Piece] | BaseException) -> str:
    assert not isinstance(pieces, BaseException), pieces
    return "".join(piece.text for piece in pieces)


def greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' own ``generate`` gives."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def has_close_call(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether the model likes two tokens alike, to the last digits, somewhere on the way."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return bool((best[:, 0] - best[:, 1]).min() < 1e-4)
