"""Next-token prediction. Shape suffixes: B rows, L sequence_length, V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.dataset.format import Split
from workloads.tasks.base import Batch, Samples, Task
from workloads.tasks.packing import require_apart

IGNORED = -100


class CausalLM(Task):
    """Predicts each token from those before it: of a text all, of a conversation what the assistant says."""

    auto_class = "AutoModelForCausalLM"
    sample_kinds = ("stream", "packed")
    lora_task_type = "CAUSAL_LM"

    def check(self) -> None:
        super().check()
        self.model_class_name()
        if self.context.sample_kind == "packed":
            require_apart(self.model_config(), own_class=self._own_class())

    def collate(self, samples: Samples) -> Batch:
        tokens_BL1 = torch.from_numpy(samples.tokens)
        labels_BL = tokens_BL1[:, 1:].clone()
        labels_BL[samples.num_real :] = IGNORED
        batch = {"input_ids": tokens_BL1[:, :-1], "labels": labels_BL}
        if "is_target" not in samples.rows:
            return batch
        is_target_BL1 = torch.from_numpy(samples.rows["is_target"])
        positions_BL1 = torch.from_numpy(samples.rows["positions"])
        # The first token of a conversation follows nothing: what stands before it is another's.
        labels_BL[~is_target_BL1[:, 1:] | (positions_BL1[:, 1:] == 0)] = IGNORED
        return {**batch, "position_ids": positions_BL1[:, :-1]}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        # No attention mask: with one, transformers would not look for conversations in the positions.
        inputs = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
        output: Any = model(**inputs, use_cache=False)
        logits_BLV = output.logits.float()
        return functional.cross_entropy(
            logits_BLV.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        loss = sums["loss"] / num_targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) * split.targets_per_byte,
        }
