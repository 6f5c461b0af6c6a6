"""Helpers of the build's tests: a stand-in for csrc/, false compilers, and other Python processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from childtune_fast.native import BackendError, build, load

STAND_IN = """
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "", -1, methods, 0, 0, 0, 0};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
"""


def script(path, text):
    """Writes an executable shell script and returns its path as a string."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compiler_that(path, does):
    """Writes a C++ compiler that answers questions about itself and runs `does` before it compiles or links."""
    return script(path, f'case "$1" in --version|-v|-dump*) exec c++ "$@";; esac\n{does}\nexec c++ "$@"')


def python(code, *, package_in=build.PACKAGE.parent, **variables):
    """Starts another Python on the package in the given folder, its output and errors in pipes."""
    env = {**os.environ, "PYTHONPATH": str(package_in), **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, cwd=package_in, **pipes)


def result_of(process, timeout=120):
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return output, errors


def load_code(source):
    """Code that loads the backend from other sources."""
    return (
        f"from pathlib import Path; from childtune_fast.native import BackendError, build, load\n"
        f"build.csrc = lambda: Path({str(source.parent)!r})\n"
        f"print(load.load_native().answer())"
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60, every=0.02):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(every)


def cause_of_failure():
    with pytest.raises(BackendError) as caught:
        load.load_native()
    return str(caught.value)


def in_a_process_with(driver, function, **variables):
    """Calls a test module's function in a process that finds the stand-in for the CUDA driver in a folder."""
    folders, module = [str(Path(__file__).parent), str(Path(function.__code__.co_filename).parent)], function.__module__
    code = f"import sys; sys.path[:0] = {folders!r}; import {module}; {module}.{function.__name__}()"
    return result_of(python(code, LD_LIBRARY_PATH=str(driver), **variables))
