"""The main job on generated data: plan, preprocess, train, predict and score, in minutes and on a CPU."""

from nnunet_dyn.demo.generator import LABELS, generate_case, generate_dataset
from nnunet_dyn.demo.runner import add_arguments, run

__all__ = ["LABELS", "add_arguments", "generate_case", "generate_dataset", "run"]
