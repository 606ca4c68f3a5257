"""Whose fault it is that a version does not load: the version's, whose bytes fail everywhere, or the machine's."""

from __future__ import annotations

import errno

from orchestrator.errors import EnvironmentUnusable, NotFound

_OF_THE_MACHINE = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
    }
)
_WORDS = ("CUDA", "CUDNN", "CUBLAS", "NVIDIA", "DEFAULTCPUALLOCATOR", "CAN'T ALLOCATE MEMORY", "CAN'T START NEW THREAD")


def is_of_the_machine(error: BaseException) -> bool:
    """Whether another machine, or this one at another time, may load what raised this here. Pure."""
    if isinstance(error, EnvironmentUnusable):
        return not isinstance(error, NotFound)  # a file that the version names lies nowhere
    if is_lack_of_memory(error) or isinstance(error, ImportError):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    # torch says by its words alone that the driver, the device or the allocator failed.
    if isinstance(error, RuntimeError) and any(word in str(error).upper() for word in _WORDS):
        return True
    return error.__cause__ is not None and is_of_the_machine(error.__cause__)


def is_lack_of_memory(error: BaseException) -> bool:
    """By the name: torch, whose error one of them is, is not imported here."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
