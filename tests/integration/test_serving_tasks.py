"""Chat and classification for real: Ray Serve, an S3 server, and the official openai client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from orchestrator.pretrained.source import list_base
from orchestrator.store import Store, layout, open_store
from orchestrator.targets.seaweedfs import S3Server
from tests.integration.conftest import BUCKET
from tests.integration.serving import promote, ray_with_serve, serving, wait_for
from tests.tiny_classifier import CLASSES, save_classifier
from tests.tiny_model import release_version, save_model
from tests.unit.serve.adapters import save_adapter
from tests.unit.workloads.bases import save_base
from workloads.fetch_base import fetch_base
from workloads.tasks.tokenizer_files import copy_tokenizer

CHAT, CLASSES_OF_TEXT, ADAPTED = "chat-lm", "text-classes", "adapted-classes"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
MESSAGES: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "naïve café?"}]
TEXTS = ["def __init__(self", "naïve café", "x"]


@dataclass(frozen=True, kw_only=True)
class Served:
    url: str
    client: openai.OpenAI
    directory: Path
    """Of the version that is served."""


@pytest.fixture(scope="module")
def serve_port(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with ray_with_serve(tmp_path_factory.mktemp("cache")) as port:
        yield port


def start(port: int, store: Store, model: str, directory: Path) -> Iterator[Served]:
    """The application of one model whose version is ``directory``."""
    from ray import serve

    from workloads.serve.app import build

    promote(store, model, 1)
    arguments = {"model": model, "store": store.uri, "poll_s": 0.2, "max_queued": 60}
    serve.run(build(arguments), name=model, route_prefix=f"/{model}")
    url = f"http://127.0.0.1:{port}/{model}"
    wait_for(lambda: serving(url) == 1)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield Served(url=url, client=client, directory=directory)
    serve.delete(model)


@pytest.fixture(scope="module")
def chat(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = save_model(tmp_path_factory.mktemp("chat") / "model", seed=1)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    let_it_end(directory)
    store = open_store(f"s3://{BUCKET}/serving-chat")
    release_version(store, CHAT, directory)
    yield from start(serve_port, store, CHAT, directory)


@pytest.fixture(scope="module")
def classes(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = save_classifier(tmp_path_factory.mktemp("classes") / "model", seed=1)
    store = open_store(f"s3://{BUCKET}/serving-classes")
    release_version(store, CLASSES_OF_TEXT, directory, task="sequence-classification")
    yield from start(serve_port, store, CLASSES_OF_TEXT, directory)


@pytest.fixture(scope="module")
def adapted(serve_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A version that holds an adapter alone. Its directory here is that of both merged."""
    base = save_base(tmp_path_factory.mktemp("base") / "model", model_type="bert")
    directory, merged = tmp_path_factory.mktemp("adapter") / "model", tmp_path_factory.mktemp("merged") / "model"
    model = save_adapter(
        directory,
        base,
        auto_class="AutoModelForSequenceClassification",
        head=("classifier", "bert.pooler"),
        id2label=dict(enumerate(CLASSES)),
        pad_token_id=0,
    )
    model.merge_and_unload().save_pretrained(merged)
    copy_tokenizer(base, merged)
    store = open_store(f"s3://{BUCKET}/serving-adapter")
    reference = fetch_base(list_base(str(base), store), store).reference
    version = release_version(store, ADAPTED, directory, task="sequence-classification")
    key = layout.version_manifest(ADAPTED, 1)
    store.delete([key])
    store.create_json(key, version.model_copy(update={"base": reference}).document())
    yield from start(serve_port, store, ADAPTED, merged)


