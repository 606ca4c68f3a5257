"""The tokenizer that a dataset carries: every file of it, so that nothing else is needed to read its tokens."""

from __future__ import annotations

from pathlib import Path

from orchestrator.dataset.format import DatasetManifest, Tokenizer, TokenizerFile
from orchestrator.errors import IntegrityError
from orchestrator.store import layout
from orchestrator.store.s3 import Store


def fetch_tokenizer(store: Store, manifest: DatasetManifest, folder: Path) -> Path:
    """The dataset's whole tokenizer, verified, in ``folder``, as transformers reads it. Returns ``folder``."""
    return fetch_tokenizer_files(store, layout.dataset(manifest.name, manifest.fingerprint), manifest.tokenizer, folder)


def fetch_tokenizer_files(store: Store, prefix: str, tokenizer: Tokenizer, folder: Path) -> Path:
    """As :func:`fetch_tokenizer`, for a dataset whose manifest is not written yet.

    Raises:
        IntegrityError: a file is not what its digest says, or is named as if it lay elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    main = TokenizerFile(sha256=tokenizer.sha256, size_bytes=tokenizer.size_bytes)
    for name, entry in {tokenizer.file: main, **tokenizer.files}.items():
        if Path(name).name != name or name in ("", ".."):
            raise IntegrityError(f"The manifest names a tokenizer's file {name!r} outside its folder.")
        data = store.get_verified(prefix + name, sha256=entry.sha256, size_bytes=entry.size_bytes)
        (folder / name).write_bytes(data)
    return folder
