"""``headway demo``: the whole road on this machine, on a corpus that every machine has: Python's own source."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from orchestrator.commands.logs import stop_run
from orchestrator.commands.serve import deploy
from orchestrator.commands.stack import folder_of
from orchestrator.commands.submit import send
from orchestrator.commands.watch import watch
from orchestrator.errors import Interrupted, TargetError, TimedOut
from orchestrator.reporter import Reporter, Result
from orchestrator.spec import RunSpec, load
from orchestrator.store import Store, open_store
from orchestrator.targets import local
from orchestrator.targets.jobs_api import JobsApiTarget
from orchestrator.targets.local import StackOptions
from orchestrator.targets.serve_api import ServeApi
from orchestrator.targets.stack import Stack

PROMPT = "def __init__(self"
MODEL = "code-lm"
_UPLOADS = 16
_SERVE_TIMEOUT_S = 120.0
# Tests, bundled programs, and pydoc_data: one generated English text that would be most of the held-out split.
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
)
RUN_FILE = """\
# Written by headway demo. Copy it as the start of your own: docs/run-file.md explains every field.
apiVersion: headway/v1
name: code-lm
task: causal-lm
model:
  architecture:
    model_type: llama
    hidden_size: 128
    intermediate_size: 384
    num_hidden_layers: 3
    num_attention_heads: 4
    tie_word_embeddings: true
data: {train: "SOURCE", format: text, vocab_size: 2048, eval_fraction: 0.05, sequence_length: 128}
train:
  steps: 450
  global_batch_size: 8
  micro_batch_size: 8
  optimizer: {learning_rate: 5.0e-3, warmup_steps: 25, weight_decay: 0.1, schedule: cosine}
  max_grad_norm: 1.0
  zero: {stage: 3, offload: none}
  precision: auto
  seed: 0
checkpoint: {every_steps: 100, keep: 3}
resources: {workers: {min: 2, max: 2}, gpu: null, cpus_per_worker: 1}
gate: {max_loss: 5.0, must_beat_serving: true}
release: {model: code-lm, channel: production}
"""


def demo(directory: Path | None, options: StackOptions, reporter: Reporter) -> Result:
    """Bring up the stack, train, release and serve; a finished demo goes straight to serving."""
    clock = _Clock()
    with clock.stage("stack"):
        stack = local.up(folder_of(directory), options, reporter.say)
    stack.apply_to(os.environ)
    store = open_store()
    with clock.stage("corpus"):
        source = upload_corpus(store, reporter)
    run_file = _write_run_file(stack, source)
    spec = load(run_file)
    cluster = JobsApiTarget(stack.dashboard_url)
    outcome = _train(spec, run_file, store, cluster, clock, reporter)
    with clock.stage("serve"):
        endpoint = deploy(
            ServeApi(stack.dashboard_url),
            store,
            model=MODEL,
            channel="production",
            replicas=1,
            route_prefix="/",
            bind="127.0.0.1",
            host="127.0.0.1",
            port=stack.ray_ports.serve,
            timeout_s=_SERVE_TIMEOUT_S,
            reporter=reporter,
        )
    with clock.stage("completion"):
        completion = complete(endpoint)
    facts = {
        "run_id": outcome.run_id,
        "steps": outcome.facts["steps"],
        "final_loss": outcome.facts["final_loss"],
        "eval": outcome.facts["evaluation"],
        "checkpoint": outcome.facts["checkpoint"],
        "version": outcome.facts["version"],
        "endpoint": endpoint,
        "completion": completion,
        "dashboard": stack.dashboard_url,
        "store": stack.store,
        "timings_s": clock.timings_s(),
    }
    return facts, closing_words(facts, bold=sys.stdout.isatty())


def _train(
    spec: RunSpec, run_file: Path, store: Store, cluster: JobsApiTarget, clock: _Clock, reporter: Reporter
) -> Any:
    sent = send(spec, run_file, store, cluster, reporter, directory=run_file.parent)
    if sent.outcome is None:
        try:
            with clock.stage("run"):
                watched = watch(sent.run_id, sent.submission_id, store, cluster, reporter, from_attempt=sent.attempt)
        except Interrupted as e:
            reporter.say("Interrupted: the run saves and ends …")
            with contextlib.suppress(TimedOut):  # its job has been ended then
                stop_run(sent.run_id, store, cluster, timeout_s=60.0, reporter=reporter)
            raise Interrupted(
                f"{sent.run_id} is stopped; its checkpoints are kept, and the stack is still up.",
                next_step="Go on with the same command, or end the stack: headway down",
            ) from e
        clock.add(watched.stages_s)
        outcome = watched.require_outcome(sent.run_id)
    else:
        outcome = sent.outcome
    outcome.raise_unless_done()
    return outcome


def upload_corpus(store: Store, reporter: Reporter) -> str:
    """Put the standard library's source files into S3, those that are not there yet. Returns the run file's source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = store.at(store.bucket, "demo/stdlib")
    there = {item.key: item.size_bytes for item in corpus.list("")}
    files = {str(path.relative_to(root)): path for path in _sources(root)}
    missing = [name for name, path in files.items() if there.get(name) != path.stat().st_size]
    if missing:
        reporter.say(f"Putting {len(missing)} source files of Python's standard library into {corpus.uri}")
        with ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(lambda name: corpus.upload(name, files[name].read_bytes()), missing))
    corpus.delete(there.keys() - files.keys())
    return f"{corpus.uri}/**/*.py"


