"""The gate against what is in force, through the command line: both models really evaluated on the same samples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.release import channels
from orchestrator.store import Store, layout, open_store
from orchestrator.targets.stack import Stack
from tests.command_line import Said, headway
from tests.tiny_run import TINY_LLAMA
from workloads.judge import Compared, read_evaluation

RUN_TIMEOUT_S = 180.0
MODEL = "gate-lm"


@pytest.fixture
def store(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in stack.store_environment().items():
        monkeypatch.setenv(name, value)
    return open_store()


def put_corpus(place: Store) -> None:
    words = random.Random(5)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(2, 7))) for _ in range(60)]
    for number in range(40):
        place.upload(f"{number:03d}.txt", " ".join(words.choices(vocabulary, k=600)).encode())


def write(directory: Path, name: str, *, steps: int, learning_rate: float = 3e-3, **changes: Any) -> str:
    document: dict[str, Any] = {
        "apiVersion": "headway/v1",
        "name": name,
        "model": {"architecture": TINY_LLAMA},
        "data": {"dataset": "gate-first", "sequence_length": 32},
        "train": {
            "steps": steps, "global_batch_size": 8, "micro_batch_size": 4,
            "optimizer": {"learning_rate": learning_rate},
        },
        "checkpoint": {"every_steps": 50},
        "gate": {"must_beat_serving": True, "max_eval_samples": 96},
        "release": {"model": MODEL},
        **changes,
    }  # fmt: skip
    (directory / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return f"{name}.yaml"


@pytest.mark.full
def test_a_model_must_surely_beat_what_is_in_force(stack: Stack, store: Store, tmp_path: Path) -> None:
    put_corpus(store.at(store.bucket, "gate-corpus"))

    def submit(run_file: str) -> Said:
        where = ["--target", stack.dashboard_url]
        settings = stack.store_environment()
        return headway(
            "submit", run_file, *where, "--json", directory=tmp_path, settings=settings, timeout_s=RUN_TIMEOUT_S
        )

    corpus = f"s3://{store.bucket}/gate-corpus/**/*.txt"
    data = {"train": corpus, "vocab_size": 300, "eval_fraction": 0.3, "sequence_length": 32}
    first = submit(write(tmp_path, "gate-first", steps=20, data=data)).assert_done().json
    assert first["facts"]["version"] == f"{MODEL}@1"
    assert first["facts"]["gate"]["against_version"] is None

    worse = write(tmp_path, "gate-worse", steps=2)
    submit(worse).assert_refused(
        3, f"does not beat serving version 1's {first['facts']['evaluation']['loss']:.4g}"[:-1]
    )
    better = write(tmp_path, "gate-better", steps=120, release={"model": MODEL, "canary": 0.2})
    done = submit(better).assert_done().json
    assert done["facts"]["gate"]["against_version"] == 1
    evaluation = read_evaluation(store, done["run_id"])
    assert evaluation is not None
    theirs = Compared.model_validate(store.get_json(layout.comparison(done["run_id"], 1))).blocks
    assert theirs.num_targets == evaluation.blocks.num_targets == (3 * 32,) * 32  # of few samples, smaller blocks
    # The very figures that the first run found for its model.
    loss = sum(theirs.losses) / sum(theirs.num_targets)
    assert loss == pytest.approx(first["facts"]["evaluation"]["loss"], rel=1e-5)
    entry = channels.newest(store, MODEL, "production")
    assert entry is not None
    assert (entry.version, entry.canary) == (1, channels.Canary(version=entry.canary.version, weight=0.2))  # type: ignore[union-attr]
    assert done["facts"]["version"] == f"{MODEL}@{entry.canary.version}"  # type: ignore[union-attr]
