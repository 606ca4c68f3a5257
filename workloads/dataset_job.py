"""What ``headway prepare --here`` executes inside a Ray job: the prepare stage of a run file, without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.dataset.format import DatasetManifest
from orchestrator.runs import identify
from orchestrator.spec import RunSpec
from orchestrator.store import Store
from orchestrator.store.probe import require_conditional_writes
from workloads.cluster import own_errors
from workloads.fetch_base import as_ray_tasks, fetch_base
from workloads.prepare import prepare_identified

if TYPE_CHECKING:
    from workloads.tasks.base_context import BaseContext


def prepare_dataset(
    spec: RunSpec, store: Store, *, working_directory: Path, say: Callable[[str], None]
) -> DatasetManifest:
    """The dataset of the run file's ``data.train``; made where it does not exist, on the cluster that is joined.

    A pretrained model, whose tokenizer the data gets, is copied into the store first, as a run would do.

    Raises:
        HeadwayError: the next call goes on from what was made.
    """
    require_conditional_writes(store)
    identity = identify(spec, store, working_directory, edition=0)
    with own_errors():
        base: BaseContext | None = None
        if identity.base is not None:
            from workloads.tasks.base_context import base_context  # here: it takes seconds to import

            say("base …")
            base = base_context(spec, store, fetch_base(identity.base, store, run_all=as_ray_tasks).fingerprint)
        say("prepare …")
        return prepare_identified(spec, identity, store, base=base, say=say)
