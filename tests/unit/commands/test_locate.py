"""What a person may call a checkpoint, and what each means."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.catalog import find
from orchestrator.commands.locate import find_checkpoints, locate
from orchestrator.errors import UsageError
from orchestrator.store import claim_group, layout
from tests.unit.checkpoint.saving import new_group, save
from tests.unit.fakes import MemoryStore

RUN = "demo-0123abcd"


@pytest.fixture
def filled(memory_store: MemoryStore) -> MemoryStore:
    """A run of two checkpoints, of which the newer was committed twice."""
    group = new_group(memory_store, RUN)
    for step in (4, 8):
        save(memory_store, group, step)
    kept = memory_store.objects
    save(memory_store, claim_group(memory_store, group.attempt), 8)
    for key, data in kept.items():
        memory_store.tamper(key, data)
    memory_store.create_json(layout.run_spec(RUN), {"run_id": RUN})
    return memory_store


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (RUN, [(8, 2), (8, 1), (4, 1)]),
        ("demo", [(8, 2), (8, 1), (4, 1)]),
        (f"{RUN}@8", [(8, 2), (8, 1)]),
        (f"{RUN}@00000004", [(4, 1)]),
        ("demo@4", [(4, 1)]),
    ],
)
def test_a_name_stands_for(filled: MemoryStore, name: str, found: list[tuple[int, int]]) -> None:
    assert [(folder.step, folder.group) for folder in find_checkpoints(filled, name)] == found


def test_a_folder_is_one_checkpoint(filled: MemoryStore) -> None:
    folder = find(filled, RUN, 8)
    assert find_checkpoints(filled, f"{RUN}@8/{folder.name}") == [folder]


@pytest.mark.parametrize(
    ("name", "words", "next_step"),
    [
        (f"{RUN}@5", "no committed checkpoint", "Steps that have one: 8"),
        (f"{RUN}@8/00009-00001-ab", "no committed checkpoint", "8"),
        (f"{RUN}@last", "is not RUN@STEP", f"headway list checkpoints {RUN}"),
        ("nope", "no run 'nope'", "headway list runs"),
    ],
)
def test_what_is_not_there_is_said(filled: MemoryStore, name: str, words: str, next_step: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        find_checkpoints(filled, name)
    assert next_step in caught.value.next_step


@pytest.mark.parametrize(
    ("address", "root", "name"),
    [
        ("s3://b/p/runs/r-1", "s3://b/p", "r-1"),
        ("s3://b/runs/r-1/", "s3://b", "r-1"),
        ("s3://b/p/q/runs/r-1/checkpoints", "s3://b/p/q", "r-1"),
        ("s3://b/p/runs/r-1/checkpoints/step-00000040/", "s3://b/p", "r-1@40"),
        ("s3://b/p/runs/r-1/checkpoints/step-00000000", "s3://b/p", "r-1@0"),
        ("s3://b/p/runs/r-1/checkpoints/step-00000004/00001-00002-ab/", "s3://b/p", "r-1@4/00001-00002-ab"),
        ("s3://b/p/models/lm/versions/00003/", "s3://b/p", "lm@3"),
        ("s3://b/p/datasets/text/0123456789abcdef/", "s3://b/p", "text@0123456789abcdef"),
    ],
)
def test_an_address_says_where_and_what(monkeypatch: pytest.MonkeyPatch, address: str, root: str, name: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    store, found = locate(address, "s3://other/place")
    assert (store.uri, found) == (root, name)


@pytest.mark.parametrize("address", ["s3://b/p", "s3://b/runs/", "s3://b/models/lm", "s3://b/datasets/x/y", "s3://"])
def test_an_address_of_something_else_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="is the address of no checkpoint, of no version and of no dataset"):
        locate(address, "s3://other/place")
