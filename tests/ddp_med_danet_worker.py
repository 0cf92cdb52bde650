"""What each process of the test of Med-DANet V2's trainer under DistributedDataParallel runs, on the CPU."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as host
from torch.nn.parallel import DistributedDataParallel

from nnunet_dyn import trainers

#: One of each phase, of seven.
EPOCHS = (0, 5, 6)


def run(rank: int, folder: str, name: str, content: dict, dataset: dict) -> None:
    """An epoch of each phase with validation, calibration; writes what each process has come to.

    nnU-Net knows several processes on GPUs only: what it does to the network for that is left out.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    host.DDP = lambda network, device_ids: DistributedDataParallel(network)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm = staticmethod(lambda network: network)
    trainer = getattr(trainers, name)(content, "2d", "all", dataset)
    trainer.device, trainer.grad_scaler = torch.device("cpu"), None
    torch.manual_seed(0)
    trainer.initialize()
    start = {key: value.clone() for key, value in trainer.module.named_parameters()}
    assert not trainer.network.broadcast_buffers, "validation alone would wait for who has no case"
    if rank == 0:
        with torch.no_grad():
            trainer.network.eval()(torch.randn(1, 1, 32, 32))
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    log = trainer.logger.local_logger.my_fantastic_logging
    for epoch in EPOCHS:
        for values in log.values():
            values.extend([0.0] * (epoch - len(values)))
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            outputs = [trainer.validation_step(next(trainer.dataloader_val))]
            trainer.on_validation_epoch_end(outputs)
    found = trainer.calibrate()
    thresholds = [trainer.module.skip_threshold.item(), trainer.module.crop_threshold.item()]
    end = dict(trainer.module.named_parameters())
    torch.save(end, f"{folder}/{rank}.pth")
    changed = sorted({key.partition(".")[0] for key in end if not torch.equal(end[key], start[key])})
    costs = {key: [log[key][epoch] for epoch in EPOCHS] for key in ("skipped", "cropped", "whole", "gmacs")}
    Path(folder, f"{rank}.json").write_text(json.dumps([found.to_json(), thresholds, costs, changed]))
    dist.destroy_process_group()
