"""Devices and dtypes that are asked for → those that are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lens.attention import is_flash

Device = str | torch.device
Devices = Device | Sequence[Device] | None


def resolve_device(device: Device | None = None) -> torch.device:
    """The device asked for, or the first there is of cuda, mps, cpu; raises ValueError for one that is not there."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device is None:
        return torch.device(next(name for name in count if count[name]))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be cuda, mps or cpu, found {device!r}") from error
    there = count.get(found.type, 0)
    if not there:
        raise ValueError(f"device {str(device)!r} was asked for but torch sees none: use device='cpu' or None")
    if (found.index or 0) >= there:
        last = there - 1
        raise ValueError(f"device {str(device)!r} was asked for but the last that torch sees is {found.type}:{last}")
    return found


def resolve_devices(device: Devices, quantization: str | None = None) -> list[torch.device]:
    """The devices asked for, of which a model is read onto the first.

    Raises ValueError for one that is not there, an empty list, and several with a backbone in 4 or 8 bits.
    """
    if device is None or isinstance(device, Device):
        return [resolve_device(device)]
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization={quantization!r} works on one device only: name one, or leave quantization out")
    devices = [resolve_device(name) for name in device]
    if not devices:
        raise ValueError("no device is named: give one, or a list such as ['cuda:0', 'cuda:1']")
    return devices


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, attention: str | None = None) -> torch.dtype:
    """The dtype asked for, or bfloat16 on GPUs that have it and float32 elsewhere; raises ValueError for others, and
    for float32 with flash attention."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16; found {dtype!r}")
    if found == torch.float32 and is_flash(attention):
        raise ValueError(f"dtype=float32 contradicts attn_implementation={attention!r}: take bfloat16 or float16")
    return found
