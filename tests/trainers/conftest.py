"""A small data set as nnU-Net leaves it after preprocessing, and trainers on it."""

import json

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from plans import plans_manager
from training import trainer_class


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A factory of trainers on a data set that is preprocessed as nnU-Net leaves it."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    torch.set_num_threads(1)

    def make(name, dimension=3, channels=1, labels=None, regions_class_order=None, **plan):
        labels = labels or {"background": 0, "organ": 1, "tumour": 2}
        plans = plans_manager(dimension, n_stages=3, features=(8, 12, 16), patch_size=[16] * dimension, **plan)
        dataset = {
            "channel_names": {str(channel): "CT" for channel in range(channels)},
            "labels": labels,
            "numTraining": 2,
            "file_ending": ".nii.gz",
        }
        if regions_class_order:
            dataset["regions_class_order"] = regions_class_order
        folder = tmp_path / "preprocessed" / "Dataset999_Test" / "nnUNetPlans"
        folder.mkdir(parents=True, exist_ok=True)
        manager = plans.get_label_manager(dataset)
        sampled = list(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        if manager.has_ignore_label:
            sampled.append([-1, *manager.all_labels])
        rng = np.random.default_rng(0)
        highest = max(max(v) if isinstance(v, (list, tuple)) else v for v in labels.values())
        for case in ("case_0", "case_1"):
            if (folder / f"{case}.pkl").exists():
                continue
            segmentation = np.zeros((1, 20, 20, 20), np.int16)
            for label in range(1, highest + 1):
                segmentation[0, 4 * label - 2 : 4 * label + 1, 5:15, 5:15] = label
            image = segmentation + rng.normal(0, 0.1, (channels, 20, 20, 20))
            locations = DefaultPreprocessor._sample_foreground_locations(segmentation, sampled)
            image = image.astype(np.float32)
            blocks, chunks = comp_blosc2_params(image.shape, (16,) * 3, image.itemsize)
            seg_blocks, seg_chunks = comp_blosc2_params(segmentation.shape, (16,) * 3, segmentation.itemsize)
            nnUNetDatasetBlosc2.save_case(
                image,
                segmentation,
                {"class_locations": locations},
                str(folder / case),
                chunks=chunks,
                blocks=blocks,
                chunks_seg=seg_chunks,
                blocks_seg=seg_blocks,
            )
        save_json(plans.plans, str(tmp_path / "preprocessed" / "Dataset999_Test" / "nnUNetPlans.json"))
        configuration = plans.available_configurations[0]
        return trainer_class(name)(
            json.loads(json.dumps(plans.plans)) | {"continue_training": False},
            configuration,
            "all",
            dataset,
            torch.device("cpu"),
        )

    return make
