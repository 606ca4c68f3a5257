"""A pretrained model before it holds its weights, with LoRA's adapters beside them where the run asks for them.

No rank reads, or holds, more of the weights than ZeRO leaves to it. So the model is built with parameters whose memory
is never touched, and :func:`orchestrator.checkpoint.resume.load_base` fills each rank's part once it is cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from orchestrator.checkpoint.adapter import LoraPair, plain_name
from orchestrator.checkpoint.base import Origin
from orchestrator.errors import SpecError
from orchestrator.pretrained.format import BaseManifest
from orchestrator.spec import LoraSpec

if TYPE_CHECKING:
    from workloads.tasks.base import Task

_ADAPTER = "default"
_NUM_NAMED = 8  # modules or tensors that an error names


def build(task: Task) -> nn.Module:
    """The task's pretrained model. Every parameter that the base holds is unfilled; what it lacks, and LoRA's adapters,
    are initialised from torch's seed, the same on every rank.

    Raises:
        SpecError: as :func:`check`.
    """
    drawn = torch.get_rng_state()  # the adapters start alike whatever is drawn while the model is built
    model = _skeleton(task)
    lacking = _lacking(model, task)
    _allocate(model)
    torch.set_rng_state(drawn)
    _initialise(model, lacking)
    if task.context.lora is None:
        return model
    torch.set_rng_state(drawn)
    return _with_lora(model, task.context.lora, task)


def check(task: Task) -> None:
    """Find out whether :func:`build` would succeed, in little memory and time.

    Raises:
        SpecError: the base lacks tensors of the model, or ``model.lora.target_modules`` names modules that it has not.
    """
    model = _skeleton(task)
    _lacking(model, task)
    if task.context.lora is not None:
        _require_targets(model, task.context.lora)


def is_whole(task: Task) -> bool:
    """Whether the base holds all of the task's model, so that it can do the task before it is trained."""
    return not _lacking(_skeleton(task), task)


def origin_of(model: nn.Module, manifest: BaseManifest) -> Origin:
    """Where the parameters of a model that :func:`build` made come from. To be asked before its engine cuts them."""
    tensors = {name: found for name, _, found in _lookup(model, manifest) if found is not None}
    return Origin(base=manifest.reference, tensors=tensors, lora=dict(_pairs(model)))


def adapter_config(task: Task, *, base_name: str) -> Any:
    """The peft config of the task's adapter, as its files have it.

    Args:
        base_name: what peft is to load as the base model: the run file's ``model.pretrained``.
    """
    assert task.context.lora is not None
    config = _lora_config(_skeleton(task), task.context.lora, task)
    config.base_model_name_or_path, config.revision = _hub_name(base_name)
    config.inference_mode = True
    return config


def _hub_name(uri: str) -> tuple[str, str | None]:
    """A pretrained model as peft loads it: one on the hub by repository and commit, any other by its address."""
    if not uri.startswith("hf://"):
        return uri, None
    name, _, commit = uri.removeprefix("hf://").partition("@")
    return name, commit


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are built within have their parameters on torch's meta device; their buffers are real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def _skeleton(task: Task) -> nn.Module:
    import transformers

    with without_weights():
        model: nn.Module = getattr(transformers, task.auto_class).from_config(
            task.model_config(), dtype="float32", **task.remote_code
        )
    return model


def _lacking(model: nn.Module, task: Task) -> list[str]:
    """Parameters that the base does not hold, all of which the task lets start from random numbers.

    Raises:
        SpecError: there are others.
    """
    base = task.context.base
    assert base is not None
    lacking = [name for name, _, found in _lookup(model, base.manifest) if found is None]
    refused = [name for name in lacking if not task.may_be_new(model, name)]
    if refused:
        raise SpecError(
            f"model.pretrained: {base.manifest.uri} does not hold {_some(refused)} in the shape that "
            f"{type(model).__name__} needs.",
            next_step="Name a directory that this version of transformers' save_pretrained wrote. Models whose weights "
            "it regroups while loading (mixtures of experts) are not supported.",
        )
    return lacking


