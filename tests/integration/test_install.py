"""Registration in real, fresh virtual environments: from a wheel, from the sources, and editable.

Installing torch and nnU-Net into each would take minutes, so they come from the environment that runs the tests,
through a directory of links to everything in its site-packages but this package.
"""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NAME = "nnUNetTrainerEffV2S_5epochs"
PTH = "nnunet_dyn_register.pth"

pytestmark = [
    pytest.mark.skipif(not (REPOSITORY / "pyproject.toml").is_file(), reason="the sources are not beside the tests"),
    *(
        pytest.mark.skipif(importlib.util.find_spec(tool) is None, reason=f"{tool} is not installed")
        for tool in ("pip", "setuptools")
    ),
]

# Looks the trainer up as the commands do, twice, and from a spawned worker that sends the class back.
LOOK_UP = f"""
    import json, multiprocessing, os, pickle, sys
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find

    if __name__ == "__main__":
        import nnunet_dyn

        found = find({NAME!r})
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            from_worker = pool.apply(find, ({NAME!r},))
        print(json.dumps({{
            "package": nnunet_dyn.__file__,
            "registered": os.environ["nnUNet_extTrainer"],
            "name": found.__name__,
            "again": find({NAME!r}) is found,
            "pickle": pickle.loads(pickle.dumps(found)) is found,
            "worker": from_worker is found,
        }}))
"""


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's variables less what would answer in the fresh environment's place."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "nnUNet_extTrainer", "NNUNET_DYN_REGISTER")
    return {key: value for key, value in os.environ.items() if key not in dropped} | variables


def call(*command, **variables: str) -> subprocess.CompletedProcess:
    """Run a command away from the repository, and fail with its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


class Environment:
    """A fresh virtual environment."""

    def __init__(self, root: Path, dependencies: Path):
        call(sys.executable, "-m", "venv", "--without-pip", root)
        self.python = root / "bin" / "python"
        self.root = root
        self.site_packages = Path(
            call(self.python, "-c", "import site; print(site.getsitepackages()[0])").stdout.strip()
        )
        (self.site_packages / "dependencies.pth").write_text(f"{dependencies}\n")

    def pip(self, *arguments):
        return call(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def install(self, *arguments):
        return self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", *arguments)

    def run(self, code: str, **variables: str) -> str:
        return call(self.python, "-c", textwrap.dedent(code), **variables).stdout

    def run_script(self, code: str, **variables: str) -> dict:
        """Run code as a file, which spawned processes need, and return the JSON object it prints last."""
        script = self.root / "script.py"
        script.write_text(textwrap.dedent(code))
        return json.loads(call(self.python, script, **variables).stdout.splitlines()[-1])

    def modules_at_start(self) -> set[str]:
        return set(ast.literal_eval(self.run("import sys; print(sorted(sys.modules))")))

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.name != "script.py"}


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    links = tmp_path_factory.mktemp("dependencies")
    for directory in map(Path, sys.path):
        if directory.name in ("site-packages", "dist-packages") and directory.is_dir():
            for entry in directory.iterdir():
                link = links / entry.name
                ours = "nnunet_dyn" in entry.name
                if not ours and entry.suffix != ".pth" and entry.name != "__pycache__" and not link.exists():
                    link.symlink_to(entry)
    return links


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy, so that builds leave nothing in the repository."""
    copy = tmp_path_factory.mktemp("sources") / "nnunet_dyn"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "nnunet_dyn", copy / "nnunet_dyn", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", out, sources)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory, dependencies, wheel) -> Environment:
    """One environment with the wheel installed, for the tests that leave it as it is."""
    environment = Environment(tmp_path_factory.mktemp("venv") / "venv", dependencies)
    environment.install(wheel)
    return environment


@pytest.mark.parametrize("kind", ["wheel", "source", "editable"])
def test_install_registers_and_uninstall_leaves_nothing(kind, tmp_path, dependencies, sources, wheel):
    environment = Environment(tmp_path / "venv", dependencies)
    before, modules_before = environment.files(), environment.modules_at_start()
    environment.install(*{"wheel": [wheel], "source": [sources], "editable": ["-e", sources]}[kind])
    assert (environment.site_packages / PTH).is_file()
    # Two small modules and nothing else is what keeps the start of Python fast.
    assert environment.modules_at_start() - modules_before == {"nnunet_dyn", "nnunet_dyn._register"}
    package = (sources if kind == "editable" else environment.site_packages) / "nnunet_dyn"

    result = environment.run_script(LOOK_UP)
    assert result == {
        "package": str(package / "__init__.py"),
        "registered": str(package / "ext_trainer"),
        "name": NAME,
        "again": True,
        "pickle": True,
        "worker": True,
    }
    version = call(environment.root / "bin" / "nnunet_dyn", "--version").stdout
    assert version.startswith("nnunet_dyn ")

    environment.pip("uninstall", "--yes", "nnunet-dyn")
    assert environment.files() == before
    registered = environment.run("import os; print(os.environ.get('nnUNet_extTrainer'))")
    assert registered == "None\n"


