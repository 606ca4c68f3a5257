"""What is asked again, when, and what is never taken for an answer."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import pytest

from orchestrator.errors import StoreError
from orchestrator.store import Store
from orchestrator.store.client import UNATTENDED, Connection, Patience
from orchestrator.store.multipart import ViewFile

DATA = bytes(range(100))
EAGER = Patience(attempts=3, connect_timeout_s=1.0, read_timeout_s=1.0, first_wait_s=0.0)


class Breaking:
    """A body whose connection breaks."""

    def read(self) -> bytes:
        raise botocore.exceptions.ResponseStreamingError(error="broken")


class Damaged:
    """A body that does not match the checksum that the server sent along."""

    def read(self) -> bytes:
        raise botocore.exceptions.FlexibleChecksumError(error_msg="Expected checksum x did not match y")


class Bodies:
    """An S3 client that answers GetObject with these bodies, one after the other; the last again and again."""

    meta = SimpleNamespace(endpoint_url="", events=SimpleNamespace(register=lambda *_: None))

    def __init__(self, *bodies: Any, content_range: str | None = None) -> None:
        self.bodies = list(bodies)
        self.content_range = content_range

    def get_object(self, **_: object) -> dict[str, Any]:
        body = self.bodies.pop(0) if len(self.bodies) > 1 else self.bodies[0]
        body = io.BytesIO(body) if isinstance(body, bytes) else body
        return {"Body": body, **({"ContentRange": self.content_range} if self.content_range else {})}


def store_of(api: Bodies) -> Store:
    return Store("bucket", client=Connection(api, EAGER))


def test_a_body_that_is_lost_is_asked_for_again_and_counted() -> None:
    store = store_of(Bodies(Breaking(), Damaged(), DATA))
    assert store.get("key") == DATA
    assert store.retries == 2
    assert store.at("other").retries == 2


def test_a_body_that_is_lost_every_time_is_an_error_with_the_objects_name() -> None:
    store = store_of(Bodies(Breaking()))
    with pytest.raises(StoreError, match="s3://bucket/key"):
        store.get("key")
    assert store.retries == EAGER.attempts - 1


@pytest.mark.parametrize("wrong", [b"", DATA[10:19], DATA[10:21], DATA])
def test_a_range_of_the_wrong_length_is_a_failed_try(wrong: bytes) -> None:
    store = store_of(Bodies(wrong, DATA[10:20], content_range="bytes 10-19/100"))
    assert store.get_range("key", 10, 10) == DATA[10:20]
    with pytest.raises(StoreError, match="total bytes expected is 10"):
        store_of(Bodies(wrong, content_range="bytes 10-19/100")).get_range("key", 10, 10)


def test_a_range_may_be_short_at_the_objects_end_only() -> None:
    at_end = store_of(Bodies(DATA[95:], content_range="bytes 95-99/100"))
    assert at_end.get_range("key", 95, 10) == DATA[95:]
    with pytest.raises(StoreError):
        store_of(Bodies(DATA[95:])).get_range("key", 95, 10)


def test_waits_double_up_to_a_limit_and_end_with_the_attempts() -> None:
    patience = Patience(attempts=9, connect_timeout_s=1.0, read_timeout_s=1.0)
    waits_s = [patience.wait_s(attempt) for attempt in range(1, 10)]
    assert waits_s[-1] is None
    for wait_s, longest_s in zip(waits_s, [1, 2, 4, 8, 16, 20, 20, 20], strict=False):
        assert wait_s is not None
        assert longest_s / 2 <= wait_s <= longest_s


def test_ci_waits_out_an_outage_of_a_minute() -> None:
    waits_s = [UNATTENDED.wait_s(attempt) or 0.0 for attempt in range(1, UNATTENDED.attempts)]
    assert 120 <= sum(waits_s) <= 320, "at their shortest and at their longest"


def test_a_view_is_read_like_a_file() -> None:
    file, model = ViewFile(memoryview(DATA)[10:90]), io.BytesIO(DATA[10:90])
    for move in ((0, 0), (5, 0), (3, 1), (-7, 2), (100, 0), (0, 2), (-1, 1)):
        assert file.seek(*move) == model.seek(*move)
        assert file.tell() == model.tell()
        assert file.read(4) == model.read(4)
    assert (file.seek(0), file.read()) == (0, DATA[10:90])
