"""The only caller of S3. Credentials, region and endpoint follow boto3's own chain and variables.

Semantics used: PutObject with ``If-None-Match: *`` answers 412 where the key exists and 409 where another
conditional write of it is under way (Amazon S3 User Guide, "Conditional requests").
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound, StoreError, UsageError
from orchestrator.spec import canonical_json

STORE_VARIABLE = "HEADWAY_STORE"
CONFLICT_TRIES = 6
PART_BYTES = 16 * 2**20
_TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8)
_SETTINGS = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region_name": "AWS_REGION",
}
_GONE = {"404", "NoSuchKey", "NotFound"}
_NEXT_STEP = {
    "NoSuchBucket": "Create the bucket, or name another with --store or HEADWAY_STORE.",
    "AccessDenied": "Check the rights of these credentials on this prefix.",
    "403": "Check the rights of these credentials on this prefix.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID, or the profile in use.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY, or the profile in use.",
}


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long one request is tried for. Between attempts botocore waits up to 1, 2, 4, … s, at random."""

    attempts: int
    connect_timeout_s: float
    read_timeout_s: float


PATIENT = Patience(attempts=6, connect_timeout_s=5.0, read_timeout_s=60.0)
"""For programs: a server that restarts costs them half a minute and nothing else."""
PROMPT = Patience(attempts=3, connect_timeout_s=4.0, read_timeout_s=10.0)
"""For people: a server that is down is named within 3 s, one that swallows connections within 15 s."""


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One object of a listing. ``key`` is relative to the listing's store."""

    key: str
    size_bytes: int
    etag: str
    modified_s: float


class Store:
    """An S3 prefix. Keys given and returned are relative to it. Safe to use from several threads."""

    def __init__(self, bucket: str, prefix: str = "", *, client: Any = None) -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._client = client or new_client(PATIENT)

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def at(self, bucket: str, prefix: str = "") -> Store:
        """Another place reached with the same client: a source of data, say."""
        return Store(bucket, prefix, client=self._client)

    # -- reading

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            NotFound: no such object. StoreError: anything else.
        """
        with _translated(self, key):
            body: bytes = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()
        return body

    def get_json(self, key: str) -> Any:
        """A JSON object, parsed.

        Raises:
            NotFound: no such object. IntegrityError: not JSON.
        """
        data = self.get(key)
        try:
            return json.loads(data)
        except ValueError as e:
            raise IntegrityError(f"{self.uri_of(key)} is not JSON: {e}.") from e

    def get_range(self, key: str, start: int, num_bytes: int) -> bytes:
        """``num_bytes`` bytes from ``start``; fewer come back only at the object's end."""
        if num_bytes == 0:
            return b""
        span = f"bytes={start}-{start + num_bytes - 1}"
        with _translated(self, key):
            answer = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, Range=span)
            body: bytes = answer["Body"].read()
        return body

    def get_verified(self, key: str, *, sha256: str, size_bytes: int) -> bytes:
        """The whole object, checked against its digest.

        Raises:
            IntegrityError: other bytes than those that were recorded.
        """
        data = self.get(key)
        if len(data) != size_bytes or hashlib.sha256(data).hexdigest() != sha256:
            raise IntegrityError(
                f"{self.uri_of(key)} holds {len(data)} bytes that do not match its recorded digest "
                f"({size_bytes} bytes, sha256 {sha256[:12]}…)."
            )
        return data

    def download(self, key: str, path: Path, *, sha256: str) -> None:
        """Fetch to ``path`` in parallel ranges. The file appears there only if its digest matches."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with _translated(self, key):
                self._client.download_file(self.bucket, self.prefix + key, str(partial), Config=_TRANSFER)
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise IntegrityError(f"{self.uri_of(key)} does not match its recorded digest sha256 {sha256[:12]}….")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        try:
            with _translated(self, key):
                self._client.head_object(Bucket=self.bucket, Key=self.prefix + key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with ``prefix``, in key order (UTF-8)."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket,
            Prefix=self.prefix + prefix,
            **({"StartAfter": self.prefix + start_after} if start_after else {}),
        )
        with _translated(self, prefix):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield ObjectInfo(
                        key=item["Key"][len(self.prefix) :],
                        size_bytes=item["Size"],
                        etag=item["ETag"].strip('"'),
                        modified_s=item["LastModified"].timestamp(),
                    )

    def list_folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under ``prefix``, in order."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix, Delimiter="/"
        )
        with _translated(self, prefix):
            for page in pages:
                for item in page.get("CommonPrefixes", ()):
                    yield item["Prefix"][len(self.prefix) + len(prefix) :].rstrip("/")

    # -- writing

    def create(self, key: str, data: bytes) -> None:
        """Create the object; this and nothing else commits anything.

        A 412 is read back: my own bytes there mean that an earlier try of this very call won, so callers
        who race for a name put a nonce into ``data``.

        Raises:
            AlreadyExists: another writer's object has this key.
        """
        for tried in range(CONFLICT_TRIES):
            try:
                with _translated(self, key):
                    self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data, IfNoneMatch="*")
                return
            except AlreadyExists:
                if self.get(key) == data:
                    return
                raise
            except _WriteUnderWay:
                time.sleep(random.uniform(0, 0.05 * 2**tried))
        raise StoreError(f"{self.uri_of(key)}: other writes of it were under way in {CONFLICT_TRIES} tries.")

    def create_json(self, key: str, value: Any) -> None:
        """:meth:`create` with canonical JSON."""
        self.create(key, canonical_json(value))

    def create_numbered(self, last: int, key_of: Any, value: dict[str, Any]) -> int:
        """Claim the first free number after ``last`` with ``value``, which carries a nonce."""
        claimed = last + 1
        while True:
            try:
                self.create_json(key_of(claimed), {**value, "number": claimed})
                return claimed
            except AlreadyExists:
                claimed += 1

    def upload(self, key: str, source: bytes | BinaryIO | Path) -> None:
        """Write a data object under a key that only this writer owns; by parallel parts where it is large."""
        with _translated(self, key):
            if isinstance(source, bytes) and len(source) <= PART_BYTES:
                self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=source)
            elif isinstance(source, Path):
                self._client.upload_file(str(source), self.bucket, self.prefix + key, Config=_TRANSFER)
            else:
                import io

                file = io.BytesIO(source) if isinstance(source, bytes) else source
                self._client.upload_fileobj(file, self.bucket, self.prefix + key, Config=_TRANSFER)

    def put_status(self, key: str, value: Any) -> None:
        """Overwrite a status object. Only for keys that have one writer."""
        with _translated(self, key):
            self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=canonical_json(value))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are gone already do not matter."""
        batch = list(keys)
        for start in range(0, len(batch), 1000):
            part = [{"Key": self.prefix + key} for key in batch[start : start + 1000]]
            with _translated(self, part[0]["Key"]):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": part, "Quiet": True})
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise StoreError(f"s3://{self.bucket}/{first['Key']}: not deleted: {first.get('Message')}.")


