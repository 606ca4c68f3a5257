"""Prepares a dataset on a Ray cluster that is there, for a test that kills it:
``python -m tests.integration.prepare_process RAY-ADDRESS STORE NAME DATA``, DATA being JSON."""

from __future__ import annotations

import sys

import ray

from orchestrator.dataset.given import read_given
from orchestrator.dataset.source import list_source
from orchestrator.spec import DataSpec
from orchestrator.store import open_store
from workloads.prepare import prepare


def main() -> None:
    address, uri, name, document = sys.argv[1:]
    store, data = open_store(uri), DataSpec.model_validate_json(document)
    ray.init(address=address, log_to_driver=False)
    prepare(data, name, list_source(data.train or "", store), store, tokenizer=read_given(data, store))


if __name__ == "__main__":
    main()
