"""Everything static is in pyproject.toml; this file adds the registration file to what is installed."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

REGISTRATION_FILE = "nnunet_dyn_register.pth"

# Python runs each line of a .pth file in site-packages that begins with "import" when it starts.
# The exec makes room for a try: nothing that goes wrong here may be seen by other programs.
REGISTRATION_LINE = (
    r'import sys; exec("try:\n    from nnunet_dyn._register import register; register()\n'
    r'except Exception:\n    pass")' + "\n"
)


class BuildWithRegistration(build_py):
    """Put the registration file at the top of the wheel, which is site-packages once installed."""

    def run(self):
        super().run()
        # setuptools packs an editable wheel from install_lib and leaves build_lib out.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        Path(target, REGISTRATION_FILE).write_text(REGISTRATION_LINE, encoding="utf-8")

    def get_outputs(self, include_bytecode=1):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib, REGISTRATION_FILE))]


setup(cmdclass={"build_py": BuildWithRegistration})
