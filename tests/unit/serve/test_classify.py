"""The classifier on tiny random models, and its endpoint."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from starlette.responses import Response

from orchestrator.errors import IntegrityError
from tests.tiny_classifier import CLASSES, CONTEXT_TOKENS, save_classifier
from tests.tiny_model import make_version, save_model
from tests.unit.serve.scripted import FILES, ScriptedEngine, ask
from workloads.serve.admission import EngineSettings
from workloads.serve.chat import complete_chat
from workloads.serve.classifier import TransformersClassifier
from workloads.serve.classify import classify
from workloads.serve.completions import complete
from workloads.serve.engines import load_engine
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.openai_api import ApiError
from workloads.serve.transformers_engine import TransformersEngine

SETTINGS = EngineSettings(max_batch=2, max_queued=38, num_threads=1)
TEXTS = ["def __init__(self", "naïve café", "x", "self.name = name\n" * 4, "и кириллица"]


@pytest.fixture(scope="module", params=["bert", "llama"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("model") / "one", seed=1, model_type=request.param)


@pytest.fixture(scope="module")
def classifier(directory: Path) -> TransformersClassifier:
    return TransformersClassifier.load(directory, SETTINGS)


def answer(classifier: Any, **fields: Any) -> tuple[Response, bytes]:
    return ask(classify, classifier, fields)


def test_it_says_what_transformers_pipeline_says(classifier: TransformersClassifier, directory: Path) -> None:
    pipeline = transformers.pipeline("text-classification", model=str(directory), top_k=None, device="cpu")
    response, body = answer(classifier, input=TEXTS * 7)  # several batches
    document = json.loads(body)
    assert (document["object"], document["model"]) == ("list", "code-lm")
    assert response.headers["x-headway-version"] == "code-lm@3"
    assert [entry["index"] for entry in document["data"]] == list(range(len(TEXTS) * 7))
    expected = pipeline(TEXTS)
    for entry, scores in zip(document["data"], expected * 7, strict=True):
        assert (entry["label"], entry["score"]) == (scores[0]["label"], pytest.approx(scores[0]["score"], abs=1e-5))
        assert entry["scores"] == {score["label"]: pytest.approx(score["score"], abs=1e-5) for score in scores}
    num_tokens = sum(len(asyncio.run(classifier.encode(text))) for text in TEXTS) * 7
    assert document["usage"] == {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens}
    assert classifier.labels == CLASSES


def test_one_text_may_come_alone(classifier: TransformersClassifier) -> None:
    alone, listed = (json.loads(answer(classifier, input=given)[1])["data"] for given in ("x", ["x"]))
    assert alone == listed
    assert len(alone) == 1


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "You must provide a input parameter"),
    ({"input": []}, 400, "must be a text, or a list of texts"),
    ({"input": [1]}, 400, "must be a text, or a list of texts"),
    ({"input": ["x"] * 65}, 400, "has 65 texts; the limit is 64"),
    ({"input": ["x"] * 41}, 429, "above the limit of 40"),
    ({"input": ["x", ""]}, 400, "Text 1 of input is empty"),
    ({"input": ["x", "漢" * 60]}, 400, f"maximum context length is {CONTEXT_TOKENS} tokens, however text 1"),
    ({"input": "\ud800"}, 400, "lone surrogate"),
    ({"input": "x", "model": "other"}, 404, "does not exist"),
    ({"input": "x", "inputs": "y"}, 400, "Unrecognized request argument supplied: inputs"),
]


@pytest.mark.parametrize(("fields", "status", "message"), REFUSED)
def test_refusals(classifier: TransformersClassifier, fields: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        answer(classifier, **fields)
    assert caught.value.status == status


def test_each_kind_of_model_has_its_endpoints(classifier: TransformersClassifier) -> None:
    hello = [{"role": "user", "content": "hello"}]
    for endpoint, engine, fields, instead in (
        (complete, classifier, {"prompt": "x"}, "/v1/classify"),
        (complete_chat, classifier, {"messages": hello}, "/v1/classify"),
        (classify, ScriptedEngine("a"), {"input": "x"}, "/v1/completions"),
    ):
        with pytest.raises(ApiError, match=instead) as caught:
            ask(endpoint, engine, fields)
        assert (caught.value.status, caught.value.code) == (400, "unsupported")


@pytest.mark.parametrize("task", ["sequence-classification", "my_task:MyClassifier"])
def test_the_task_decides_what_is_loaded(tmp_path: Path, task: str) -> None:
    version = make_version(files=FILES)
    classifying = version.model_copy(update={"task": task})
    saved = save_classifier(tmp_path / "classifier", seed=1)
    assert isinstance(load_engine(classifying, saved, SETTINGS), TransformersClassifier)
    generating = save_model(tmp_path / "generator", seed=1)
    for name in ("causal-lm", "my_task:MyGenerator"):
        found = load_engine(version.model_copy(update={"task": name}), generating, SETTINGS)
        assert isinstance(found, TransformersEngine)


def test_a_broken_model_is_found_out_at_load(tmp_path: Path) -> None:
    save_classifier(tmp_path, seed=1)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.weight"][1, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteLogits):
        TransformersClassifier.load(tmp_path, SETTINGS)
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"lacks 1 of the model's weights, such as classifier\.weight"):
        TransformersClassifier.load(tmp_path, SETTINGS)


def test_what_pads_a_batch_changes_nothing(classifier: TransformersClassifier) -> None:
    ids = [asyncio.run(classifier.encode(text)) for text in TEXTS]
    together = torch.tensor(asyncio.run(classifier.classify(ids)))
    alone = torch.tensor([asyncio.run(classifier.classify([text]))[0] for text in ids])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
