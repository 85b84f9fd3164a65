"""The package on machines without a GPU, a driver, or Triton."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from quantlab_kernels import gpu


def run(program: str) -> str:
    """The output of a program in a new process."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_says_why_not_without_triton():
    said = run("""
        import sys, importlib.util
        sys.modules["triton"] = None
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
        from quantlab_kernels import gpu
        answer = gpu.available()
        print(bool(answer), answer.reason)
        print(bool(gpu.supports(__import__("torch").float16, 4, 256, 2)))
    """)
    assert said.splitlines() == ["False triton is not installed (`pip install triton`; it exists for Linux)", "True"]


def test_importing_every_module_asks_no_driver():
    pytest.importorskip("triton")
    said = run("""
        import torch
        def asked(*_, **__):
            raise AssertionError("the driver was asked")
        torch.cuda.is_available = torch.cuda.get_device_properties = torch.cuda._lazy_init = asked
        from triton.runtime import driver
        type(driver).active = property(asked)
        from quantlab_kernels.gpu import check, gpu_check, matmul, tune, w8a8
        print("quiet")
    """)
    assert said == "quiet"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_why_not_here():
    answer = gpu.available()
    assert not answer
    assert "GPU" in answer.reason or "triton" in answer.reason


def test_what_it_supports():
    assert gpu.supports(torch.bfloat16, 3, 4096, 32)
    assert gpu.supports(torch.float32, 4, 4096, 32).reason.startswith("activations are torch.float32")
    assert gpu.supports(torch.float16, 1, 4096, 32).reason.startswith("codes of 1 bits")
    assert "need groups that 32 divides" in gpu.supports(torch.float16, 3, 4096, 256).reason
