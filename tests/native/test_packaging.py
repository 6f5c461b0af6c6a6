"""What is shipped: the contents of wheel and sdist, and installs where torch, or a compiler, is missing.

The packages are made of this tree with a stand-in for csrc/, so that a build takes a second; `.ci/run` makes real ones.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import STAND_IN, python, result_of, script

from childtune_fast.native import build

ROOT = Path(__file__).resolve().parents[2]
BINARY = f"childtune_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
SHIPPED_SOURCES = {f"childtune_fast/csrc/{name}" for name in ("python/bindings.cpp", "core/empty.h", "cuda/kernels.cu")}
# pip does the same in a process of its own. Without torch: setup.py must not need it.
BUILD = "import sys; sys.modules['torch'] = None; from setuptools import build_meta as b; print(b.build_{}({!r}))"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or importlib.util.find_spec("setuptools") is None,
    reason="needs a source tree and setuptools",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Returns a copy of this source tree with the stand-in for csrc/."""
    folder = tmp_path_factory.mktemp("tree") / "source"
    ignore = shutil.ignore_patterns("__pycache__", "_native*")
    shutil.copytree(ROOT / "childtune_fast", folder / "childtune_fast", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "csrc" / "core").mkdir(parents=True)
    (folder / "csrc" / "core" / "empty.h").write_text("#pragma once\n")
    (folder / "csrc" / "cuda").mkdir()
    (folder / "csrc" / "cuda" / "kernels.cu").write_text("not read by any compiler\n")
    (folder / "csrc" / "python").mkdir()
    (folder / "csrc" / "python" / "bindings.cpp").write_text('#include "core/empty.h"\n' + STAND_IN)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return make("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return make("sdist", tree, tmp_path_factory.mktemp("sdist"))


def make(kind, tree, out, **env):
    """Builds a wheel or an sdist and returns its path; without kernels for GPUs, unless they are asked for."""
    env = {"CHILDTUNE_CUDA": "0", **env}
    command = ["env", *(f"{name}={value}" for name, value in env.items()), sys.executable, "-c"]
    ran = subprocess.run(
        [*command, BUILD.format(kind, str(out))], cwd=tree, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (out / "log").write_text(ran.stdout)
    return out / ran.stdout.splitlines()[-1]


def names(archive):
    return set(zipfile.ZipFile(archive).namelist())


def test_wheel_holds_everything_and_nothing_else(wheel):
    python_files = {f"childtune_fast/{path.relative_to(build.PACKAGE)}" for path in build.PACKAGE.rglob("*.py")}
    expected = python_files | SHIPPED_SOURCES | {"childtune_fast/py.typed", BINARY, "childtune_fast/_native.json"}
    assert {name for name in names(wheel) if ".dist-info/" not in name} == expected


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert f"\nVersion: {build.version()}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert "\nRequires-Dist: torch>=2.9\n" in metadata
    assert re.findall(r"^Requires-Dist: (?:ninja|pybind11).*", metadata, flags=re.MULTILINE)[0] == (
        'Requires-Dist: ninja; extra == "jit"'
    )  # who has a wheel compiles nothing
    assert "\nProject-URL:" not in metadata  # nobody has said where


def test_links_are_absolute_where_the_repository_is_known(tree, tmp_path):
    archive = zipfile.ZipFile(make("wheel", tree, tmp_path, CHILDTUNE_REPOSITORY="https://example.org/a/b"))
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "\nProject-URL: Issues, https://example.org/a/b/issues\n" in metadata
    pattern = r"(!?)\[[^]]*\]\(([^)\s]+)\)"
    links = re.findall(pattern, metadata)
    readme = re.findall(pattern, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) == len(readme) > 20
    assert {shown for shown, _ in links} == {"", "!"}
    for (shown, link), (_, relative) in zip(links, readme, strict=True):
        if relative.startswith(("https:", "#")):
            assert link == relative
            continue
        assert (ROOT / relative.partition("#")[0]).exists(), relative
        kind = "raw" if shown else "blob"  # a page shows a picture's file itself; a link leads to the page around it
        assert link == f"https://example.org/a/b/{kind}/main/{relative}"


def test_wheels_are_built_for_the_versions_that_are_named():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    built = re.findall(r"cp3(\d+)-\*", project["tool"]["cibuildwheel"]["build"])
    assert named == [f"3.{minor}" for minor in built]
    assert project["project"]["requires-python"] == f">={named[0]}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_sdist_holds_all_that_is_tracked(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
    for name in tracked:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    with tarfile.open(make("sdist", tmp_path / "tree", tmp_path)) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    of_repositories = {name for name in tracked if name == ".gitignore" or name.startswith(".github/")}
    assert files - made == tracked - of_repositories


def test_prebuilt_binary_of_an_installed_wheel_is_used(wheel, tmp_path):
    """The installed package computes the fingerprint from what it ships; it must be that of the build."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from childtune_fast.native import load; n = load.find_native(); print(n.origin, n.module.answer(), n.notes)"
    output, errors = result_of(python(code, package_in=tmp_path, CXX="/nonexistent/c++", CHILDTUNE_FORCE_JIT="0"))
    assert output == "prebuilt 42 []\n", errors


def test_installed_package_can_build_just_in_time(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from childtune_fast.native import load; n = load.find_native(); print(n.origin, n.module.answer(), n.notes)"
    env = {"CHILDTUNE_FORCE_JIT": "1", "CHILDTUNE_CACHE": str(tmp_path / "cache")}
    output, errors = result_of(python(code, package_in=tmp_path / "site", **env))
    assert output == "built just in time 42 []\n", errors


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    out = tmp_path / "out"
    out.mkdir()
    assert names(make("wheel", folder, out)) == names(wheel)


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false", "true"])
def test_install_without_a_compiler_gives_the_package_and_one_line(tree, tmp_path, compiler):
    archive = make("wheel", tree, tmp_path, CC=compiler, CXX=compiler)
    assert not {BINARY, "childtune_fast/_native.json"} & names(archive)
    assert names(archive) >= SHIPPED_SOURCES
    lines = (tmp_path / "log").read_text().splitlines()
    told = [line for line in lines if line.startswith("childtune_fast: installed without the native backend")]
    assert len(told) == 1
    assert "it will be built on first use" in told[0]


FALSE_NVCC = """
case "$*" in --list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_90a\\n'; exit;; esac
asked=$(printf '%s ' "$@" | grep -o '[a-z]*_[0-9a-z]*,code=[a-z0-9_]*')
while [ "$1" != -o ]; do shift; done
echo $asked > "$2"
"""


@pytest.fixture
def toolkit(tmp_path):
    """The home of a CUDA toolkit whose nvcc writes what it is asked for."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    script(home / "bin" / "nvcc", FALSE_NVCC)
    return home


@pytest.mark.parametrize(("wanted", "built"), [("", True), ("1", True), ("0", False)])
def test_kernels_for_gpus_are_built_where_there_is_nvcc(tree, toolkit, tmp_path, wanted, built):
    archive = make("wheel", tree, tmp_path, CUDA_HOME=toolkit, CHILDTUNE_CUDA=wanted, CXX="false")
    kernels = {"childtune_fast/_kernels.fatbin", "childtune_fast/_kernels.json"}
    assert kernels & names(archive) == (kernels if built else set())
    if built:
        record = json.loads(zipfile.ZipFile(archive).read("childtune_fast/_kernels.json"))
        assert record["codes"] == [75, 80, 90]
        machine = [f"compute_{code},code=sm_{code}" for code in (75, 80, 90)]
        ptx = [f"compute_{code},code=compute_{code}" for code in (75, 90)]  # for GPUs that no machine code serves
        fatbin = zipfile.ZipFile(archive).read("childtune_fast/_kernels.fatbin").decode()
        assert fatbin.split() == machine + ptx


@pytest.mark.parametrize(
    ("nvcc", "cause"),
    [
        ("exit 1", "returned non-zero exit status 1"),
        ("echo sm_52", r"compiles for \[52\], and none of \[75, .* is among"),
    ],
)
def test_kernels_that_are_asked_for_and_cannot_be_built_are_an_error(tree, toolkit, tmp_path, nvcc, cause):
    script(toolkit / "bin" / "nvcc", nvcc)
    error = f"CHILDTUNE_CUDA=1 asks for GPU kernels, which could not be built .*{cause}"
    with pytest.raises(AssertionError, match=error):
        make("wheel", tree, tmp_path, CUDA_HOME=toolkit, CHILDTUNE_CUDA="1", CXX="false")
    archive = make("wheel", tree, tmp_path, CUDA_HOME=toolkit, CHILDTUNE_CUDA="", CXX="false")
    assert "childtune_fast/_kernels.fatbin" not in names(archive)
    line = f"installed without GPU kernels, which are compiled on first use .*{cause}"
    assert re.search(line, (tmp_path / "log").read_text())


def test_editable_install_leaves_binary_and_record_in_the_tree(tree, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(tree, copy)
    make("editable", copy, tmp_path)
    record = json.loads((copy / "childtune_fast" / "_native.json").read_text())
    assert (copy / BINARY).exists()
    code = "from childtune_fast.native import load; n = load.find_native(); print(n.origin, n.module.answer())"
    assert (
        result_of(python(code, package_in=copy, CXX="/nonexistent/c++", CHILDTUNE_FORCE_JIT="0"))[0] == "prebuilt 42\n"
    )
    (copy / "csrc" / "core" / "empty.h").write_text("// changed since\n")
    code = "from childtune_fast.native import build, load; print(build.fingerprint(), load.find_native().notes)"
    output, _ = result_of(python(code, package_in=copy, CXX="/nonexistent/c++", CHILDTUNE_FORCE_JIT="0"))
    assert record["fingerprint"] not in output
    assert "was made from other sources" in output
