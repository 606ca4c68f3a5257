"""Tasks: one file per model family. Found by name here, or as ``module:Class`` in the working directory."""

from __future__ import annotations

import importlib
from typing import Any

from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import SpecError
from orchestrator.spec import RunSpec, SampleKind
from workloads.tasks.base import Batch, Samples, Task, TaskContext
from workloads.tasks.base_context import BaseContext

_BUILT_IN = {
    "causal-lm": "workloads.tasks.causal_lm:CausalLM",
    "sequence-classification": "workloads.tasks.sequence_classification:SequenceClassification",
}
_KINDS: dict[SampleKind, str] = {"stream": "plain text", "packed": "conversations", "labelled": "labelled texts"}

__all__ = ["BaseContext", "Batch", "Samples", "Task", "TaskContext", "check_task", "load_task", "task_of"]


def load_task(name: str, context: TaskContext) -> Task:
    """The task that a run file names.

    Raises:
        SpecError: no such task, or the module does not hold a Task of that name.
    """
    module_name, _, class_name = (name if ":" in name else _BUILT_IN.get(name, "")).partition(":")
    if not module_name:
        raise SpecError(
            f"task: there is no task {name!r}; built in are {', '.join(_BUILT_IN)}.",
            next_step="For your own, write module:Class with module.py in the working directory.",
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        raise SpecError(
            f"task: {name!r} cannot be imported: {e}.",
            next_step=f"Submit from the directory that holds {module_name.split('.')[0]}.py.",
        ) from e
    except (ImportError, SyntaxError) as e:
        raise SpecError(f"task: importing {name!r} failed: {type(e).__name__}: {e}.") from e
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise SpecError(f"task: {module_name} has no class {class_name} that extends workloads.tasks.Task.")
    return found(context)


def task_of(spec: RunSpec, dataset: DatasetManifest, base: BaseContext | None = None) -> Task:
    """The run's task, in its context.

    Args:
        base: the pretrained model, where the run starts from one.

    Raises:
        SpecError: the task takes no samples of the dataset's kind, or its tokenizer is not one for the model.
    """
    tokenizer = dataset.tokenizer
    context = TaskContext(
        architecture=spec.model.architecture,
        base=base,
        lora=spec.model.lora,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        pad_token_id=tokenizer.pad_id,
        sequence_length=spec.data.sequence_length,
        sample_kind=dataset.kind,
        classes=dataset.classes,
    )
    task = load_task(spec.task, context)
    require_kind(spec, task, dataset.kind)
    if base is not None:
        _require_tokenizer_of(base, dataset)
    else:
        _require_embeddings(spec.model.architecture or {}, dataset)
    return task


def check_task(spec: RunSpec, base: BaseContext | None = None) -> None:
    """Find the run's task and its model's config before anything is done.

    Args:
        base: the pretrained model once it is in the store. Without it, what can be said of the run file alone is
            checked.

    Raises:
        SpecError: there is no such task, it takes no such data, or transformers does not take the model.
    """
    context = TaskContext(
        architecture=spec.model.architecture,
        base=base,
        lora=spec.model.lora,
        vocab_size=0 if base is not None else spec.data.vocab_size,  # the dataset's own is known after prepare
        end_of_text_id=0,
        sequence_length=spec.data.sequence_length,
        sample_kind=spec.data.kind,
    )
    task = load_task(spec.task, context)
    if spec.data.dataset is None:  # a prepared dataset says itself what it holds
        require_kind(spec, task, spec.data.kind)
    if spec.model.pretrained is None or base is not None:
        task.check()


def require_kind(spec: RunSpec, task: Task, kind: SampleKind) -> None:
    """
    Raises:
        SpecError: the task does not take samples of ``kind``.
    """
    if kind in task.sample_kinds:
        return
    next_steps = []
    if "labelled" in task.sample_kinds:
        next_steps.append("Set data.label_field to the field that holds the class, with data.format jsonl or parquet.")
    elif kind == "labelled":
        next_steps.append("Remove data.label_field, or set task to sequence-classification.")
    elif kind == "packed":
        next_steps.append("Set data.format to text, jsonl or parquet, or task to causal-lm.")
    wanted = " or ".join(_KINDS[known] for known in task.sample_kinds)
    raise SpecError(f"task: {spec.task} takes {wanted}, and data gives {_KINDS[kind]}.", next_step=" ".join(next_steps))


def _require_tokenizer_of(base: BaseContext, dataset: DatasetManifest) -> None:
    """A pretrained tokenizer is kept whole; one that was trained on a source is tokenizer.json alone."""
    if not dataset.tokenizer.files:
        raise SpecError(
            f"data.dataset: {dataset.name}@{dataset.fingerprint} was prepared with a tokenizer of its own, whose ids "
            f"mean nothing to {base.manifest.uri}.",
            next_step="Give data.train, the source, so that it is prepared with the pretrained model's tokenizer.",
        )


def _require_embeddings(architecture: dict[str, Any], dataset: DatasetManifest) -> None:
    rows, wanted = architecture.get("vocab_size"), dataset.tokenizer.vocab_size
    if isinstance(rows, int) and rows < wanted:
        raise SpecError(
            f"model.architecture.vocab_size: {rows} is below the {wanted} tokens of the tokenizer that "
            f"{dataset.name}@{dataset.fingerprint} was prepared with.",
            next_step="Leave vocab_size out, which follows the tokenizer then, or set at least as many.",
        )
