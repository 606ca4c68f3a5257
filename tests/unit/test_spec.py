"""The run file: what is accepted, every refusal in words, and what a run's identity is made of."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec import MAX_NAME, RunSpec, canonical_json, json_schema, load, parse, run_id

EXAMPLE = """\
apiVersion: headway/v1
name: code-lm
task: causal-lm
model: {architecture: {model_type: llama, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4}}
data: {train: "s3://bucket/stdlib/**/*.py", format: text, eval_fraction: 0.05, sequence_length: 256}
train:
  steps: 200
  global_batch_size: 32
  micro_batch_size: 8
  optimizer: {learning_rate: 1.0e-3, warmup_steps: 20, weight_decay: 0.1, schedule: cosine}
  max_grad_norm: 1.0
  zero: {stage: 3, offload: none}
  precision: auto
  seed: 0
checkpoint: {every_steps: 50, keep: 3}
resources: {workers: {min: 2, max: 2}, gpu: null, cpus_per_worker: 1}
gate: {max_loss: 4.0, must_beat_serving: true}
release: {model: code-lm, channel: production}
"""
GONE = object()


def _document(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The example with some fields, named by their dotted path, set or (``GONE``) left out."""
    document: dict[str, Any] = yaml.safe_load(EXAMPLE)
    for path, value in (changes or {}).items():
        *parents, leaf = path.split(".")
        part = document
        for parent in parents:
            part = part.setdefault(parent, {})
        if value is GONE:
            del part[leaf]
        else:
            part[leaf] = value
    return document


def _refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        parse(_document(changes))
    return str(caught.value)


# --- what is accepted


def test_the_example_of_the_documentation() -> None:
    spec = parse(_document())
    assert spec.name == "code-lm"
    assert spec.train.optimizer.learning_rate == 1e-3
    assert spec.resources.workers.max == 2
    assert not spec.user_code


def test_the_least_that_a_run_file_holds() -> None:
    least = {
        "apiVersion": "headway/v1",
        "name": "a",
        "model": {"architecture": {"model_type": "llama"}},
        "data": {"dataset": "corpus@0123456789abcdef"},
        "train": {"epochs": 0.5},
    }
    spec = parse(least)
    assert (spec.task, spec.release, spec.train.zero.stage) == ("causal-lm", None, 2)


def test_a_task_of_ones_own() -> None:
    assert parse(_document({"task": "my_tasks.vision:Classifier"})).user_code


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(_document()).train.seed = 1  # type: ignore[misc]


def test_yaml_numbers_without_a_dot_are_numbers() -> None:
    """YAML 1.1 reads 1e-3 as text; a run file means the number."""
    assert parse(_document({"train.optimizer.learning_rate": "1e-3"})).train.optimizer.learning_rate == 1e-3


