"""The step of a build that pyproject.toml cannot state: a wheel holds conf/ as mambaseg/conf."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    """Starts from nothing, or files of an earlier build would come along."""

    def run(self) -> None:
        """Builds the packages; an editable install reads conf/ where it is."""
        if self.editable_mode:
            super().run()
            return
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        shutil.copytree(
            "conf",
            Path(self.build_lib) / "mambaseg" / "conf",
            ignore=shutil.ignore_patterns("local"),  # paths of whoever builds
        )


setup(cmdclass={"build_py": BuildWithConf})
