"""Made-up records of runs: by hand, and drawn at random with clocks that differ, missing events and zombies."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from orchestrator.record.model import AttemptRecord, Event, RunRecord, Submission

A100 = "NVIDIA A100-SXM4-80GB"


def event(time_s: float, kind: str, attempt: int = 1, **fields: Any) -> Event:
    return {"time_s": time_s, "kind": kind, "attempt": attempt, **fields}


def training(time_s: float, *, attempt: int = 1, group: int = 1, first_step: int = 0, **fields: Any) -> Event:
    facts = {
        "total_steps": 100, "world_size": 2, "started_s": time_s - 4, "load_s": 0.0, "device": "cpu",
        "num_parameters": 10, "flops_per_token": 60.0, **fields,
    }  # fmt: skip
    return event(time_s, "training", attempt, group=group, first_step=first_step, **facts)


def step(time_s: float, number: int, *, attempt: int = 1, **fields: float) -> Event:
    facts = {"tokens": number * 100, "step_s": 1.0, "data_wait_s": 0.0, "save_s": 0.0, **fields}
    return event(time_s, "step", attempt, step=number, **facts)


def stages(attempt: int, **starts_s: float) -> list[Event]:
    """``stage_started`` events, by the stage's name."""
    return [event(time_s, "stage_started", attempt, stage=name) for name, time_s in starts_s.items()]


def attempt(
    number: int, claimed_s: float, ended_s: float | None = None, state: str = "", **fields: str
) -> AttemptRecord:
    facts = {"reason": "", "job": f"job-{number}", "host": "host", **fields}
    return AttemptRecord(number=number, claimed_s=claimed_s, ended_s=ended_s, state=state, **facts)


def record(
    *,
    events: list[Event],
    attempts: list[AttemptRecord],
    submitted_s: tuple[float, ...] = (),
    ended_s: float | None = None,
    read_s: float = 1000.0,
    **resources: Any,
) -> RunRecord:
    """A run that asks for 2 workers, unless ``resources`` say otherwise."""
    submissions = [
        Submission(submission_id=str(index), submitted_s=time_s, facts={}) for index, time_s in enumerate(submitted_s)
    ]
    return RunRecord(
        run_id="run-1",
        spec={"spec": {"resources": {"workers": {"min": 2, "max": 2}, "gpu": None, "cpus_per_worker": 1, **resources}}},
        submissions=tuple(submissions),
        attempts=tuple(attempts),
        events=tuple(sorted(events, key=lambda each: float(each["time_s"]))),
        outcome=None if ended_s is None else {"state": "done", "ended_s": ended_s},
        read_s=read_s,
    )


@st.composite
def histories(draw: st.DrawFn) -> RunRecord:
    """Anything that a store may hold: each event may be missing, and each writer's clock is off by some seconds."""
    now_s, step_number = draw(st.floats(0, 1e9)), 0
    names = st.lists(st.sampled_from(["base", "prepare", "train", "export", "gate", "other"]), max_size=4)
    seconds = st.floats(0, 50)
    off = st.floats(-5, 5)
    submitted_s, attempts, events = [], [], []
    for number in range(1, draw(st.integers(0, 3)) + 1):
        if draw(st.booleans()):
            submitted_s.append(now_s + draw(off))
        now_s += draw(seconds)
        claimed_s, driver, worker = now_s, draw(off), draw(off)
        found: list[Event] = []
        for name in draw(names):
            now_s += draw(seconds)
            found += stages(number, **{name: now_s + driver})
            for group in range(1, draw(st.integers(0, 2)) + 1 if name == "train" else 1):
                now_s += draw(seconds)
                step_number = draw(st.integers(0, step_number))
                loaded_s = draw(seconds)
                found.append(
                    training(now_s + worker, attempt=number, group=group, first_step=step_number, load_s=loaded_s)
                )
                for _ in range(draw(st.integers(0, 5))):
                    now_s += draw(seconds)
                    step_number += 1
                    waits = {"data_wait_s": draw(seconds), "save_s": draw(seconds)}
                    found.append(step(now_s + worker, step_number, attempt=number, **waits))
                    if draw(st.booleans()):
                        found.append(event(now_s + worker, "look", number, seconds=draw(seconds), step=step_number))
                place = {"rank": 0, "step": step_number + 1, "phase": draw(st.sampled_from(["forward", "saving"]))}
                lost = {"heard_s": now_s + driver, **place}
                found.append(event(now_s + driver + draw(seconds), "group_lost", number, group=group, **lost))
                found.append(event(now_s + worker, "training_done", number, step=step_number, save_s=draw(seconds)))
        events += [each for each in found if draw(st.integers(0, 5))]
        ended_s = draw(st.one_of(st.none(), st.just(now_s + draw(off))))
        attempts.append(attempt(number, claimed_s, ended_s, "stopped" if ended_s else "", job="job"))
        now_s -= draw(st.floats(0, 20))  # the next one may begin while this one still runs
    return record(
        events=events,
        attempts=attempts,
        submitted_s=tuple(sorted(submitted_s)),
        ended_s=draw(st.one_of(st.none(), st.just(now_s))) if attempts else None,
        read_s=now_s + draw(st.sampled_from([0.0, 5.0, 5000.0])),
        gpu=draw(st.sampled_from([None, "A100"])),
    )
