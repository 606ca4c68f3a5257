"""Channels: append-only entries that say which version is to serve, and the status that the server writes.

An entry is ``models/<model>/channels/<channel>/00007.json``. The highest number is what is wanted; a
rollback is one more entry. ``models/<model>/channels/<channel>.status.json`` is what is so, and has one
writer: the server's decider. While a server moves to another cluster there are two of them, so what they decide is
joined, and only ever grows.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import IntegrityError, NotFound, UsageError
from orchestrator.release.versions import first_fault
from orchestrator.store import layout
from orchestrator.store.s3 import Store

ENTRY_FORMAT: Literal["headway/channel-entry/1"] = "headway/channel-entry/1"
STATUS_FORMAT: Literal["headway/channel-status/1"] = "headway/channel-status/1"
_ENTRY_KEY = re.compile(r"(\d+)\.json")

Number = Annotated[int, Field(ge=1)]
_Document = TypeVar("_Document", bound=BaseModel)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Canary(_Frozen):
    """A second version that answers a share of the requests."""

    version: Number
    weight: Annotated[float, Field(gt=0.0, lt=1.0)]


class ChannelEntry(_Frozen):
    """Which version is to serve from now on, who says so, and why."""

    format: Literal["headway/channel-entry/1"] = ENTRY_FORMAT
    number: Number
    version: Number
    canary: Canary | None = None
    by: str
    reason: str
    run_id: str | None = None
    created_s: float
    nonce: str


class Answered(_Frozen):
    """What a version answered while a canary is watched."""

    requests: Annotated[int, Field(ge=0)] = 0
    """Those that ended, failed ones included."""
    errors: Annotated[int, Field(ge=0)] = 0
    """Those that the version failed."""
    p50_s: float | None = None
    """Seconds a token, the wait for the first included; of a version that classifies, seconds a request."""
    p95_s: float | None = None


class CanaryStatus(_Frozen):
    """The canary that is watched, or the one that was last, and what came of it."""

    entry: Number
    """The channel's entry that names it."""
    version: Number
    weight: float
    since_s: float
    phase: Literal["watched", "passed", "rejected"] = "watched"
    verdict: str = ""
    """Why it is still watched, has passed, or was rejected."""
    stable: Answered = Answered()
    """Of the stable version, in the same time."""
    canary: Answered = Answered()


class ReplicaStatus(_Frozen):
    """One replica, by its own last report."""

    id: str
    serving: Number | None = None
    canary: Number | None = None
    loading: Number | None = None
    problem: str | None = None


class ChannelStatus(_Frozen):
    """What the server made of the channel."""

    format: Literal["headway/channel-status/1"] = STATUS_FORMAT
    serving: Number | None = None
    """The version that answers. While the replicas differ, the one before; a canary is not meant."""
    tried: Number | None = None
    """The version that was loaded last, or whose load failed last."""
    rejected: dict[Number, str] = {}
    """Versions that do not serve though an entry may name them, and why. They are not tried again."""
    promoted: dict[Number, Number] = {}
    """By entry, its canary that has passed and serves in the place of the entry's own version."""
    answered: tuple[Number, ...] = ()
    """Versions that some replica has served at any time, in order. One that does not load later is not at fault."""
    canary: CanaryStatus | None = None
    replicas: tuple[ReplicaStatus, ...] = ()
    problem: str | None = None
    """What keeps the wanted version from serving for now, and will be tried again."""
    updated_s: float = 0.0

    def with_verdicts_of(self, other: ChannelStatus) -> ChannelStatus:
        """What was decided and learnt in either; where both reject a version, for the other's reason. All else is
        this one's, but for a canary that the other alone has judged."""
        canary, theirs = self.canary, other.canary
        if theirs is not None and theirs.phase != "watched" and _progress(theirs) > _progress(canary):
            canary = theirs
        return self.model_copy(
            update={
                "rejected": {**self.rejected, **other.rejected},
                "promoted": {**self.promoted, **other.promoted},
                "answered": tuple(sorted(self._known_to_answer() | other._known_to_answer())),
                "canary": canary,
            }
        )

    def _known_to_answer(self) -> set[int]:
        """Those of :attr:`answered`, and what tells the same in a status that was written without it."""
        named = [self.serving, *self.promoted.values(), *([self.canary.version] if self.canary else [])]
        named += [number for each in self.replicas for number in (each.serving, each.canary)]
        return {*self.answered, *(number for number in named if number is not None)}


