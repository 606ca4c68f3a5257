"""``headway prepare``: datasets, without a run."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli_options import Json, RunFile, StoreUri, TargetName
from orchestrator.errors import UsageError
from orchestrator.reporter import Reporter

app = typer.Typer(rich_markup_mode=None)


@app.command()
def prepare(
    run_file: RunFile,
    target: TargetName = "local",
    store: StoreUri = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the job that makes it; the next goes on from its work.")
    ] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Inside a Ray job: make it here. What is sent does this.")
    ] = False,
    json: Json = False,
) -> None:
    """Make the dataset of a run file and nothing else. One that exists is told, one in the making is attached to."""
    reporter = Reporter(json_mode=json)
    if sum((detach, stop, here)) > 1:
        raise UsageError("Of --detach, --stop and --here a command takes one.", next_step="See: headway prepare --help")
    if here:
        from orchestrator.commands.prepare_here import prepare_here

        reporter.result(*prepare_here(run_file, store, reporter))
        return
    from orchestrator.commands.prepare import prepare as command

    reporter.result(*command(run_file, target=target, store_uri=store, detach=detach, stop=stop, reporter=reporter))
