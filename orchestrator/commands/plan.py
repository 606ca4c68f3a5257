"""``headway plan``: what a run will do on a target, and what ``submit`` would send."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.commands.base_config import Unknown, read_base_config
from orchestrator.commands.context import find_stack, find_store, find_target, is_kubernetes, kubernetes_settings
from orchestrator.commands.request import build_request
from orchestrator.dataset.format import find_dataset
from orchestrator.dataset.given import read_given
from orchestrator.errors import HeadwayError
from orchestrator.plan import Capacity
from orchestrator.plan import plan as make_plan
from orchestrator.reporter import Result
from orchestrator.sizing import AUTO_CLASSES, Sizing, count_parameters
from orchestrator.spec import DataSpec, ResourcesSpec, RunSpec, load
from orchestrator.store import Store
from orchestrator.store.s3 import STORE_VARIABLE
from orchestrator.targets.ray_head import default_num_cpus

if TYPE_CHECKING:
    from orchestrator.runs import RunIdentity

_WITHOUT_BF16 = ("V100", "P100", "P4", "T4", "K80")


def plan(run_file: Path, *, target: str, store_uri: str | None, manifests: bool) -> Result:
    spec = load(run_file)
    if manifests:
        cluster, store = find_target(target, store_uri), find_store(store_uri)
        request = build_request(spec, run_file, store, cluster, directory=Path.cwd())
        return request.request.body(), ""
    found, note = _store_if_set(store_uri)
    sizing = size_of(spec, found)
    identity, note = _identity(spec, found) if found is not None else (None, note)
    planned = make_plan(
        train=spec.train,
        resources=spec.resources,
        sequence_length=spec.data.sequence_length,
        capacity=capacity_of(target, spec.resources),
        size=sizing.size,
        size_note=sizing.reason,
        num_samples=_num_samples(spec, found, identity) if found is not None and identity is not None else None,
    )
    run_id = identity.run_id if identity is not None else None
    facts = {"run_id": run_id, "target": target, **planned.to_json()}
    return facts, _table([("run", run_id or note), *planned.lines()])


def capacity_of(target: str, resources: ResourcesSpec) -> Capacity:
    """What the target has. The local one is this machine, whether or not its stack runs."""
    if target == "local":
        return Capacity(num_cpus=default_num_cpus(), host_memory_bytes=_memory_bytes())
    if is_kubernetes(target):
        from orchestrator.targets.kubernetes.target import stated_capacity

        found = stated_capacity(kubernetes_settings(target), resources)
    else:
        found = find_target(target, None).capacity(resources)
    return Capacity(
        num_cpus=found.num_cpus,
        num_gpus=found.num_gpus,
        host_memory_bytes=found.memory_bytes,
        native_bf16=found.gpu_kind is not None and not found.gpu_kind.startswith(_WITHOUT_BF16),
    )


def size_of(spec: RunSpec, store: Store | None) -> Sizing:
    """The size of the run's model, or why it is not known; nothing is fetched for it.

    Args:
        store: None where none is set; a pretrained model that lies in S3 is unknown then.

    Raises:
        SpecError: transformers refuses the model, or peft the adapters; or there is no such tokenizer. TimedOut:
            counting took too long.
    """
    auto_class, model = AUTO_CLASSES.get(spec.task), spec.model
    if auto_class is None:
        return Sizing(size=None, reason=f"task {spec.task} is your own code, which plan does not run")
    if model.architecture is not None:
        try:
            vocab_size = _vocab_size(spec.data, store)
        except Unknown as e:
            return Sizing(size=None, reason=str(e))
        return count_parameters(model.architecture, vocab_size=vocab_size, auto_class=auto_class)
    try:
        config = read_base_config(model, store)
    except Unknown as e:
        return Sizing(size=None, reason=str(e))
    if "auto_map" in config and model.trust_remote_code:
        return Sizing(size=None, reason="the pretrained model brings its own code, which plan does not run")
    return count_parameters(
        config, vocab_size=spec.data.vocab_size, auto_class=auto_class, is_pretrained=True, lora=model.lora
    )


def _vocab_size(data: DataSpec, store: Store | None) -> int:
    """The tokenizer's, where there is one already; else what the one that will be trained has at most.

    Raises:
        Unknown: it lies in S3 and no store is set. SpecError: there is no such tokenizer.
    """
    if data.dataset is not None and store is not None:
        with contextlib.suppress(HeadwayError):  # told where the run is identified
            return find_dataset(store, data.dataset).tokenizer.vocab_size
    if data.tokenizer is not None and data.tokenizer.startswith("s3://") and store is None:
        raise Unknown(f"data.tokenizer {data.tokenizer} cannot be read: no store is set")
    given = read_given(data, store)
    return given.vocab_size if given is not None else data.vocab_size


def _store_if_set(store_uri: str | None) -> tuple[Store | None, str]:
    """The store, or why there is none."""
    if not store_uri and not os.environ.get(STORE_VARIABLE) and find_stack() is None:
        return None, "its id follows from the data; no store is set (--store, HEADWAY_STORE, or headway up)"
    try:
        return find_store(store_uri), ""
    except HeadwayError as e:
        return None, _unlisted(e)


def _identity(spec: RunSpec, store: Store) -> tuple[RunIdentity | None, str]:
    """Which run it is, or why that cannot be told."""
    from orchestrator.runs import identify

    try:
        return identify(spec, store, Path.cwd()), ""
    except HeadwayError as e:
        return None, _unlisted(e)


def _unlisted(error: HeadwayError) -> str:
    return f"its id follows from what it is trained on, which cannot be listed: {error.message}"


def _num_samples(spec: RunSpec, store: Store, identity: RunIdentity) -> int | None:
    """Of the training split, where the data was prepared before; else None."""
    from orchestrator.dataset.format import read_manifest

    try:
        dataset = identity.dataset or read_manifest(store, spec.name, identity.dataset_fingerprint)
    except HeadwayError:  # not prepared yet, or not readable, which the run says
        return None
    return dataset.num_samples(dataset.train, spec.data.sequence_length)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
