"""Which models can be batched: by what is known of them, and by trying."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from workloads.serve.batching_model import BatchedModel
from workloads.serve.loading import NonFiniteLogits

logger = logging.getLogger("headway.serve")

_PROMPT_TOKENS = (3, 8, 5)
_STEPS = 6
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of the largest logit: the order of sums changes the last digits."""
_TOLERANCE_HALF = 5e-2


def batched(model: Any, *, context_tokens: int) -> tuple[BatchedModel, int] | None:
    """The model as one that can be batched, and the bytes that one token's keys and values take; None where its cache
    is of another kind, or where it answers otherwise in a batch than alone, which is tried.

    Raises:
        NonFiniteLogits: the model answers NaN.
    """
    reason = _obstacle(model, context_tokens)
    if reason is None:
        try:
            found = BatchedModel(model)
            with torch.inference_mode():
                probe = _Probe(found, model)
                probe.run()
        except NonFiniteLogits:
            raise
        except Exception as e:
            reason = f"it cannot be called so: {type(e).__name__}: {e}"
        else:
            if probe.is_same:
                return found, probe.bytes_per_token
            reason = "it answers otherwise in a batch than alone"
    logger.warning("The model generates one sequence at a time: %s.", reason)
    return None


def _obstacle(model: Any, context_tokens: int) -> str | None:
    """Why the model's batches cannot have a plain cache. Pure."""
    config = model.config.get_text_config()
    parameters = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder:
        return "it has an encoder"
    if "position_ids" not in parameters or not {"cache", "past_key_values"} & set(parameters):
        return "it takes no positions, or no cache"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}"
    ropes = getattr(config, "rope_parameters", None) or {}
    for each in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if each.get("rope_type") in ("dynamic", "longrope"):
            return "its positions depend on the longest sequence of the batch"
    for layer in transformers.DynamicCache(config=config).layers:
        window = getattr(layer, "sliding_window", None)
        name = type(layer).__name__
        if name != "DynamicLayer" and not (name == "DynamicSlidingWindowLayer" and (window or 0) >= context_tokens):
            return f"its cache has a {name}"
    return None


class _Probe:
    """Rows of different lengths that join and leave a batch, whose logits are compared with those of a plain pass over
    the row's whole text."""

    def __init__(self, batch: BatchedModel, model: Any) -> None:
        """
        Raises:
            NonFiniteLogits: the model answers NaN.
        """
        self._batch = batch
        size = model.config.get_text_config().vocab_size
        self._texts = [
            [(7 * row + 3 * at + 1) % size for at in range(num + _STEPS)] for row, num in enumerate(_PROMPT_TOKENS)
        ]
        ids = [torch.tensor([text], device=model.device) for text in self._texts]
        self._plain = [model(input_ids=each).logits[0].float() for each in ids]
        if not all(bool(torch.isfinite(logits.max())) for logits in self._plain):
            raise NonFiniteLogits("The model's logits are not finite numbers.")
        share = _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)
        self._tolerance = share * max(float(logits.abs().max()) for logits in self._plain)
        self._rows: list[int] = []
        self.is_same = True
        self.bytes_per_token = 0
        """Of one token's keys and values in all layers."""

    def run(self) -> None:
        """Two rows join, then a third, then the first leaves."""
        self._join([0, 1])
        self._step()
        self._join([2])
        for _ in range(3):
            self._step()
        self._batch.cache.leave(0)
        self._rows[0] = self._rows.pop()
        self._step()
        self._batch.cache.clear()

    def _join(self, rows: Sequence[int]) -> None:
        cache = transformers.DynamicCache()
        lengths = [_PROMPT_TOKENS[row] for row in rows]
        logits = self._batch.prefill([self._texts[row][: _PROMPT_TOKENS[row]] for row in rows], cache)
        self._compare(rows, lengths, logits)
        self._batch.cache.join(cache, list(enumerate(lengths)))
        self._rows += rows
        self.bytes_per_token = sum(
            tensor[0, :, 0].nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)
        )

    def _step(self) -> None:
        lengths = self._batch.cache.lengths
        tokens = [self._texts[row][length] for row, length in zip(self._rows, lengths, strict=True)]
        logits = self._batch.step(tokens)
        self._compare(self._rows, [length + 1 for length in lengths], logits)

    def _compare(self, rows: Sequence[int], lengths: Sequence[int], logits: Any) -> None:
        expected = torch.stack([self._plain[row][length - 1] for row, length in zip(rows, lengths, strict=True)])
        self.is_same &= bool((logits.float() - expected).abs().max() <= self._tolerance)
