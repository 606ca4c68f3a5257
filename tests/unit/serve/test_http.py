from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from starlette.requests import Request

from workloads.serve.http import error_response, read_body
from workloads.serve.openai_api import MAX_BODY_BYTES, ApiError


def read(*parts: bytes, timeout_s: float = 60.0, is_whole: bool = True) -> bytes:
    """The body of a request whose client sends these parts, and then nothing more though it is not whole."""

    async def run() -> bytes:
        left = list(parts)

        async def receive() -> MutableMapping[str, Any]:
            if not left:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not is_whole}

        return await read_body(Request({"type": "http", "method": "POST"}, receive), timeout_s=timeout_s)

    return asyncio.run(run())


def test_a_body_is_read_whole() -> None:
    assert read(b"{", b"}") == b"{}"


@pytest.mark.parametrize("parts", [(), (b"{",)])
def test_a_body_that_does_not_come_is_waited_for_no_longer_than_the_limit(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(ApiError) as caught:
        read(*parts, timeout_s=0.0, is_whole=False)
    response = error_response(caught.value)
    assert response.status_code == 408
    assert json.loads(bytes(response.body)) == {
        "error": {
            "message": "The body of the request took longer than 0 s.",
            "type": "invalid_request_error",
            "param": None,
            "code": "timeout",
        }
    }


def test_a_body_is_read_no_further_than_it_may_be_long() -> None:
    with pytest.raises(ApiError) as caught:
        read(b"x" * MAX_BODY_BYTES, b"x", is_whole=False)
    assert caught.value.status == 413
