"""What a run cost: by kinds of GPU, by parts; and where prices are found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SpecError
from orchestrator.record.cost import Cost, cost_of
from orchestrator.record.goodput import account
from orchestrator.target_settings import Prices, find_prices
from tests.unit.record.histories import A100, attempt, event, record, stages, step, training
from tests.unit.render.requests import MINIMAL

PRICES = Prices(currency="EUR", gpu_hour={"a100": 3.0}, cpu_hour=0.5)


def cost(prices: Prices = PRICES, **resources: Any) -> Cost | None:
    """Of an hour queued, an hour in which 2 workers started, and two in which they computed."""
    events = [
        *stages(1, train=3600.0),
        training(7200.0, device=A100),
        step(14_400.0, 1),
        event(14_400.0, "training_done", step=1, save_s=0.0, state="complete"),
    ]
    found = record(
        events=events,
        attempts=[attempt(1, 3600.0, 14_400.0, "done")],
        submitted_s=(0.0,),
        ended_s=14_400.0,
        **resources,
    )
    return cost_of(found, account(found), prices)


def test_gpus_and_cpus_by_the_hours_that_they_were_held() -> None:
    found = cost(gpu="A100", cpus_per_worker=4)
    assert found is not None
    assert found.currency == "EUR"
    assert [found.gpu, found.cpu, found.total] == pytest.approx([6 * 3.0, 24 * 0.5, 30.0])
    assert {part: round(value, 6) for part, value in found.by_part.items() if value} == {
        "starting": 10.0,
        "computing": 20.0,
    }


def test_a_run_on_cpus_alone() -> None:
    found = cost()
    assert found is not None
    assert [found.total, found.gpu] == pytest.approx([3.0, 0.0])


def test_any_gpu_is_known_by_its_devices_name() -> None:
    found = cost(gpu="any")
    assert found is not None
    assert found.gpu == pytest.approx(18.0)


@pytest.mark.parametrize("gpu", ["H100", "any"])
def test_no_cost_is_told_where_a_price_is_missing(gpu: str) -> None:
    assert cost(Prices(gpu_hour={"a10": 1.0}), gpu=gpu) is None


# -- where prices are found


def test_the_prices_in_the_documentation_are_right(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "record.md").read_text()
    (text,) = re.findall(r"^```yaml prices\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "prices.yaml").write_text(text)
    found = find_prices({"HEADWAY_PRICES": str(tmp_path / "prices.yaml")})
    assert found is not None
    assert found.gpu_hour["h100"] == 3.2


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_file_of_prices_goes_before_the_target(tmp_path: Path) -> None:
    target = write(tmp_path / "target.yaml", {**MINIMAL, "prices": {"cpu_hour": 1.0}})
    named = write(tmp_path / "prices.yaml", {"apiVersion": "headway/v1", "kind": "prices", "cpu_hour": 2.0})
    from_file, from_target = find_prices({"HEADWAY_PRICES": str(named)}, target), find_prices({}, target)
    assert from_file is not None
    assert from_target is not None
    assert (from_file.cpu_hour, from_target.cpu_hour) == (2.0, 1.0)
    assert find_prices({}, tmp_path / "nowhere.yaml") is None
    assert find_prices({}, write(tmp_path / "none.yaml", dict(MINIMAL))) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cpu_hour": -1}, "cpu_hour: -1 is refused: must be at least 0"),
        ({"currency": "dollars"}, "must be three capital letters"),
        ({"gpu_hours": {}}, "did you mean gpu_hour"),
        ({"kind": "kubernetes"}, "kind"),
    ],
)
def test_prices_that_are_wrong_are_refused(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "prices.yaml", {"apiVersion": "headway/v1", "kind": "prices", **fields})
    with pytest.raises(SpecError, match=words):
        find_prices({"HEADWAY_PRICES": str(path)})


def test_a_missing_file_of_prices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no file of prices"):
        find_prices({"HEADWAY_PRICES": str(tmp_path / "prices.yaml")})
