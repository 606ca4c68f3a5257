"""The integration tests' S3 server and store, and a proxy between them that does harm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from orchestrator.store import Store
from orchestrator.store.s3 import Patience, new_client
from orchestrator.targets.seaweedfs import S3Server
from tests.faults.proxy import FaultProxy
from tests.faults.yard import Yard
from tests.integration.conftest import s3, store

__all__ = ["once", "proxy", "s3", "store", "through", "yard"]

STEADY = Patience(attempts=4, connect_timeout_s=10.0, read_timeout_s=20.0, first_wait_s=0.01)
HASTY = replace(STEADY, read_timeout_s=0.5)
"""Only where a fault is a silence: on a busy machine it takes a slow answer for one."""


def behind(proxy: FaultProxy, store: Store, patience: Patience) -> Store:
    """The same place as ``store``, through the proxy."""
    return Store(store.bucket, store.prefix, client=new_client(patience, {"AWS_ENDPOINT_URL": proxy.endpoint_url}))


@pytest.fixture(scope="session")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    yard = Yard(tmp_path_factory.mktemp("yard"))
    try:
        yield yard
    finally:
        yard.close()


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: FaultProxy, store: Store) -> Store:
    return behind(proxy, store, STEADY)


@pytest.fixture
def once(proxy: FaultProxy, store: Store) -> Store:
    """Like ``through``, but nothing is tried again."""
    return behind(proxy, store, replace(STEADY, attempts=1))
