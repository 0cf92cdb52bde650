"""What studies of trained models share: a folder of nnU-Net's own, its commands, held-out cases."""

import json
import os
import shutil
import subprocess
from pathlib import Path


def use(folder: Path, settings: dict) -> None:
    """Keep everything of a study in ``folder``, which is for one set of settings."""
    for variable in ("raw", "preprocessed", "results"):
        (folder / variable).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{variable}"] = str(folder.absolute() / variable)
    kept = folder / "settings.json"
    if kept.exists() and json.loads(kept.read_text()) != settings:
        raise SystemExit(f"{kept} has other settings than these arguments; take another folder.")
    kept.write_text(json.dumps(settings))


def command(*words: object) -> None:
    """Run a command of nnU-Net or of this package; its output goes to ``log.txt`` in the folder."""
    log = Path(os.environ["nnUNet_results"]).parent / "log.txt"
    with log.open("a") as output:
        status = subprocess.run([*map(str, words)], stdout=output, stderr=output).returncode
    if status:
        raise SystemExit(f"{words} ended with {status}; see {log}.")


def hold_out(source: Path, target: Path, test: int) -> None:
    """Copy a data set; where it has no test cases with labels, its last ``test`` training cases become them."""
    description = json.loads((source / "dataset.json").read_text())
    shutil.copytree(source, target)
    if (target / "labelsTs").is_dir():
        return
    ending = description["file_ending"]
    for label in sorted((target / "labelsTr").glob(f"*{ending}"))[-test:]:
        case = label.name.removesuffix(ending)
        for kind, files in (("labels", [label]), ("images", (target / "imagesTr").glob(f"{case}_????{ending}"))):
            (target / f"{kind}Ts").mkdir(exist_ok=True)
            for file in list(files):
                file.rename(target / f"{kind}Ts" / file.name)
    description["numTraining"] -= test
    (target / "dataset.json").write_text(json.dumps(description))


def train(name: str, configuration: str, trainer: str, plans: str) -> Path:
    """Train fold 0 on the CPU, as far as it is not, and return the model folder."""
    model = Path(os.environ["nnUNet_results"], name, f"{trainer}__{plans}__{configuration}")
    if not (model / "fold_0" / "validation" / "summary.json").exists():
        more = ["--c"] if any(model.glob("fold_0/checkpoint_*.pth")) else []
        command("nnUNetv2_train", name, configuration, 0, "-p", plans, "-tr", trainer, "-device", "cpu", *more)
    return model


def held_out(name: str, model: Path, *predict: object, folder: str = "held_out") -> dict:
    """Dice in percent on the held-out cases; ``predict`` is the command, without the folders.

    Args:
        folder: in that of the model, where the predictions go.
    """
    raw = Path(os.environ["nnUNet_raw"], name)
    output = model / folder
    if not (output / "summary.json").exists():
        command(*predict, "-i", raw / "imagesTs", "-o", output, "-m", model, "-f", 0, "-device", "cpu")
        files = ["-djfile", raw / "dataset.json", "-pfile", model / "plans.json", "-np", 1]
        command("nnUNetv2_evaluate_folder", raw / "labelsTs", output, *files)
    summary = json.loads((output / "summary.json").read_text())
    return {
        "dice": {label: round(100 * entry["Dice"], 2) for label, entry in summary["mean"].items()},
        "mean_dice": round(100 * summary["foreground_mean"]["Dice"], 2),
    }
