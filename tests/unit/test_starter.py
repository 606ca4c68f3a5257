"""The run file that ``headway init`` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from orchestrator.plan import Capacity, plan
from orchestrator.spec import DataSpec, EvaluateSpec, ExportSpec, LoraSpec, RunSpec, TrainSpec, json_schema, parse
from orchestrator.starter import STARTER


def _fields(schema: dict[str, Any], node: dict[str, Any]) -> Iterator[str]:
    """Names of all fields that a schema describes, of its parts too."""
    for name, value in node.get("properties", {}).items():
        yield name
        for inner in [value, *value.get("anyOf", [])]:
            if "$ref" in inner:
                yield from _fields(schema, schema["$defs"][inner["$ref"].rsplit("/", 1)[-1]])


FIELDS = sorted(set(_fields(json_schema(), json_schema())))


def test_it_is_a_valid_run_file() -> None:
    spec = parse(yaml.safe_load(STARTER))
    assert spec.name == "my-model"
    made = plan(
        train=spec.train,
        resources=spec.resources,
        sequence_length=spec.data.sequence_length,
        capacity=Capacity(num_cpus=2),
        size=None,
    )
    assert made.num_workers == 2


@pytest.mark.parametrize("field", FIELDS)
def test_it_mentions_every_field(field: str) -> None:
    assert re.search(rf"^\W*{field}:|[{{,] *{field}:", STARTER, flags=re.MULTILINE)


def test_what_it_leaves_out_can_be_put_in() -> None:
    swapped = STARTER.replace('  train: "data', '  # train: "data').replace("  # dataset: NAME", "  dataset: NAME")
    swapped = swapped.replace("  steps: 200", "  # steps: 200").replace("  # epochs:", "  epochs:")
    spec = parse(yaml.safe_load(swapped))
    assert (spec.data.dataset, spec.train.epochs) == ("NAME", 1.0)


def test_defaults_shown_are_the_defaults() -> None:
    """Where the starter repeats a default, it is the true one; what it chooses by itself is listed here."""
    chosen = {"warmup_steps", "learning_rate", "every_steps", "workers"}
    spec = parse(yaml.safe_load(STARTER))
    for name in ("data", "train", "checkpoint", "resources", "gate"):
        part = getattr(spec, name)
        for owner in (part, *(getattr(part, inner) for inner in ("optimizer", "zero") if hasattr(part, inner))):
            for field, info in type(owner).model_fields.items():
                if field in chosen | {"steps", "train", "optimizer", "zero"} or info.is_required():
                    continue
                assert getattr(owner, field) == info.default, f"{name}.{field}"


def test_what_is_commented_out_is_valid_and_shows_the_defaults() -> None:
    document = yaml.safe_load(re.sub(r"^  # ", "  ", STARTER, flags=re.MULTILINE))
    for part, excluded in (
        ("model", "architecture"),
        ("model", "init_from"),
        ("data", "dataset"),
        ("data", "label_field"),
        ("data", "tokenizer"),
        ("data", "end_of_text"),
        ("train", "epochs"),
    ):
        del document[part][excluded]
    spec = parse(document)
    assert spec.model.pretrained == "s3://bucket/model"
    assert (spec.model.lora, spec.model.trust_remote_code) == (LoraSpec(), False)
    assert spec.data.long_samples == DataSpec.model_fields["long_samples"].default
    assert spec.train.evaluate == EvaluateSpec(every_steps=50)
    for field in ("activation_checkpointing", "deepspeed"):
        assert getattr(spec.train, field) == TrainSpec.model_fields[field].default
    assert spec.export.lora == ExportSpec.model_fields["lora"].default
    assert (spec.gate.min, spec.gate.max) == ({"accuracy": 0.9}, {"perplexity": 20.0})


def test_the_schema_has_the_fields_that_this_test_looks_for() -> None:
    assert {"apiVersion", "betas", "min", "channel", "offload"} <= set(FIELDS)
    assert set(RunSpec.model_fields) <= set(FIELDS)
