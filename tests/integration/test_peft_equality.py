"""Fine-tuning on packed conversations trains as a plain loop of transformers, peft and torch does.

The plain loop knows nothing of packed rows: it renders each conversation by hand, says itself which tokens are
targets, and runs each conversation alone. All that it takes from Headway is the order of the data, the learning rate of
each step, and which numbers the run file sets.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.order import SampleOrder
from orchestrator.dataset.reader import TokenReader
from orchestrator.schedule import learning_rate
from orchestrator.spec import RunSpec, parse
from orchestrator.store import Store, layout
from orchestrator.targets.seaweedfs import S3Server
from tests.gloo_ranks import Ranks
from tests.integration.pretrained_ranks import fetch, losses_of, make_job, save_base
from tests.unit.workloads import chat_templates
from tests.unit.workloads.preparing import json_lines, prepare_here
from workloads.engine import build_cpu_op

STEPS, ROW_TOKENS = 20, 193
TOLERANCE = 1e-3
Record = dict[str, Any]
Conversation = tuple[list[int], list[bool]]
"""Token ids, and whether each is a target."""


@pytest.fixture(scope="module")
def ranks(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Ranks]]:
    build_cpu_op()
    with pytest.MonkeyPatch.context() as patch:  # the ranks inherit it
        patch.setenv("HEADWAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        held = {size: Ranks(size, first_port=24800 + 100 * size, answer_timeout_s=300.0) for size in (1, 2)}
        yield held
        for group in held.values():
            group.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = chat_templates.byte_level("chatml", chat_templates.CHATML, vocab_size=300)
    directory = save_base(
        tmp_path_factory.mktemp("base"), vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
        num_attention_heads=4,
    )  # fmt: skip
    return chat_templates.save(directory, tokenizer)


def conversation(number: int) -> Record:
    """Of one to three turns; an answer repeats the question, so that there is something to learn."""
    said = random.Random(number)
    messages = [{"role": "system", "content": f"You are terse. {number}"}]
    for _ in range(said.randint(1, 3)):
        question = " ".join(said.choice(["Hi", "friend", "then", "bye"]) for _ in range(said.randint(1, 4)))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": question}]
    return {"messages": messages}


def run_spec(store: Store, base: Path) -> RunSpec:
    return parse(
        {
            "apiVersion": "headway/v1",
            "name": "alike",
            "model": {"pretrained": str(base), "lora": {"rank": 8, "alpha": 16.0}},
            "data": {
                "train": f"{store.uri}/source/*.jsonl",
                "format": "messages",
                "sequence_length": ROW_TOKENS - 1,
                "long_samples": "skip",
            },
            "train": {
                "steps": STEPS,
                "global_batch_size": 6,
                "micro_batch_size": 2,
                "max_grad_norm": 0.5,
                "optimizer": {"learning_rate": 2e-2, "warmup_steps": 4},
                "zero": {"stage": 3},
                "precision": "fp32",
                "seed": 11,
            },
        }
    )


def prepared(store: Store, spec: RunSpec, base: Path, records: list[Record]) -> DatasetManifest:
    store.upload("source/all.jsonl", json_lines(records))
    manifest = prepare_here(spec.data, store, base).manifest  # type: ignore[arg-type]  # any store does
    store.create_json(layout.dataset_manifest(manifest.name, manifest.fingerprint), manifest.model_dump(mode="json"))
    return manifest


# -- the plain loop


class Plain:
    """Transformers, peft and AdamW on one process."""

    def __init__(self, base: Path, spec: RunSpec) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        torch.manual_seed(spec.train.seed)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        self.model: nn.Module = peft.get_peft_model(model, config).train()
        self._spec = spec
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        settings = spec.train.optimizer
        self._adam = torch.optim.AdamW(
            self._trained, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        self.num_clipped = 0

    def step(self, number: int, conversations: list[Conversation]) -> float:
        loss = self.mean_loss(conversations)
        self._adam.zero_grad()
        loss.backward()
        limit = self._spec.train.max_grad_norm or 0.0
        self.num_clipped += bool(torch.nn.utils.clip_grad_norm_(self._trained, limit) > limit)
        rate = learning_rate(self._spec.train.optimizer, step=number, total_steps=STEPS)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        return float(loss.detach())

    def mean_loss(self, conversations: list[Conversation]) -> Tensor:
        """Per target, each conversation alone."""
        num_targets = sum(sum(is_target) for _, is_target in conversations)
        return torch.stack([self.loss_sum(ids, is_target) for ids, is_target in conversations]).sum() / num_targets

    def difference_if_joined(self, conversations: list[Conversation]) -> float:
        """Relative, of the loss, where attention crosses from one conversation to the next."""
        with torch.no_grad():
            return abs(float(self.mean_loss([joined(conversations)]) / self.mean_loss(conversations)) - 1)

    def loss_sum(self, ids: list[int], is_target: list[bool]) -> Tensor:
        logits: Tensor = self.model(input_ids=torch.tensor([ids])).logits[0]
        losses = functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        return losses[torch.tensor(is_target[1:])].sum()


def rendered(record: Record, tokenizer: Any) -> Conversation:
    """Targets are what the assistant says, and the end of its turn."""
    ids: list[int] = []
    is_target: list[bool] = []
    for message in record["messages"]:
        parts = [f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>", "\n"]
        for part, said in zip(parts, (False, message["role"] == "assistant", False), strict=True):
            found = tokenizer.encode(part, add_special_tokens=False)
            ids += found
            is_target += [said] * len(found)
    return ids, is_target


def unpacked(tokens: list[int], known: dict[tuple[int, ...], list[bool]]) -> list[Conversation]:
    """The conversations of a row, found by their own tokens; what follows them is padding."""
    found, start = [], 0
    while True:
        fitting = [ids for ids in known if tuple(tokens[start : start + len(ids)]) == ids]
        if not fitting:
            assert len(set(tokens[start:])) <= 1
            return found
        (ids,) = fitting
        found.append((list(ids), known[ids]))
        start += len(ids)


def joined(conversations: list[Conversation]) -> Conversation:
    """All as if they were one."""
    return [i for ids, _ in conversations for i in ids], [t for _, is_target in conversations for t in is_target]


def batches_of(
    store: Store, spec: RunSpec, dataset: DatasetManifest, base: Path, records: list[Record]
) -> list[list[Conversation]]:
    """Each step's conversations, in the run's order."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    known = {tuple(ids): is_target for ids, is_target in (rendered(record, tokenizer) for record in records)}
    reader = TokenReader(store, dataset, dataset.train, sequence_length=ROW_TOKENS - 1)
    order = SampleOrder(
        fingerprint=dataset.fingerprint,
        seed=spec.train.seed,
        num_samples=reader.num_samples,
        global_batch_size=spec.train.global_batch_size,
        sequence_length=reader.sequence_length,
    )
    rows = [reader.rows(order.batch(step))["tokens"] for step in range(STEPS)]
    batches = [[one for row in batch.tolist() for one in unpacked(row, known)] for batch in rows]
    assert min(len(batch) for batch in batches) >= 2 * spec.train.global_batch_size  # else nothing would be apart
    return batches


def test_losses_equal_those_of_transformers_and_peft(store: Store, ranks: dict[int, Ranks], base: Path) -> None:
    records = [conversation(number) for number in range(400)]
    spec = run_spec(store, base)
    dataset = prepared(store, spec, base, records)
    batches = batches_of(store, spec, dataset, base, records)
    plain = Plain(base, spec)
    crossing = [plain.difference_if_joined(batch) for batch in batches]
    expected = {number: plain.step(number - 1, batch) for number, batch in enumerate(batches, 1)}
    assert expected[STEPS] < 0.9 * expected[1]
    assert 0 < plain.num_clipped < STEPS
    assert max(crossing) > 5 * TOLERANCE  # so that attention over the borders would be noticed

    manifest = fetch(store, base)
    for size in (1, 2):
        job, _ = make_job(
            store, spec, f"alike-{size}", manifest, total_steps=STEPS, dataset=(dataset.name, dataset.fingerprint)
        )
        found = ranks[size].run(losses_of, job)[0]
        assert found == pytest.approx(expected, rel=TOLERANCE)
