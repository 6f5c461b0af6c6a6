"""The choice of backend, prebuilt binaries, the report of `python -m childtune_fast`, and what an import costs."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from processes import cause_of_failure, python, result_of

from childtune_fast import ChildAdamW, ChildNetwork, FisherAccumulator, estimate_fisher
from childtune_fast import __main__ as report
from childtune_fast.native import BackendError, build, load

pytestmark = pytest.mark.usefixtures("fresh_process")


# ---- Which backend a request stands for ----------------------------------------------------------------------------


def test_native_and_auto_give_the_module_and_torch_gives_none(builds):
    module = load.resolve("native")
    assert module.answer() == 42
    assert load.resolve("auto") is module
    assert load.resolve("torch") is None
    assert len(builds) == 1


def test_torch_never_builds(builds):
    assert load.resolve("torch") is None
    assert not builds


@pytest.mark.parametrize("word", ["", "Native", "cuda", None])
def test_unknown_backend(word):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'native', 'torch' \(got "):
        load.resolve(word)


def test_environment_decides_for_auto_only(monkeypatch, builds):
    monkeypatch.setenv("CHILDTUNE_BACKEND", "torch")
    assert load.resolve("auto") is None
    assert load.resolve("native").answer() == 42
    monkeypatch.setenv("CHILDTUNE_BACKEND", "")
    assert load.resolve("auto").answer() == 42


def test_environment_native_never_falls_back(monkeypatch):
    monkeypatch.setenv("CHILDTUNE_BACKEND", "native")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(BackendError):
        load.resolve("auto")


@pytest.mark.parametrize(("name", "value"), [("CHILDTUNE_BACKEND", "fast"), ("CHILDTUNE_FORCE_JIT", "yes")])
def test_wrong_environment(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"environment variable {name} must be .* \(got '{value}'\)"):
        load.resolve("auto")


def test_auto_warns_once_with_cause_and_remedy(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.warns(UserWarning, match=r"'/nonexistent/c\+\+' .*; install one \(g\+\+\)(.|\n)*pure-torch"):
        assert load.resolve("auto") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load.resolve("auto") is None


def test_failure_is_remembered(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    first = cause_of_failure()
    monkeypatch.delenv("CXX")
    assert cause_of_failure() == first


# ---- Prebuilt binaries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (json.dumps({"fingerprint": "of other sources"}), "was made from other sources"),
        (None, "has no readable _native.json"),
        ("{", "has no readable _native.json"),
        ("[]", "has no readable _native.json"),
    ],
)
def test_prebuilt_of_other_sources_is_not_used(monkeypatch, tmp_path, builds, record, cause):
    monkeypatch.delenv("CHILDTUNE_FORCE_JIT")
    if record is not None:
        (tmp_path / "_native.json").write_text(record)
    spec = SimpleNamespace(origin=str(tmp_path / "_native.so"))
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: spec)
    native = load.find_native()
    assert native.origin == "built just in time"
    assert cause in native.notes[0]


def test_prebuilt_that_does_not_load_and_no_compiler_names_both_causes(monkeypatch, tmp_path):
    monkeypatch.delenv("CHILDTUNE_FORCE_JIT")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    (tmp_path / "_native.json").write_text(json.dumps({"fingerprint": build.fingerprint()}))
    spec = SimpleNamespace(origin=str(tmp_path / "_native.so"))
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: spec)

    def fail(name):
        raise ImportError("GLIBC_9.9 not found")

    monkeypatch.setattr(load.importlib, "import_module", fail)
    cause = cause_of_failure()
    assert "GLIBC_9.9 not found" in cause
    assert "/nonexistent/c++" in cause


def test_fingerprint_depends_on_every_file_and_on_the_version(monkeypatch, stand_in):
    seen = {build.fingerprint()}
    header = stand_in.with_name("some.h")
    header.write_text("// new")
    seen.add(build.fingerprint())
    header.write_text("// newer")
    seen.add(build.fingerprint())
    header.rename(stand_in.with_name("other.h"))
    seen.add(build.fingerprint())
    monkeypatch.setattr(build, "version", lambda: "9.9")
    seen.add(build.fingerprint())
    monkeypatch.setattr(build, "UNIX_FLAGS", ["-O0"])
    seen.add(build.fingerprint())
    assert len(seen) == 6


# ---- The report ------------------------------------------------------------------------------------------------------


def test_report_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert report.main() == 0
    output = capsys.readouterr().out
    assert "/nonexistent/c++" in output
    assert "serves cpu        torch" in output
    assert "self-check        skipped" in output


def test_report_as_json(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert report.main("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert report.main("info", "--json") == 0
    pairs = json.loads(capsys.readouterr().out)
    assert [f"{label} {value}".split() for label, value in pairs] == [line.split() for line in lines]
    assert [label for label, _ in pairs][:2] == ["childtune_fast", "torch"]


def test_report_explains_itself(capsys):
    assert report.main("--help") == 0
    assert "childtune info --json" in capsys.readouterr().out
    assert report.main("--version") == 0
    assert capsys.readouterr().out == f"{build.version()}\n"
    assert report.main("proof") == 2
    assert "invalid choice: 'proof'" in capsys.readouterr().err


def test_report_with_a_wrong_environment(monkeypatch, capsys):
    monkeypatch.setenv("CHILDTUNE_BACKEND", "fast")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert report.main() == 2
    assert "(got 'fast')" in capsys.readouterr().err


@pytest.mark.parametrize("differ", [True, False])
def test_self_check_sees_a_single_bit(monkeypatch, differ):
    def steps(name, device):
        weights = [torch.zeros(size) for size in report.SIZES]
        if differ and name == "native":
            weights[-1][-1] = -0.0
        return weights

    monkeypatch.setattr(report, "_steps", steps)
    verdict, passed = report.self_check(load.Native(SimpleNamespace(), "prebuilt", []))
    assert passed is not differ
    assert verdict.startswith("MISMATCH: 1 of" if differ else "OK")


def test_self_check_survives_an_error(monkeypatch):
    def steps(name, device):
        raise RuntimeError("no luck")

    monkeypatch.setattr(report, "_steps", steps)
    verdict, passed = report.self_check(load.Native(SimpleNamespace(), "prebuilt", []))
    assert not passed
    assert verdict == "FAILED: RuntimeError: no luck"


# ---- Import --------------------------------------------------------------------------------------------------------

IMPORT = """
import torch, sys
before = set(sys.modules)
import childtune_fast
print(*sorted(set(sys.modules) - before))
"""


def test_import_loads_nothing_but_the_package_and_neither_builds_nor_loads_the_kernels(cache):
    """Its time is measured by benchmarks/test_costs.py: in a test it would measure who else uses the machine."""
    output, errors = result_of(python(IMPORT))
    names = set(output.split())
    assert errors == ""
    assert "childtune_fast.native.load" in names
    assert not {"childtune_fast._native", "childtune_fast.native.jit"} & names
    foreign = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert foreign <= {"childtune_fast", "numpy"}
    assert not cache.exists()


def warn_of(name):
    """Calls what first asks for a backend: the warning must point at the line below that calls the package."""
    model = torch.nn.Linear(3, 3)
    if name == "step":
        optimizer = ChildAdamW(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
    elif name == "accumulator":
        FisherAccumulator(model)
    elif name == "estimate":
        loss = {"loss_fn": lambda model, batch: model(batch).sum(), "progress": False}
        estimate_fisher(model, [torch.ones(3)], **loss)
    else:
        scores = {name: torch.rand(param.shape) for name, param in model.named_parameters()}
        ChildNetwork.from_scores(model, scores, reserve_p=0.5, maskable="weight")


@pytest.mark.parametrize("name", ["step", "accumulator", "estimate", "choice"])
def test_the_warning_points_at_the_users_line(fresh_process, monkeypatch, name):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.warns(UserWarning, match="pure-torch") as caught:
        warn_of(name)
    (warning,) = caught
    assert warning.filename == __file__
