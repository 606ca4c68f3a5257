"""The command line against a real S3 server: what is in the store, and every way in which the store is not usable."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from torch import nn

from orchestrator.checkpoint.catalog import MANIFEST, Folder, find
from orchestrator.checkpoint.format import State
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.dataset.format import DatasetManifest, Shard, Split, Tokenizer
from orchestrator.errors import Fenced, SpecError
from orchestrator.record import EventLog
from orchestrator.record.report import leave_report
from orchestrator.release import channels
from orchestrator.release.channels import ChannelStatus
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.release.versions import CheckpointSource, DatasetSource, Version, VersionFile, claim_version, publish
from orchestrator.spec import parse
from orchestrator.starter import STARTER
from orchestrator.store import Attempt, Store, claim_attempt, claim_group, layout
from orchestrator.store.attempts import end_attempt, ensure_newest, stop_reason
from orchestrator.targets.ports import is_free
from orchestrator.targets.seaweedfs import S3Server
from tests.command_line import Said, in_process
from tests.integration.conftest import BUCKET
from tests.unit.checkpoint.states import FakeState, random_values

DONE, STOPPED = "tiny-0123abcd", "other-4567abcd"
FINGERPRINT = "0123456789abcdef"
SHA256 = hashlib.sha256(b"").hexdigest()
DOWN_LIMIT_S = 15.0
SHAPES: dict[str, tuple[int, ...]] = {"w": (7, 5), "bias": (3,)}
WEIGHTS = random_values(SHAPES)
NOWHERE = "http://127.0.0.1:1"  # a target: nothing here gets as far as asking it

Cli = Callable[..., Said]


@pytest.fixture
def run(
    s3: S3Server, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Cli]:
    """The command line in this process, in an empty folder, with the test's store set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADWAY_STORE", store.uri)
    return in_process(capsys)


def write_run_file(folder: Path, data: dict[str, Any]) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump({**yaml.safe_load(STARTER), "data": data}))


# -- what is there


@pytest.fixture
def filled(store: Store) -> Store:
    """One dataset; one run that is done and released, after an attempt that was stopped; one that was stopped."""
    put_dataset(store)
    first = put_attempt(store, DONE, steps=range(1, 5), checkpoint=4)
    end_attempt(store, first, state="stopped", reason="headway stop")
    second = put_attempt(store, DONE, steps=range(5, 9), checkpoint=8)
    version = put_version(store, second)
    facts = {"steps": 8, "evaluation": {"loss": 2.5, "perplexity": 12.2}, "version": version.name}
    commit_outcome(store, Outcome(run_id=DONE, state="done", attempt=2, facts=facts, ended_s=time.time()))
    end_attempt(store, second, state="done", reason="")
    stopped = put_attempt(store, STOPPED, steps=range(1, 4), checkpoint=3)
    end_attempt(store, stopped, state="stopped", reason="stopped at step 3 of 8: headway stop.")
    return store


def put_dataset(store: Store) -> None:
    def split(name: str, num_tokens: int) -> Split:
        shard = Shard(file=f"{name}-00000.bin", num_tokens=num_tokens, size_bytes=2 * num_tokens, pieces=(SHA256,))
        return Split(shards=(shard,), num_tokens=num_tokens, num_bytes=3 * num_tokens, num_files=1)

    manifest = DatasetManifest(
        name="tiny",
        fingerprint=FINGERPRINT,
        dtype="uint16",
        tokenizer=Tokenizer(file="tokenizer.json", sha256=SHA256, size_bytes=0, vocab_size=300, end_of_text_id=0),
        train=split("train", 9000),
        eval=split("eval", 1000),
        unigram_loss=5.0,
        source={"pattern": "s3://corpus/**"},
        created_s=time.time(),
    )
    store.create_json(layout.dataset_manifest("tiny", FINGERPRINT), manifest.model_dump(mode="json"))


