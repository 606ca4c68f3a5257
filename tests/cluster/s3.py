"""The S3 server of the test cluster: SeaweedFS at an address that pods reach."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import boto3
from botocore.config import Config

from orchestrator.errors import EnvironmentUnusable
from orchestrator.targets.seaweedfs import Keys
from tests.cluster.credentials import write_private
from tests.cluster.layout import BUCKET, REGION, S3_ADDRESS, S3_PORT
from tests.cluster.s3_users import ADMIN, new_users, server_config
from tests.cluster.started import Started

ENDPOINT_URL = f"http://{S3_ADDRESS}:{S3_PORT}"


def start_s3(started: Started) -> dict[str, Keys]:
    """Start it on an empty folder, with the bucket; the keys of each user."""
    users = new_users()
    data = started.layout.run / "s3"
    data.mkdir(parents=True, exist_ok=True)
    config = data / "s3.json"
    write_private(config, json.dumps(server_config(users)))
    process = started.start("s3", _command(data, config), namespace=started.layout.lan)
    started.wait("s3", process, _answers)
    started.wait("s3", process, lambda: _stores(users[ADMIN]))
    return users


def _answers() -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(ENDPOINT_URL, timeout=2.0):
            return True
    except urllib.error.HTTPError as e:  # a refusal for want of a signature is an answer
        return e.code < 500
    except OSError:
        return False


def _stores(keys: Keys) -> bool:
    """Whether the bucket is there and takes an object; the volume servers are up a moment after the first answer."""
    client = boto3.client(
        "s3",
        endpoint_url=ENDPOINT_URL,
        region_name=REGION,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        config=Config(retries={"total_max_attempts": 1}, proxies={}, connect_timeout=2, read_timeout=5),
    )
    try:
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="probe", Body=b"x")
        client.delete_object(Bucket=BUCKET, Key="probe")
    except Exception:  # whatever boto3 throws of a server that is not ready yet
        return False
    return True


def _command(data: Path, config: Path) -> list[str]:
    return [
        _program(),
        "-logtostderr=true",
        "mini",
        f"-dir={data}",
        f"-ip={S3_ADDRESS}",
        f"-ip.bind={S3_ADDRESS}",
        f"-s3.config={config}",
        f"-s3.port={S3_PORT}",
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=512",
        "-filer.maxMB=16",
    ]


def _program() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise EnvironmentUnusable("The S3 server's program, weed, is not installed.", next_step="Run: make install")
    return found
