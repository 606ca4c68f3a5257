"""Models that were exported as an adapter alone: the pretrained weights that they need, and both as one model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_FILE, BaseReference, plain_name
from orchestrator.checkpoint.base import open_base
from orchestrator.errors import IntegrityError
from orchestrator.release.download import download_cached
from orchestrator.release.versions import VersionFile
from orchestrator.store import Store


def is_adapter(directory: Path) -> bool:
    """Whether an exported model's directory holds an adapter alone."""
    return (directory / ADAPTER_CONFIG).is_file()


def load_adapted(directory: Path, base: Path, auto_class: str, *, dtype: str = "float32", **options: Any) -> nn.Module:
    """The pretrained model of ``base`` with the adapter of ``directory`` merged into its weights.

    Args:
        auto_class: the transformers class that loads it.
        options: further ones of its ``from_pretrained``, such as ``num_labels``.

    Raises:
        IntegrityError: the adapter is one for another model.
    """
    import peft
    import safetensors.torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, found = getattr(transformers, auto_class).from_pretrained(
        base, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
    )
    weights = safetensors.torch.load_file(directory / ADAPTER_FILE)
    _require_whole(found, weights, directory, base)
    config = peft.PeftConfig.from_pretrained(str(directory))
    config.base_model_name_or_path = model.name_or_path  # the store's copy: peft warns of any other name
    try:
        # Not by PeftModel.from_pretrained, which falls back to pickled weights.
        adapted = peft.get_peft_model(model, config)
        unknown = peft.set_peft_model_state_dict(adapted, weights).unexpected_keys
    except (ValueError, RuntimeError) as e:  # modules that are not there, or are of another shape
        raise _other_base(directory, base, str(e).partition("\n")[0]) from e
    if unknown:
        raise _other_base(directory, base, f"there is no place for {unknown[0]}")
    merged: nn.Module = adapted.merge_and_unload()  # type: ignore[operator]
    return merged


def _require_whole(found: dict[str, Any], weights: Collection[str], directory: Path, base: Path) -> None:
    """Of what the base lacks, transformers would take random numbers: only what the adapter brings may be missing."""
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    lacking = {*found["missing_keys"], *mismatched} - {plain_name(name) for name in weights}
    if lacking:
        raise _other_base(directory, base, f"neither holds {min(lacking)} in the model's shape")


def _other_base(directory: Path, base: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{directory / ADAPTER_FILE} is no adapter of the model in {base}: {reason}.",
        next_step="Load it on the model that its version, or its checkpoint, refers to.",
    )


def download_base(store: Store, reference: BaseReference, cache_directory: Path) -> Path:
    """The pretrained model that an adapter needs as a whole Hugging Face directory on this node.

    Raises:
        IntegrityError: it is gone from the store, another, or damaged. EnvironmentUnusable: the disk is full.
    """
    manifest = open_base(store, reference).manifest
    files = {
        name: VersionFile(size_bytes=file.size_bytes, sha256=file.sha256)
        for part in (manifest.files, manifest.weights)
        for name, file in part.items()
    }
    directory = cache_directory / "pretrained" / f"{manifest.fingerprint}-{manifest.digest[:16]}"
    return download_cached(store, manifest.prefix, files, directory)