# --- refusals: field, value, limit

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"name": "My Model"}, 'name: "My Model" is refused: may hold only a-z, 0-9 and dashes'),
    ({"name": "-a"}, "starts and ends with one of a-z and 0-9"),
    ({"name": ""}, 'name: "" is refused'),
    ({"name": "a" * 32}, "may have at most 31 characters"),
    ({"name": 7}, "name: 7 is refused: must be text"),
    ({"name": GONE}, "name: missing, and has no default"),
    ({"task": "causal lm"}, 'task: "causal lm" is refused: must be a built-in task\'s name or module:Class'),
    ({"task": "module:"}, "module:Class"),
    ({"model": GONE}, "model: missing"),
    ({"model": "llama"}, 'model: "llama" is refused: must be a mapping of fields'),
    ({"model.architecture": {}}, "model.architecture: needs model_type"),
    ({"model.architecture.model_type": 3}, "model.architecture: needs model_type"),
    ({"model.architecture.hidden_size": float("nan")}, "model.architecture: holds what JSON cannot say"),
    ({"model.architecture": ["llama"]}, 'model.architecture: ["llama"] is refused: must be a mapping of fields'),
    ({"data.train": GONE}, "data: needs exactly one of train (a source to prepare) and dataset"),
    ({"data.dataset": "corpus"}, "data: needs exactly one of train"),
    ({"data.format": "csv"}, "\"csv\" is refused: must be 'text', 'source', 'jsonl', 'parquet' or 'messages'"),
    ({"data.vocab_size": 257}, "data.vocab_size: 257 is refused: must be at least 258"),
    ({"data.vocab_size": 2**31 + 1}, "must be at most 2147483648"),
    ({"data.eval_fraction": 0}, "data.eval_fraction: 0 is refused: must be above 0"),
    ({"data.eval_fraction": 1.0}, "data.eval_fraction: 1.0 is refused: must be below 1"),
    ({"data.sequence_length": 0}, "data.sequence_length: 0 is refused: must be at least 1"),
    ({"train": GONE}, "train: missing"),
    ({"train.steps": 0}, "train.steps: 0 is refused: must be at least 1"),
    ({"train.steps": 1.5}, "train.steps: 1.5 is refused: must be a whole number"),
    ({"train.steps": "many"}, 'train.steps: "many" is refused: must be a whole number'),
    ({"train.steps": True}, "train.steps: true is refused: a truth value has no meaning here"),
    ({"train.steps": GONE}, "train: needs exactly one of steps and epochs"),
    ({"train.epochs": 1}, "train: needs exactly one of steps and epochs"),
    ({"train.steps": GONE, "train.epochs": 0}, "train.epochs: 0 is refused: must be above 0"),
    ({"train.global_batch_size": -1}, "train.global_batch_size: -1 is refused: must be at least 1"),
    ({"train.micro_batch_size": 0}, "train.micro_batch_size: 0 is refused: must be at least 1"),
    ({"train.optimizer.learning_rate": 0}, "train.optimizer.learning_rate: 0 is refused: must be above 0"),
    ({"train.optimizer.learning_rate": "fast"}, "must be a number"),
    ({"train.optimizer.learning_rate": float("inf")}, "must be a finite number"),
    ({"train.optimizer.warmup_steps": -1}, "train.optimizer.warmup_steps: -1 is refused: must be at least 0"),
    ({"train.optimizer.warmup_steps": 200}, "train.optimizer.warmup_steps 200 must be below train.steps 200"),
    ({"train.optimizer.weight_decay": -0.1}, "train.optimizer.weight_decay: -0.1 is refused: must be at least 0"),
    ({"train.optimizer.betas": [0.9, 1.1]}, "train.optimizer.betas.1: 1.1 is refused: must be below 1.0"),
    ({"train.optimizer.betas": 0.9}, "train.optimizer.betas: 0.9 is refused: must be a list"),
    ({"train.optimizer.eps": 0}, "train.optimizer.eps: 0 is refused: must be above 0"),
    ({"train.optimizer.schedule": "step"}, "must be 'constant', 'linear' or 'cosine'"),
    ({"train.optimizer.min_learning_rate_ratio": 2}, "must be at most 1"),
    ({"train.max_grad_norm": 0}, "train.max_grad_norm: 0 is refused: must be above 0"),
    ({"train.zero.stage": 4}, "train.zero.stage: 4 is refused: must be at most 3"),
    ({"train.zero.stage": -1}, "train.zero.stage: -1 is refused: must be at least 0"),
    ({"train.zero.offload": "nvme"}, "train.zero.offload: \"nvme\" is refused: must be 'none' or 'cpu'"),
    ({"train.zero": {"stage": 0, "offload": "cpu"}}, "train.zero: offload: cpu needs stage 1, 2 or 3"),
    ({"train.zero.offload": "cpu"}, "train.zero.offload cpu needs a GPU to offload from; set resources.gpu"),
    ({"train.precision": "int8"}, "must be 'auto', 'fp32', 'bf16' or 'fp16'"),
    ({"train.precision": "fp16"}, "train.precision fp16 needs a GPU; set resources.gpu, or precision fp32"),
    ({"export.dtype": "int8"}, "export.dtype: \"int8\" is refused: must be 'auto', 'fp32', 'bf16' or 'fp16'"),
    ({"export.max_shard_bytes": 1000}, "export.max_shard_bytes: 1000 is refused: must be at least 1048576"),
    ({"model.init_from": "demo@4"}, 'model.init_from: "demo@4" is refused: must be RUN-ID@STEP'),
    ({"model.init_from": "demo-1a2b3c4d"}, 'model.init_from: "demo-1a2b3c4d" is refused: must be RUN-ID@STEP'),
    ({"model.init_from": "demo-1a2b3c4d@x"}, 'model.init_from: "demo-1a2b3c4d@x" is refused: must be RUN-ID@STEP'),
    ({"model.init_from": "../x-1a2b3c4d@4"}, 'model.init_from: "../x-1a2b3c4d@4" is refused: must be RUN-ID@STEP'),
    ({"train.seed": -1}, "train.seed: -1 is refused: must be at least 0"),
    ({"train.seed": 2**63}, "must be below 9223372036854775808"),
    ({"checkpoint.every_steps": 0}, "checkpoint.every_steps: 0 is refused: must be at least 1"),
    ({"checkpoint.keep": 0}, "checkpoint.keep: 0 is refused: must be at least 1"),
    ({"resources.workers": {"min": 3, "max": 2}}, "resources.workers: min 3 is above max 2; set min at most max"),
    ({"resources.workers.min": 0}, "resources.workers.min: 0 is refused: must be at least 1"),
    ({"resources.workers.max": 33}, "resources.workers.max 33 is above train.global_batch_size 32"),
    ({"resources.cpus_per_worker": 0}, "resources.cpus_per_worker: 0 is refused: must be at least 1"),
    ({"resources.max_failures": -1}, "resources.max_failures: -1 is refused: must be at least 0"),
    ({"resources.pip": [""]}, 'resources.pip.0: "" is refused: may not have fewer than 1 characters'),
    ({"resources.pip": "einops"}, 'resources.pip: "einops" is refused: must be a list'),
    ({"env": {"A-B": "x"}}, "may hold only letters, digits and underscores"),
    ({"env": {"OMP_NUM_THREADS": 4}}, "env.OMP_NUM_THREADS: 4 is refused: must be text"),
    ({"env": {"HEADWAY_STORE": "s3://b"}}, "env: may not hold HEADWAY_STORE, which the target sets"),
    ({"env": {"AWS_ACCESS_KEY_ID": "x"}}, "env: may not hold AWS_ACCESS_KEY_ID"),
    ({"env": {"RAY_AUTH_MODE": "disabled"}}, "env: may not hold RAY_AUTH_MODE"),
    ({"secrets": ["My_Secret"]}, 'secrets.0: "My_Secret" is refused: may hold only a-z, 0-9, dashes and dots'),
    ({"secrets": {"TOKEN": "hunter2"}}, "secrets: must be a list"),
    ({"gate.max_loss": 0}, "gate.max_loss: 0 is refused: must be above 0"),
    ({"gate.must_beat_serving": "perhaps"}, 'must_beat_serving: "perhaps" is refused: must be true or false'),
    ({"gate.max_eval_samples": 0}, "gate.max_eval_samples: 0 is refused: must be at least 1"),
    ({"release": GONE}, "gate.must_beat_serving needs release.model"),
    ({"release.model": "Code LM"}, 'release.model: "Code LM" is refused: may hold only a-z'),
    ({"release.model": GONE}, "release.model: missing"),
    ({"release.channel": "a" * 32}, "release.channel"),
    ({"notify": {}}, "notify: needs exactly one of webhook (an address) and webhook_env"),
    ({"notify": {"webhook": "https://a.example", "webhook_env": "HOOK"}}, "notify: needs exactly one of webhook"),
    ({"notify": {"webhook": "http://a.example/hook"}}, "must be an https:// address; http:// is for"),
    ({"notify": {"webhook": "http://localhost.example/"}}, "must be an https:// address; http:// is for"),
    ({"notify": {"webhook": "file:///etc/passwd"}}, "must be an https:// address; http:// is for"),
    ({"notify": {"webhook": "https://"}}, "must be an https:// address; http:// is for"),
    ({"notify": {"webhook_env": "MY HOOK"}}, "notify.webhook_env"),
    ({"notify": {"webhook_env": "HOOK", "events": []}}, "notify.events"),
    ({"notify": {"webhook_env": "HOOK", "events": ["ended"]}}, "notify.events.0"),
    (
        {"notify": {"webhook_env": "HOOK", "stalled_minutes": 0}},
        "notify.stalled_minutes: 0 is refused: must be above 0",
    ),
]


