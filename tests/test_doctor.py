"""Each thing doctor can find wrong, with its remedy; and the exit status that follows."""

import json
import os
import re
from importlib import metadata

import pytest

from nnunet_dyn import _register, cli, doctor


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """A healthy environment: the registration file, the variable, and nnU-Net's three folders."""
    file = tmp_path / doctor.REGISTRATION_FILE
    file.touch()
    monkeypatch.setattr(doctor, "registration_file", lambda: file)
    monkeypatch.delenv(_register.OFF_SWITCH, raising=False)
    monkeypatch.delenv("nnUNet_n_proc_DA", raising=False)
    monkeypatch.setenv(_register.VARIABLE, _register.TRAINER_DIRECTORY)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return file


def by_status(checks, status):
    return [check for check in checks if check.status == status]


def test_a_healthy_environment_has_no_error_and_status_0(registered, capsys):
    assert cli.main(["doctor", "--json", "nnUNetTrainerEffV2S_20epochs", "nnUNetTrainer"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    texts = [check["text"] for check in report["checks"]]
    for expected in (
        f"nnunetv2 {metadata.version('nnunetv2')}",
        f"torch {metadata.version('torch')}",
        f"automatic, by {registered}",
        "nnU-Net finds nnUNetTrainer",
        "nnUNetTrainerEffV2S_20epochs is nnunet_dyn.trainers.nnUNetTrainerEffV2S_20epochs",
        "nnUNetTrainer is nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer",
    ):
        assert any(text.startswith(expected) for text in texts), (expected, texts)
    assert all(check["remedy"] for check in report["checks"] if check["status"] != "ok")


def test_unregistered_is_status_1_and_prints_the_line_to_export(registered, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "registration_file", lambda: None)
    monkeypatch.setenv(_register.VARIABLE, "/my own")
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    value = f"/my own{os.pathsep}{_register.TRAINER_DIRECTORY}"
    assert f"-> export nnUNet_extTrainer='{value}'\n" in out
    # The line is sufficient: with it, nothing is wrong any more.
    monkeypatch.setenv(_register.VARIABLE, value)
    assert not by_status(doctor.check_registration(), doctor.ERROR)


def test_the_off_switch_is_named(registered, monkeypatch):
    monkeypatch.setenv(_register.OFF_SWITCH, "0")
    monkeypatch.delenv(_register.VARIABLE)
    (error,) = by_status(doctor.check_registration(), doctor.ERROR)
    assert "NNUNET_DYN_REGISTER=0" in error.text
    assert error.remedy == doctor.export_line()


def test_registered_by_hand_with_the_switch_off_is_fine(registered, monkeypatch):
    monkeypatch.setenv(_register.OFF_SWITCH, "0")
    checks = list(doctor.check_registration())
    assert not by_status(checks, doctor.ERROR)
    assert "as it is set" in checks[0].text


def test_a_file_that_did_not_register_is_an_error(registered, monkeypatch):
    monkeypatch.delenv(_register.VARIABLE)
    (error,) = by_status(doctor.check_registration(), doctor.ERROR)
    assert "did not register" in error.text and error.remedy == doctor.export_line()


def test_the_users_own_directories_are_shown_and_missing_ones_warned_of(registered, monkeypatch, tmp_path):
    missing = tmp_path / "gone"
    value = os.pathsep.join([str(tmp_path), str(missing), _register.TRAINER_DIRECTORY])
    monkeypatch.setenv(_register.VARIABLE, value)
    checks = list(doctor.check_registration())
    assert any(check.status == doctor.OK and check.text.endswith(f": {tmp_path}") for check in checks)
    assert any(str(missing) in check.text for check in by_status(checks, doctor.WARNING))


def test_commands_of_another_environment_are_warned_of(registered, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/elsewhere/bin/{name}")
    (warning,) = by_status(doctor.check_registration(), doctor.WARNING)
    assert "/elsewhere/bin/nnUNetv2_train" in warning.text


def test_a_lookup_that_fails_is_an_error(registered, monkeypatch, tmp_path):
    monkeypatch.setenv(_register.VARIABLE, str(tmp_path))
    (error,) = by_status(doctor.check_search([]), doctor.ERROR)
    assert "does not find" in error.text and error.remedy == doctor.export_line()


def test_classes_that_differ_between_lookups_are_an_error(registered, monkeypatch, tmp_path):
    # What a directory of modules that define the classes themselves does: nnU-Net imports them anew each time.
    (tmp_path / "own.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "from nnunet_dyn.trainers import trainer_names\n"
        "globals()[trainer_names()[0]] = type('T', (nnUNetTrainer,), {})\n"
    )
    monkeypatch.setenv(_register.VARIABLE, str(tmp_path))
    (error,) = by_status(doctor.check_search([]), doctor.ERROR)
    assert "different" in error.text


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        (
            "nnUNetTrainerEffV2S_5epoch",
            "'_5epoch' behind it is not a length",
            "did you mean nnUNetTrainerEffV2S_5epochs",
        ),
        ("nnUNetTrainerEffV2S_0epochs", "'_0epochs' behind it is not a length", "did you mean nnUNetTrainerEffV2S"),
        ("nnUNetTrainerEfV2S", "Could not find requested nnunet trainer", "did you mean nnUNetTrainer"),
        ("Whatever", "Could not find requested nnunet trainer Whatever", "expected a name such as nnUNetTrainer"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_reason_and_the_closest(registered, name, reason, remedy):
    (error,) = by_status(doctor.check_search([name]), doctor.ERROR)
    assert name in error.text and reason in error.text and remedy in error.remedy
    assert "\n" not in error.text + error.remedy


@pytest.mark.parametrize(
    ("distribution", "version", "status"),
    [
        ("nnunetv2", "2.8.0", "error"),
        ("nnunetv2", "2.8.1", "ok"),
        ("nnunetv2", "2.10", "ok"),
        ("nnunetv2", "2.8.1.post1", "ok"),
        ("nnunetv2", "3.0.0", "error"),
        ("nnunetv2", None, "error"),
        ("torch", "2.3.1+cpu", "error"),
        ("torch", "2.15.0+cu130", "ok"),
    ],
)
def test_versions_are_checked(monkeypatch, distribution, version, status):
    real = metadata.version

    def fake(name):
        if name != distribution:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", fake)
    (check,) = (check for check in doctor.check_versions() if re.match(f"{distribution} ", check.text))
    assert check.status == status
    assert (check.remedy is not None) == (status == "error")


def test_without_cuda_the_remedy_is_the_device_flag(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (check,) = doctor.check_device()
    assert check.status == "warning" and "-device cpu" in check.remedy


def test_folders_unset_missing_or_fine(registered, monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "a b"))
    unset, fine, missing = doctor.check_variables()
    assert unset.status == "warning" and unset.remedy == "export nnUNet_raw=/path/to/nnUNet_raw"
    assert fine.status == "ok"
    assert missing.status == "warning" and missing.remedy == f"mkdir -p '{tmp_path / 'a b'}'"


def test_a_folder_that_cannot_be_written_is_warned_of(registered, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: not path.endswith("nnUNet_results"))
    (warning,) = by_status(doctor.check_variables(), doctor.WARNING)
    assert "nnUNet_results" in warning.text and "not writable" in warning.text


@pytest.mark.parametrize(("value", "warned"), [("0", True), ("two", True), ("2", False)])
def test_a_worker_count_that_breaks_planning_is_warned_of(registered, monkeypatch, value, warned):
    monkeypatch.setenv("nnUNet_n_proc_DA", value)
    assert bool(by_status(doctor.check_variables(), doctor.WARNING)) is warned
