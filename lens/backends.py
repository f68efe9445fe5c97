"""Which code pools the head's logits: the readable formula, blocks in torch, or kernels on a GPU."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "eager", "chunked", "triton"]

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def missing_for_triton() -> str:
    """What triton lacks on this machine, nothing being imported; it compiles a C module when it first runs a kernel."""
    if find_spec("triton") is None:
        return "triton: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler: install gcc"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python's C headers: install python3-dev"
    return ""


_TRITON_LACKS = missing_for_triton()


def choose(backend: Backend, hidden: Tensor) -> Backend:
    """The backend for hidden states: `backend` itself, or for `auto` the fastest that can take them.

    Raises ValueError for unknown names and for tensors that triton cannot take, ImportError for backend="triton"
    where triton or what it needs is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be auto, eager, chunked or triton; found {backend!r}")
    if backend == "auto":
        return "triton" if _triton_fits(hidden) else "chunked"
    if backend == "triton":
        _check_triton(hidden)
    return backend


def _triton_fits(hidden: Tensor) -> bool:
    return (
        hidden.is_cuda
        and hidden.dtype in _TRITON_DTYPES
        and not _TRITON_LACKS
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    )


def _check_triton(hidden: Tensor) -> None:
    if _TRITON_LACKS:
        raise ImportError(f"backend='triton' needs {_TRITON_LACKS}, or take backend='auto'")
    if hidden.dtype not in _TRITON_DTYPES:
        raise ValueError(f"backend='triton' takes float16, bfloat16 and float32; found {hidden.dtype}: cast, or 'auto'")
    if not (hidden.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError(
            f"backend='triton' needs CUDA tensors; found {hidden.device}: move them, take backend='auto', "
            "or set TRITON_INTERPRET=1 before Python starts, which is slow and for tests"
        )
