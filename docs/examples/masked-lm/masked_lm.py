"""Masked language modelling as a task of one's own. Shape suffixes: B rows, L sequence_length, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.dataset.format import Split
from workloads.tasks import Batch, Samples, Task, TaskContext

IGNORED = -100
MASK_TOKEN = "<|mask|>"
# Devlin et al. 2018, "BERT", section 3.1: 15 % of the tokens are targets; of these 80 % are masked, 10 % are
# replaced by a random token, and 10 % stay. One draw in [0, 1) for each token decides.
MASKED_BELOW, REPLACED_BELOW, TARGET_BELOW = 0.12, 0.135, 0.15


class MaskedLM(Task):
    """Predicts the tokens that were masked, from those on both sides."""

    auto_class = "AutoModelForMaskedLM"

    def __init__(self, context: TaskContext) -> None:
        # Headway's tokenizer has no mask token: the model's vocabulary gets one id more, the last.
        self.mask_id = context.vocab_size
        super().__init__(replace(context, vocab_size=context.vocab_size + 1))

    def collate(self, samples: Samples) -> Batch:
        """Masks and targets depend on ``row_rng`` alone, so they are the same at any number of workers."""
        inputs_BL = samples.tokens[:, :-1].copy()
        labels_BL = np.full_like(inputs_BL, IGNORED)
        for row in range(samples.num_real):  # the rows after these pad the batch and have no targets
            labels_BL[row] = self._mask(inputs_BL[row], samples.row_rng(row))
        return {"input_ids": torch.from_numpy(inputs_BL), "labels": torch.from_numpy(labels_BL)}

    def _mask(self, inputs_L: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Masks one row in place and returns its labels."""
        draw_L = rng.random(len(inputs_L))
        random_L = rng.integers(0, self.mask_id, len(inputs_L))
        labels_L = np.where(draw_L < TARGET_BELOW, inputs_L, IGNORED)
        replaced_L = (draw_L >= MASKED_BELOW) & (draw_L < REPLACED_BELOW)
        inputs_L[replaced_L] = random_L[replaced_L]
        inputs_L[draw_L < MASKED_BELOW] = self.mask_id
        return labels_L

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Any = model(input_ids=batch["input_ids"])
        logits_BLV = output.logits.float()
        return functional.cross_entropy(
            logits_BLV.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def eval_sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, and how many masked tokens are guessed right."""
        output: Any = model(input_ids=batch["input_ids"])
        right_BL = output.logits.argmax(-1) == batch["labels"]
        return {**super().eval_sums(model, batch), "correct": float(right_BL.sum())}

    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        loss = sums["loss"] / num_targets
        accuracy = sums["correct"] / num_targets
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "masked_accuracy": accuracy}

    def save_assets(self, directory: Path, *, tokenizer: Path, dtype: str) -> None:
        """As for every task, and the exported tokenizer learns the mask token, so that fill-mask works."""
        import transformers

        super().save_assets(directory, tokenizer=tokenizer, dtype=dtype)
        fast = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        fast.add_special_tokens({"mask_token": MASK_TOKEN})
        fast.save_pretrained(directory)
