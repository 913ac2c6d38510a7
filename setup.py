"""What pyproject.toml cannot say: a wheel holds the files of configs/ as nemotron_jax/configs/."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies configs/ into the package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in sorted(Path("configs").glob("*.py")):
            target = Path(self.build_lib) / "nemotron_jax" / "configs" / file.name
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
