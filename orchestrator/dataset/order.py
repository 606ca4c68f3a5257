"""Which samples make up a step: a pure function of (dataset fingerprint, seed, step), at any world size.

Epoch ``e`` visits all N samples once, in the order of a keyed permutation of 0…N-1: a four-round Feistel
network on the smallest even number of bits that covers N, walked along its cycle until it lands below N
(Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains"). It needs no table: memory is O(1), and any
position is found without those before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ROUNDS = 4
_MIX = np.uint64(0x9E3779B97F4A7C15)

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    fingerprint: str
    seed: int
    num_samples: int

    def batch(self, step: int, global_batch_size: int) -> npt.NDArray[np.int64]:
        """Sample indices of the global batch of ``step`` (from 0), shape (global_batch_size,).

        Positions run on over the ends of epochs, so a batch may hold the last samples of one epoch and the
        first of the next.
        """
        first = step * global_batch_size
        positions = np.arange(first, first + global_batch_size, dtype=np.uint64)
        epochs = positions // np.uint64(self.num_samples)
        samples = np.empty(global_batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = self.permute(positions[here] % np.uint64(self.num_samples), int(epoch))
        return samples

    def permute(self, indices: U64, epoch: int) -> npt.NDArray[np.int64]:
        """Where the keyed permutation of ``epoch`` takes each of ``indices``, all below ``num_samples``."""
        half_bits = np.uint64(max(1, -(-(self.num_samples - 1).bit_length() // 2)))
        keys = self._round_keys(epoch)
        limit = np.uint64(self.num_samples)
        values = _feistel(indices, keys, half_bits)
        outside = values >= limit
        while outside.any():
            values[outside] = _feistel(values[outside], keys, half_bits)
            outside = values >= limit
        return values.astype(np.int64)

    def _round_keys(self, epoch: int) -> U64:
        digest = hashlib.sha256(f"{self.fingerprint}/{self.seed}/{epoch}".encode()).digest()
        return np.frombuffer(digest, dtype="<u8", count=_ROUNDS).astype(np.uint64)


def _feistel(values: U64, keys: U64, half_bits: np.uint64) -> U64:
    """One pass of the network over ``2 * half_bits`` bits; a bijection for any round function."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << half_bits) | right


def _scramble(values: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = values + _MIX
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