@pytest.mark.parametrize(("changes", "said"), REFUSALS)
def test_a_refusal_names_field_value_and_limit(changes: dict[str, Any], said: str) -> None:
    message = _refusal(changes)
    assert said in message
    assert "headway schema" in message, "the next step"
    assert not re.search("pydantic|Input should|Value error|string_|For further", message)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"relase": {}}, "relase: no such field; did you mean release"),
        ({"train.optimiser": {}}, "train.optimiser: no such field; did you mean optimizer"),
        (
            {"train.optimizer.lerning_rate": 1},
            "train.optimizer.lerning_rate: no such field; did you mean learning_rate",
        ),
        ({"train.zero.stages": 1}, "train.zero.stages: no such field; did you mean stage"),
        ({"resources.workers.maximum": 1}, "resources.workers.maximum: no such field"),
        ({"release.chanel": "x"}, "release.chanel: no such field; did you mean channel"),
        ({"checkpoint.xyz": 1}, "checkpoint.xyz: no such field; known here are every_steps, keep"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest(changes: dict[str, Any], said: str) -> None:
    assert said in _refusal(changes)


def test_two_faults_are_listed_one_a_line() -> None:
    lines = _refusal({"train.steps": 0, "checkpoint.kep": 1}).splitlines()
    assert lines[0] == "run file has 2 faults:"
    assert lines[1] == "  train.steps: 0 is refused: must be at least 1."
    assert lines[2].startswith("  checkpoint.kep: no such field; did you mean keep.")


@pytest.mark.parametrize("field", sorted(RunSpec.model_fields))
def test_no_part_takes_a_truth_value(field: str) -> None:
    assert field in _refusal({field: True})


@pytest.mark.parametrize("value", ["headway/v2", None, 1])
def test_another_version_of_the_file_is_refused(value: object) -> None:
    message = _refusal({"apiVersion": value})
    assert f"apiVersion is {value!r}; this Headway reads 'headway/v1'. Write apiVersion: headway/v1" in message


def test_a_missing_version_is_called_missing() -> None:
    assert "apiVersion is missing" in _refusal({"apiVersion": GONE})


@pytest.mark.parametrize("document", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(document: object) -> None:
    with pytest.raises(SpecError, match="not a mapping of fields"):
        parse(document)


# --- reading the file


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE, encoding="utf-8")
    assert load(path) == parse(_document())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"There is no run file at .*run\.yaml\. .*headway init"):
        load(tmp_path / "run.yaml")


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        load(tmp_path)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match="cannot be read"):
        load(path)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tx: 1", "!!python/object:os.system x"])
