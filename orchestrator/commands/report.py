"""``headway report``: what became of a run, as a page, as Markdown, or as JSON."""

from __future__ import annotations

import os
import time
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.commands.show import resolve_run
from orchestrator.errors import EnvironmentUnusable
from orchestrator.record.report import read_report, summary, to_html, to_markdown
from orchestrator.reporter import Result
from orchestrator.target_settings import find_prices


def report(name: str, *, out: Path | None, markdown: bool, store_uri: str | None) -> Result:
    """Write the page, or give the Markdown.

    Raises:
        UsageError: there is no such run. EnvironmentUnusable: the page cannot be written.
    """
    store = find_store(store_uri)
    run_id = resolve_run(store, name)
    found = read_report(store, run_id, now_s=time.time(), prices=find_prices(os.environ))
    facts = summary(found)
    if markdown:
        text = to_markdown(found)
        if out is None:
            return {**facts, "markdown": text}, text.rstrip("\n")
    else:
        text, out = to_html(found), out or Path(f"{run_id}.html")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as e:
        raise EnvironmentUnusable(
            f"{out} cannot be written: {e.strerror or e}.", next_step="Give another --out."
        ) from e
    return {**facts, "report": str(out.resolve())}, f"The report of {run_id} is in {out}"
