"""What `make bench` promises on which machine, the verdicts on it, and the machines side by side in machines.md."""

import json
from pathlib import Path

import pytest

from benchmarks import machines
from benchmarks.promises import PROMISES, promised, verdict
from benchmarks.readings import Ratio, Results

PAGE = Path(__file__).parents[2] / "benchmarks" / "machines.md"


def results_of(native, **extras):
    """The results of a machine, in which test_<name> of each name noted what is given."""
    benches = [{"name": f"test_{name}", "extra_info": noted} for name, noted in extras.items()]
    machine = {"cpu": {"brand_raw": "CPU 1", "count": 2}, "native": native}
    date = "2026-01-01T00:00:00"
    return Results({"machine_info": machine, "commit_info": {}, "datetime": date, "benchmarks": benches})


def steps(threads, **ratios):
    """What a race of steps in float32 on BERT-base noted: the ratios of each of our contestants."""
    spreads = {name: {other: {"median": m} for other, m in others.items()} for name, others in ratios.items()}
    return {f"step[bert-base-float32-{threads}]": {"ratios": spreads}}


WIDE = {"instruction_set": "avx512", "supported_instruction_sets": ["baseline", "avx2", "avx512"]}
MIDDLE = {"instruction_set": "avx2"}  # as older results tell it


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"median": 0.93, "to_roof": 2.0}, "met"),
        ({"median": 0.94, "to_roof": 1.031}, "**missed**"),
        ({"median": 0.94, "to_roof": 1.03}, "at the roof"),
        ({"median": 0.94, "to_roof": None}, "**missed**"),
        ({"median": 0.94}, "**missed**"),
        ({"median": 0.90, "to_roof": 1.0, "disturbed": True}, "disturbed"),
    ],
)
def test_verdicts(found, expected):
    promise = next(p for p in PROMISES if p.text == "F, float32, 2 threads")
    assert promise.at_most == 0.93
    assert verdict(promise, found) == expected


def test_a_processor_without_avx512_is_judged_by_the_bounds_of_avx2():
    bounds = {p.text: p.at_most for p in promised(results_of(MIDDLE))}
    assert bounds["F, float32, 2 threads (bound for avx2)"] == 1.00
    assert bounds["F, float32, held to baseline, 1 thread"] == 1.4
    assert bounds["p = 1, bfloat16: to all-bfloat16, 1 thread"] == 0.58  # avx2 has no bound of its own
    assert not any("held to avx2" in text or text == "F, float32, 2 threads" for text in bounds)


def test_a_processor_with_avx512_is_judged_in_each_instruction_set():
    noted = steps(2, ours={"fused": 0.9}, **{"ours@avx2": {"fused": 1.1, "roof": 1.2}, "ours@baseline": {"fused": 3.0}})
    results = results_of(WIDE, **noted)
    found = {p.text: p for p in promised(results)}
    names = ["F, float32, 2 threads", "F, float32, held to avx2, 2 threads", "F, float32, held to baseline, 2 threads"]
    assert [(found[name].at_most, found[name].read(results)["median"]) for name in names] == [
        (0.93, 0.9),
        (1.00, 1.1),
        (1.4, 3.0),
    ]
    assert found[names[1]].read(results)["to_roof"] == 1.2


def test_no_promise_stands_twice():
    for native in (WIDE, MIDDLE, {"instruction_set": "baseline"}):
        texts = [promise.text for promise in promised(results_of(native))]
        assert len(set(texts)) == len(texts)


def test_the_roof_of_a_child_network_is_the_one_of_its_bytes():
    ratios = {name: {"fused": 0.5, "roof": 1.0, "roof_p0.1": 2.0} for name in ("ours", "ours_p0.1", "ours_p0.1@avx2")}
    noted = {"ratios": {n: {o: {"median": m} for o, m in of.items()} for n, of in ratios.items()}}
    results = results_of(WIDE, **{"child_step[2]": noted})
    assert [Ratio("child_step[2]", "fused", name)(results)["to_roof"] for name in ratios] == [1.0, 2.0, 2.0]


def test_a_row_for_each_ratio_that_any_machine_has():
    wide = results_of(WIDE, **steps(2, ours={"fused": 0.94, "roof": 1.0}, **{"ours@avx2": {"fused": 0.99}}))
    middle = results_of(MIDDLE, **steps(2, ours={"fused": 1.25}), **steps(1, ours={"fused": 0.75}))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in machines.table([wide, middle]).splitlines()]
    assert rows[0] == ["", "at most", "CPU 1, 2 cores, avx512, 2026-01-01", "CPU 1, 2 cores, avx2, 2026-01-01"]
    assert rows[2:] == [
        [
            "F, float32",
            "0.93 / 0.91; avx2 1.00 / 1.00; baseline 1.40 / 1.40",
            "0.94 (at the roof) / not measured",
            "1.25 (missed) / 0.75",
        ],
        ["F, float32: to the roof", "1.03 / 1.03", "1.00 / not measured", "not measured"],
        ["F, float32, held to avx2", "", "0.99 / not measured", "-"],
    ]


def test_the_page_has_the_table_of_the_files():
    files = machines.files()
    assert len(files) >= 3
    table = machines.table([Results(json.loads(path.read_text(encoding="utf-8"))) for path in files])
    page = PAGE.read_text(encoding="utf-8")
    assert table in page, "put what `python -m benchmarks.machines` prints into benchmarks/machines.md"
    for path in files:
        assert f"(results/{path.with_suffix('.md').name})" in page
