"""From a version's directory to a model that answers, whatever its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from orchestrator.errors import IntegrityError, RunError
from orchestrator.release.versions import Version
from workloads.adapter import is_adapter, load_adapted

CLASSIFICATION_TASK = "sequence-classification"


class NonFiniteLogits(RunError):
    """The model's output is NaN or infinite."""


def classifies(version: Version, directory: Path) -> bool:
    """Whether the version gives classes. A task of one's own is known by the class of its model."""
    if ":" not in version.task:
        return version.task == CLASSIFICATION_TASK
    config = transformers.PreTrainedConfig.get_config_dict(directory, local_files_only=True)[0]
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def load_model(directory: Path, auto_class: str, *, base: Path | None, num_threads: int) -> Any:
    """The model in evaluation mode, on the GPU where there is one.

    Args:
        base: the pretrained model's directory, where ``directory`` holds an adapter alone.

    Raises:
        IntegrityError: weights are missing or of another shape, or an adapter has no base.
    """
    torch.set_num_threads(num_threads)
    cuda = torch.cuda.is_available()
    dtype = "auto" if cuda else "float32"  # bf16 on a CPU without it is many times slower
    if is_adapter(directory):
        model = _load_adapted(directory, base, auto_class, dtype=dtype)
    else:
        model = _load_whole(directory, auto_class, dtype=dtype)
    return model.eval().to("cuda" if cuda else "cpu")


def load_tokenizer(directory: Path) -> Any:
    """The version's tokenizer as transformers has it, with its chat template.

    Raises:
        IntegrityError: there is none.
    """
    if not (directory / "tokenizer.json").is_file():
        raise IntegrityError(f"{directory} holds no tokenizer.json.")
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def load_backend(directory: Path) -> tokenizers.Tokenizer:
    """The version's tokenizer without transformers' settings, which neither cuts nor pads."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _load_whole(directory: Path, auto_class: str, *, dtype: str) -> Any:
    model, info = getattr(transformers, auto_class).from_pretrained(
        directory,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        dtype=dtype,
    )
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lacking:
        # transformers would serve random numbers in their place.
        raise IntegrityError(f"{directory} lacks {len(lacking)} of the model's weights, such as {lacking[0]}.")
    return model


def _load_adapted(directory: Path, base: Path | None, auto_class: str, *, dtype: str) -> Any:
    if base is None:
        raise IntegrityError(f"{directory} holds an adapter alone, and its version names no pretrained model for it.")
    # The base may have a head for other classes, in the place of which the adapter brings its own.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}
    if (directory / "config.json").is_file():  # the classes are nowhere else
        options["config"] = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return load_adapted(directory, base, auto_class, dtype=dtype, **options)
