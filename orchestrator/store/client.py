"""The connection to S3: boto3's client, what is tried again and when, and its exceptions in our words.

Every request is tried again here, not by botocore: its retry quota gives up early when many requests fail at once, and
its waits (0.05 s, doubled) end before a server that restarts is back.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import botocore.parsers
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from orchestrator.errors import AlreadyExists, IntegrityError, NotFound, StoreError

logger = logging.getLogger(__name__)
PART_BYTES = 16 * 2**20
UPLOAD_CONCURRENCY = 8
_LONGEST_WAIT_S = 20.0
_TOLD_FROM_S = 8.0  # a wait that long comes after others: this is no hiccup
_SETTINGS = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID",
    "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region_name": "AWS_REGION",
}
_GONE = {"404", "NoSuchKey", "NotFound", "NoSuchUpload"}
_NEXT_STEP = {
    "NoSuchBucket": "Create the bucket, or name another with --store or HEADWAY_STORE.",
    "AccessDenied": "Check the rights of these credentials on this prefix.",
    "403": "Check the rights of these credentials on this prefix.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID, or the profile in use.",
    "RequestTimeTooSkewed": "Set this machine's clock right, and keep it so with NTP.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY, or the profile in use.",
}

_PASSING_STATUSES = {429, 500, 502, 503, 504}
_PASSING_CODES = {
    "SlowDown",
    "RequestTimeout",  # the body did not arrive in time
    "IncompleteBody",
    "BadDigest",  # the body was damaged on its way
    "XAmzContentSHA256Mismatch",
}
_UNREACHABLE = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError)
_BODY_LOST = (
    *_UNREACHABLE,  # with the read time-out and the broken stream among them
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    urllib3.exceptions.HTTPError,  # TLS errors, which botocore lets through from a body
)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long one request is tried for.

    After the n-th failed attempt comes a wait of ``first_wait_s × 2^(n-1)``, at most 20 s, less up to half of it at
    random, so that clients do not come back all at once.
    """

    attempts: int
    connect_timeout_s: float
    read_timeout_s: float
    """The longest silence within an answer, not the length of all of it."""
    first_wait_s: float = 1.0

    def wait_s(self, attempt: int) -> float | None:
        """How long to wait after failed ``attempt`` (from 1); None where it was the last."""
        if attempt >= self.attempts:
            return None
        longest_s = min(math.ldexp(self.first_wait_s, attempt - 1), _LONGEST_WAIT_S)
        return longest_s * random.uniform(0.5, 1.0)


PATIENT = Patience(attempts=6, connect_timeout_s=5.0, read_timeout_s=60.0)
"""For programs: a server that restarts within 15 s costs them half a minute and nothing else."""
UNATTENDED = Patience(attempts=20, connect_timeout_s=5.0, read_timeout_s=60.0)
"""For CI: an outage of two minutes costs nothing but its time; after five at most, it is told."""
PROMPT = Patience(attempts=3, connect_timeout_s=4.0, read_timeout_s=10.0)
"""For people: a server that is down is named within 3 s, one that swallows connections within 15 s."""


class Connection:
    """A boto3 client with its patience. Safe to use from several threads."""

    def __init__(self, api: Any, patience: Patience = PATIENT, settings: Mapping[str, str] | None = None) -> None:
        self.api = api
        self.endpoint_url = str(api.meta.endpoint_url)
        self.num_retries = 0
        """Requests, and bodies of answers, that were asked for again since this connection was made."""
        self.process = os.getpid()
        self._patience, self._settings = patience, settings
        self._lock = threading.Lock()
        api.meta.events.register("before-parse.s3", _refuse_short_answer)
        api.meta.events.register("needs-retry.s3", self._wait_after)

    def renewed(self) -> Connection:
        """Another, made as this one was: for a forked process, which may not share its sockets and locks."""
        return new_client(self._patience, self._settings)

    def read(self, **request: Any) -> bytes:
        """The body of GetObject. One that breaks off, stalls, or is damaged on its way is asked for again.

        Raises:
            botocore's and urllib3's exceptions: what the last attempt met.
        """
        attempt = 1
        while True:
            answer = self.api.get_object(**request)
            try:
                body: bytes = answer["Body"].read()
                _require_whole_range(request.get("Range"), answer.get("ContentRange"), len(body))
                return body
            except _BODY_LOST:
                wait_s = self._count(self._patience.wait_s(attempt))
                if wait_s is None:
                    raise
            attempt += 1
            time.sleep(wait_s)

    def _wait_after(self, attempts: int, response: Any, caught_exception: Any, **_: Any) -> float | None:
        """botocore's question whether to send a request again; the answer is how long to wait before, in s."""
        if response is None:
            passing = isinstance(caught_exception, _UNREACHABLE)
        else:
            http, parsed = response
            passing = http.status_code in _PASSING_STATUSES or parsed.get("Error", {}).get("Code") in _PASSING_CODES
        return self._count(self._patience.wait_s(attempts)) if passing else None

    def _count(self, wait_s: float | None) -> float | None:
        if wait_s is not None:
            if wait_s >= _TOLD_FROM_S:
                logger.warning("The S3 server at %s fails; asked again in %.0f s.", self.endpoint_url, wait_s)
            with self._lock:
                self.num_retries += 1
        return wait_s


