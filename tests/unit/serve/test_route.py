from __future__ import annotations

import pytest

from workloads.serve.route import share_key, takes_canary


@pytest.mark.parametrize(
    ("body", "headers", "key"),
    [
        (b'{"user": "ann"}', {"x-session-id": "s", "x-request-id": "r"}, "ann"),
        (b'{"user": ""}', {"x-session-id": "s", "x-request-id": "r"}, "s"),
        (b'{"user": 3}', {"x-request-id": "r"}, "r"),
        (b"{}", {}, "random"),
        (b"{", {"x-session-id": ""}, "random"),
        (b"[" * 100_000, {}, "random"),
        (b"[]", {}, "random"),
        (b"\xff", {}, "random"),
    ],
)
def test_what_a_request_is_told_apart_by(body: bytes, headers: dict[str, str], key: str) -> None:
    assert share_key(body, headers, otherwise="random") == key


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.9])
def test_the_share_is_the_weight(weight: float) -> None:
    taken = sum(takes_canary(f"user-{number}", version=2, weight=weight) for number in range(10_000))
    assert taken / 10_000 == pytest.approx(weight, abs=0.02)


def test_a_user_stays_with_a_version_and_more_weight_takes_nobody_back() -> None:
    users = [f"user-{number}" for number in range(1000)]
    few = {user for user in users if takes_canary(user, version=2, weight=0.1)}
    assert few == {user for user in users if takes_canary(user, version=2, weight=0.1)}
    assert few < {user for user in users if takes_canary(user, version=2, weight=0.5)}
    assert few != {user for user in users if takes_canary(user, version=3, weight=0.1)}


def test_the_choice_does_not_change_between_releases_of_headway() -> None:
    assert [name for name in "abcdefgh" if takes_canary(name, version=7, weight=0.5)] == ["c", "e"]


def test_any_text_is_a_key() -> None:
    takes_canary("\ud800", version=1, weight=0.5)
