from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from orchestrator.errors import EnvironmentUnusable, IntegrityError, NotFound, StoreError
from workloads.serve.faults import is_lack_of_memory, is_of_the_machine
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.warm_up import TooSlow


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (IntegrityError("does not match its digest"), False),
        (NotFound("no such object"), False),
        (NonFiniteLogits("NaN"), False),
        (TooSlow("slow"), False),
        (SafetensorError("header too large"), False),
        (OSError("config.json is not a valid JSON file"), False),
        (FileNotFoundError(errno.ENOENT, "no such file"), False),
        (ValueError("unknown model type"), False),
        (KeyError("model_type"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (StoreError("down"), True),
        (EnvironmentUnusable("The disk is full."), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("Found no NVIDIA driver on your system."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (ModuleNotFoundError("No module named 'peft'"), True),
        (caused(ValueError("cannot load"), ImportError("libcudart.so.12")), True),
    ],
)
def test_whose_fault_it_is(error: Exception, expected: bool) -> None:
    assert is_of_the_machine(error) is expected


def test_a_lack_of_memory_is_known_by_its_name() -> None:
    assert is_lack_of_memory(MemoryError())
    assert is_lack_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_lack_of_memory(RuntimeError("out of memory"))
