"""Counting parameters: in a child process with the real transformers, from the cache, and from safetensors headers."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import sizing
from orchestrator.errors import IntegrityError, SpecError, TimedOut
from orchestrator.memory import ModelSize
from orchestrator.sizing import AUTO_CLASSES, count_parameters, from_safetensors_header, header_bytes
from orchestrator.spec import LoraSpec

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCAB = 300
NO_PYTHON = "/nonexistent/python"  # a child that cannot start: only the cache can answer


def _count(architecture: dict[str, Any], cache: Path, **fields: Any) -> sizing.Sizing:
    fields = {"vocab_size": VOCAB, "auto_class": AUTO_CLASSES["causal-lm"], **fields}
    return count_parameters(architecture, cache=cache, **fields)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSize]:
    pytest.importorskip("transformers")
    cache = tmp_path_factory.mktemp("cache")
    found = _count(LLAMA, cache)
    assert found.size is not None, found.reason
    return cache, found.size


def test_a_llama_is_counted_as_by_hand(counted: tuple[Path, ModelSize]) -> None:
    attention = 32 * 32 * 2 + 32 * 16 * 2  # query and output; key and value of 2 heads of 8
    layer = attention + 3 * 32 * 48 + 2 * 32
    total = 2 * VOCAB * 32 + 2 * layer + 32
    assert counted[1] == ModelSize(
        num_parameters=total,
        num_trainable=total,
        largest_parameter=VOCAB * 32,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
    )


def test_a_llama_is_counted_as_transformers_builds_it(counted: tuple[Path, ModelSize]) -> None:
    program = (
        "import json, sys, transformers as t; a = json.loads(sys.argv[1]); kind = a.pop('model_type');"
        "m = t.AutoModelForCausalLM.from_config(t.AutoConfig.for_model(kind, **a));"
        "print(sum(p.numel() for p in m.parameters()))"
    )
    request = json.dumps({**LLAMA, "vocab_size": VOCAB})
    done = subprocess.run([sys.executable, "-c", program, request], capture_output=True, text=True, check=True)
    assert counted[1].num_parameters == int(done.stdout)


def test_adapters_count_as_trainable_and_the_rest_as_frozen(counted: tuple[Path, ModelSize], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    size = _count(LLAMA, tmp_path, is_pretrained=True, lora=LoraSpec(rank=4)).size
    assert size is not None
    attention = 2 * (32 + 32) + 2 * (32 + 16)  # inputs + outputs of query, output, key and value
    adapters = 2 * 4 * (attention + 3 * (32 + 48))
    assert size.num_trainable == adapters
    assert size.num_parameters == counted[1].num_parameters + adapters
    one = _count(LLAMA, tmp_path, is_pretrained=True, lora=LoraSpec(rank=4, target_modules=("q_proj",))).size
    assert one is not None
    assert one.num_trainable == 2 * 4 * (32 + 32)


def test_an_adapter_for_other_modules_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(SpecError, match=r"model\.lora is refused: Target modules .*c_attn.* not found"):
        _count(LLAMA, tmp_path, is_pretrained=True, lora=LoraSpec(target_modules=("c_attn",)))


def test_a_config_json_may_hold_what_its_class_passes_over(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    written = {"architectures": ["LlamaForCausalLM"], "transformers_version": "5.0", "vocab_size": 320, "own": 1}
    size = _count({**LLAMA, **written}, tmp_path, is_pretrained=True).size
    assert size is not None
    assert size.vocab_size == 320
    with pytest.raises(SpecError, match=r"model\.pretrained: its config\.json is refused: .* no architecture 'own'"):
        _count({"model_type": "own"}, tmp_path, is_pretrained=True)


def test_a_classifier_has_no_logits_over_the_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = _count(bert, tmp_path, auto_class=AUTO_CLASSES["sequence-classification"]).size
    assert size is not None
    assert (size.hidden_size, size.num_layers, size.vocab_size) == (32, 2, None)


def test_the_second_count_comes_from_the_cache_at_once(counted: tuple[Path, ModelSize]) -> None:
    cache, size = counted
    took_s = []
    for _ in range(20):  # the quickest counts: another program may have had the CPU meanwhile
        start_s = time.perf_counter()
        found = _count(LLAMA, cache, python=NO_PYTHON)
        took_s.append(time.perf_counter() - start_s)
        assert found.size == size
    assert min(took_s) <= 0.05


@pytest.mark.parametrize("fields", [{"vocab_size": 301}, {"auto_class": "AutoModelForMaskedLM"}])
def test_another_question_is_not_answered_from_the_cache(
    counted: tuple[Path, ModelSize], fields: dict[str, Any]
) -> None:
    found = _count(LLAMA, counted[0], python=NO_PYTHON, **fields)
    assert found.size is None
    assert "could not start" in found.reason


def test_a_vocabulary_of_the_architecture_wins_over_the_tokenizers(counted: tuple[Path, ModelSize]) -> None:
    found = _count({**LLAMA, "vocab_size": VOCAB}, counted[0], vocab_size=9999, python=NO_PYTHON)
    assert found.size == counted[1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"num_parameters": -1}', b"\xff"])
def test_a_corrupt_cache_is_counted_again(counted: tuple[Path, ModelSize], tmp_path: Path, content: bytes) -> None:
    (file,) = (counted[0] / "sizes").iterdir()
    spoiled = tmp_path / "sizes" / file.name
    spoiled.parent.mkdir()
    spoiled.write_bytes(content)
    assert "could not start" in _count(LLAMA, tmp_path, python=NO_PYTHON).reason


def test_a_recount_mends_the_cache_and_leaves_nothing_beside_it(counted: tuple[Path, ModelSize]) -> None:
    (file,) = (counted[0] / "sizes").iterdir()
    file.write_bytes(b"{")
    assert _count(LLAMA, counted[0]).size == counted[1]
    assert ModelSize.model_validate_json(file.read_bytes()) == counted[1]
    assert list(file.parent.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_does_no_harm(counted: tuple[Path, ModelSize], tmp_path: Path) -> None:
    (tmp_path / "sizes").write_text("a file where the folder should be")
    sizing._write(tmp_path / "sizes" / "x.json", counted[1])
    assert (tmp_path / "sizes").read_text().startswith("a file")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "lama"}, r'model_type: "lama" is refused: transformers .* no such architecture; did you mean'),
        ({"hiden_size": 64}, r"hiden_size: 64 is refused: a llama config has no such field; did you mean hidden_size"),
        ({"hidden_size": 30}, r"hidden size \(30\) is not a multiple of the number of attention heads \(4\)"),
        ({"hidden_size": "big"}, r"'hidden_size' expected int, got str"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "sharp"}, "sharp"),
        ({"model_type": "vit"}, "model.architecture"),
    ],
)
def test_what_transformers_refuses_is_said_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SpecError, match=said) as caught:
        _count({**LLAMA, **change}, tmp_path)
    assert caught.value.message.startswith("model.architecture")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "sizes").exists()


def test_names_that_transformers_still_understands_are_no_misspellings(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "num_attention_heads": 4, "torch_dtype": "float32"}
    size = _count(gpt2, tmp_path).size
    assert size is not None
    assert (size.hidden_size, size.num_layers, size.num_attention_heads) == (32, 1, 4)


def test_a_count_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(TimedOut, match=r"over 0\.05 s"):
        _count(LLAMA, tmp_path, timeout_s=0.05)


def test_a_child_that_breaks_is_a_reason_and_no_traceback(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'Traceback' >&2\necho 'ImportError: libcudart.so' >&2\nexit 1\n")
    broken.chmod(0o755)
    reason = _count(LLAMA, tmp_path, python=str(broken)).reason
    assert reason == "counting the parameters failed with exit code 1: ImportError: libcudart.so"


def test_the_users_folder_does_not_shadow_what_the_child_imports(tmp_path: Path) -> None:
    """A directory with a torch.py and an orchestrator/ of its own is where people work."""
    pytest.importorskip("transformers")
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "orchestrator").mkdir()
    request = {"architecture": {**LLAMA, "vocab_size": VOCAB}, "auto_class": "AutoModelForCausalLM"}
    done = subprocess.run(
        [sys.executable, "-P", sizing._CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert json.loads(done.stdout.splitlines()[-1])["hidden_size"] == 32


def test_without_torch_and_transformers_the_reason_says_what_to_install(tmp_path: Path) -> None:
    """As in an installation of the base package: site-packages has only what it needs."""
    program = (
        "import importlib.util as u, json; find = u.find_spec;"
        "u.find_spec = lambda name: None if name in ('torch', 'transformers') else find(name);"
        "from orchestrator.sizing import count_parameters;"
        "print(count_parameters({'model_type': 'llama'}, vocab_size=300, auto_class='AutoModelForCausalLM').reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = "counting the parameters of 'llama' needs torch and transformers: pip install 'headway[train]'"
    assert done.stdout.strip() == expected


# --- safetensors headers


def _header(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def _tensor(shape: list[int], dtype: str = "F32", size: int = 4, start: int = 0) -> dict[str, Any]:
    count = 1
    for number in shape:
        count *= number
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + count * size]}


def test_headers_of_all_files_add_up() -> None:
    first = _header({"__metadata__": {"format": "pt"}, "a": _tensor([10, 4]), "scalar": _tensor([], start=160)})
    second = _header({"b": _tensor([7], "BF16", 2)})
    size = from_safetensors_header(first + b"data", second, config={"n_embd": 4, "num_hidden_layers": 3})
    assert (size.num_parameters, size.num_trainable, size.largest_parameter) == (48, 48, 40)
    assert (size.hidden_size, size.num_layers, size.vocab_size) == (4, 3, None)


def test_what_safetensors_writes_is_read() -> None:
    numpy = pytest.importorskip("numpy")
    save = pytest.importorskip("safetensors.numpy").save
    written = save({"w": numpy.zeros((3, 5), dtype="float16"), "b": numpy.zeros(3, dtype="float64")})
    assert from_safetensors_header(written).num_parameters == 18
    assert from_safetensors_header(written[: header_bytes(written[:8])]).num_parameters == 18


def test_a_header_above_the_formats_limit_is_refused_before_it_is_read() -> None:
    assert header_bytes(struct.pack("<Q", 100_000_000)) == 100_000_008
    with pytest.raises(IntegrityError, match="100,000,001 bytes is above the format's 100,000,000"):
        header_bytes(struct.pack("<Q", 100_000_001))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"", "starts with 8 bytes"),
        (b"1234567", "there are 7"),
        (struct.pack("<Q", 100) + b"{}", "cut off"),
        (struct.pack("<Q", 2) + b"[]", "cannot be read"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "cannot be read"),
        (_header({"a": 3}), "cannot be read"),
        (_header({"a": {"dtype": "F32"}}), "cannot be read"),
        (_header({"a": _tensor([2], "F32", 2)}), "not F32 of shape"),
        (_header({"a": _tensor([2], "X9")}), "not X9 of shape"),
        (_header({"a": _tensor([-2, -2])}), "natural number"),
        (_header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}), "natural number"),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}), "cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(head: bytes, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        from_safetensors_header(head)


def test_a_tensor_in_two_files_is_refused() -> None:
    head = _header({"a": _tensor([2])})
    with pytest.raises(IntegrityError, match="'a' is in two"):
        from_safetensors_header(head, head)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_no_bytes_raise_anything_else(length: bytes, rest: bytes) -> None:
    for head in (length, struct.pack("<Q", len(rest)) + rest):
        try:
            from_safetensors_header(head)
        except IntegrityError:
            continue
