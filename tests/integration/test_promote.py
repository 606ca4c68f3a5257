"""headway promote, rollback and show, against a real S3 server. Nothing serves here: the tests write the status."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.commands.promote import share
from orchestrator.errors import UsageError
from orchestrator.release import channels
from orchestrator.release.channels import ChannelStatus
from orchestrator.release.versions import VersionFile, claim_version, publish
from orchestrator.store import Store, layout
from tests.command_line import Said, in_process
from tests.tiny_model import make_version

Cli = Callable[..., Said]
MODEL, CHANNEL = "lm", "production"


@pytest.fixture
def run(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, with the test's store and four versions of a model in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWAY_STORE", store.uri)
    for number in (1, 2, 3, 4):
        assert claim_version(store, MODEL, facts={"run_id": "tiny-00000000"}) == number
        files = {"config.json": VersionFile(size_bytes=0, sha256="0" * 64)}
        publish(store, make_version(model=MODEL, number=number, files=files))
    return in_process(capsys)


def wanted(store: Store) -> list[tuple[int, int | None]]:
    """Version and canary of each entry."""
    entries = channels.history(store, MODEL, CHANNEL).entries
    return [(entry.version, entry.canary.version if entry.canary else None) for entry in entries]


def test_promote_and_roll_back(run: Cli, store: Store) -> None:
    for number in (1, 2, 3):
        said = run("promote", f"{MODEL}@{number}", "--reason", "the meeting", "--json").assert_done().json
        assert (said["entry"], said["version"], said["changed"]) == (number, number, True)
    entry = channels.newest(store, MODEL, CHANNEL)
    assert entry is not None
    assert entry.reason == "the meeting"
    assert entry.by.startswith("arn:aws:")  # this S3 server has an STS of its own

    again = run("promote", f"{MODEL}@3").assert_done()
    assert "in force on production already" in again.out
    assert "lm@2 is to serve on production again (entry 4)" in run("rollback", MODEL).assert_done().out
    assert run("rollback", MODEL, "--json").assert_done().json["version"] == 1
    run("rollback", MODEL).assert_refused(2, "no version of lm on production to go back to").assert_next_step("--to N")
    assert run("rollback", MODEL, "--to", "4", "--json").assert_done().json["changed"]
    assert wanted(store) == [(1, None), (2, None), (3, None), (2, None), (1, None), (4, None)]
    assert channels.history(store, MODEL, CHANNEL).entries[3].reason == "rolled back from lm@3"


def test_a_canary_is_beside_what_serves(run: Cli, store: Store) -> None:
    run("promote", f"{MODEL}@2", "--canary", "10%").assert_refused(2, "Nothing serves on lm's channel production")
    run("promote", f"{MODEL}@1").assert_done()
    said = run("promote", f"{MODEL}@2", "--canary", "10%").assert_done()
    assert "lm@2 gets 0.1 of the requests of production, beside lm@1" in said.out
    again = run("promote", f"{MODEL}@2", "--canary", "0.1", "--json").assert_done().json
    assert (again["changed"], again["entry"]) == (False, None)
    # It proves itself, and the next canary is beside it.
    channels.write_status(store, MODEL, CHANNEL, ChannelStatus(serving=2, promoted={2: 2}))
    run("promote", f"{MODEL}@3", "--canary", "25%").assert_done()
    assert run("rollback", MODEL, "--json").assert_done().json["version"] == 2
    assert run("rollback", MODEL, "--json").assert_done().json["version"] == 1
    assert wanted(store) == [(1, None), (1, 2), (2, 3), (2, None), (1, None)]


def test_a_rejected_version_stays_rejected(run: Cli, store: Store) -> None:
    for number in (1, 2, 3):
        run("promote", f"{MODEL}@{number}").assert_done()
    channels.write_status(store, MODEL, CHANNEL, ChannelStatus(serving=2, tried=3, rejected={3: "answers NaN"}))
    run("promote", f"{MODEL}@3").assert_refused(2, "answers NaN").assert_next_step("another version")
    run("rollback", MODEL, "--to", "3").assert_refused(2, "answers NaN")
    said = run("rollback", MODEL, "--json").assert_done().json
    assert (said["version"], said["changed"]) == (2, True)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["promote", "lm"], "'lm' is not MODEL@NUMBER"),
        (["promote", "lm@9"], "no version lm@9"),
        (["promote", "lm@0"], "no version lm@0"),
        (["rollback", "lm"], "Nothing was released to lm's channel production"),
        (["rollback", "lm", "--to", "9"], "no version lm@9"),
        (["promote", "lm@1", "--canary", "100%"], "--canary '100%' is no share"),
        (["promote", "lm@1", "--channel", "a/b"], "--channel 'a/b' is no name of a channel"),
        (["rollback", "lm", "--channel", ""], "--channel '' is no name of a channel"),
    ],
)
def test_what_cannot_be(run: Cli, store: Store, command: list[str], words: str) -> None:
    run(*command).assert_refused(2, words)
    assert wanted(store) == []


def test_two_who_roll_back_at_once_go_back_once(run: Cli, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        run("promote", f"{MODEL}@{number}").assert_done()
    faster = channels.append

    def slower(*arguments: object, **more: object) -> channels.ChannelEntry:
        """Another person's rollback comes between this one's look and its entry."""
        monkeypatch.setattr(channels, "append", faster)
        faster(store, MODEL, CHANNEL, version=2, by="another", reason="rolled back from lm@3")
        return faster(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(channels, "append", slower)
    said = run("rollback", MODEL)
    said.assert_refused(4, "Nothing was appended", "entry 4, lm@2, by another").assert_next_step("headway show lm")
    assert wanted(store)[-1] == (2, None)


def test_a_damaged_status_is_passed_over(run: Cli, store: Store) -> None:
    for number in (1, 2):
        run("promote", f"{MODEL}@{number}").assert_done()
    store.put_status(layout.channel_status(MODEL, CHANNEL), {"format": "nothing"})
    assert "Passed over" in run("rollback", MODEL).assert_done().err
    assert len(run("show", MODEL, "--json").assert_done().json["channels"][CHANNEL]["damaged"]) == 1


def test_a_damaged_entry_is_passed_over(run: Cli, store: Store) -> None:
    for number in (1, 2):
        run("promote", f"{MODEL}@{number}").assert_done()
    store.create_json(layout.channel_entry(MODEL, CHANNEL, 3), {"format": "nothing"})
    said = run("rollback", MODEL).assert_done()
    assert "lm@1 is to serve" in said.out
    assert "Passed over" in said.err
    shown = run("show", MODEL, "--json").assert_done().json["channels"][CHANNEL]
    assert len(shown["damaged"]) == 1


def test_show_tells_wanted_serving_and_history(run: Cli, store: Store) -> None:
    run("promote", f"{MODEL}@1").assert_done()
    assert "nobody serves this channel yet" in run("show", MODEL).assert_done().out
    run("promote", f"{MODEL}@2", "--canary", "20%", "--reason", "faster").assert_done()
    channels.write_status(store, MODEL, CHANNEL, ChannelStatus(serving=1))
    text = run("show", MODEL).assert_done().out
    for words in ("wanted: lm@1", "canary: lm@2, 0.2 of the requests", "serving: lm@1", "+ 20% lm@2", "why faster"):
        assert words in text
    channels.write_status(store, MODEL, CHANNEL, ChannelStatus(serving=1, tried=2, rejected={2: "is slow"}))
    shown = run("show", MODEL, "--json").assert_done().json["channels"][CHANNEL]
    assert (shown["wanted"], shown["in_force"], shown["canary"], shown["serving"]) == (1, 1, None, 1)
    assert "lm@2: is slow" in run("show", MODEL).assert_done().out


def test_lineage_that_is_gone_is_said(run: Cli) -> None:
    lineage = run("show", f"{MODEL}@1", "--json").assert_done().json["lineage"]
    assert "not readable any more" in lineage["run"]
    assert "not readable any more" in lineage["dataset"]


@pytest.mark.parametrize(("text", "value"), [("10%", 0.1), ("0.1", 0.1), (" 2.5% ", 0.025), ("99%", 0.99)])
def test_a_share(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "0", "0%", "1", "100%", "-5%", "ten", "1e-1", "nan"])
def test_no_share(text: str) -> None:
    with pytest.raises(UsageError, match="is no share"):
        share(text)
