"""All injections: each kind of request of a save or a resume, with each fault that can befall it, and each blow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from orchestrator.store.s3 import Patience
from tests.faults.fault import Fault, Kind
from tests.faults.ranks import LARGE_TABLE, SMALL_TABLE
from tests.faults.sweep import STEADY, Blow, Scenario

HASTY = replace(STEADY, read_timeout_s=0.5)
"""For silences. What it takes for one on a busy machine is a fault more."""
LONG = Patience(attempts=8, connect_timeout_s=10.0, read_timeout_s=20.0, first_wait_s=0.1)
"""Outlasts a server that is started again."""
OUTAGE = 1000
"""Requests: more than a save sends."""
_STEP_2, _STEP_3 = "step-00000002/00001-", "step-00000003/00002-"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One kind of request of a save, by the rule that finds it."""

    rule: Fault
    rank: int = 0
    """Who sends it."""
    has_body: bool = False
    has_answer: bool = False
    table_bytes: int = SMALL_TABLE


def _place(method: str, key: str = "", query: str = "", nth: int = 1, **facts: object) -> Place:
    rule = Fault(kind=Kind.DELAY, method=method, key=key, query=query, nth=nth)
    return Place(rule=rule, **facts)  # type: ignore[arg-type]


def _listing(of: str) -> str:
    return f"list-type.*%2F{of}(&|$)"


PLACES = {
    "file-0": _place("PUT", f"{_STEP_3}.*rank-00000.safetensors", has_body=True),
    "file-1": _place("PUT", f"{_STEP_3}.*rank-00001.safetensors", has_body=True, rank=1),
    "index-0": _place("PUT", f"{_STEP_3}.*rank-00000.index", has_body=True),
    "index-1": _place("PUT", f"{_STEP_3}.*rank-00001.index", has_body=True, rank=1),
    "publish-0": _place("PUT", f"{_STEP_3}.*rank-00000.json", has_body=True),
    "publish-1": _place("PUT", f"{_STEP_3}.*rank-00001.json", has_body=True, rank=1),
    "poll": _place("GET", query=_listing("step-00000003%2F00002-[^&]*"), has_answer=True),
    "part-0": _place("GET", f"{_STEP_3}.*rank-00000.json", has_answer=True),
    "part-1": _place("GET", f"{_STEP_3}.*rank-00001.json", has_answer=True),
    "fence": _place("GET", query=_listing("attempts%2F"), has_answer=True),
    "commit": _place("PUT", f"{_STEP_3}.*manifest.json", has_body=True),
    "uploads": _place("GET", query="uploads.*prefix", has_answer=True),
    "retire-list": _place("GET", query=_listing("checkpoints%2F"), has_answer=True),
    "retire-fence": _place("GET", query=_listing("attempts%2F"), nth=2, has_answer=True),
    "bar": _place("PUT", "step-00000003/00001-.*manifest.json"),
    "delete-orphan": _place("POST", query="delete", has_body=True, has_answer=True),
    "delete-manifest": _place("POST", query="delete", nth=2, has_body=True, has_answer=True),
    "delete-files": _place("POST", query="delete", nth=3, has_body=True, has_answer=True),
    "multipart": _place("POST", "rank-00000", "uploads", has_answer=True, table_bytes=LARGE_TABLE),
    "multipart-1": _place("PUT", "rank-00000", "partNumber=1", has_body=True, table_bytes=LARGE_TABLE),
    "multipart-2": _place("PUT", "rank-00000", "partNumber=2", has_body=True, table_bytes=LARGE_TABLE),
    "multipart-end": _place(
        "POST", "rank-00000", "uploadId", has_body=True, has_answer=True, table_bytes=LARGE_TABLE
    ),
}  # fmt: skip
RESUME_PLACES = {
    name: _place("GET", f"{_STEP_2}.*{name}", has_answer=True)
    for name in ("manifest.json", "rank-00000.index", "rank-00001.index", "rank-00000.safetensors")
}
"""What a resume reads of the newest checkpoint."""
KINDS = {
    "cut-before": Fault(kind=Kind.CUT_BEFORE),
    "cut-request": Fault(kind=Kind.CUT_REQUEST),
    "lost-answer": Fault(kind=Kind.LOSE_ANSWER),
    "cut-answer": Fault(kind=Kind.CUT_ANSWER),
    "stall": Fault(kind=Kind.STALL, wait_s=0.8),
    "late": Fault(kind=Kind.DELAY, wait_s=0.8),
    "flip-request": Fault(kind=Kind.FLIP_REQUEST),
    "flip-answer": Fault(kind=Kind.FLIP_ANSWER),
    "409": Fault(kind=Kind.REFUSE, status=409),
    "412": Fault(kind=Kind.REFUSE, status=412),
    "500": Fault(kind=Kind.REFUSE, status=500),
    "503": Fault(kind=Kind.REFUSE, status=503),
}
_SILENT = (Kind.STALL, Kind.DELAY)


QUICK = (
    "file-1.lost-answer", "poll.flip-answer", "commit.lost-answer", "publish-0.412", "delete-manifest.503",
    "multipart-end.lost-answer", "part-1.stall", "commit.rank-1-killed", "publish-1.rank-0-killed",
    "commit.all-killed", "file-0.server-killed", "fence.rank-0-frozen", "index-1.all-frozen-within-attempt",
    "commit.held", "resume-rank-00000.safetensors.flip-answer-always",
)  # fmt: skip
"""Names of the few that are tried whenever all tests are."""


def all_scenarios(seed: int) -> list[Scenario]:
    """Every injection of the full sweep. Pure."""
    found = [*_network(), *_outages(), *_kills(), *_server(), *_zombies(), *_late(), *_resumes()]
    return [_drawn(scenario, seed) for scenario in found]


