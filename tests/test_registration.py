"""The variable, the one module nnU-Net scans, and what it says about names it does not have."""

import importlib.util
import os
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

from nnunet_dyn import _lookup, _register

OWN = _register.TRAINER_DIRECTORY
SEP = os.pathsep


def scanned_module():
    """The module as nnU-Net gets it: new from its file for every search."""
    path = os.path.join(OWN, "nnunet_dyn_trainers.py")
    spec = importlib.util.spec_from_file_location("nnunet_dyn_trainers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeTrainers(ModuleType):
    """A catalogue of one trainer."""

    class nnUNetTrainerFake:
        pass

    def suggest(self, name):
        return ["nnUNetTrainerFake_5epochs"] if "Fake" in name else []


@pytest.fixture
def fake_trainers(monkeypatch):
    fake = FakeTrainers("nnunet_dyn.trainers")
    monkeypatch.setitem(sys.modules, "nnunet_dyn.trainers", fake)
    monkeypatch.setattr("nnunet_dyn.trainers", fake, raising=False)
    monkeypatch.setattr(_lookup, "_said", set())
    return fake


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, OWN),
        ("", OWN),
        ("/mine", f"/mine{SEP}{OWN}"),
        (f"/mine{SEP}/yours{SEP}", f"/mine{SEP}/yours{SEP}{OWN}"),
        (OWN, OWN),
        (f"{OWN}{SEP}/mine", f"{OWN}{SEP}/mine"),
        (f"{OWN}{os.sep}", f"{OWN}{os.sep}"),
    ],
)
def test_register_adds_itself_once_behind_the_users_own(before, after):
    environ = {} if before is None else {_register.VARIABLE: before}
    for _ in range(2):
        _register.register(environ)
        assert environ == {_register.VARIABLE: after}


@pytest.mark.parametrize("value", ["0", "false", "No", " OFF "])
def test_register_can_be_switched_off(value):
    environ = {_register.OFF_SWITCH: value}
    _register.register(environ)
    assert _register.VARIABLE not in environ


@pytest.mark.parametrize("value", ["", "1", "yes"])
def test_register_stays_on_for_other_values(value):
    environ = {_register.OFF_SWITCH: value}
    _register.register(environ)
    assert environ[_register.VARIABLE] == OWN


def test_the_scanned_directory_holds_one_module():
    modules = [name for name in os.listdir(OWN) if name.endswith(".py") and name != "__init__.py"]
    assert modules == ["nnunet_dyn_trainers.py"]


def test_known_name_is_the_catalogues_own_class(fake_trainers):
    assert scanned_module().nnUNetTrainerFake is fake_trainers.nnUNetTrainerFake


@pytest.mark.parametrize(
    "name", ["nnUNetTrainerFake_5epoch", "nnUNetTrainerElse", "MyTrainer", "__wrapped__", "suggest"]
)
def test_unknown_name_raises_attribute_error(fake_trainers, name):
    with pytest.raises(AttributeError, match=name):
        getattr(scanned_module(), name)


def test_hint_is_given_once_and_only_for_a_close_name(fake_trainers, capsys):
    for _ in range(2):
        assert not hasattr(scanned_module(), "nnUNetTrainerFake_5epoch")
        assert not hasattr(scanned_module(), "nnUNetTrainerElse")
    out, err = capsys.readouterr()
    assert out == ""
    expected = "this package has no trainer called nnUNetTrainerFake_5epoch. Did you mean nnUNetTrainerFake_5epochs?"
    assert err == f"nnunet_dyn: {expected}\n"


@pytest.mark.parametrize("error", [ImportError, RuntimeError, AttributeError])
def test_a_broken_catalogue_is_reported_and_raises_attribute_error(fake_trainers, capsys, error):
    def broken(name):
        raise error("no torch here")

    fake_trainers.suggest = broken
    with pytest.raises(AttributeError):
        scanned_module().nnUNetTrainerElse  # noqa: B018
    message = capsys.readouterr().err
    assert "no torch here" in message and "nnunet_dyn doctor" in message and message.count("\n") == 1


def test_without_the_package_the_scanned_module_has_no_names():
    # -S leaves site-packages out and -I the working directory, so nnunet_dyn cannot be imported.
    code = (
        f"import sys; sys.path.insert(0, {OWN!r}); import nnunet_dyn_trainers as module\n"
        "try:\n    module.nnUNetTrainerEffV2S\n"
        "except AttributeError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "cannot be imported here" in done.stdout and done.stderr == ""


def test_real_names_resolve_to_one_picklable_class():
    name = "nnUNetTrainerEffV2S_5epochs"
    found = getattr(scanned_module(), name)
    assert found.__name__ == name
    assert getattr(scanned_module(), name) is found
    assert pickle.loads(pickle.dumps(found)) is found
