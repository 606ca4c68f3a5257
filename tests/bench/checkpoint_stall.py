"""What a save costs training: Headway, DeepSpeed and Ray Train's upload, torch's async_save, and a bare memcpy.

One group of gloo ranks trains one model under ZeRO, and the four save the same state to the same S3 server in turns.
Measured per save: how long the training thread is blocked, and how much training is lost until the save is through
and two steps beyond, against idle steps right before and after it. The server runs on the same cores as training;
what it takes is reported, and not taken out.

    make bench NAME=checkpoint_stall
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.store import claim_attempt, claim_group
from orchestrator.targets.ports import is_free
from tests.bench.harness import at_least, at_most, finish, say, spread
from tests.bench.proc import child_pids
from tests.bench.server import BUCKET, s3_store
from tests.bench.stall_ranks import ORDER, Settings, Window, run_rank

WORLD_SIZE = 2
SIZES = {
    # 96 M parameters: 1.15 GB of masters and moments.
    "full": {"hidden_size": 768, "num_layers": 10, "vocab_size": 16384, "sequence_length": 128},
    "medium": {"hidden_size": 512, "num_layers": 6, "vocab_size": 8192, "sequence_length": 64},
    "small": {"hidden_size": 256, "num_layers": 4, "vocab_size": 4096, "sequence_length": 128},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="saves per contender that count; one more warms up")
    options.add_argument("--size", choices=sorted(SIZES), default="full")
    options.add_argument("--stage", type=int, choices=(1, 2, 3), default=3, help="of ZeRO")
    options.add_argument("--only", nargs="+", choices=ORDER, default=ORDER, help="leave the other contenders out")
    asked = options.parse_args()
    if asked.rounds < 2:
        options.error("--rounds: quartiles need two or more")
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as scratch, s3_store(Path(scratch)) as store:
        settings = Settings(
            world_size=WORLD_SIZE,
            port=next(port for port in range(21500, 30000) if is_free(port)),
            store=store.uri,
            group=claim_group(store, claim_attempt(store, f"stall-{secrets.token_hex(4)}", facts={})),
            storage_path=pyarrow_uri("peers"),
            server_pid=child_pids(os.getpid())[0],
            scratch=Path(scratch),
            rounds=asked.rounds,
            contenders=tuple(asked.only),
            stage=asked.stage,
            **SIZES[asked.size],
        )
        windows, state_bytes = [], 0
        for said in answers(settings):
            say(str(said))
            state_bytes = said.pop("state_bytes", state_bytes)
            if said.pop("round", 0) > 0:
                windows.append(Window(**said))
    report(windows, state_bytes)


def pyarrow_uri(path: str) -> str:
    """The bucket's ``path`` as Ray Train's ``storage_path`` names it; the keys are in the variables."""
    host = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    return f"s3://{BUCKET}/{path}?scheme=http&endpoint_override={host}"


def answers(settings: Settings) -> Iterator[dict[str, Any]]:
    """Run the ranks; what rank 0 tells, as it comes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    ranks = [context.Process(target=run_rank, args=(rank, settings, theirs)) for rank in range(settings.world_size)]
    try:
        for rank in ranks:
            rank.start()
        theirs.close()
        while (said := ours.recv()) is not None:
            yield said
    finally:
        for rank in ranks:
            rank.join(10.0)
            rank.kill()


def report(windows: list[Window], state_bytes: int) -> None:
    by_name = {name: [w for w in windows if w.contender == name] for name in ORDER}
    figures: dict[str, Any] = {
        "state_bytes": state_bytes,
        "idle_step_s": spread([w.idle_step_s for w in windows]),
        **{name: figures_of(found) for name, found in by_name.items() if len(found) > 1},
    }
    blocked = {name: statistics.median(w.blocked_s for w in found) for name, found in by_name.items() if found}
    targets = {}
    if "headway" in blocked:
        limits = {"deepspeed": 0.05, "async_save": 1.0, "memcpy": 3.0}
        targets = {
            f"blocked over {name}'s": at_most(blocked["headway"] / blocked[name], limit)
            for name, limit in limits.items()
            if name in blocked
        }
        rates = [w.upload_rate for w in by_name["headway"]]
        targets["tokens/s during an upload over idle"] = at_least(statistics.median(rates), 0.9)
    finish("checkpoint_stall", figures, targets)


def figures_of(windows: list[Window]) -> dict[str, Any]:
    return {
        "blocked_s": spread([w.blocked_s for w in windows]),
        "lost_s": spread([w.lost_s for w in windows]),
        "upload_s": spread([w.upload_wall_s for w in windows]),
        "tokens_per_s_during_upload_over_idle": spread([w.upload_rate for w in windows]),
        "server_cpu_s": spread([w.server_cpu_s for w in windows]),
        "background_cpu_s": spread([w.rank_cpu_s for w in windows]),
    }


if __name__ == "__main__":
    main()
