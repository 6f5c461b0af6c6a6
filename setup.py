"""Builds the native backend ahead of time, if it can; the rest of the packaging is in pyproject.toml.

A machine without a working compiler still gets the package, which then builds the backend just in time or runs in pure
torch.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "childtune_fast"


def load_build_description():
    """Returns the module childtune_fast/native/build.py, loaded by path because importing the package needs torch."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / PACKAGE / "native/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build_description()


class BuildNative(build_ext):
    """Compiles the extension and writes a record of its sources beside it; a failure does not fail the install."""

    def run(self):
        """Compiles the extension, then the kernels for GPUs if there is nvcc; CHILDTUNE_CUDA=0 leaves them out.

        Raises:
            ValueError: CHILDTUNE_CUDA is neither 0 nor 1.
            RuntimeError: CHILDTUNE_CUDA is 1, and the kernels cannot be compiled.
        """
        super().run()
        wanted = os.environ.get("CHILDTUNE_CUDA") or ("0" if self.editable_mode else "")
        if wanted not in ("", "0", "1"):
            raise ValueError(f"the environment variable CHILDTUNE_CUDA must be 0 or 1 (got {wanted!r})")
        target = Path(self.build_lib, PACKAGE, build.FATBIN)
        record = target.with_suffix(".json")
        for stale in (target, record):
            stale.unlink(missing_ok=True)
        if wanted != "0":
            self.build_kernels(target, record, required=wanted == "1")

    def build_kernels(self, target, record, *, required):
        """Compiles device code into a fatbin, with a record of its sources.

        Args:
            target: file of the fatbin.
            record: JSON file of the sources' fingerprint and the compute capabilities.
            required: whether a failure raises RuntimeError; otherwise it prints a line, and GPUs compile on first use.
        """
        try:
            nvcc = build.find_nvcc()
            if nvcc is None:
                raise FileNotFoundError("there is no nvcc")
            listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
            known = build.listed_codes(listed)
            codes = [code for code in build.DEVICE_CODES if code in known]
            if not codes:
                raise LookupError(f"{nvcc} compiles for {known}, and none of {list(build.DEVICE_CODES)} is among them")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(build.fatbin_command(nvcc, codes, target), check=True)
        except (OSError, LookupError, subprocess.CalledProcessError) as error:
            if required:
                raise RuntimeError(
                    f"CHILDTUNE_CUDA=1 asks for GPU kernels, which could not be built ({error})"
                ) from None
            print(f"{PACKAGE}: installed without GPU kernels, which are compiled on first use ({error})", flush=True)
            return
        record.write_text(json.dumps({"fingerprint": build.device_fingerprint(), "codes": codes}) + "\n")

    def build_extension(self, ext):
        """Builds `ext`, or prints in one line why it was not built."""
        target = Path(self.get_ext_fullpath(ext.name))
        record = target.with_name(build.RECORD)
        for stale in (target, record):
            stale.unlink(missing_ok=True)
        try:
            import pybind11  # imported here, because a machine that cannot build need not have it
            from pybind11.setup_helpers import ParallelCompile

            ext.include_dirs.append(pybind11.get_include())
            msvc = self.compiler.compiler_type == "msvc"
            ext.extra_compile_args, ext.extra_link_args = build.compile_flags(msvc=msvc), build.link_flags(msvc=msvc)
            if sys.platform == "linux":
                ext.extra_link_args.append("-Wl,-s")  # without symbols, which only debuggers read
            with ParallelCompile(default=0):  # 0 uses all cores
                super().build_extension(ext)
            if not target.exists():
                raise RuntimeError("the compiler succeeded and wrote nothing")
        except Exception as error:  # a broken or missing compiler may raise any exception
            target.unlink(missing_ok=True)
            self.announce_failure(error)
            return
        record.write_text(json.dumps({"fingerprint": build.fingerprint(), "version": build.version()}) + "\n")

    def announce_failure(self, error):
        """Prints one line that says why the backend was not built and what is used instead."""
        cause = " ".join(str(error).split()) or type(error).__name__
        print(
            f"{PACKAGE}: installed without the native backend, which could not be built ({cause}); it will be built on "
            f"first use if there is a C++ compiler by then, else the slower pure-torch backend runs.",
            flush=True,
        )

    def copy_extensions_to_source(self):
        """Copies the record too when an editable install copies the binary into the source tree."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, PACKAGE, build.RECORD)
        if built.exists():
            shutil.copy2(built, ROOT / PACKAGE / build.RECORD)

    def get_outputs(self):
        """Returns the paths of the binaries and records that were written; setuptools would list a failed build too."""
        names = (build.RECORD, build.FATBIN, Path(build.FATBIN).with_suffix(".json"))
        outputs = [*super().get_outputs(), *(str(Path(self.build_lib, PACKAGE, name)) for name in names)]
        return [path for path in outputs if Path(path).exists()]


class BuildPackage(build_py):
    """Ships csrc/ inside the package, so that an installed package can build just in time too."""

    def run(self):
        """Copies the Python files, then the C++ files, except in an editable install, which uses csrc/ in place."""
        super().run()
        if not self.editable_mode:
            for source in self.native_files():
                target = Path(self.build_lib, PACKAGE, "csrc", source.relative_to(build.csrc()))
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def native_files(self):
        """Returns the files that a build from the installed package needs."""
        return [*build.sources(), *build.headers()]

    def get_outputs(self, include_bytecode=True):
        """Returns the paths of all files that were written, the C++ files included."""
        copied = [
            str(Path(self.build_lib, PACKAGE, "csrc", path.relative_to(build.csrc()))) for path in self.native_files()
        ]
        return super().get_outputs(include_bytecode) + ([] if self.editable_mode else copied)


def readme(repository):
    """Returns README.md, with absolute links into a repository instead of relative ones, as an index needs them.

    Args:
        repository: address of the repository; "" leaves the links as they are.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not repository:
        return text
    pictures = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)", rf"\1{repository}/blob/main/", pictures)


def relative(paths):
    """Returns paths relative to this file, which setuptools requires."""
    return [path.relative_to(ROOT).as_posix() for path in paths]


native = Extension(
    f"{PACKAGE}.{build.MODULE}",
    relative(build.sources()),
    depends=relative(build.headers()),
    include_dirs=relative([build.csrc()]),
    language="c++",
    optional=True,  # a failed build must not fail the install
)
repository = os.environ.get("CHILDTUNE_REPOSITORY", "")  # which the release workflow knows
urls = {"Repository": repository, "Changelog": f"{repository}/blob/main/CHANGELOG.md", "Issues": f"{repository}/issues"}
setup(
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPackage},
    long_description=readme(repository),
    long_description_content_type="text/markdown",
    project_urls=urls if repository else {},
)
