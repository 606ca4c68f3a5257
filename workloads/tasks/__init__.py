"""Tasks: one file per model family. Found by name here, or as ``module:Class`` in the working directory."""

from __future__ import annotations

import importlib

from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import SpecError
from orchestrator.spec import RunSpec
from workloads.tasks.base import Batch, Samples, Task, TaskContext

_BUILT_IN = {"causal-lm": "workloads.tasks.causal_lm:CausalLM"}

__all__ = ["Batch", "Samples", "Task", "TaskContext", "check_task", "load_task", "task_of"]


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


def task_of(spec: RunSpec, dataset: DatasetManifest) -> Task:
    """The run's task, in its context."""
    tokenizer = dataset.tokenizer
    context = _context(spec, vocab_size=tokenizer.vocab_size, end_of_text_id=tokenizer.end_of_text_id)
    return load_task(spec.task, context)


def check_task(spec: RunSpec) -> None:
    """Find the run's task and its model's config before anything is done.

    Raises:
        SpecError: there is no such task, or transformers does not take the architecture.
    """
    vocab_size = spec.data.vocab_size  # the tokenizer's own is known after prepare
    load_task(spec.task, _context(spec, vocab_size=vocab_size, end_of_text_id=0)).model_config()


def _context(spec: RunSpec, *, vocab_size: int, end_of_text_id: int) -> TaskContext:
    return TaskContext(
        architecture=spec.model.architecture,
        vocab_size=vocab_size,
        end_of_text_id=end_of_text_id,
        sequence_length=spec.data.sequence_length,
    )