def _allocate(model: nn.Module) -> None:
    """Give each parameter memory of its own, which takes no page until it is written. Tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                )
            setattr(module, name, made[parameter])


def _lookup(model: nn.Module, manifest: BaseManifest) -> Iterator[tuple[str, nn.Parameter, str | None]]:
    """Each parameter's first name, itself, and the base's tensor that holds it, None where none does."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = getattr(inner, "base_model_prefix", "")
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, found in names.items():
        candidates = (stored for name in found for stored in _stored_names(plain_name(name), prefix))
        yield found[0], parameter, _first(candidates, manifest, tuple(parameter.shape))


def _first(candidates: Iterable[str], manifest: BaseManifest, shape: tuple[int, ...]) -> str | None:
    for name in candidates:
        if name in manifest.tensors and tuple(manifest.tensors[name].shape) == shape:
            return name
    return None


def _stored_names(name: str, prefix: str) -> Iterator[str]:
    """What a parameter may be called in the files: with or without the name under which a model with a head holds the
    rest, and a norm's in the words of TensorFlow, from which the first BERTs came."""
    bare = name.removeprefix(f"{prefix}.")
    for candidate in dict.fromkeys((name, bare, f"{prefix}.{name}")):
        yield candidate
        if "LayerNorm" in candidate:
            yield candidate.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def _initialise(model: Any, lacking: Collection[str]) -> None:
    """Initialise what the base lacks, as the model itself does. Whatever else is in the same module is filled later."""
    for name in dict.fromkeys(name.rpartition(".")[0] for name in lacking):
        module = model.get_submodule(name)
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()  # the model may leave some as they are
        model._init_weights(module)


# -- LoRA


def _with_lora(model: nn.Module, lora: LoraSpec, task: Task) -> nn.Module:
    import peft

    config = _lora_config(model, lora, task)
    wrapped: nn.Module = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    return wrapped


def _lora_config(model: nn.Module, lora: LoraSpec, task: Task) -> Any:
    import peft

    targeted = _require_targets(model, lora)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it, so that a fraction is as good
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if lora.target_modules == "all-linear" else list(lora.target_modules),
        task_type=task.lora_task_type or None,  # type: ignore[arg-type]
        modules_to_save=list(task.head_modules(model)) or None,
        fan_in_fan_out=any(_is_transposed(module) for module in targeted.values()),
    )


def _require_targets(model: nn.Module, lora: LoraSpec) -> dict[str, nn.Module]:
    """The linear modules that get an adapter, by name.

    Raises:
        SpecError: a target is no module of the model, no linear one, or shares its weight with another.
    """
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if lora.target_modules == "all-linear":
        return linear
    found: dict[str, nn.Module] = {}
    for target in lora.target_modules:
        matching = {name: m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")}
        if not matching or any(name not in linear for name in matching):
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            raise SpecError(
                f"model.lora.target_modules: {target} is "
                f"{'no linear module' if matching else 'no module'} of {type(model).__name__}.",
                next_step=f"Linear ones are {_some(kinds)}.",
            )
        found |= matching
    _require_untied(model, found)
    return found


def _require_untied(model: nn.Module, targeted: Mapping[str, nn.Module]) -> None:
    names: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for name, module in targeted.items():
        others = [other for other in names[module.weight] if other != f"{name}.weight"]
        if others:
            raise SpecError(
                f"model.lora.target_modules: {name} shares its weight with {others[0]}, which an adapter cannot change "
                "alone.",
                next_step="Leave it out.",
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _pairs(model: nn.Module) -> Iterator[tuple[str, LoraPair]]:
    for name, module in model.named_modules():
        if _ADAPTER in getattr(module, "lora_A", {}):
            yield (
                f"{name}.base_layer.weight",
                LoraPair(
                    a=f"{name}.lora_A.{_ADAPTER}.weight",
                    b=f"{name}.lora_B.{_ADAPTER}.weight",
                    scale=float(module.scaling[_ADAPTER]),  # type: ignore[index]
                    transposed=bool(getattr(module, "fan_in_fan_out", False)),
                ),
            )


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NUM_NAMED])
    return shown if len(names) <= _NUM_NAMED else f"{shown} and {len(names) - _NUM_NAMED} more"
