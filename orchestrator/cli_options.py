"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress on stderr.")]
StoreUri = Annotated[str | None, typer.Option("--store", help="s3://bucket/prefix; default $HEADWAY_STORE.")]
TargetName = Annotated[
    str, typer.Option("--target", help="local, http://… of a Ray dashboard, or kubernetes[:target.yaml].")
]
RunFile = Annotated[Path, typer.Argument(help="The run file.", show_default=False)]
RunId = Annotated[str, typer.Argument(help="A run's id, or its name for the newest of that name.", show_default=False)]
Directory = Annotated[Path | None, typer.Option("--directory", help="The embedded stack's folder; default .headway.")]
