"""Which run ``retrain`` brings about, and what it says; with a target that stands for a cluster."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.commands.retrain import Answer, Options, bring, retrain
from orchestrator.commands.sender import ci_job
from orchestrator.errors import EmptySource, GateRefused, RunError, SpecError, StoreError
from orchestrator.record import EventLog
from orchestrator.record.run_record import read_record
from orchestrator.release.outcome import Outcome, commit_outcome
from orchestrator.reporter import Reporter, Result
from orchestrator.runs import identify
from orchestrator.spec import load
from orchestrator.store import claim_attempt, layout
from orchestrator.store.attempts import end_attempt
from tests.unit.commands.test_submit import GOING, FakeTarget, document
from tests.unit.fakes import MemoryStore

TASK = "mine:Task"


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """These credentials are no AWS account's, so STS is not asked whose they are."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a run file, its data, a task of its own and a README."""
    (tmp_path / "data").mkdir()
    for number in range(20):
        (tmp_path / "data" / f"{number}.txt").write_text("text")
    (tmp_path / "mine.py").write_text("class Task: ...\n")
    (tmp_path / "README.md").write_text("Mine.\n")
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    """The run file, with these sections changed."""
    run = document(data={"train": str(folder / "data" / "*.txt")}, task=TASK)
    for section, fields in changes.items():
        run[section] = {**run.get(section, {}), **fields} if isinstance(fields, dict) else fields
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def call(
    folder: Path, store: MemoryStore, target: FakeTarget | None = None, answer: Answer | None = None, **options: Any
) -> Result:
    """``target`` None stands for a call that asks no target."""

    def find_cluster() -> Any:
        assert target is not None, "the target is asked"
        return target

    return bring(
        folder / "run.yaml",
        store,
        find_cluster,
        Options(**options),
        Reporter(),
        answer or Answer(),
        directory=folder,
    )


def outcome_of(result: Result) -> str:
    return str(result[0]["outcome"])


def over(folder: Path, store: MemoryStore, target: FakeTarget, state: str = "done", **facts: Any) -> str:
    """Have the run of the run file end, as its job would. Returns its id."""
    run_id = trained(folder, store, target)
    commit_outcome(
        store,
        Outcome(run_id=run_id, state=state, reason="so it is", attempt=1, facts=facts, ended_s=2.0),  # type: ignore[arg-type]
    )
    return run_id


def trained(folder: Path, store: MemoryStore, target: FakeTarget, *, tokens_per_s: float = 1000.0) -> str:
    """Have an attempt at the run leave what one does; it ends as failed."""
    spec = load(folder / "run.yaml")
    identity = identify(spec, store, folder)
    facts = {
        "spec": spec.model_dump(mode="json"),
        "edition": identity.edition,
        "dataset_fingerprint": identity.dataset_fingerprint,
        "code_digest": identity.code_digest,
    }
    store.create_json(layout.run_spec(identity.run_id), facts)
    attempt = claim_attempt(store, identity.run_id, facts={"job": "a job"})
    events = EventLog(store, attempt, "train")
    events.append("training", world_size=2, first_step=0, total_steps=9)
    events.append("step", step=1, tokens_per_s=tokens_per_s)
    events.close()
    end_attempt(store, attempt, state="failed", reason="so it is")
    return identity.run_id


# -- which run


def test_a_first_call_sends_the_run_and_says_who_sent_it(memory_store: MemoryStore, folder: Path) -> None:
    facts, text = call(folder, memory_store, target := FakeTarget())
    assert (facts["outcome"], facts["previous"]) == ("submitted", "")
    assert "is on its way" in text
    assert facts["submission_id"] in target.jobs
    (sent,) = read_record(memory_store, facts["run_id"], now_s=0.0).submissions
    assert sent.submission_id == facts["submission_id"]
    assert set(sent.facts) == {"by", "target", "ci"}


