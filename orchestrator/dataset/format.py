"""A prepared dataset: ``datasets/<name>/<fingerprint>/manifest.json`` and the shards that it lists.

A shard is a flat little-endian array; a split is its shards one after the other. Of a stream it holds token ids, and
sample ``i`` of length L is tokens ``[i·L, i·L + L]``, so that every token but the first is predicted once. Of
conversations and of labelled texts it holds rows of equal length, as :mod:`orchestrator.dataset.rows` says.

A shard is read in pieces of ``piece_bytes``, the last of them shorter, and the manifest holds the digest of each.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from orchestrator.errors import IntegrityError, NotFound, SpecError
from orchestrator.spec import DataSpec, SampleKind, canonical_json
from orchestrator.store import layout
from orchestrator.store.s3 import Store

FORMAT: Literal["headway/dataset/2"] = "headway/dataset/2"
PIECE_BYTES = 4 * 2**20
PREPARE_VERSION = 2  # raise it when the same source would give other tokens
RECORDS_VERSION = 2  # the same for conversations and labelled texts


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Frozen):
    file: str
    num_tokens: int
    size_bytes: int
    pieces: tuple[str, ...]
    """SHA-256 of each ``piece_bytes`` of the shard."""

    @classmethod
    def of(cls, file: str, entries: npt.NDArray[Any], *, piece_bytes: int = PIECE_BYTES) -> tuple[Shard, bytes]:
        """A shard of these entries, and its bytes."""
        data = entries.astype(entries.dtype.newbyteorder("<"), copy=False).tobytes()
        view = memoryview(data)
        pieces = (
            hashlib.sha256(view[start : start + piece_bytes]).hexdigest() for start in range(0, len(data), piece_bytes)
        )
        return cls(file=file, num_tokens=len(entries), size_bytes=len(data), pieces=tuple(pieces)), data


class Split(_Frozen):
    shards: tuple[Shard, ...]
    num_tokens: int
    num_bytes: int
    """Bytes of text that the targets stand for, without the end-of-text marks of a stream; for bits per byte."""
    num_files: int
    num_targets: int | None = None
    """Targets of conversations (tokens) or of labelled texts (one each); null for a stream: as many as tokens."""

    @property
    def targets_per_byte(self) -> float:
        """Times bits per target, this is bits per byte."""
        return (self.num_tokens if self.num_targets is None else self.num_targets) / max(1, self.num_bytes)


class TokenizerFile(_Frozen):
    sha256: str
    size_bytes: int


class Tokenizer(_Frozen):
    file: str
    sha256: str
    size_bytes: int
    vocab_size: int
    """Ids are below it: the tokenizer's length, added tokens included."""
    end_of_text_id: int
    pad_token_id: int | None = None
    """What fills up rows; null where it is ``end_of_text_id``."""
    files: dict[str, TokenizerFile] = {}
    """What lies beside ``file``, by name: a pretrained tokenizer's config and chat template."""

    @property
    def pad_id(self) -> int:
        return self.end_of_text_id if self.pad_token_id is None else self.pad_token_id


class PartFile(_Frozen):
    """A part of the source as it was prepared, ``parts/00012.json``; what it holds says workloads/prepare/parts.py."""

    file: str
    sha256: str
    size_bytes: int
    key: str
    """Digest of all that the part's samples depend on: equal keys mean equal shards."""


class Lineage(_Frozen):
    """Where a dataset comes from."""

    code_version: str
    """Of Headway, when it was prepared."""
    settings: str
    """Digest of all that the tokens depend on but for the files and the tokenizer."""
    parts: tuple[PartFile, ...]
    """What each came from, file by file with its ETag."""
    reused: str | None = None
    """The fingerprint of the earlier preparation whose samples of unchanged files were taken."""


