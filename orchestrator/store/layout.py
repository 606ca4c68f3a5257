"""Every key in the store, in one place. Pure: strings in, strings out. The picture is in docs/concepts.md."""

from __future__ import annotations

import re

NUMBER_DIGITS = 5


def number(value: int) -> str:
    """``7`` as ``00007``, so that a listing is in order."""
    return f"{value:0{NUMBER_DIGITS}d}"


def last_number(keys: list[str], pattern: str) -> int:
    """The highest number among ``keys`` whose last part matches ``pattern`` (one group), or 0."""
    found = (re.fullmatch(pattern, key.rsplit("/", 1)[-1]) for key in keys)
    return max((int(match[1]) for match in found if match), default=0)


# datasets/<name>/<fingerprint>/…
def datasets(name: str) -> str:
    return f"datasets/{name}/"


def dataset(name: str, fingerprint: str) -> str:
    return f"datasets/{name}/{fingerprint}/"


def dataset_manifest(name: str, fingerprint: str) -> str:
    return f"{dataset(name, fingerprint)}manifest.json"


def part(value: int) -> str:
    """Beside the manifest."""
    return f"parts/{number(value)}.json"


# bases/<fingerprint>/…
def base(fingerprint: str) -> str:
    return f"bases/{fingerprint}/"


def base_manifest(fingerprint: str) -> str:
    return f"{base(fingerprint)}manifest.json"


# code/<digest>.zip
def code(digest: str) -> str:
    return f"code/{digest}.zip"


# runs/<run-id>/…
def run(run_id: str) -> str:
    return f"runs/{run_id}/"


def run_spec(run_id: str) -> str:
    return f"runs/{run_id}/spec.json"


def run_source(run_id: str) -> str:
    return f"runs/{run_id}/source.json.gz"


def outcome(run_id: str) -> str:
    return f"runs/{run_id}/outcome.json"


def editions(run_id: str) -> str:
    return f"runs/{run_id}/editions/"


def edition(run_id: str, value: int) -> str:
    return f"{editions(run_id)}{number(value)}.json"


def submissions(run_id: str) -> str:
    return f"runs/{run_id}/submissions/"


def submission(run_id: str, submission_id: str) -> str:
    return f"{submissions(run_id)}{submission_id}.json"


def attempts(run_id: str) -> str:
    return f"runs/{run_id}/attempts/"


def attempt(run_id: str, value: int) -> str:
    return f"{attempts(run_id)}{number(value)}.json"


def worker_group(run_id: str, attempt: int, value: int) -> str:
    return f"{attempts(run_id)}{number(attempt)}.group-{number(value)}.json"


def stop_request(run_id: str, value: int) -> str:
    return f"{attempts(run_id)}{number(value)}.stop.json"


def attempt_end(run_id: str, value: int) -> str:
    return f"{attempts(run_id)}{number(value)}.end.json"


def events(run_id: str) -> str:
    return f"runs/{run_id}/events/"


def notice(run_id: str, name: str) -> str:
    return f"runs/{run_id}/notices/{name}.json"


def logs(run_id: str) -> str:
    """Of a run, or of the making of a dataset, which is NAME@FINGERPRINT."""
    name, at, fingerprint = run_id.partition("@")
    return f"{dataset(name, fingerprint)}logs/" if at else f"runs/{run_id}/logs/"


def report(run_id: str) -> str:
    return f"runs/{run_id}/report.html"


def summary(run_id: str) -> str:
    return f"runs/{run_id}/summary.json"


def checkpoints(run_id: str) -> str:
    return f"runs/{run_id}/checkpoints/"


def checkpoint(run_id: str, step: int) -> str:
    return f"{checkpoints(run_id)}step-{step:08d}/"


def checkpoint_pins(run_id: str, step: int) -> str:
    return f"{checkpoint(run_id, step)}pins/"


def export(run_id: str) -> str:
    return f"runs/{run_id}/export.json"


def evaluation(run_id: str) -> str:
    return f"runs/{run_id}/evaluation.json"


def comparison(run_id: str, value: int) -> str:
    return f"runs/{run_id}/against-{number(value)}.json"


# models/<name>/…
def versions(model: str) -> str:
    return f"models/{model}/versions/"


def version(model: str, value: int) -> str:
    return f"{versions(model)}{number(value)}/"


def version_claim(model: str, value: int) -> str:
    return f"{version(model, value)}claim.json"


def version_manifest(model: str, value: int) -> str:
    return f"{version(model, value)}version.json"


def channel(model: str, name: str) -> str:
    return f"models/{model}/channels/{name}/"


def channel_entry(model: str, name: str, value: int) -> str:
    return f"{channel(model, name)}{number(value)}.json"


def channel_status(model: str, name: str) -> str:
    return f"models/{model}/channels/{name}.status.json"
