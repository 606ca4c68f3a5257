"""What a checkpoint leaves to the pretrained weights that its run started from. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.checkpoint.adapter import BaseReference, LoraPair
from orchestrator.errors import IntegrityError, NotFound
from orchestrator.pretrained.format import BaseManifest, read_base
from orchestrator.pretrained.reader import BasePiece, BaseReader
from orchestrator.store import Store, layout

NUM_READERS = 2
"""Requests at once for pretrained weights, by each process: what bounds the memory that reading them takes besides."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model's weights come from before any step is taken."""

    base: BaseReference
    tensors: Mapping[str, str]
    """By parameter, the tensor of the base that holds it. Of those, checkpoints hold the trained ones alone."""
    lora: Mapping[str, LoraPair] = field(default_factory=dict)
    """By frozen parameter, what is trained beside it."""


class BaseUnusable(IntegrityError):
    """An earlier checkpoint would not help: it refers to the same pretrained weights."""


def open_base(store: Store, reference: BaseReference) -> BaseReader:
    """The pretrained weights that a checkpoint refers to.

    Raises:
        BaseUnusable: they are gone, or others lie in their place.
    """
    place = store.uri_of(layout.base_manifest(reference.fingerprint))
    try:
        manifest = read_base(store, reference.fingerprint)
    except NotFound as e:
        raise BaseUnusable(
            f"The checkpoint holds an adapter, and the pretrained weights that it belongs to are gone: {place}.",
            next_step="Restore them, or submit the run again, which fetches them again.",
        ) from e
    except IntegrityError as e:
        raise BaseUnusable(e.message, next_step=e.next_step) from e
    if manifest.digest != reference.digest:
        raise BaseUnusable(
            f"The pretrained weights of {place} are others (digest {manifest.digest[:12]}…) than those that the "
            f"checkpoint was trained on ({reference.digest[:12]}…).",
            next_step="Restore those, or give the run another name to train it from the start.",
        )
    return BaseReader(store, manifest, num_readers=NUM_READERS)


def require_files(store: Store, reader: BaseReader) -> None:
    """Whether its files are all there, as long as they were. Reads none of them.

    Raises:
        BaseUnusable: naming the first that is not.
    """
    manifest = reader.manifest
    sizes = {item.key: item.size_bytes for item in store.list(manifest.prefix)}
    expected = {name: file.size_bytes for part in (manifest.files, manifest.weights) for name, file in part.items()}
    for name, size_bytes in expected.items():
        found = sizes.get(manifest.prefix + name)
        if found != size_bytes:
            what = f"holds {found} bytes, not {size_bytes}" if found is not None else "is gone"
            raise BaseUnusable(
                f"{store.uri_of(manifest.prefix + name)}, which the checkpoint refers to, {what}.",
                next_step=_fetch_again(manifest),
            )


def read_pieces(reader: BaseReader, pieces: Sequence[BasePiece]) -> None:
    """
    Raises:
        BaseUnusable: damaged bytes, or a file that is gone. RunError: a value that the dtype cannot hold.
    """
    try:
        reader.read(pieces)
    except (IntegrityError, NotFound) as e:
        raise BaseUnusable(e.message, next_step=_fetch_again(reader.manifest)) from e


def _fetch_again(manifest: BaseManifest) -> str:
    place = layout.base(manifest.fingerprint)
    return f"Delete {place} in the store and submit the run again: it fetches the same from {manifest.uri}."