def put_attempt(store: Store, run_id: str, *, steps: range, checkpoint: int) -> Attempt:
    """An attempt that trained ``steps`` and committed one checkpoint."""
    spec = parse({**yaml.safe_load(STARTER), "name": "tiny"})
    if not store.exists(layout.run_spec(run_id)):
        store.create_json(layout.run_spec(run_id), {"spec": spec.model_dump(mode="json"), "run_id": run_id})
    attempt = claim_attempt(store, run_id, facts={"job": f"{run_id}-job", "host": "here"})
    events = EventLog(store, attempt, "train")
    events.append("stage_started", stage="train")
    for step in steps:
        events.append("step", step=step, loss=5.0 - step / 10)
    events.close()
    put_checkpoint(store, attempt, spec.sha256(), step=checkpoint)
    return attempt


def put_checkpoint(store: Store, attempt: Attempt, spec_sha256: str, *, step: int) -> None:
    """A checkpoint of ``WEIGHTS``, by a group of two workers."""
    group = claim_group(store, attempt)
    states = [FakeState(SHAPES, rank=rank, world_size=2) for rank in range(2)]
    writers = []
    for rank, state in enumerate(states):
        state.fill(WEIGHTS)
        writers.append(
            CheckpointWriter(store, group, state, nn.Module(), rank=rank, world_size=2, keep=3)  # type: ignore[arg-type]
        )
    facts = {"spec_sha256": spec_sha256, "dataset_fingerprint": FINGERPRINT}
    for writer in writers:
        writer.save(State(step=step, tokens=100, loss=4.0, precision="fp32", optimizer_step=step, **facts))
    for writer in writers:
        saved = writer.wait()
        writer.close()
        assert saved is not None
        assert saved.error is None


def put_version(store: Store, attempt: Attempt) -> Version:
    number = claim_version(store, "tiny-lm", facts={"run_id": attempt.run_id, "attempt": attempt.number})
    version = Version(
        model="tiny-lm",
        number=number,
        task="causal-lm",
        run_id=attempt.run_id,
        attempt=attempt.number,
        checkpoint=CheckpointSource(uri=store.uri_of(layout.checkpoint(attempt.run_id, 8)), step=8),
        dataset=DatasetSource(name="tiny", fingerprint=FINGERPRINT),
        code_digest="",
        evaluation={"loss": 2.5},
        gate={"passed": True, "reasons": []},
        files={"model.safetensors": VersionFile(size_bytes=0, sha256=SHA256)},
        created_s=time.time(),
        nonce=attempt.nonce,
    )
    publish(store, version)
    channels.append(store, "tiny-lm", "production", version=number, by="a test", reason="passed", run_id=attempt.run_id)
    channels.write_status(store, "tiny-lm", "production", ChannelStatus(serving=number, tried=number))
    return version


def test_an_empty_store_says_so(run: Cli) -> None:
    for what in ("runs", "models", "datasets"):
        assert run("list", what).assert_done().out == f"There are no {what} yet.\n"
        assert run("list", what, "--json").assert_done().json == {what: []}


def test_list(run: Cli, filled: Store) -> None:
    names = ("run", "state", "attempts", "steps", "eval_loss", "version")
    assert [tuple(row[name] for name in names) for row in run("list", "--json").assert_done().json["runs"]] == [
        (STOPPED, "stopped", 1, 3, None, None),
        (DONE, "done", 2, 8, 2.5, "tiny-lm@1"),
    ]
    assert run("list", "models", "--json").assert_done().json == {
        "models": [{"version": "tiny-lm@1", "run": DONE, "eval_loss": 2.5, "channels": "production"}]
    }
    (dataset,) = run("list", "datasets", "--json").assert_done().json["datasets"]
    assert dataset.items() >= {
        "dataset": f"tiny@{FINGERPRINT}", "train_tokens": 9000, "eval_tokens": 1000, "vocabulary": 300,
        "size_bytes": 20_000, "source": "s3://corpus/**", "problem": None,
    }.items()  # fmt: skip
    checkpoints = run("list", "checkpoints", DONE, "--json").assert_done().json["checkpoints"]
    assert [(each["step"], each["world_size"], each["attempt"]) for each in checkpoints] == [(8, 2, 2), (4, 2, 1)]
    assert [each["verified"] for each in checkpoints] == ["yes", "yes"]
    assert all(each["size_bytes"] > 0 and each["age_s"] >= 0 for each in checkpoints)


