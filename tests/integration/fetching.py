"""``python -m tests.integration.fetching URI STORE [ray]``: fetch a base model in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from orchestrator.errors import HeadwayError
from orchestrator.pretrained.source import list_base
from orchestrator.store import open_store
from workloads.fetch_base import as_ray_tasks, fetch_base, one_by_one


def main(uri: str, store_uri: str, where: str = "") -> None:
    store = open_store(store_uri)
    source = list_base(uri, store)  # the client's own code is loaded by now, and small files were read
    before_kib = _memory_kib("VmRSS")
    try:
        if where == "ray":
            fetched = _on_ray(source, store)
        else:
            fetched = fetch_base(source, store, run_all=one_by_one)
    except HeadwayError as e:
        print(json.dumps({"error": type(e).__name__, "message": e.message, "next_step": e.next_step}))
        return
    facts = {
        "prefix": fetched.prefix,
        "fingerprint": fetched.fingerprint,
        "grown_mib": (_memory_kib("VmHWM") - before_kib) / 1024,
        "modules": [name for name in ("torch", "transformers", "ray") if name in sys.modules],
    }
    print(json.dumps(facts))


def _on_ray(source, store):
    import ray

    from workloads.cluster import own_errors

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with own_errors():
            return fetch_base(source, store, run_all=as_ray_tasks)
    finally:
        ray.shutdown()


def _memory_kib(name: str) -> int:
    """A line of the kernel's account of this process. getrusage's maximum would count the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