def test_the_users_own_directory_keeps_working_beside_it(environment, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerMine(nnUNetTrainer):\n    pass\n"
    )
    code = f"""
        import json, os
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
        names = [find("nnUNetTrainerMine").__name__, find({NAME!r}).__name__]
        # Searched before the user's directory, an unknown name must not end the search.
        os.environ["nnUNet_extTrainer"] = os.pathsep.join(reversed(os.environ["nnUNet_extTrainer"].split(os.pathsep)))
        names.append(find("nnUNetTrainerMine").__name__)
        print(json.dumps({{"value": os.environ["nnUNet_extTrainer"], "names": names}}))
    """
    result = environment.run_script(code, nnUNet_extTrainer=str(own))
    assert result["names"] == ["nnUNetTrainerMine", NAME, "nnUNetTrainerMine"]
    assert result["value"] == os.pathsep.join([str(environment.site_packages / "nnunet_dyn" / "ext_trainer"), str(own)])


def test_another_environment_that_inherits_the_variable_is_not_disturbed(environment, dependencies, tmp_path):
    other = Environment(tmp_path / "other", dependencies)
    inherited = environment.run("import os; print(os.environ['nnUNet_extTrainer'])").strip()
    code = f"""
        import json
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
        stock = find("nnUNetTrainer").__name__
        try:
            find({NAME!r})
        except RuntimeError as error:
            print(json.dumps([stock, str(error)]))
    """
    stock, message = other.run_script(code, nnUNet_extTrainer=inherited)
    assert stock == "nnUNetTrainer"
    assert message.startswith(f"Could not find requested nnunet trainer {NAME}")


@pytest.mark.parametrize(("value", "expected"), [("0", ["/mine"]), ("1", ["/mine", "ext_trainer"])])
def test_the_off_switch(environment, value, expected):
    code = "import os; print(os.environ['nnUNet_extTrainer'])"
    entries = environment.run(code, NNUNET_DYN_REGISTER=value, nnUNet_extTrainer="/mine").strip().split(os.pathsep)
    assert entries == [
        entry if entry.startswith("/") else str(environment.site_packages / "nnunet_dyn" / entry) for entry in expected
    ]


@pytest.mark.parametrize(
    "content", ["raise RuntimeError('broken')", "syntax error", "def register(): raise OSError", None]
)
def test_a_broken_package_does_not_show_when_python_starts(tmp_path, dependencies, wheel, content):
    environment = Environment(tmp_path / "venv", dependencies)
    environment.install(wheel)
    module = environment.site_packages / "nnunet_dyn" / "_register.py"
    if content is None:
        shutil.rmtree(module.parent)
    else:
        module.write_text(content)
    done = call(environment.python, "-c", "print('runs')")
    assert (done.stdout, done.stderr) == ("runs\n", "")


def test_doctor_agrees(environment):
    report = json.loads(call(environment.root / "bin" / "nnunet_dyn", "doctor", "--json", NAME).stdout)
    texts = [check["text"] for check in report["checks"]]
    assert report["ok"] is True
    assert any(text.startswith(f"automatic, by {environment.site_packages / PTH}") for text in texts), texts


def test_doctor_gives_the_line_that_mends_a_switched_off_registration(environment):
    doctor = environment.root / "bin" / "nnunet_dyn"
    off = clean_environment(NNUNET_DYN_REGISTER="0")
    done = subprocess.run([doctor, "doctor"], env=off, cwd="/", capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = {
        line.strip().removeprefix("-> ") for line in done.stdout.splitlines() if "export nnUNet_extTrainer=" in line
    }
    mended = subprocess.run(
        ["sh", "-c", f"{line}; exec '{doctor}' doctor"], env=off, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert mended.returncode == 0, mended.stdout