def must_be_saved(scenario: Scenario) -> bool:
    """Whether the save has to go well, since its fault is one that a second try of the request puts right. Pure.

    A 409 or 412 may be the truth, so the client believes it; a hasty client may take its second answer for lost too.
    """
    is_refused = scenario.fault.kind is Kind.REFUSE and scenario.fault.status in (409, 412)
    strikes_once = scenario.blow is Blow.NONE and scenario.fault.times == 1
    return scenario.strikes_resume or (strikes_once and scenario.patience != HASTY and not is_refused)


def _network() -> Iterator[Scenario]:
    for name, place in PLACES.items():
        for kind, fault in KINDS.items():
            needs_body = fault.kind in (Kind.CUT_REQUEST, Kind.FLIP_REQUEST)
            needs_answer = fault.kind in (Kind.CUT_ANSWER, Kind.FLIP_ANSWER, Kind.STALL)
            if (needs_body and not place.has_body) or (needs_answer and not place.has_answer):
                continue
            yield Scenario(
                kind=_in_words(fault),
                name=f"{name}.{kind}",
                fault=_at(place, fault),
                table_bytes=place.table_bytes,
                patience=HASTY if fault.kind in _SILENT else STEADY,
            )


def _outages() -> Iterator[Scenario]:
    for name in ("file-1", "publish-1", "poll", "part-0", "fence", "commit", "retire-list", "delete-manifest"):
        for kind in ("lost-answer", "500"):
            fault = replace(_at(PLACES[name], KINDS[kind]), times=OUTAGE)
            yield Scenario(kind=f"{fault.kind}, each time again", name=f"{name}.{kind}-always", fault=fault)


def _kills() -> Iterator[Scenario]:
    blows = {"rank-0": Blow.KILL_RANK_0, "rank-1": Blow.KILL_RANK_1, "all": Blow.KILL_ALL}
    for number, (name, place) in enumerate(PLACES.items()):
        for offset, (who, blow) in enumerate(blows.items()):
            # In turns: the request goes on, is lost with its sender, or is carried out.
            kind = ("late", "cut-before", "lost-answer")[(number + offset) % 3]
            fault = replace(_at(place, KINDS[kind]), wait_s=0.0)
            yield Scenario(
                kind=f"kill -9: {blow}", name=f"{name}.{who}-killed", fault=fault, blow=blow,
                table_bytes=place.table_bytes,
            )  # fmt: skip


def _server() -> Iterator[Scenario]:
    for number, (name, place) in enumerate(PLACES.items()):
        kind = ("late", "lost-answer")[number % 2]
        yield Scenario(
            kind=f"kill -9: {Blow.KILL_SERVER}",
            name=f"{name}.server-killed",
            fault=replace(_at(place, KINDS[kind]), wait_s=0.0),
            blow=Blow.KILL_SERVER,
            patience=(LONG, STEADY)[number // 2 % 2],
            table_bytes=place.table_bytes,
        )


def _zombies() -> Iterator[Scenario]:
    blows = {"rank-0": Blow.FREEZE_RANK_0, "all": Blow.FREEZE_ALL}
    for number, (name, place) in enumerate(PLACES.items()):
        for who, blow in blows.items():
            within = (number + (who != "all")) % 2 == 1
            yield Scenario(
                kind=f"SIGSTOP: {blow}" + (" (of the same attempt)" if within else ""),
                name=f"{name}.{who}-frozen{'-within-attempt' if within else ''}",
                fault=replace(_at(place, KINDS["late"]), wait_s=0.0),
                blow=blow,
                within_attempt=within,
                table_bytes=place.table_bytes,
            )


def _late() -> Iterator[Scenario]:
    for name, place in PLACES.items():
        yield Scenario(
            kind=str(Blow.HOLD),
            name=f"{name}.held",
            fault=replace(_at(place, KINDS["late"]), wait_s=0.0),
            blow=Blow.HOLD,
            table_bytes=place.table_bytes,
        )


def _resumes() -> Iterator[Scenario]:
    for name, place in RESUME_PLACES.items():
        for kind in ("cut-answer", "stall", "late", "flip-answer", "500", "503"):
            fault = KINDS[kind]
            yield Scenario(
                kind=f"resume: {_in_words(fault)}",
                name=f"resume-{name}.{kind}",
                fault=_at(place, fault),
                strikes_resume=True,
                patience=HASTY if fault.kind in _SILENT else STEADY,
            )
        yield Scenario(
            kind=f"resume: {Kind.FLIP_ANSWER}, each time again",
            name=f"resume-{name}.flip-answer-always",
            fault=replace(_at(place, KINDS["flip-answer"]), times=OUTAGE),
            strikes_resume=True,
            falls_back=True,
        )


def _in_words(fault: Fault) -> str:
    """The fault's row in the table."""
    if fault.kind in _SILENT:
        return f"{fault.kind}, beyond the client's patience"
    return str(fault).removeprefix("request 1 of all ").partition(" at ")[0].partition(" by ")[0]


def _at(place: Place, fault: Fault) -> Fault:
    rule = place.rule
    return replace(fault, method=rule.method, key=rule.key, query=rule.query, nth=rule.nth)


def _drawn(scenario: Scenario, seed: int) -> Scenario:
    """With what the seed decides: offsets within bodies, and how long things last."""
    rng = Random(f"{seed} {scenario.name}")
    at_bytes = int(scenario.table_bytes ** rng.random()) - 1
    wait_s = scenario.fault.wait_s * rng.uniform(1.0, 2.0)
    fault = replace(scenario.fault, at_bytes=at_bytes, wait_s=wait_s)
    return replace(scenario, fault=fault, down_s=rng.uniform(0.3, 2.0))
