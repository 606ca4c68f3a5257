"""The class of a text. Shape suffixes: B rows, L tokens of the longest text of a batch, C classes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.dataset.format import Split
from workloads.tasks import base_config
from workloads.tasks.base import Batch, Decode, Samples, Task

IGNORED = -100
_SHOWN_TOKENS = 128


class SequenceClassification(Task):
    """An encoder, or a decoder, with a head that gives each class a score. One class a text."""

    auto_class = "AutoModelForSequenceClassification"
    sample_kinds = ("labelled",)
    lora_task_type = "SEQ_CLS"

    def check(self) -> None:
        super().check()
        self.model_class_name()
        base_config.require_positions(self.model_config(), self.context.sequence_length)

    def model_config(self) -> Any:
        config = super().model_config()
        text = config.get_text_config()
        if text.pad_token_id is None:  # a decoder finds the end of a text by it
            text.pad_token_id = self._context_pad_id
        if self.context.classes:  # not known before the data is prepared
            config.id2label = dict(enumerate(self.context.classes))
            config.label2id = {name: number for number, name in enumerate(self.context.classes)}
            config.problem_type = "single_label_classification"
        return config

    def special_tokens(self) -> dict[str, int | None]:
        # Padding stands behind the text, where nothing looks at it, so it does not matter that what stands in for it
        # keeps the embedding zero.
        return {**super().special_tokens(), "pad_token_id": self._context_pad_id}

    def may_be_new(self, model: nn.Module, name: str) -> bool:
        """The head, and the pooler under it, which models pretrained on masked tokens do not have."""
        prefix = _prefix(model)
        return bool(prefix) and (not name.startswith(f"{prefix}.") or ".pooler." in name)

    def head_modules(self, model: nn.Module) -> tuple[str, ...]:
        prefix = _prefix(model)
        heads = [name for name, part in model.named_children() if name != prefix and _has_parameters(part)]
        poolers = [name for name, _ in model.named_modules() if name.endswith(".pooler")]
        return (*heads, *poolers)

    def collate(self, samples: Samples) -> Batch:
        """Texts cut to the longest of the batch. What pads them has the model's own pad token."""
        length_B = torch.from_numpy(samples.rows["length"]).clamp(min=1)  # attention to nothing would be NaN
        longest = int(length_B[: max(1, samples.num_real)].max())
        tokens_BL = torch.from_numpy(samples.tokens)[:, :longest]
        is_text_BL = torch.arange(longest) < length_B[:, None]
        labels_B = torch.from_numpy(samples.rows["label"]).clone()
        labels_B[samples.num_real :] = IGNORED
        return {
            "input_ids": tokens_BL.masked_fill(~is_text_BL, self._pad_id),
            "attention_mask": is_text_BL.long(),
            "labels": labels_B,
        }

    def num_targets(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        return _loss_sum(_logits(model, batch), batch["labels"])

    def eval_sums(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """The loss, how many are guessed right, and of each class how often it was hit, guessed and there."""
        logits_BC, labels_B = _logits(model, batch), batch["labels"]
        real_B = labels_B != IGNORED
        labels_B, guessed_B = labels_B[real_B], logits_BC.argmax(-1)[real_B]
        num_classes = logits_BC.shape[-1]
        hits_C, guesses_C, there_C = (
            torch.bincount(numbers, minlength=num_classes).tolist()
            for numbers in (labels_B[guessed_B == labels_B], guessed_B, labels_B)
        )
        sums = {"loss": float(_loss_sum(logits_BC, batch["labels"])), "correct": float(sum(hits_C))}
        for number in range(num_classes):
            sums[f"tp.{number}"] = float(hits_C[number])
            sums[f"fp.{number}"] = float(guesses_C[number] - hits_C[number])
            sums[f"fn.{number}"] = float(there_C[number] - hits_C[number])
        return sums

    def answers(self, model: nn.Module, samples: Samples, decode: Decode) -> list[dict[str, str]]:
        """The class that the model gives each text, and the text's own."""
        batch = self.collate(samples)
        device = next(model.parameters()).device
        with torch.inference_mode():
            guessed_B = _logits(model, {name: tensor.to(device) for name, tensor in batch.items()}).argmax(-1)
        texts = zip(samples.tokens.tolist(), samples.rows["length"].tolist(), strict=True)
        return [
            {
                "text": decode(tokens[: min(length, _SHOWN_TOKENS)]),
                "predicted": self.context.classes[int(guessed)],
                "expected": self.context.classes[int(label)],
            }
            for (tokens, length), guessed, label in zip(texts, guessed_B, batch["labels"], strict=True)
        ]

    def metrics(self, sums: Mapping[str, float], *, num_targets: int, split: Split) -> dict[str, float]:
        """``loss`` in nats per text, ``accuracy``, and ``f1``: the macro average, as :func:`macro_f1`."""
        return {
            "loss": sums["loss"] / num_targets,
            "accuracy": sums["correct"] / num_targets,
            "f1": macro_f1(sums, num_classes=len(self.context.classes)),
        }

    def load_model(self, directory: Path, base: Path | None = None) -> nn.Module:
        model: Any = super().load_model(directory, base)
        text = model.config.get_text_config()
        if text.pad_token_id is None:  # of a pretrained model that is evaluated as it came
            text.pad_token_id = self._pad_id
        return cast(nn.Module, model)

    @property
    def _context_pad_id(self) -> int:
        pad = self.context.pad_token_id
        return self.context.end_of_text_id if pad is None else pad

    @cached_property
    def _pad_id(self) -> int:
        return int(self.model_config().get_text_config().pad_token_id)


def macro_f1(sums: Mapping[str, float], *, num_classes: int) -> float:
    """The plain mean of the classes' F1, over those that are there or were guessed at all.

    Source: scikit-learn's ``f1_score(average="macro")``.
    """
    scores = []
    for number in range(num_classes):
        hits, wrong = sums[f"tp.{number}"], sums[f"fp.{number}"] + sums[f"fn.{number}"]
        if hits or wrong:
            scores.append(2 * hits / (2 * hits + wrong))
    return sum(scores) / len(scores) if scores else 0.0


def _prefix(model: nn.Module) -> str:
    """The name under which a transformers model with a head holds the model without one."""
    return str(getattr(model, "base_model_prefix", ""))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    output: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits_BC: Tensor = output.logits.float()
    return logits_BC


def _loss_sum(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BC, labels_B, ignore_index=IGNORED, reduction="sum")
