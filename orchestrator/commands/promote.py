"""``headway promote`` and ``rollback``: one more entry of a channel. Neither needs ray or the serving cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from orchestrator.commands.context import find_store
from orchestrator.commands.sender import caller
from orchestrator.document import NAME
from orchestrator.errors import AlreadyExists, IntegrityError, StoreError, UsageError
from orchestrator.release import channels
from orchestrator.release.channels import Canary, ChannelEntry
from orchestrator.release.versions import read_version
from orchestrator.release.way_back import InForce, Verdicts, in_force, step_back
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import MAX_NAME
from orchestrator.store import Store, layout

_SHARE = re.compile(r"(\d+(?:\.\d+)?)(%?)")
_TRIES = 5  # of finding the channel unchanged


def promote(
    name: str,
    *,
    channel: str,
    canary: str | None,
    reason: str | None,
    store_uri: str | None,
    reporter: Reporter,
) -> Result:
    """Have a version serve, all at once or as a canary first.

    Raises:
        UsageError: no such version, one that was rejected, or a canary beside nothing.
    """
    model, _, number = name.partition("@")
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"{name!r} is not MODEL@NUMBER.", next_step=f"See: headway show {model}")
    version, weight = int(number), None if canary is None else share(canary)
    _require_channel(channel)
    store = find_store(store_uri)
    _require(store, model, version)

    def decide(history: Sequence[ChannelEntry], verdicts: Verdicts) -> tuple[int, Canary | None, str] | None:
        _require_not_rejected(model, channel, version, verdicts)
        now = in_force(history, verdicts)
        if weight is None:
            wanted = InForce(version=version)
        elif now.version is None:
            raise UsageError(
                f"Nothing serves on {model}'s channel {channel} beside which {name} could be a canary.",
                next_step=f"Without a canary: headway promote {name}",
            )
        else:
            wanted = InForce(version=now.version, canary=Canary(version=version, weight=weight))
        if now in (wanted, InForce(version=version)):
            return None
        return wanted.version or version, wanted.canary, reason or "promoted by hand"

    entry = _append(store, model, channel, decide, reporter)
    if entry is None:
        return _result(model, channel, version, None, None), f"{name} is in force on {channel} already."
    if entry.canary is not None:
        said = f"{name} gets {entry.canary.weight:.4g} of the requests of {channel}, beside {model}@{entry.version}"
    else:
        said = f"{name} is to serve on {channel}"
    return _result(model, channel, version, entry.canary, entry), f"{said} (entry {entry.number}). {_follow(model)}"


def rollback(
    model: str, *, channel: str, to: int | None, reason: str | None, store_uri: str | None, reporter: Reporter
) -> Result:
    """Have the version serve again that came before the one in force, or ``to``.

    Raises:
        UsageError: there is none to go back to, or it was rejected.
    """
    _require_channel(channel)
    store = find_store(store_uri)
    if to is not None:
        _require(store, model, to)

    def decide(history: Sequence[ChannelEntry], verdicts: Verdicts) -> tuple[int, Canary | None, str] | None:
        if not history:
            raise UsageError(
                f"Nothing was released to {model}'s channel {channel}.", next_step="See: headway list models"
            )
        version = to if to is not None else step_back(history, verdicts)
        if version is None:
            raise UsageError(
                f"There is no version of {model} on {channel} to go back to.",
                next_step=f"Name one: headway rollback {model} --to N; see: headway show {model}",
            )
        _require_not_rejected(model, channel, version, verdicts)
        now = in_force(history, verdicts)
        newest = history[-1]
        if now == InForce(version=version) and newest.version == version and newest.canary is None:
            return None
        left = newest.canary.version if newest.canary is not None else newest.version
        return version, None, reason or f"rolled back from {model}@{left}"

    # Without --to, what is one step back for a second person who asks at once would be two for both.
    entry = _append(store, model, channel, decide, reporter, tries=_TRIES if to is not None else 1)
    if entry is None:
        return _result(model, channel, to, None, None), f"{model}@{to} is in force on {channel} already."
    facts = _result(model, channel, entry.version, None, entry)
    return facts, f"{model}@{entry.version} is to serve on {channel} again (entry {entry.number}). {_follow(model)}"


def share(text: str) -> float:
    """``10%`` or ``0.1`` as a share of 1.

    Raises:
        UsageError: it is neither, or not between 0 and 1.
    """
    match = _SHARE.fullmatch(text.strip())
    value = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0.0 < value < 1.0:
        raise UsageError(
            f"--canary {text!r} is no share of the requests: it lies above 0% and below 100%.",
            next_step="Write --canary 10%, or --canary 0.1.",
        )
    return value


_Decide = Callable[[Sequence[ChannelEntry], Verdicts], tuple[int, Canary | None, str] | None]


def _append(
    store: Store, model: str, channel: str, decide: _Decide, reporter: Reporter, *, tries: int = _TRIES
) -> ChannelEntry | None:
    """Append what ``decide`` says of the channel, right after the entry that it saw; None where it wants nothing.

    Args:
        tries: 1 where what is wanted would mean something else once another entry has come.
    """
    by = caller()
    for _ in range(tries):
        history = channels.history(store, model, channel)
        for message in history.damaged:
            reporter.say(f"Passed over: {message}")
        wanted = decide(history.entries, _verdicts(store, model, channel, reporter))
        if wanted is None:
            return None
        version, canary, reason = wanted
        try:
            return channels.append(
                store,
                model,
                channel,
                version=version,
                by=by,
                reason=reason,
                canary=canary,
                after=history.last_number,
            )
        except AlreadyExists:  # somebody else was faster: what is right may have changed
            continue
    found = channels.newest(store, model, channel)
    said = f"entry {found.number}, {model}@{found.version}, by {found.by}" if found else "another entry"
    raise StoreError(
        f"Nothing was appended: {model}'s channel {channel} changed meanwhile ({said}).",
        next_step=f"See whether that is what you want: headway show {model}",
    )


def _verdicts(store: Store, model: str, channel: str, reporter: Reporter) -> Verdicts:
    try:
        return Verdicts.of(channels.read_status(store, model, channel))
    except IntegrityError as e:  # the server writes it anew
        reporter.say(f"Passed over: {e.message}")
        return Verdicts()


def _require(store: Store, model: str, version: int) -> None:
    if version < 1 or not store.exists(layout.version_manifest(model, version)):
        raise UsageError(f"There is no version {model}@{version}.", next_step=f"See: headway show {model}")
    read_version(store, model, version)  # one that is damaged is told now, and not by the server


def _require_not_rejected(model: str, channel: str, version: int, verdicts: Verdicts) -> None:
    reason = verdicts.rejected.get(version)
    if reason is not None:
        raise UsageError(
            f"{model}@{version} was rejected by the server of {channel}, and stays so: {reason}",
            next_step="Choose another version, or release the run's checkpoint as a new one.",
        )


def _require_channel(channel: str) -> None:
    if not re.fullmatch(NAME, channel) or len(channel) > MAX_NAME:
        raise UsageError(
            f"--channel {channel!r} is no name of a channel: a-z, 0-9 and dashes, at most {MAX_NAME} characters.",
            next_step="The one that headway serve follows by itself is production.",
        )


def _result(
    model: str, channel: str, version: int | None, canary: Canary | None, entry: ChannelEntry | None
) -> dict[str, object]:
    return {
        "model": model,
        "channel": channel,
        "version": version,
        "canary": None if canary is None else canary.model_dump(mode="json"),
        "entry": None if entry is None else entry.number,
        "changed": entry is not None,
    }


def _follow(model: str) -> str:
    return f"See what becomes of it: headway show {model}"
