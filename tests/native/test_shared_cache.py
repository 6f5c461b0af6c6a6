"""A cache folder that machines or users share: a binary is used where it can run, and only if no one else wrote it."""

import contextlib
import os
import subprocess
import sysconfig

import pytest
import torch
from processes import STAND_IN, cause_of_failure, compiler_that, load_code, python, result_of, script

from childtune_fast.native import BackendError, build, jit, kept, load, toolchain

pytestmark = pytest.mark.usefixtures("fresh_process")
posix = pytest.mark.skipif(os.name != "posix", reason="asks for owner and mode of a file")


def binaries(cache):
    return sorted(cache.glob(f"*{jit.SUFFIX}"))


@pytest.fixture
def no_compiler(monkeypatch):
    """Returns a function that takes the compiler away."""
    return lambda: monkeypatch.setenv("CXX", "/nonexistent/c++")


def test_a_machine_without_a_compiler_uses_what_another_has_built(stand_in, cache):
    """With processes as they are: the first compiles, the second has no compiler."""
    code = load_code(stand_in) + "; print(load.find_native().origin)"
    output, errors = result_of(python(code))
    assert output == "42\nbuilt just in time\n"
    assert "building the native backend" in errors
    cache.chmod(0o555)  # and cannot write there
    try:
        assert result_of(python(code, CXX="/nonexistent/c++")) == (output, "")
        assert result_of(python(code, CXX=script(cache.parent / "cc", "echo no licence; exit 1"))) == (output, "")
    finally:
        cache.chmod(0o755)


def test_a_machine_with_another_libc_or_processor_uses_it_too(monkeypatch, builds, no_compiler):
    jit.load()
    no_compiler()
    monkeypatch.setattr(jit.platform, "libc_ver", lambda: ("glibc", "2.99"))
    monkeypatch.setattr(toolchain, "local_flags", lambda: ["-DCHILDTUNE_NO_AVX512"])
    assert load.load_native().answer() == 42
    assert len(builds) == 1


DIFFERENT = {
    "sources": lambda patch: patch.setattr(build, "fingerprint", lambda: "other"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "9.9"),
    "Python": lambda patch: patch.setattr(jit.sysconfig, "get_config_var", lambda name: "cpython-399"),
    "processor": lambda patch: patch.setattr(jit.platform, "machine", lambda: "riscv64"),
    "system": lambda patch: patch.setattr(jit.sys, "platform", "aix"),
    "C library": lambda patch: patch.setattr(jit.platform, "libc_ver", lambda: ("musl", "1.2")),
}


@pytest.mark.parametrize("differ", DIFFERENT.values(), ids=DIFFERENT)
def test_what_could_not_run_is_not_used(monkeypatch, builds, cache, no_compiler, differ):
    jit.load()
    no_compiler()
    differ(monkeypatch)
    assert "a C++ compiler is needed" in cause_of_failure()
    assert len(binaries(cache)) == 1


def test_what_a_compiler_with_options_made_is_not_used(monkeypatch, builds, cache, no_compiler):
    """Such as -march=native, which another processor cannot run."""
    monkeypatch.setenv("CXX", "c++ -march=native")
    assert toolchain.find_compiler().options == ["-march=native"]
    jit.load()
    jit.load()
    assert len(builds) == 1
    no_compiler()
    assert "a C++ compiler is needed" in cause_of_failure()
    monkeypatch.setenv("CXX", "c++")
    jit.load()
    assert len(builds) == 2


def test_a_launcher_of_compilers_is_no_option(tmp_path):
    launcher = script(tmp_path / "ccache", 'exec "$@"')
    assert toolchain.Compiler(f"{launcher} /usr/bin/c++", launcher, "").options == []


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"no library"])
def test_a_damaged_one_of_another_machine_is_passed_over_and_left(builds, cache, no_compiler, damage):
    """An older whole one is taken; another machine may be able to load what this one cannot."""
    jit.load()
    (whole,) = binaries(cache)
    content = damage(whole.read_bytes())
    for name in (f"{whole.stem[:-32]}{'0' * 32}", f"{whole.stem[:-32]}{jit._digest(content)}"):
        (cache / f"{name}{jit.SUFFIX}").write_bytes(content)
    os.utime(whole, (1, 1))
    no_compiler()
    assert jit.load().answer() == 42
    assert len(binaries(cache)) == 3
    whole.unlink()
    assert "a C++ compiler is needed" in cause_of_failure()
    assert len(binaries(cache)) == 2


