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
from orchestrator.spec import LoraSpec, SampleKind
from workloads.tasks import base_config, tokenizer_files
from workloads.tasks.base_context import BaseContext

_MIN_POSITIONS = 512  # so that a model trained on short samples still serves longer prompts

Batch = dict[str, Tensor]
"""What the model's loss takes; every tensor's first dimension is B, so that it can be moved as a whole."""
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task may know about its run."""

    vocab_size: int
    """Ids that the tokenizer gives are below it."""
    end_of_text_id: int
    sequence_length: int
    architecture: dict[str, Any] | None = None
    """In the words of a transformers config; None where the run starts from ``base``."""
    base: BaseContext | None = None
    lora: LoraSpec | None = None
    sample_kind: SampleKind = "stream"
    classes: tuple[str, ...] = ()
    """Of labelled samples, by the number that the rows hold."""
    pad_token_id: int | None = None
    """What fills up rows; None where it is ``end_of_text_id``."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Rows as the reader gives them.

    The last ``len(rows) - num_real`` rows pad an uneven share: they must not count in the loss.
    """

    rows: Mapping[str, npt.NDArray[Any]]
    """What :meth:`orchestrator.dataset.reader.TokenReader.rows` gives, by name; the first dimension of every array is
    B. All kinds hold ``tokens``."""
    num_real: int
    row_rng: Callable[[int], np.random.Generator]
    """Random numbers for row ``b`` that depend on (seed, step, position in the global batch) only, so that noise and
    masks are the same at any world size."""

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids, shape (B, L + 1): the inputs and, one further on, the targets. Of labelled samples, (B, L)."""
        return self.rows["tokens"]


