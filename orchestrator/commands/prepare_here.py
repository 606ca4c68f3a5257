"""``headway prepare --here``: the door from the command line into ``workloads``, inside a Ray job."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.commands.prepare import check_preparable, facts_of
from orchestrator.dataset.format import DatasetManifest
from orchestrator.errors import EnvironmentUnusable
from orchestrator.record.report import words
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import load
from orchestrator.store.s3 import PATIENT

_CLUSTER, _DATASET_JOB = "workloads.cluster", "workloads.dataset_job"  # by name: orchestrator imports none of workloads


def prepare_here(run_file: Path, store_uri: str | None, reporter: Reporter) -> Result:
    """Make the dataset on the Ray cluster that this process is part of; where it exists, find it."""
    spec = load(run_file)
    check_preparable(spec)
    store = find_store(store_uri, patience=PATIENT)
    try:
        cluster = importlib.import_module(_CLUSTER)
        dataset_job = importlib.import_module(_DATASET_JOB)
    except ModuleNotFoundError as e:
        raise EnvironmentUnusable(
            f"headway prepare --here makes the dataset, and this installation lacks {e.name}.",
            next_step="Install it: pip install 'headway[train]'. To have it made elsewhere: headway prepare",
        ) from e
    began_s = time.monotonic()
    cluster.connect(reporter.say)
    made: DatasetManifest = dataset_job.prepare_dataset(spec, store, working_directory=Path.cwd(), say=reporter.say)
    facts = facts_of(made)
    seconds = round(time.monotonic() - began_s, 1)
    return {**facts, "seconds": seconds}, f"{facts['dataset']} made in {words.duration(seconds)}"