def test_the_newest_of_several_is_used(builds, cache, no_compiler, tmp_path):
    jit.load()
    (first,) = binaries(cache)
    source = tmp_path / "newer.cpp"
    source.write_text(STAND_IN.replace("42", "43"))
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(["c++", "-shared", "-fPIC", include, source, "-o", tmp_path / "newer.so"], check=True)
    content = (tmp_path / "newer.so").read_bytes()
    newer = cache / f"{first.stem.split('-')[0]}-{'0' * 16}-{jit._digest(content)}{jit.SUFFIX}"
    newer.write_bytes(content)
    os.utime(first, (1, 1))
    assert jit.load().answer() == 42  # the compiler's own
    no_compiler()
    assert jit.load().answer() == 43


def test_a_compiler_that_fails_leaves_what_another_has_built(monkeypatch, builds, tmp_path):
    jit.load()

    def fail(folder, compiler):
        raise BackendError("no more licences")

    monkeypatch.setattr(toolchain, "compile_native", fail)
    monkeypatch.setenv("CXX", compiler_that(tmp_path / "cc", ""))
    assert jit.load().answer() == 42


# ---- Who may have written a binary ---------------------------------------------------------------------------------


@contextlib.contextmanager
def umask(mode):
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


@posix
def test_nobody_else_can_write_what_is_built(builds, cache):
    with umask(0):
        jit.load()
    assert binaries(cache)[0].stat().st_mode & 0o022 == 0
    jit.load()
    assert len(builds) == 1


@posix
@pytest.mark.parametrize("mode", [0o775, 0o757])
@pytest.mark.parametrize("compiler", [True, False])
def test_what_others_may_write_is_not_loaded(builds, cache, no_compiler, capfd, mode, compiler):
    jit.load()
    (path,) = binaries(cache)
    path.chmod(mode)
    if compiler:
        assert jit.load().answer() == 42
        assert len(builds) == 2
        assert path.stat().st_mode & 0o022 == 0  # the new one, of the same name
    else:
        no_compiler()
        assert "a C++ compiler is needed" in cause_of_failure()
    told = [line for line in capfd.readouterr().err.splitlines() if "not used" in line]
    assert told == [
        f"childtune_fast: {path} is not used, since others than you and root own it or may write it; let root own what "
        "several users share, or set CHILDTUNE_CACHE to a folder of your own"
    ]


@posix
def test_what_another_user_owns_is_not_loaded(monkeypatch, builds, cache, no_compiler):
    jit.load()
    no_compiler()
    me = os.geteuid()
    for owner, used in ((me, True), (0, True), (me + 1, False)):
        fields = list(binaries(cache)[0].stat())
        fields[4] = owner
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", lambda descriptor, fields=fields: os.stat_result(fields))
            if used:
                assert jit.load().answer() == 42
            else:
                with pytest.raises(BackendError):
                    jit.load()


@posix
@pytest.mark.parametrize(("mode", "copied"), [(0o755, False), (0o775, True), (0o1777, False)])
def test_in_a_folder_of_a_group_what_was_checked_is_what_is_loaded(builds, cache, mode, copied):
    """Another user could put another file in its place after it was checked, so a copy is loaded."""
    jit.load()
    cache.chmod(mode)
    assert kept.only_ours(cache) != copied
    module = jit.load()
    assert (os.path.dirname(module.__file__) != str(cache)) == copied
    assert os.path.exists(module.__file__) != copied
    assert len(builds) == 1


def test_name_and_content_are_on_the_disk(monkeypatch, builds, cache):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor)))
    jit.load()
    assert synced == [binaries(cache)[0].stat().st_ino, cache.stat().st_ino]
