"""The actor around the one decider of an application. Imports no torch, so that it starts fast and stays small."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestrator.store import open_store
from workloads.serve.decider import Decider
from workloads.serve.rejections import in_background
from workloads.serve.reports import ReplicaReport
from workloads.serve.settings import ServeSettings

_MIN_EXPIRE_S, _MISSED_REPORTS = 20.0, 5


class DeciderActor:
    """Takes documents, since Ray's way of sending objects would have to import their classes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        asked = ServeSettings.model_validate(settings)
        store = open_store(asked.store)
        self._decider = Decider(
            store=store,
            model=asked.model,
            channel=asked.channel,
            policy=asked.canary,
            expire_s=max(_MIN_EXPIRE_S, _MISSED_REPORTS * asked.poll_s),
            tell=in_background(store, asked.model, asked.channel),
        )

    async def report(self, document: dict[str, Any]) -> dict[str, Any]:
        report = ReplicaReport.model_validate(document)
        reply = await asyncio.to_thread(self._decider.report, report)
        return reply.model_dump(mode="json")
