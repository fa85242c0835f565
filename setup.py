"""Builds the C++ extension `specengine._C`; everything declarative is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = sorted(str(path) for path in Path("csrc").glob("*/*.cpp"))
IS_SANITIZED = os.environ.get("SPECENGINE_SANITIZE") == "1"


def _fail(message: str) -> None:
    sys.exit(f"\nspecengine: {message}\n")


def _extension() -> dict[str, object]:
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        _fail(
            f"building the C++ extension needs PyTorch >= 2.10 in this environment ({error}). Install it first:\n"
            "    pip install -c constraints.txt torch setuptools wheel ninja\n"
            "then install specengine with --no-build-isolation."
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        _fail("no C++ compiler was found. Install one (Debian: apt-get install g++) or set CXX, then retry.")
    flags = [
        "-std=c++20",
        "-O3",
        "-g0",
        "-Wall",
        "-Wextra",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-pthread",
    ]
    link: list[str] = ["-pthread"]
    if IS_SANITIZED:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        flags = [flag for flag in flags if flag not in ("-O3", "-g0")]
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", *sanitizers]
        link += sanitizers
    return {
        "ext_modules": [
            CppExtension(
                "specengine._C",
                SOURCES,
                include_dirs=[str(Path("csrc").resolve())],
                extra_compile_args=flags,
                extra_link_args=link,
            )
        ],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=True)},
    }


setup(**(_extension() if SOURCES else {}))
