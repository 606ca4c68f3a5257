"""``headway report``, ``list`` and ``show``: what runs and models came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_options import Json, RunId, StoreUri
from orchestrator.reporter import Reporter

app = typer.Typer(rich_markup_mode=None)


@app.command()
def report(
    run_id: RunId,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; default RUN.html here.", show_default=False)
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown, on stdout unless --out is given.")] = False,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Write what became of a run as a page: curves, where the time went, restarts, evaluation, lineage."""
    from orchestrator.commands.report import report as command

    Reporter(json_mode=json).result(*command(run_id, out=out, markdown=markdown, store_uri=store))


@app.command("list")
def list_things(
    what: Annotated[str, typer.Argument(help="runs, models, datasets, or checkpoints.")] = "runs",
    run_id: Annotated[str | None, typer.Argument(help="The run, for checkpoints.")] = None,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """List what is in the store."""
    from orchestrator.commands.listing import list_things as command

    Reporter(json_mode=json).result(*command(what, run_id, store_uri=store))


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A run, MODEL, MODEL@VERSION, or a dataset's NAME@FINGERPRINT.", show_default=False)
    ],
    other: Annotated[
        str | None, typer.Argument(help="Another run or version, to see both side by side.", show_default=False)
    ] = None,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Show one thing and where it came from, or two side by side."""
    from orchestrator.commands.show import show as command

    Reporter(json_mode=json).result(*command(name, other, store_uri=store))
