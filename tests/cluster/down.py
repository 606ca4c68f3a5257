"""``make cluster-down``: ends the cluster and everything that it made, but for what was built."""

from __future__ import annotations

import sys

from orchestrator.errors import HeadwayError
from orchestrator.targets import processes
from tests.cluster.cleanup import end_everything, left_behind
from tests.cluster.layout import find_layout
from tests.cluster.lock import only_one


def main() -> int:
    try:
        layout = find_layout()
        with only_one(layout), processes.uninterrupted():
            if not left_behind(layout):
                print("There is no cluster.")
                return 0
            print(f"The cluster has ended ({end_everything(layout)} processes).")
    except HeadwayError as e:
        print(f"{e.message}\n  → {e.next_step or 'Run it again'}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
