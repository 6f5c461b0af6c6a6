"""The just-in-time build, with every way in which it can go wrong: compilers, cache folders, several processes.

Most tests compile a stand-in of a few lines; where not even the compiler matters, a copy of a compiled one is put in
place. test_real_build.py builds the real sources.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import filelock
import pytest
import torch
from processes import STAND_IN, alive, cause_of_failure, compiler_that, load_code, python, result_of, script, wait_until

from childtune_fast.native import BackendError, build, jit, load, toolchain

pytestmark = pytest.mark.usefixtures("fresh_process")


# ---- Compilers -----------------------------------------------------------------------------------------------------


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "a C++ compiler is needed and 'c++' is none that can be run; install one (g++)" in cause_of_failure()


@pytest.mark.parametrize(
    ("machine", "capability", "skips"), [("x86_64", "AVX2", 1), ("x86_64", "AVX512", 0), ("arm64", "NEON", 0)]
)
def test_avx512_kernels_are_built_where_they_run(monkeypatch, machine, capability, skips):
    """And a binary without them is not taken for one with them."""
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert toolchain.local_flags() == ["-DCHILDTUNE_NO_AVX512"] * skips
    key = jit._key(toolchain.find_compiler())
    monkeypatch.setattr(toolchain, "local_flags", lambda: ["-DCHILDTUNE_NO_AVX512"] * (1 - skips))
    assert jit._key(toolchain.find_compiler()) != key


def test_compiler_that_fails_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "cc", "echo licence expired; exit 3"))
    assert "fails at --version; repair it" in cause_of_failure()
    assert "\n    licence expired" in cause_of_failure()


def test_compiler_that_never_answers(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "PROBE_TIMEOUT", 0.5)
    monkeypatch.setenv("CXX", script(tmp_path / "cc", "sleep 300"))
    assert "does not answer" in cause_of_failure()


def test_compiler_that_cannot_be_executed(monkeypatch, tmp_path):
    path = tmp_path / "cc"
    path.write_bytes(b"\x7fELF and nothing else")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "does not answer" in cause_of_failure()


def test_compiler_errors_are_quoted_and_torch_noise_is_not(monkeypatch, stand_in):
    stand_in.write_text('#error "the moon is full"\n')
    cause = cause_of_failure()
    assert "building with 'c++' failed (status 1); repair it" in cause
    assert "the moon is full" in cause
    assert not any(noise in cause for noise in ("ninja: ", "FAILED:", "-DTORCH_EXTENSION_NAME", "Traceback"))


def test_binary_that_crashes_when_loaded_crashes_the_child_only(stand_in):
    stand_in.write_text(STAND_IN + "#include <cstdlib>\nstatic int crash = (std::abort(), 0);\n")
    assert "building with 'c++' failed (status -6)" in cause_of_failure()


def test_compiler_that_hangs_while_compiling(monkeypatch, stand_in, tmp_path):
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setattr(toolchain, "BUILD_TIMEOUT", 5.0)
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "cc", f"echo $$ >>{log}; exec sleep 300"))
    assert "was stopped after 5 s of building" in cause_of_failure()
    wait_until(lambda: not any(map(alive, log.read_text().split())), seconds=5)


def test_time_limit_ends_the_children_too(tmp_path):
    pid_file = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        toolchain.run(["sh", "-c", f"sleep 300 & echo $! >{pid_file}; wait"], timeout=0.5)
    wait_until(lambda: not alive(pid_file.read_text().strip()), seconds=5)


def test_last_lines_only():
    quoted = toolchain.quoted("".join(f"line {i}\n" for i in range(100)) + "ninja: build stopped\n")
    assert quoted.splitlines()[1:] == [f"    line {i}" for i in range(88, 100)]


def test_missing_ninja(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(BackendError, match="ninja is needed and not installed; run `pip install ninja`"):
        toolchain.environment(toolchain.Compiler("c++", "/usr/bin/c++", ""))


def test_ninja_of_a_virtual_environment_that_is_not_activated(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = toolchain.environment(toolchain.Compiler("c++", "/usr/bin/c++", ""))
    assert found["PATH"].startswith(str(tmp_path) + os.pathsep)


def test_missing_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "csrc", lambda: tmp_path / "nowhere")
    assert "the C++ sources are not at" in cause_of_failure()


# ---- The cache -----------------------------------------------------------------------------------------------------


def binaries(cache):
    return sorted(cache.glob(f"*{jit.SUFFIX}"))


def test_second_load_takes_the_cached_binary(builds, cache, capfd):
    assert jit.load().answer() == 42
    assert capfd.readouterr().err.count("\n") == 1
    assert jit.load().answer() == 42
    assert len(builds) == 1
    assert capfd.readouterr().err == ""
    assert [path.name for path in cache.glob("build-*")] == []


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_truncated_binary_is_built_again(builds, cache, keep):
    jit.load()
    (path,) = binaries(cache)
    content = path.read_bytes()
    path.unlink()  # this process has it loaded: cutting that very file short would crash it
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert jit.load().answer() == 42
    assert len(builds) == 2
    assert binaries(cache)[0].read_bytes() == content


def test_whole_binary_that_does_not_load_is_built_again(builds, cache):
    cache.mkdir()
    impostor = cache / "impostor"
    impostor.write_bytes(b"no library")
    key = jit._key(toolchain.find_compiler())
    impostor.rename(cache / f"{key}-{jit._digest(b'no library')}{jit.SUFFIX}")
    assert jit.load().answer() == 42
    assert len(binaries(cache)) == 1


def test_other_sources_compilers_and_versions_of_torch_have_other_binaries(
    monkeypatch, builds, cache, stand_in, tmp_path
):
    jit.load()
    stand_in.write_text(STAND_IN + "// changed\n")
    jit.load()
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "cc", ""))
    jit.load()
    monkeypatch.setattr(torch, "__version__", "9.9")
    jit.load()
    assert len(builds) == len(binaries(cache)) == 4


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert jit.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("CHILDTUNE_CACHE")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    assert jit.cache_folder() == tmp_path / "extensions" / "childtune_fast"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert jit.cache_folder().parts[-2:] == ("torch_extensions", "childtune_fast")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/childtune"])
def test_unusable_cache_folder_builds_for_this_process(monkeypatch, builds, tmp_path, capfd, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHILDTUNE_CACHE", str(tmp_path / place))
    assert load.load_native().answer() == 42
    assert f"cannot write to the cache folder {tmp_path / place}" in capfd.readouterr().err
    assert not builds[0].exists()
    assert not builds[0].parent.exists()


def test_read_only_cache_with_a_binary_is_used(monkeypatch, builds, cache):
    jit.load()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert jit.load().answer() == 42
    assert len(builds) == 1


def test_full_disk(monkeypatch, builds):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        cause = cause_of_failure()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a build needs 8 MiB: set CHILDTUNE_CACHE to a folder with room" in cause
    assert "File too large" in cause
    assert not builds


def test_no_folder_at_all(monkeypatch, builds, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHILDTUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert "nor to a temporary one" in cause_of_failure()


# ---- Several processes ---------------------------------------------------------------------------------------------


def test_lock_file_of_a_dead_process_does_not_block(builds, cache, capfd):
    cache.mkdir()
    (cache / f"{jit._key(toolchain.find_compiler())}.lock").write_text("12345")
    assert jit.load().answer() == 42
    assert "waiting" not in capfd.readouterr().err


def test_lock_that_is_held_too_long_is_not_waited_for(monkeypatch, builds, cache, capfd):
    monkeypatch.setattr(jit, "LOCK_TIMEOUT", 0.2)
    cache.mkdir()
    with filelock.FileLock(cache / f"{jit._key(toolchain.find_compiler())}.lock"):
        assert jit.load().answer() == 42
    assert "waiting for another process" in capfd.readouterr().err


def test_folders_of_killed_builds_are_removed_once_nobody_can_own_them(builds, cache):
    for name, age in (("build-old", 2 * jit.STALE_AFTER), ("build-young", 0)):
        (cache / name).mkdir(parents=True)
        (cache / name / "left.o").touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    jit.load()
    assert [path.name for path in cache.glob("build-*")] == ["build-young"]
    assert jit.STALE_AFTER > 2 * toolchain.BUILD_TIMEOUT


def test_processes_that_start_together_build_once(monkeypatch, stand_in, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "cc", f'case "$*" in *bindings.cpp*) echo x >>{log};; esac'))
    for process in [python(load_code(stand_in)) for _ in range(3)]:
        assert result_of(process)[0] == "42\n"
    assert log.read_text() == "x\n"


def test_killed_build_blocks_nobody_and_leaves_no_compiler_running(monkeypatch, stand_in, cache, tmp_path):
    log, hang = tmp_path / "log", tmp_path / "hang"
    hang.touch()
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "cc", f"[ -e {hang} ] && echo $$ >>{log} && exec sleep 300"))
    with python(load_code(stand_in)) as first:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        first.kill()
    pid = log.read_text().split()[0]
    wait_until(lambda: not alive(pid), seconds=10)
    assert list(cache.glob("build-*"))
    hang.unlink()
    output, errors = result_of(python(load_code(stand_in)))
    assert output == "42\n"
    assert "waiting" not in errors
