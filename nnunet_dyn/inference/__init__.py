"""Prediction with less memory than nnU-Net's own, and the same segmentation.

from nnunet_dyn.inference import Predictor

predictor = Predictor.from_folder("nnUNetTrainer__nnUNetPlans__3d_fullres", folds=(0,))
predicted = predictor.predict(array, spacing)
"""

from importlib import import_module

_HOMES = {"Predictor": "predictor", "Prediction": "predictor", "Outcome": "predictor"}

__all__ = list(_HOMES)


def __getattr__(name: str):
    """Import torch and nnU-Net only for a class that needs them, so that the command can check its arguments first."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
