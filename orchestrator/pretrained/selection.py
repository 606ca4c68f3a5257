"""Which files of a Hugging Face directory are needed, and what a directory must not be. Pure."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import SpecError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHT_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*",
)  # fmt: skip
_CONFIG_FILES = (CONFIG, "generation_config.json")
_CODE_FILES = ("*.py",)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Names of the files that are needed, in order."""

    files: tuple[str, ...]
    """Small ones; with several weight files also the index that says which tensor lies in which."""
    weights: tuple[str, ...]


def select(
    names: Iterable[str], read: Callable[[str], bytes], *, source: str, trust_remote_code: bool = False
) -> Selection:
    """Choose from a directory's own files; those in folders below it are never needed.

    Args:
        read: gives the content of a small file.
        source: what errors call the directory.

    Raises:
        SpecError: it holds no config, or no safetensors weights, or its index names what is not there.
    """
    there = sorted(name for name in names if "/" not in name)
    if CONFIG not in there:
        raise SpecError(
            f"model.pretrained: {source} holds no {CONFIG}.",
            next_step="Name the folder that save_pretrained wrote: config.json, model.safetensors, tokenizer files.",
        )
    wanted = (*_CONFIG_FILES, *TOKENIZER_FILES, *(_CODE_FILES if trust_remote_code else ()))
    files = [name for name in there if _matches(name, wanted) and not _matches(name, _PICKLED)]
    if WEIGHT_INDEX in there:
        weights = sorted(set(weight_map(read(WEIGHT_INDEX), source=f"{source}/{WEIGHT_INDEX}").values()))
        missing = [name for name in weights if name not in there]
        if missing:
            raise SpecError(
                f"model.pretrained: {source}/{WEIGHT_INDEX} names {missing[0]}, which is not there "
                f"({len(missing)} of {len(weights)} weight files are missing).",
                next_step="Was the model copied whole? Fetch it again.",
            )
        return Selection(files=tuple(sorted([*files, WEIGHT_INDEX])), weights=tuple(weights))
    if WEIGHTS in there:
        return Selection(files=tuple(files), weights=(WEIGHTS,))
    raise _no_weights(there, source)


def weight_map(data: bytes, *, source: str) -> dict[str, str]:
    """Tensor → file, as an index says.

    Raises:
        SpecError: it is not one.
    """
    document = _json_object(data)
    found = document.get("weight_map") if document is not None else None
    if not isinstance(found, dict) or not found or not all(_is_weight_name(name) for name in found.values()):
        raise SpecError(
            f"model.pretrained: {source} is no index of safetensors files: its weight_map has to name *.safetensors "
            "files beside it.",
            next_step="Fetch it again, or save the model again with save_pretrained.",
        )
    return found


def require_plain_config(data: bytes, *, source: str) -> None:
    """
    Raises:
        SpecError: it is not a model's config, or that of quantised weights.
    """
    config = _json_object(data)
    if config is None or not isinstance(config.get("model_type"), str):
        raise SpecError(
            f"model.pretrained: {source} is not a model's config: a JSON object with model_type.",
            next_step="Name the folder that save_pretrained wrote.",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise SpecError(
            f"model.pretrained: {source} describes weights quantised by {method}, which cannot be trained from.",
            next_step="Name the model before it was quantised; a GGUF file is converted.",
        )


def is_tokenizer_file(name: str) -> bool:
    return _matches(name, TOKENIZER_FILES)


def _no_weights(there: list[str], source: str) -> SpecError:
    pickled = [name for name in there if _matches(name, _PICKLED)]
    if pickled:
        return SpecError(
            f"model.pretrained: {source} holds its weights only as Python pickle ({', '.join(pickled[:3])}), which can "
            "run code when it is read, and is never read here.",
            next_step="Where you trust it: transformers' from_pretrained(…).save_pretrained(…) writes safetensors. "
            "On the hub, look for a revision that has them.",
        )
    others = [name for name in there if name.endswith((".safetensors", ".gguf"))]
    there_is = f"; it holds {', '.join(others[:3])}" if others else ""
    if any(name.endswith(".gguf") for name in others):
        next_step = "Name one *.gguf file itself, as a path or in S3."
    elif any(name.startswith("adapter_model") for name in others):
        next_step = "These are an adapter's: name the model that it belongs to, or merge them first."
    else:
        next_step = f"The weights are to be {WEIGHTS}, or several files and {WEIGHT_INDEX}."
    return SpecError(
        f"model.pretrained: {source} holds neither {WEIGHTS} nor {WEIGHT_INDEX}{there_is}.", next_step=next_step
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_weight_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
