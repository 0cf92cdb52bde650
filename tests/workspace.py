"""nnU-Net's folders and commands, for the tests that run them."""

import os
import subprocess
import sys
from pathlib import Path


class Workspace:
    """nnU-Net's three folders and its commands."""

    def __init__(self, folder: Path, dataset: str):
        self.folder, self.dataset = folder, dataset
        # nnU-Net's eight export processes, and threads that wait by spinning, take most of the time on two cores.
        few = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
        self.environment = {**os.environ, **few}
        for kind in ("raw", "preprocessed", "results"):
            (folder / kind).mkdir()
            self.environment[f"nnUNet_{kind}"] = str(folder / kind)

    def run(self, command: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        program = Path(sys.executable).with_name(command)
        assert program.exists(), f"{command} is not installed beside {sys.executable}"
        done = subprocess.run(
            [program, *map(str, arguments)], env=self.environment, capture_output=True, text=True, timeout=900
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    def model(self, configuration: str, trainer: str, plans: str = "nnUNetPlans") -> Path:
        return self.folder / "results" / self.dataset / f"{trainer}__{plans}__{configuration}"
