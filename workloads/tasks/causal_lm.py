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

IGNORED = -100


class CausalLM(Task):
    auto_class = "AutoModelForCausalLM"

    def collate(self, samples: Samples) -> Batch:
        tokens_BL1 = torch.from_numpy(samples.tokens)
        labels_BL = tokens_BL1[:, 1:].clone()
        labels_BL[samples.num_real :] = IGNORED
        return {"input_ids": tokens_BL1[:, :-1], "labels": labels_BL}

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        output: Any = model(input_ids=batch["input_ids"], use_cache=False)
        logits_BLV = output.logits.float()
        return functional.cross_entropy(
            logits_BLV.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        loss = sums["loss"] / num_targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) * split.num_tokens / max(1, split.num_bytes),
        }
