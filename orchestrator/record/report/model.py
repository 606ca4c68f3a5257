"""What a report says, before it is HTML or Markdown. Times are seconds since 1970, losses nats per target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.record.cost import Cost
from orchestrator.record.goodput import Goodput
from orchestrator.record.report.series import Line
from orchestrator.release.bootstrap import Interval

State = Literal["done", "refused", "failed", "stopped", "in flight", "waiting"]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One figure over steps or over time, fit to be drawn: at most some thousand points."""

    raw: tuple[Line, ...] = ()
    """One line for each group of workers, each with its highest and lowest points kept."""
    smooth: tuple[Line, ...] = ()
    window: int = 0
    """Steps over which a point of ``smooth`` is the mean."""
    looks: Line = ()
    """At the held-out split."""
    marks: tuple[float, ...] = ()
    """Where on the x axis the group was restarted."""
    last: float | None = None
    lowest: float | None = None
    num_points: int = 0
    """Before they were thinned out."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """The version that the run had to beat."""

    name: str
    figures: Mapping[str, float]
    """On record, from when it was released."""
    same_split: bool
    """Whether those are of the very held-out samples of this run."""
    loss: float | None = None
    """On this run's held-out samples; None where it was not evaluated on them."""
    interval: Interval | None = None
    """Of the difference in loss on these."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a report tells beyond the run's own record."""

    dataset: Mapping[str, Any] | None = None
    """Source, sizes and tokenizer, as the dataset's manifest has them; None while it is not prepared."""
    against: Against | None = None
    num_checkpoints: int = 0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the evaluation's table."""

    name: str
    mine: float
    theirs: float | None = None
    limit: str = ""
    """What the gate asks of it, such as ``≤ 4.0``."""
    met: bool | None = None
    """Whether it is within that limit; None without one."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    passed: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model made of one held-out text: it went on with it, or said its class."""

    given: str
    answer: str
    expected: str
    is_class: bool


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A piece of a bar, as shares of its whole length."""

    start: float
    length: float
    part: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attempt on the time line."""

    label: str
    note: str
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Something that went wrong or was announced, on the time line."""

    time_s: float
    title: str
    reason: str
    cost: str = ""
    """What it cost, such as ``37 steps, 4 min 12 s``."""
    attempt: int = 0
    is_restart: bool = False


@dataclass(frozen=True, kw_only=True)
class Lineage:
    name: str
    value: str
    note: str = ""
    link: str = ""
    """Of the CI job, as CI gave it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    run_id: str
    name: str
    task: str
    state: State
    reason: str
    made_s: float
    started_s: float | None
    ended_s: float | None
    version: str
    """``MODEL@N`` that came of it, or empty."""
    step: int
    total_steps: int | None
    tokens: int | None
    tokens_per_s: float | None
    final_loss: float | None
    """Of training, at the last step."""
    eval_loss: float | None
    """Of the exported model, or of the newest look while there is none."""
    goodput: Goodput
    cost: Cost | None = None
    """None where prices are not known."""
    loss: Curve = Curve()
    """Over steps."""
    throughput: Curve = Curve()
    """Tokens per second over seconds since the start."""
    evaluation: tuple[Measured, ...] = ()
    against: Against | None = None
    gate: Gate | None = None
    samples: tuple[Sample, ...] = ()
    rows: tuple[Row, ...] = ()
    num_attempts: int = 0
    incidents: tuple[Incident, ...] = ()
    num_checkpoints: int = 0
    lineage: tuple[Lineage, ...] = ()
    run_file: Mapping[str, Any] = field(default_factory=dict)
