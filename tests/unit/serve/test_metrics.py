from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.tiny_model import make_version
from tests.unit.serve.scripted import FILES, ScriptedEngine
from workloads.serve.counters import Counter
from workloads.serve.loaded import Loaded, Serving
from workloads.serve.metrics import exposition


def samples(text: bytes) -> dict[tuple[str, str, str], float]:
    """By name, version, and whatever else it is labelled with."""
    families = text_string_to_metric_families(text.decode())
    found = [sample for family in families for sample in family.samples]
    return {(each.name, each.labels.pop("version", ""), "".join(each.labels.values())): each.value for each in found}


def test_what_was_counted_is_exposed() -> None:
    old, new, gone = Counter(), Counter(), Counter()
    with old.request() as request:
        request.add_tokens(1)
        request.add_tokens(1)
    engine = ScriptedEngine()
    engine.num_sequences = 3
    serving = Serving(
        stable=Loaded(version=make_version(number=1, files=FILES), engine=engine, counter=old),
        canary=Loaded(version=make_version(number=2, files=FILES), engine=ScriptedEngine(), counter=new),
        weight=0.25,
    )
    found = samples(exposition("code-lm", serving, {1: old, 2: new, 3: gone}))
    assert found["headway_requests_total", "code-lm@1", "ok"] == 1
    assert found["headway_requests_total", "code-lm@3", "failed"] == 0
    assert found["headway_generated_tokens_total", "code-lm@1", ""] == 2
    assert found["headway_sequences", "code-lm@1", ""] == 3
    assert found["headway_share", "code-lm@1", ""] == 0.75
    assert found["headway_share", "code-lm@2", ""] == 0.25
    for name in ("request", "first_token", "token"):
        assert found[f"headway_{name}_seconds_count", "code-lm@1", ""] == 1
        assert found[f"headway_{name}_seconds_bucket", "code-lm@1", "+Inf"] == 1
        assert found[f"headway_{name}_seconds_count", "code-lm@2", ""] == 0


def test_nothing_loaded_is_no_error() -> None:
    found = samples(exposition("code-lm", Serving(), {}, num_forwarded=2))
    assert found == {
        ("headway_forwarded_requests_total", "", ""): 2,
        ("headway_ready", "", ""): 0,
        ("headway_problem", "", ""): 0,
    }


def test_states_are_exposed() -> None:
    serving = Serving(stable=Loaded(version=make_version(number=1, files=FILES), engine=ScriptedEngine()))
    found = samples(exposition("code-lm", serving, {}, rejected={3: "answers NaN"}, has_problem=True))
    assert found["headway_ready", "", ""] == 1
    assert found["headway_problem", "", ""] == 1
    assert found["headway_rejected", "code-lm@3", ""] == 1
