"""What a pretrained model's own config says, and what it cannot be trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from orchestrator.errors import SpecError
from workloads.tasks.base_context import BaseContext

# Their positions begin after the pad token's id, as fairseq, from which they came, counts them.
_POSITIONS_AFTER_PAD = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "longformer"}
)


def load_config(base: BaseContext) -> Any:
    """The base's transformers config.

    Raises:
        SpecError: this version of transformers does not know the architecture, or its code may not run.
    """
    import transformers

    try:
        # Said either way: where nothing is said, transformers asks on the terminal whether code may run.
        return transformers.AutoConfig.from_pretrained(base.directory, trust_remote_code=base.trust_remote_code)
    except Exception as e:  # transformers raises whatever a foreign config runs into
        raise SpecError(
            f"model.pretrained: transformers {transformers.__version__} does not take the config of "
            f"{base.manifest.uri}: {_first_line(e)}",
            next_step="A model that brings its own code needs model.trust_remote_code, if you trust that code."
            if "trust_remote_code" in str(e)
            else "Use a model_type that this version of transformers has.",
        ) from e


def tokenizer_size(base: BaseContext) -> int:
    """One more than the highest id that the base's own tokenizer gives.

    Raises:
        SpecError: it has no tokenizer that transformers can load.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base.directory, trust_remote_code=base.trust_remote_code)
        return int(max(tokenizer.get_vocab().values())) + 1
    except Exception as e:  # as above
        raise SpecError(
            f"model.pretrained: the tokenizer of {base.manifest.uri} cannot be loaded: {_first_line(e)}",
            next_step="It takes tokenizer.json, or what transformers makes one of, beside the weights.",
        ) from e


def require_embedding(config: Any, num_tokens: int, *, source: str) -> None:
    """
    Raises:
        SpecError: the tokenizer gives ids for which the model has no embedding.
    """
    rows = config.get_text_config().vocab_size
    if num_tokens > rows:
        raise SpecError(
            f"model.pretrained: the tokenizer of {source} gives {num_tokens} ids, but the model's embedding has "
            f"{rows} rows.",
            next_step="Save the model again after resize_token_embeddings, or take the tokenizer it was trained with.",
        )


def field_names(model_type: str | None) -> set[str]:
    """The fields that configs of this type have; none for a type that transformers does not know."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        return set()
    plain = transformers.CONFIG_MAPPING[model_type]()
    return {*vars(plain), *type(plain).attribute_map}


def position_limit(config: Any) -> int | None:
    """The most tokens that a model of this config has positions for; None where it sets no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    if text.model_type in _POSITIONS_AFTER_PAD:
        return limit - (text.pad_token_id or 0) - 1
    return limit


def require_positions(config: Any, sequence_length: int) -> None:
    """
    Raises:
        SpecError: samples are longer than the model has positions for.
    """
    limit = position_limit(config)
    if limit is not None and sequence_length > limit:
        raise SpecError(
            f"data.sequence_length: {sequence_length} is above the {limit} positions that the model has.",
            next_step=f"Set it to {limit} or less, or model.architecture.max_position_embeddings where the model "
            "is made from scratch.",
        )


def copy_beside(base: BaseContext, directory: Path) -> None:
    """What an exported model needs of its base beside config and tokenizer: defaults of generation, and its code."""
    code = "*.py" if base.trust_remote_code else "generation_config.json"
    for path in {*base.directory.glob("generation_config.json"), *base.directory.glob(code)}:
        shutil.copyfile(path, directory / path.name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
