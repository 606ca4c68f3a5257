"""Text, jsonl or parquet to token shards, through Ray Data: one part of the source per task, in a fixed cut.

The cut into parts depends on the source alone, so the same source gives the same shards at any parallelism.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np

from orchestrator.dataset.format import (
    DatasetManifest,
    Shard,
    Split,
    Tokenizer,
    is_held_out,
    read_manifest,
)
from orchestrator.dataset.source import SourceFile, read_source, source_fingerprint
from orchestrator.errors import AlreadyExists, NotFound, RunError
from orchestrator.spec import DataSpec
from orchestrator.store import Store, layout, open_store

logger = logging.getLogger(__name__)
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SAMPLE_BYTES = 32 * 2**20
_MIN_PART_BYTES, _MAX_PART_BYTES, _PARTS = 2**20, 128 * 2**20, 16
_READS = 16
_MAX_SKIPPED = 0.01  # share of the source's files


def prepare(data: DataSpec, name: str, files: list[SourceFile], store: Store) -> DatasetManifest:
    """The prepared dataset of this source; made where it does not exist yet.

    Raises:
        RunError: too much of the source is unreadable, or a split is empty.
    """
    wanted = source_fingerprint(data, files)
    try:
        return read_manifest(store, name, wanted)
    except NotFound:
        pass
    train_files = [file for file in files if not is_held_out(file.path, data.eval_fraction)]
    if not train_files or len(train_files) == len(files):
        raise RunError(
            f"data: of {len(files)} files {len(files) - len(train_files)} fall into the held-out split "
            f"(eval_fraction {data.eval_fraction}); both splits need at least one.",
            next_step="Use more files, or another data.eval_fraction.",
        )
    tokenizer_json = train_tokenizer(data, train_files, store)
    prefix = layout.dataset(name, wanted)
    store.create(f"{prefix}tokenizer.json", tokenizer_json)
    parts = tokenize_parts(data, files, store, prefix, tokenizer_json)
    manifest = assemble(data, name, wanted, files, parts, tokenizer_json)
    try:
        store.create_json(layout.dataset_manifest(name, wanted), manifest.model_dump(mode="json"))
    except AlreadyExists:  # prepared by someone else meanwhile: the same bytes under the same fingerprint
        return read_manifest(store, name, wanted)
    return manifest


def train_tokenizer(data: DataSpec, files: list[SourceFile], store: Store) -> bytes:
    """A byte-level BPE trained on a fixed sample of the training files, as tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    by_hash = sorted(files, key=lambda file: hashlib.sha256(file.path.encode("utf-8", "surrogatepass")).digest())
    sample: list[SourceFile] = []
    total = 0
    for file in by_hash:
        if sample and total + file.size_bytes > TOKENIZER_SAMPLE_BYTES:
            break
        sample.append(file)
        total += file.size_bytes
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for _, documents in _read_documents(data, sample, store) for text in documents or ())
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str()).encode()


def tokenize_parts(
    data: DataSpec, files: list[SourceFile], store: Store, prefix: str, tokenizer_json: bytes
) -> list[dict[str, Any]]:
    """Tokenise every part as a Ray Data task; each writes its own shards and tells what it wrote."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [
        {
            "part": number,
            "job": json.dumps(
                {
                    "files": [asdict(file) for file in part],
                    "data": data.model_dump(mode="json"),
                    "store": store.uri,
                    "prefix": prefix,
                }
            ),
        }
        for number, part in enumerate(cut(files))
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    done = dataset.map(_tokenize_row, fn_args=[tokenizer_json], num_cpus=1).take_all()
    return [json.loads(row["result"]) for row in sorted(done, key=lambda row: row["part"])]


def cut(files: list[SourceFile]) -> Iterator[list[SourceFile]]:
    """Files in order, in parts of about a sixteenth of the source and at most 128 MiB."""
    total = sum(file.size_bytes for file in files)
    limit = min(_MAX_PART_BYTES, max(_MIN_PART_BYTES, total // _PARTS))
    part: list[SourceFile] = []
    size = 0
    for file in files:
        part.append(file)
        size += file.size_bytes
        if size >= limit:
            yield part
            part, size = [], 0
    if part:
        yield part


def _tokenize_row(row: dict[str, Any], tokenizer_json: bytes) -> dict[str, Any]:
    job = json.loads(row["job"])
    result = tokenize_part(
        int(row["part"]),
        [SourceFile(**file) for file in job["files"]],
        DataSpec.model_validate(job["data"]),
        open_store(job["store"]),
        job["prefix"],
        tokenizer_json,
    )
    return {"part": row["part"], "result": json.dumps(result)}


def tokenize_part(
    number: int, files: list[SourceFile], data: DataSpec, store: Store, prefix: str, tokenizer_json: bytes
) -> dict[str, Any]:
    """One part of the source as one shard per split."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    dtype = _dtype(tokenizer.get_vocab_size())
    tokens: dict[str, list[Any]] = {"train": [], "eval": []}
    text_bytes, num_files = {"train": 0, "eval": 0}, {"train": 0, "eval": 0}
    skipped: list[str] = []
    for file, documents in _read_documents(data, files, store):
        if documents is None:
            skipped.append(file.path)
            continue
        split = "eval" if is_held_out(file.path, data.eval_fraction) else "train"
        num_files[split] += 1
        for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
            tokens[split].append(np.asarray([*encoding.ids, end_of_text], dtype=dtype))
        text_bytes[split] += sum(len(text.encode()) for text in documents)
    result: dict[str, Any] = {"skipped": skipped}
    for split, pieces in tokens.items():
        flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=dtype)
        shard = _upload_shard(store, prefix, f"{split}-{number:05d}.bin", flat) if len(flat) else None
        result[split] = {
            "shard": shard.model_dump() if shard else None,
            "num_bytes": text_bytes[split],
            "num_files": num_files[split],
            "counts": np.bincount(flat, minlength=tokenizer.get_vocab_size()).tolist(),
        }
    return result


