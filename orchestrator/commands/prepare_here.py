"""``headway prepare --here``: makes a dataset, inside a Ray job."""

from __future__ import annotations

import time
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.commands.inside import modules_of_workloads
from orchestrator.commands.prepare import check_preparable, facts_of
from orchestrator.dataset.format import DatasetManifest
from orchestrator.record.report import words
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import load
from orchestrator.store.s3 import PATIENT


def prepare_here(run_file: Path, store_uri: str | None, reporter: Reporter) -> Result:
    """Make the dataset on the Ray cluster that this process is part of; where it exists, find it."""
    spec = load(run_file)
    check_preparable(spec)
    store = find_store(store_uri, patience=PATIENT)
    cluster, dataset_job = modules_of_workloads(
        "cluster",
        "dataset_job",
        does="headway prepare --here makes the dataset",
        elsewhere="To have it made elsewhere: headway prepare",
    )
    began_s = time.monotonic()
    cluster.connect(reporter.say)
    made: DatasetManifest = dataset_job.prepare_dataset(spec, store, working_directory=Path.cwd(), say=reporter.say)
    facts = facts_of(made)
    seconds = round(time.monotonic() - began_s, 1)
    return {**facts, "seconds": seconds}, f"{facts['dataset']} made in {words.duration(seconds)}"
