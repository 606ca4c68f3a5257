"""``headway serve``, ``promote`` and ``rollback``: what is served, and which version of it."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli_options import Json, StoreUri, TargetName
from orchestrator.reporter import Reporter

app = typer.Typer(rich_markup_mode=None)

Channel = Annotated[str, typer.Option(help="Of the model.")]
Reason = Annotated[str | None, typer.Option(help="Why, for the channel's history.")]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="The model's name.", show_default=False)],
    channel: Annotated[str, typer.Option(help="The channel to follow.")] = "production",
    target: TargetName = "local",
    store: StoreUri = None,
    replicas: Annotated[int, typer.Option(help="Copies of the model.", min=1)] = 1,
    route_prefix: Annotated[str, typer.Option(help="Where its API lies on the endpoint.")] = "/",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="More of docs/serving.md's settings.")
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds to wait until it answers.")] = 300.0,
    down: Annotated[bool, typer.Option("--down", help="Take the service away.")] = False,
    json: Json = False,
) -> None:
    """Serve a model's channel through Ray Serve, and wait until it answers."""
    from orchestrator.commands.serve import serve as command

    reporter = Reporter(json_mode=json)
    result = command(
        model,
        channel=channel,
        target=target,
        store_uri=store,
        replicas=replicas,
        route_prefix=route_prefix,
        settings=settings or (),
        timeout_s=timeout_s,
        down=down,
        reporter=reporter,
    )
    reporter.result(*result)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="MODEL@N", help="The version.", show_default=False)],
    channel: Channel = "production",
    canary: Annotated[
        str | None, typer.Option(help="Its share of the requests until it has proved itself: 10%.", show_default=False)
    ] = None,
    reason: Reason = None,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Have a version serve, all at once or as a canary first."""
    from orchestrator.commands.promote import promote as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(name, channel=channel, canary=canary, reason=reason, store_uri=store, reporter=reporter))


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="The model's name.", show_default=False)],
    channel: Channel = "production",
    to: Annotated[int | None, typer.Option(help="The version; without it, the one before.", min=1)] = None,
    reason: Reason = None,
    store: StoreUri = None,
    json: Json = False,
) -> None:
    """Have the version serve again that came before, or take a canary back."""
    from orchestrator.commands.promote import rollback as command

    reporter = Reporter(json_mode=json)
    reporter.result(*command(model, channel=channel, to=to, reason=reason, store_uri=store, reporter=reporter))
