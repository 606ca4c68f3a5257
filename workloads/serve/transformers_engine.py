"""The engine that generates with transformers' own ``generate``."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from workloads.serve import chat_template
from workloads.serve.admission import Admission, EngineSettings
from workloads.serve.decoding import Choose, Watch
from workloads.serve.engine import Generation, Piece
from workloads.serve.loading import load_backend, load_model, load_tokenizer


class TransformersEngine:
    """``model.generate`` in a bounded pool of threads, one sequence a thread."""

    def __init__(
        self, model: Any, tokenizer: tokenizers.Tokenizer, settings: EngineSettings, *, chat_tokenizer: Any
    ) -> None:
        self._model = model
        self._tokenizer, self._chat_tokenizer = tokenizer, chat_tokenizer
        self._pool = ThreadPoolExecutor(settings.max_concurrent, thread_name_prefix="generate")
        self._admission = Admission(settings)
        self.turn_end_tokens = chat_template.turn_end_tokens(chat_tokenizer)
        config, defaults = model.config.get_text_config(), model.generation_config
        self.vocab_size: int = config.vocab_size
        self.context_tokens: int = getattr(config, "max_position_embeddings", None) or 2**20
        ends = defaults.eos_token_id if defaults.eos_token_id is not None else config.eos_token_id
        self._end_tokens: list[int] = [] if ends is None else list(ends) if isinstance(ends, list) else [ends]
        begin = defaults.bos_token_id if defaults.bos_token_id is not None else config.bos_token_id
        self._begin_token = begin if begin is not None else next(iter(self._end_tokens), None)
        # What the directory recommends (a temperature, a penalty) must not change what the request asks for.
        model.generation_config = transformers.GenerationConfig(
            eos_token_id=self._end_tokens or None,
            pad_token_id=self._end_tokens[0] if self._end_tokens else 0,
        )

    @classmethod
    def load(cls, directory: Path, settings: EngineSettings, *, base: Path | None = None) -> TransformersEngine:
        """Load a Hugging Face directory, check that it is whole, and generate one token.

        Args:
            base: the pretrained model's directory, where ``directory`` holds an adapter alone.

        Raises:
            IntegrityError: weights are missing or of another shape, or there is no tokenizer.
            NonFiniteLogits: the model answers NaN.
        """
        chat_tokenizer = load_tokenizer(directory)
        model = load_model(directory, "AutoModelForCausalLM", base=base, num_threads=settings.num_threads)
        engine = cls(model, load_backend(directory), settings, chat_tokenizer=chat_tokenizer)
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Generate one token, so that a broken model is found out before it gets a request."""
        first = self._begin_token if self._begin_token is not None else 0
        self._run(Generation(prompt=(first,), max_tokens=1, temperature=0.0), lambda piece: None, threading.Event())

    @property
    def num_sequences(self) -> int:
        return self._admission.num_sequences

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        return self._admission.admit(num_sequences)

    async def encode(self, text: str) -> list[int]:
        ids: list[int] = (await asyncio.to_thread(self._tokenizer.encode, text)).ids
        if not ids and self._begin_token is not None:
            return [self._begin_token]
        return ids

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return await asyncio.to_thread(chat_template.encode, self._chat_tokenizer, messages)

    async def decode(self, tokens: Sequence[int]) -> str:
        return await asyncio.to_thread(self._decode, tokens)

    async def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
        gone = threading.Event()

        def put(item: Piece | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens
                loop.call_soon_threadsafe(pieces.put_nowait, item)

        def work() -> None:
            try:
                if not gone.is_set():
                    self._run(generation, put, gone)
                put(None)
            except BaseException as e:
                put(e)

        self._pool.submit(work)
        try:
            while (item := await pieces.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            gone.set()

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _run(self, generation: Generation, put: Callable[[Piece], None], gone: threading.Event) -> None:
        """Generate in this thread, and put one piece per token."""
        watch = Watch(generation, self._decode, (*self._end_tokens, *generation.end_tokens), put, gone)
        prompt = torch.tensor([generation.prompt], device=self._model.device)
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=transformers.GenerationConfig(do_sample=False, max_new_tokens=generation.max_tokens),
            logits_processor=transformers.LogitsProcessorList([Choose(generation, self._model.device)]),
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )
