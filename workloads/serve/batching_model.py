"""The forward passes of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from workloads.serve.batching_cache import BatchCache


class BatchedModel:
    """A causal language model and the keys and values of its batch. Used by one thread."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.device = model.device
        self.cache = BatchCache()
        parameters = inspect.signature(model.forward).parameters
        # Renamed in transformers 5.24.
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._keeps_logits = "logits_to_keep" in parameters

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Any) -> Any:
        """The logits behind each prompt, (rows, vocabulary); its keys and values are added to ``cache``.

        Prompts of different lengths are padded behind, where a causal model's tokens do not look. With their own last
        token, so that nothing foreign can break a row.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest, start = max(lengths), cache.get_seq_length()
        padded = [[*prompt, *[prompt[-1]] * (longest - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)
        positions = torch.arange(start, start + longest, device=self.device).expand(len(prompts), -1)
        ends = sorted({length - 1 for length in lengths})
        at = torch.tensor([ends.index(length - 1) if self._keeps_logits else length - 1 for length in lengths])
        kept = {"logits_to_keep": torch.tensor(ends, device=self.device)} if self._keeps_logits else {}
        logits = self._forward(ids, positions, None, cache, **kept)
        return logits[torch.arange(len(prompts)), at]

    def step(self, tokens: Sequence[int]) -> Any:
        """The logits behind one more token of each row of the batch, (rows, vocabulary)."""
        lengths = self.cache.lengths
        ids, positions = torch.tensor([tokens, lengths], device=self.device).unsqueeze(-1)
        self.cache.begin_step(self.device)
        mask = None
        if len(lengths) > 1:  # added to the scores: 0 up to the row's own position
            columns = torch.arange(max(lengths) + 1, device=self.device)
            lowest = torch.finfo(self._model.dtype).min
            mask = torch.where(columns <= positions, 0.0, lowest)[:, None, None, :].to(self._model.dtype)
        return self._forward(ids, positions, mask, self.cache)[:, -1]

    def _forward(self, ids: Any, positions: Any, mask: Any, cache: Any, **kept: Any) -> Any:
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{self._cache_argument: cache},
            **kept,
        ).logits