def _sources(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT and not name.startswith("__")]
        for name in names:
            path = Path(folder) / name
            if name.endswith(".py") and path.stat().st_size:
                yield path


def _write_run_file(stack: Stack, source: str) -> Path:
    folder = stack.directory / "demo"
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(RUN_FILE.replace("SOURCE", source))
    return path


def complete(endpoint: str) -> str:
    """A greedy completion of :data:`PROMPT` by the served model.

    Raises:
        TargetError: the endpoint does not answer as it should.
    """
    request = {"model": MODEL, "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    try:
        with httpx.Client(trust_env=False, timeout=60.0) as http:
            answer = http.post(f"{endpoint}/v1/completions", json=request)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["text"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as e:
        raise TargetError(f"{endpoint}/v1/completions did not answer: {e}.", next_step="See the dashboard.") from e


def closing_words(facts: dict[str, Any], *, bold: bool = False) -> str:
    """What a person sees at the end: what was learned, what to look at, how to stop."""
    evaluation, timings = facts["eval"], facts["timings_s"]
    better = 1 - evaluation["loss"] / evaluation["unigram_loss"]
    body = f'{{"model": "{MODEL}", "prompt": "{PROMPT}", "max_tokens": 32}}'
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in timings.items())
    return "\n".join(
        [
            "",
            f"{facts['version']} is served, trained in {facts['steps']} steps to loss {facts['final_loss']:.3f}.",
            f"Held-out loss {evaluation['loss']:.3f} nats per token, {better:.0%} below a unigram model's "
            f"{evaluation['unigram_loss']:.3f}; perplexity {evaluation['perplexity']:.1f}, "
            f"{evaluation['bits_per_byte']:.2f} bits per byte.",
            "",
            f"  {PROMPT}\033[1m{facts['completion']}\033[0m" if bold else f"  {PROMPT}{facts['completion']}",
            "",
            f"dashboard   {facts['dashboard']}",
            f"endpoint    curl {facts['endpoint']}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            f"store       {facts['store']}, the run: headway show {facts['run_id']}",
            f"report      headway report {facts['run_id']}",
            f"seconds     {stages}",
            "stop it     headway down",
        ]
    )


class _Clock:
    """Seconds of each stage, in order, and their total."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._stages[name] = round(time.monotonic() - started, 1)

    def add(self, stages: dict[str, float]) -> None:
        self._stages |= stages

    def timings_s(self) -> dict[str, float]:
        return {**self._stages, "total": round(time.monotonic() - self._started, 1)}
