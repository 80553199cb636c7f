"""Builds the native kernels into wheels; everything else is in pyproject.toml.

A wheel with the library in it is of one platform. Without a C compiler that works the wheel is pure
Python, and the machine it is installed on compiles or runs the torch operations.
"""

import functools
import logging
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from kernels.native.build import (  # noqa: E402
    PREBUILT,
    SOURCE_FOLDER,
    NativeUnavailableError,
    compile_library,
    try_compiler,
)


@functools.cache
def has_compiler() -> bool:
    """Can anything be compiled here?"""
    with tempfile.TemporaryDirectory() as folder:
        try:
            try_compiler(Path(folder))
        except NativeUnavailableError as exc:
            logging.warning("no native kernels in this package: %s", exc)
            return False
    return True


class BuildWithKernels(build_py):
    """Copies the sources, then compiles the kernels beside them; an editable install does not."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or not has_compiler():
            return
        target = Path(self.build_lib) / SOURCE_FOLDER.relative_to(ROOT) / PREBUILT
        try:
            compile_library(target)
        except NativeUnavailableError as exc:
            self.warn(f"no native kernels in this package: {exc}")


class WithKernels(Distribution):
    """A package whose wheel is of one platform where it carries machine code."""

    def has_ext_modules(self) -> bool:
        return has_compiler()


setup(cmdclass={"build_py": BuildWithKernels}, distclass=WithKernels)
