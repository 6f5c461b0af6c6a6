"""`python -m benchmarks.spectra`: its tables are in docs/spectra.md, and its numbers can be had again."""

import json

import pytest
import torch

from benchmarks import spectra, spectra_digits
from benchmarks.promises import PROMISES
from benchmarks.readings import Results
from benchmarks.spectra_matrices import KINDS, PACKAGED_MODEL, look, matrix, planted
from benchmarks.spectra_workers import LAYERS, NAMES, yardstick
from benchmarks.tables import spectra_memory_table, spectra_table
from childtune_fast.spectra.row import NO_SIGN

RESULTS = json.loads(spectra.RESULTS.read_text(encoding="utf-8"))
FEW = 12  # seeds that are computed anew


@pytest.mark.parametrize("name", spectra.TABLES)
def test_the_documented_table_is_the_programs(name):
    begin, end = spectra.marks(name)
    assert f"{begin}\n{spectra.TABLES[name](RESULTS)}\n{end}" in spectra.PAGE.read_text(encoding="utf-8")


def test_a_report_changes_nothing_but_the_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("\n".join(f"{name}\n{''.join(spectra.marks(name))}" for name in spectra.TABLES), encoding="utf-8")
    spectra.report(RESULTS, page)
    once = page.read_text(encoding="utf-8")
    assert all(f"{name}\n{spectra.marks(name)[0]}\n| " in once for name in spectra.TABLES)
    spectra.report(RESULTS, page)
    assert page.read_text(encoding="utf-8") == once


def test_the_results_are_whole():
    found = [(r["init"], tuple(r["shape"]), r["null"], len(r["alpha"])) for r in RESULTS["untrained"]]
    assert found == spectra.UNTRAINED
    kinds = [(r["title"], r["learned"], tuple(r["shape"]), len(r["rand_spikes"])) for r in RESULTS["kinds"]]
    assert kinds == [(k.title, k.learned, shape, count) for k in KINDS for shape, count in spectra.SHAPES.items()]
    assert {len(of["alpha"]) for of in RESULTS[PACKAGED_MODEL].values()} == {39}
    assert [(r["classes"], r["lr"], r["epochs"]) for r in RESULTS["digits"]] == spectra_digits.SETTINGS
    assert {len(r["found"]) for r in RESULTS["digits"]} == {spectra_digits.SEEDS}


@pytest.mark.parametrize(("init", "shape"), [("normal", (64, 64)), ("uniform", (64, 64)), ("uniform", (64, 64, 3, 3))])
def test_random_matrices_give_the_stored_numbers_again(init, shape):
    (stored,) = (r for r in RESULTS["untrained"] if (r["init"], tuple(r["shape"]), r["null"]) == (init, shape, 1))
    rows = [look(matrix(spectra.INITS[init], shape, seed), seed) for seed in range(FEW)]
    found = spectra.record_of(rows)
    assert found["alpha"] == pytest.approx(stored["alpha"][:FEW], abs=2e-4)
    assert found["rand_spikes"] == stored["rand_spikes"][:FEW]
    assert [row.flag == NO_SIGN for row in rows] == spectra.flags(stored)[:FEW]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.title for kind in KINDS])
def test_other_matrices_give_the_stored_numbers_again(kind):
    (shape, _), *_ = spectra.SHAPES.items()
    (stored,) = (r for r in RESULTS["kinds"] if (r["title"], tuple(r["shape"])) == (kind.title, shape))
    found = spectra.found_in(kind.make, shape, 1)
    assert found["rand_spikes"] == stored["rand_spikes"][:1]
    if stored["alpha"][0] is None:
        assert found["alpha"] == [None]
    else:
        assert found["alpha"] == pytest.approx(stored["alpha"][:1], abs=2e-4)


def test_a_planted_direction_stands_out_above_the_edge_alone():
    """Of the largest singular values, the planted one's place is where theory has it."""
    shape, std = (600, 300), 0.02
    edge = std * (600**0.5 + 300**0.5)  # of the spectrum of infinitely large normal matrices
    below, above = (torch.linalg.svdvals(matrix(planted(1, strength), shape, 0)) for strength in (0.5, 2.0))
    assert float(below[0]) == pytest.approx(edge, rel=0.02)
    added = 2.0 * std * (600 * 300) ** 0.25
    expected = ((added**2 + std**2 * 600) * (added**2 + std**2 * 300)) ** 0.5 / added
    assert float(above[0]) == pytest.approx(expected, rel=0.02)
    assert float(above[1]) == pytest.approx(edge, rel=0.02)


def test_a_network_learns_digits(one_thread):
    pytest.importorskip("sklearn")
    found = spectra_digits.trained(10, 1e-3, 2, seed=0)
    assert found["accuracy"] > 0.8
    for name in spectra_digits.LAYERS:
        assert found[name]["accuracy_without"] < found["accuracy"]
        assert found[name]["alpha"][0] != found[name]["alpha"][1]


# ---- What `make bench` reports of spectra ---------------------------------------------------------------------------


def results_of(**noted):
    benches = [{"name": f"test_{name}", "extra_info": info} for name, info in noted.items()]
    data = {"machine_info": {}, "commit_info": {}, "datetime": "2026-01-01T00:00:00", "benchmarks": benches}
    return Results(data)


def test_the_report_of_spectra_has_a_row_for_each_contestant():
    times = {name: {"median": float(i + 1)} for i, name in enumerate(NAMES)}
    ratios = {name: {"median": 0.125} for name in NAMES[:2]}
    rows = spectra_table(results_of(spectra={"layers": 39, "cpu_s": times, "ratios": ratios})).splitlines()[4:]
    assert [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows] == [
        ["1.00", "0.12"],
        ["2.00", "0.12"],
        ["3.00", ""],
    ]
    assert spectra_table(results_of()) == spectra_memory_table(results_of()) == ""


def test_promises_of_memory_are_read_against_the_layers_own_size():
    sizes = {layer: yardstick(layer) for layer in LAYERS}
    extra = {layer: {"float64": float(2 * of["layer"] + 2 * of["gram"])} for layer, of in sizes.items()}
    results = results_of(spectra_memory={"extra_bytes": extra, "yardsticks": sizes})
    oblong, square = (p for p in PROMISES if "beside a model of 8192" in p.text or "eigensolver" in p.text)
    assert oblong.read(results) == 2.0
    assert square.read(results) == pytest.approx(4 / 3)
    assert len(spectra_memory_table(results).splitlines()) == 4 + len(LAYERS)
