"""Preprocessed cases for the tests, labelled with what a model says of them: its Dice on them is 1."""

from __future__ import annotations

import json
from pathlib import Path

import models
import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_dyn.inference import Predictor


def write_preprocessed(root: Path, model: Path, shape=(20, 22, 18), training: int = 3, validation: int = 2) -> Path:
    """Cases of the data set of ``model`` in ``root``, and one fold of them; ``root`` is ``nnUNet_preprocessed``."""
    predictor = Predictor.from_folder(model, (0,), device="cpu", threads=1)
    folder = root / predictor.plans_manager.dataset_name / predictor.configuration_manager.data_identifier
    folder.mkdir(parents=True)
    names = [f"case_{number}" for number in range(training + validation)]
    for number, name in enumerate(names):
        image = models.image(shape, len(predictor.dataset_json["channel_names"]), seed=number)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
        labels = predictor.label_manager.convert_logits_to_segmentation(logits.float()).numpy()[None].astype(np.int16)
        found = {label: np.argwhere(labels == label)[:100] for label in predictor.label_manager.foreground_labels}
        blocks, chunks = comp_blosc2_params(image.shape, (16,) * 3, image.itemsize)
        nnUNetDatasetBlosc2.save_case(image, labels, {"class_locations": found}, str(folder / name),
                                      chunks=chunks, blocks=blocks, chunks_seg=chunks, blocks_seg=blocks)  # fmt: skip
    splits = [{"train": names[:training], "val": names[training:]}]
    (folder.parent / "splits_final.json").write_text(json.dumps(splits))
    return root
