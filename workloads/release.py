"""Releases a version that has passed the gate: publishes it, and has its channel name it, once for each run."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.errors import AlreadyExists
from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelEntry
from orchestrator.release.versions import Version, publish, read_version
from orchestrator.release.way_back import Verdicts, in_force
from orchestrator.spec import ReleaseSpec
from orchestrator.store import Attempt, Store
from orchestrator.store.attempts import ensure_newest


def release_version(store: Store, attempt: Attempt, release: ReleaseSpec, version: Version) -> Version:
    """The version as it stands published, this attempt's or an earlier one's of the same run.

    Raises:
        Fenced: a newer attempt works on the run. IntegrityError: another run has claimed the version's number.
    """
    ensure_newest(store, attempt)
    try:
        publish(store, version)
    except AlreadyExists:  # an earlier attempt of this very run got this far: the number is its claim
        version = read_version(store, version.model, version.number)
    _append(store, attempt, release, version.number)
    return version


def _append(store: Store, attempt: Attempt, release: ReleaseSpec, version: int) -> None:
    """Append the run's one entry to the channel: right after what was seen, or look again."""
    while True:
        history = channels.history(store, release.model, release.channel)
        if any(entry.run_id == attempt.run_id for entry in history.entries):
            return
        stable, canary = _wanted(store, release, version, history.entries)
        ensure_newest(store, attempt)
        try:
            channels.append(
                store,
                release.model,
                release.channel,
                version=stable,
                canary=canary,
                by=f"run {attempt.run_id}",
                reason="passed the gate",
                run_id=attempt.run_id,
                after=history.last_number,
            )
            return
        except AlreadyExists:
            continue


def _wanted(
    store: Store, release: ReleaseSpec, version: int, entries: Sequence[ChannelEntry]
) -> tuple[int, Canary | None]:
    """What the channel is to serve: the version at once, or beside what is in force."""
    status = channels.readable_status(store, release.model, release.channel)
    stable = in_force(entries, Verdicts.of(status)).version
    if release.canary is None or stable is None or stable == version:
        return version, None
    return stable, Canary(version=version, weight=release.canary)
