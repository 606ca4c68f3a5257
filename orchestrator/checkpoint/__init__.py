"""Checkpoints of a ZeRO engine: saved behind training, committed by a manifest, resumed at any scale.

For a DeepSpeed loop of your own, :class:`Checkpointer` is all there is to know; docs/checkpoints.md shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]


def __getattr__(name: str) -> Any:
    # Late, because it imports torch, and the command line asks for the catalog alone.
    if name == "Checkpointer":
        from orchestrator.checkpoint.checkpointer import Checkpointer

        return Checkpointer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
