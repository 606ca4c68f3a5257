"""Verified ranged reads of a base model's tensors, in the dtype that the reader wants. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from orchestrator.checkpoint.blocks import BlockReader, Piece
from orchestrator.checkpoint.convert import FLOATS, convert
from orchestrator.checkpoint.format import DTYPE_BYTES, RankFile
from orchestrator.errors import RunError
from orchestrator.pretrained.format import BaseManifest
from orchestrator.store import Store

READ_BYTES = 8 * 2**20
"""The most that one request asks for: half of what checkpoints take, for each rank loads its share beside the model."""
_CONVERT_BYTES = 2**20
"""Stored bytes that are converted at once; numpy holds some three copies of them in fp32 meanwhile."""
_READERS = 4


@dataclass(frozen=True, kw_only=True)
class BasePiece:
    """Elements of one flattened tensor, and the memory that they go to.

    Attributes:
        start: the first element.
        target: a writable view of single bytes; as long as the elements are wanted, in ``dtype``.
        dtype: F32, BF16 or F16, or what the tensor is stored in.
    """

    tensor: str
    start: int
    target: memoryview
    dtype: str = "F32"


@dataclass(frozen=True, kw_only=True)
class _Converted(Piece):
    """A byte range whose elements are wanted in another dtype. ``target`` is as long as those."""

    name: str
    stored: str
    wanted: str

    @property
    def stop(self) -> int:
        return self.start + len(self.target) // DTYPE_BYTES[self.wanted] * DTYPE_BYTES[self.stored]

    def parts(self, num_bytes: int) -> Iterator[Piece]:
        step = num_bytes // DTYPE_BYTES[self.stored]
        size, wide = DTYPE_BYTES[self.stored], DTYPE_BYTES[self.wanted]
        for first in range(0, len(self.target) // wide, step):
            target = self.target[first * wide : (first + step) * wide]
            yield replace(self, start=self.start + first * size, target=target)

    def fill(self, data: memoryview) -> None:
        size, wide = DTYPE_BYTES[self.stored], DTYPE_BYTES[self.wanted]
        for start in range(0, len(data), _CONVERT_BYTES):
            run = data[start : start + _CONVERT_BYTES]
            into = start // size * wide
            try:
                converted = convert(run, self.stored, self.wanted, name=self.name)
            except RunError as e:
                raise RunError(e.message, next_step="Set train.precision to bf16 or fp32.") from e
            self.target[into : into + len(converted)] = converted


class BaseReader:
    """Reads one base model. Safe to use from several threads.

    Args:
        num_readers: requests at once, of up to 8 MiB each; what bounds the memory that a read takes.
    """

    def __init__(self, store: Store, manifest: BaseManifest, *, num_readers: int = _READERS) -> None:
        self.manifest = manifest
        self._numbers = {name: number for number, name in enumerate(manifest.weights)}
        files = [
            RankFile(key=name, size_bytes=file.size_bytes, index_key=file.index_key, index_sha256=file.index_sha256)
            for name, file in manifest.weights.items()
        ]
        self._blocks = BlockReader(store, manifest.prefix, files, num_readers=num_readers, read_bytes=READ_BYTES)

    @property
    def bytes_read(self) -> int:
        """Bytes fetched from weight files so far, whole blocks."""
        return self._blocks.bytes_read

    def read(self, pieces: Iterable[BasePiece]) -> None:
        """Fill every piece's target, by parallel requests. Small pieces that lie close together share one.

        Raises:
            IntegrityError: a block does not match its digest. NotFound: a file is gone.
            RunError: there are no such elements, or the dtype cannot hold them.
        """
        self._blocks.read([self._located(piece) for piece in pieces])

    def check(self) -> None:
        """Read every byte of every weight file and check it.

        Raises:
            IntegrityError, NotFound: naming the first bad part.
        """
        self._blocks.check_indexes()
        for number in self._numbers.values():
            self._blocks.check_file(number)

    def _located(self, piece: BasePiece) -> Piece:
        tensor = self.manifest.tensors.get(piece.tensor)
        if tensor is None:
            raise RunError(
                f"model.pretrained: {self.manifest.uri} has no tensor {piece.tensor}.",
                next_step="Do its config.json and its weights belong together?",
            )
        if piece.dtype != tensor.dtype and not {piece.dtype, tensor.dtype} <= set(FLOATS.values()):
            raise RunError(
                f"model.pretrained: {piece.tensor} is stored as {tensor.dtype} and cannot be read as {piece.dtype}.",
                next_step="Save the weights in F32, BF16 or F16.",
            )
        size = DTYPE_BYTES[piece.dtype]
        length, rest = divmod(len(piece.target), size)
        if rest or piece.start < 0 or piece.start + length > tensor.numel:
            raise RunError(
                f"{piece.tensor} has {tensor.numel} elements; {len(piece.target)} bytes of {piece.dtype} from element "
                f"{piece.start} on are not there."
            )
        file = self._numbers[tensor.file]
        start = tensor.offset + piece.start * DTYPE_BYTES[tensor.dtype]
        if piece.dtype == tensor.dtype:
            return Piece(file=file, start=start, target=piece.target)
        return _Converted(
            file=file, start=start, target=piece.target, name=piece.tensor, stored=tensor.dtype, wanted=piece.dtype
        )