class _WriteUnderWay(StoreError):
    """409: another conditional write of this key is in flight; ask again."""


class _translated:  # noqa: N801  used as a statement
    """Turns botocore's exceptions into ours, naming the object and what to do."""

    def __init__(self, store: Store, key: str) -> None:
        self.uri = store.uri_of(key)
        self.endpoint = str(getattr(getattr(store._client, "meta", None), "endpoint_url", ""))

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, botocore.exceptions.ClientError):
            raise self._refused(error) from error
        if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.PartialCredentialsError):
            raise StoreError(
                f"{self.uri}: no S3 credentials were found.",
                next_step="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile.",
            ) from error
        if isinstance(error, botocore.exceptions.HTTPClientError | botocore.exceptions.ConnectionError):
            raise StoreError(
                f"{self.uri}: the S3 server at {self.endpoint} cannot be reached ({type(error).__name__}).",
                next_step="Is it running, and is AWS_ENDPOINT_URL right? For the embedded one: headway up",
            ) from error
        if isinstance(error, botocore.exceptions.BotoCoreError | boto3.exceptions.Boto3Error):
            cause = error.__cause__ or error.__context__
            if isinstance(cause, botocore.exceptions.ClientError):
                raise self._refused(cause) from error
            raise StoreError(f"{self.uri}: {error}.") from error

    def _refused(self, error: Any) -> StoreError:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        code = str(error.response.get("Error", {}).get("Code", status))
        if code == "NoSuchBucket":
            return StoreError(f"{self.uri}: there is no such bucket.", next_step=_NEXT_STEP[code])
        if code in _GONE or status == 404:
            return NotFound(f"{self.uri}: no such object.")
        if code == "PreconditionFailed" or status == 412:
            return AlreadyExists(f"{self.uri} exists already.")
        if status == 409:
            return _WriteUnderWay(f"{self.uri}: another write of it is under way.")
        message = error.response.get("Error", {}).get("Message", "")
        return StoreError(f"{self.uri}: S3 answered {code}: {message}", next_step=_NEXT_STEP.get(code, ""))


def open_store(uri: str | None = None, *, patience: Patience = PATIENT) -> Store:
    """The store at ``uri``, else at ``HEADWAY_STORE``.

    Raises:
        UsageError: no store was named, or it is not an ``s3://`` address.
    """
    chosen = uri or os.environ.get(STORE_VARIABLE, "")
    if not chosen:
        raise UsageError(
            "No store is set.",
            next_step=f"Set {STORE_VARIABLE}=s3://bucket/prefix, give --store, or start the embedded one: headway up",
        )
    return Store(*split_uri(chosen), client=new_client(patience))


def split_uri(uri: str) -> tuple[str, str]:
    """``s3://bucket/some/prefix`` as ``("bucket", "some/prefix")``."""
    parts = urlsplit(uri)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"{uri!r} is not an S3 address.", next_step="Write it as s3://bucket/prefix")
    return parts.netloc, uri.removeprefix(f"s3://{parts.netloc}").strip("/")


def new_client(patience: Patience, settings: Mapping[str, str] | None = None) -> Any:
    """A boto3 client. ``settings`` are AWS_… variables that count in place of this process's own.

    Raises:
        StoreError: the variables or the profile make no sense to boto3.
    """
    given = {name: (settings or {}).get(variable) for name, variable in _SETTINGS.items()}
    logging.getLogger("botocore").setLevel(logging.WARNING)  # else every Ray worker tells where its keys come from
    config = Config(
        retries={"mode": "standard", "max_attempts": patience.attempts},
        connect_timeout=patience.connect_timeout_s,
        read_timeout=patience.read_timeout_s,
        max_pool_connections=32,
        user_agent_extra="headway",
    )
    try:
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        return session.client("s3", config=config, **{"region_name": region} | {k: v for k, v in given.items() if v})
    except botocore.exceptions.BotoCoreError as e:
        raise StoreError(f"No S3 client can be made: {e}.", next_step="Check the AWS_… variables and profile.") from e
