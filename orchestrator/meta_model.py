"""The child process of :mod:`orchestrator.sizing`: builds a model without memory and counts its parameters.

Run by its path, with a request as JSON on stdin and the answer as JSON in the last line of stdout. It imports
nothing of Headway, so that neither an installation nor the working directory decides what it finds.

Request: ``{"architecture": {...}, "auto_class": "AutoModelForCausalLM", "is_pretrained": false, "lora": null}``, where
lora may be ``{"rank": 16, "target_modules": [...] or "all-linear"}``. Answer: the fields of ``ModelSize``, or
``{"refused": reason, "field": name or ""}`` where transformers does not take the architecture, or peft the adapter.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from typing import Any


class Refused(Exception):
    def __init__(self, reason: str, *, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


def count(
    architecture: dict[str, Any], auto_class: str, *, is_pretrained: bool = False, lora: dict[str, Any] | None = None
) -> dict[str, int | None]:
    """The size of the model that ``auto_class`` makes of ``architecture``, built on torch's meta device.

    Args:
        is_pretrained: the architecture is a model's config.json, which may hold fields that its class passes over.
    """
    import torch
    import transformers

    config = _config_of(transformers, architecture) if is_pretrained else checked_config(transformers, architecture)
    try:
        with torch.device("meta"):
            model = getattr(transformers, auto_class).from_config(config)
        text, output = config.get_text_config(), model.get_output_embeddings()
    except Exception as e:  # transformers raises whatever a bad field runs into
        raise Refused(_one_line(e)) from e
    if lora is not None:
        model = _adapted(model, auto_class, lora)
    parameters = list(model.parameters())
    return {
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "num_trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "largest_parameter": max((parameter.numel() for parameter in parameters), default=0),
        "hidden_size": _number(text, "hidden_size"),
        "intermediate_size": _number(text, "intermediate_size"),
        "num_layers": _number(text, "num_hidden_layers"),
        "num_attention_heads": _number(text, "num_attention_heads"),
        "vocab_size": None if output is None else _number(text, "vocab_size"),  # a classifier has no such logits
    }


def _config_of(transformers: Any, architecture: dict[str, Any]) -> Any:
    """The transformers config of a config.json.

    Raises:
        Refused: transformers does not take it.
    """
    fields = dict(architecture)
    model_type = str(fields.pop("model_type", ""))
    if model_type not in transformers.CONFIG_MAPPING:
        raise Refused(f"transformers {transformers.__version__} has no architecture {model_type!r}", field="model_type")
    try:
        return transformers.CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as e:
        raise Refused(_one_line(e)) from e


def _adapted(model: Any, auto_class: str, lora: dict[str, Any]) -> Any:
    """The model with peft's adapters, the rest frozen.

    Raises:
        Refused: peft finds none of the modules.
    """
    import peft
    import torch

    config = peft.LoraConfig(
        r=lora["rank"],
        target_modules=lora["target_modules"],
        task_type="SEQ_CLS" if auto_class == "AutoModelForSequenceClassification" else None,
        init_lora_weights=False,
    )
    try:
        with torch.device("meta"):
            return peft.get_peft_model(model, config)
    except Exception as e:
        raise Refused(_one_line(e), field="lora") from e


def checked_config(transformers: Any, architecture: dict[str, Any]) -> Any:
    """The transformers config, refusing what transformers would pass over in silence.

    Raises:
        Refused: transformers does not take it; ``reason`` says why, ``field`` which one where that is known.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type")
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        hint = _did_you_mean(model_type, list(known))
        raise Refused(f"transformers {transformers.__version__} has no such architecture{hint}", field="model_type")
    try:
        config = transformers.AutoConfig.for_model(model_type, **fields)
        plain = transformers.AutoConfig.for_model(model_type)
    except Exception as e:
        raise Refused(_one_line(e)) from e
    # A name that no config class knows ends up as a plain attribute that no model ever reads.
    for name in fields:
        if name in vars(config) and name not in vars(plain) and name not in type(config).attribute_map:
            hint = _did_you_mean(name, [*vars(plain), *type(config).attribute_map])
            raise Refused(f"a {model_type} config has no such field{hint}", field=name)
    return config


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}" if close else ""


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if type(value) is int and value > 0 else None


def _one_line(error: Exception) -> str:
    """transformers' reason without the wrapping of its validators and without lists of all architectures."""
    if isinstance(error, ZeroDivisionError | KeyError):
        return f"transformers fails with {type(error).__name__}: {error}"
    text = re.split(r"\n\s*Model type should be one of", str(error))[0]
    text = re.sub(r"^.*[Vv]alidation error for [^\n]*\n\s*\w+: ", "", text)
    return " ".join(text.split()).rstrip(".")[:300]


def main() -> None:
    request = json.load(sys.stdin)
    try:
        answer: dict[str, Any] = dict(count(**request))
    except Refused as e:
        answer = {"refused": e.reason, "field": e.field}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
