"""What turns texts into classes: the :class:`Classifier` protocol, and a transformers model behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers
import torch

from workloads.serve.admission import Admission, EngineSettings
from workloads.serve.loading import NonFiniteLogits, load_backend, load_model, load_tokenizer
from workloads.tasks.base_config import position_limit

_BATCH_TEXTS = 16  # in one forward pass


@runtime_checkable
class Classifier(Protocol):
    """One loaded version that classifies, as the API sees it."""

    labels: tuple[str, ...]
    context_tokens: int
    """The most tokens that a text may have."""

    @property
    def num_sequences(self) -> int:
        """Texts admitted now: under way or waiting."""
        ...

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        """Reserve room for a request's texts while the context lasts.

        Raises:
            Overloaded: too many are waiting already.
        """
        ...

    async def encode(self, text: str) -> list[int]:
        """The text's tokens, with those that the tokenizer puts around a text."""
        ...

    async def classify(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The probability of each label, text by text.

        Raises:
            NonFiniteLogits: the model is broken.
        """
        ...


class TransformersClassifier:
    """Batches of texts of like length in a bounded pool of threads."""

    def __init__(self, model: Any, tokenizer: tokenizers.Tokenizer, settings: EngineSettings, *, pad_id: int) -> None:
        self._model, self._tokenizer, self._pad_id = model, tokenizer, pad_id
        self._pool = ThreadPoolExecutor(-(-settings.max_batch // _BATCH_TEXTS), thread_name_prefix="classify")
        self._admission = Admission(settings)
        names = model.config.id2label
        self.labels = tuple(str(names[number]) for number in range(model.config.num_labels))
        self.context_tokens: int = position_limit(model.config) or 2**20

    @classmethod
    def load(cls, directory: Path, settings: EngineSettings, *, base: Path | None = None) -> TransformersClassifier:
        """Load a Hugging Face directory, check that it is whole, and classify one token.

        Args:
            base: the pretrained model's directory, where ``directory`` holds an adapter alone.

        Raises:
            IntegrityError: weights are missing or of another shape, or there is no tokenizer.
            NonFiniteLogits: the model answers NaN.
        """
        tokenizer = load_tokenizer(directory)
        auto_class = "AutoModelForSequenceClassification"
        model = load_model(directory, auto_class, base=base, num_threads=settings.num_threads)
        pad = model.config.get_text_config().pad_token_id
        if pad is None:
            pad = tokenizer.pad_token_id
        classifier = cls(model, load_backend(directory), settings, pad_id=0 if pad is None else int(pad))
        classifier.warm_up()
        return classifier

    def warm_up(self) -> None:
        """Classify one token, so that a broken model is found out before it gets a request."""
        self._run([[self._pad_id]])

    @property
    def num_sequences(self) -> int:
        return self._admission.num_sequences

    def admit(self, num_sequences: int) -> AbstractContextManager[None]:
        return self._admission.admit(num_sequences)

    async def encode(self, text: str) -> list[int]:
        encoding: Any = await asyncio.to_thread(self._tokenizer.encode, text)
        return list(encoding.ids)

    async def classify(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        loop = asyncio.get_running_loop()
        by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # so that little is padding
        batches = [by_length[start : start + _BATCH_TEXTS] for start in range(0, len(texts), _BATCH_TEXTS)]
        answers = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._run, [texts[index] for index in batch]) for batch in batches)
        )
        found: list[list[float]] = [[] for _ in texts]
        for batch, answer in zip(batches, answers, strict=True):
            for index, probabilities in zip(batch, answer, strict=True):
                found[index] = probabilities
        return found

    def _run(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """One forward pass over texts of one token or more, in this thread."""
        longest = max(len(text) for text in texts)
        ids = torch.full((len(texts), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(list(text))
            mask[row, : len(text)] = 1
        with torch.inference_mode():
            device = self._model.device
            logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float()
        if not bool(torch.isfinite(logits).all()):
            raise NonFiniteLogits("The model's logits are not finite numbers.")
        probabilities: list[list[float]] = torch.softmax(logits, dim=-1).tolist()
        return probabilities
