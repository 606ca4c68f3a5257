"""How large a model is: counted by transformers in a child process and remembered, or read from safetensors headers.

Importing this module imports no torch; a count that is in the cache needs no child either.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.errors import IntegrityError, SpecError, TimedOut
from orchestrator.memory import ModelSize
from orchestrator.node_cache import cache_directory
from orchestrator.spec import LoraSpec, canonical_json

AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
"""The transformers class that builds a built-in task's model."""
COUNT_TIMEOUT_S = 300.0  # torch alone takes a minute to import where its bytecode is not compiled
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_FORMAT = "headway/size/2"
_CHILD = Path(__file__).with_name("meta_model.py")
_LENGTH_BYTES = 8
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
_BITS |= {
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A model's size, or why it is not known."""

    size: ModelSize | None
    reason: str = ""


def count_parameters(
    architecture: Mapping[str, Any],
    *,
    vocab_size: int,
    auto_class: str,
    is_pretrained: bool = False,
    lora: LoraSpec | None = None,
    cache: Path | None = None,
    python: str = sys.executable,
    timeout_s: float = COUNT_TIMEOUT_S,
) -> Sizing:
    """The size of the model that transformers makes of ``architecture``, without building it in memory.

    Args:
        architecture: ``model.architecture`` of a run file, or a pretrained model's config.json.
        vocab_size: the tokenizer's, for an architecture that does not set its own.
        auto_class: such as ``AutoModelForCausalLM``; see :data:`AUTO_CLASSES`.
        is_pretrained: whether it is a config.json.
        lora: adapters beside the model's weights, which then count as frozen.
        cache: folder of remembered counts, by default :func:`cache_directory`.
        python: the interpreter whose torch and transformers count.

    Raises:
        SpecError: transformers refuses the architecture, or peft the adapters.
        TimedOut: the count took over ``timeout_s``.
    """
    versions = {name: _version(name) for name in ("torch", "transformers", *(["peft"] if lora else []))}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        needs = f"counting the parameters of {architecture.get('model_type')!r} needs {' and '.join(missing)}"
        return Sizing(size=None, reason=f"{needs}: pip install 'headway[train]'")
    full = {"vocab_size": vocab_size, **architecture}
    adapter = lora.model_dump(mode="json", include={"rank", "target_modules"}) if lora else None
    request = {"architecture": full, "auto_class": auto_class, "is_pretrained": is_pretrained, "lora": adapter}
    key = hashlib.sha256(canonical_json({**request, "versions": versions, "format": _FORMAT})).hexdigest()
    path = (cache or cache_directory()) / "sizes" / f"{key}.json"
    known = _read(path)
    if known is not None:
        return Sizing(size=known)
    answer = _ask_child(request, python=python, timeout_s=timeout_s)
    if isinstance(answer, str):
        return Sizing(size=None, reason=answer)
    if "refused" in answer:
        raise _refusal(full, answer, is_pretrained=is_pretrained)
    size = ModelSize.model_validate(answer)
    _write(path, size)
    return Sizing(size=size)


def header_bytes(first: bytes) -> int:
    """How many bytes from the start of a safetensors file hold its header, told from its first 8.

    Raises:
        IntegrityError: too short, or longer than the format allows.
    """
    if len(first) < _LENGTH_BYTES:
        raise IntegrityError(f"A safetensors file starts with {_LENGTH_BYTES} bytes of length; there are {len(first)}.")
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise IntegrityError(f"A safetensors header of {length:,} bytes is above the format's {MAX_HEADER_BYTES:,}.")
    return _LENGTH_BYTES + length


def from_safetensors_header(*heads: bytes, config: Mapping[str, Any] | None = None) -> ModelSize:
    """The size of a model in safetensors files, from the first bytes of each (format: huggingface.co/docs/safetensors).

    Every tensor counts as trainable; ``config`` is the model's config.json, for the sizes that no tensor tells.

    Raises:
        IntegrityError: not a header, cut off, or one that contradicts itself.
    """
    counts: dict[str, int] = {}
    for head in heads:
        for name, number in _tensors(head).items():
            if name in counts:
                raise IntegrityError(f"The tensor {name!r} is in two safetensors files of one model.")
            counts[name] = number
    fields = dict(config or {})
    return ModelSize(
        num_parameters=sum(counts.values()),
        num_trainable=sum(counts.values()),
        largest_parameter=max(counts.values(), default=0),
        hidden_size=_positive(fields, "hidden_size", "n_embd", "d_model"),
        intermediate_size=_positive(fields, "intermediate_size", "n_inner", "d_ff"),
        num_layers=_positive(fields, "num_hidden_layers", "n_layer", "num_layers"),
        num_attention_heads=_positive(fields, "num_attention_heads", "n_head", "num_heads"),
        vocab_size=_positive(fields, "vocab_size"),
    )


def _tensors(head: bytes) -> dict[str, int]:
    """Elements of each tensor that a header lists."""
    end = header_bytes(head)
    if len(head) < end:
        raise IntegrityError(f"A safetensors header of {end:,} bytes is cut off after {len(head):,}.")
    try:
        header = json.loads(head[_LENGTH_BYTES:end])
        listed = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _elements(name, **entry) for name, entry in listed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise IntegrityError(f"A safetensors header cannot be read: {e}.") from e


def _elements(name: str, *, dtype: str, shape: list[int], data_offsets: list[int]) -> int:
    if any(type(number) is not int or number < 0 for number in [*shape, *data_offsets]):
        raise ValueError(f"{name!r} has a shape or offset that is no natural number")
    start, end = data_offsets
    elements = math.prod(shape)
    if dtype not in _BITS or elements * _BITS[dtype] != 8 * (end - start):
        raise ValueError(f"{name!r} takes {end - start} bytes, which is not {dtype} of shape {shape}")
    return elements


def _positive(fields: Mapping[str, Any], *names: str) -> int | None:
    """The first of ``names`` that holds a positive whole number."""
    found = (fields.get(name) for name in names)
    return next((value for value in found if type(value) is int and value > 0), None)


def _version(package: str) -> str | None:
    """The installed version, without importing the package."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_child(request: dict[str, Any], *, python: str, timeout_s: float) -> dict[str, Any] | str:
    """The child's answer, or why it has none."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    try:
        # -P: the user's working directory may hold a torch/ or a json.py of its own.
        done = subprocess.run(
            [python, "-P", str(_CHILD)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, **quiet},
        )
    except subprocess.TimeoutExpired as e:
        raise TimedOut(
            f"Counting the parameters of model.architecture took over {timeout_s:g} s.",
            next_step="Check its sizes, such as num_hidden_layers.",
        ) from e
    except OSError as e:
        return f"counting the parameters could not start: {e}"
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    except ValueError:
        last = done.stderr.strip().rsplit("\n", 1)[-1][:300]
        return f"counting the parameters failed with exit code {done.returncode}: {last}"
    return answer


def _refusal(architecture: Mapping[str, Any], answer: Mapping[str, Any], *, is_pretrained: bool) -> SpecError:
    field, reason = answer["field"], answer["refused"]
    if field == "lora":
        return SpecError(f"model.lora is refused: {reason}.", next_step="Set model.lora.target_modules to its modules.")
    if is_pretrained:
        return SpecError(
            f"model.pretrained: its config.json is refused: {reason}.",
            next_step="Use a model whose model_type this version of transformers has.",
        )
    where = f"model.architecture.{field}" if field else "model.architecture"
    shown = f" {json.dumps(architecture[field], default=str)[:80]}" if field in architecture else ""
    return SpecError(
        f"{where}:{shown} is refused: {reason}.", next_step="Compare with that config in transformers' documentation."
    )


def _read(path: Path) -> ModelSize | None:
    """A remembered count; one that cannot be read is counted again."""
    try:
        return ModelSize.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(path: Path, size: ModelSize) -> None:
    """Remember a count. Where nothing can be written, it is counted again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
            part.write(size.model_dump_json())
        os.replace(part.name, path)
    except OSError:
        return
