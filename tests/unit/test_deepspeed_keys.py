"""``train.deepspeed``: what is refused by name, and that the names are those of the installed DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.deepspeed_keys import KNOWN, KNOWN_OF_ZERO, merged
from orchestrator.errors import SpecError
from orchestrator.spec import parse

DOCUMENT = {
    "apiVersion": "headway/v1",
    "name": "demo",
    "model": {"architecture": {"model_type": "llama"}},
    "data": {"train": "data/*.txt"},
}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bf16": {"enabled": True}}, "may not hold bf16: it is set by train.precision"),
        ({"train_batch_size": 4}, "may not hold train_batch_size: it is set by train.global_batch_size"),
        ({"optimizer": {"type": "Adam"}}, "may not hold optimizer: it is set by train.optimizer"),
        ({"gradient_clipping": 1.0}, "may not hold gradient_clipping: it is set by train.max_grad_norm"),
        ({"checkpoint": {}}, "may not hold checkpoint: checkpoints are made as checkpoint.* says"),
        ({"zero_optimization": {"stage": 3}}, "may not hold zero_optimization.stage: it is set by train.zero.stage"),
        (
            {"zero_optimization": {"offload_optimizer": {}}},
            "may not hold zero_optimization.offload_optimizer: it is set by train.zero.offload",
        ),
        ({"comms_loger": {}}, "may not hold comms_loger, which DeepSpeed does not know; did you mean comms_logger"),
        (
            {"zero_optimization": {"reduce_buket_size": 1}},
            "zero_optimization.reduce_buket_size, which DeepSpeed does not know; did you mean "
            "zero_optimization.reduce_bucket_size",
        ),
        ({"xyz": 1}, "may not hold xyz, which DeepSpeed does not know; it may hold aio, comet"),
        ({"zero_optimization": 3}, "zero_optimization must be a mapping of DeepSpeed's settings, not 3"),
        ({"aio": {"block_size": float("nan")}}, "holds what JSON cannot say"),
    ],
)
def test_a_run_file_that_says_what_it_may_not_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse({**DOCUMENT, "train": {"steps": 1, "deepspeed": settings}})
    assert "train.deepspeed: " in caught.value.message
    assert said in caught.value.message


def test_the_rest_is_kept_as_it_was_written() -> None:
    settings = {"communication_data_type": "fp32", "zero_optimization": {"overlap_comm": False}}
    assert parse({**DOCUMENT, "train": {"steps": 1, "deepspeed": settings}}).train.deepspeed == settings


def test_mappings_are_merged_and_the_rest_is_replaced() -> None:
    ours = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": 1}
    assert merged(ours, {"a": {"c": {"x": 3}, "b": 4}, "e": [2], "f": {"g": 5}}) == {
        "a": {"b": 4, "c": {"d": 2, "x": 3}},
        "e": [2],
        "f": {"g": 5},
    }
    assert ours == {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "f": 1}


class _Reading(dict[str, Any]):
    """A config that remembers what was asked of it."""

    asked: set[str] = set()  # noqa: RUF012  shared with the copy that DeepSpeed makes

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return _Keys(self)


class _Keys:
    def __init__(self, config: _Reading) -> None:
        self._config = config

    def __contains__(self, key: object) -> bool:
        return key in self._config

    def __iter__(self) -> Iterator[str]:
        return iter(dict.keys(self._config))


def test_the_names_are_those_that_the_installed_deepspeed_reads() -> None:
    pytest.importorskip("deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    given = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}}
    DeepSpeedConfig(_Reading({**given, "zero_optimization": {"stage": 2}}))
    assert _Reading.asked == KNOWN
    fields = DeepSpeedZeroConfig.model_fields.items()
    names = {field.alias or name for name, field in fields}
    assert names | {"stage3_gather_fp16_weights_on_model_save"} == KNOWN_OF_ZERO
