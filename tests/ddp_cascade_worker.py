"""What each process of the test of the ROI cascade's trainer under DistributedDataParallel runs."""

import functools

import numpy as np
import torch
import torch.distributed as dist
from cascade_training import make_trainer
from torch.nn.parallel import DistributedDataParallel

NAME = "nnUNetTrainerROICascade_2epochs_2iters"


def on_cpu(configuration: str):
    """A trainer as ``nnUNetv2_train -num_gpus`` has it, but for the GPUs that nnU-Net takes for granted there."""
    trainer = make_trainer(configuration, name=NAME)
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    return trainer


def train_cascade(rank: int, folder: str) -> None:
    """The whole training of both stages, with validation epochs and calibration; writes what each process has then."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    wrap = DistributedDataParallel.__init__
    DistributedDataParallel.__init__ = functools.wraps(wrap)(
        lambda self, module, device_ids, **options: wrap(self, module, **options)
    )
    found = {}
    for configuration in ("3d_detect", "3d_roi"):
        np.random.seed(rank)
        trainer = on_cpu(configuration)
        trainer.initialize()
        start = {key: value.clone() for key, value in trainer.module.named_parameters()}
        trainer.run_training()
        log = trainer.logger.local_logger.my_fantastic_logging
        found[configuration] = {
            "weights": trainer.module.state_dict(),
            "changed": [key for key, value in trainer.module.named_parameters() if not torch.equal(value, start[key])],
            "log": {key: log[key] for key in ("train_losses", "val_losses", "mean_fg_dice")},
            "batch": trainer.batch_size,
        }
    torch.save(found, f"{folder}/{rank}.pth")
    dist.destroy_process_group()
