"""The same samples for each contender of reader.py, in its own format, in one S3 server; and the peers' environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from orchestrator.dataset.format import DatasetManifest, Shard, Split, Tokenizer
from orchestrator.store import Store, layout
from tests.bench.harness import say
from tests.bench.reader_pass import NUM_SAMPLES, ROW_TOKENS, SEQUENCE_LENGTH, SHARD_BYTES
from tests.bench.server import upload_directory

VOCABULARY = 50_000
NAME, FINGERPRINT = "bench", "0123456789abcdef"
REFERENCE = f"{NAME}@{FINGERPRINT}"
_REQUIREMENTS = Path(__file__).with_name("peers.txt")


def make_peers_python(directory: Path) -> str:
    """An environment of the packages in peers.txt, and its interpreter. Everything else, torch above all, it has from
    this one, which comes behind its own packages on the path."""
    uv = str(Path(sys.executable).with_name("uv"))
    python = directory / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(directory)], check=True)
    install = ("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--compile-bytecode")
    subprocess.run([uv, *install, "-r", str(_REQUIREMENTS)], check=True)
    packages = next(directory.glob("lib/python*/site-packages"))
    (packages / "headway.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


def make_samples() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Random tokens, and their samples, shape (NUM_SAMPLES, ROW_TOKENS), which are a view of them."""
    num_tokens = NUM_SAMPLES * SEQUENCE_LENGTH + 1
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, num_tokens, dtype=np.uint16)
    return tokens, np.lib.stride_tricks.sliding_window_view(tokens, ROW_TOKENS)[::SEQUENCE_LENGTH]


def write_headway(store: Store, tokens: npt.NDArray[np.uint16]) -> None:
    """A prepared dataset ``REFERENCE`` of these tokens."""
    prefix = layout.dataset(NAME, FINGERPRINT)
    per_shard = SHARD_BYTES // 2
    shards = []
    for number, start in enumerate(range(0, len(tokens), per_shard)):
        shard, data = Shard.of(f"train-{number:05d}.bin", tokens[start : start + per_shard])
        store.create(prefix + shard.file, data)
        shards.append(shard)
    manifest = DatasetManifest(
        name=NAME,
        fingerprint=FINGERPRINT,
        dtype="uint16",
        tokenizer=Tokenizer(
            file="tokenizer.json", sha256="0" * 64, size_bytes=1, vocab_size=VOCABULARY, end_of_text_id=0
        ),
        train=Split(shards=tuple(shards), num_tokens=len(tokens), num_bytes=1, num_files=1),
        eval=Split(shards=(), num_tokens=0, num_bytes=0, num_files=0),
        unigram_loss=1.0,
        source={},
        created_s=time.time(),
    )
    store.create(layout.dataset_manifest(NAME, FINGERPRINT), manifest.model_dump_json().encode())


def write_peer(program: str, prefix: str, python: str, samples: npt.NDArray[np.uint16], scratch: Path) -> None:
    """What ``program`` makes of the samples, under ``prefix`` (with its slash) of the bucket."""
    file, directory = scratch / "samples.npy", scratch / prefix
    if not file.exists():
        np.save(file, samples)
    directory.mkdir()
    command = [python, "-W", "ignore", "-m", f"tests.bench.{program}", "write", str(file), str(directory)]
    environment = os.environ | {"HOME": str(scratch)}  # litdata and Ray leave files there
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    num_bytes = upload_directory(directory, prefix)
    say(f"{program}: {num_bytes / 1e6:.0f} MB written")
