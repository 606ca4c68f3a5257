"""Progress is said every few seconds and at the end, and tells what was there, taken and made."""

from __future__ import annotations

from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads.preparing import Here, long_text, prepare_with, word_tokenizer
from workloads.prepare.parts import PartJob
from workloads.prepare.progress import Progress

DATA = DataSpec(train="s3://corpus/**", eval_fraction=0.3, tokenizer="s3://tokenizers/tokenizer.json")


def corpus(num_files: int = 20) -> MemoryStore:
    store = MemoryStore()
    store.at("tokenizers").upload("tokenizer.json", word_tokenizer())
    for number in range(num_files):
        store.at("corpus").upload(f"{number:04d}.txt", long_text(number, 200_000).encode())
    return store


def test_it_is_said_every_five_seconds() -> None:
    jobs: list[PartJob] = []

    def noted(found: list[PartJob]) -> list[PartJob]:
        jobs.extend(found)
        return found

    store = corpus()
    run = Here(store, order=noted)
    prepare_with(store, DATA, run=run)
    now, said = [0.0], list[str]()
    progress = Progress(jobs, said.append, clock=lambda: now[0])
    for done in run.done:
        now[0] += 2.0
        progress.made(done)
    assert len(said) == len(run.done) // 3
    so_far = sum(done.source_bytes for done in run.done[:3]) / 1e6
    assert said[0].startswith(f"Prepared 3 of {len(jobs)} parts, {so_far:.1f} of ")
    assert said[0].endswith(f" MB, {so_far / 6:.1f} MB/s.")


def test_the_end_tells_what_was_taken() -> None:
    store, said = corpus(), list[str]()
    prepare_with(store, DATA, say=said.append)
    assert said[-1].endswith(": 20 files or slices of files tokenized.")
    store.at("corpus").upload("new.txt", b"w1 w2")
    prepare_with(store, DATA, say=said.append)
    assert said[-1].endswith(
        ": 1 files or slices of files tokenized, 20 unchanged and taken from an earlier preparation."
    )
