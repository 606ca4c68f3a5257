"""A version's tokenizer and what its configs say of tokens: the half of an engine that needs no weights."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from workloads.serve import chat_template
from workloads.serve.loading import load_backend, load_tokenizer

_LONGEST_CONTEXT = 2**20
"""Of models whose config names none."""


class Tokens:
    """From text to tokens and back, as the version was trained."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_tokenizer: Any, config: Any, defaults: Any) -> None:
        """
        Args:
            config: the model's, as transformers has it. defaults: its generation config.
        """
        self._backend, self._chat_tokenizer = backend, chat_tokenizer
        text = config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.context_tokens: int = getattr(text, "max_position_embeddings", None) or _LONGEST_CONTEXT
        self.turn_end_tokens = chat_template.turn_end_tokens(chat_tokenizer)
        ends = defaults.eos_token_id if defaults.eos_token_id is not None else text.eos_token_id
        self.end_tokens: tuple[int, ...] = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
        begin = defaults.bos_token_id if defaults.bos_token_id is not None else text.bos_token_id
        self.begin_token: int | None = begin if begin is not None else next(iter(self.end_tokens), None)

    @classmethod
    def load(cls, directory: Path) -> Tokens:
        """Of a Hugging Face directory.

        Raises:
            IntegrityError: there is no tokenizer.
        """
        chat_tokenizer = load_tokenizer(directory)
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        try:
            defaults = transformers.GenerationConfig.from_pretrained(directory, local_files_only=True)
        except OSError:  # it has none
            defaults = transformers.GenerationConfig.from_model_config(config)
        return cls(load_backend(directory), chat_tokenizer, config, defaults)

    async def encode(self, text: str) -> list[int]:
        """The prompt's tokens; for an empty text, the token that a document begins with."""
        ids: list[int] = (await asyncio.to_thread(self._backend.encode, text)).ids
        return [self.begin_token] if not ids and self.begin_token is not None else ids

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await asyncio.to_thread(chat_template.encode, self._chat_tokenizer, messages)

    async def decode(self, tokens: Sequence[int]) -> str:
        return await asyncio.to_thread(self.decode_now, tokens)

    def decode_now(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text
