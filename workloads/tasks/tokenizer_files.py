"""The tokenizer of an exported model: whole, as it came, or made around a trained one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from orchestrator.pretrained.selection import is_tokenizer_file

CONFIG = "tokenizer_config.json"


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Every file of the tokenizer in ``source``, byte for byte: chat template and special tokens with it."""
    for path in sorted(source.iterdir()):
        if path.is_file() and is_tokenizer_file(path.name):
            shutil.copyfile(path, directory / path.name)


def save_trained(tokenizer: Path, directory: Path, *, max_tokens: int) -> None:
    """A tokenizer that was trained on the source, of which there is tokenizer.json alone, as transformers keeps it."""
    import transformers

    fast: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
