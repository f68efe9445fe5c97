"""The triton backend of the head: its cases in a process of their own, and when it is taken or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lens import backends
from lens.head import lexical_pool

CASES = Path(__file__).with_name("triton_cases.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: Linux only")
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
)


def run(arguments, **environment):
    """A fresh Python: Triton reads TRITON_INTERPRET once, when it is imported."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=CASES.parents[1], env=settings, capture_output=True, text=True
    )


def run_cases(**environment):
    done = run(["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(CASES)], **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_cases_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels ran in the interpreter only")
def test_cases_on_a_gpu():
    run_cases(TRITON_INTERPRET="0")


POINTERS = {
    "values": "*fp32", "argmax": "*i32", "starts": "*i32", "ends": "*i32", "order": "*i64", "owner": "*i32",
    "factor": "*fp32", "chosen": "*i32", "gradient": "*fp32",
}  # fmt: skip
CONSTANTS = {"WIDTH": 100, "SLOTS": 32, "HAS_BIAS": True, "PRECISION": "ieee", "ENTRIES": 32}


@needs_triton
@not_interpreted
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "dtype", "changes"),
    [
        ("pool", "bf16", {"SUM": False, "ARGMAX": True}),
        ("pool", "fp32", {"SUM": True, "ARGMAX": False}),
        ("sum_logit_gradient", "fp16", {}),
        ("add_chosen", "bf16", {"DEPTH": 128}),
    ],
)
def test_kernels_compile_for_gpus(name, dtype, changes, capability, tmp_path, monkeypatch):
    """The interpreter takes more than the compiler does, which needs no GPU; every GPU must run the last tile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lens import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, options, constants = getattr(triton_kernels, name), {}, {**CONSTANTS, **changes}
    if name != "add_chosen":
        tile = triton_kernels._TILES[-1]
        kernel, options = kernel.fn, {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        constants.update(tile.kwargs)
    tensors = {**dict.fromkeys(["rows", "weight", "bias", "source", "out"], f"*{dtype}"), **POINTERS}
    signature = {x: "constexpr" if x in constants else tensors.get(x, "i32") for x in kernel.arg_names}
    constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"].startswith(b"\x7fELF")
    assert built.metadata.shared <= 99 * 1024  # what a block may have from 8.6 on


def test_triton_is_not_imported_before_it_is_used():
    done = run(["-c", "import sys, lens, lens.head; sys.exit('lens.triton_pool' in sys.modules)"])
    assert done.returncode == 0, done.stderr


def test_refused_with_the_remedy(monkeypatch):
    hidden, weight = torch.zeros(1, 2, 3), torch.zeros(4, 3)
    monkeypatch.setattr(backends, "_TRITON_LACKS", "")
    with pytest.raises(ValueError, match="takes float16, bfloat16 and float32; found torch.float64"):
        lexical_pool(hidden.double(), weight, backend="triton")
    monkeypatch.setattr(backends, "_TRITON_LACKS", "triton: pip install triton")
    with pytest.raises(ImportError, match="pip install triton"):
        lexical_pool(hidden, weight, backend="triton")


@not_interpreted
def test_what_triton_lacks_is_named(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert backends.missing_for_triton() == "triton: pip install triton"
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    assert backends.missing_for_triton() == "a C compiler: install gcc"
    monkeypatch.setattr(backends.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(backends.sysconfig, "get_path", lambda *names: "/nowhere")
    assert backends.missing_for_triton() == "Python's C headers: install python3-dev"


@needs_triton
@not_interpreted
def test_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setattr(backends, "_TRITON_LACKS", "")
    with pytest.raises(ValueError, match="needs CUDA tensors; found cpu"):
        lexical_pool(torch.zeros(1, 2, 3), torch.zeros(4, 3), backend="triton")


def test_chosen_for_cuda_tensors_that_fit(monkeypatch):
    class Hidden:
        """A tensor's facts, since there may be no device to make one on."""

        def __init__(self, is_cuda=True, dtype=torch.bfloat16):
            self.is_cuda, self.dtype, self.device = is_cuda, dtype, "cuda:0"

    capability = [(9, 0)]
    monkeypatch.setattr(backends, "_TRITON_LACKS", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    assert backends._triton_fits(Hidden())
    assert not backends._triton_fits(Hidden(is_cuda=False))
    assert not backends._triton_fits(Hidden(dtype=torch.float64))
    capability[0] = (7, 5)
    assert not backends._triton_fits(Hidden())
    capability[0] = (8, 0)
    assert backends._triton_fits(Hidden(dtype=torch.float32))
    monkeypatch.setattr(backends, "_TRITON_LACKS", "a C compiler: install gcc")
    assert not backends._triton_fits(Hidden())
