"""The S3 server of a benchmark, and whole directories to and from it as a person's script would move them."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3

from orchestrator.store import Store, open_store
from orchestrator.targets import seaweedfs

BUCKET = "headway-bench"
_FILES_AT_ONCE = 4  # each of them by boto3's own ten threads


@contextmanager
def s3_store(directory: Path) -> Iterator[Store]:
    """A store in a server of its own with its data in ``directory``; ``AWS_…`` in the environment lead to it, also
    for child processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end from outside also stops the server
    keys = seaweedfs.new_keys()
    server = seaweedfs.start_s3(
        directory / "s3",
        ports=seaweedfs.choose_ports(seed=secrets.randbits(32)),
        keys=keys,
        marker="headway-bench",
        environment=os.environ,
        log=directory / "s3.log",
    )
    try:
        seaweedfs.wait_for_s3(server)
        seaweedfs.create_bucket(server, BUCKET)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ |= {
            "AWS_ENDPOINT_URL": server.endpoint_url,
            "AWS_ACCESS_KEY_ID": keys.access_key,
            "AWS_SECRET_ACCESS_KEY": keys.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield open_store(f"s3://{BUCKET}/headway")
    finally:
        seaweedfs.stop_s3(server)


def upload_directory(directory: Path, prefix: str) -> int:
    """Every file under ``directory`` to ``prefix`` (with its slash), in parallel. Returns the bytes sent."""
    client = boto3.client("s3")
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for future in [
            pool.submit(client.upload_file, str(path), BUCKET, prefix + path.relative_to(directory).as_posix())
            for path in files
        ]:
            future.result()
    return sum(path.stat().st_size for path in files)


def download_directory(prefix: str, directory: Path) -> int:
    """Every object under ``prefix`` (with its slash) into ``directory``, in parallel. Returns the bytes received."""
    client = boto3.client("s3")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    items = [item for page in pages for item in page.get("Contents", ())]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        futures = []
        for item in items:
            path = directory / item["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            futures.append(pool.submit(client.download_file, BUCKET, item["Key"], str(path)))
        for future in futures:
            future.result()
    return sum(item["Size"] for item in items)
