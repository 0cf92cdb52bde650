"""Trainers by name: every name of the catalogue, with or without a length, is an attribute of this module.

Classes are made when first asked for and kept, so each look-up, in whatever way, gives the same object, and pickle
finds it here by name.
"""

from nnunet_dyn.trainers.catalogue import resolve, suggest, trainer_names

__all__ = ["suggest", "trainer_names"]


def __getattr__(name: str) -> type:
    return resolve(name)
