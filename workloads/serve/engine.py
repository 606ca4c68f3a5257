"""What turns a prompt into tokens: the :class:`Engine` protocol, and transformers' ``generate`` behind it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import tokenizers
import torch
import transformers

from orchestrator.errors import HeadwayError, IntegrityError, RunError
from workloads.serve.text import Detokenizer, StopSequences

FinishReason = Literal["stop", "length"]


class Overloaded(HeadwayError):
    """As many requests are waiting as may wait."""


class NonFiniteLogits(RunError):
    """The model's output is NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sequence to generate."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token every time."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one more token brought. ``text`` may be empty while a character or stop sequence is incomplete."""

    text: str
    num_tokens: int
    """Generated so far, this piece included."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    max_concurrent: int = 4
    """Sequences generated at once; each holds a key-value cache."""
    max_queued: int = 64
    """Sequences that wait for their turn; those beyond are refused."""
    num_threads: int = max(1, len(os.sched_getaffinity(0)) // 2)
    """Threads of one tensor operation; half of the cores, so that serving leaves room for training."""


class Engine(Protocol):
    """One loaded version, as the API sees it."""

    context_tokens: int
    """The most tokens that a prompt and its completion may have together."""
    vocab_size: int
    num_sequences: int
    """Admitted now: under way or waiting."""

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        """Reserve room for a request's sequences while the context lasts.

        Raises:
            Overloaded: too many are waiting already.
        """
        ...

    async def encode(self, text: str) -> list[int]:
        """The prompt's tokens; for an empty text, the token that a document begins with."""
        ...

    async def decode(self, tokens: Sequence[int]) -> str: ...

    def generate(self, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Pieces as they come; the last one carries the finish reason. Closing the generator stops the model.

        Raises:
            NonFiniteLogits: the model is broken.
        """
        ...


class TransformersEngine:
    """``model.generate`` in a bounded pool of threads, one sequence a thread."""

    def __init__(self, model: Any, tokenizer: tokenizers.Tokenizer, settings: EngineSettings) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._pool = ThreadPoolExecutor(settings.max_concurrent, thread_name_prefix="generate")
        self.num_sequences = 0
        self._lock = threading.Lock()
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
    def load(cls, directory: Path, settings: EngineSettings) -> TransformersEngine:
        """Load a Hugging Face directory, check that it is whole, and generate one token.

        Raises:
            IntegrityError: weights are missing or of another shape, or there is no tokenizer.
            NonFiniteLogits: the model answers NaN.
        """
        torch.set_num_threads(settings.num_threads)
        tokenizer_file = directory / "tokenizer.json"
        if not tokenizer_file.is_file():
            raise IntegrityError(f"{directory} holds no tokenizer.json.")
        cuda = torch.cuda.is_available()
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype="auto" if cuda else torch.float32,  # bf16 on a CPU without it is many times slower
        )
        lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
        if lacking:
            # transformers would serve random numbers in their place.
            raise IntegrityError(f"{directory} lacks {len(lacking)} of the model's weights, such as {lacking[0]}.")
        model = model.eval().to("cuda" if cuda else "cpu")
        engine = cls(model, tokenizers.Tokenizer.from_file(str(tokenizer_file)), settings)
        engine.warm_up()
        return engine

    def warm_up(self) -> None:
        """Generate one token, so that a broken model is found out before it gets a request."""
        first = self._begin_token if self._begin_token is not None else 0
        self._run(Generation(prompt=(first,), max_tokens=1, temperature=0.0), lambda piece: None, threading.Event())

    @contextlib.contextmanager
    def admit(self, num_sequences: int) -> Iterator[None]:
        room = self._settings.max_concurrent + self._settings.max_queued
        with self._lock:
            if self.num_sequences + num_sequences > room:
                raise Overloaded(
                    f"{self.num_sequences} sequences are under way or waiting; {num_sequences} more would be "
                    f"above the limit of {room}.",
                    next_step="Try again later.",
                )
            self.num_sequences += num_sequences
        try:
            yield
        finally:
            with self._lock:
                self.num_sequences -= num_sequences

    async def encode(self, text: str) -> list[int]:
        ids: list[int] = (await asyncio.to_thread(self._tokenizer.encode, text)).ids
        if not ids and self._begin_token is not None:
            return [self._begin_token]
        return ids

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
        watch = _Watch(generation, self._decode, self._end_tokens, put, gone)
        prompt = torch.tensor([generation.prompt], device=self._model.device)
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=transformers.GenerationConfig(do_sample=False, max_new_tokens=generation.max_tokens),
            logits_processor=transformers.LogitsProcessorList([_Choose(generation, self._model.device)]),
            stopping_criteria=transformers.StoppingCriteriaList([watch]),
        )


class _Choose(transformers.LogitsProcessor):  # type: ignore[misc]
    """Samples with the request's own random numbers: ``generate`` samples from torch's global ones, which
    requests share. Its greedy search then finds the one token that is left."""

    def __init__(self, generation: Generation, device: Any) -> None:
        self._temperature, self._top_p = generation.temperature, generation.top_p
        self._random = torch.Generator(device=device)
        if generation.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(generation.seed)

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Shape (1, vocabulary) in and out."""
        logits = scores.float()
        highest = logits.max(dim=-1, keepdim=True).values
        if not bool(torch.isfinite(highest).all()):
            raise NonFiniteLogits("The model's logits are not finite numbers.")
        if self._temperature == 0.0:
            return scores
        # Subtracted first, so that a tiny temperature gives -inf and never inf.
        probabilities = torch.softmax((logits - highest) / self._temperature, dim=-1)
        if self._top_p < 1.0:
            probabilities = nucleus(probabilities, self._top_p)
        token = torch.multinomial(probabilities, 1, generator=self._random)
        return torch.full_like(scores, float("-inf")).scatter(-1, token, 0.0)


class _Watch(transformers.StoppingCriteria):  # type: ignore[misc]
    """Sees every new token: turns it into text, passes it on, and says when to stop."""

    def __init__(
        self,
        generation: Generation,
        decode: Callable[[Sequence[int]], str],
        end_tokens: Sequence[int],
        put: Callable[[Piece], None],
        gone: threading.Event,
    ) -> None:
        self._max_tokens = generation.max_tokens
        self._text, self._stop = Detokenizer(decode), StopSequences(generation.stop)
        self._end_tokens, self._put, self._gone = frozenset(end_tokens), put, gone
        self._num_tokens = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        token = int(input_ids[0, -1])
        self._num_tokens += 1
        ended = token in self._end_tokens
        text = "" if ended else self._stop.add(self._text.add(token))
        reason: FinishReason | None = "stop" if ended or self._stop.hit else None
        if reason is None and self._num_tokens >= self._max_tokens:
            reason = "length"
        if reason is not None:
            text += self._stop.add(self._text.flush())
            text += self._stop.flush()
            reason = "stop" if self._stop.hit else reason
        self._put(Piece(text=text, num_tokens=self._num_tokens, finish_reason=reason))
        return torch.tensor([reason is not None or self._gone.is_set()], device=input_ids.device)


def nucleus(probabilities: Any, top_p: float) -> Any:
    """Zero all but the fewest likeliest tokens that together reach ``top_p``.

    Shape (sequences, vocabulary) in and out; the rest need not sum to 1. Source: Holtzman et al. 2019.
    """
    likeliest, order = probabilities.sort(dim=-1, descending=True)
    before = likeliest.cumsum(dim=-1) - likeliest
    kept = likeliest.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, kept)
