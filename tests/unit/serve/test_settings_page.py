"""docs/serving.md: its table of settings has every one, with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from orchestrator.release.canary_policy import CanaryPolicy
from workloads.serve.counters import OUTCOMES, Counter
from workloads.serve.loaded import Serving
from workloads.serve.metrics import exposition
from workloads.serve.settings import ServeSettings
from workloads.serve.vllm_settings import VllmSettings
from workloads.serve.warm_up import WARM_UP_TOKENS

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    return {prefix + name: field.default for name, field in model.model_fields.items() if not field.is_required()}


def test_every_setting_is_there_with_its_default() -> None:
    section = PAGE.split("## Settings")[1].split("\n## ")[0]
    shown: dict[str, Any] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, values, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            named = re.findall(r"`([\w.]+)`", names)
            texts = values.split(", ")
            shown |= dict(zip(named, texts * len(named) if len(texts) == 1 else texts, strict=False))
    assert shown.pop("model") == ""
    parts = {"canary": CanaryPolicy, "vllm": VllmSettings}
    expected = {name: default for name, default in defaults(ServeSettings).items() if name not in parts}
    for name, part in parts.items():
        expected |= defaults(part, f"{name}.")
    assert shown == {
        name: f"`{value}`" if isinstance(value, str) else json.dumps(value) for name, value in expected.items()
    }


def test_the_metrics_are_those_that_there_are() -> None:
    counter = Counter()
    with counter.request():
        pass
    text = exposition("lm", Serving(), {1: counter}).decode()
    named = set(re.findall(r"`(headway_\w+)`", PAGE))
    assert named == {name + ("_total" if kind == "counter" else "") for name, kind in types(text)}
    assert all(f"`{outcome}`" in PAGE for outcome in OUTCOMES)


def types(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    return [(name.removesuffix("_total"), kind) for name, kind in found if not name.endswith("_created")]


def test_the_warm_up_is_as_long_as_said() -> None:
    assert f"asked for {WARM_UP_TOKENS} tokens" in PAGE
