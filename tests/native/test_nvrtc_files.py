"""Where NVRTC is looked for, and that one of another CUDA than torch's is never taken."""

import ctypes.util
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from childtune_fast.native import nvrtc_files

LINUX = ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "loaded", "torch/lib", "conda/lib", "home/lib64", "path/lib64"]
WINDOWS = ["nvidia/cu13/bin/x86_64", "nvidia/cuda_nvrtc/bin", "torch/lib", "conda/Library/bin"]
WINDOWS += ["home/bin/x64", "path/bin"]
OTHERS = ["libnvrtc.so.12", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0", "libcaffe2_nvrtc.so", "libnvrtc.so"]
OTHERS += ["nvrtc64_120_0.dll", "nvrtc64_130_0.alt.dll", "nvrtc-builtins64_130.dll"]


@pytest.fixture
def places(monkeypatch, tmp_path):
    """Returns a function that fills folders with `name` and with what must not be taken, and looks on a platform."""

    def look(platform, folders, name, cuda="13.0"):
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            for file in [name, *OTHERS]:
                (tmp_path / folder / file).touch()
        lines = [
            f"7f00-7f01 r--p 00000000 00:1f 12   {tmp_path}/loaded/{name}",
            f"7f01-7f02 r-xp 00001000 00:1f 12   {tmp_path}/loaded/{name}",
            f"7f03-7f04 r--p 00000000 00:1f 13   {tmp_path}/gone/{name} (deleted)",
            f"7f05-7f06 r--p 00000000 00:1f 14   {tmp_path}/loaded/libnvrtc.so.12",
            "7f07-7f08 rw-p 00000000 00:00 0",
        ]
        if "loaded" in folders:
            (tmp_path / "maps").write_text("\n".join(lines))
        monkeypatch.setattr(sys, "platform", platform)
        spec = importlib.util.spec_from_file_location(nvrtc_files.__name__, nvrtc_files.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "MAPS", tmp_path / "maps")
        nvidia = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: nvidia if name == "nvidia" else None)
        monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: str(tmp_path / "system" / f"{name}.dll"))
        found = [path for path in module.nvrtc_files() if not path.is_relative_to("/usr/local/cuda")]
        return [str(path.relative_to(tmp_path)) if path.is_absolute() else str(path) for path in found]

    return look


@pytest.mark.parametrize("name", ["libnvrtc.so.13", "libnvrtc-672ee683.so.13.0"])
def test_on_linux(places, name):
    assert places("linux", LINUX, name) == [*(f"{folder}/{name}" for folder in LINUX), "libnvrtc.so.13"]


def test_on_windows(places):
    name = "nvrtc64_130_0.dll"
    assert places("win32", WINDOWS, name) == [f"{folder}/{name}" for folder in [*WINDOWS, "system"]]


def test_another_cuda_than_torchs_is_left_alone(places):
    found = places("linux", LINUX, "libnvrtc.so.14", cuda="12.8")
    assert {Path(path).name for path in found} == {"libnvrtc.so.12"}


def test_a_library_is_tried_once(places, tmp_path):
    (tmp_path / "path").symlink_to(tmp_path / "home")
    found = places("linux", ["home/lib64"], "libnvrtc.so.13")
    assert found == ["home/lib64/libnvrtc.so.13", "libnvrtc.so.13"]
