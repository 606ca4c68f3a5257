from __future__ import annotations

import threading

import pytest

from orchestrator.errors import EnvironmentUnusable
from workloads.serve.reporter import Reporter
from workloads.serve.reports import ReplicaReport, Reply


class ScriptedDecider:
    """Remembers what it was told, and stops the reporter after the last answer of its script."""

    def __init__(self, *answers: Reply | Exception, stop: threading.Event | None = None) -> None:
        self._answers, self._stop = list(answers), stop
        self.heard: list[bool] = []
        self.sequences: list[int] = []

    def __call__(self, report: ReplicaReport) -> Reply:
        self.heard.append(report.wants_turn)
        self.sequences.append(report.sequence)
        answer = self._answers.pop(0)
        if not self._answers and self._stop is not None:
            self._stop.set()
        if isinstance(answer, Exception):
            raise answer
        return answer


def reporter(decider: ScriptedDecider) -> Reporter:
    return Reporter(report=lambda: ReplicaReport(replica="a"), send=decider)


def test_it_reports_until_it_is_stopped_whatever_the_decider_says() -> None:
    stop = threading.Event()
    decider = ScriptedDecider(Reply(), RuntimeError("gone"), Reply(), stop=stop)
    reporter(decider).run(stop, poll_s=0.0)
    assert decider.heard == [False, False, False]
    assert decider.sequences == [1, 2, 3]


def test_a_turn_is_asked_for_kept_and_given_back() -> None:
    decider = ScriptedDecider(Reply(has_turn=True, num_others=1), Reply(has_turn=True), Reply())
    replica = reporter(decider)
    assert replica.ask() == Reply(has_turn=True, num_others=1)
    replica.try_send()
    replica.give_back()
    replica.give_back()  # nothing is held any more
    assert decider.heard == [True, True, False]


def test_a_decider_that_does_not_answer_gives_no_turn() -> None:
    replica = reporter(ScriptedDecider(RuntimeError("gone"), Reply()))
    with pytest.raises(EnvironmentUnusable, match="does not answer: RuntimeError: gone"):
        replica.ask()
    replica.give_back()
