"""YAML files that people write, as frozen models: unknown keys are errors, and a refusal names field, value and limit.

Used by the run file (spec/) and by a target's settings (target_settings.py).
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from orchestrator.errors import SpecError

API_VERSION = "headway/v1"

NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
SECRET_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"
ABSOLUTE_PATH = r"^/"
RELEASE = r"^[0-9]+\.[0-9]+\.[0-9]+$"
CURRENCY = r"^[A-Z]{3}$"
_PATTERNS = {
    NAME: "may hold only a-z, 0-9 and dashes, and starts and ends with one of a-z and 0-9",
    ENV_NAME: "may hold only letters, digits and underscores, and starts with no digit",
    SECRET_NAME: "may hold only a-z, 0-9, dashes and dots, and starts and ends with one of a-z and 0-9",
    QUANTITY: "must be a Kubernetes quantity, such as 500m or 64Gi",
    ABSOLUTE_PATH: "must be an absolute path",
    RELEASE: "must be three numbers, such as 2.60.0",
    CURRENCY: "must be three capital letters, such as USD",
}
"""What a field's pattern means, for people."""


class Part(BaseModel):
    """A mapping of fields in such a file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads yes and on as true, which pydantic would take for the number 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("a truth value has no meaning here")
        return value


Document = TypeVar("Document", bound=Part)


def read_yaml(path: Path, *, what: str, compare: str) -> object:
    """A file's document.

    Args:
        what: the file's kind, for messages.
        compare: where a right one is to be found.

    Raises:
        SpecError: it is missing or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise SpecError(
            f"There is no {what} at {path}.", next_step=f"Name an existing file, or start from: {compare}"
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"The {what} {path} cannot be read: {e}.") from e
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(e, "problem", None) or "it cannot be parsed"
        raise SpecError(f"{path} is not YAML{where}: {problem}.", next_step=f"Compare with: {compare}") from e


def check(model: type[Document], document: object, *, source: str, compare: str, all_fields: str) -> Document:
    """A parsed document as its model.

    Raises:
        SpecError: one line per fault: the field, its value, the limit.
    """
    if not isinstance(document, dict):
        raise SpecError(
            f"{source} holds {type(document).__name__}, not a mapping of fields.",
            next_step=f"Compare with: {compare}",
        )
    if document.get("apiVersion") != API_VERSION:
        found = repr(document["apiVersion"]) if "apiVersion" in document else "missing"
        raise SpecError(
            f"{source}: apiVersion is {found}; this Headway reads {API_VERSION!r}.",
            next_step=f"Write apiVersion: {API_VERSION}",
        )
    try:
        return model.model_validate(document)
    except ValidationError as e:
        faults = [_fault(model, error) for error in e.errors(include_url=False)]
        if len(faults) == 1:
            message = f"{source}: {faults[0]}"
        else:
            message = "\n  ".join([f"{source} has {len(faults)} faults:", *faults])
        raise SpecError(message, next_step=f"All fields and limits: {all_fields}") from e


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key stand twice and takes the last; a person who wrote it twice meant one of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_WORDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "may not have fewer than {min_length} characters",
    "string_too_long": "may have at most {max_length} characters",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping of fields",
    "dict_type": "must be a mapping of fields",
    "tuple_type": "must be a list",
}
"""Limits in the words of such a file, by pydantic's type of error."""


def _fault(model: type[BaseModel], error: Any) -> str:
    """One pydantic error as ``field: value is refused: limit``."""
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: no such field{_near(model, field)}."
    if error["type"] == "missing":
        return f"{field}: missing, and has no default."
    context = error.get("ctx", {})
    words = _PATTERNS[context["pattern"]] if "pattern" in context else _WORDS.get(error["type"], "").format(**context)
    message = words or str(error["msg"]).removeprefix("Value error, ")
    if not field:  # a combination of fields, which its message names
        return f"{message}."
    value = error.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f" {json.dumps(value, default=str)[:80]} is refused:"
    return f"{field}:{shown} {message[:1].lower()}{message[1:]}."


def _near(model: type[BaseModel], field: str) -> str:
    """A hint at the field that was probably meant."""
    *parents, leaf = field.split(".")
    for parent in parents:
        known = model.model_fields.get(parent)
        if known is None:  # a key that people choose, or a number in a list
            continue
        model = next((kind for kind in _kinds(known.annotation) if issubclass(kind, BaseModel)), model)
    close = difflib.get_close_matches(leaf, model.model_fields, n=1)
    return f"; did you mean {close[0]}" if close else f"; known here are {', '.join(model.model_fields)}"


def _kinds(annotation: Any) -> list[type]:
    """The classes in an annotation, however deep."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _kinds(part)]