def let_it_end(directory: Path) -> None:
    """Make the model of ``directory`` end its turn after the first tokens that it would say to :data:`MESSAGES`.

    The end token gets the output weights of the token that it would have said there, and that one gets the end's.
    """
    said = generated(directory, 30)[0]
    said_then = next(token for number, token in enumerate(said) if number >= 5 and token not in said[:number])
    weights = load_file(directory / "model.safetensors")
    end = transformers.AutoTokenizer.from_pretrained(directory).eos_token_id
    weights["lm_head.weight"][[end, said_then]] = weights["lm_head.weight"][[said_then, end]]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def greedy(directory: Path, num_tokens: int) -> tuple[str, int, int]:
    """What transformers itself generates after :data:`MESSAGES` up to the end of the turn; the number of tokens of the
    prompt, and of the answer with its end."""
    said, num_prompt_tokens = generated(directory, num_tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    turn = said[: said.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(turn)
    return text, num_prompt_tokens, len(turn) + 1


def generated(directory: Path, num_tokens: int) -> tuple[list[int], int]:
    """The tokens that transformers generates after :data:`MESSAGES`, and the length of the prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, use_safetensors=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens)
    return out[0, ids.shape[1] :].tolist(), ids.shape[1]


def test_chat_is_what_transformers_generates(chat: Served) -> None:
    expected, num_prompt_tokens, num_tokens = greedy(chat.directory, 30)
    answer = chat.client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=0)
    assert (answer.choices[0].message.role, answer.choices[0].message.content) == ("assistant", expected)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt_tokens, num_tokens)
    assert answer.usage.total_tokens == num_prompt_tokens + num_tokens
    assert answer.system_fingerprint == f"{CHAT}@1"
    in_parts: Any = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in MESSAGES]
    again = chat.client.chat.completions.create(model=CHAT, messages=in_parts, max_completion_tokens=30, temperature=0)
    assert again.choices[0].message.content == expected


def test_streamed_pieces_join_to_the_whole(chat: Served) -> None:
    whole = chat.client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=30, temperature=0)
    stream = chat.client.chat.completions.create(
        model=CHAT,
        messages=MESSAGES,
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks][:2] == ["assistant", None]
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert (last.choices, last.usage) == ([], whole.usage)


def test_chat_takes_what_completions_take(chat: Served) -> None:
    def said(**arguments: Any) -> list[tuple[str | None, str]]:
        answer = chat.client.chat.completions.create(model=CHAT, messages=MESSAGES, **arguments)
        return [(choice.message.content, choice.finish_reason) for choice in answer.choices]

    ((whole, _),) = said(temperature=0)
    assert whole is not None
    ((short, reason),) = said(temperature=0, max_tokens=3)
    assert (whole.startswith(short or "?"), reason) == (True, "length")
    assert said(temperature=0, stop=[whole[3:5]]) == [(whole[: whole.index(whole[3:5])], "stop")]
    assert said(top_p=1e-9) == [(whole, "stop")]  # the likeliest token alone is left
    sampled = said(seed=1, n=3, max_tokens=12)
    assert said(seed=1, n=3, max_tokens=12) == sampled
    assert len(set(sampled)) == 3
    assert said(seed=2, n=3, max_tokens=12) != sampled


def test_a_conversation_goes_on_with_what_was_answered(chat: Served) -> None:
    create = chat.client.chat.completions.create
    first = create(model=CHAT, messages=MESSAGES, max_tokens=5, seed=1)
    grown = [*MESSAGES, first.choices[0].message, {"role": "user", "content": "more"}]
    second = create(model=CHAT, messages=grown, max_tokens=5, n=2, seed=1)
    assert [choice.index for choice in second.choices] == [0, 1]
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


def test_chat_is_refused_in_openais_format(chat: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat.client.chat.completions.create(model=CHAT, messages=[{"role": "user", "content": "x " * 400}])
    wizard: Any = [{"role": "wizard", "content": "x"}]
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.role"):
        chat.client.chat.completions.create(model=CHAT, messages=wizard)
    response = httpx.post(f"{chat.url}/v1/classify", json={"input": "x"}, timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported")


def test_classes_are_what_transformers_pipeline_says(classes: Served) -> None:
    pipeline = transformers.pipeline("text-classification", model=str(classes.directory), top_k=None, device="cpu")
    body = {"model": CLASSES_OF_TEXT, "input": TEXTS * 10}
    response = httpx.post(f"{classes.url}/v1/classify", json=body, timeout=60)
    document = response.json()
    assert response.headers["x-headway-version"] == f"{CLASSES_OF_TEXT}@1"
    assert document["object"] == "list"
    for entry, text in zip(document["data"], TEXTS * 10, strict=True):
        expected = {score["label"]: score["score"] for score in pipeline([text])[0]}
        assert entry["scores"] == pytest.approx(expected, abs=1e-5)
        assert entry["label"] == max(expected, key=lambda label: expected[label])
    assert set(document["data"][0]["scores"]) == set(CLASSES)


def test_an_adapter_is_served_with_its_base(adapted: Served) -> None:
    pipeline = transformers.pipeline("text-classification", model=str(adapted.directory), top_k=None, device="cpu")
    answer = httpx.post(f"{adapted.url}/v1/classify", json={"input": TEXTS}, timeout=60).json()
    assert [entry["scores"] for entry in answer["data"]] == [
        {score["label"]: pytest.approx(score["score"], abs=1e-5) for score in scores} for scores in pipeline(TEXTS)
    ]
    assert answer["model"] == ADAPTED


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"input": ["x"] * 65}, 400),
        ({"input": "漢" * 100}, 400),
        ({"input": ""}, 400),
        ({"model": "other"}, 404),
        ({"input": "x" * 2**20}, 413),
    ],
)
def test_classification_is_refused_in_openais_format(classes: Served, change: dict[str, Any], status: int) -> None:
    response = httpx.post(f"{classes.url}/v1/classify", json={"input": "x", **change}, timeout=60)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_classifier_completes_nothing(classes: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="/v1/classify"):
        classes.client.completions.create(model=CLASSES_OF_TEXT, prompt="x")
    with pytest.raises(openai.BadRequestError, match="/v1/classify"):
        classes.client.chat.completions.create(model=CLASSES_OF_TEXT, messages=MESSAGES)
