"""All is in pyproject.toml, but that the wheel carries configs/ and data/*/prepare.py, under jaxgpt/presets/."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPresets(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # there jaxgpt.shipped finds them in the checkout
            return
        for path in [*Path("configs").glob("*.py"), *Path("data").glob("*/prepare.py")]:
            target = Path(self.build_lib, "jaxgpt", "presets", path)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithPresets})