def test_a_damaged_checkpoint_is_listed_as_such(run: Cli, filled: Store) -> None:
    damage(filled, 8, MANIFEST)
    filled.delete([find(filled, DONE, 4).prefix + "rank-00001.safetensors"])
    checkpoints = run("list", "checkpoints", DONE, "--json").assert_done().json["checkpoints"]
    assert [each["verified"].partition(":")[0] for each in checkpoints] == ["damaged", "damaged"]
    assert "manifest.json is damaged" in checkpoints[0]["verified"]
    assert "rank-00001.safetensors holds None bytes" in checkpoints[1]["verified"]
    assert "damaged" in run("list", "checkpoints", DONE).assert_done().out


def damage(store: Store, step: int, name: str) -> Folder:
    folder = find(store, DONE, step)
    data = bytearray(store.get(folder.prefix + name))
    data[-1] ^= 1
    store.upload(folder.prefix + name, bytes(data))
    return folder


# -- the report


def test_a_run_that_left_its_summary_is_listed_by_it(run: Cli, filled: Store) -> None:
    leave_report(filled, DONE)
    row = next(row for row in run("list", "--json").assert_done().json["runs"] if row["run"] == DONE)
    assert (row["state"], row["steps"], row["eval_loss"], row["version"]) == ("done", 8, 2.5, "tiny-lm@1")
    assert row["wall_s"] > 0
    assert 0 <= row["goodput"] <= 1
    assert b"tiny-lm@1" in filled.get(layout.report(DONE))


def test_a_report_is_written_beside_or_where_it_is_asked_for(run: Cli, filled: Store, tmp_path: Path) -> None:
    assert f"{DONE}.html" in run("report", "tiny").assert_done().out
    assert (tmp_path / f"{DONE}.html").read_text().startswith("<!doctype html>")
    said = run("report", DONE, "--out", "r.html", "--json").assert_done().json
    assert said["report"] == str(tmp_path / "r.html")
    assert (said["state"], said["evaluation"]["loss"], said["version"]) == ("done", 2.5, "tiny-lm@1")
    markdown = run("report", DONE, "--markdown").assert_done().out
    assert markdown.startswith(f"## ✓ Done: {DONE}\n")
    assert len(list(tmp_path.iterdir())) == 2
    run("report", DONE, "--out", "no/where.html").assert_refused(4, "no/where.html").assert_next_step("--out")
    run("report", "nope").assert_refused(2, "no run 'nope'")


def test_two_runs_side_by_side(run: Cli, filled: Store) -> None:
    found = run("show", DONE, STOPPED, "--json").assert_done().json
    assert found["names"] == [DONE, STOPPED]
    assert found["figures"]["state"] == ["done", "stopped"]
    assert found["evaluation"]["loss"] == [2.5, None]
    assert found["run file"]["train.steps"] == [200, 200]
    text = run("show", DONE, STOPPED).assert_done().out
    assert "run file: the same" in text
    assert "12.2" in text


def test_two_versions_side_by_side(run: Cli, filled: Store) -> None:
    found = run("show", "tiny-lm@1", "tiny-lm@1", "--json").assert_done().json
    assert found["came from"]["run_id"] == [DONE, DONE]
    assert "came from: the same" in run("show", "tiny-lm@1", "tiny-lm@1").assert_done().out
    run("show", "tiny-lm@1", DONE).assert_refused(2, "are a version and a run").assert_next_step("MODEL@1 MODEL@2")
    run("show", "tiny-lm@1", "tiny-lm@7").assert_refused(2, "no version tiny-lm@7")


