"""Trainers for the tests: how to get one, build its network, and run its steps."""

import nnunet_dyn.trainers


def trainer_class(name):
    return getattr(nnunet_dyn.trainers, name)


def build(name, plans, channels=2, heads=3, deep_supervision=True):
    """The network of trainer ``name`` for the one configuration of ``plans``."""
    configuration = plans.get_configuration(plans.available_configurations[0])
    return trainer_class(name).build_network_architecture(plans, configuration, channels, heads, deep_supervision)


def steps(trainer, count=1):
    """Initialise ``trainer`` if need be and run ``count`` training steps on nnU-Net's own batches."""
    if not trainer.was_initialized:
        trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    return [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(count)]


LABELS = {
    "classes": {"labels": {"background": 0, "organ": 1, "tumour": 2}},
    "regions": {
        "labels": {"background": 0, "whole": [1, 2], "tumour": [2]},
        "regions_class_order": [1, 2],
    },
    "ignore": {"labels": {"background": 0, "organ": 1, "ignore": 2}},
}
