"""What an exported model makes of some held-out samples, for people to read. The evaluation never fails over it."""

from __future__ import annotations

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.dataset.format import DatasetManifest
from orchestrator.dataset.reader import TokenReader
from orchestrator.dataset.tokenizer import fetch_tokenizer
from orchestrator.spec import RunSpec
from orchestrator.store import Store
from workloads.tasks import Samples, Task

logger = logging.getLogger(__name__)
NUM_ROWS = 8
_SEED = 0x5A3


def held_out_answers(
    spec: RunSpec, task: Task, model: Any, dataset: DatasetManifest, store: Store
) -> list[dict[str, str]]:
    """The task's answers to rows from all over the held-out split; none where it has none, or failed to give any."""
    if type(task).answers is Task.answers:
        return []
    try:
        reader = TokenReader(store, dataset, dataset.eval, sequence_length=spec.data.sequence_length)
        count = min(NUM_ROWS, reader.num_samples)
        rows = reader.rows(np.linspace(0, reader.num_samples - 1, count).astype(np.int64))
        samples = Samples(rows=rows, num_real=count, row_rng=lambda row: np.random.default_rng([_SEED, row]))
        return task.answers(model, samples, partial(_decoder(store, dataset).decode, skip_special_tokens=True))
    except Exception as e:  # whatever it is: a model that was evaluated is not worse for it
        logger.warning("There are no samples of the model's answers: %s: %s", type(e).__name__, e)
        return []


def _decoder(store: Store, dataset: DatasetManifest) -> Any:
    import tokenizers

    with tempfile.TemporaryDirectory(prefix="headway-answers-") as folder:
        directory = fetch_tokenizer(store, dataset, Path(folder))
        return tokenizers.Tokenizer.from_file(str(directory / dataset.tokenizer.file))