def test_what_is_not_yaml_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"is not YAML \(line \d+, column \d+\)"):
        load(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("")
    with pytest.raises(SpecError, match="not a mapping"):
        load(path)


# --- the identity of a run


def _id(changes: dict[str, Any] | None = None, *, fingerprint: str = "f" * 16, code: str = "c" * 64) -> str:
    return run_id(parse(_document(changes)), dataset_fingerprint=fingerprint, code_digest=code)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate.max_loss": 3.0},
        {"gate.must_beat_serving": False, "release": GONE},
        {"release.channel": "staging"},
        {"notify": {"webhook": "http://127.0.0.1:9/hook"}},
        {"checkpoint.every_steps": 7},
        {"resources.workers": {"min": 1, "max": 4}},
        {"resources.gpu": "any"},
        {"data.train": "s3://elsewhere/copy/**/*.py"},
        {"train.max_grad_norm": 1},
        {"train.step_timeout": 30},
        {"export.dtype": "fp16", "export.max_shard_bytes": 2**20},
        {"env": {"NCCL_DEBUG": "INFO"}, "secrets": ["hub-token"], "resources.pip": ["einops"]},
        {"model.init_from": None},
    ],
)
def test_what_does_not_change_the_weights_continues_the_run(changes: dict[str, Any]) -> None:
    assert _id(changes) == _id()


