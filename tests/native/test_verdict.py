"""Verdicts on disk: what they depend on, what is not kept, what is not believed."""

import datetime
import json
from types import SimpleNamespace

import pytest
import torch

from childtune_fast.native import build, kept, load, verdict

GPU = SimpleNamespace(name="GPU of a test", major=9, minor=0, uuid="1234")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CHILDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(verdict, "_driver", lambda: "driver 1")
    return tmp_path / "cache"


def facts(image=b"image", **of_gpu):
    return verdict.with_image(verdict.facts_of(SimpleNamespace(**{**vars(GPU), **of_gpu})), image)


@pytest.mark.parametrize("word", ["good", "bad", "refused"])
def test_a_verdict_is_found_again(word):
    made = verdict.made(word, "a case", 1.5)
    assert verdict.keep(facts(), made)
    assert verdict.stored(facts()) == made


def test_what_is_unknown_is_not_kept(cache):
    assert verdict.keep(facts(), verdict.made("unknown", "no memory", 0.0))
    assert verdict.stored(facts()) is None
    assert not cache.exists()


def another_driver(monkeypatch):
    monkeypatch.setattr(verdict, "_driver", lambda: "driver 2")


def another_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")


def another_version(monkeypatch):
    monkeypatch.setattr(build, "version", lambda: "9.9")


def other_host_code(monkeypatch):
    monkeypatch.setattr(build, "fingerprint", lambda: "other")


def other_cases(monkeypatch):
    monkeypatch.setattr(verdict, "_digest_of_cases", lambda: "other")


@pytest.mark.parametrize("change", [another_driver, another_torch, another_version, other_host_code, other_cases])
def test_what_a_verdict_depends_on_proves_anew(change, monkeypatch):
    verdict.keep(facts(), verdict.made("good", "", 1.0))
    for other in (facts(b"another image"), facts(uuid="5678"), facts(name="another GPU"), facts(minor=1)):
        assert verdict.stored(other) is None
    change(monkeypatch)
    assert verdict.stored(facts()) is None


def test_the_driver_is_known_without_a_gpu(monkeypatch):
    monkeypatch.undo()
    assert verdict._driver().startswith("CUDA ")
    monkeypatch.setattr(load, "find_native", lambda: load.Native(None, "", []))
    assert not verdict._driver().startswith("CUDA ")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: "",
        lambda found: "{",
        lambda found: "[]",
        lambda found: json.dumps({**found, "facts": {}}),
        lambda found: json.dumps({**found, "verdict": {}}),
        lambda found: json.dumps({**found, "verdict": {**found["verdict"], "word": "perhaps"}}),
        lambda found: json.dumps({**found, "verdict": {**found["verdict"], "cause": ["x"]}}),
        lambda found: json.dumps({**found, "verdict": {**found["verdict"], "seconds": 10**400}}),
        lambda found: json.dumps({**found, "verdict": {**found["verdict"], "date": "today"}}),
        lambda found: "[" * 100_000,
    ],
    ids=range(10),
)
def test_a_damaged_file_is_none(change, cache):
    verdict.keep(facts(), verdict.made("good", "", 1.0))
    (path,) = cache.glob("*.json")
    path.write_text(change(json.loads(path.read_text())))
    assert verdict.stored(facts()) is None
    assert verdict.keep(facts(), verdict.made("good", "", 1.0))
    assert verdict.stored(facts()) is not None


@pytest.mark.parametrize(
    ("days", "word", "holds"), [(6, "bad", True), (8, "bad", False), (-9, "bad", False), (900, "good", True)]
)
def test_a_verdict_against_the_kernels_is_asked_again_after_a_week(days, word, holds):
    when = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=days)
    verdict.keep(facts(), verdict.Verdict(word, "a case", when.isoformat(" ", "seconds"), 1.0))
    assert (verdict.stored(facts()) is not None) == holds


def test_a_folder_that_keeps_nothing_is_told(cache, monkeypatch):
    cache.write_text("a file where the folder should be")
    assert not verdict.keep(facts(), verdict.made("good", "", 1.0))
    cache.unlink()
    monkeypatch.setattr(kept, "_trusted", lambda status: False)  # as where all files can be written by all
    assert not verdict.keep(facts(), verdict.made("good", "", 1.0))
