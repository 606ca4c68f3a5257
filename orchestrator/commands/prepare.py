"""``headway prepare``: have a target make the dataset of a run file, and nothing else, and follow it to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.commands.context import find_store, find_target
from orchestrator.commands.follow_job import follow
from orchestrator.commands.list_datasets import size_of
from orchestrator.commands.request import hand_over, relative_to, sending
from orchestrator.commands.submit import check_sendable
from orchestrator.commands.text import cell
from orchestrator.dataset.format import DatasetManifest, read_manifest
from orchestrator.errors import Interrupted, NotFound, SpecError
from orchestrator.package import Package, package
from orchestrator.record.report import words
from orchestrator.render import PrepareRequest, preparation_id
from orchestrator.reporter import Reporter, Result
from orchestrator.runs import identify
from orchestrator.spec import RunSpec, load
from orchestrator.store import Store
from orchestrator.store.probe import require_conditional_writes
from orchestrator.targets.base import Request, Target


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The dataset that a run file describes."""

    name: str
    fingerprint: str

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.fingerprint}"

    def find(self, store: Store) -> DatasetManifest | None:
        """Its manifest, where it exists."""
        try:
            return read_manifest(store, self.name, self.fingerprint)
        except NotFound:
            return None


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The job that makes it, and whether another call had sent it."""

    submission_id: str
    attached: bool


def prepare(
    run_file: Path, *, target: str, store_uri: str | None, detach: bool, stop: bool, reporter: Reporter
) -> Result:
    """Make the dataset unless it exists; where a job makes it already, follow that one.

    Args:
        detach: return once the job is sent.
        stop: end the job that makes it instead.
    """
    spec = load(run_file)
    check_preparable(spec)
    check_sendable(spec, target, reporter)
    store = find_store(store_uri)
    wanted = find_wanted(spec, store, Path.cwd())
    standing = wanted.find(store)
    if standing is not None:
        text = f"{wanted.reference} exists already; nothing is sent.\n{describe(standing)}"
        return {"state": "exists", **facts_of(standing)}, text
    cluster = find_target(target, store_uri)
    again = f"headway prepare{cluster.flag} {run_file}"
    if stop:
        return stop_job(wanted, cluster, again=again)
    began_s = time.monotonic()
    sent = send(spec, run_file, store, cluster, reporter, wanted=wanted, directory=Path.cwd())
    job = {"submission_id": sent.submission_id, "attached": sent.attached}
    if detach:
        facts = {"state": "in flight", "dataset": wanted.reference, **job}
        return facts, f"{wanted.reference} is being made by {sent.submission_id}. Watch it: {again}"
    made = await_dataset(wanted, sent.submission_id, store, cluster, reporter, again=again)
    seconds = round(time.monotonic() - began_s, 1)
    text = f"{wanted.reference} is made; this took {words.duration(seconds)}.\n{describe(made)}"
    return {"state": "prepared", **facts_of(made), **job, "seconds": seconds}, text


def check_preparable(spec: RunSpec) -> None:
    """
    Raises:
        SpecError: there is nothing to prepare, or it lacks what preparing needs.
    """
    if spec.data.train is None:
        raise SpecError(
            f"data.dataset {spec.data.dataset!r} is prepared already, so there is nothing to prepare.",
            next_step="Name a source in data.train to make a dataset of it, or submit the run as it is.",
        )
    if spec.data.kind == "packed" and spec.model.pretrained is None:
        raise SpecError(
            "data.format: messages needs the chat template of a pretrained model.",
            next_step="Set model.pretrained to one made for chat.",
        )


def find_wanted(spec: RunSpec, store: Store, directory: Path) -> Wanted:
    """Which dataset the run file describes; what lies in S3 is listed, not read."""
    identity = identify(spec, store, directory, edition=0)
    return Wanted(name=spec.name, fingerprint=identity.dataset_fingerprint)


def build_request(
    spec: RunSpec, run_file: Path, store: Store, target: Target[Any], *, wanted: Wanted, directory: Path, repeat: int
) -> tuple[Request, Package]:
    """What would be sent now: the job, and the working directory, which must hold the run file."""
    packed = package(directory)
    request: Request = target.render(
        PrepareRequest(
            dataset=wanted.name,
            fingerprint=wanted.fingerprint,
            repeat=repeat,
            run_file=relative_to(directory, run_file),
            version=__version__,
            package_digest=packed.digest,
            store_uri=store.uri,
            resources=spec.resources,
            env=spec.env,
            secrets=spec.secrets,
        )
    )
    return request, packed


def send(
    spec: RunSpec,
    run_file: Path,
    store: Store,
    target: Target[Any],
    reporter: Reporter,
    *,
    wanted: Wanted,
    directory: Path,
) -> Sent:
    """Submit the job unless one is in flight already."""
    require_conditional_writes(store)
    repeat, goes_on = find_job(target, wanted)
    job = preparation_id(wanted.name, wanted.fingerprint, repeat=repeat)
    if goes_on:
        reporter.say(f"{wanted.reference} is being made by {job}; attached.")
        return Sent(submission_id=job, attached=True)
    request, packed = build_request(spec, run_file, store, target, wanted=wanted, directory=directory, repeat=repeat)
    again = f"headway prepare{target.flag} {run_file}"
    with sending(job, next_step=f"Watch it: {again}. End it: {again} --stop"):
        submission = hand_over(wanted.reference, request, packed, target, reporter)
    return Sent(submission_id=submission.submission_id, attached=not submission.created)


def find_job(target: Target[Any], wanted: Wanted) -> tuple[int, bool]:
    """The first number whose job has not ended, and whether there is such a job: Ray takes each id once."""
    repeat = 0
    while (found := target.find(preparation_id(wanted.name, wanted.fingerprint, repeat=repeat))) is not None:
        if not found.over:
            return repeat, True
        repeat += 1
    return repeat, False


def stop_job(wanted: Wanted, target: Target[Any], *, again: str) -> Result:
    """End the job in flight. What it has made stays, and the next one goes on from there."""
    repeat, goes_on = find_job(target, wanted)
    if not goes_on:
        return {"state": "idle", "dataset": wanted.reference}, f"No job makes {wanted.reference}."
    job = preparation_id(wanted.name, wanted.fingerprint, repeat=repeat)
    target.stop(job)
    facts = {"state": "stopped", "dataset": wanted.reference, "submission_id": job}
    return facts, f"{job} is being ended. To go on from what it made: {again}"


def await_dataset(
    wanted: Wanted,
    job: str,
    store: Store,
    target: Target[Any],
    reporter: Reporter,
    *,
    again: str,
    sleep: Callable[[float], None] = time.sleep,
) -> DatasetManifest:
    """Follow the job to its end; then the dataset is in the store, or the job's error is raised.

    Args:
        again: the command that follows it, for a person to type.
    """
    try:
        followed = follow(job, wanted.reference, target, reporter, sleep=sleep)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"No longer watching {wanted.reference}; {job} goes on.",
            next_step=f"Watch it: {again}. End it: {again} --stop",
        ) from e
    if followed.status is not None and followed.status.hopeless:
        target.stop(job)
    made = wanted.find(store)
    if made is None:
        raise followed.error(wanted.reference, again=again)
    return made


def facts_of(manifest: DatasetManifest) -> dict[str, Any]:
    """The figures of a dataset that whoever prepares it wants to see. Pure.

    ``reused`` is the fingerprint of the earlier preparation that unchanged files were taken from.
    """
    return {
        "dataset": f"{manifest.name}@{manifest.fingerprint}",
        "train_tokens": manifest.train.num_tokens,
        "eval_tokens": manifest.eval.num_tokens,
        "num_files": manifest.source.get("num_files"),
        "num_skipped_files": manifest.source.get("num_skipped", 0),
        "num_bad_records": manifest.source.get("num_bad_records", 0),
        "size_bytes": size_of(manifest),
        "counts": dict(manifest.counts),
        "reused": manifest.lineage.reused if manifest.lineage is not None else None,
    }


def describe(manifest: DatasetManifest) -> str:
    """The same for people. Pure."""
    facts = facts_of(manifest)
    rows = {
        "tokens": f"{facts['train_tokens']:,} to train on, {facts['eval_tokens']:,} held out",
        "files": f"{cell(facts['num_files'])}, {facts['num_skipped_files']:,} of them left out",
        "bad records": f"{facts['num_bad_records']:,}",
        "size": f"{facts['size_bytes'] / 1e6:,.1f} MB",
    }
    if facts["reused"] is not None:
        rows["reused"] = f"what had not changed since {manifest.name}@{facts['reused']}"
    return "\n".join(f"  {name:<11} {value}" for name, value in rows.items())