class DatasetManifest(_Frozen):
    format: Literal["headway/dataset/2"] = FORMAT
    name: str
    fingerprint: str
    dtype: Literal["uint16", "uint32"]
    piece_bytes: int = PIECE_BYTES
    tokenizer: Tokenizer
    train: Split
    eval: Split
    unigram_loss: float
    """Nats per target of the held-out split under the training split's frequencies of targets (add one)."""
    source: dict[str, Any]
    created_s: float
    kind: SampleKind = "stream"
    row_tokens: int | None = None
    """Entries of one row, for conversations and labelled texts: ``sequence_length + 1``."""
    classes: tuple[str, ...] = ()
    """Of labelled texts, by the number that stands in the rows."""
    counts: dict[str, int] = {}
    """What became of the source's records, by ``<split>.<what>``, and ``skipped_<reason>`` for those that were not
    even read far enough to belong to a split."""
    lineage: Lineage | None = None

    @model_validator(mode="after")
    def _rows_agree(self) -> DatasetManifest:
        if (self.kind == "stream") != (self.row_tokens is None) or (self.row_tokens or 2) < 2:
            raise ValueError(f"row_tokens {self.row_tokens} is not that of {self.kind} samples")
        if (self.kind == "labelled") != bool(self.classes):
            raise ValueError(f"{len(self.classes)} classes are not those of {self.kind} samples")
        if self.row_tokens is not None and self.dtype != "uint32":
            raise ValueError(f"rows of dtype {self.dtype}; they are uint32")
        for split in (self.train, self.eval):
            for shard in split.shards:
                if self.row_tokens is not None and shard.num_tokens % self.row_tokens:
                    raise ValueError(f"{shard.file}: {shard.num_tokens} entries are no rows of {self.row_tokens}")
        return self

    @model_validator(mode="after")
    def _counts_agree(self) -> DatasetManifest:
        token_bytes = 2 if self.dtype == "uint16" else 4
        for split in (self.train, self.eval):
            if split.num_tokens != sum(shard.num_tokens for shard in split.shards):
                raise ValueError(f"{split.num_tokens} tokens are not those of its shards")
            for shard in split.shards:
                if shard.num_tokens < 1 or shard.size_bytes != token_bytes * shard.num_tokens:
                    raise ValueError(f"{shard.file}: {shard.num_tokens} tokens do not take {shard.size_bytes} bytes")
                if self.piece_bytes < 1 or len(shard.pieces) != -(-shard.size_bytes // self.piece_bytes):
                    raise ValueError(f"{shard.file}: {len(shard.pieces)} digests are not those of its pieces")
        return self

    def num_samples(self, split: Split, sequence_length: int) -> int:
        """Raises SpecError where the rows were made for another sequence_length."""
        if self.row_tokens is None:
            return max(0, (split.num_tokens - 1) // sequence_length)
        self.require_length(sequence_length)
        return split.num_tokens // self.row_tokens

    def require_length(self, sequence_length: int) -> None:
        """Refuse a sequence_length that the samples cannot have.

        Raises:
            SpecError: they are rows of another length.
        """
        if self.row_tokens is not None and self.row_tokens != sequence_length + 1:
            raise SpecError(
                f"data.sequence_length: {sequence_length} is not that of {self.name}@{self.fingerprint}, "
                f"whose rows were made for {self.row_tokens - 1}.",
                next_step=f"Set data.sequence_length {self.row_tokens - 1}, or give data.train to prepare it anew.",
            )


def fingerprint(data: DataSpec, listing: list[tuple[str, str, int]], tokenizer_fingerprint: str = "") -> str:
    """16 hex digits of everything that the tokens depend on.

    Args:
        listing: (path relative to the source, ETag or content digest, bytes), sorted.
        tokenizer_fingerprint: of the tokenizer that is given, or the pretrained model's; empty where one is trained.
    """
    facts = {
        **settings(data),
        "vocab_size": data.vocab_size if not tokenizer_fingerprint else 0,
        "files": listing,
        "tokenizer": tokenizer_fingerprint,
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def settings(data: DataSpec) -> dict[str, Any]:
    """What the samples depend on besides the files and the tokenizer."""
    facts: dict[str, Any] = {
        "prepare": PREPARE_VERSION,
        "format": data.format,
        "text_field": data.text_field if data.format in ("jsonl", "parquet") else "",
        "eval_fraction": data.eval_fraction,
    }
    if data.kind != "packed":
        facts["clean"] = data.clean
    if data.kind != "stream":
        facts |= {
            "records": RECORDS_VERSION,
            "kind": data.kind,
            "label_field": data.label_field or "",
            "sequence_length": data.sequence_length,
            "long_samples": data.long_samples,
        }
    return facts


def is_held_out(what: str, eval_fraction: float) -> bool:
    """Whether a file, by its path, or a record, by its text, belongs to the held-out split.

    It is a stable hash of that alone, not of its neighbours, so that equal records are on one side.
    """
    digest = hashlib.sha256(what.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < eval_fraction * 2**64


def read_manifest(store: Store, name: str, fingerprint_: str) -> DatasetManifest:
    """The manifest of a committed dataset.

    Raises:
        NotFound: not prepared. IntegrityError: not a manifest that this version reads.
    """
    key = layout.dataset_manifest(name, fingerprint_)
    document = store.get_json(key)
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise IntegrityError(
            f"{store.uri_of(key)} has the format {found!r}; this version of Headway reads {FORMAT!r}.",
            next_step="Prepare the data anew from its source: headway prepare",
        )
    try:
        return DatasetManifest.model_validate(document)
    except ValidationError as e:
        raise IntegrityError(f"{store.uri_of(key)} is not a {FORMAT} manifest: {e.errors()[0]['msg']}.") from e


def find_dataset(store: Store, reference: str) -> DatasetManifest:
    """The dataset that ``NAME`` or ``NAME@FINGERPRINT`` means; of several preparations the newest.

    Raises:
        SpecError: there is none. IntegrityError: there are some, of which this version can read none.
    """
    name, _, wanted = reference.partition("@")
    if wanted:
        candidates = [wanted]
    else:
        candidates = list(store.list_folders(layout.datasets(name)))
    found: list[DatasetManifest] = []
    unread: IntegrityError | None = None
    for candidate in candidates:
        try:
            found.append(read_manifest(store, name, candidate))
        except NotFound:
            continue
        except IntegrityError as e:  # of an older version of Headway, say: it hides no other preparation
            unread = e
    if not found and unread is not None:
        raise unread
    if not found:
        raise SpecError(
            f"data.dataset: there is no prepared dataset {reference!r} in {store.uri}.",
            next_step="See headway list datasets, or give data.train a source to prepare.",
        )
    return max(found, key=lambda manifest: manifest.created_s)
