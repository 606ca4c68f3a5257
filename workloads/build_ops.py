"""Builds DeepSpeed's CPU communication op ahead of time: ``python -m workloads.build_ops``.

DeepSpeed compiles it at first use, about a minute, in every fresh place. Built once here, workers find it in
``TORCH_EXTENSIONS_DIR`` (by default ``~/.cache/torch_extensions``).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed prints its progress; that matters only where it fails.
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            from workloads.engine import build_cpu_op

            build_cpu_op()
    except Exception as e:  # whatever the compiler or DeepSpeed throw, a person needs its words and what to do
        print(f"{said.getvalue()}\nDeepSpeed's CPU communication op cannot be built: {e}", file=sys.stderr)
        print("  → It needs a C++ compiler (g++) and Python's headers. See: headway doctor", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