def _progress(canary: CanaryStatus | None) -> tuple[int, bool]:
    return (0, False) if canary is None else (canary.entry, canary.phase != "watched")


def append(
    store: Store,
    model: str,
    channel: str,
    *,
    version: int,
    by: str,
    reason: str,
    run_id: str | None = None,
    canary: Canary | None = None,
    after: int | None = None,
) -> ChannelEntry:
    """Say that ``version`` is to serve.

    Args:
        after: the entry that this one follows; where another has come meanwhile, nothing is appended.

    Raises:
        UsageError: there is no such version. AlreadyExists: another entry follows ``after`` already.
    """
    for wanted in (version, *([canary.version] if canary else [])):
        if not store.exists(layout.version_manifest(model, wanted)):
            raise UsageError(f"There is no version {model}@{wanted}.", next_step=f"See: headway show {model}")
    entry = ChannelEntry(
        number=(max(entry_numbers(store, model, channel), default=0) if after is None else after) + 1,
        version=version,
        canary=canary,
        by=by,
        reason=reason,
        run_id=run_id,
        created_s=time.time(),
        nonce=secrets.token_hex(8),
    )
    if after is not None:
        store.create_json(layout.channel_entry(model, channel, entry.number), entry.model_dump(mode="json"))
        return entry
    number = store.create_numbered(
        entry.number - 1,
        lambda number: layout.channel_entry(model, channel, number),
        entry.model_dump(mode="json"),
    )
    return entry.model_copy(update={"number": number})


def entry_numbers(store: Store, model: str, channel: str) -> list[int]:
    """The numbers of all entries, in order. One listing, so cheap enough to poll."""
    prefix = layout.channel(model, channel)
    names = (_ENTRY_KEY.fullmatch(item.key[len(prefix) :]) for item in store.list(prefix))
    return sorted(int(match[1]) for match in names if match)


def read_entry(store: Store, model: str, channel: str, number: int) -> ChannelEntry:
    """
    Raises:
        NotFound: no such entry. IntegrityError: it is not a channel entry, or is another's.
    """
    key = layout.channel_entry(model, channel, number)
    entry = _parse(store, key, ChannelEntry, ENTRY_FORMAT)
    if entry.number != number:
        raise IntegrityError(f"{store.uri_of(key)} says that it is entry {entry.number}.")
    return entry


def newest(store: Store, model: str, channel: str) -> ChannelEntry | None:
    """The newest entry that can be read, or None where nothing was ever released to this channel."""
    for number in reversed(entry_numbers(store, model, channel)):
        try:
            return read_entry(store, model, channel, number)
        except IntegrityError:
            continue
    return None


@dataclass(frozen=True, kw_only=True)
class History:
    """A channel's entries, oldest first. Damaged ones are passed over, as the server does."""

    entries: tuple[ChannelEntry, ...] = ()
    damaged: tuple[str, ...] = ()
    """What is wrong with the others."""
    last_number: int = 0
    """Of all entries, damaged ones too; the next one follows it."""


def history(store: Store, model: str, channel: str) -> History:
    """All that was ever released to the channel."""
    numbers = entry_numbers(store, model, channel)
    entries, damaged = [], []
    for number in numbers:
        try:
            entries.append(read_entry(store, model, channel, number))
        except IntegrityError as e:
            damaged.append(e.message)
    return History(entries=tuple(entries), damaged=tuple(damaged), last_number=numbers[-1] if numbers else 0)


def read_status(store: Store, model: str, channel: str) -> ChannelStatus | None:
    """What the server last said, or None where none has served this channel.

    Raises:
        IntegrityError: it is not a status.
    """
    try:
        return _parse(store, layout.channel_status(model, channel), ChannelStatus, STATUS_FORMAT)
    except NotFound:
        return None


def readable_status(store: Store, model: str, channel: str) -> ChannelStatus | None:
    """As :func:`read_status`, and None too where it is damaged: the server writes it anew."""
    try:
        return read_status(store, model, channel)
    except IntegrityError:
        return None


def write_status(store: Store, model: str, channel: str, status: ChannelStatus) -> None:
    """Only the server's decider calls this."""
    store.put_status(layout.channel_status(model, channel), status.model_dump(mode="json"))


def _parse(store: Store, key: str, kind: type[_Document], format_name: str) -> _Document:
    try:
        return kind.model_validate(store.get_json(key))
    except (ValidationError, RecursionError) as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a {format_name} document: {first_fault(e)}.") from e
