"""The engine that generates with a transformers model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import transformers

from workloads.serve.admission import EngineSettings
from workloads.serve.batching import Batcher
from workloads.serve.batching_alone import OneByOne
from workloads.serve.batching_check import batched
from workloads.serve.batching_memory import available_bytes, default_batch_tokens
from workloads.serve.batching_row import Row
from workloads.serve.decoding import Watch
from workloads.serve.engine import Generation, Piece
from workloads.serve.loading import load_backend, load_model, load_tokenizer
from workloads.serve.tokenized import TokenizedEngine
from workloads.serve.tokens import Tokens


class TransformersEngine(TokenizedEngine):
    """Sequences in one running batch; one after the other where the model cannot be batched."""

    def __init__(self, model: Any, tokens: Tokens, settings: EngineSettings) -> None:
        """
        Raises:
            NonFiniteLogits: the model answers NaN. EnvironmentUnusable: what memory is left holds too few tokens.
        """
        super().__init__(tokens, settings)
        self._model = model
        # What the directory recommends (a temperature, a penalty) must not change what the request asks for.
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=list(tokens.end_tokens) or None,
            pad_token_id=next(iter(tokens.end_tokens), 0),
        )
        self._runner = self._make_runner(settings)

    @classmethod
    def load(cls, directory: Path, settings: EngineSettings, *, base: Path | None = None) -> TransformersEngine:
        """Load a Hugging Face directory, check that it is whole, and generate a few tokens.

        Args:
            base: the pretrained model's directory, where ``directory`` holds an adapter alone.

        Raises:
            IntegrityError: weights are missing or of another shape, or there is no tokenizer.
            NonFiniteLogits: the model answers NaN. EnvironmentUnusable: what memory is left holds too few tokens.
        """
        chat_tokenizer = load_tokenizer(directory)
        model = load_model(directory, "AutoModelForCausalLM", base=base, num_threads=settings.num_threads)
        tokens = Tokens(load_backend(directory), chat_tokenizer, model.config, model.generation_config)
        return cls(model, tokens, settings)

    def _make_runner(self, settings: EngineSettings) -> Batcher | OneByOne:
        """What runs the model; tried, so that a broken model is found out before it gets a request."""
        found = batched(self._model, context_tokens=self.context_tokens)
        if found is None:
            alone = OneByOne(self._model)
            alone.warm_up(self._tokens.begin_token if self._tokens.begin_token is not None else 0)
            return alone
        model, bytes_per_token = found
        max_tokens = settings.max_batch_tokens or default_batch_tokens(
            available_bytes(self._model.device),
            bytes_per_token=bytes_per_token,
            max_batch=settings.max_batch,
            context_tokens=self.context_tokens,
        )
        self.context_tokens = min(self.context_tokens, max_tokens)  # a longer one would wait for ever
        return Batcher(model, max_batch=settings.max_batch, max_batch_tokens=max_tokens)

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        row = Row(
            generation=generation,
            end_tokens=frozenset((*self._tokens.end_tokens, *generation.end_tokens)),
            loop=asyncio.get_running_loop(),
            arrived=asyncio.Queue(),
        )
        watch = Watch(generation, self._tokens.decode_now)
        self._runner.submit(row)
        try:
            while True:
                item = await row.arrived.get()
                if isinstance(item, Exception):
                    raise item
                piece = watch.add(item)
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            row.gone = True
