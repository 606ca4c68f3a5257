"""Every exception of botocore becomes one of ours, with the object's name and what to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3.exceptions
import botocore.exceptions
import pytest

from orchestrator.errors import AlreadyExists, HeadwayError, IntegrityError, NotFound, StoreError
from orchestrator.store import Store
from orchestrator.store.client import Connection


class FailingClient:
    """An S3 client whose every call raises."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name == "meta":
            return SimpleNamespace(
                endpoint_url="http://127.0.0.1:1", events=SimpleNamespace(register=lambda *_, **__: None)
            )

        def call(*_: object, **__: object) -> Any:
            self.num_calls += 1
            raise self._errors[0] if len(self._errors) == 1 else self._errors.pop(0)

        return call


def refused(code: str, status: int) -> botocore.exceptions.ClientError:
    answer = {"Error": {"Code": code, "Message": "said so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "Operation")


def transfer_failed(cause: Exception) -> boto3.exceptions.S3UploadFailedError:
    error = boto3.exceptions.S3UploadFailedError("failed to upload")
    error.__cause__ = cause
    return error


CASES: list[tuple[Exception, type[HeadwayError], str, str]] = [
    (refused("NoSuchKey", 404), NotFound, "no such object", ""),
    (refused("404", 404), NotFound, "no such object", ""),
    (refused("NoSuchBucket", 404), StoreError, "no such bucket", "Create the bucket"),
    (refused("AccessDenied", 403), StoreError, "AccessDenied", "rights"),
    (refused("403", 403), StoreError, "403", "rights"),
    (refused("InvalidAccessKeyId", 403), StoreError, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
    (refused("SignatureDoesNotMatch", 403), StoreError, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
    (refused("InternalError", 500), StoreError, "InternalError", ""),
    (botocore.exceptions.FlexibleChecksumError(error_msg="did not match"), IntegrityError, "comes damaged", ""),
    (botocore.exceptions.NoCredentialsError(), StoreError, "no S3 credentials", "AWS_ACCESS_KEY_ID"),
    (
        botocore.exceptions.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
        StoreError,
        "no S3 credentials",
        "AWS_ACCESS_KEY_ID",
    ),
    (
        botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        StoreError,
        "cannot be reached",
        "AWS_ENDPOINT_URL",
    ),
    (
        botocore.exceptions.ConnectTimeoutError(endpoint_url="http://127.0.0.1:1"),
        StoreError,
        "cannot be reached",
        "AWS_ENDPOINT_URL",
    ),
    (
        botocore.exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"),
        StoreError,
        "cannot be reached",
        "AWS_ENDPOINT_URL",
    ),
    (
        botocore.exceptions.ConnectionClosedError(endpoint_url="http://127.0.0.1:1"),
        StoreError,
        "cannot be reached",
        "AWS_ENDPOINT_URL",
    ),
    (
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        StoreError,
        "expected",
        "",
    ),
    (transfer_failed(refused("AccessDenied", 403)), StoreError, "AccessDenied", "rights"),
    (transfer_failed(ValueError("odd")), StoreError, "failed to upload", ""),
]


@pytest.mark.parametrize(("error", "kind", "message", "next_step"), CASES)
def test_each_exception_becomes_ours(
    error: Exception, kind: type[HeadwayError], message: str, next_step: str, tmp_path: Path
) -> None:
    store = Store("bucket", "prefix", client=Connection(FailingClient(error)))
    for act in (
        lambda: store.get("key"),
        lambda: store.get_range("key", 0, 1),
        lambda: store.create("key", b""),
        lambda: store.upload("key", b""),
        lambda: store.put_status("key", {}),
        lambda: store.download("key", tmp_path / "file", sha256=""),
        lambda: store.delete(["key"]),
    ):
        with pytest.raises(kind) as caught:
            act()
        assert type(caught.value) is kind
        assert caught.value.message.startswith("s3://bucket/prefix/")
        assert message in caught.value.message
        assert next_step in caught.value.next_step


def test_only_a_missing_object_does_not_exist() -> None:
    assert not Store("bucket", client=Connection(FailingClient(refused("404", 404)))).exists("key")
    with pytest.raises(StoreError):
        Store("bucket", client=Connection(FailingClient(refused("403", 403)))).exists("key")


def test_a_lost_race_is_read_back() -> None:
    class Raced(FailingClient):
        def get_object(self, **_: object) -> Any:
            import io

            return {"Body": io.BytesIO(b"mine")}

    store = Store("bucket", client=Connection(Raced(refused("PreconditionFailed", 412))))
    store.create("key", b"mine")
    with pytest.raises(AlreadyExists):
        store.create("key", b"other")


def test_a_write_under_way_is_tried_again_and_not_for_ever() -> None:
    client = FailingClient(refused("ConditionalRequestConflict", 409))
    with pytest.raises(StoreError, match="under way"):
        Store("bucket", client=Connection(client)).create("key", b"")
    assert client.num_calls > 1
