"""What k8s/monitoring installs, as the tests read it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "monitoring"
PAGE = ROOT / "docs" / "record.md"
DASHBOARDS = sorted((FOLDER / "dashboards").glob("*.json"))
ALERT_TESTS = Path(__file__).with_name("alerts.yaml")
_WATCHING = re.compile(r"^## Watching\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_METRIC = re.compile(r"\b(?:ray_|headway_)[a-z0-9_]+\b(?!\s*[(=])")

Document = dict[str, Any]


def dashboard(path: Path) -> Document:
    found: Document = json.loads(path.read_text())
    return found


def panels(document: Document) -> list[Document]:
    """All but the headings of rows."""
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """(where it stands, expression) of each query of each panel."""
    for path in DASHBOARDS:
        for panel in panels(dashboard(path)):
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}: {target['refId']}", target["expr"]


def rules() -> list[Document]:
    document = yaml.safe_load((FOLDER / "rules.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def metrics(expression: str) -> set[str]:
    """Ray's and Headway's names in an expression; what a rule records has a colon before or behind."""
    text = re.sub(r"\w+:\w+:\w+", "", expression)
    return set(_METRIC.findall(text))


def watching() -> str:
    """The section of docs/record.md."""
    found = _WATCHING.search(PAGE.read_text())
    assert found is not None, "docs/record.md has no section Watching"
    return found[1]


def block(language: str) -> str:
    """The one block of that language in the section."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", watching(), re.MULTILINE | re.DOTALL)
    return str(found)


def write_rule_file(directory: Path) -> Path:
    """``rules.yml`` by the command that the head of rules.yaml gives."""
    text = (FOLDER / "rules.yaml").read_text()
    (command,) = re.findall(r"^# +(sed .*) > rules\.yml$", text, re.MULTILINE)
    made = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    path = directory / "rules.yml"
    path.write_text(made.stdout)
    return path