def test_the_record_of_who_sent_it_is_not_needed(
    memory_store: MemoryStore, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class NoSubmissions(MemoryStore):
        def create(self, key: str, data: bytes) -> None:
            if "/submissions/" in key:
                raise StoreError("S3 answered AccessDenied.")
            super().create(key, data)

    assert outcome_of(call(folder, NoSubmissions(), FakeTarget())) == "submitted"
    assert "Who sent it is not in the run's record: S3 answered AccessDenied." in capsys.readouterr().err


def test_a_run_in_flight_is_attached_to(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    first, second = (call(folder, memory_store, target)[0] for _ in range(2))
    assert (second["outcome"], second["run_id"]) == ("attached", first["run_id"])
    assert len(target.jobs) == 1


def test_what_is_done_is_unchanged_and_no_target_is_asked(memory_store: MemoryStore, folder: Path) -> None:
    run_id = over(folder, memory_store, FakeTarget(), version="code-lm@3")
    facts, text = call(folder, memory_store)
    assert (facts["outcome"], facts["run_id"], facts["version"]) == ("unchanged", run_id, "code-lm@3")
    assert "code-lm@3" in text


def test_a_failed_attempt_is_followed_by_the_next(memory_store: MemoryStore, folder: Path) -> None:
    run_id = trained(folder, memory_store, target := FakeTarget())
    facts, _ = call(folder, memory_store, target)
    assert (facts["outcome"], facts["submission_id"]) == ("submitted", f"{run_id}-00002")
    assert facts["changed"] == {}


@pytest.mark.parametrize(("state", "error"), [("refused", GateRefused), ("failed", RunError)])
def test_what_ended_badly_gives_the_same_answer_until_something_changes(
    memory_store: MemoryStore, folder: Path, state: str, error: type[Exception]
) -> None:
    over(folder, memory_store, target := FakeTarget(), state=state)
    with pytest.raises(error, match=r"before, and nothing .* has changed since: so it is .*--fresh"):
        call(folder, memory_store)
    (folder / "data" / "more.txt").write_text("more")
    facts, text = call(folder, memory_store, target)
    assert facts["outcome"] == "submitted"
    assert facts["changed"] == {"data.train": "the source's files are others"}
    assert "changed since" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": {"max": {"loss": 9.0}}},
        {"release": {"model": "other"}},
        {"checkpoint": {"every_steps": 7}},
        {"resources": {"workers": {"min": 1, "max": 4}}},
    ],
)
def test_what_does_not_change_the_weights_makes_no_new_run(
    memory_store: MemoryStore, folder: Path, changes: dict[str, Any]
) -> None:
    over(folder, memory_store, FakeTarget())
    write(folder, **changes)
    (folder / "README.md").write_text("Mine, and well described.\n")
    assert outcome_of(call(folder, memory_store)) == "unchanged"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": {"architecture": {"model_type": "gpt2", "n_layer": 1}}}, "model.architecture"),
        ({"train": {"optimizer": {"learning_rate": 0.5}}}, "train.optimizer.learning_rate"),
        ({"data": {"vocab_size": 300}}, "data.vocab_size"),
    ],
)
def test_what_changes_the_weights_makes_a_new_run_and_is_named(
    memory_store: MemoryStore, folder: Path, changes: dict[str, Any], what: str
) -> None:
    before = over(folder, memory_store, target := FakeTarget())
    write(folder, **changes)
    facts, _ = call(folder, memory_store, target)
    assert (facts["outcome"], facts["previous"]) == ("submitted", before)
    assert any(name.startswith(what) for name in facts["changed"])
    assert facts["run_id"] != before


def test_the_code_of_the_task_makes_a_new_run(memory_store: MemoryStore, folder: Path) -> None:
    over(folder, memory_store, target := FakeTarget())
    (folder / "mine.py").write_text("class Task: x = 1\n")
    assert call(folder, memory_store, target)[0]["changed"] == {"code": "the task's Python files are others"}


def test_many_at_once_come_to_one_run(memory_store: MemoryStore, folder: Path) -> None:
    target = FakeTarget()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: call(folder, memory_store, target)[0], range(20)))
    assert len({facts["run_id"] for facts in answers}) == len(target.jobs) == 1
    assert sorted({facts["outcome"] for facts in answers}) == ["attached", "submitted"]


