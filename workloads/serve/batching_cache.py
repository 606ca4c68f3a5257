"""Keys and values of a batch whose rows come and go, as a cache of transformers.

Shapes: R rows, H key-value heads, C columns, D head size. A row's tokens lie in its columns from 0 on, so a row is
never moved for the length of another, and padding is what lies behind a row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.cache_utils import CacheLayerMixin

_SPARE = 1.25  # capacity over what is needed, so that growing copies each column a few times at most
_COLUMNS = 64  # capacity is a multiple of it


class _Place:
    """Where a step's new keys and values lie; the same in all layers."""

    def __init__(self) -> None:
        self.num_rows, self.width = 0, 0
        self.rows: Any = None
        self.columns: Any = None

    def set(self, columns: Sequence[int], device: Any) -> None:
        self.num_rows, self.width = len(columns), max(columns) + 1
        if self.num_rows > 1:
            self.rows = torch.arange(self.num_rows, device=device)
            self.columns = torch.tensor(columns, device=device)


class RowLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, (R, H, C, D) each, which a step writes in place.

    All that lies in them is a finite number, also where no row has a token: attention gives such a place the weight
    0, and 0 times NaN is NaN.
    """

    is_sliding = False

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self._place = place

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        raise NotImplementedError("a row joins before the model runs")

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Add one token to each row. Shape (R, H, 1, D) in, and (R, H, width, D) out."""
        place = self._place
        if place.num_rows == 1:
            at = place.width - 1
            self.keys[:1, :, at : at + 1] = key_states
            self.values[:1, :, at : at + 1] = value_states
        else:
            self.keys[place.rows, :, place.columns] = key_states[:, :, 0]
            self.values[place.rows, :, place.columns] = value_states[:, :, 0]
        return (
            self.keys[: place.num_rows, :, : place.width],
            self.values[: place.num_rows, :, : place.width],
        )

    def get_seq_length(self) -> int:
        return self._place.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._place.width, 0

    def get_max_length(self) -> int:
        return -1


class BatchCache(transformers.Cache):  # type: ignore[misc]
    """The rows' keys and values in all layers."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[RowLayer]
        self._place = _Place()
        self._lengths: list[int] = []
        self._capacity = (0, 0)  # rows, columns

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._lengths)

    def join(self, prefilled: transformers.Cache, lengths: Sequence[tuple[int, int]]) -> None:
        """Add rows.

        Args:
            prefilled: what the model made of their prompts, from the first column on.
            lengths: of each new row, its number in ``prefilled`` and its tokens.
        """
        if not lengths:
            return
        first = len(self._lengths)
        self._lengths += [num_tokens for _, num_tokens in lengths]
        if not self.layers:
            self.layers = [RowLayer(self._place) for _ in prefilled.layers]
        self._reserve(prefilled, num_kept=first)
        for layer, found in zip(self.layers, prefilled.layers, strict=True):
            for row, (source, length) in enumerate(lengths, start=first):
                layer.keys[row, :, :length] = found.keys[source, :, :length]
                layer.values[row, :, :length] = found.values[source, :, :length]

    def leave(self, row: int, *, scrub: bool = False) -> None:
        """Drop a row; the last one takes its number.

        Args:
            scrub: it may hold numbers that are not finite.
        """
        if len(self._lengths) == 1:
            self.clear()
            return
        last, length = len(self._lengths) - 1, self._lengths.pop()
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                if scrub:
                    tensor[row].zero_()
                if row != last:
                    tensor[row, :, :length] = tensor[last, :, :length]
        if row != last:
            self._lengths[row] = length

    def clear(self) -> None:
        """Drop all rows, and give their memory back."""
        self.layers, self._lengths, self._capacity = [], [], (0, 0)

    def begin_step(self, device: Any) -> None:
        """Make room for one more token of each row."""
        self._place.set(self._lengths, device)
        self._lengths = [length + 1 for length in self._lengths]
        self._reserve(self, num_kept=len(self._lengths))

    def _reserve(self, like: transformers.Cache, *, num_kept: int) -> None:
        """Have room for all rows. What is too small is made anew for what is needed now, so that a long row that has
        left costs nothing once the batch grows."""
        num_rows, num_columns = len(self._lengths), max(self._lengths)
        if num_rows <= self._capacity[0] and num_columns <= self._capacity[1]:
            return
        self._capacity = (int(num_rows * _SPARE), -(-int(num_columns * _SPARE) // _COLUMNS) * _COLUMNS)
        for layer, found in zip(self.layers, like.layers, strict=True):
            layer.keys = self._grown(layer.keys, found.keys, num_kept)
            layer.values = self._grown(layer.values, found.values, num_kept)

    def _grown(self, old: Any, like: Any, num_kept: int) -> Any:
        num_rows, num_columns = self._capacity
        new = like.new_zeros((num_rows, like.shape[1], num_columns, like.shape[3]))
        if old is not None and num_kept:
            kept = min(old.shape[2], num_columns)
            new[:num_kept, :, :kept] = old[:num_kept, :, :kept]
        return new
