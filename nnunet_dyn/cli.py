"""The console script: find the command, parse its arguments, run it, turn its errors into one line.

A command is a row of COMMANDS. Its module offers `add_arguments(parser)` and `run(args) -> exit status`, and is
imported only when the command is used.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from nnunet_dyn import __version__
from nnunet_dyn.errors import JobError, UsageError
from nnunet_dyn.interrupts import interruptible


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    summary: str
    example: str


COMMANDS = (
    Command("demo", "nnunet_dyn.demo", "train, predict and score on generated data, on a CPU", "nnunet_dyn demo"),
    Command(
        "doctor",
        "nnunet_dyn.doctor",
        "check the installation and say how to mend it",
        "nnunet_dyn doctor nnUNetTrainerEffV2S_20epochs",
    ),
    Command(
        "export",
        "nnunet_dyn.export",
        "write a trained model for OpenVINO or ONNX Runtime, and check it",
        "nnunet_dyn export -m MODEL -o OUT --engine openvino --precision int8",
    ),
    Command("list", "nnunet_dyn.listing", "show every trainer and template and what it costs", "nnunet_dyn list"),
    Command(
        "plan",
        "nnunet_dyn.plan",
        "add configurations with other networks to a data set's plans",
        "nnunet_dyn plan -d 501 -t effv2s fullyeffb0",
    ),
    Command(
        "predict",
        "nnunet_dyn.predict",
        "segment images with an nnU-Net model, in less memory",
        "nnunet_dyn predict -d 501 -c 3d_fullres -f 0 -i IMAGES -o OUT",
    ),
    Command(
        "profile",
        "nnunet_dyn.profiling",
        "count and time networks beside nnU-Net's own",
        "nnunet_dyn profile -d 501 -c 3d_fullres -tr nnUNetTrainerEffV2S",
    ),
)


class _Parser(argparse.ArgumentParser):
    """Reports bad usage in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, ModuleType]:
    parser = _Parser(
        prog="nnunet_dyn",
        description="Efficient and dynamic segmentation methods as a plugin for nnU-Net v2.",
        epilog="example: nnunet_dyn doctor",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_dyn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    wanted = next((argument for argument in argv if not argument.startswith("-")), None)
    module = None
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            epilog=f"example: {command.example}",
        )
        if command.name == wanted:
            module = _load(command)
            module.add_arguments(subparser)
    args = parser.parse_args(argv)
    if module is None:
        parser.error(f"no command given, expected one of {', '.join(command.name for command in COMMANDS)}")
    return args, module


def _load(command: Command) -> ModuleType:
    try:
        return import_module(command.module)
    except ImportError as error:
        raise JobError(
            f"cannot load the command {command.name!r}: {error}. "
            "Expected nnunet_dyn and what it needs in this environment; run 'nnunet_dyn doctor' for the remedy."
        ) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a failed job, 2 for bad usage."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, module = _parse(argv)
        with interruptible():
            return module.run(args)
    except (UsageError, JobError) as error:
        print("nnunet_dyn:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("nnunet_dyn: interrupted", file=sys.stderr)
        return 130