def test_a_source_without_files_is_a_mistake(memory_store: MemoryStore, folder: Path) -> None:
    write(folder, data={"train": str(folder / "none" / "*.txt")})
    with pytest.raises(EmptySource, match="matches no file"):
        call(folder, memory_store)


def test_an_earlier_runs_damage_keeps_nothing_from_being_sent(memory_store: MemoryStore, folder: Path) -> None:
    before = over(folder, memory_store, target := FakeTarget())
    write(folder, train={"steps": 500, "epochs": None})
    middle = over(folder, memory_store, target)
    memory_store.tamper(layout.run_spec(middle), b"{")
    write(folder, train={"steps": 600, "epochs": None})
    facts, _ = call(folder, memory_store, target)
    assert (facts["outcome"], facts["previous"]) == ("submitted", before)


@pytest.mark.parametrize("point", ["submit", "record"])
def test_one_killed_on_the_way_is_followed_by_one_that_goes_on(
    memory_store: MemoryStore, folder: Path, point: str
) -> None:
    """Right before the target is told, and right after."""

    class Killed(FakeTarget):
        dies = True

        def submit(self, request: Any, package: Any = None) -> Any:
            if self.dies and point == "submit":
                raise KeyboardInterrupt
            submission = super().submit(request, package)
            if self.dies:
                raise KeyboardInterrupt
            return submission

    over(folder, memory_store, target := Killed())
    with pytest.raises(KeyboardInterrupt):
        call(folder, memory_store, target, fresh=True)
    target.dies = False
    facts, _ = call(folder, memory_store, target)
    assert facts["outcome"] == ("submitted" if point == "submit" else "attached")
    assert "--edition 1" in target.sent[0][0].manifest["spec"]["entrypoint"]
    assert len(target.jobs) == 1


# -- fresh


def test_fresh_does_again_what_is_over(memory_store: MemoryStore, folder: Path) -> None:
    before = over(folder, memory_store, target := FakeTarget())
    facts, _ = call(folder, memory_store, target, fresh=True)
    assert facts["outcome"] == "submitted"
    assert facts["run_id"] != before
    assert facts["changed"] == {"edition": "the same done anew, as edition 1"}
    ((request, _),) = target.sent
    assert request.manifest["spec"]["entrypoint"].startswith(
        f"headway run run.yaml --run {facts['run_id']} --edition 1"
    )
    again, _ = call(folder, memory_store, target)
    assert (again["outcome"], again["run_id"]) == ("attached", facts["run_id"]), "it is the run of this file now"


def test_fresh_twice_is_the_edition_after(memory_store: MemoryStore, folder: Path) -> None:
    runs = {over(folder, memory_store, target := FakeTarget())}
    for edition in (1, 2):
        runs.add(call(folder, memory_store, target, fresh=True)[0]["run_id"])
        assert len(runs) == edition + 1
        over(folder, memory_store, target)


@pytest.mark.parametrize("begun", [False, True])
def test_fresh_is_no_other_run_where_this_one_goes_on_or_was_never_begun(
    memory_store: MemoryStore, folder: Path, begun: bool
) -> None:
    target, first = FakeTarget(), ""
    if begun:
        first = call(folder, memory_store, target)[0]["run_id"]
        claim_attempt(memory_store, first, facts={"job": f"{first}-00001"})
        target.jobs[f"{first}-00001"] = GOING
    facts, _ = call(folder, memory_store, target, fresh=True)
    assert facts["outcome"] == ("attached" if begun else "submitted")
    assert facts["run_id"] == (first or facts["run_id"])
    assert not any("/editions/" in key for key in memory_store.objects)


def test_many_who_want_it_fresh_at_once_come_to_one_run(memory_store: MemoryStore, folder: Path) -> None:
    before = over(folder, memory_store, target := FakeTarget())
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: call(folder, memory_store, target, fresh=True)[0], range(20)))
    (run_id,) = {facts["run_id"] for facts in answers}
    assert run_id != before
    assert len(target.jobs) == 1


