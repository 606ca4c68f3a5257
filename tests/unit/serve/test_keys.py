from __future__ import annotations

import hashlib

import pytest

from orchestrator.errors import EnvironmentUnusable
from workloads.serve.keys import KEYS_VARIABLE, ApiKeys
from workloads.serve.openai_api import ApiError


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = ApiKeys.from_environment({KEYS_VARIABLE: f"{digest('one')}, {digest('two').upper()}"})


@pytest.mark.parametrize("authorization", ["Bearer one", "Bearer two", "bearer  two"])
def test_a_key_opens(authorization: str) -> None:
    KEYS.require(authorization)


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer three", "one", "Basic one", f"Bearer {digest('one')}"])
def test_anything_else_does_not(authorization: str) -> None:
    with pytest.raises(ApiError) as caught:
        KEYS.require(authorization)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_without_keys_everybody_may_ask() -> None:
    ApiKeys.from_environment({}).require("")


@pytest.mark.parametrize("value", ["", "one", digest("one") + ",", digest("one")[:-1], digest("one") + "0"])
def test_what_are_no_digests_opens_nothing(value: str) -> None:
    with pytest.raises(EnvironmentUnusable, match="sha256sum"):
        ApiKeys.from_environment({KEYS_VARIABLE: value})
