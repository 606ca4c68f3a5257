"""What the documentation claims: fields and defaults, run files, commands, links, and the names of things."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from orchestrator import cli, errors
from orchestrator.document import check
from orchestrator.spec import json_schema, parse
from orchestrator.store import layout
from orchestrator.target_settings import Pool, S3Settings, TargetSettings, load_settings

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "docs" / "examples").rglob("run.yaml"))
CONCEPTS = (ROOT / "docs" / "concepts.md").read_text()
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]\n]+\]\(([^)\s]+)\)")
COMMANDS: Any = typer.main.get_command(cli.app)
REQUIRED = object()
each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def fences(path: Path) -> Iterator[tuple[str, str]]:
    """(what stands behind the opening backticks, contents) of each fenced block."""
    for match in FENCE.finditer(path.read_text()):
        yield match[1].strip(), match[2]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text())


# -- the run file


def leaves(node: dict[str, Any], definitions: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted name, schema) of every field of the run file that is not itself a part with fields."""
    for name, schema in node["properties"].items():
        choices = schema.get("anyOf", [schema])
        refs = [choice["$ref"].rsplit("/", 1)[-1] for choice in choices if "$ref" in choice]
        if refs:
            yield from leaves(definitions[refs[0]], definitions, f"{prefix}{name}.")
        else:
            default = REQUIRED if name in node.get("required", ()) else schema["default"]
            limits = next((choice for choice in choices if choice.get("type") != "null"), {})
            yield prefix + name, {**limits, "default": default}


FIELDS = dict(leaves(json_schema(), json_schema()["$defs"]))


