"""``headway plan``: what a run will do on a target, and what ``submit`` would send."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.commands.base_config import Unknown, read_base_config
from orchestrator.commands.context import find_stack, find_store, find_target, is_kubernetes, kubernetes_settings
from orchestrator.commands.request import build_request
from orchestrator.errors import HeadwayError
from orchestrator.plan import Capacity
from orchestrator.plan import plan as make_plan
from orchestrator.reporter import Result
from orchestrator.sizing import AUTO_CLASSES, Sizing, count_parameters
from orchestrator.spec import ResourcesSpec, RunSpec, load
from orchestrator.store import Store
from orchestrator.store.s3 import STORE_VARIABLE
from orchestrator.targets.ray_head import default_num_cpus

_WITHOUT_BF16 = ("V100", "P100", "P4", "T4", "K80")


def plan(run_file: Path, *, target: str, store_uri: str | None, manifests: bool) -> Result:
    spec = load(run_file)
    if manifests:
        cluster, store = find_target(target, store_uri), find_store(store_uri)
        request = build_request(spec, run_file, store, cluster, directory=Path.cwd())
        return request.request.body(), ""
    found, note = _store_if_set(store_uri)
    sizing = _size(spec, found)
    planned = make_plan(
        train=spec.train,
        resources=spec.resources,
        sequence_length=spec.data.sequence_length,
        capacity=capacity_of(target, spec.resources),
        size=sizing.size,
        size_note=sizing.reason,
    )
    identity = _run_id(spec, found) if found is not None else {"note": note}
    facts = {"run_id": identity.get("run_id"), "target": target, **planned.to_json()}
    return facts, _table([("run", identity.get("run_id") or identity["note"]), *planned.lines()])


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


def _size(spec: RunSpec, store: Store | None) -> Sizing:
    auto_class, model = AUTO_CLASSES.get(spec.task), spec.model
    if auto_class is None:
        return Sizing(size=None, reason=f"task {spec.task} is your own code, which plan does not run")
    if model.architecture is not None:
        return count_parameters(model.architecture, vocab_size=spec.data.vocab_size, auto_class=auto_class)
    try:
        config = read_base_config(model, store)
    except Unknown as e:
        return Sizing(size=None, reason=str(e))
    if "auto_map" in config and model.trust_remote_code:
        return Sizing(size=None, reason="the pretrained model brings its own code, which plan does not run")
    return count_parameters(
        config, vocab_size=spec.data.vocab_size, auto_class=auto_class, is_pretrained=True, lora=model.lora
    )


def _store_if_set(store_uri: str | None) -> tuple[Store | None, str]:
    """The store, or why there is none."""
    if not store_uri and not os.environ.get(STORE_VARIABLE) and find_stack() is None:
        return None, "its id follows from the data; no store is set (--store, HEADWAY_STORE, or headway up)"
    try:
        return find_store(store_uri), ""
    except HeadwayError as e:
        return None, f"its id follows from the data, which cannot be listed: {e.message}"


def _run_id(spec: RunSpec, store: Store) -> dict[str, str]:
    """The run's id where the store can tell it, else why not."""
    from orchestrator.runs import identify

    try:
        return {"run_id": identify(spec, store, Path.cwd()).run_id}
    except HeadwayError as e:
        return {"note": f"its id follows from the data, which cannot be listed: {e.message}"}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
