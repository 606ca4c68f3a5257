"""Which samples make up a step: a pure function of the dataset's fingerprint, the seed and the step, at any world size.

Each epoch visits every sample once. The samples are cut into blocks of neighbours; the blocks are shuffled and dealt to
canonical streams, whose number depends on the global batch alone; and each stream shuffles its samples within a window
of blocks. So whoever reads some of a batch's rows needs few places of the dataset at a time, and memory is O(1).
docs/sample-order.md specifies it to the bit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

MAX_STREAMS = 64
OPEN_BLOCKS = 64
BLOCK_TOKENS = 4 * 2**20
_MIN_STREAM_BLOCKS = 4  # of a small dataset, which else would be few blocks shuffled whole
_ROUNDS = 4
_MAX_TABLE = 2**16  # blocks of which the whole shuffle is kept, 512 KiB
_MIX = np.uint64(0x9E3779B97F4A7C15)

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    fingerprint: str
    seed: int
    num_samples: int
    global_batch_size: int
    sequence_length: int

    def batch(self, step: int, rows: range | None = None) -> I64:
        """Sample numbers of the global batch of ``step`` (from 0), shape (global_batch_size,), or of some of its rows.

        Epochs follow each other without a gap, so a batch may hold the last samples of one and the first of the next.
        Its rows are in the order of their streams: neighbours come from the same places.
        """
        found: I64 = self.batches(range(step, step + 1), rows)[0]
        return found

    def batches(self, steps: range, rows: range | None = None) -> I64:
        """:meth:`batch` of several steps at once, shape (len(steps), len(rows)): cheaper by far where rows are few."""
        row = np.arange(self.global_batch_size) if rows is None else np.asarray(rows, dtype=np.int64)
        first = np.asarray(steps, dtype=np.int64) * self.global_batch_size
        before_end = self.num_samples - first % self.num_samples
        if bool(np.all(before_end >= self.global_batch_size)):
            position = first[:, None] % self.num_samples + self._in_stream_order(first % self.num_samples, row)
            epoch = np.broadcast_to((first // self.num_samples)[:, None], position.shape)
        else:  # some batch holds samples of several epochs
            places = np.stack([self._over_the_end(int(start))[row] for start in first])
            epoch, position = places // self.num_samples, places % self.num_samples
        out = np.empty(position.shape, dtype=np.int64)
        for each in np.unique(epoch):
            here = epoch == each
            out[here] = self.at(position[here], int(each))
        return out

    def at(self, positions: I64, epoch: int) -> I64:
        """The samples at ``positions`` of an epoch, each in ``0 … num_samples - 1``."""
        keys = _keys(self.fingerprint, self.seed, epoch)
        samples = self._place(positions.astype(np.uint64), keys)
        limit = np.uint64(self.num_samples)
        outside = samples >= limit  # of a block that is not there, or not whole: walk on until a sample is
        while outside.any():
            samples[outside] = self._place(samples[outside], keys)
            outside = samples >= limit
        return samples.astype(np.int64)

    @cached_property
    def num_streams(self) -> int:
        """The greatest power of two that divides the global batch, and :data:`MAX_STREAMS` at most."""
        return min(MAX_STREAMS, self.global_batch_size & -self.global_batch_size)

    @cached_property
    def block_samples(self) -> int:
        """Samples in a block."""
        most = max(1, BLOCK_TOKENS // self.sequence_length)
        return max(1, min(most, self.num_samples // (self.num_streams * _MIN_STREAM_BLOCKS)))

    @cached_property
    def window_blocks(self) -> int:
        """Blocks of a stream that are shuffled together: of all streams, :data:`OPEN_BLOCKS` at a time."""
        return OPEN_BLOCKS // self.num_streams

    @cached_property
    def stream_blocks(self) -> int:
        """Blocks of each stream; a few of them, at the dataset's end, may not be there."""
        num_blocks = -(-self.num_samples // self.block_samples)
        return -(-num_blocks // self.num_streams)

    def _in_stream_order(self, first: I64, row: I64) -> I64:
        """Offsets of the rows of batches that begin at positions ``first``: stream by stream, each in its order."""
        per_stream = self.global_batch_size // self.num_streams
        stream, nth = row // per_stream, row % per_stream
        return nth * self.num_streams + (stream - first[:, None]) % self.num_streams

    def _over_the_end(self, first: int) -> I64:
        """Places, counted over all epochs, of the rows of a batch that crosses the end of one."""
        places = np.arange(first, first + self.global_batch_size)
        return places[np.argsort(places % self.num_samples % self.num_streams, kind="stable")]

    def _place(self, positions: U64, keys: tuple[U64, U64]) -> U64:
        """A bijection of ``0 … num_streams · stream_blocks · block_samples - 1``."""
        of_windows, of_blocks = keys
        streams, block = np.uint64(self.num_streams), np.uint64(self.block_samples)
        stream, nth = positions % streams, positions // streams
        window_size, stream_size = self.window_blocks * self.block_samples, self.stream_blocks * self.block_samples
        window = nth // np.uint64(window_size)
        within = nth - window * np.uint64(window_size)
        own_keys = _scramble(of_windows ^ _scramble(window * streams + stream))
        num_whole = stream_size // window_size
        is_last = window >= np.uint64(num_whole)  # the last window of a stream may be smaller
        for some, size in ((~is_last, window_size), (is_last, stream_size - num_whole * window_size)):
            if some.all():
                within = _permute(within, own_keys, size)
            elif some.any():
                within[some] = _permute(within[some], own_keys[:, some], size)
        slots = (window * np.uint64(self.window_blocks) + within // block) * streams + stream
        num_slots = self.num_streams * self.stream_blocks
        if num_slots <= _MAX_TABLE:
            blocks: U64 = _small(of_blocks.tobytes(), num_slots)[slots]
        else:
            blocks = _permute(slots, of_blocks, num_slots)
        return np.asarray(blocks * block + within % block, dtype=np.uint64)


@lru_cache(maxsize=16)
def _keys(fingerprint: str, seed: int, epoch: int) -> tuple[U64, U64]:
    """The round keys of an epoch, of windows and of blocks; each (4, 1)."""
    digest = hashlib.sha512(f"{fingerprint}/{seed}/{epoch}".encode()).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)[:, None]
    return words[:_ROUNDS], words[_ROUNDS:]


@lru_cache(maxsize=4)
def _small(keys: bytes, size: int) -> U64:
    """A whole permutation as a table."""
    return _permute(np.arange(size, dtype=np.uint64), np.frombuffer(keys, dtype=np.uint64)[:, None], size)


def _permute(values: U64, keys: U64, size: int) -> U64:
    """A keyed permutation of ``0 … size - 1``; keys of shape (4, 1), or (4, n) for each value its own.

    A Feistel network on the fewest bits that cover the size, walked along its cycle until it lands below it (Black &
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    bits = max(2, (size - 1).bit_length())
    limit = np.uint64(size)
    out = _feistel(values, keys, bits)
    outside = np.flatnonzero(out >= limit)
    while len(outside):
        again = _feistel(out[outside], keys if keys.shape[1] == 1 else keys[:, outside], bits)
        out[outside] = again
        outside = outside[again >= limit]
    return out


def _feistel(values: U64, keys: U64, bits: int) -> U64:
    """One pass of the network, an even number of rounds; a bijection for any round function.

    The halves have ``bits - bits // 2`` bits on the left and ``bits // 2`` on the right, and change places each round.
    """
    right_bits = bits // 2
    widths = (bits - right_bits, right_bits)
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for number, key in enumerate(keys):
        mask = np.uint64((1 << widths[number % 2]) - 1)
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << np.uint64(right_bits)) | right


def _scramble(values: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    values = values + _MIX
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
