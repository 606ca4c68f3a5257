"""An open-loop load: requests go out at a constant rate, however long the answers take. A process of its own, so that
nothing else that a benchmark does delays it.

    python -m tests.bench.rollout_load URL MODEL REQUESTS_PER_SECOND FILE

Ends at the end of its standard input, waits for what is under way, and writes a JSON line for each request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

PROMPT, MAX_TOKENS = "def __init__(self", 16
_MOST_UNDER_WAY = 200


async def send(url: str, model: str, *, rate: float, stop: asyncio.Event) -> list[dict[str, Any]]:
    """The requests in their order: wall-clock begin and end, HTTP status (0: none), and who answered."""
    found: list[dict[str, Any]] = []
    tasks: set[asyncio.Task[None]] = set()
    limits = httpx.Limits(max_connections=_MOST_UNDER_WAY, max_keepalive_connections=_MOST_UNDER_WAY)

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "user": f"user-{number}"}
        begun_s, status, version = time.time(), 0, ""
        try:
            response = await client.post(url, json=body)
            status, version = response.status_code, response.headers.get("x-headway-version", "")
        except httpx.TransportError as e:
            version = repr(e)
        found.append({"begun_s": begun_s, "ended_s": time.time(), "status": status, "version": version})

    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        start_s, number = time.monotonic(), 0
        while not stop.is_set():
            number += 1
            await asyncio.sleep(max(0.0, start_s + number / rate - time.monotonic()))
            assert len(tasks) < _MOST_UNDER_WAY, "the server does not keep up"
            task = asyncio.create_task(ask(client, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    return found


async def main() -> None:
    url, model, rate, path = sys.argv[1:]
    stop = asyncio.Event()

    async def wait_for_end() -> None:
        await asyncio.to_thread(sys.stdin.read)
        stop.set()

    waiting = asyncio.create_task(wait_for_end())
    found = await send(url, model, rate=float(rate), stop=stop)
    await waiting
    Path(path).write_text("".join(json.dumps(each) + "\n" for each in found))


if __name__ == "__main__":
    asyncio.run(main())