@pytest.mark.parametrize(
    "changes",
    [
        {"model.architecture.hidden_size": 512},
        {"model.init_from": "demo-1a2b3c4d@4"},
        {"train.optimizer.learning_rate": 2e-3},
        {"train.steps": 300},
        {"train.global_batch_size": 64},
        {"train.seed": 1},
        {"train.precision": "fp32"},
        {"train.zero.stage": 2},
        {"data.sequence_length": 128},
        {"task": "mine:Task"},
        {"name": "other"},
    ],
)
def test_what_changes_the_weights_is_another_run(changes: dict[str, Any]) -> None:
    assert _id(changes) != _id()


def test_other_weights_to_start_from_are_another_run() -> None:
    assert _id({"model.init_from": "demo-1a2b3c4d@4"}) != _id({"model.init_from": "demo-1a2b3c4d@8"})


def test_a_checkpoint_to_start_from_is_a_run_and_a_step() -> None:
    spec = parse(_document({"model.init_from": "my-demo-1a2b3c4d@400"}))
    assert spec.model.init_from_checkpoint() == ("my-demo-1a2b3c4d", 400)


def test_other_data_is_another_run() -> None:
    assert _id(fingerprint="0" * 16) != _id()


def test_code_counts_only_where_it_shapes_the_weights() -> None:
    assert _id(code="d" * 64) == _id()
    own = {"task": "mine:Task"}
    assert _id(own, code="d" * 64) != _id(own)


def test_a_default_written_out_is_the_same_run() -> None:
    assert _id({"train.optimizer.eps": 1e-8}) == _id()


names = st.from_regex(rf"\A[a-z0-9]([a-z0-9-]{{0,{MAX_NAME - 2}}}[a-z0-9])?\Z")


@given(names, st.text(max_size=64))
def test_an_id_fits_and_is_stable(name: str, fingerprint: str) -> None:
    first = _id({"name": name}, fingerprint=fingerprint)
    assert first == _id({"name": name}, fingerprint=fingerprint)
    assert len(first) <= 40
    assert re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", first)


def test_an_id_is_the_same_tomorrow() -> None:
    """Pinned: a change here makes every run of everyone start over."""
    assert _id() == "code-lm-228d5606"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _reversed(value: Any) -> Any:
    """The same value with its keys in the opposite order."""
    if isinstance(value, dict):
        return {key: _reversed(value[key]) for key in reversed(list(value))}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


@given(json_values)
def test_canonical_json_ignores_the_order_of_keys_and_nothing_else(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(_reversed(copy.deepcopy(value))) == text
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_canonical_json_has_no_words_for_what_is_no_number(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


# --- the schema


def test_the_schema_is_valid_and_takes_the_example() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator(schema).validate(_document())


@pytest.mark.parametrize("changes", [{"relase": {}}, {"train.zero.stage": 4}, {"name": "My Model"}, {"model": GONE}])
def test_the_schema_refuses_what_the_parser_refuses(changes: dict[str, Any]) -> None:
    assert _refusal(changes)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(_document(changes))
