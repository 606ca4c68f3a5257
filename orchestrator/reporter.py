"""What a command says to a person, and to a program that asked for JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from orchestrator.errors import HeadwayError

Result = tuple[dict[str, Any], str]
"""What a command found: for programs, and as text for people."""


class Reporter:
    """Progress goes to stderr as it happens; the result goes to stdout, once, at the end."""

    def __init__(self, *, json_mode: bool = False) -> None:
        self.json_mode = json_mode

    def say(self, text: str) -> None:
        """One line of progress."""
        print(text, file=sys.stderr, flush=True)

    def stream(self, text: str) -> None:
        """A piece of the result as it comes, where the result is a text without end."""
        print(text, end="", flush=True)

    def result(self, facts: dict[str, Any], text: str) -> None:
        """The command's result: one JSON object, or the text for people."""
        output = json.dumps(facts, indent=2, default=str) if self.json_mode else text
        if output:
            print(output, flush=True)

    def error(self, error: HeadwayError) -> int:
        """Say what went wrong and what to do. Returns the exit code."""
        print(f"headway: {error.message}", file=sys.stderr)
        if error.next_step:
            print(f"  → {error.next_step}", file=sys.stderr)
        if self.json_mode:
            said = {"error": error.message, "next_step": error.next_step, "exit_code": error.exit_code}
            print(json.dumps({**error.facts, **said}, default=str), flush=True)
        return error.exit_code
