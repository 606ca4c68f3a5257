"""Export from S3 to S3: peak memory and wall time, over the model's size.

Headway is ``headway export``, as a person runs it. The peer is a script that downloads DeepSpeed's own checkpoint,
runs its zero_to_fp32 with safetensors, and uploads the result. Both checkpoints are of the same state: a real ZeRO-3
engine on two ranks with fp32 masters and Adam's moments. Both exports are fp32 and equal, which is checked.
Each run is a fresh process, and the contenders take turns.

    make bench NAME=export
    python -m tests.bench.export --sizes 4,60 --repeats 3
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from orchestrator.store import Store
from tests.bench import states
from tests.bench.harness import at_most, bench_ranks, finish, say, spread
from tests.bench.measured import Cost, bare_bytes, run
from tests.bench.server import BUCKET, download_directory, s3_store, upload_directory

RUN = "bench-export"
WORLD_SIZE = 2
MAX_SHARD_BYTES = 5_000_000_000
PEERS = {
    "peer": "5GB",  # zero_to_fp32's default, and the same files as Headway's
    "peer_small_files": "200MB",  # what its memory can be brought down to
}
MAX_WALL_RATIO = 0.7
MAX_MEMORY_MB = 300.0
MAX_MEMORY_RATIO = 1.1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.export")
    parser.add_argument("--sizes", default="60,200,500", help=f"of {', '.join(states.SIZES)} (million parameters)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    bare = bare_bytes()
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, s3_store(Path(folder)) as store:
        figures = {
            name: measure(store, states.SIZES[name], Path(folder), repeats=args.repeats, bare=bare)
            for name in args.sizes.split(",")
        }
    finish("export", {"bare_interpreter_mb": round(bare / 1e6, 1), "sizes": figures}, targets_of(figures))


def measure(store: Store, size: states.Size, scratch: Path, *, repeats: int, bare: int) -> dict[str, Any]:
    """One size: make both checkpoints, then let the contenders take turns."""
    num_parameters = make_checkpoints(store, size, scratch)
    costs: dict[str, list[Cost]] = {name: [] for name in ("headway", *PEERS)}
    for repeat in range(repeats):
        for name in costs:
            target = f"out/{size.name}/{name}/{repeat}/"
            costs[name].append(export_once(store, name, size, target, scratch))
            say(f"{size.name} M, {name}: {costs[name][-1].wall_s:.1f} s, {costs[name][-1].peak_bytes / 1e6:.0f} MB")
    equal = is_equal(f"out/{size.name}/headway/0/", f"out/{size.name}/peer/0/", scratch)
    for place in (store.at(BUCKET, f"out/{size.name}"), store.at(BUCKET, f"deepspeed/{size.name}")):
        place.delete([item.key for item in place.list("")])
    return {
        "parameters": num_parameters,
        "exports_equal": equal,
        **{f"{name}_s": spread([cost.wall_s for cost in found]) for name, found in costs.items()},
        **{
            f"{name}_peak_mb": spread([(cost.peak_bytes - bare) / 1e6 for cost in found])
            for name, found in costs.items()
        },
    }


def make_checkpoints(store: Store, size: states.Size, scratch: Path) -> int:
    """Headway's checkpoint in the store, and DeepSpeed's under ``deepspeed/`` of the bucket. Returns the number of
    parameters."""
    started = time.perf_counter()
    directory = scratch / "saved"
    group = states.claim(store, f"{RUN}-{size.name}")
    with bench_ranks(WORLD_SIZE) as ranks:
        num_parameters: int = ranks.run(states.build, size, 3, False)[0][0]
        ranks.run(states.fill)
        ranks.run(states.save_headway, store.uri, group)
        ranks.run(states.save_deepspeed, str(directory))
    upload_directory(directory, f"deepspeed/{size.name}/")
    shutil.rmtree(directory)
    say(f"{size.name} M, checkpoints of {num_parameters / 1e6:.0f} M parameters: {time.perf_counter() - started:.0f} s")
    return num_parameters


def export_once(store: Store, name: str, size: states.Size, target: str, scratch: Path) -> Cost:
    if name == "headway":
        return run(
            "orchestrator.cli:main",
            *("export", f"{RUN}-{size.name}@{states.STEP}", "--to", f"s3://{BUCKET}/{target}", "--dtype", "fp32"),
            *("--max-shard-bytes", str(MAX_SHARD_BYTES), "--store", store.uri),
        )
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return run("tests.bench.export_peer:main", f"deepspeed/{size.name}/", target, folder, PEERS[name])


def is_equal(ours: str, theirs: str, scratch: Path) -> bool:
    """Whether two exports hold the same tensors, by name, dtype, shape and value."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for name, prefix in (("ours", ours), ("theirs", theirs)):
            download_directory(prefix, Path(folder) / name)
        left, right = (_tensors(Path(folder) / name) for name in ("ours", "theirs"))
        return left.keys() == right.keys() and all(
            left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
        )


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Mapped into memory, not read."""
    from safetensors.torch import load_file

    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def targets_of(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians against the limits; wall time against the faster of the peers. Pure."""
    peaks = [found["headway_peak_mb"]["median"] for found in figures.values()]
    targets = {
        "memory MB": at_most(max(peaks), MAX_MEMORY_MB),
        "memory of any size over the least": at_most(max(peaks) / min(peaks), MAX_MEMORY_RATIO),
    }
    for name, found in figures.items():
        peer_s = min(found[f"{peer}_s"]["median"] for peer in PEERS)
        targets[f"{name} M wall over the peer's"] = at_most(found["headway_s"]["median"] / peer_s, MAX_WALL_RATIO)
    equal = statistics.fmean(found["exports_equal"] for found in figures.values())
    return targets | {"exports equal": at_most(1 - equal, 0)}


if __name__ == "__main__":
    main()
