"""Tells nnU-Net where the trainers are. Runs at every start of Python, so it imports only os.

The .pth file that installation puts into site-packages calls `register`.
"""

import os

VARIABLE = "nnUNet_extTrainer"
OFF_SWITCH = "NNUNET_DYN_REGISTER"
TRAINER_DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ext_trainer")


def is_switched_off(environ=os.environ) -> bool:
    """Whether the user turned automatic registration off: 0, false, no or off, in any case."""
    return environ.get(OFF_SWITCH, "").strip().lower() in ("0", "false", "no", "off")


def registered_directories(environ=os.environ) -> list[str]:
    """The directories that nnU-Net searches for trainers, in its order."""
    return [entry for entry in environ.get(VARIABLE, "").split(os.pathsep) if entry.strip()]


def is_registered(environ=os.environ) -> bool:
    """Whether nnU-Net searches this package's trainer directory."""
    wanted = os.path.normcase(TRAINER_DIRECTORY)
    return any(os.path.normcase(os.path.abspath(entry)) == wanted for entry in registered_directories(environ))


def with_trainer_directory(environ=os.environ) -> str:
    """The variable's value with this package's directory in it, after whatever the user put there."""
    if is_registered(environ):
        return environ[VARIABLE]
    return os.pathsep.join([*registered_directories(environ), TRAINER_DIRECTORY])


def register(environ=os.environ) -> None:
    """Add this package's trainer directory to nnU-Net's variable, once, unless switched off."""
    if not is_switched_off(environ):
        environ[VARIABLE] = with_trainer_directory(environ)
