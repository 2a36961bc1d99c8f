"""Packaging beyond pyproject.toml: a wheel carries `configs/` as `fope_jax/configs/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """`fope train --config quickstart` then works without a checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:  # an editable installation reads them where they are
            target = Path(self.build_lib) / "fope_jax" / "configs"
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree("configs", target, ignore=skipped, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
