"""Only what is needed is taken, and pickle never is."""

from __future__ import annotations

import json

import pytest

from orchestrator.errors import SpecError
from orchestrator.pretrained.selection import require_plain_config, select

TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


def index_of(*files: object) -> bytes:
    return json.dumps({"weight_map": {f"t{number}": file for number, file in enumerate(files)}}).encode()


def chosen(names: list[str], index: bytes = b"", **how: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = select(names, {INDEX: index}.__getitem__, source="/m", **how)
    return found.files, found.weights


def test_config_tokenizer_and_weights_are_taken_and_nothing_else() -> None:
    names = [
        "config.json", "generation_config.json", *TOKENIZER, "model.safetensors", "pytorch_model.bin", "optimizer.pt",
        "README.md", "model.fp16.safetensors", "consolidated.safetensors", "code.py", "onnx/model.onnx", "vocab.pkl",
        "sub/config.json",
    ]  # fmt: skip
    files, weights = chosen(names)
    assert files == tuple(sorted(["config.json", "generation_config.json", *TOKENIZER]))
    assert weights == ("model.safetensors",)


def test_code_is_taken_only_where_it_is_trusted() -> None:
    names = ["config.json", "model.safetensors", "modeling_own.py"]
    assert "modeling_own.py" not in chosen(names)[0]
    assert "modeling_own.py" in chosen(names, trust_remote_code=True)[0]


def test_the_index_says_which_weight_files_count() -> None:
    names = ["config.json", INDEX, *SHARDS, "consolidated.safetensors", "model.safetensors"]
    files, weights = chosen(names, index_of(*SHARDS, SHARDS[0]))
    assert weights == tuple(SHARDS)
    assert INDEX in files


def test_a_weight_file_that_the_index_names_has_to_be_there() -> None:
    with pytest.raises(SpecError, match=rf"names {SHARDS[1]}, which is not there \(1 of 2 weight files"):
        chosen(["config.json", INDEX, SHARDS[0]], index_of(*SHARDS))


@pytest.mark.parametrize(
    "index",
    [
        b"not json", b"[" * 20_000, b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', index_of(3),
        index_of("pytorch_model.bin"), index_of("../x.safetensors"), index_of("/etc/x.safetensors"),
        index_of("..\\x.safetensors"),
    ],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(index: bytes) -> None:
    with pytest.raises(SpecError, match="is no index of safetensors files"):
        chosen(["config.json", INDEX, *SHARDS], index)


def test_a_folder_without_config_is_no_model() -> None:
    with pytest.raises(SpecError, match=r"/m holds no config.json"):
        chosen(["model.safetensors"])


@pytest.mark.parametrize(
    ("weights", "message", "next_step"),
    [
        (["pytorch_model.bin"], r"only as Python pickle \(pytorch_model.bin\)", "save_pretrained"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], "only as Python pickle", "safetensors"),
        (["model.pt"], "only as Python pickle", "safetensors"),
        (["consolidated.00.pth"], "only as Python pickle", "safetensors"),
        (["model.Q4.gguf"], "holds neither model.safetensors nor .*; it holds model.Q4.gguf", "Name one"),
        (["adapter_model.safetensors"], "; it holds adapter_model.safetensors", "These are an adapter's"),
        ([], "holds neither model.safetensors nor model.safetensors.index.json\\.", "model.safetensors"),
    ],
)
def test_a_folder_without_safetensors_says_what_to_do(weights: list[str], message: str, next_step: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        chosen(["config.json", *weights])
    assert next_step in caught.value.next_step


@pytest.mark.parametrize("config", [b"", b"[]", b"{}", b'{"model_type": 3}', b"\xff", b"[" * 20_000])
def test_a_config_that_is_none_is_refused(config: bytes) -> None:
    with pytest.raises(SpecError, match=r"/m/config.json is not a model's config"):
        require_plain_config(config, source="/m/config.json")


@pytest.mark.parametrize(
    ("quantised", "by"), [({"quant_method": "gptq"}, "gptq"), ("fp8", "fp8"), ({"a": 1}, "unknown")]
)
def test_quantised_weights_are_refused_by_the_methods_name(quantised: object, by: str) -> None:
    config = json.dumps({"model_type": "llama", "quantization_config": quantised}).encode()
    with pytest.raises(SpecError, match=f"weights quantised by {by}, which cannot be trained from"):
        require_plain_config(config, source="/m/config.json")


def test_a_plain_config_passes() -> None:
    require_plain_config(b'{"model_type": "llama", "quantization_config": null}', source="/m/config.json")
