"""The command line: parse, call, print, exit. What a command does is in ``orchestrator/commands/``.

Heavy imports happen inside the commands, so that ``headway --help`` answers at once and none of ray, torch,
deepspeed or transformers is needed to plan, submit, list or show.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from orchestrator import __version__, cli_data, cli_pod, cli_record, cli_release
from orchestrator.cli_options import Directory, Json, RunFile, RunId, StoreUri, TargetName
from orchestrator.errors import EnvironmentUnusable, HeadwayError, Interrupted, UsageError
from orchestrator.pinning import pin
from orchestrator.reporter import Reporter

app = typer.Typer(
    name="headway",
    help="From one run file to a served model: ZeRO training on Ray, safe checkpoints, gated releases.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_data.app)
app.add_typer(cli_pod.app, name="pod", hidden=True)
app.add_typer(cli_record.app)
app.add_typer(cli_release.app)

# What typer raises for a wrong command line. Of this family it exports only one member, and its home has moved.
_WrongUsage: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point of ``headway``."""
    pin()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. A person's mistake is one message, never a traceback."""
    reporter = Reporter(json_mode="--json" in arguments)
    command = typer.main.get_command(app)
    try:
        # Not app(): what that makes of Ctrl-C and of typer.Exit differs from one release of typer to the next.
        with command.make_context("headway", list(arguments) or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as e:
        return e.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return reporter.error(Interrupted("Interrupted."))
    except HeadwayError as e:
        return reporter.error(e)
    except _WrongUsage as e:
        return reporter.error(_usage_error(e))
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:
        return reporter.error(_unusable(e))
    return 0


def _usage_error(error: Exception) -> UsageError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "headway"
    return UsageError(error.format_message(), next_step=f"See: {path} --help")  # type: ignore[attr-defined]


def _unusable(error: OSError) -> EnvironmentUnusable:
    where = f"{error.filename}: " if error.filename else ""
    step = "Free some space on that disk." if error.errno == errno.ENOSPC else "Check that it exists and may be used."
    return EnvironmentUnusable(f"{where}{error.strerror or error}.", next_step=step)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def demo(
    directory: Directory = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Ray's dashboard and Jobs API.")] = None,
    serve_port: Annotated[int | None, typer.Option(help="The served model.")] = None,
    s3_port: Annotated[int | None, typer.Option(help="The embedded S3 server.")] = None,
    json: Json = False,
) -> None:
    """Train a small model on this machine and serve it: the whole road, nothing mocked."""
    from orchestrator.commands.demo import demo as command
    from orchestrator.commands.stack import options

    ports = options(dashboard_port=dashboard_port, serve_port=serve_port, s3_port=s3_port)
    Reporter(json_mode=json).result(*command(directory, ports, Reporter(json_mode=json)))


@app.command()
def up(
    directory: Directory = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Ray's dashboard and Jobs API (8265).")] = None,
    serve_port: Annotated[int | None, typer.Option(help="Served models (8000).")] = None,
    s3_port: Annotated[int | None, typer.Option(help="The embedded S3 server (8333).")] = None,
    ray_port: Annotated[int | None, typer.Option(help="Ray's own address (6379).")] = None,
    json: Json = False,
) -> None:
    """Start the embedded stack: a Ray head with its dashboard, and an S3 server."""
    from orchestrator.commands import stack

    ports = stack.options(dashboard_port=dashboard_port, serve_port=serve_port, s3_port=s3_port, ray_port=ray_port)
    reporter = Reporter(json_mode=json)
    reporter.result(*stack.up(directory, ports, reporter))


@app.command()
def down(
    directory: Directory = None,
    data: Annotated[bool, typer.Option("--data", help="Remove the data as well.")] = False,
    json: Json = False,
) -> None:
    """Stop the embedded stack and everything that runs on it. Data stays unless --data is given."""
    from orchestrator.commands import stack

    reporter = Reporter(json_mode=json)
    reporter.result(*stack.down(directory, reporter, remove_data=data))


@app.command()
def doctor(store: StoreUri = None, target: TargetName = "local", json: Json = False) -> None:
    """Check compiler, versions, ports, disk, store and Ray, and say what to do."""
    from orchestrator.commands.doctor import report

    facts, text = report(store, target)
    Reporter(json_mode=json).result(facts, text)
    if facts["failed"]:
        raise typer.Exit(EnvironmentUnusable.exit_code)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.yaml"), json: Json = False
) -> None:
    """Write a commented starter run file."""
    from orchestrator.commands.files import init as command

    Reporter(json_mode=json).result(*command(path))


@app.command()
def schema(json: Json = False) -> None:
    """Print the run file's JSON Schema. It is JSON with or without --json."""
    from orchestrator.commands.files import schema as command

    Reporter(json_mode=json).result(*command())


@app.command()
def plan(
    run_file: RunFile,
    target: TargetName = "local",
    store: StoreUri = None,
    manifests: Annotated[bool, typer.Option("--manifests", help="Print exactly what submit would send.")] = False,
    json: Json = False,
) -> None:
    """Say what a run will do: workers, batch split, steps, memory per worker."""
    from orchestrator.commands.plan import plan as command

    reporter = Reporter(json_mode=json or manifests)
    reporter.result(*command(run_file, target=target, store_uri=store, manifests=manifests))


@app.command("run")
def run_here(
    run_file: RunFile,
    store: StoreUri = None,
    first_attempt: Annotated[int | None, typer.Option(help="Where jobs are restarted: the first attempt.")] = None,
    max_attempts: Annotated[int | None, typer.Option(help="Where jobs are restarted: attempts in all.")] = None,
    edition: Annotated[int | None, typer.Option(help="Of the run; default the newest.", min=0)] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="As it was submitted; default by the data now.")] = None,
    json: Json = False,
) -> None:
    """Execute a run inside a Ray job; what submit and `ray job submit … -- headway run FILE` start."""
    from orchestrator.commands.run import run as command

    if (first_attempt is None) != (max_attempts is None):
        raise UsageError("--first-attempt and --max-attempts are given together, or not at all.")
    attempts = (first_attempt, max_attempts) if first_attempt is not None and max_attempts is not None else None
    reporter = Reporter(json_mode=json)
    reporter.result(*command(run_file, store, attempts, reporter, edition=edition, run_id=run_id))


@app.command()
def submit(
    run_file: RunFile,
    target: TargetName = "local",
    store: StoreUri = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="End the job in flight and start a new attempt.")] = False,
    timeout_s: Annotated[float | None, typer.Option("--timeout", help="Stop waiting after so many seconds.")] = None,
    json: Json = False,
) -> None:
    """Send a run to a Ray cluster and watch it. A run in flight is attached to, a finished one is told."""
    from orchestrator.commands.submit import submit as command

    reporter = Reporter(json_mode=json)
    reporter.result(
        *command(
            run_file,
            target=target,
            store_uri=store,
            detach=detach,
            retry=retry,
            timeout_s=timeout_s,
            reporter=reporter,
        )
    )


@app.command()
def retrain(
    run_file: RunFile,
    target: TargetName = "local",
    store: StoreUri = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the run's outcome.")] = False,
    timeout_s: Annotated[float | None, typer.Option("--timeout", help="Stop waiting after so many seconds.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what changed and what would run; send nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do again what is over, as a new run.")] = False,
    stop_on_cancel: Annotated[
        bool, typer.Option("--stop-on-cancel", help="SIGTERM or Ctrl-C stops the run too, not just the waiting.")
    ] = False,
    outputs: Annotated[Path | None, typer.Option(help="Append name=value lines to this file.")] = None,
    json: Json = False,
) -> None:
    """Submit what changed, for CI: the same data, code and run file are trained once, whoever asks how often."""
    from orchestrator.commands.retrain import Options
    from orchestrator.commands.retrain import retrain as command

    options = Options(
        wait=wait,
        timeout_s=timeout_s,
        fresh=fresh,
        dry_run=dry_run,
        stop_on_cancel=stop_on_cancel,
        outputs=outputs,
    )
    reporter = Reporter(json_mode=json)
    reporter.result(*command(run_file, target=target, store_uri=store, options=options, reporter=reporter))


@app.command()
def status(run_id: RunId, target: TargetName = "local", store: StoreUri = None, json: Json = False) -> None:
    """Where a run stands: outcome, attempt, stage, step, checkpoints."""
    from orchestrator.commands.show import status as command

    Reporter(json_mode=json).result(*command(run_id, target=target, store_uri=store))


@app.command()
def logs(
    run_id: RunId,
    target: TargetName = "local",
    store: StoreUri = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    files: Annotated[bool, typer.Option("--files", help="List what Kubernetes pods left in the store.")] = False,
    file: Annotated[str | None, typer.Option(help="Print one of those.")] = None,
    json: Json = False,
) -> None:
    """Print the log of a run's newest attempt."""
    from orchestrator.commands.logs import logs as command
    from orchestrator.commands.logs import stored_logs

    reporter = Reporter(json_mode=json)
    if files or file is not None:
        reporter.result(*stored_logs(run_id, file, store_uri=store, reporter=reporter))
        return
    reporter.result(*command(run_id, target=target, store_uri=store, follow=follow, reporter=reporter))


@app.command()
def stop(
    run_id: RunId,
    target: TargetName = "local",
    store: StoreUri = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for it to save and end.")] = 120.0,
    json: Json = False,
) -> None:
    """Ask a run to save and end. Submitting the same run file goes on from there."""
    from orchestrator.commands.logs import stop as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(run_id, target=target, store_uri=store, timeout_s=timeout_s, reporter=reporter))


@app.command()
def dashboard(
    run_id: RunId,
    target: TargetName = "local",
    store: StoreUri = None,
    port: Annotated[int, typer.Option(help="On this machine; 0 takes a free one.", min=0, max=65535)] = 8265,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
    json: Json = False,
) -> None:
    """Open Ray's dashboard and Jobs API of a run on this machine, until Ctrl-C."""
    from orchestrator.commands.dashboard import dashboard as command

    reporter = Reporter(json_mode=json)
    command(run_id, target=target, store_uri=store, port=port, open_browser=open_browser, reporter=reporter)


@app.command()
def verify(
    name: Annotated[
        str,
        typer.Argument(help="RUN, RUN@STEP, MODEL@VERSION, NAME@FINGERPRINT, or its S3 address.", show_default=False),
    ],
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Read every byte of checkpoints, of a version or of a dataset and check it against its digests."""
    from orchestrator.commands.verify import verify_all as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(name, store_uri=store, reporter=reporter))


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(help="RUN@STEP, RUN for its newest, or its S3 address.", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="A new directory, or an empty s3://bucket/prefix.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="auto (as trained), fp32, bf16 or fp16.")] = "auto",
    max_shard_bytes: Annotated[int, typer.Option(help="Most bytes of tensors in one file.", min=2**20)] = 2 * 2**30,
    lora: Annotated[str, typer.Option(help="Of a LoRA run: merged (the whole model), or adapter alone.")] = "merged",
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's weights as a Hugging Face directory, in memory that does not grow with the model."""
    from orchestrator.commands.export import export as command

    reporter = Reporter(json_mode=json)
    result = command(
        checkpoint,
        to=to,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        form=lora,
        store_uri=store,
        reporter=reporter,
    )
    reporter.result(*result)
