"""torch.compile's default compiler, which needs one for C++: a dynamic convolution, and prediction."""

import os
import shutil
import subprocess
import sys

import models
import numpy as np
import pytest

from nnunet_dyn.inference import Predictor

# In a process of its own, so that nothing the other tests compiled or patched matters.
CODE = """
import torch
from nnunet_dyn.architectures.dynamic_convs.magic import MAGICConv

conv = MAGICConv(torch.nn.Conv2d, 8, 8, 3, padding=1, n_kernels=2).eval()
x = torch.randn(2, 8, 16, 16)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(conv)(x), conv(x), rtol=1e-3, atol=1e-4)
"""


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and no g++ is installed"
)
PREDICT = """
import sys
import numpy as np
from torch._dynamo.eval_frame import OptimizedModule
from nnunet_dyn.inference import Predictor

predictor = Predictor.from_folder(sys.argv[1], device="cpu")
assert isinstance(predictor.engine.network, OptimizedModule)
np.save(sys.argv[3], predictor.predict(np.load(sys.argv[2]), (1, 1, 1)).segmentation)
"""


@NEEDS_COMPILER
def test_a_compiled_convolution_computes_the_same():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@NEEDS_COMPILER
def test_prediction_by_a_compiled_network(tmp_path):
    """nnU-Net's variable asks for it, of each fold's weights."""
    folder, array = models.write_model(tmp_path / "model", folds=2), models.image((16, 20, 18))
    np.save(tmp_path / "array.npy", array)
    command = [sys.executable, "-c", PREDICT, folder, tmp_path / "array.npy", tmp_path / "compiled.npy"]
    compiled = os.environ | {"nnUNet_compile": "true"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = Predictor.from_folder(folder, device="cpu").predict(array, (1, 1, 1)).segmentation
    assert (np.load(tmp_path / "compiled.npy") == expected).mean() >= 0.9999 and len(np.unique(expected)) > 2
