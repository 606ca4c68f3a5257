"""Nothing in Headway unpickles: a checkpoint or a message from the store can never run code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for package in ("orchestrator", "workloads") for path in (ROOT / package).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {
    "torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save", "torch.jit.load",
    "torch.jit.save", "np.save", "numpy.save", "np.savez", "numpy.savez", "pd.read_pickle", "pandas.read_pickle",
}  # fmt: skip
COLLECTIVES = {
    "all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip


def offences(source: str) -> list[str]:
    """Everything in a module that pickles or unpickles."""
    found = []
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    aliases = {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            full = [f"{module}.{alias.name}" for alias in node.names]
            found += [name for name in full if name in CALLS or name.rsplit(".", 1)[-1] in COLLECTIVES]
            found += [module] if module.split(".")[0] in MODULES else []
        elif isinstance(node, ast.Constant):
            found += [node.value] if isinstance(node.value, str) and node.value in MODULES | COLLECTIVES else []
        elif isinstance(node, ast.Attribute):
            dotted = _full_name(ast.unparse(node), aliases)
            found += [dotted] if dotted in CALLS or node.attr in COLLECTIVES else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [node.arg] if not (isinstance(node.value, ast.Constant) and node.value.value is False) else []
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found += [node.arg] if not _is_untrusted(node.value) else []
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "use_safetensors"):
            found += [node.arg] if not (isinstance(node.value, ast.Constant) and node.value.value is True) else []
    return found


def _is_untrusted(value: ast.expr) -> bool:
    """Whether foreign code may run only as far as the run file says so, whose field has this very name."""
    is_false = isinstance(value, ast.Constant) and value.value is False
    return is_false or re.fullmatch(r"(?:\w+\.)*trust_remote_code", ast.unparse(value)) is not None


def _full_name(dotted: str, aliases: dict[str, str]) -> str:
    """``t.load`` as ``torch.load`` where torch was imported as t; np and pd keep their usual names."""
    first, dot, rest = dotted.partition(".")
    return dotted if first in ("np", "pd") else aliases.get(first, first) + dot + rest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_pickles(path: Path) -> None:
    assert offences(path.read_text(encoding="utf-8")) == []


def test_every_model_is_read_as_safetensors() -> None:
    """transformers falls back to pickled weights unless it is told not to; configs and tokenizers hold none."""
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            called = ast.unparse(call.func)
            if called.endswith(".from_pretrained") and not re.search("Tokenizer|Config|Processor", called):
                assert "use_safetensors" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle.compat",
        "from pickle import loads",
        "from torch import load",
        "torch.load(f, weights_only=True)",
        "torch.serialization.load(f)",
        "from torch.serialization import save",
        "from torch import serialization; serialization.load(f)",
        "from torch import serialization as s; s.save(x, f)",
        "model = torch.save",
        "import torch as t; t.load(f)",
        "import torch.distributed as d; d.scatter_object_list(a, b)",
        "getattr(dist, 'broadcast_object_list')(x)",
        "importlib.import_module('pickle')",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "dist.all_gather_object(a, b)",
        "torch.distributed.broadcast_object_list(x)",
        "from torch.distributed import gather_object",
        "AutoModel.from_pretrained(x, use_safetensors=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "AutoModel.from_pretrained(x, trust_remote_code=trust_remote_code or True)",
    ],
)
def test_the_walk_sees(source: str) -> None:
    assert offences(source)


def test_the_walk_is_not_over_eager() -> None:
    assert offences("np.load(f, allow_pickle=False)\njson.load(f)\nsafetensors.torch.load(b)\ndist.all_reduce(t)") == []
    assert len(FILES) > 50
