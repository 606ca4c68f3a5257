"""What a task has to say: how to build its model, what its loss is, how it is judged, and what is exported.

Shape suffixes: B rows of a batch, L sequence_length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from orchestrator.dataset.format import Split
from orchestrator.errors import SpecError
from orchestrator.meta_model import Refused, checked_config

_MIN_POSITIONS = 512  # so that a model trained on short samples still serves longer prompts

Batch = dict[str, Tensor]
"""What the model's loss takes; every tensor's first dimension is B, so that it can be moved as a whole."""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task may know about its run."""

    architecture: dict[str, Any]
    vocab_size: int
    end_of_text_id: int
    sequence_length: int


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows as the reader gives them.

    The last ``len(rows) - num_real`` rows pad an uneven share: they must not count in the loss.
    """

    rows: Mapping[str, npt.NDArray[Any]]
    """What the dataset holds, by name; the first dimension of every array is B. Token shards hold ``tokens``."""
    num_real: int
    row_rng: Callable[[int], np.random.Generator]
    """Random numbers for row ``b`` that depend on (seed, step, position in the global batch) only, so that noise and
    masks are the same at any world size."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids, shape (B, L + 1): the inputs and, one further on, the targets."""
        return self.rows["tokens"]


class Task(ABC):
    """One model family. An instance lives in each process that trains, evaluates or exports."""

    auto_class: str = "AutoModelForCausalLM"
    """The transformers class that builds and loads the model."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def build_model(self) -> nn.Module:
        """The model with random weights, in fp32. Called with the run's seed set, the same on every rank."""
        import transformers

        config = self.model_config()
        model: nn.Module = getattr(transformers, self.auto_class).from_config(config, dtype="float32")
        return model

    def model_config(self) -> Any:
        """The transformers config: the run file's architecture, its vocabulary following the tokenizer.

        Raises:
            SpecError: transformers does not take the architecture.
        """
        import transformers

        fields = {
            "vocab_size": self.context.vocab_size,
            "max_position_embeddings": max(self.context.sequence_length, _MIN_POSITIONS),
            **self.special_tokens(),
            **self.context.architecture,
        }
        try:
            return checked_config(transformers, fields)
        except Refused as e:
            field = f"model.architecture.{e.field}" if e.field else "model.architecture"
            raise SpecError(f"{field}: {e.reason}.") from e

    def special_tokens(self) -> dict[str, int | None]:
        """Ids that the model's config carries."""
        # No pad token: transformers would keep the embedding of whatever stands in for it at zero.
        return {"bos_token_id": None, "eos_token_id": self.context.end_of_text_id, "pad_token_id": None}

    @abstractmethod
    def collate(self, samples: Samples) -> Batch:
        """Rows as the model takes them."""

    @abstractmethod
    def num_targets(self, batch: Batch) -> int:
        """How many targets count in the loss; the global sum of these normalises it."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over the targets that count, a scalar in fp32."""

    def eval_sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """What the evaluation adds up over the held-out split. A classifier adds ``correct`` to the loss, say."""
        return {"loss": float(self.loss_sum(model, batch))}

    @abstractmethod
    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        """The evaluation's figures, among them ``loss``, which the gate compares.

        Args:
            sums: :meth:`eval_sums` over the whole held-out split.
            num_targets: :meth:`num_targets` over it.
            split: its size, for figures such as bits per byte.
        """

    def load_model(self, directory: Path) -> nn.Module:
        """An exported model, in fp32."""
        import transformers

        transformers.utils.logging.disable_progress_bar()
        model: nn.Module = getattr(transformers, self.auto_class).from_pretrained(
            directory, use_safetensors=True, dtype="float32"
        )
        return model

    def save_assets(self, directory: Path, *, tokenizer: Path, dtype: str) -> None:
        """Everything of a Hugging Face directory but the weights: config, tokenizer."""
        import transformers

        config = self.model_config()
        config.architectures = [self.model_class_name()]
        config.dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
        config.save_pretrained(directory)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer),
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=int(getattr(config, "max_position_embeddings", self.context.sequence_length)),
            clean_up_tokenization_spaces=False,
        )
        fast.save_pretrained(directory)

    def model_class_name(self) -> str:
        """The class that transformers maps this architecture to, such as LlamaForCausalLM."""
        import transformers

        mapping = getattr(transformers, self.auto_class)._model_mapping
        return str(mapping[type(self.model_config())].__name__)
