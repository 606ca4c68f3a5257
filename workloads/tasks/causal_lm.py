"""Next-token prediction. Shape suffixes: B rows, L sequence_length, V vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.dataset.format import Split
from workloads.tasks import base_config
from workloads.tasks.base import Batch, Decode, Samples, Task
from workloads.tasks.packing import require_apart

IGNORED = -100
_NUM_ANSWERS, _PROMPT_TOKENS, _ANSWER_TOKENS = 4, 64, 64
_ANSWERS_S = 30.0
"""For all answers together; one that is under way then ends where it is."""


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

    def answers(self, model: nn.Module, samples: Samples, decode: Decode) -> list[dict[str, str]]:
        """How the model goes on with the beginnings of some rows, by its likeliest token each time."""
        deadline_s = time.monotonic() + _ANSWERS_S
        found = []
        for row in range(min(_NUM_ANSWERS, samples.num_real)):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                break
            prompt, expected = self._parts(samples, row)
            completion = self._continue(model, prompt, max_time_s=left_s)
            found.append({"prompt": decode(prompt), "completion": decode(completion), "expected": decode(expected)})
        return found

    def _parts(self, samples: Samples, row: int) -> tuple[list[int], list[int]]:
        """Where a row's text is cut in two: a conversation where the assistant first speaks."""
        tokens_L1 = samples.tokens[row].tolist()
        if "is_target" not in samples.rows:
            cut = min(_PROMPT_TOKENS, len(tokens_L1) // 2)
            return tokens_L1[:cut], tokens_L1[cut : cut + _ANSWER_TOKENS]
        is_target_L1 = samples.rows["is_target"][row].tolist()
        starts = [index for index, position in enumerate(samples.rows["positions"][row]) if position == 0]
        end = starts[1] if len(starts) > 1 else len(tokens_L1)  # the first conversation's
        cut = is_target_L1.index(True, 0, end)
        until = is_target_L1.index(False, cut, end) if False in is_target_L1[cut:end] else end
        return tokens_L1[:cut], tokens_L1[cut : min(until, cut + _ANSWER_TOKENS)]

    def _continue(self, model: Any, prompt: list[int], *, max_time_s: float) -> list[int]:
        limit = base_config.position_limit(self.model_config())
        num_new = _ANSWER_TOKENS if limit is None else min(_ANSWER_TOKENS, limit - len(prompt))
        if num_new < 1:
            return []
        ids_1P = torch.tensor([prompt], device=next(model.parameters()).device)
        output_1L = model.generate(
            input_ids=ids_1P,
            attention_mask=torch.ones_like(ids_1P),
            max_new_tokens=num_new,
            max_time=max_time_s,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_k=None,
            top_p=None,
            pad_token_id=self.context.end_of_text_id,
        )
        completion: list[int] = output_1L[0, len(prompt) :].tolist()
        return completion

    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        loss = sums["loss"] / num_targets
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) * split.targets_per_byte,
        }
