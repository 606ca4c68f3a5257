"""Models that keep the conversations of a packed row apart.

Several conversations lie in one row, one after the other, and their positions start again at 0. transformers sees from
that, where no attention mask is given, that no token may look into another conversation. Not every model asks it to:
some make their mask without the positions, and a recurrent state or a convolution runs on over the border. So only
those are taken of which it has been shown, token by token, by ``tests/unit/workloads/test_packing.py``.
"""

from __future__ import annotations

from typing import Any

from orchestrator.errors import SpecError

MODEL_TYPES = frozenset((
    "apertus", "arcee", "bitnet", "cohere", "cohere2", "diffllama", "ernie4_5", "exaone4", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite",
    "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "mixtral",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
))  # fmt: skip
"""As a transformers config calls them."""

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Flash attention looks at positions only where a batch is a single row. None is sdpa, or eager where there is none.
_ATTENTION = (None, "sdpa", "eager")


def require_apart(config: Any, *, own_class: str | None = None) -> None:
    """
    Args:
        own_class: the model's class, where it comes with code of its own.

    Raises:
        SpecError: conversations in one row of this model might see each other.
    """
    text = config.get_text_config()
    if text._attn_implementation not in _ATTENTION:
        raise SpecError(
            f"data.format: messages packs several conversations into a row, and attention by "
            f"{text._attn_implementation} is not known to keep them apart.",
            next_step="Use sdpa or eager as attn_implementation.",
        )
    others = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if own_class is not None:
        reason = f"models with code of their own, as {own_class} is,"
    elif others:
        reason = f"layers of the type {others[0]}"
    elif config.model_type not in MODEL_TYPES:  # the whole model's: one of several parts makes masks its own way
        reason = f"models of the type {config.model_type}"
    else:
        return
    raise SpecError(
        f"data.format: messages packs several conversations into a row, and {reason} are not known to keep them apart.",
        next_step=f"Use a model of another type: {', '.join(sorted(MODEL_TYPES))}.",
    )
