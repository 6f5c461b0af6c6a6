"""The compiler and ninja: finds them, runs them with a time limit, and reports their output if they fail."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import BackendError, build

PROBE_TIMEOUT = 10.0  # seconds for `c++ --version`
BUILD_TIMEOUT = 300.0  # seconds for the whole build
USUAL_SECONDS = 30  # usual duration of a build on two cores, for the line that announces the build
LAST_LINES = 12  # lines of a compiler's output that go into an error
REMEDY = 'repair it, name another compiler in the environment variable CXX, or choose backend="torch"'


class Compiler(NamedTuple):
    """A C++ compiler that can be run.

    Attributes:
        command: the command as the user gave it; it may be several words ("ccache g++").
        path: the resolved path of the command's first word.
        banner: what the compiler prints about its version.
    """

    command: str
    path: str
    banner: str

    @property
    def options(self) -> list[str]:
        """The options in the command, such as "-march=native", which a binary may depend on beyond the compiler."""
        windows = sys.platform == "win32"
        words = shlex.split(self.command, posix=not windows)[1:]
        return [word for word in words if word.startswith(("-", "/") if windows else "-")]


def find_compiler() -> Compiler:
    """Returns the compiler that torch will call: the one in CXX, else `c++`, or `cl` on Windows.

    Raises:
        BackendError: there is no such compiler, or it does not print its version.
    """
    windows = sys.platform == "win32"
    command = os.environ.get("CXX") or ("cl" if windows else "c++")
    words = shlex.split(command, posix=not windows)
    path = shutil.which(words[0]) if words else None
    if path is None:
        raise BackendError(
            f"a C++ compiler is needed and {command!r} is none that can be run; install one (g++), "
            f'name another in the environment variable CXX, or choose backend="torch"'
        )
    try:
        status, banner = run([*words, *([] if windows else ["--version"])], timeout=PROBE_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"the C++ compiler {command!r} does not answer ({error}); {REMEDY}") from None
    if status and not windows:
        raise BackendError(f"the C++ compiler {command!r} fails at --version; {REMEDY}{quoted(banner)}")
    return Compiler(command, os.path.realpath(path), banner.strip())


def local_flags() -> list[str]:
    """Returns the flags for a build that only this machine runs: without AVX-512 kernels if its CPU cannot run them."""
    import torch

    skips = platform.machine().lower() in ("x86_64", "amd64") and not (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )
    return ["-DCHILDTUNE_NO_AVX512"] if skips else []


def compile_native(folder: Path, compiler: Compiler) -> None:
    """Builds the native backend in the empty `folder`, in a child process that also loads it once.

    Raises:
        BackendError: the sources or a tool are missing, or the build fails or takes too long; the message has the
            compiler's last lines.
    """
    if not build.sources():
        raise BackendError(f"the C++ sources are not at {build.csrc()}; install childtune_fast again")
    job = {
        "sys_path": [os.path.abspath(entry) for entry in sys.path],
        "load": {
            "name": build.MODULE,
            "sources": [str(path) for path in build.sources()],
            "extra_cflags": build.compile_flags() + local_flags(),
            "extra_ldflags": build.link_flags(),
            "extra_include_paths": [str(build.csrc())],
            "build_directory": str(folder),
            "with_cuda": False,
        },
    }
    script = str(Path(__file__).with_name("jit_child.py"))
    command = [sys.executable or "python3", script, json.dumps(job)]
    try:
        status, output = run(command, timeout=BUILD_TIMEOUT, cwd=folder, env=environment(compiler))
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"{compiler.command!r} was stopped after {BUILD_TIMEOUT:.0f} s of building; {REMEDY}"
        ) from None
    except OSError as error:
        raise BackendError(f"Python could not be started for the build ({error})") from error
    if status:
        raise BackendError(f"building with {compiler.command!r} failed (status {status}); {REMEDY}{quoted(output)}")


def can_start_python() -> bool:
    """Returns whether `sys.executable` is a Python: in a frozen or embedding program it may be that program."""
    name = Path(sys.executable or "").name.lower()
    return not getattr(sys, "frozen", False) and ("python" in name or "pypy" in name)


def run(
    command: list[str], *, timeout: float, cwd: Path | None = None, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command and returns its exit status and its output.

    Args:
        command: the program and its arguments.
        timeout: limit in seconds.
        cwd: the command's working folder; None takes this process's (default: None).
        env: the command's environment; None takes this process's (default: None).

    Raises:
        subprocess.TimeoutExpired: the command took longer than `timeout` seconds and was killed with all its children.
        OSError: the command could not be started.
    """
    read_end, write_end = os.pipe()  # never written to; jit_child.py ends when this process dies and so closes it
    try:
        with subprocess.Popen(
            command,
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except BaseException:  # includes KeyboardInterrupt
                _kill(process)
                raise
    finally:
        os.close(read_end)
        os.close(write_end)
    return process.returncode, output.decode(errors="replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its children.

    The first signal is SIGTERM, because ninja then ends its compilers, which are in process groups of their own.
    """
    if not hasattr(os, "killpg"):
        process.kill()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        for _ in range(20):
            process.poll()
            os.killpg(process.pid, 0)  # raises as soon as the group is empty
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)


def environment(compiler: Compiler) -> dict[str, str]:
    """Returns the environment of the build, in which ninja is found even if the virtual environment is not active.

    Raises:
        BackendError: ninja is not installed.
    """
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    try:
        import ninja

        folders.append(ninja.BIN_DIR)
    except (ImportError, AttributeError):
        pass
    path = os.pathsep.join(folders)
    if shutil.which("ninja", path=path) is None:
        raise BackendError("the build tool ninja is needed and not installed; run `pip install ninja`")
    return {**os.environ, "CXX": compiler.command, "PATH": path}


def quoted(output: str) -> str:
    """Returns the last lines of a compiler's output, indented, without the lines of ninja and the command lines."""
    noise = ("[", "FAILED:", "ninja: ")
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith(noise)]
    lines = [line[:300] for line in lines if "-DTORCH_EXTENSION_NAME=" not in line]
    return "".join(f"\n    {line}" for line in lines[-LAST_LINES:])
