"""What each process of the test of calibration under DistributedDataParallel runs; a new process can import it."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from nnunet_dyn.trainers.base import CalibratedTrainer


def calibrate(rank: int, folder: str) -> None:
    """Three cases in the first process, the last of which fails; writes what each process got of them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer, worked, got = SimpleNamespace(is_ddp=True, local_rank=rank), [], []

    def work(case: int) -> int:
        worked.append(case)
        if case == 2:
            raise OSError("no room for the case")
        return 10 * case

    for case in range(3):
        try:
            got.append(CalibratedTrainer.on_first(trainer, lambda case=case: work(case)))
        except RuntimeError as error:
            got.append(str(error))
    Path(folder, f"{rank}.json").write_text(json.dumps({"worked": worked, "got": got}))
    dist.destroy_process_group()
