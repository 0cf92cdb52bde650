"""Exit statuses, one-line errors, and help that needs no heavy import."""

import subprocess
import sys
from types import ModuleType

import pytest

from nnunet_dyn import __version__, cli
from nnunet_dyn.errors import JobError, UsageError


@pytest.fixture
def fake_command(monkeypatch):
    """A table with one command, whose `run` returns or raises what the test puts into it."""
    module = ModuleType("fake_command_module")
    module.add_arguments = lambda parser: parser.add_argument("-n", type=int)
    module.outcome = 0

    def run(args):
        module.args = args
        if isinstance(module.outcome, BaseException):
            raise module.outcome
        return module.outcome

    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        cli, "COMMANDS", (cli.Command("fake", module.__name__, "does nothing", "nnunet_dyn fake -n 3"),)
    )
    return module


def test_a_command_gets_its_arguments_and_decides_the_status(fake_command):
    fake_command.outcome = 7
    assert cli.main(["fake", "-n", "3"]) == 7
    assert fake_command.args.n == 3


@pytest.mark.parametrize(
    ("outcome", "status", "message"),
    [
        (UsageError("got 3,\n expected 4"), 2, "nnunet_dyn: got 3, expected 4\n"),
        (JobError("disk full"), 1, "nnunet_dyn: disk full\n"),
        (KeyboardInterrupt(), 130, "nnunet_dyn: interrupted\n"),
    ],
)
def test_errors_are_one_line_with_their_status(fake_command, capsys, outcome, status, message):
    fake_command.outcome = outcome
    assert cli.main(["fake"]) == status
    assert capsys.readouterr() == ("", message)


def test_a_programming_error_is_not_hidden(fake_command):
    fake_command.outcome = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "no command given, expected one of fake"),
        (["nonsense"], "nonsense"),
        (["fake", "-n", "many"], "many"),
        (["fake", "--unknown"], "--unknown"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(fake_command, capsys, argv, expected):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and "--help" in message and message.count("\n") == 1


def test_a_command_that_cannot_be_imported_fails_in_one_line(fake_command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fake_command_module", None)
    assert cli.main(["fake"]) == 1
    message = capsys.readouterr().err
    assert "doctor" in message and message.count("\n") == 1


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command.name, "--help"])
    assert stop.value.code == 0
    assert f"example: {command.example}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"nnunet_dyn {__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nnunet_dyn import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print(sorted({'torch', 'numpy', 'nnunetv2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert all(command.name in done.stdout for command in cli.COMMANDS)


def test_a_reader_that_leaves_early_is_no_failure():
    """``nnunet_dyn doctor | head -1`` must not end in a traceback."""
    program = "import sys; from nnunet_dyn.cli import main; sys.exit(main(['doctor']))"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(timeout=120) == 141
    assert "Traceback" not in errors and "BrokenPipe" not in errors
