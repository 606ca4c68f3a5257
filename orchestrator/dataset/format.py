"""A prepared dataset: ``datasets/<name>/<fingerprint>/manifest.json`` and the shards that it lists.

A shard is a flat little-endian array of token ids. The tokens of a split are its shards one after the other;
sample ``i`` of length L is tokens ``[i·L, i·L + L]``, so that every token but the first is predicted once.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrator.errors import IntegrityError, NotFound, SpecError
from orchestrator.spec import DataSpec, canonical_json
from orchestrator.store import layout
from orchestrator.store.s3 import Store

PREPARE_VERSION = 1  # raise it when the same source would give other tokens


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    file: str
    num_tokens: int
    size_bytes: int
    sha256: str


class Split(_Frozen):
    shards: tuple[Shard, ...]
    num_tokens: int
    num_bytes: int
    """Bytes of text that the tokens stand for, without the end-of-text marks; for bits per byte."""
    num_files: int


class Tokenizer(_Frozen):
    file: str
    sha256: str
    size_bytes: int
    vocab_size: int
    end_of_text_id: int


class DatasetManifest(_Frozen):
    format: Literal["headway/dataset/1"] = "headway/dataset/1"
    name: str
    fingerprint: str
    dtype: Literal["uint16", "uint32"]
    tokenizer: Tokenizer
    train: Split
    eval: Split
    unigram_loss: float
    """Nats per token of the held-out split under the training split's token frequencies (add one)."""
    source: dict[str, Any]
    created_s: float

    @model_validator(mode="after")
    def _counts_agree(self) -> DatasetManifest:
        token_bytes = 2 if self.dtype == "uint16" else 4
        for split in (self.train, self.eval):
            if split.num_tokens != sum(shard.num_tokens for shard in split.shards):
                raise ValueError(f"{split.num_tokens} tokens are not those of its shards")
            for shard in split.shards:
                if shard.num_tokens < 1 or shard.size_bytes != token_bytes * shard.num_tokens:
                    raise ValueError(f"{shard.file}: {shard.num_tokens} tokens do not take {shard.size_bytes} bytes")
        return self

    def num_samples(self, split: Split, sequence_length: int) -> int:
        return max(0, (split.num_tokens - 1) // sequence_length)


def fingerprint(data: DataSpec, listing: list[tuple[str, str, int]]) -> str:
    """16 hex digits of everything that the tokens depend on.

    Args:
        listing: (path relative to the source, ETag or content digest, bytes), sorted.
    """
    facts = {
        "prepare": PREPARE_VERSION,
        "format": data.format,
        "text_field": data.text_field if data.format != "text" else "",
        "vocab_size": data.vocab_size,
        "eval_fraction": data.eval_fraction,
        "files": listing,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def is_held_out(path: str, eval_fraction: float) -> bool:
    """Whether a file belongs to the held-out split: a stable hash of its path, not of its neighbours."""
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < eval_fraction * 2**64


def read_manifest(store: Store, name: str, fingerprint_: str) -> DatasetManifest:
    """The manifest of a committed dataset.

    Raises:
        NotFound: not prepared. IntegrityError: not a manifest that this version reads.
    """
    key = layout.dataset_manifest(name, fingerprint_)
    document = store.get_json(key)
    try:
        return DatasetManifest.model_validate(document)
    except ValidationError as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a headway/dataset/1 manifest: {e.errors()[0]['msg']}.") from e


def find_dataset(store: Store, reference: str) -> DatasetManifest:
    """The dataset that ``NAME`` or ``NAME@FINGERPRINT`` means; of several preparations the newest.

    Raises:
        SpecError: there is none.
    """
    name, _, wanted = reference.partition("@")
    if wanted:
        candidates = [wanted]
    else:
        candidates = list(store.list_folders(layout.datasets(name)))
    found = []
    for candidate in candidates:
        try:
            found.append(read_manifest(store, name, candidate))
        except NotFound:
            continue
    if not found:
        raise SpecError(
            f"data.dataset: there is no prepared dataset {reference!r} in {store.uri}.",
            next_step="See headway list datasets, or give data.train a source to prepare.",
        )
    return max(found, key=lambda manifest: manifest.created_s)
