"""`nnunet_dyn doctor`: what is installed, what nnU-Net will find, and how to mend what is wrong."""

import contextlib
import importlib
import io
import json
import os
import platform
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from nnunet_dyn import __version__, _register

REGISTRATION_FILE = "nnunet_dyn_register.pth"
REQUIRED_NNUNET = "nnunetv2>=2.8.1,<3"
REQUIRED_TORCH = "torch>=2.4"

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Check:
    """One finding. A warning may be intended or irrelevant; an error stops training with these trainers."""

    section: str
    status: str
    text: str
    remedy: str | None = None


def add_arguments(parser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="trainer name to look up as nnU-Net would")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args) -> int:
    """Print every check, and return 1 if one of them is an error."""
    checks = []
    for check in all_checks(args.names):
        if not args.json:
            _print(check, first=not checks or checks[-1].section != check.section)
        checks.append(check)
    errors = sum(check.status == ERROR for check in checks)
    warnings = sum(check.status == WARNING for check in checks)
    if args.json:
        print(json.dumps({"ok": not errors, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(f"\n{errors} error(s), {warnings} warning(s)")
    return 1 if errors else 0


def all_checks(names: list[str]) -> Iterator[Check]:
    """Yield the checks in the order a reader needs them, each as soon as it is known."""
    yield from check_versions()
    yield from check_registration()
    yield from check_search(names)
    yield from check_device()
    yield from check_variables()


def _print(check: Check, first: bool) -> None:
    if first:
        print(f"\n{check.section}")
    label = {OK: "ok     ", WARNING: "warning", ERROR: "ERROR  "}[check.status]
    print(f"  {label}  {check.text}", flush=True)
    if check.remedy:
        print(f"           -> {check.remedy}", flush=True)


def check_versions() -> Iterator[Check]:
    """The interpreter, this package, and whether what it builds on is there."""
    yield Check("Versions", OK, f"python {platform.python_version()} ({sys.executable})")
    yield Check("Versions", OK, f"nnunet_dyn {__version__} ({Path(__file__).parent})")
    for distribution, remedy in (
        ("nnunetv2", f'pip install "{REQUIRED_NNUNET}"'),
        ("torch", f'pip install "{REQUIRED_TORCH}"'),
        ("dynamic_network_architectures", "pip install dynamic_network_architectures"),
    ):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            yield Check("Versions", ERROR, f"{distribution} is not installed in this environment", remedy)
            continue
        if distribution == "nnunetv2" and not (2, 8, 1) <= _release(version) < (3,):
            yield Check("Versions", ERROR, f"nnunetv2 {version}, expected {REQUIRED_NNUNET}", remedy)
        elif distribution == "torch" and _release(version) < (2, 4):
            yield Check("Versions", ERROR, f"torch {version}, expected {REQUIRED_TORCH}", remedy)
        else:
            yield Check("Versions", OK, f"{distribution} {version}")
    with contextlib.suppress(metadata.PackageNotFoundError):
        yield Check("Versions", OK, f"timm {metadata.version('timm')}")


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.8.1.post1' is (2, 8, 1)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def registration_file() -> Path | None:
    """The .pth file that Python reads at its start, if installation put one there."""
    directories = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return next((path for path in (Path(d, REGISTRATION_FILE) for d in directories) if path.is_file()), None)


def export_line() -> str:
    """The line for the shell that registers by hand what automatic registration would."""
    value = _register.with_trainer_directory()
    if os.name == "nt":
        return f"set {_register.VARIABLE}={value}"
    return f"export {_register.VARIABLE}={shlex.quote(value)}"


def check_registration() -> Iterator[Check]:
    """Whether the variable nnU-Net reads names this package, through what, and what else is in it."""
    file = registration_file()
    off = _register.is_switched_off()
    if file and not off:
        yield Check("Registration", OK, f"automatic, by {file} (off with {_register.OFF_SWITCH}=0)")
    else:
        why = (
            f"switched off by {_register.OFF_SWITCH}={os.environ[_register.OFF_SWITCH]}"
            if off
            else f"no {REGISTRATION_FILE} in this environment's site-packages"
        )
        if _register.is_registered():
            yield Check("Registration", OK, f"by {_register.VARIABLE} as it is set; automatic registration: {why}")
        else:
            yield Check("Registration", ERROR, f"automatic registration is off: {why}", export_line())
            return
    if not _register.is_registered():
        yield Check(
            "Registration",
            ERROR,
            f"{file} did not register {_register.TRAINER_DIRECTORY}, "
            f"{_register.VARIABLE}={os.environ.get(_register.VARIABLE, '')}",
            export_line(),
        )
        return
    for directory in _register.registered_directories():
        if not os.path.isdir(directory):
            yield Check(
                "Registration",
                WARNING,
                f"{_register.VARIABLE} names a directory that does not exist: {directory}",
                f"correct or remove it where you set {_register.VARIABLE}",
            )
        elif os.path.abspath(directory) != _register.TRAINER_DIRECTORY:
            yield Check("Registration", OK, f"your own trainers are searched too: {directory}")
    yield from _check_commands()


def _check_commands() -> Iterator[Check]:
    """Whether the nnU-Net commands the shell finds belong to this environment."""
    found = shutil.which("nnUNetv2_train")
    scripts = sysconfig.get_path("scripts")
    if found is None:
        yield Check(
            "Registration",
            WARNING,
            "nnUNetv2_train is not on PATH",
            f"activate this environment, or call {os.path.join(scripts, 'nnUNetv2_train')}",
        )
    elif os.path.realpath(os.path.dirname(found)) != os.path.realpath(scripts):
        yield Check(
            "Registration",
            WARNING,
            f"nnUNetv2_train on PATH is {found}, of another environment than this one ({scripts})",
            "install nnunet_dyn there, or activate this environment",
        )


def check_search(names: list[str]) -> Iterator[Check]:
    """Look trainers up through nnU-Net's own search: one of this package's, then each of `names`."""
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as search

        trainers = importlib.import_module("nnunet_dyn.trainers")
    except Exception as error:
        yield Check(
            "Trainers",
            ERROR,
            f"cannot be imported: {type(error).__name__}: {error}",
            f'pip install "{REQUIRED_NNUNET}", then install nnunet_dyn again from where you got it',
        )
        return
    available = trainers.trainer_names()
    example = available[0]
    found, message = _search(search, example)
    again, _ = _search(search, example)
    if found is None:
        yield Check("Trainers", ERROR, f"nnU-Net does not find {example}: {message}", export_line())
    elif found is not again:
        yield Check(
            "Trainers",
            ERROR,
            f"nnU-Net finds a different {example} each time ({found.__module__}), so workers cannot unpickle it",
            f"let {_register.VARIABLE} name {_register.TRAINER_DIRECTORY}, not the package's own directory",
        )
    else:
        yield Check("Trainers", OK, f"nnU-Net finds {example} and {len(available) - 1} more, each with a length suffix")
    for name in names:
        found, message = _search(search, name)
        if found is not None:
            yield Check("Trainers", OK, f"{name} is {found.__module__}.{found.__qualname__}")
            continue
        close = trainers.suggest(name)
        yield Check(
            "Trainers",
            ERROR,
            f"nnU-Net does not find {name}: {_reason(name, available) or message}",
            f"did you mean {' or '.join(close)}?" if close else f"expected a name such as {example} or one of your own",
        )


def _search(search, name: str) -> tuple[type | None, str]:
    """The class nnU-Net would train, or why there is none. Keeps the search's own chatter off the report."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return search(name), ""
        except Exception as error:
            return None, " ".join(str(error).split()) or type(error).__name__


def _reason(name: str, available: list[str]) -> str:
    """What is wrong with a name that begins like one of this package's; empty for any other."""
    base = max((known for known in available if name.startswith(f"{known}_")), key=len, default=None)
    if base is None:
        return ""
    return (
        f"{base} exists, but {name[len(base) :]!r} behind it is not a length, "
        "expected _<N>epochs and then _<N>iters, both optional, N from 1"
    )


def check_device() -> Iterator[Check]:
    """What training would run on. nnU-Net takes CUDA unless told otherwise."""
    try:
        import torch
    except Exception as error:
        yield Check("Device", ERROR, f"torch cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            yield Check("Device", OK, f"cuda:{index} {properties.name}, {memory:.0f} GiB")
        return
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    yield Check(
        "Device",
        WARNING,
        f"no CUDA device, {torch.get_num_threads()} CPU thread(s); nnU-Net's commands default to -device cuda",
        f"add -device {device} to nnUNetv2_train and nnUNetv2_predict",
    )


def check_variables() -> Iterator[Check]:
    """nnU-Net's three folders, and the setting of its workers that makes planning fail."""
    for variable, purpose in (
        ("nnUNet_raw", "raw data sets"),
        ("nnUNet_preprocessed", "preprocessed data and plans"),
        ("nnUNet_results", "trained models"),
    ):
        value = os.environ.get(variable)
        if not value:
            yield Check(
                "Folders", WARNING, f"{variable} ({purpose}) is not set", f"export {variable}=/path/to/{variable}"
            )
        elif not os.path.isdir(value):
            yield Check("Folders", WARNING, f"{variable}={value} does not exist", f"mkdir -p {shlex.quote(value)}")
        elif not os.access(value, os.W_OK | os.X_OK):
            yield Check("Folders", WARNING, f"{variable}={value} is not writable", f"chmod u+wx {shlex.quote(value)}")
        else:
            yield Check("Folders", OK, f"{variable}={value}")
    workers = os.environ.get("nnUNet_n_proc_DA")
    if workers is not None and not (workers.isdigit() and int(workers) > 0):
        yield Check(
            "Folders",
            WARNING,
            f"nnUNet_n_proc_DA={workers}, expected a number of at least 1: planning fails",
            "export nnUNet_n_proc_DA=1",
        )