# -- verify and export


def test_verify_reads_every_checkpoint(run: Cli, filled: Store) -> None:
    said = run("verify", DONE, "--json").assert_done()
    assert said.json["verified"].keys() == {f"{DONE}@8", f"{DONE}@4"}
    address = filled.uri_of(layout.checkpoint(DONE, 8))
    assert run("verify", address, "--json").assert_done().json["verified"].keys() == {f"{DONE}@8"}
    assert not [item for item in filled.list(layout.checkpoints(DONE)) if "/pins/" in item.key]


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.index", MANIFEST])
def test_verify_names_what_is_damaged_and_reads_on(run: Cli, filled: Store, name: str) -> None:
    folder = damage(filled, 8, name)
    said = run("verify", DONE)
    assert said.code == 1
    assert f"1 of 2 are damaged: {DONE}@8" in said.err
    said.assert_next_step("submit it again")
    assert filled.uri_of(folder.prefix + name) in said.out + said.err


def test_export_writes_weights_that_safetensors_reads(run: Cli, filled: Store, tmp_path: Path) -> None:
    filled.delete([layout.run_spec(DONE)])  # as a loop of one's own, which has no run file
    said = run("export", f"{DONE}@4", "--to", "out", "--dtype", "bf16", "--json").assert_done()
    assert (said.json["step"], said.json["dtype"], said.json["assets"]) == (4, "bf16", [])
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == SHAPES.keys()
    for name, shape in SHAPES.items():
        assert torch.equal(found[name], WEIGHTS[name]["fp32"].view(shape).to(torch.bfloat16))
    to = f"{filled.uri}/elsewhere"
    assert (
        run("export", f"{DONE}@4", "--to", to, "--dtype", "bf16", "--json").assert_done().json["files"]
        == (said.json["files"])
    )
    assert filled.get("elsewhere/model.safetensors") == (tmp_path / "out" / "model.safetensors").read_bytes()
    for place, words in (("out", "out exists"), (to, "is not empty")):
        run("export", f"{DONE}@4", "--to", place, "--json").assert_refused(2, words).assert_next_step("--to")


def test_a_loop_of_ones_own_lists_its_checkpoints(run: Cli, filled: Store) -> None:
    filled.delete([layout.run_spec(DONE)])
    checkpoints = run("list", "checkpoints", DONE, "--json").assert_done().json["checkpoints"]
    assert [each["step"] for each in checkpoints] == [8, 4]


def test_a_run_file_that_cannot_be_read_costs_the_weights_nothing(run: Cli, filled: Store, tmp_path: Path) -> None:
    said = run("export", DONE, "--to", "out", "--json").assert_done()  # its spec.json names no dataset
    assert said.json["assets"] == []
    assert "Weights only" in said.err
    assert "spec.json is not a run file of this version" in said.err
    assert safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").keys() == SHAPES.keys()


def test_a_damaged_version_has_a_next_step_of_its_own(run: Cli, filled: Store) -> None:
    said = run("verify", "tiny-lm@1", "--json")
    said.assert_refused(1, "1 of 1 are damaged: tiny-lm@1/model.safetensors").assert_next_step("roll back")


def test_an_export_of_damaged_bytes_leaves_nothing(run: Cli, filled: Store, tmp_path: Path) -> None:
    filled.delete([layout.run_spec(DONE)])
    damage(filled, 8, "rank-00001.safetensors")
    for to in ("out", f"{filled.uri}/elsewhere"):
        run("export", DONE, "--to", to, "--json").assert_refused(1, "rank-00001.safetensors: block 0")
    assert list(tmp_path.iterdir()) == []
    assert list(filled.list("elsewhere/")) == []
    assert not [item for item in filled.list(layout.checkpoints(DONE)) if "/pins/" in item.key]