def _require_whole_range(asked: str | None, given: str | None, num_bytes: int) -> None:
    """``asked`` is the Range (``bytes=2-9``); ``given`` is the Content-Range (``bytes 2-7/8``) of what came."""
    if asked is None:
        return
    first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
    if given is not None:
        last = min(last, int(given.rpartition("/")[2]) - 1)
    if num_bytes != last - first + 1:
        raise botocore.exceptions.IncompleteReadError(actual_bytes=num_bytes, expected_bytes=last - first + 1)


def _refuse_short_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
    """Turn an answer that broke off into a 500, which is asked for again.

    botocore does not check Content-Length, and takes an empty body for an empty listing, or for a success.
    """
    body, declared = response_dict["body"], response_dict["headers"].get("content-length")
    if operation_model.http["method"] == "HEAD" or not isinstance(body, bytes) or declared is None:
        return
    if len(body) != int(declared):
        response_dict["status_code"], response_dict["body"] = 500, b""


def new_client(patience: Patience, settings: Mapping[str, str] | None = None) -> Connection:
    """A connection by boto3's own chain. ``settings`` are AWS_… variables that count in place of this process's own.

    Raises:
        StoreError: the variables or the profile make no sense to boto3.
    """
    given = {name: (settings or {}).get(variable) for name, variable in _SETTINGS.items()}
    logging.getLogger("botocore").setLevel(logging.WARNING)  # else every Ray worker tells where its keys come from
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},  # Connection tries again
        connect_timeout=patience.connect_timeout_s,
        read_timeout=patience.read_timeout_s,
        max_pool_connections=32,
        user_agent_extra="headway",
    )
    try:
        session = boto3.session.Session()
        region = session.region_name or "us-east-1"
        chosen = {"region_name": region} | {name: value for name, value in given.items() if value}
        return Connection(session.client("s3", config=config, **chosen), patience, settings)
    except botocore.exceptions.BotoCoreError as e:
        raise StoreError(f"No S3 client can be made: {e}.", next_step="Check the AWS_… variables and profile.") from e


def caller_arn() -> str | None:
    """The identity that AWS knows these credentials by; None where S3 is another server's, which may know no STS.

    Raises:
        StoreError: STS does not answer, or refuses.
    """
    config = Config(connect_timeout=3.0, read_timeout=5.0, retries={"mode": "standard", "total_max_attempts": 2})
    try:
        session = boto3.session.Session()
        s3, sts = (
            session.client(name, region_name=session.region_name or "us-east-1", config=config)
            for name in ("s3", "sts")
        )
        if not _is_amazon(s3.meta.endpoint_url) and _is_amazon(sts.meta.endpoint_url):
            return None
        return str(sts.get_caller_identity()["Arn"])
    except (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        botocore.parsers.ResponseParserError,  # what answers there is no STS
        KeyError,
    ) as e:
        raise StoreError(f"STS does not say whose credentials these are: {e}.") from e


def _is_amazon(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def transfer_config(max_concurrency: int = UPLOAD_CONCURRENCY) -> TransferConfig:
    """Parallel transfers by parts, of which at most ``max_concurrency + 1`` are in memory."""
    config = TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=max_concurrency,
        num_download_attempts=PATIENT.attempts,
        preferred_transfer_client="classic",
    )
    config.max_in_memory_upload_chunks = max_concurrency
    return config


class PastTheEnd(StoreError):
    """416: the object ends before the range begins."""


class WriteUnderWay(StoreError):
    """409: another conditional write of this key is in flight; ask again."""


class translated:  # noqa: N801  used as a statement
    """Turns botocore's exceptions into ours, naming the object and what to do."""

    def __init__(self, uri: str, endpoint_url: str) -> None:
        self.uri = uri
        self.endpoint_url = endpoint_url

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
        if isinstance(error, botocore.exceptions.FlexibleChecksumError):
            raise IntegrityError(f"{self.uri} comes damaged: its checksum does not match.") from error
        if isinstance(error, _UNREACHABLE):
            raise StoreError(
                f"{self.uri}: the S3 server at {self.endpoint_url} cannot be reached ({type(error).__name__}).",
                next_step="Is it running, and is AWS_ENDPOINT_URL right? For the embedded one: headway up",
            ) from error
        foreign = (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error, urllib3.exceptions.HTTPError)
        if isinstance(error, foreign):
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
        if status == 416:
            return PastTheEnd(f"{self.uri} ends before the bytes that were asked for.")
        if status == 409:
            return WriteUnderWay(f"{self.uri}: another write of it is under way.")
        message = error.response.get("Error", {}).get("Message", "")
        return StoreError(f"{self.uri}: S3 answered {code}: {message}", next_step=_NEXT_STEP.get(code, ""))
