"""``headway verify`` of a dataset: every shard piece by piece, the tokenizer, and the parts that it was made of.

Memory holds one piece for each of the files that are read at once, whatever the size of the dataset.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orchestrator.dataset.format import PIECE_BYTES, DatasetManifest
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.reporter import Reporter, Result
from orchestrator.store import Store, layout

_FILES_AT_ONCE = 8
_TELL_EVERY_S = 10.0
_NEXT_STEP = "Delete the dataset's folder and prepare it anew from its source: headway prepare"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A file as the manifest records it."""

    name: str
    key: str
    size_bytes: int
    sha256: str = ""
    """Of the whole file; empty where its pieces have digests."""
    piece_bytes: int = PIECE_BYTES
    pieces: tuple[str, ...] = ()


def recorded_files(manifest: DatasetManifest) -> list[Recorded]:
    """Everything that belongs to a dataset but its manifest. Pure."""
    prefix = layout.dataset(manifest.name, manifest.fingerprint)
    tokenizer = manifest.tokenizer
    whole = {tokenizer.file: (tokenizer.size_bytes, tokenizer.sha256)}
    whole |= {name: (file.size_bytes, file.sha256) for name, file in tokenizer.files.items()}
    if manifest.lineage is not None:
        whole |= {part.file: (part.size_bytes, part.sha256) for part in manifest.lineage.parts}
    return [
        *(
            Recorded(name=name, key=prefix + name, size_bytes=size_bytes, sha256=sha256)
            for name, (size_bytes, sha256) in whole.items()
        ),
        *(
            Recorded(
                name=shard.file,
                key=prefix + shard.file,
                size_bytes=shard.size_bytes,
                piece_bytes=manifest.piece_bytes,
                pieces=shard.pieces,
            )
            for split in (manifest.train, manifest.eval)
            for shard in split.shards
        ),
    ]


def verify_dataset(store: Store, manifest: DatasetManifest, reporter: Reporter) -> Result:
    """Read every byte of a dataset and check it against the manifest.

    Raises:
        IntegrityError: after everything was read, if anything is damaged.
    """
    reference = f"{manifest.name}@{manifest.fingerprint}"
    files = recorded_files(manifest)
    damaged: dict[str, list[str]] = {}
    verified: dict[str, int] = {}
    told_s = time.monotonic()
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="verify") as pool:
        for file, faults in zip(files, pool.map(lambda file: list(faults_of(store, file)), files), strict=True):
            if faults:
                damaged[file.name] = faults
            else:
                verified[file.name] = file.size_bytes
            for fault in faults:
                reporter.say(f"{reference}/{file.name}: damaged: {fault}")
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                reporter.say(f"{len(verified) + len(damaged)} of {len(files)} files read")
    if damaged:
        error = IntegrityError(
            f"{len(damaged)} of the {len(files)} files of {reference} are damaged: {', '.join(damaged)}.",
            next_step=_NEXT_STEP,
        )
        error.facts = {"dataset": reference, "damaged": damaged}
        raise error
    num_bytes = sum(verified.values())
    facts = {"dataset": reference, "verified": verified}
    return facts, f"{reference}: all {len(files)} files verified, {num_bytes / 1e6:,.1f} MB read."


def faults_of(store: Store, file: Recorded) -> Iterator[str]:
    """What is wrong with a file, a sentence each."""
    size_bytes = next((item.size_bytes for item in store.list(file.key) if item.key == file.key), None)
    if size_bytes is None:
        yield "it is missing"
        return
    if size_bytes != file.size_bytes:
        grew = "larger" if size_bytes > file.size_bytes else "smaller"
        yield f"it is {grew} than recorded: {size_bytes} bytes, not {file.size_bytes}"
    try:
        yield from _faults_of_bytes(store, file)
    except NotFound:
        yield "it was deleted while it was read"


def _faults_of_bytes(store: Store, file: Recorded) -> Iterator[str]:
    digest = hashlib.sha256()
    num_pieces = -(-file.size_bytes // file.piece_bytes)
    for number in range(num_pieces):
        start = number * file.piece_bytes
        length = min(file.piece_bytes, file.size_bytes - start)
        data = store.get_range(file.key, start, length)
        if len(data) < length:
            yield f"it ends in piece {number} of {num_pieces}, {start + len(data)} bytes from its start"
            return
        if file.sha256:
            digest.update(data)
        elif hashlib.sha256(data).hexdigest() != file.pieces[number]:
            yield f"piece {number} (bytes {start} to {start + length - 1}) does not match its digest"
    if file.sha256 and digest.hexdigest() != file.sha256:
        yield "it does not match its digest"
