"""Whatever saves, crashes, restarts and wakes up again, the newest checkpoints are whole."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.checkpoint.catalog import Folder, committed, stored
from orchestrator.checkpoint.retention import pin, unpin
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import AlreadyExists, Fenced, IntegrityError
from orchestrator.store import WorkerGroup, claim_group
from tests.unit.checkpoint.saving import RUN, bar_of, leave, new_group, save
from tests.unit.fakes import MemoryStore

KEEP = 2
SHAPES: dict[str, tuple[int, ...]] = {"w": (3,)}


class Checkpoints(RuleBasedStateMachine):
    """Groups of one run. The last is the one that trains; any earlier one may still be alive and believe it is."""

    @initialize()
    def start(self) -> None:
        self.store = MemoryStore(prefix="headway")
        self.groups: list[WorkerGroup] = [new_group(self.store)]
        self.step = 0
        self.half: list[Folder] = []
        self.pinned: set[int] = set()
        self.unpinned: set[int] = set()

    @rule(by=st.integers(1, 3))
    def save_whole(self, by: int) -> None:
        self.step += by
        newer = self._of_newer(self.groups[-1])
        assert save(self.store, self.groups[-1], self.step, world_size=1, keep=KEEP, shapes=SHAPES) == [None]
        assert self._of_newer(self.groups[-1]) == newer

    @rule(by=st.integers(1, 3))
    def crash_midway(self, by: int) -> None:
        self.half.append(leave(self.store, self.groups[-1], self.step + by))
        self.restart(in_same_attempt=True)

    @rule(in_same_attempt=st.booleans())
    def restart(self, in_same_attempt: bool) -> None:
        newest = self.groups[-1].attempt
        self.groups.append(claim_group(self.store, newest) if in_same_attempt else new_group(self.store))
        self.step = next((folder.step for folder in committed(self.store, RUN)), 0)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(data=st.data())
    def an_old_group_wakes_up_and_saves(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups[:-1]))
        newer = self._of_newer(group)
        (error,) = save(self.store, group, self.step + 1, world_size=1, keep=1, shapes=SHAPES)
        assert isinstance(error, (Fenced, AlreadyExists))
        assert self._of_newer(group) == newer

    @precondition(lambda self: self.half)
    @rule(data=st.data())
    def a_commit_that_was_on_its_way_arrives(self, data: st.DataObject) -> None:
        """It was sent before the fence came down. Its files are gone where it was barred, so it must not be let in."""
        folder = data.draw(st.sampled_from(self.half))
        if folder.prefix + "rank-00000.safetensors" in self.store.objects:
            return
        try:
            self.store.create(bar_of(folder), b"{}")
        except AlreadyExists:
            return
        raise AssertionError(f"{folder} was committed after its files were deleted")

    @precondition(lambda self: committed(self.store, RUN))
    @rule(data=st.data())
    def pin_or_unpin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted({folder.step for folder in committed(self.store, RUN)})))
        if step in self.pinned:
            unpin(self.store, RUN, step, "test")
            self.unpinned.add(step)
        else:
            pin(self.store, RUN, step, "test", reason="a test")
        self.pinned ^= {step}

    @invariant()
    def what_is_committed_is_whole(self) -> None:
        for folder in committed(self.store, RUN):
            try:
                verify(self.store, folder)
            except IntegrityError as e:
                raise AssertionError(f"{folder} is committed and not whole") from e

    @invariant()
    def the_newest_and_the_pinned_are_there_and_no_more(self) -> None:
        steps = sorted({folder.step for folder in committed(self.store, RUN)}, reverse=True)
        assert self.pinned <= set(steps)
        if steps:
            assert self.step >= steps[0]
        assert set(steps[KEEP:]) <= self.pinned | self.unpinned, "what was unpinned goes with the next commit"

    def _of_newer(self, group: WorkerGroup) -> dict[str, bytes]:
        """Every object of newer claims. Only what nobody reads any more may differ: an older group's."""
        claim = (group.attempt.number, group.number)
        prefixes = [
            item.folder.prefix for item in stored(self.store, RUN) if (item.folder.attempt, item.folder.group) > claim
        ]
        return {key: data for key, data in self.store.objects.items() if key.startswith(tuple(prefixes))}


TestCheckpoints = Checkpoints.TestCase
TestCheckpoints.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
