"""From a pretrained model and records in S3 to a served version, by the command line, on a real stack."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import transformers
import yaml

from orchestrator.pretrained.format import read_base
from orchestrator.release.outcome import Outcome, read_outcome
from orchestrator.release.versions import read_version
from orchestrator.store import Store, layout, open_store
from orchestrator.targets.stack import Stack
from tests.unit.workloads.bases import save_base

pytestmark = pytest.mark.full

Headway = Callable[..., subprocess.CompletedProcess[str]]
Submit = Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]
NUM_RECORDS = 300
CLASSES = ("code", "prose")
TRAIN: dict[str, Any] = {
    "global_batch_size": 8,
    "micro_batch_size": 4,
    "optimizer": {"learning_rate": 5.0e-3, "weight_decay": 0.0},
    "zero": {"stage": 3},
}


@pytest.fixture(scope="module")
def stack_store(stack: Stack) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack.store_environment().items():
            patch.setenv(name, value)
        yield open_store()


@pytest.fixture(scope="module")
def bucket(stack_store: Store) -> Store:
    """Beside the store's own prefix, as a user's models and data are."""
    return stack_store.at(stack_store.bucket, "mine")


def upload_base(bucket: Store, tmp_path: Path, model_type: str) -> str:
    # Wide weights: the logits of a frozen output layer of narrow ones could not be far apart.
    for path in save_base(tmp_path / model_type, model_type=model_type, initializer_range=0.3).iterdir():
        bucket.upload(f"{model_type}/{path.name}", path)
    return f"{bucket.uri}/{model_type}"


def upload_records(bucket: Store, name: str, records: list[dict[str, Any]]) -> str:
    bucket.upload(name, "".join(json.dumps(record) + "\n" for record in records).encode())
    return f"{bucket.uri}/{name}"


def conversations() -> list[dict[str, Any]]:
    """Answers that repeat the question; one without an answer, and one that is too long."""
    words = ["red", "green", "blue", "one", "two", "three"]
    good = [
        {
            "messages": [
                {"role": "user", "content": f"{words[number % 6]} {number}"},
                {"role": "assistant", "content": f"{words[number % 6]} {words[number % 6]}"},
            ]
        }
        for number in range(NUM_RECORDS)
    ]
    unanswered = {"messages": [{"role": "user", "content": "hello?"}]}
    return [*good, unanswered, {"prompt": "again", "completion": "again " * 100}]


def labelled() -> list[dict[str, Any]]:
    return [
        {"text": f"def f{number}(self): return {number}" if number % 2 else f"a café, the {number}th", "kind": kind}
        for number, kind in ((number, CLASSES[1 - number % 2]) for number in range(NUM_RECORDS))
    ]


@pytest.fixture
def headway(stack: Stack, stack_environment: dict[str, str]) -> Headway:
    """The command line, in the folder in which it finds the stack."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["headway", *arguments],
            cwd=stack.directory.parent,
            env=stack_environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def submit(headway: Headway, stack: Stack) -> Submit:
    """Submits a run for two workers, and waits for its end."""

    def run(document: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        name = f"{document['name']}.yaml"
        common = {"apiVersion": "headway/v1", "resources": {"workers": {"min": 2, "max": 2}}}
        (stack.directory.parent / name).write_text(yaml.safe_dump({**common, **document}))
        return headway("submit", name)

    return run


def outcome_of(store: Store, name: str) -> Outcome:
    (run_id,) = [found for found in store.list_folders("runs/") if found.rsplit("-", 1)[0] == name]
    outcome = read_outcome(store, run_id)
    assert outcome is not None
    return outcome


def test_a_chat_model_is_tuned_by_an_adapter_that_serves(
    stack: Stack, headway: Headway, submit: Submit, stack_store: Store, bucket: Store, tmp_path: Path
) -> None:
    base = upload_base(bucket, tmp_path, "llama")
    run: dict[str, Any] = {
        "name": "tuned",
        "model": {"pretrained": base, "lora": {"rank": 8}},
        "data": {
            "train": upload_records(bucket, "chat.jsonl", conversations()),
            "format": "messages",
            "eval_fraction": 0.1,
            "sequence_length": 64,
            "long_samples": "skip",
        },
        "train": {**TRAIN, "steps": 40, "optimizer": {"learning_rate": 1.0e-2}, "evaluate": {"every_steps": 20}},
        "export": {"lora": "adapter"},
        "release": {"model": "tuned"},
    }
    said = submit(run)
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-4000:]
    told = said.stdout + said.stderr
    assert "1 too_long" in told
    assert "1 no_assistant_turn" in told

    outcome = outcome_of(stack_store, "tuned")
    before, after = (outcome.facts["evaluation"][name] for name in ("pretrained_loss", "loss"))
    assert after < 0.9 * before
    version = read_version(stack_store, "tuned", 1)
    assert version.base is not None
    assert read_base(stack_store, version.base.fingerprint).digest == version.base.digest
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja"} <= version.files.keys()
    assert "model.safetensors" not in version.files

    whole = tmp_path / "whole"
    exported = headway("export", "tuned@40", "--to", str(whole), "--lora", "merged")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    transformers.AutoModelForCausalLM.from_pretrained(whole, use_safetensors=True)
    assert transformers.AutoTokenizer.from_pretrained(whole).chat_template

    served = headway("serve", "tuned")
    assert served.returncode == 0, served.stdout + served.stderr
    url = f"http://127.0.0.1:{stack.ray_ports.serve}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        question: Any = [{"role": "user", "content": "blue 2"}]
        stream = client.chat.completions.create(
            model="tuned", messages=question, max_tokens=16, temperature=0, stream=True
        )
        answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
        whole = client.chat.completions.create(model="tuned", messages=question, max_tokens=16, temperature=0)
    assert answer == whole.choices[0].message.content


