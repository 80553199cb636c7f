"""Builds the native kernels into wheels; everything else is in pyproject.toml.

A wheel with the library in it is of one platform. Without a C compiler the wheel is pure Python,
and the machine it is installed on compiles or runs the torch operations.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from kernels.native.build import COMPILERS, PREBUILT, SOURCE_FOLDER, compile_library  # noqa: E402


def has_compiler() -> bool:
    """Can the library be built here?"""
    return any(map(shutil.which, COMPILERS))


class BuildWithKernels(build_py):
    """Copies the sources, then compiles the kernels beside them; an editable install does not."""

    def run(self) -> None:
        super().run()
        if has_compiler() and not self.editable_mode:
            target = Path(self.build_lib) / SOURCE_FOLDER.relative_to(ROOT) / PREBUILT
            compile_library(target)


class WithKernels(Distribution):
    """A package whose wheel is of one platform where it carries machine code."""

    def has_ext_modules(self) -> bool:
        return has_compiler()


setup(cmdclass={"build_py": BuildWithKernels}, distclass=WithKernels)
