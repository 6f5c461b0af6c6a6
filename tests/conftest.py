"""Shared by all tests: GPU tests where there is none, a process that has not looked for its backend yet, stand-ins.

The stand-in is a few lines of C++ in the place of csrc/, for tests of the build rather than of what is built.
"""

import functools
import gc
import subprocess
import sysconfig

import pytest
import torch
from processes import STAND_IN

from childtune_fast.native import build, jit, load, toolchain


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that the processes of `make test`, which take file by file, end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))


def pytest_collection_finish():
    """Trainer collects garbage in every run, and went through all that is imported, which never is garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def one_thread():
    """So small problems gain little by a second thread, and lose much where other tests keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def native():
    """The compiled module; whatever a test changes of it is put back."""
    module = load.load_native()
    yield module
    module.set_instruction_set(module.supported_instruction_sets()[-1])
    module.force_attribute_access(False)


@pytest.fixture
def cache(tmp_path):
    """Returns the cache folder of just-in-time builds in a test with a fresh process."""
    return tmp_path / "cache"


@pytest.fixture
def fresh_process(monkeypatch, cache):
    """Gives the test a cache of its own, and a process that has not looked for the native backend yet."""
    for name in ("CHILDTUNE_BACKEND", "TORCH_EXTENSIONS_DIR", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHILDTUNE_CACHE", str(cache))
    monkeypatch.setenv("CHILDTUNE_FORCE_JIT", "1")
    for name in ("_find_native", "warn_once"):
        monkeypatch.setattr(load, name, functools.cache(getattr(load, name).__wrapped__))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Puts the stand-in in the place of csrc/ and returns its one source file."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    monkeypatch.setattr(build, "csrc", lambda: folder)
    source = folder / "bindings.cpp"
    source.write_text(STAND_IN)
    return source


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Returns the bytes of the compiled stand-in."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "bindings.cpp").write_text(STAND_IN)
    include = f"-I{sysconfig.get_path('include')}"
    command = ["c++", "-shared", "-fPIC", include, "bindings.cpp", "-o", "out.so"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "out.so").read_bytes()


@pytest.fixture
def builds(monkeypatch, stand_in, compiled):
    """Replaces the compilation by a copy of the compiled stand-in; returns the folders that were built in."""
    folders = []

    def copy(folder, compiler):
        folders.append(folder)
        (folder / f"_native{jit.SUFFIX}").write_bytes(compiled)

    monkeypatch.setattr(toolchain, "compile_native", copy)
    return folders


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Returns the folder of a stand-in for the CUDA driver, as libcuda.so.1."""
    folder, root = tmp_path_factory.mktemp("driver"), build.csrc().parent
    sources = [
        root / "tests/standin/libcuda.cpp",
        root / "csrc/cuda/launch_plan.cpp",
        root / "csrc/cuda/score_plan.cpp",
    ]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{root / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, sources), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder
