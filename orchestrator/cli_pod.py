"""``headway pod …``: what Headway's pods run beside Ray. The manifests name these commands; no person types them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_options import Json, StoreUri
from orchestrator.reporter import Reporter

app = typer.Typer(help="What Headway's pods run beside Ray.", rich_markup_mode=None)


@app.command("fetch-code")
def fetch_code(
    digest: Annotated[str, typer.Option(help="Of the package.", show_default=False)],
    to: Annotated[Path, typer.Option(help="The folder to fill.", show_default=False)],
    version: Annotated[str, typer.Option(help="Headway's, of the command line that submitted.", show_default=False)],
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Put the submitted working directory into a folder, before Ray starts."""
    from orchestrator.commands.pod import fetch_code as command

    Reporter(json_mode=json).result(*command(digest=digest, to=to, version=version, store_uri=store))


@app.command("ship-logs")
def ship_logs(
    run: Annotated[str, typer.Option(help="The run's id, or a dataset's NAME@FINGERPRINT.", show_default=False)],
    root: Annotated[Path, typer.Option(help="Ray's temporary folder.")] = Path("/tmp/ray"),
    pod: Annotated[str | None, typer.Option(envvar="POD_NAME", help="The pod's name.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for the last pass after SIGTERM.")] = 20.0,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Keep Ray's logs in the store until SIGTERM."""
    from orchestrator.commands.pod import ship_logs as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(run, root=root, pod=pod, timeout_s=timeout_s, store_uri=store, reporter=reporter))


@app.command("save-and-stop")
def save_and_stop(
    run: Annotated[str, typer.Option(help="The run's id.", show_default=False)],
    job: Annotated[str, typer.Option(help="The job's submission id.", show_default=False)],
    pod: Annotated[str | None, typer.Option(envvar="POD_NAME", help="The pod's name.")] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait for the attempt to end.")] = 100.0,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Have the attempt of this pod saved before the pod ends."""
    from orchestrator.commands.pod import save_and_stop as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(run, job=job, pod=pod, timeout_s=timeout_s, store_uri=store, reporter=reporter))
