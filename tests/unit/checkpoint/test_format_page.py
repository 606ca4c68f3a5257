"""docs/checkpoint-format.md is enough to read a checkpoint: it names every field, and a reader by its rules works."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.format import KINDS, Manifest, State
from tests.unit.checkpoint.adapters import TENSORS, base_values, make_base, save_adapter
from tests.unit.checkpoint.saving import RUN, flip, new_group, save
from tests.unit.checkpoint.states import random_values
from tests.unit.fakes import MemoryStore

PAGE = (Path(__file__).parents[3] / "docs" / "checkpoint-format.md").read_text()
SHAPES: dict[str, tuple[int, ...]] = {"w": (301, 207), "bias": (5,)}
"""``w`` takes several blocks in each of three files, and ends within one."""


class Damaged(Exception):
    pass


def read_parameter(store: MemoryStore, folder: str, name: str, kind: str) -> list[float]:
    """All elements of a trained parameter, by the page's rules alone: nothing of Headway's reader is used."""
    manifest = read_manifest(store, folder)
    found: dict[int, float] = {}
    for fragment in manifest["parameters"][name]["fragments"]:
        file = manifest["files"][fragment["file"]]
        data = read_range(store, folder, file, fragment["offsets"][kind], 4 * fragment["length"])
        values = struct.unpack(f"<{fragment['length']}f", data)
        found.update(zip(range(fragment["start"], fragment["start"] + fragment["length"]), values, strict=True))
    return [found[element] for element in range(len(found))]


def read_manifest(store: MemoryStore, folder: str) -> dict[str, Any]:
    data = store.get(f"{folder}manifest.json")
    body = data[:-77] + b"}"
    if data[-77:] != b',"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'"}':
        raise Damaged("seal")
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def read_range(store: MemoryStore, folder: str, file: dict[str, Any], start: int, num_bytes: int) -> bytes:
    """Whole blocks around the range, each compared with its digest; of them, the range."""
    index = store.get(folder + file["index_key"])
    if hashlib.sha256(index).hexdigest() != file["index_sha256"]:
        raise Damaged("index")
    data = store.get(folder + file["key"])
    first = start // 65536
    blocks = [data[at : at + 65536] for at in range(first * 65536, min(start + num_bytes, len(data)), 65536)]
    for number, block in enumerate(blocks, first):
        if hashlib.sha256(block).digest() != index[32 * number : 32 * number + 32]:
            raise Damaged(f"block {number}")
    return b"".join(blocks)[start - first * 65536 :][:num_bytes]


@pytest.fixture
def folder(memory_store: MemoryStore) -> str:
    """The one committed checkpoint's, of three ranks."""
    values = random_values(SHAPES)
    assert save(memory_store, new_group(memory_store), 7, values=values, world_size=3, shapes=SHAPES) == [None] * 3
    (key,) = (key for key in memory_store.objects if key.endswith("manifest.json"))
    assert re.fullmatch(rf"runs/{RUN}/checkpoints/step-00000007/00001-00001-[^/]+/manifest\.json", key)
    return key.removesuffix("manifest.json")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_reader_by_the_page_gets_the_right_values(
    memory_store: MemoryStore, folder: str, name: str, kind: str
) -> None:
    assert read_parameter(memory_store, folder, name, kind) == random_values(SHAPES)[name][kind].tolist()


def read_base_tensor(store: MemoryStore, folder: str, name: str) -> tuple[str, bytes]:
    """The stored dtype and bytes of a frozen parameter that the pretrained weights hold, by the page's rules alone."""
    manifest = read_manifest(store, folder)
    base = read_manifest(store, f"bases/{manifest['base']['fingerprint']}/")
    digests = {name: file["sha256"] for part in ("files", "weights") for name, file in base[part].items()}
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != manifest["base"]["digest"]:
        raise Damaged("digest")
    tensor = base["tensors"][manifest["frozen"][name]["base"]]
    assert tensor["shape"] == manifest["frozen"][name]["shape"]
    file = {"key": tensor["file"], **base["weights"][tensor["file"]]}
    size = {"F32": 4, "BF16": 2}[tensor["dtype"]] * math.prod(tensor["shape"])
    return tensor["dtype"], read_range(store, base["prefix"], file, tensor["offset"], size)


def test_a_reader_by_the_page_finds_what_a_checkpoint_leaves_to_the_base(
    memory_store: MemoryStore, tmp_path: Path
) -> None:
    base = make_base(memory_store, tmp_path / "base", base_values())
    save_adapter(memory_store, base)
    (key,) = (key for key in memory_store.objects if re.match(r"runs/.*/manifest\.json$", key))
    folder = key.removesuffix("manifest.json")
    for name, tensor in TENSORS.items():
        dtype, data = read_base_tensor(memory_store, folder, name)
        found = torch.frombuffer(bytearray(data), dtype={"F32": torch.float32, "BF16": torch.bfloat16}[dtype])
        assert torch.equal(found, base_values()[tensor].view(-1)), name
    flip(memory_store, f"{base.prefix}model.safetensors", 300_000)
    with pytest.raises(Damaged, match="block 4"):
        read_base_tensor(memory_store, folder, next(iter(TENSORS)))


@pytest.mark.parametrize("what", ["manifest.json", "rank-00001.index", "rank-00001.safetensors"])
def test_a_reader_by_the_page_sees_damage(memory_store: MemoryStore, folder: str, what: str) -> None:
    flip(memory_store, folder + what, 100_000 if what.endswith("safetensors") else 40)
    with pytest.raises(Damaged):
        read_parameter(memory_store, folder, "w", "exp_avg")


def test_the_files_headers_say_what_the_manifest_says(memory_store: MemoryStore, folder: str) -> None:
    manifest = read_manifest(memory_store, folder)
    for name, parameter in manifest["parameters"].items():
        for fragment in parameter["fragments"]:
            data = memory_store.get(folder + manifest["files"][fragment["file"]]["key"])
            (header_bytes,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + header_bytes])
            for kind in KINDS:
                start = fragment["offsets"][kind] - 8 - header_bytes
                assert header[f"{kind}/{name}"] == {
                    "dtype": "F32",
                    "shape": [fragment["length"]],
                    "data_offsets": [start, start + 4 * fragment["length"]],
                }


def test_the_page_names_every_field_of_the_manifest() -> None:
    section = PAGE.partition("## The manifest")[2].partition("\n## ")[0]
    named = [name for cell in re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE) for name in cell.split(", ")]
    assert sorted(named) == sorted(f"`{field}`" for field in Manifest.model_fields)
    assert "its last field is `sha256`" in section


def test_the_page_names_every_field_of_the_state() -> None:
    (paragraph,) = re.findall(r"^`state`: (.+?)\n\n", PAGE, flags=re.MULTILINE | re.DOTALL)
    explained = re.sub(r"\([^()]*\)", "", paragraph)
    assert sorted(re.findall(r"`(\w+)`", explained)) == sorted(State.model_fields)
