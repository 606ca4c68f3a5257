"""What ``headway run`` executes in a Ray job: base -> prepare -> train -> export -> evaluate -> gate -> release.

Every stage looks in the store at what is committed and does what is missing. So a retry, a restarted head node or
a second submission of the same run goes on where the last one stopped, and repeats nothing.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator import __version__
from orchestrator.checkpoint.catalog import committed_steps, newest_to_commit
from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import (
    AttemptFailed,
    Displaced,
    IntegrityError,
    Interrupted,
    NotFound,
    RunError,
    StoreError,
)
from orchestrator.plan import num_steps
from orchestrator.pretrained.source import BaseSource
from orchestrator.record import EventLog
from orchestrator.record.report import leave_report
from orchestrator.release.gate import GateDecision, Serving
from orchestrator.release.outcome import Outcome, commit_outcome, read_outcome
from orchestrator.release.versions import CheckpointSource, DatasetSource, Version
from orchestrator.runs import RunIdentity, identify, identity_of
from orchestrator.spec import RunSpec
from orchestrator.store import Attempt, Store, claim_attempt, layout
from orchestrator.store.attempts import (
    POD_ENDS,
    Allowance,
    end_attempt,
    ensure_newest,
    require_turn,
    stop_reason,
)
from orchestrator.store.probe import require_conditional_writes
from workloads.cluster import fit, own_errors
from workloads.export import Export, export, read_export
from workloads.export_file import as_ray_tasks
from workloads.fetch_base import as_ray_tasks as copy_as_ray_tasks
from workloads.fetch_base import fetch_base
from workloads.in_run_evaluation import last_step
from workloads.judge import Judge
from workloads.marks import record_end, record_spec
from workloads.notices import Notices, is_the_last
from workloads.prepare import prepare_identified
from workloads.prepare.assemble import require_good
from workloads.prepare.vocabulary import require_vocabulary_of
from workloads.pretrained_model import check as check_pretrained
from workloads.ray_tasks import looking
from workloads.release import release_version
from workloads.signals import stop_on_signal
from workloads.tasks import BaseContext, Task, check_task, task_of
from workloads.tasks.base_context import base_context
from workloads.train import TrainJob

logger = logging.getLogger(__name__)


def run(
    spec: RunSpec,
    store: Store,
    *,
    working_directory: Path,
    job_id: str,
    say: Callable[[str], None],
    allowance: Allowance | None = None,
    edition: int | None = None,
    run_id: str | None = None,
) -> Outcome:
    """Bring a run to its outcome, from wherever it stands.

    Args:
        allowance: the attempts that this job may make; None sets no limit.
        edition: of the run; None is the newest that the store knows.
        run_id: of the run that was submitted, whose sources may have changed by now; None is the run of what is there.

    Raises:
        Interrupted: it was asked to stop. Fenced: another job took over. AttemptsUsedUp: by the allowance. Any other
        HeadwayError: this attempt failed, and the next one goes on from what is committed. A fault that no retry
        changes, a RunError, is no exception here but the run's outcome.
    """
    require_conditional_writes(store)
    if run_id is None:
        identity = identify(spec, store, working_directory, edition=edition)
    else:
        identity = identity_of(run_id, spec, store, working_directory, edition=edition or 0)
    notices = Notices(settings=spec.notify, store=store, run_id=identity.run_id)
    standing = read_outcome(store, identity.run_id)
    if standing is not None:
        say(f"{identity.run_id} is {standing.state} already.")
        notices.ended(standing)  # unless told: who committed it may have died right after
        leave_report(store, identity.run_id)
        return standing
    check_task(spec)
    record_spec(store, spec, identity)
    if allowance is not None:
        with notices.of_attempts_used_up():
            require_turn(store, identity.run_id, allowance, saved_by=newest_to_commit(store, identity.run_id))
    attempt = claim_attempt(
        store, identity.run_id, facts={"host": socket.gethostname(), "job": job_id, "headway": __version__}
    )
    say(f"{identity.run_id}: attempt {attempt.number}")
    events = EventLog(store, attempt, "pipeline")
    notices = replace(notices, note=events.append)
    outcome: Outcome | None = None
    try:
        with stop_on_signal(store, attempt):
            pipeline = Pipeline(spec, store, identity, attempt, events, say, notices)
            found = pipeline.execute()
            ensure_newest(store, attempt)
            outcome = commit_outcome(store, found)
        events.append("outcome", state=outcome.state, reason=outcome.reason)
        end_attempt(store, attempt, state=outcome.state, reason=outcome.reason)
        notices.ended(outcome)
        return outcome
    except RunError as e:
        ensure_newest(store, attempt)
        outcome = commit_outcome(store, Outcome.failed(identity.run_id, attempt=attempt.number, reason=str(e)))
        record_end(store, attempt, events, e)
        notices.ended(outcome)
        return outcome
    except BaseException as e:
        record_end(store, attempt, events, e)
        if is_the_last(e, store, identity.run_id, allowance):
            notices.attempt_failed(attempt.number, e)
        raise
    finally:
        events.close()
        if outcome is not None:
            leave_report(store, identity.run_id)


@dataclass
class Pipeline:
    """One attempt's way through the stages."""

    spec: RunSpec
    store: Store
    identity: RunIdentity
    attempt: Attempt
    events: EventLog
    say: Callable[[str], None]
    notices: Notices

    base: BaseContext | None = None
    """The pretrained model, once it is in the store."""

    def execute(self) -> Outcome:
        if self.identity.base is not None:
            with self._stage("base"):
                self.base = self._fetch_base(self.identity.base)
        with self._stage("prepare"):
            dataset = self._prepare()
            task = self._task(dataset)  # which refuses a tokenizer that is not the model's
            if self.base is not None:
                check_pretrained(task)
        length = self.spec.data.sequence_length
        num_samples = dataset.num_samples(dataset.train, length)
        steps = num_steps(self.spec.train, num_samples, sequence_length=length) or 0
        exported = self._train_and_export(dataset, steps)
        if isinstance(exported, Outcome):
            return exported
        judge = self._judge(dataset)
        with self._stage("evaluate"):
            found = judge.evaluation(exported)
        with self._stage("gate"):
            decision, serving = judge.decide(found)
        evaluation = found.figures
        facts = self._facts(dataset, exported, evaluation, decision, serving)
        if not decision.passed:
            return self._outcome("refused", "; ".join(decision.reasons), facts)
        if self.spec.release:
            with self._stage("release"):
                facts["version"] = self._release(dataset, exported, evaluation, decision)
        return self._outcome("done", "", facts)

    # -- stages

    def _fetch_base(self, source: BaseSource) -> BaseContext | None:
        manifest = fetch_base(source, self.store, run_all=copy_as_ray_tasks)
        base = base_context(self.spec, self.store, manifest.fingerprint)
        check_task(self.spec, base)
        return base

    def _prepare(self) -> DatasetManifest:
        if self.identity.dataset is not None:
            if self.spec.data.train is not None:  # an earlier attempt has prepared it
                require_good(self.spec.data, self.identity.dataset)
            elif self.base is not None:
                require_vocabulary_of(self.base, self.identity.dataset, self.store)
            return self.identity.dataset
        dataset = prepare_identified(self.spec, self.identity, self.store, base=self.base, say=self.say)
        self.events.append("dataset", fingerprint=dataset.fingerprint, counts=dataset.counts)
        return dataset

    def _task(self, dataset: DatasetManifest) -> Task:
        return task_of(self.spec, dataset, self.base)

    def _judge(self, dataset: DatasetManifest) -> Judge:
        return Judge(
            spec=self.spec,
            store=self.store,
            run_id=self.identity.run_id,
            dataset=dataset,
            base=self.base,
            note=self.events.append,
            say=self.say,
        )

    def _train_and_export(self, dataset: DatasetManifest, steps: int, *, again: bool = False) -> Export | Outcome:
        """The exported model, or the outcome of a run that training failed for good.

        A checkpoint of the last step is not read before it is exported. Where it turns out to be damaged, training
        goes on once more from the newest that verifies, and commits that step in a newer folder, which is taken then.
        """
        with self._stage("train"):
            self._train(dataset, steps, again=again)
        failed = read_outcome(self.store, self.identity.run_id)
        if failed is not None:
            return failed
        try:
            with self._stage("export"):
                return self._export(dataset, steps)
        except (IntegrityError, NotFound) as e:
            if again:
                raise
            self.say(f"The last checkpoint cannot be exported, so its steps are trained again: {e.message}")
        return self._train_and_export(dataset, steps, again=True)

    def _train(self, dataset: DatasetManifest, steps: int, *, again: bool) -> None:
        if self._last_step(steps) is not None and not again:
            return
        job = TrainJob(
            store=self.store.uri,
            spec=self.spec,
            run_id=self.identity.run_id,
            attempt=self.attempt.number,
            attempt_nonce=self.attempt.nonce,
            dataset=(dataset.name, dataset.fingerprint),
            total_steps=steps,
            base=self.base.manifest.fingerprint if self.base is not None else "",
        )
        stalled = partial(self.notices.stalled, self.attempt.number)
        fit(job, self.identity.run_id, say=self.say, note=self.events.append, stalled=stalled)
        if read_outcome(self.store, self.identity.run_id) is None and self._last_step(steps) is None:
            done = committed_steps(self.store, self.identity.run_id)
            ensure_newest(self.store, self.attempt)
            reason = stop_reason(self.store, self.attempt) or "training ended early"
            raise _interrupted(f"{self.identity.run_id} stopped at step {done[0] if done else 0} of {steps}", reason)

    def _last_step(self, steps: int) -> int | None:
        """The step at which training is over, at ``steps`` or before; None while it is not."""
        return last_step(self.store, self.identity.run_id, total_steps=steps, limits=self.spec.train.evaluate)

    def _export(self, dataset: DatasetManifest, steps: int) -> Export:
        standing = read_export(self.store, self.identity.run_id)
        if standing is not None:
            return standing
        step = self._last_step(steps) or steps
        return export(
            self.spec, self.store, self.attempt, self._task(dataset), dataset, step=step, write_all=as_ray_tasks
        )

    def _release(
        self, dataset: DatasetManifest, exported: Export, evaluation: dict[str, float], decision: GateDecision
    ) -> str:
        release = self.spec.release
        prefix = layout.version(release.model, exported.version) if release and exported.version else ""
        if release is None or exported.version is None or exported.prefix != prefix:
            raise AttemptFailed(
                f"{self.identity.run_id} was exported for another release, to {self.store.uri_of(exported.prefix)}.",
                next_step="Set release as it was then, or change the run's name to train it anew.",
            )
        version = Version(
            model=release.model,
            number=exported.version,
            task=self.spec.task,
            run_id=self.identity.run_id,
            attempt=self.attempt.number,
            checkpoint=CheckpointSource(uri=self._checkpoint_uri(exported), step=exported.step),
            dataset=DatasetSource(name=dataset.name, fingerprint=dataset.fingerprint),
            code_digest=self.identity.code_digest,
            evaluation=evaluation,
            gate={"passed": decision.passed, "reasons": list(decision.reasons)},
            files=exported.files,
            base=exported.base,
            created_s=time.time(),
            nonce=self.attempt.nonce,
        )
        released = release_version(self.store, self.attempt, release, version)
        self.events.append("version", version=released.name, channel=release.channel)
        return released.name

    # -- what is known

    def _facts(
        self,
        dataset: DatasetManifest,
        exported: Export,
        evaluation: dict[str, float],
        decision: GateDecision,
        serving: Serving | None,
    ) -> dict[str, Any]:
        return {
            "steps": exported.step,
            "tokens": exported.tokens,
            "final_loss": exported.loss,
            "evaluation": evaluation,
            "gate": {
                "passed": decision.passed,
                "reasons": list(decision.reasons),
                "against_version": serving.version if serving else None,
            },
            "checkpoint": self._checkpoint_uri(exported),
            "dataset": f"{dataset.name}@{dataset.fingerprint}",
            "export": self.store.uri_of(exported.prefix),
            **({"base": f"{self.base.manifest.uri}@{self.base.manifest.fingerprint}"} if self.base is not None else {}),
        }

    def _checkpoint_uri(self, exported: Export) -> str:
        return self.store.uri_of(exported.checkpoint).rstrip("/")

    def _outcome(self, state: str, reason: str, facts: dict[str, Any]) -> Outcome:
        return Outcome(
            run_id=self.identity.run_id,
            state=state,  # type: ignore[arg-type]
            reason=reason,
            attempt=self.attempt.number,
            facts=facts,
            ended_s=time.time(),
        )

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Record a stage, and check before it and while it waits for tasks that it is still ours to do."""
        self._require_turn(f"before {name}")
        self.say(f"{name} …")
        self.events.append("stage_started", stage=name)
        started = time.monotonic()
        with own_errors(), looking(partial(self._look, f"in {name}")):
            yield
        seconds = round(time.monotonic() - started, 2)
        self.events.append("stage_done", stage=name, seconds=seconds)
        self.say(f"{name} done in {seconds:.1f} s")

    def _require_turn(self, where: str) -> None:
        ensure_newest(self.store, self.attempt)
        reason = stop_reason(self.store, self.attempt)
        if reason:
            raise _interrupted(f"{self.identity.run_id} stopped {where}", reason)

    def _look(self, where: str) -> None:
        with suppress(StoreError):  # the next look is soon
            self._require_turn(where)


def _interrupted(what: str, reason: str) -> Interrupted:
    kind = Displaced if reason == POD_ENDS else Interrupted
    return kind(f"{what}: {reason}.", next_step="Submit the same run file to go on from there.")