class Task(ABC):
    """One model family. An instance lives in each process that trains, evaluates or exports."""

    auto_class: str = "AutoModelForCausalLM"
    """The transformers class that builds and loads the model."""
    sample_kinds: tuple[SampleKind, ...] = ("stream",)
    """The kinds of samples that :meth:`collate` takes."""
    lora_task_type: str = ""
    """What peft calls this task; empty where it has no name for it."""

    def __init__(self, context: TaskContext) -> None:
        self.context = context

    def check(self) -> None:
        """Refuse what cannot be trained, before anything is done.

        Raises:
            SpecError: transformers does not take the model, or the samples do not fit it.
        """
        config, base = self.model_config(), self.context.base
        if base is not None:
            size = max(base_config.tokenizer_size(base), self.context.vocab_size)
            base_config.require_embedding(config, size, source=base.manifest.uri)
            base_config.require_positions(config, self.context.sequence_length)

    def build_model(self) -> nn.Module:
        """The model in fp32. Called with the run's seed set, the same on every rank.

        From scratch its weights are random. From a base they are not there yet: the checkpoint package fills in what
        each rank keeps.

        Raises:
            SpecError: the base does not hold the model's weights, or LoRA's targets are not in the model.
        """
        import transformers

        if self.context.base is not None:
            from workloads import pretrained_model

            return pretrained_model.build(self)
        config = self.model_config()
        model: nn.Module = getattr(transformers, self.auto_class).from_config(config, dtype="float32")
        return model

    def model_config(self) -> Any:
        """The transformers config: the base's, or the run file's architecture, its vocabulary following the tokenizer.

        Raises:
            SpecError: transformers does not take it.
        """
        if self.context.base is not None:
            return base_config.load_config(self.context.base)
        import transformers

        architecture = self.context.architecture or {}
        known = base_config.field_names(architecture.get("model_type"))
        tokens = {name: token for name, token in self.special_tokens().items() if token is not None or name in known}
        implied: dict[str, Any] = {"vocab_size": self.context.vocab_size, **tokens}
        if "max_position_embeddings" in known:  # a recurrent model counts none
            implied["max_position_embeddings"] = max(self.context.sequence_length, _MIN_POSITIONS)
        try:
            return checked_config(transformers, {**implied, **architecture})
        except Refused as e:
            field = f"model.architecture.{e.field}" if e.field else "model.architecture"
            raise SpecError(f"{field}: {e.reason}.") from e

    @property
    def remote_code(self) -> dict[str, bool]:
        """Whether transformers may run code that lies beside the weights, as its functions take it."""
        base = self.context.base
        return {"trust_remote_code": base is not None and base.trust_remote_code}

    def may_be_new(self, model: nn.Module, name: str) -> bool:
        """Whether a parameter that the base does not hold, or holds in another shape, starts from random numbers.
        Where it may not, the run is refused."""
        return False

    def head_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Names of modules outside the base that are trained whole beside LoRA's adapters."""
        return ()

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
        """What the evaluation adds up over the held-out split. A classifier adds ``correct`` to the loss, say.

        Called without gradients.
        """
        return {"loss": float(self.loss_sum(model, batch))}

    def answers(self, model: nn.Module, samples: Samples, decode: Decode) -> list[dict[str, str]]:
        """What the exported model makes of some held-out samples, for a run's report; nothing unless a task says so.

        Text that the model went on with is ``{"prompt", "completion", "expected"}``, a class that it gave
        ``{"text", "predicted", "expected"}``. Whatever is raised here costs the answers alone. It should take seconds.

        Args:
            decode: token ids to text.
        """
        return []

    @abstractmethod
    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        """The evaluation's figures, among them ``loss``, which the gate compares.

        Args:
            sums: :meth:`eval_sums` over the whole held-out split.
            num_targets: :meth:`num_targets` over it.
            split: its size, for figures such as bits per byte.
        """

    def load_model(self, directory: Path, base: Path | None = None) -> nn.Module:
        """An exported model, in fp32.

        Args:
            base: the pretrained model's directory, where ``directory`` holds an adapter alone.
        """
        import transformers

        if base is not None:
            from workloads.adapter import load_adapted

            # The base may have a head of another size, in the place of which the adapter brings its own.
            options: dict[str, Any] = {"config": self.model_config(), "ignore_mismatched_sizes": True}
            options |= self.remote_code
            return load_adapted(directory, base, self.auto_class, **options)
        transformers.utils.logging.disable_progress_bar()
        model: nn.Module = getattr(transformers, self.auto_class).from_pretrained(
            directory, use_safetensors=True, dtype="float32", **self.remote_code
        )
        return model

    def save_assets(self, directory: Path, *, tokenizer: Path, dtype: str) -> None:
        """Everything of a Hugging Face directory but the weights.

        Args:
            tokenizer: the dataset's tokenizer.json; a pretrained one's other files lie beside it.
            dtype: of the weights, in the run file's words.
        """
        self.save_config(directory, dtype=dtype)
        self.save_tokenizer(directory, tokenizer=tokenizer)

    def save_config(self, directory: Path, *, dtype: str) -> None:
        """The model's config, and how the base's authors would generate with it."""
        config = self.model_config()
        config.architectures = [self.model_class_name()]
        config.dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
        config.save_pretrained(directory)
        if self.context.base is not None:
            base_config.copy_beside(self.context.base, directory)

    def save_tokenizer(self, directory: Path, *, tokenizer: Path) -> None:
        """The whole tokenizer, with its chat template where it has one."""
        base = self.context.base
        if (tokenizer.parent / tokenizer_files.CONFIG).is_file():
            tokenizer_files.copy_tokenizer(tokenizer.parent, directory)
        elif base is not None:
            tokenizer_files.copy_tokenizer(base.directory, directory)
        else:
            limit = base_config.position_limit(self.model_config())
            tokenizer_files.save_trained(tokenizer, directory, max_tokens=limit or self.context.sequence_length)

    def model_class_name(self) -> str:
        """The class that transformers maps this architecture to, such as LlamaForCausalLM.

        Raises:
            SpecError: it has none for this task.
        """
        import transformers

        own_class = self._own_class()
        if own_class is not None:
            return own_class
        config = self.model_config()
        mapping = getattr(transformers, self.auto_class)._model_mapping
        if type(config) not in mapping:
            field = "model.architecture.model_type" if self.context.base is None else "model.pretrained"
            raise SpecError(
                f"{field}: transformers has no {self.auto_class.removeprefix('AutoModelFor')} model of the type "
                f"{config.model_type}.",
                next_step="Use another model, or a task that this one is for.",
            )
        return str(mapping[type(config)].__name__)

    def _own_class(self) -> str | None:
        """The model's class in code that came with the base and may run; None where it is one of transformers."""
        names = getattr(self.model_config(), "auto_map", None) or {}
        if not self.remote_code["trust_remote_code"] or self.auto_class not in names:
            return None
        return str(names[self.auto_class]).rpartition(".")[2]
