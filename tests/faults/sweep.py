"""One injection: a run with committed checkpoints, a fault at one request of the next save, and what then.

A run of two ranks resumes from step 2 and saves step 3 through the proxy; the fault strikes in there. Then a group of
one rank goes on past the proxy, as the driver would have it; then whoever was frozen or held wakes up; then the
new group saves once more, and the judge looks at it all.

Or it is the resume that the fault strikes: that of a group of one rank, which then trains on and saves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum

from orchestrator.checkpoint.catalog import Folder
from orchestrator.checkpoint.save import CheckpointWriter
from orchestrator.store import Store, WorkerGroup, claim_attempt, claim_group
from orchestrator.store.s3 import Patience
from tests.faults.fault import Fault
from tests.faults.proxy import FaultProxy, Request
from tests.faults.ranks import KEEP, SMALL_TABLE, KnownState, Place, Rank, Role
from tests.faults.verdict import Verdict, Watch, judge
from tests.faults.yard import Yard
from tests.unit.checkpoint.saving import RUN, finish, leave
from tests.unit.checkpoint.states import scalars

STRUCK_TIMEOUT_S = 60.0
STEADY = Patience(attempts=4, connect_timeout_s=10.0, read_timeout_s=20.0, first_wait_s=0.01)
LATEST = 2
"""The newest step before the faulty save."""


class Blow(StrEnum):
    """What happens besides the fault, at the moment when the request meets it."""

    NONE = "nothing"
    KILL_RANK_0 = "rank 0 is killed"
    KILL_RANK_1 = "rank 1 is killed"
    KILL_ALL = "all ranks are killed"
    KILL_SERVER = "the S3 server is killed, and started again"
    FREEZE_RANK_0 = "rank 0 is frozen, and wakes up after the new group's commits"
    FREEZE_ALL = "all ranks are frozen, and wake up after the new group's commits"
    HOLD = "the request is held on its way until after the new group's commits"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One injection, as a value."""

    kind: str
    """Its row in the table of docs/reliability.md."""
    name: str
    fault: Fault
    blow: Blow = Blow.NONE
    strikes_resume: bool = False
    falls_back: bool = False
    """Whether nobody can read the newest checkpoint, so that the resume has to take the one before, and say so."""
    within_attempt: bool = False
    """Whether the group that goes on belongs to the same attempt, as after a restart by Ray Train."""
    table_bytes: int = SMALL_TABLE
    patience: Patience = STEADY
    down_s: float = 0.0
    """How long a killed server stays down."""

    @property
    def wakes_later(self) -> bool:
        return self.blow in (Blow.FREEZE_RANK_0, Blow.FREEZE_ALL, Blow.HOLD)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one injection."""

    scenario: Scenario
    struck: str
    """The request that met the fault; empty where none did."""
    saved: str
    """``committed``, or what rank 0 was told, or ``no answer`` where it could tell nobody. Where a resume was struck,
    of the save that follows it."""
    is_there: bool
    """Whether the step of that save was ever a checkpoint of the group that was struck."""
    resumed_step: int
    verdict: Verdict
    seconds: float
    warnings: tuple[str, ...] = ()
    """What the resume that was struck said."""
    did_not_end: str = ""
    """The error that ended the injection before its verdict."""


@dataclass
class Run:
    """An injection under way."""

    scenario: Scenario
    yard: Yard
    store: Store
    proxy: FaultProxy
    watch: Watch
    acknowledged: set[Folder] = field(default_factory=set)
    struck: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    ranks: list[Rank] = field(default_factory=list)
    """Of the group that is struck."""
    verdict: Verdict = field(default_factory=Verdict)

    def acknowledge(self, group: WorkerGroup, step: int) -> None:
        self.acknowledged.add(
            Folder(run_id=RUN, step=step, attempt=group.attempt.number, group=group.number, nonce=group.nonce)
        )

    def strike(self, _: Request) -> None:
        """Called by the proxy while the request waits."""
        if self.struck.is_set():
            return
        act: dict[Blow, Callable[[], object]] = {
            Blow.KILL_RANK_0: self.ranks[0].kill,
            Blow.KILL_RANK_1: self.ranks[1].kill,
            Blow.KILL_ALL: lambda: [rank.kill() for rank in self.ranks],
            Blow.KILL_SERVER: lambda: self.yard.bounce_server(self.scenario.down_s),
            Blow.FREEZE_RANK_0: self.ranks[0].freeze,
            Blow.FREEZE_ALL: lambda: [rank.freeze() for rank in self.ranks],
        }
        act.get(self.scenario.blow, lambda: None)()
        self.struck.set()
        if self.scenario.blow is Blow.HOLD:
            self.released.wait(STRUCK_TIMEOUT_S)


def inject(scenario: Scenario, yard: Yard) -> Result:
    """Run one injection to its end. It belongs to no other: a prefix, a proxy and processes of its own."""
    return inject_into_resume(scenario, yard) if scenario.strikes_resume else inject_into_save(scenario, yard)


def not_ended(scenario: Scenario, error: Exception) -> Result:
    """Of an injection that raised: it has no verdict, and must not be left out of the table either."""
    return Result(
        scenario=scenario,
        struck="",
        saved="did not end",
        is_there=False,
        resumed_step=0,
        verdict=Verdict(),
        seconds=0.0,
        did_not_end=f"{type(error).__name__}: {error}",
    )


def begin(scenario: Scenario, yard: Yard, held: ExitStack) -> Run:
    """A run in a store of its own, watched, and its way through the proxy."""
    store = yard.new_store()
    return Run(
        scenario=scenario,
        yard=yard,
        store=store,
        proxy=held.enter_context(FaultProxy(yard.endpoint_url)),
        watch=held.enter_context(Watch(store)),
    )


def inject_into_resume(scenario: Scenario, yard: Yard) -> Result:
    began_s = time.monotonic()
    with ExitStack() as held:
        run = begin(scenario, yard, held)
        store, proxy, watch = run.store, run.proxy, run.watch
        save_the_first_steps(run)
        watch.look()
        group = claim_group(store, claim_attempt(store, RUN, facts={}))
        rank = held_rank(held, run, group, rank=0, world_size=1)
        proxy.add(scenario.fault)
        answer = rank.resume()
        step = answer.step or 0
        wanted = LATEST - 1 if scenario.falls_back else LATEST
        run.verdict += Verdict(wrong_bytes=answer.num_wrong, committed_lost=int(step < wanted))
        struck = struck_request(proxy)
        proxy.clear()
        if step:
            go_on(run, rank, group, step, num_steps=1)
        return Result(
            scenario=scenario,
            struck=struck,
            saved="committed" if step else answer.error,
            is_there=any(folder.nonce == group.nonce for folder in watch.committed),
            resumed_step=step,
            verdict=run.verdict + judge(store, watch, run.acknowledged),
            seconds=time.monotonic() - began_s,
            warnings=answer.warnings,
        )


def inject_into_save(scenario: Scenario, yard: Yard) -> Result:
    began_s = time.monotonic()
    with ExitStack() as held:
        run = begin(scenario, yard, held)
        store, proxy, watch = run.store, run.proxy, run.watch
        first = save_the_first_steps(run)
        old = claim_group(store, claim_attempt(store, RUN, facts={}))
        leave(store, first, LATEST + 1)
        run.ranks += [held_rank(held, run, old, rank=rank, world_size=2) for rank in range(2)]
        for rank in run.ranks:
            expect_resumed(run, rank)

        proxy.clear()
        proxy.when_met = run.strike
        proxy.add(scenario.fault)
        for rank in run.ranks:
            rank.begin_save(LATEST + 1)
        saved = await_end(run, old)
        watch.look()

        new = claim_group(store, old.attempt if scenario.within_attempt else claim_attempt(store, RUN, facts={}))
        survivor = held_rank(held, run, new, rank=0, world_size=1, past_the_proxy=True)
        resumed_step = expect_resumed(run, survivor)
        step = go_on(run, survivor, new, resumed_step, num_steps=KEEP if scenario.wakes_later else 1)
        if scenario.wakes_later:
            saved = wake(run, old)
            watch.look()
            go_on(run, survivor, new, step, num_steps=1)
        elif scenario.blow is Blow.KILL_RANK_1 and run.ranks[0].has_ended():
            saved = told(run, old, run.ranks[0].answer().error)
        struck = struck_request(proxy)
        verdict = run.verdict + judge(store, watch, run.acknowledged)
        is_there = any(folder.step == LATEST + 1 and folder.nonce == old.nonce for folder in watch.committed)
        return Result(
            scenario=scenario,
            struck=struck,
            saved=saved,
            is_there=is_there,
            resumed_step=resumed_step,
            verdict=verdict,
            seconds=time.monotonic() - began_s,
        )


def struck_request(proxy: FaultProxy) -> str:
    return next((f"{request.method} {request.key or request.query}" for request in proxy.requests if request.fault), "")


def save_the_first_steps(run: Run) -> WorkerGroup:
    """Checkpoints by an older attempt, in this process and past the proxy."""
    group = claim_group(run.store, claim_attempt(run.store, RUN, facts={}))
    for step in range(1, LATEST + 1):
        writers = []
        for rank in range(2):
            known = KnownState(rank=rank, world_size=2, table_bytes=run.scenario.table_bytes)
            known.fill(step)
            writers.append(
                CheckpointWriter(
                    run.store, group, known.tensors, known.module,  # type: ignore[arg-type]
                    rank=rank, world_size=2, keep=KEEP,
                )
            )  # fmt: skip
            writers[-1].save(scalars(step))
        assert [finish(writer).error for writer in writers] == [None, None]
        run.acknowledge(group, step)
    return group


def held_rank(
    held: ExitStack, run: Run, group: WorkerGroup, *, rank: int, world_size: int, past_the_proxy: bool = False
) -> Rank:
    place = Place(
        bucket=run.store.bucket,
        prefix=run.store.prefix,
        settings=run.yard.settings | ({} if past_the_proxy else {"AWS_ENDPOINT_URL": run.proxy.endpoint_url}),
        patience=STEADY if past_the_proxy else run.scenario.patience,
    )
    role = Role(group=group, rank=rank, world_size=world_size, table_bytes=run.scenario.table_bytes)
    process = Rank(place, role)
    held.callback(process.close)
    return process


def expect_resumed(run: Run, rank: Rank) -> int:
    """Resume, and judge what came: the newest step that anyone was told is committed, or a later one, with its values.

    Returns the step, 0 where it found none that it could use.
    """
    newest = max(folder.step for folder in run.acknowledged)
    answer = rank.resume()
    step = answer.step or 0
    run.verdict += Verdict(wrong_bytes=answer.num_wrong, committed_lost=int(step < newest))
    return step


def go_on(run: Run, rank: Rank, group: WorkerGroup, step: int, *, num_steps: int) -> int:
    """Train and save the next steps, past the proxy: these saves must go well. Returns the last step."""
    for following in range(step + 1, step + num_steps + 1):
        answer = rank.save(following)
        assert not answer.error, answer.error
        run.acknowledge(group, following)
        run.watch.look()
    return step + num_steps


def await_end(run: Run, group: WorkerGroup) -> str:
    """Wait until the save has ended, or has met a fault after which it never may. What rank 0 was told."""
    if run.scenario.blow in (Blow.NONE, Blow.KILL_SERVER):
        answers = [rank.answer() for rank in run.ranks]
        run.yard.await_server()
        return told(run, group, answers[0].error)
    ended = lambda: all(rank.has_ended() for rank in run.ranks)  # noqa: E731
    deadline = time.monotonic() + STRUCK_TIMEOUT_S
    while not run.struck.wait(0.02) and not ended():
        if time.monotonic() > deadline:
            raise TimeoutError("the save neither met the fault nor ended")
    killed = {Blow.KILL_RANK_0: run.ranks[:1], Blow.KILL_RANK_1: run.ranks[1:], Blow.KILL_ALL: run.ranks}
    for rank in killed.get(run.scenario.blow, []):
        rank.process.join(STRUCK_TIMEOUT_S)
    return "no answer"


def wake(run: Run, group: WorkerGroup) -> str:
    """Let go what was frozen or held, and wait for the end of its save. What rank 0 was told."""
    run.released.set()
    for rank in run.ranks:
        rank.wake()
    answers = [rank.answer() for rank in run.ranks]
    return told(run, group, answers[0].error)


def told(run: Run, group: WorkerGroup, error: str) -> str:
    if not error:
        run.acknowledge(group, LATEST + 1)
    return error or "committed"