# -- a dry run


def test_a_dry_run_tells_and_leaves_nothing(memory_store: MemoryStore, folder: Path) -> None:
    over(folder, memory_store, target := FakeTarget())
    write(folder, train={"steps": 500, "epochs": None})
    there = memory_store.objects
    facts, text = call(folder, memory_store, target, dry_run=True)
    assert (facts["outcome"], facts["attempt"], facts["dry_run"]) == ("submitted", 1, True)
    spec = load(folder / "run.yaml")
    tokens = 500 * spec.train.global_batch_size * spec.data.sequence_length
    assert facts["cpu_hours"] == pytest.approx(tokens / 500 / 3600), "1,000 tokens/s by two workers"
    assert facts["gpu_hours"] is None
    assert "CPU-hours: 500 steps at the 500 tokens/s and worker of" in text
    assert "train.steps:" in text
    assert (memory_store.objects, target.sent) == (there, [])


def test_a_dry_run_of_a_first_run_knows_nothing_to_go_by(memory_store: MemoryStore, folder: Path) -> None:
    facts, text = call(folder, memory_store, FakeTarget(), dry_run=True)
    assert (facts["gpu_hours"], facts["cpu_hours"]) == (None, None)
    assert "unknown: no run of this name has been trained" in text


@pytest.mark.parametrize(("state", "told"), [("done", "unchanged"), ("refused", "refused"), ("failed", "failed")])
def test_a_dry_run_of_what_is_over(memory_store: MemoryStore, folder: Path, state: str, told: str) -> None:
    over(folder, memory_store, target := FakeTarget(), state=state)
    facts, text = call(folder, memory_store, target, dry_run=True)
    assert facts["outcome"] == told
    assert text.startswith("Nothing would be sent")


def test_a_fresh_dry_run_claims_nothing(memory_store: MemoryStore, folder: Path) -> None:
    before = over(folder, memory_store, target := FakeTarget())
    facts, _ = call(folder, memory_store, target, dry_run=True, fresh=True)
    assert facts["outcome"] == "submitted"
    assert facts["run_id"] != before
    assert not any("/editions/" in key for key in memory_store.objects)


# -- what CI reads


def test_data_that_only_this_machine_has_is_not_sent_elsewhere(folder: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    with pytest.raises(SpecError, match="is a path of this machine, which http://ray:8265 does not see") as caught:
        retrain(
            folder / "run.yaml",
            target="http://ray:8265",
            store_uri="s3://nowhere/headway",
            options=Options(outputs=outputs),
            reporter=Reporter(),
        )
    assert caught.value.facts["outcome"] == "error"
    assert outputs.read_text().startswith("outcome=error\nrun_id=\n")


def test_outputs_are_lines_that_ci_systems_read(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.write_text("before=1\n")
    Answer(outcome="unchanged", run_id="code-lm-1a2b3c4d", version="code-lm@3").append_to(outputs)
    assert outputs.read_text().splitlines() == [
        "before=1",
        "outcome=unchanged",
        "run_id=code-lm-1a2b3c4d",
        "version=code-lm@3",
        "changed=",
    ]


def test_ci_jobs_are_told_in_the_same_words() -> None:
    github = {
        "GITHUB_ACTIONS": "true",
        "GITHUB_REPOSITORY": "me/models",
        "GITHUB_SHA": "1a2b",
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_RUN_ID": "7",
    }
    assert ci_job(github) == {
        "system": "github",
        "repository": "me/models",
        "commit": "1a2b",
        "url": "https://github.com/me/models/actions/runs/7",
    }
    gitlab = {
        "GITLAB_CI": "true",
        "CI_PROJECT_PATH": "me/models",
        "CI_JOB_URL": "https://gitlab.com/me/models/-/jobs/7",
    }
    assert ci_job(gitlab) == {"system": "gitlab", "repository": "me/models", "url": gitlab["CI_JOB_URL"]}
    assert ci_job({"GITHUB_SHA": "of a shell that was left"}) == {}
