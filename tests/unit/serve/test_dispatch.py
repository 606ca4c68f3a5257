from __future__ import annotations

import asyncio
import json
import weakref
from typing import Any

import pytest
from starlette.responses import Response, StreamingResponse

from tests.tiny_model import make_version
from tests.unit.serve.scripted import FILES, ScriptedEngine
from workloads.serve.completions import complete
from workloads.serve.dispatch import choose, dispatch
from workloads.serve.http import VERSION_HEADER
from workloads.serve.loaded import Loaded, Serving
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.openai_api import ApiError

BROKEN = NonFiniteLogits("The model's logits are not finite numbers.")


def loaded(number: int, engine: Any) -> Loaded:
    return Loaded(version=make_version(number=number, files=FILES), engine=engine)


class Asked:
    """A stable version 1 and a canary 2 that gets everything, and one request to them."""

    def __init__(self, stable: Any, canary: Any, *, weight: float = 0.999999999, timeout_s: float = 60.0) -> None:
        self.stable, self.canary = loaded(1, stable), loaded(2, canary)
        self._timeout_s = timeout_s
        self._serving = Serving(stable=self.stable, canary=self.canary, weight=weight)

    def answer(self, **fields: Any) -> tuple[str, bytes]:
        """The version that answered, and the body."""

        async def run() -> tuple[str, bytes]:
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            body = json.dumps({"model": "code-lm", "prompt": "x", **fields}).encode()
            chosen = choose(self._serving, key="somebody")
            response = await dispatch(complete, body, chosen, deadline_s=deadline_s)
            assert self.canary not in chosen  # it is held by its answer alone
            if isinstance(response, StreamingResponse):
                return response.headers[VERSION_HEADER], b"".join([bytes(x) async for x in response.body_iterator])
            return response.headers[VERSION_HEADER], bytes(response.body)

        return asyncio.run(run())

    def judged(self) -> tuple[int, int]:
        """Of the canary: requests and errors."""
        answered = self.canary.counter.counts().answered()
        return answered.requests, answered.errors


@pytest.mark.parametrize("stream", [False, True])
def test_the_canary_answers_its_share(stream: bool) -> None:
    asked = Asked(ScriptedEngine("old"), ScriptedEngine("new"))
    version, body = asked.answer(stream=stream)
    assert version == "code-lm@2"
    assert b"new" in body
    assert asked.judged() == (1, 0)
    assert Asked(ScriptedEngine("old"), ScriptedEngine("new"), weight=1e-9).answer()[0] == "code-lm@1"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", [(), ("ne",)])
def test_a_canary_that_fails_is_the_stable_versions_to_answer(stream: bool, words: tuple[str, ...]) -> None:
    asked = Asked(ScriptedEngine("old"), ScriptedEngine(*words, error=BROKEN))
    if stream and words:
        version, body = asked.answer(stream=True)
        assert version == "code-lm@2"
        assert b"non_finite_logits" in body  # it had begun: nothing can be taken back
    else:
        version, body = asked.answer(stream=stream)
        assert version == "code-lm@1"
        assert b"old" in body
    assert asked.judged() == (1, 1)
    assert asked.stable.counter.counts().failed == 0


def test_a_canary_that_is_full_is_not_blamed() -> None:
    asked = Asked(ScriptedEngine("old"), ScriptedEngine("new", full=True))
    assert asked.answer()[0] == "code-lm@1"
    assert asked.judged() == (0, 0)


def test_a_canary_that_refuses_what_the_stable_version_takes_is_blamed() -> None:
    short = ScriptedEngine("new")
    short.context_tokens = 5
    asked = Asked(ScriptedEngine("old"), short)
    assert asked.answer(max_tokens=10)[0] == "code-lm@1"
    assert asked.judged() == (1, 1)


def test_what_both_refuse_is_refused() -> None:
    asked = Asked(ScriptedEngine("old"), ScriptedEngine("new"))
    with pytest.raises(ApiError) as caught:
        asked.answer(max_tokens=1000)
    assert caught.value.status == 400
    assert asked.judged() == (0, 0)


def test_both_failing_is_an_error() -> None:
    asked = Asked(ScriptedEngine(error=BROKEN), ScriptedEngine(error=BROKEN))
    with pytest.raises(ApiError) as caught:
        asked.answer()
    assert caught.value.code == "non_finite_logits"
    assert asked.judged() == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_at_its_deadline(stream: bool) -> None:
    stuck = ScriptedEngine()
    stuck.stall = True
    asked = Asked(ScriptedEngine("old"), stuck, timeout_s=0.0)
    with pytest.raises(ApiError) as caught:
        asked.answer(stream=stream)
    assert (caught.value.status, caught.value.code) == (504, "timeout")
    assert asked.judged() == (1, 1)
    assert stuck.num_sequences == 0


@pytest.mark.parametrize(("weight", "versions"), [(1e-9, [1]), (0.999999999, [2, 1])])
def test_nothing_but_its_answer_keeps_a_version(weight: float, versions: list[int]) -> None:
    chosen = choose(Asked(ScriptedEngine("old"), ScriptedEngine("new"), weight=weight)._serving, key="somebody")
    references = [weakref.ref(each) for each in chosen]
    assert [each.version.number for each in chosen] == versions
    held: list[list[bool]] = []

    async def endpoint(body: bytes, asked: Loaded, deadline_s: float | None) -> Response:
        del asked
        held.append([reference() is not None for reference in references])
        raise ApiError(500, "broken")

    with pytest.raises(ApiError):
        asyncio.run(dispatch(endpoint, b"", chosen, deadline_s=0.0))
    assert held == ([[False]] if versions == [1] else [[False, True], [False, False]])
