"""``headway run``: the door from the command line into ``workloads``, inside a Ray job."""

from __future__ import annotations

import importlib
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.errors import EnvironmentUnusable
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import load
from orchestrator.store.s3 import PATIENT

_CLUSTER, _PIPELINE = "workloads.cluster", "workloads.pipeline"  # by name: orchestrator imports nothing of workloads


def run(run_file: Path, store_uri: str | None, reporter: Reporter) -> Result:
    """Bring the run to its outcome on the Ray cluster that this process is part of."""
    spec = load(run_file)
    store = find_store(store_uri, patience=PATIENT)
    try:
        cluster = importlib.import_module(_CLUSTER)
        pipeline = importlib.import_module(_PIPELINE)
    except ModuleNotFoundError as e:
        raise EnvironmentUnusable(
            f"headway run executes training, and this installation lacks {e.name}.",
            next_step="Install it: pip install 'headway[train]'. To send the run elsewhere: headway submit",
        ) from e
    job_id = cluster.connect(reporter.say)
    outcome = pipeline.run(spec, store, working_directory=Path.cwd(), job_id=job_id, say=reporter.say)
    outcome.raise_unless_done()
    return outcome.model_dump(mode="json"), f"{outcome.run_id} is done: {outcome.facts.get('version', 'not released')}"
