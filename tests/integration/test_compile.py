"""A dynamic convolution through torch.compile's default compiler, which needs one for C++."""

import shutil
import subprocess
import sys

import pytest

# In a process of its own, so that nothing the other tests compiled or patched matters.
CODE = """
import torch
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv

conv = MAGICConv(torch.nn.Conv2d, 8, 8, 3, padding=1, n_kernels=2).eval()
x = torch.randn(2, 8, 16, 16)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(conv)(x), conv(x), rtol=1e-3, atol=1e-4)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and no g++ is installed")
def test_a_compiled_convolution_computes_the_same():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
