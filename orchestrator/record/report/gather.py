"""Reads from the store what a report is made of, and leaves the report of a run that has ended there."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from itertools import islice
from typing import Any

from orchestrator.checkpoint.catalog import committed_steps
from orchestrator.dataset.format import read_manifest
from orchestrator.errors import AlreadyExists, IntegrityError, NotFound
from orchestrator.record.cost import cost_of
from orchestrator.record.goodput import account
from orchestrator.record.model import RunRecord
from orchestrator.record.report.build import build
from orchestrator.record.report.curves import number
from orchestrator.record.report.model import Against, Facts, Report
from orchestrator.record.report.page import to_html
from orchestrator.record.report.summary import summary
from orchestrator.record.run_record import read_record
from orchestrator.release.bootstrap import paired_interval
from orchestrator.release.versions import Version, read_version
from orchestrator.store import Store, layout
from orchestrator.target_settings import Prices

logger = logging.getLogger(__name__)
MAX_OBJECTS = 50_000
"""Of a run's events, which are read into memory: three days, some 400 MB. The job may have no more to spare."""


def read_report(store: Store, run_id: str, *, now_s: float, prices: Prices | None = None) -> Report:
    """The report of a run as it stands.

    Args:
        prices: None tells no cost.

    Raises:
        StoreError: its record cannot be read. What else belongs to it and is gone is left out.
    """
    record = read_record(store, run_id, now_s=now_s)
    goodput = account(record)
    cost = cost_of(record, goodput, prices) if prices is not None else None
    return build(record, goodput, read_facts(store, record), cost=cost)


def leave_report(store: Store, run_id: str, *, now_s: float | None = None) -> None:
    """Store ``report.html`` and ``summary.json`` of a run that has its outcome, unless they are there.

    Raises nothing: no run hangs on its report.
    """
    try:
        if store.exists(layout.summary(run_id)):
            return
        if sum(1 for _ in islice(store.list(layout.events(run_id)), MAX_OBJECTS + 1)) > MAX_OBJECTS:
            logger.warning("The record of %s is long; its report is not stored. Make it: headway report", run_id)
            return
        report = read_report(store, run_id, now_s=time.time() if now_s is None else now_s)
        with suppress(AlreadyExists):  # of an attempt that died right after
            store.create(layout.report(run_id), to_html(report).encode())
        with suppress(AlreadyExists):
            store.create_json(layout.summary(run_id), summary(report))
    except Exception as e:  # whatever it is: the run has come to its outcome
        logger.warning("The report of %s is not stored: %s", run_id, e)


def read_facts(store: Store, record: RunRecord) -> Facts:
    """What the store knows beside the record."""
    return Facts(
        dataset=_or_none(_dataset, store, record),
        against=_or_none(_against, store, record),
        num_checkpoints=len(committed_steps(store, record.run_id)),
    )


def _or_none(look: Any, store: Store, record: RunRecord) -> Any:
    """What ``look`` finds, or None where it is gone or damaged."""
    try:
        return look(store, record)
    except (NotFound, IntegrityError) as e:
        logger.info("%s is left out of the report of %s: %s", look.__name__.strip("_"), record.run_id, e)
        return None


def _dataset(store: Store, record: RunRecord) -> dict[str, Any] | None:
    data, fingerprint = record.spec.get("spec", {}).get("data", {}), record.spec.get("dataset_fingerprint")
    if not fingerprint:
        return None
    name = (data.get("dataset") or record.spec["spec"]["name"]).partition("@")[0]
    manifest = read_manifest(store, name, fingerprint)
    return {
        "source": manifest.source.get("pattern"),
        "num_files": manifest.source.get("num_files"),
        "num_bytes": manifest.source.get("num_bytes"),
        "train_tokens": manifest.train.num_tokens,
        "eval_tokens": manifest.eval.num_tokens,
        "vocabulary": manifest.tokenizer.vocab_size,
    }


def _against(store: Store, record: RunRecord) -> Against | None:
    """The version that the gate held the run against, and how both compare on the same samples."""
    release = record.spec.get("spec", {}).get("release") or {}
    told = (record.outcome or {}).get("facts", {}).get("gate") or {}
    if not release or told.get("against_version") is None:
        return None
    version = read_version(store, release["model"], told["against_version"])
    loss, interval = _or_none(lambda *_: _compared(store, record.run_id, version), store, record) or (None, None)
    return Against(
        name=version.name,
        figures={name: value for name in version.evaluation if (value := number(version.evaluation[name])) is not None},
        same_split=version.dataset.fingerprint == record.spec.get("dataset_fingerprint"),
        loss=loss,
        interval=interval,
    )


def _compared(store: Store, run_id: str, version: Version) -> Any:
    """The version's loss on the run's samples, and the interval of the difference.

    Raises:
        NotFound: it was not evaluated on them.
    """
    mine = store.get_json(layout.evaluation(run_id))["blocks"]
    theirs = store.get_json(layout.comparison(run_id, version.number))["blocks"]
    if mine["num_targets"] != theirs["num_targets"]:
        return None
    loss = sum(theirs["losses"]) / max(1, sum(theirs["num_targets"]))
    return (loss if math.isfinite(loss) else None), paired_interval(
        mine["losses"], theirs["losses"], mine["num_targets"]
    )
