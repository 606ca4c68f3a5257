"""``target.yaml``: the shipped example, each limit, and Kubernetes' own notation of quantities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity
from pydantic import ValidationError

from orchestrator.document import QUANTITY
from orchestrator.errors import SpecError
from orchestrator.target_settings import TargetSettings, amount, load_settings
from tests.unit.render.requests import MINIMAL, settings

EXAMPLE = Path(__file__).parents[2] / "k8s" / "target.example.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "target.yaml"
    path.write_text(text)
    return path


# -- the file


def test_the_shipped_example_is_right_and_names_every_field() -> None:
    found = load_settings(EXAMPLE)
    assert found.model_fields_set == set(TargetSettings.model_fields)
    assert found.s3.model_fields_set == set(type(found.s3).model_fields)
    assert found.deadlines.model_fields_set == set(type(found.deadlines).model_fields)
    pool = found.pools["h100"]
    assert pool.model_fields_set == set(type(pool).model_fields)
    assert pool.size.model_fields_set == set(type(pool.size).model_fields)


def test_the_smallest_one_has_defaults_for_the_rest(tmp_path: Path) -> None:
    found = load_settings(write(tmp_path, yaml.safe_dump(MINIMAL)))
    assert found == settings()
    assert (found.namespace, found.queue, found.token_secret) == ("headway", "headway", "headway-ray-token")
    assert (found.s3.trainer_secret, found.max_attempts, found.serve_pool) == ("headway-s3-trainer", 5, "cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", r"target\.yaml is not YAML \(line 1"),
        ("- a", r"holds list, not a mapping"),
        ("kind: kubernetes", r"apiVersion is missing"),
        ("apiVersion: headway/v2", r"apiVersion is 'headway/v2'"),
        ("apiVersion: headway/v1\nkind: kubernetes\nkind: x", r"kind is given twice"),
        ("apiVersion: headway/v1\npools: {cpu: {max_pods: 1, max_pods: 2}}", r"max_pods is given twice"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        load_settings(write(tmp_path, text))
    assert caught.value.next_step


def test_a_missing_file_names_the_example(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="There is no file of target settings") as caught:
        load_settings(tmp_path / "target.yaml")
    assert "start from: k8s/target.example.yaml" in caught.value.next_step


# -- limits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "nomad"}, r"kind: \"nomad\" is refused: must be 'kubernetes'"),
        ({"image": ""}, r"image: \"\" is refused: may not have fewer than 1 characters"),
        ({"namespaec": "x"}, r"namespaec: no such field; did you mean namespace"),
        ({"namespace": "My_Team"}, r"namespace: \"My_Team\" is refused: may hold only a-z, 0-9 and dashes"),
        ({"namespace": "n" * 64}, r"namespace: .* may have at most 63 characters"),
        ({"image_pull_policy": "Sometimes"}, r"image_pull_policy: \"Sometimes\" is refused: must be 'Always'"),
        ({"ray_version": "2.60"}, r"ray_version: \"2\.60\" is refused: must be three numbers, such as 2\.60\.0"),
        ({"max_attempts": 0}, r"max_attempts: 0 is refused: must be at least 1"),
        ({"max_attempts": 101}, r"max_attempts: 101 is refused: must be at most 100"),
        ({"max_attempts": True}, r"max_attempts: true is refused: a truth value has no meaning here"),
        ({"grace": 29}, r"grace: 29 is refused: must be at least 30"),
        ({"keep_finished": -1}, r"keep_finished: -1 is refused: must be at least 0"),
        ({"deadlines": {"run": 0}}, r"deadlines\.run: 0 is refused: must be at least 1"),
        ({"deadlines": {"runn": 1}}, r"deadlines\.runn: no such field; did you mean run"),
        ({"head": {"cpu": "two"}}, r"head\.cpu: \"two\" is refused: must be a Kubernetes quantity, such as 500m"),
        ({"head": {"memory": "4GB"}}, r"head\.memory: \"4GB\" is refused: must be a Kubernetes quantity"),
        ({"head": {"memory": True}}, r"head\.memory: true is refused"),
        ({"env": {"1A": "x"}}, r"env\.1A.*: .*starts with no digit"),
        ({"env": {"A": 1}}, r"env\.A: 1 is refused: must be text"),
        ({"claims": [{"claim": "a", "path": "mnt"}]}, r"claims\.0\.path: \"mnt\" is refused: must be an absolute path"),
        ({"pools": {}}, r"pools"),
        ({"pools": {"cpu": {}}}, r"pools\.cpu\.max_pods: missing, and has no default"),
        ({"pools": {"cpu": {"max_pods": 0}}}, r"pools\.cpu\.max_pods: 0 is refused: must be at least 1"),
        ({"pools": {"cpu": {"max_pod": 1}}}, r"pools\.cpu\.max_pod: no such field; did you mean max_pods"),
        ({"pools": {"cpu": {"max_pods": 1, "gpus_per_pod": 1}}}, r"cpu has gpus_per_pod 1; cpu has none"),
        ({"pools": {"a100": {"max_pods": 1}}}, r"a100 has gpus_per_pod 0; cpu has none, every other kind has some"),
        ({"pools": {"A100": {"max_pods": 1, "gpus_per_pod": 1}}}, r"pools\.A100.*may hold only a-z"),
        ({"serve_pool": "a100"}, r"serve_pool a100 is none of the pools: cpu"),
    ],
)
def test_each_limit_names_field_value_and_limit(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        settings(**change)
    assert caught.value.next_step


def test_several_faults_are_told_at_once() -> None:
    with pytest.raises(SpecError, match=r"has 2 faults:\n  image.*\n  grace"):
        settings(image="", grace=1)


def test_they_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        settings().namespace = "other"


def test_a_quantity_may_be_a_plain_number_as_yaml_reads_it(tmp_path: Path) -> None:
    found = load_settings(write(tmp_path, yaml.safe_dump({**MINIMAL, "head": {"cpu": 2, "cpu_request": 0.5}})))
    assert (found.head.cpu, found.head.cpu_request) == ("2", "0.5")


# -- pools


@pytest.mark.parametrize(
    ("gpu", "pool"), [(None, "cpu"), ("any", "a100"), ("A100", "a100"), ("a100", "a100"), ("H100", "h100")]
)
def test_the_pool_of_a_kind_of_gpu(gpu: str | None, pool: str) -> None:
    pools = {name: {"max_pods": 1, "gpus_per_pod": 1} for name in ("a100", "h100")}
    target = settings(pools={"cpu": {"max_pods": 1}, **pools})
    assert target.pool_of(gpu) == (pool, target.pools[pool])


# -- quantities


@given(st.from_regex(QUANTITY, fullmatch=True).filter(lambda text: len(text) < 20))
def test_an_amount_is_what_kubernetes_reads(quantity: str) -> None:
    assert amount(quantity) == pytest.approx(float(parse_quantity(quantity.strip())))


def test_an_amount_of_something_else() -> None:
    with pytest.raises(ValueError, match="'much' is not a quantity"):
        amount("much")