def test_a_classifier_is_tuned_and_gated(
    stack: Stack, headway: Headway, submit: Submit, stack_store: Store, bucket: Store, tmp_path: Path
) -> None:
    run: dict[str, Any] = {
        "name": "kinds",
        "task": "sequence-classification",
        "model": {"pretrained": upload_base(bucket, tmp_path, "bert")},
        "data": {
            "train": upload_records(bucket, "kinds.jsonl", labelled()),
            "format": "jsonl",
            "label_field": "kind",
            "eval_fraction": 0.2,
            "sequence_length": 32,
        },
        "train": {**TRAIN, "steps": 25},
        "gate": {"min": {"accuracy": 0.9, "f1": 0.9}},
        "release": {"model": "kinds"},
    }
    said = submit(run)
    assert said.returncode == 0, said.stdout[-4000:] + said.stderr[-4000:]
    assert outcome_of(stack_store, "kinds").facts["evaluation"]["accuracy"] >= 0.9

    served = headway("serve", "kinds", "--route-prefix", "/kinds")
    assert served.returncode == 0, served.stdout + served.stderr
    url = f"http://127.0.0.1:{stack.ray_ports.serve}"
    texts = ["def f7001(self): return 7001", "a café, the 7000th"]
    answer = httpx.post(f"{url}/kinds/v1/classify", json={"model": "kinds", "input": texts}, timeout=60).json()
    assert [entry["label"] for entry in answer["data"]] == list(CLASSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"sequence_length": 65}}, "data.sequence_length: 65 is above the 64 positions"),
        ({"model": {"lora": {"target_modules": ["c_attn"]}}}, "model.lora.target_modules: c_attn is no module"),
    ],
)
def test_what_does_not_fit_the_base_ends_the_run_with_one_sentence(
    submit: Submit, bucket: Store, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run: dict[str, Any] = {
        "name": f"misfit-{len(message)}",
        "model": {"pretrained": upload_base(bucket, tmp_path, "llama"), **changes.get("model", {})},
        "data": {
            "train": upload_records(bucket, "chat.jsonl", conversations()),
            "format": "messages",
            "sequence_length": 64,
            **changes.get("data", {}),
        },
        "train": {**TRAIN, "steps": 30},
    }
    said = submit(run)
    assert said.returncode == 2, said.stdout[-4000:] + said.stderr[-4000:]
    assert message in said.stderr
    assert "Traceback" not in said.stderr


def test_the_base_was_copied_once(stack_store: Store) -> None:
    """Of all runs above that start from the same files."""
    bases = list(stack_store.list_folders("bases/"))
    assert len(bases) == 2
    for fingerprint in bases:
        assert len(list(stack_store.list_folders(layout.base(fingerprint)))) == 1
