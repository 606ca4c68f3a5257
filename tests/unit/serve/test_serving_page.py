"""docs/serving.md: its requests are taken, its answers are given, and its limits are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from workloads.serve import app
from workloads.serve.chat_api import MAX_MESSAGES, parse_chat
from workloads.serve.classify_api import classification, parse_classify
from workloads.serve.completion_api import DEFAULT_MAX_TOKENS
from workloads.serve.http import BODY_TIMEOUT_S, VERSION_HEADER
from workloads.serve.openai_api import MAX_BODY_BYTES, MAX_CHOICES, MAX_SEQUENCES, MAX_STOP, ApiError

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()


def shown(what: str) -> Any:
    (found,) = re.findall(rf"^```json {what}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return json.loads(found)


def test_the_requests_are_taken() -> None:
    chat = parse_chat(json.dumps(shown("chat")).encode())
    assert [message.role for message in chat.messages] == ["system", "user"]
    assert (chat.token_limit, chat.stop, chat.include_usage) == (200, ("\n\n",), True)
    assert len(parse_classify(json.dumps(shown("classify")).encode()).input) == 2


def test_the_answers_are_given() -> None:
    answer = classification(
        "classify-3f9c",
        created_s=1767225600.5,
        model="kinds",
        labels=("code", "text"),
        probabilities=[[0.75, 0.25], [0.125, 0.875]],
        num_tokens=15,
    )
    assert answer == shown("answer")
    with pytest.raises(ApiError) as caught:
        parse_classify(b"{}")
    assert caught.value.document() == shown("error")


def test_the_endpoints_are_those_that_there_are() -> None:
    page = PAGE.split("## Chat")[0]
    table = "\n".join(line for line in page.splitlines() if line.startswith("| `"))
    named = {span.replace("MODEL", "{model}") for span in re.findall(r"`(?:POST |GET )?(/[\w/]+)`", table)}
    assert named == {route.path for route in app.api.routes if isinstance(route, Route)}
    assert f"`{VERSION_HEADER}`" in page


@pytest.mark.parametrize(
    "limit",
    [
        f"at most {MAX_MESSAGES}, each",
        f"answers to give, at most {MAX_CHOICES} |",
        f"at most {MAX_STOP} texts",
        f"a list of at most {MAX_SEQUENCES}",
        f"ask for {MAX_SEQUENCES} sequences",
        f"which is {DEFAULT_MAX_TOKENS} by default",
        f"above {MAX_BODY_BYTES // 2**20} MiB",
        f"longer than {BODY_TIMEOUT_S:g} s to arrive",
    ],
)
def test_the_limits_are_those_of_the_code(limit: str) -> None:
    assert limit in PAGE