def documented() -> dict[str, list[str]]:
    """The cells of each row of docs/run-file.md that describes a field, by the field's name."""
    rows = {}
    for line in (ROOT / "docs" / "run-file.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and CODE.fullmatch(cells[0]):
            assert cells[0] not in rows, f"{cells[0]} is described twice"
            rows[cells[0].strip("`")] = cells
    return rows


def test_every_field_is_documented_and_no_other() -> None:
    assert set(documented()) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_a_fields_default_and_limits_are_those_of_the_code(field: str) -> None:
    schema = FIELDS[field]
    _, _, default, limits, _ = documented()[field]
    if schema["default"] is REQUIRED:
        assert default == "*required*"
    else:
        assert yaml.safe_load(default.strip("`")) == schema["default"]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounded = [schema, *schema.get("prefixItems", ())]
    wanted = {f"{sign} {_plain(part[key])}" for part in bounded for key, sign in signs.items() if key in part}
    wanted |= {f"`{value}`" for value in schema.get("enum", ())}
    wanted |= {f"`{schema['const']}`"} if "const" in schema else set()
    wanted |= {f"at most {schema['maxLength']} characters"} if "maxLength" in schema else set()
    assert {text for text in wanted if text not in limits} == set()
    assert set(re.findall(r"[<>≤≥] [\d.]+", limits)) <= wanted


def _plain(bound: float) -> str:
    return str(int(bound) if bound == int(bound) else bound)


@each_document
def test_run_files_parse(path: Path) -> None:
    for language, text in fences(path):
        if language == "yaml":  # a "yaml fragment" is a part of one
            parse(yaml.safe_load(text), source=f"a run file in {path.name}")


@each_document
def test_target_settings_parse(path: Path) -> None:
    for language, text in fences(path):
        if language == "yaml target":
            check(TargetSettings, yaml.safe_load(text), source=path.name, compare="", all_fields="")


def test_the_example_of_target_settings_has_every_field_with_its_default() -> None:
    """But where it says more than a default: what is required, and the pools."""
    path = ROOT / "k8s" / "target.example.yaml"
    document, settings = yaml.safe_load(path.read_text()), load_settings(path)
    assert set(document) == set(TargetSettings.model_fields)
    for name, field in TargetSettings.model_fields.items():
        if not field.is_required() and name not in ("s3", "head", "server"):
            assert getattr(settings, name) == field.default, name
    assert set(document["pools"]["h100"]) == set(Pool.model_fields)
    assert set(document["s3"]) == set(S3Settings.model_fields)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_run_files_parse(path: Path) -> None:
    parse(yaml.safe_load(path.read_text()), source=str(path))


# -- commands


def commands(path: Path) -> Iterator[str]:
    """Every command line that starts with headway, in a block or between backticks, or behind Ray's ``--``."""
    blocks = [line for language, text in fences(path) if language in ("bash", "console") for line in text.splitlines()]
    for line in [*blocks, *CODE.findall(prose(path))]:
        command = line.removeprefix("$ ").split(" -- ")[-1]
        if command.startswith("headway "):
            yield command


def problem(command: str) -> str | None:
    """What is wrong with a command line, by what the command line declares."""
    words = shlex.split(command, comments=True)[1:]
    parser = COMMANDS
    if words and not words[0].startswith("-"):
        name = words.pop(0)
        parser = COMMANDS.commands.get(name)
        if parser is None:
            return f"there is no command {name}"
    flags = {flag: option for option in parser.params for flag in [*option.opts, *option.secondary_opts]}
    num_free = sum(parameter.param_type_name == "argument" for parameter in parser.params)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            num_free -= 1
        elif word != "--help" and word not in flags:
            return f"there is no flag {word}"
        elif word != "--help" and not flags[word].is_flag:
            if not words:
                return f"{word} lacks its value"
            words.pop(0)
    return "there are too many arguments" if num_free < 0 else None


@each_document
def test_commands_exist_with_their_flags(path: Path) -> None:
    problems = {command: problem(command) for command in commands(path)}
    assert {command: what for command, what in problems.items() if what} == {}


@pytest.mark.parametrize(
    "command", ["headway fly", "headway down --dat", "headway status a b", "headway submit run.yaml --target"]
)
def test_a_command_that_is_not_so_is_noticed(command: str) -> None:
    assert problem(command)


def test_the_readme_shows_the_commands_that_matter() -> None:
    shown = {command.split()[1] for command in commands(ROOT / "README.md")}
    assert {"init", "up", "plan", "submit", "run", "status", "logs", "stop", "list", "show", "serve", "down"} <= shown


@each_document
def test_make_targets_exist(path: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {span.split()[1] for span in CODE.findall(prose(path)) if re.match(r"make [a-z-]+( |$)", span)}
    assert named <= known


# -- links


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = []
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@each_document
def test_files_named_in_prose_exist(path: Path) -> None:
    spans = CODE.findall(prose(path))
    named = [span for span in spans if re.fullmatch(r"(orchestrator|workloads|tests)/[\w/]+\.py", span)]
    assert [name for name in named if not (ROOT / name).exists()] == []


# -- names


def test_every_object_of_the_layout_is_in_the_picture() -> None:
    picture = next(text for language, text in fences(ROOT / "docs" / "concepts.md") if "runs/<run-id>" in text)
    words = {"run_id": "<run-id>", "name": "<name>", "model": "<model>", "fingerprint": "<fingerprint>"}
    words |= {"digest": "<digest>", "submission_id": "<submission-id>"}
    for name, function in inspect.getmembers(layout, inspect.isfunction):
        parameters = inspect.signature(function).parameters
        if name in ("number", "last_number"):
            continue
        given = {p: {"value": 1, "attempt": 1, "step": 100}.get(p, words.get(p, "")) for p in parameters}
        if name.startswith("channel"):
            given["name"] = "<channel>"
        assert function(**given) in picture, name


def test_every_kind_of_event_is_in_the_table() -> None:
    code = "".join(path.read_text() for path in (ROOT / "workloads").glob("*.py"))
    found = set(re.findall(r"(?:events\.append|\bnote)\(\s*\"(\w+)\"", code))
    found |= {kind for line in re.findall(r"\bkind = (\".*)", code) for kind in re.findall(r'"(\w+)"', line)}
    table = CONCEPTS.split("## Events")[1].split("## Exit codes")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == found


def test_every_variable_of_headways_own_is_in_the_table() -> None:
    files = [path for package in ("orchestrator", "workloads") for path in (ROOT / package).rglob("*.py")]
    found = {name for path in files for name in re.findall(r"\bHEADWAY_[A-Z]+\b", path.read_text())}
    assert found == set(re.findall(r"\bHEADWAY_[A-Z]+\b", CONCEPTS))


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "concepts.md"], ids=lambda path: path.name)
def test_exit_codes_are_those_of_the_error_tree(path: Path) -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HeadwayError)]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", path.read_text(), re.MULTILINE)}
    assert listed == {0, *(kind.exit_code for kind in kinds)}
