"""``python -m tests.integration.fetching URI STORE [ray]``: fetch a base model in a process of its own."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from orchestrator.errors import HeadwayError
from orchestrator.pretrained.source import list_base
from orchestrator.store import open_store
from workloads.fetch_base import as_ray_tasks, fetch_base, one_by_one

MIB = 2**20


def main(uri: str, store_uri: str, where: str = "") -> None:
    store = open_store(store_uri)
    source = list_base(uri, store)  # the client's own code is loaded by now, and small files were read
    before_bytes = _resident_bytes()
    try:
        if where == "ray":
            fetched = _on_ray(source, store)
        else:
            fetched = fetch_base(source, store, run_all=one_by_one)
    except HeadwayError as e:
        print(json.dumps({"error": type(e).__name__, "message": e.message, "next_step": e.next_step}))
        return
    peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    facts = {
        "prefix": fetched.prefix,
        "fingerprint": fetched.fingerprint,
        "grown_mib": (peak_bytes - before_bytes) / MIB,
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


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(*sys.argv[1:])