def assemble(
    data: DataSpec,
    name: str,
    wanted: str,
    files: list[SourceFile],
    parts: list[dict[str, Any]],
    tokenizer_json: bytes,
) -> DatasetManifest:
    import tokenizers

    skipped = [path for part in parts for path in part["skipped"]]
    if len(skipped) > max(1, _MAX_SKIPPED * len(files)):
        raise RunError(
            f"data: {len(skipped)} of {len(files)} files are not {data.format} in UTF-8 "
            f"(at most {_MAX_SKIPPED:.0%} may be): {', '.join(skipped[:3])}, …",
            next_step="Narrow data.train to the files meant, or set data.format.",
        )
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    vocab_size = tokenizer.get_vocab_size()
    splits = {split: _split([part[split] for part in parts], split) for split in ("train", "eval")}
    counts = {split: np.sum([part[split]["counts"] for part in parts], axis=0) for split in ("train", "eval")}
    return DatasetManifest(
        name=name,
        fingerprint=wanted,
        dtype="uint16" if _dtype(vocab_size) == np.uint16 else "uint32",
        tokenizer=Tokenizer(
            file="tokenizer.json",
            sha256=hashlib.sha256(tokenizer_json).hexdigest(),
            size_bytes=len(tokenizer_json),
            vocab_size=vocab_size,
            end_of_text_id=int(tokenizer.token_to_id(END_OF_TEXT) or 0),
        ),
        train=splits["train"],
        eval=splits["eval"],
        unigram_loss=unigram_loss(counts["train"], counts["eval"]),
        source={
            "pattern": data.train,
            "num_files": len(files),
            "num_bytes": sum(file.size_bytes for file in files),
            "num_skipped": len(skipped),
            "skipped": skipped[:20],
        },
        created_s=time.time(),
    )


def unigram_loss(train_counts: Any, eval_counts: Any) -> float:
    """Nats per held-out token under the training split's frequencies, each count plus one."""
    smoothed = np.asarray(train_counts, dtype=np.float64) + 1.0
    log_probability = np.log(smoothed / smoothed.sum())
    weights = np.asarray(eval_counts, dtype=np.float64)
    if not weights.any():
        raise RunError("data: the held-out split holds no tokens.")
    return float(-(weights * log_probability).sum() / weights.sum())


def _split(parts: list[dict[str, Any]], name: str) -> Split:
    shards = tuple(Shard.model_validate(part["shard"]) for part in parts if part["shard"])
    if not shards:
        raise RunError(f"data: the {name} split holds no text.", next_step="Use more files.")
    return Split(
        shards=shards,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_bytes=sum(part["num_bytes"] for part in parts),
        num_files=sum(part["num_files"] for part in parts),
    )


def _upload_shard(store: Store, prefix: str, file: str, tokens: Any) -> Shard:
    data = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    store.create(prefix + file, data)  # the same bytes are there already where an earlier try got this far
    return Shard(file=file, num_tokens=len(tokens), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _read_documents(
    data: DataSpec, files: Iterable[SourceFile], store: Store
) -> Iterator[tuple[SourceFile, list[str] | None]]:
    """Each file's documents, read ahead by threads; None where it is not what the format says."""
    with ThreadPoolExecutor(_READS) as pool:
        for file, content in pool.map(lambda f: (f, read_source(f, store)), files):
            try:
                yield file, list(documents_of(content, data))
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                logger.warning("%s is skipped: %s", file.uri, e)
                yield file, None


def documents_of(content: bytes, data: DataSpec) -> Iterator[str]:
    """A file's documents.

    Raises:
        ValueError, KeyError, TypeError: it is not in the format, or lacks the field.
    """
    if data.format == "text":
        yield content.decode("utf-8")
    elif data.format == "jsonl":
        for line in content.decode("utf-8").split("\n"):  # splitlines() would also cut at U+2028 within a text
            if line.strip():
                yield _text(json.loads(line)[data.text_field])
    else:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(io.BytesIO(content), columns=[data.text_field])
        except (pyarrow.ArrowException, OSError) as e:
            raise ValueError(f"it is not parquet: {e}") from e
        yield from (_text(value) for value in table[data.text_field].to_pylist() if value is not None)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"the text field holds {type(value).__name__}, not text")
    value.encode()  # JSON can say half a surrogate pair, which is no text: UnicodeEncodeError, a ValueError
    return value
