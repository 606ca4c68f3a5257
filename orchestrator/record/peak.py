"""Peak arithmetic of GPUs, by the names that torch gives them, and what share of it a run makes use of. Pure."""

from __future__ import annotations

import re

_TERA = 1e12
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"B200", 2250),  # NVIDIA HGX B200 data sheet: 36,000 with sparsity over 8 GPUs
    (r"GH200", 990),  # NVIDIA GH200 Grace Hopper Superchip data sheet: 1,979 with sparsity
    (r"H200 NVL", 835.5),  # NVIDIA H200 Tensor Core GPU data sheet: 1,671 with sparsity
    (r"H200", 989.5),  # the same, SXM: 1,979 with sparsity
    (r"H100 NVL", 835.5),  # NVIDIA H100 Tensor Core GPU data sheet: 1,671 with sparsity
    (r"H100 PCIe", 756),  # the same, of 2022: 1,513 with sparsity
    (r"H100", 989.5),  # the same, SXM: 1,979 with sparsity; torch says "NVIDIA H100 80GB HBM3"
    (r"A100", 312),  # NVIDIA A100 Tensor Core GPU data sheet, PCIe and SXM
    (r"A10", 125),  # NVIDIA A10 data sheet
    (r"L40S", 362.05),  # NVIDIA L40S data sheet: 733 with sparsity
    (r"L4", 121),  # NVIDIA L4 data sheet: 242 with sparsity
    (r"V100-PCIE", 112),  # NVIDIA V100 data sheet: of its tensor cores, which take fp16
    (r"V100", 125),  # the same, SXM2
    (r"T4", 65),  # NVIDIA T4 data sheet: fp16 too
)
"""Dense TFLOP/s in bf16, or in fp16 where a GPU has no bf16, accumulated in fp32; the first that fits is taken."""


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of one device.

    Args:
        device: as ``torch.cuda.get_device_name`` says it, such as ``NVIDIA A100-SXM4-80GB``.

    Returns:
        None where the device is not known: a CPU, a slice of a GPU (MIG), or a kind that no line here is for.
    """
    if " MIG " in device:
        return None
    for pattern, tera in _PEAKS:
        if re.search(rf"\b({pattern})\b", device):
            return tera * _TERA
    return None


def utilization(*, tokens_per_s: float, flops_per_token: float | None, device: str, num_devices: int) -> float | None:
    """Model FLOPs utilization (MFU): the FLOPs that the model needs over those that the devices could do in bf16.

    Activations that are computed again do not count. Source: Chowdhery et al. 2022 (PaLM), appendix B.

    Returns:
        None where the model's FLOPs or the device's peak are not known.
    """
    peak = peak_flops(device)
    if flops_per_token is None or peak is None:
        return None
    return tokens_per_s * flops_per_token / (peak * num_devices)