@pytest.mark.parametrize(("what", "seen"), [("runs", DONE), ("models", "tiny-lm@1"), ("datasets", "9,000")])
def test_list_as_a_table(run: Cli, filled: Store, what: str, seen: str) -> None:
    header, *rows = run("list", what).assert_done().out.splitlines()
    assert header == header.lower()
    assert seen in "\n".join(rows)


def test_status(run: Cli, filled: Store) -> None:
    done = run("status", DONE, "--json").assert_done().json
    assert (done["state"], done["attempts"], done["stage"], done["checkpoints"]) == ("done", 2, "train", [8, 4])
    assert done["last_step"]["step"] == 8
    assert done["outcome"]["facts"]["version"] == "tiny-lm@1"
    stopped = run("status", STOPPED).assert_done().out
    assert "state: stopped" in stopped
    assert "step 3 of 8" in stopped


def test_a_name_will_do(run: Cli, filled: Store) -> None:
    assert run("show", "other", "--json").assert_done().json["run_id"] == STOPPED


def test_show(run: Cli, filled: Store) -> None:
    assert run("show", DONE, "--json").assert_done().json["run_id"] == DONE
    model = run("show", "tiny-lm", "--json").assert_done().json
    assert [each["version"] for each in model["versions"]] == ["tiny-lm@1"]
    assert model["channels"]["production"]["status"]["serving"] == 1
    version = run("show", "tiny-lm@1", "--json").assert_done().json
    assert (version["run_id"], version["checkpoint"]["step"]) == (DONE, 8)
    assert "run_id: tiny-0123abcd" in run("show", "tiny-lm@1").assert_done().out


@pytest.mark.parametrize(
    ("command", "words", "next_step"),
    [
        (["show", "nope"], "no run 'nope'", "headway list runs"),
        (["status", "nope"], "no run 'nope'", "headway list runs"),
        (["list", "checkpoints", "nope"], "no run 'nope'", "headway list runs"),
        (["show", "tiny-lm@7"], "no version tiny-lm@7", "headway show tiny-lm"),
        (["show", "tiny-lm@one"], "'tiny-lm@one' is not MODEL@NUMBER", "headway show tiny-lm"),
        (["serve", "nope", "--target", NOWHERE], "Nothing was released to nope", "headway list models"),
    ],
)
def test_what_is_not_there(run: Cli, filled: Store, command: list[str], words: str, next_step: str) -> None:
    run(*command, "--json").assert_refused(2, words).assert_next_step(next_step)


def test_a_finished_run_is_not_stopped(run: Cli, filled: Store) -> None:
    said = run("stop", DONE, "--target", NOWHERE, "--json").assert_done()
    assert said.json == {"run_id": DONE, "state": "done"}


def test_a_cluster_that_is_not_there(run: Cli, store: Store, tmp_path: Path) -> None:
    store.upload("corpus/a.txt", b"text")
    write_run_file(tmp_path, {"train": f"{store.uri}/corpus/**"})
    for command in (["submit", "run.yaml"], ["plan", "run.yaml", "--manifests"]):
        said = run(*command, "--target", NOWHERE)
        said.assert_refused(4, f"Ray at {NOWHERE} cannot be reached").assert_next_step("headway up")


# -- bad data


def test_an_empty_source(run: Cli, store: Store, tmp_path: Path) -> None:
    write_run_file(tmp_path, {"train": f"{store.uri}/nothing/**"})
    said = run("submit", "run.yaml", "--target", NOWHERE, "--json")
    said.assert_refused(2, "data.train", f"{store.uri}/nothing/**", "matches no file").assert_next_step("**")


def test_files_that_hold_nothing_are_no_source(run: Cli, store: Store, tmp_path: Path) -> None:
    store.upload("corpus/empty.txt", b"")
    write_run_file(tmp_path, {"train": f"{store.uri}/corpus/**"})
    run("submit", "run.yaml", "--target", NOWHERE, "--json").assert_refused(2, "matches no file that holds anything")


