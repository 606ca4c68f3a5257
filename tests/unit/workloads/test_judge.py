"""Whom the gate compares with, and on what. The evaluations themselves are Ray tasks: tests/integration runs them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.errors import IntegrityError, StoreError
from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelStatus
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.spec import GateSpec, ReleaseSpec
from orchestrator.store import layout
from tests.tiny_model import make_version
from tests.unit.fakes import MemoryStore
from workloads.evaluate import MAX_BLOCKS, Blocks, Evaluation, Summed, blocks_of
from workloads.judge import Compared, Judge, read_evaluation, version_to_beat, why_not_comparable

RELEASE = ReleaseSpec(model="lm")
TOKENIZER = hashlib.sha256(b"tokenizer").hexdigest()
RUN = "mine-00000000"


def dataset(fingerprint: str = "0123456789abcdef", **more: Any) -> Any:
    given = {"fingerprint": fingerprint, "classes": (), "tokenizer": SimpleNamespace(sha256=TOKENIZER)}
    return SimpleNamespace(**{**given, **more})


def released(store: MemoryStore, run_id: str = "other-00000000", *, canary_of: int | None = None) -> int:
    """Publish a version of a run and append it to the channel."""
    number = claim_version(store, "lm", facts={})
    files = {"tokenizer.json": VersionFile(size_bytes=0, sha256=TOKENIZER)}
    publish(store, make_version(model="lm", number=number, files=files))
    channels.append(
        store,
        "lm",
        "production",
        version=canary_of or number,
        canary=Canary(version=number, weight=0.1) if canary_of else None,
        by="test",
        reason="",
        run_id=run_id,
    )
    return number


def to_beat(store: MemoryStore, *, but_for: str = RUN) -> int | None:
    found = version_to_beat(store, RELEASE, but_for=but_for)
    return None if found is None else found.number


def test_what_is_in_force_is_to_be_beaten(memory_store: MemoryStore) -> None:
    assert to_beat(memory_store) is None
    first = released(memory_store)
    assert to_beat(memory_store) == first
    # A retry after the release does not compete with itself.
    released(memory_store, RUN)
    assert to_beat(memory_store) == first
    # A canary is not in force until it has passed, and one that was rejected never is.
    second = released(memory_store, canary_of=first)
    assert to_beat(memory_store) == first
    entry = channels.entry_numbers(memory_store, "lm", "production")[-1]
    channels.write_status(memory_store, "lm", "production", ChannelStatus(promoted={entry: second}))
    assert to_beat(memory_store) == second
    channels.write_status(memory_store, "lm", "production", ChannelStatus(rejected={second: "slow"}))
    assert to_beat(memory_store) == first


def judge(store: MemoryStore, said: list[str], events: list[dict[str, Any]]) -> Judge:
    spec: Any = SimpleNamespace(task="causal-lm", release=RELEASE, gate=GateSpec(must_beat_serving=True))
    return Judge(
        spec=spec,
        store=store,
        run_id=RUN,
        dataset=dataset(),
        base=None,
        note=lambda kind, **facts: events.append({"kind": kind, **facts}),
        say=said.append,
    )


def evaluation(*losses: float) -> Evaluation:
    """One target a block."""
    mean = sum(losses) / len(losses)
    return Evaluation(figures={"loss": mean}, blocks=Blocks(losses=losses, num_targets=(1,) * len(losses)))


@pytest.mark.parametrize(
    ("mine", "passed", "words"),
    [
        ([2.0] * 20, True, ""),
        ([4.0] * 20, False, "does not beat serving version 1's 3 on the same samples; it is 1 higher"),
        ([0.0, 5.9] * 10, False, "by more than chance: it is 0.05 lower, and with 95% confidence the difference lies"),
    ],
)
def test_both_are_held_against_the_same_samples(
    memory_store: MemoryStore, mine: list[float], passed: bool, words: str
) -> None:
    number = released(memory_store)
    theirs = Compared(version=number, blocks=evaluation(*[3.0] * 20).blocks)
    memory_store.create_json(layout.comparison(RUN, number), theirs.model_dump(mode="json"))
    said: list[str] = []
    events: list[dict[str, Any]] = []
    decision, serving = judge(memory_store, said, events).decide(evaluation(*mine))
    assert decision.passed == passed
    assert words in "; ".join(decision.reasons)
    assert serving is not None
    assert serving.comparison is not None
    assert serving.comparison.num_blocks == 20
    assert "On the same samples the loss is" in said[0]
    assert events == [{"kind": "gate", "passed": passed, "reasons": list(decision.reasons)}]


def test_other_blocks_fall_back_to_what_is_on_record(memory_store: MemoryStore) -> None:
    number = released(memory_store)  # with a recorded loss of 3.0
    theirs = Compared(version=number, blocks=Blocks(losses=(1.0,), num_targets=(7,)))
    memory_store.create_json(layout.comparison(RUN, number), theirs.model_dump(mode="json"))
    decision, serving = judge(memory_store, [], []).decide(evaluation(*[2.5] * 20))
    assert decision.passed
    assert serving is not None
    assert serving.comparison is None


def test_a_damaged_comparison_falls_back_and_says_so(memory_store: MemoryStore) -> None:
    number = released(memory_store)
    memory_store.create_json(layout.comparison(RUN, number), {"format": "another"})
    said: list[str] = []
    judge(memory_store, said, []).decide(evaluation(*[2.5] * 20))
    assert "recorded figures, since it cannot be evaluated" in said[0]


def test_a_rival_that_is_no_number_is_compared_by_its_record(memory_store: MemoryStore) -> None:
    released(memory_store)
    broken = Evaluation(figures={}, blocks=Blocks(losses=(math.nan,) * 20, num_targets=(1,) * 20))
    said: list[str] = []
    judging = replace(judge(memory_store, said, []), evaluate_files=lambda *_: broken)
    decision, serving = judging.decide(evaluation(*[2.5] * 20))
    assert decision.passed
    assert "not finite numbers" in said[0]
    assert serving is not None
    assert serving.comparison is None


def test_a_store_that_is_down_decides_nothing(memory_store: MemoryStore) -> None:
    released(memory_store)
    memory_store.fail["get"] = StoreError("down")
    with pytest.raises(StoreError, match="down"):
        judge(memory_store, [], []).decide(evaluation(2.5))


@pytest.mark.parametrize(
    ("made_from", "task", "why"),
    [
        (dataset(), "causal-lm", ""),
        (dataset("f" * 16), "causal-lm", ""),  # other data, the same tokens
        (dataset("f" * 16, tokenizer=SimpleNamespace(sha256="0" * 64)), "causal-lm", "another tokenizer"),
        (dataset("f" * 16, classes=("a", "b")), "causal-lm", "classes may be others"),
        (dataset(), "sequence-classification", "its task is causal-lm"),
    ],
)
def test_which_versions_can_take_the_samples(made_from: Any, task: str, why: str) -> None:
    files = {"tokenizer.json": VersionFile(size_bytes=0, sha256=TOKENIZER)}
    spec: Any = SimpleNamespace(task=task)
    found = why_not_comparable(spec, made_from, make_version(files=files))
    assert (why in found) if why else found == ""


def test_an_evaluation_stands(memory_store: MemoryStore) -> None:
    assert read_evaluation(memory_store, RUN) is None
    found = evaluation(1.0, 2.0)
    memory_store.create_json(layout.evaluation(RUN), found.model_dump(mode="json"))
    exported: Any = None
    assert judge(memory_store, [], []).evaluation(exported) == found  # nothing is evaluated again
    memory_store.tamper(layout.evaluation(RUN), b'{"loss": 3.0}')
    older = read_evaluation(memory_store, RUN)
    assert older is not None
    assert (older.figures, older.blocks.losses) == ({"loss": 3.0}, ())
    memory_store.tamper(layout.evaluation(RUN), b'{"format": "headway/evaluation/1"}')
    with pytest.raises(IntegrityError, match="figures: Field required"):
        read_evaluation(memory_store, RUN)


def test_blocks_are_neighbours_whoever_evaluated_them() -> None:
    found = [Summed(first, {"loss": float(first)}, 2) for first in range(0, 40, 4)]
    assert blocks_of(found).losses == tuple(float(first) for first in range(0, 40, 4))
    many = [Summed(first, {"loss": 1.0}, 3) for first in range(2 * MAX_BLOCKS + 1)]
    blocks = blocks_of(many)
    assert len(blocks.losses) <= MAX_BLOCKS
    assert (sum(blocks.losses), sum(blocks.num_targets)) == (len(many), 3 * len(many))
    assert blocks_of([Summed(0, {"margin": 1.0}, 2)]) == Blocks()
    assert blocks_of([Summed(0, {"loss": 0.0}, 0)]) == Blocks()