@pytest.mark.parametrize("name", ["nope", f"tiny@{FINGERPRINT[::-1]}"])
def test_an_unknown_dataset(run: Cli, filled: Store, tmp_path: Path, name: str) -> None:
    write_run_file(tmp_path, {"dataset": name})
    said = run("submit", "run.yaml", "--target", NOWHERE, "--json")
    said.assert_refused(SpecError.exit_code, "data.dataset", repr(name)).assert_next_step("headway list datasets")


def test_plan_goes_on_where_the_data_cannot_be_listed(run: Cli, store: Store, tmp_path: Path) -> None:
    write_run_file(tmp_path, {"dataset": "nope"})
    said = run("plan", "run.yaml").assert_done()
    assert "cannot be listed" in said.out


# -- a store that is not usable


USES: list[list[str]] = [["list"], ["show", "x"], ["submit", "run.yaml", "--target", NOWHERE]]


@pytest.fixture
def sent(tmp_path: Path, store: Store) -> None:
    write_run_file(tmp_path, {"train": f"{store.uri}/corpus/**"})


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("command", USES)
@pytest.mark.parametrize(("variable", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "WRONG")])
def test_a_wrong_key(run: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str], variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    run(*command, "--json").assert_refused(4, BUCKET).assert_next_step(variable)


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("command", USES)
def test_no_credentials(run: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    run(*command).assert_refused(4, "no S3 credentials").assert_next_step("AWS_ACCESS_KEY_ID")


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("command", USES)
def test_no_bucket(run: Cli, command: list[str]) -> None:
    said = run(*command, "--store", "s3://no-such-bucket-here/x")
    said.assert_refused(4, "s3://no-such-bucket-here", "no such bucket").assert_next_step("--store")


@pytest.mark.usefixtures("sent")
@pytest.mark.parametrize("command", USES)
def test_a_server_that_is_down_is_told_soon(run: Cli, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    port = next(port for port in range(22000, 30000) if is_free(port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    began_s = time.monotonic()
    said = run(*command, "--json")
    took_s = time.monotonic() - began_s
    said.assert_refused(4, f"127.0.0.1:{port} cannot be reached").assert_next_step("AWS_ENDPOINT_URL", "headway up")
    assert took_s <= DOWN_LIMIT_S


@pytest.mark.parametrize("uri", ["http://bucket/x", "bucket", "s3://", "/some/folder"])
def test_what_is_no_store(run: Cli, uri: str) -> None:
    run("list", "--store", uri, "--json").assert_refused(2, uri).assert_next_step("s3://bucket/prefix")


def test_a_damaged_outcome_is_named(run: Cli, filled: Store) -> None:
    filled.upload(layout.outcome(DONE), b'{"format": "headway/outcome/1"}')
    said = run("status", DONE, "--json")
    said.assert_refused(1, filled.uri_of(layout.outcome(DONE)), "headway/outcome/1")


# -- two at once


def test_two_claims_at_once_give_two_numbers_and_fence_the_older(run: Cli, store: Store) -> None:
    store.create_json(layout.run_spec(DONE), {"run_id": DONE})
    barrier = threading.Barrier(2)

    def claim(host: str) -> Attempt:
        barrier.wait()
        return claim_attempt(store, DONE, facts={"host": host, "job": host})

    with ThreadPoolExecutor(2) as pool:
        older, newer = sorted(pool.map(claim, ["one", "two"]), key=lambda attempt: attempt.number)
    assert (older.number, newer.number) == (1, 2)
    ensure_newest(store, newer)
    with pytest.raises(Fenced, match="attempt 2 has taken over"):
        ensure_newest(store, older)
    assert stop_reason(store, older) == "attempt 2 has taken over"
    status = run("status", DONE, "--json", "--target", NOWHERE).assert_done().json
    assert (status["state"], status["attempts"]) == ("in flight", 2)
    assert status["job"] == store.get_json(layout.attempt(DONE, 2))["host"]
    assert status["job_state"].startswith(f"unknown: Ray at {NOWHERE} cannot be reached")
