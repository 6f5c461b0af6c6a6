"""The report of `make bench`: its tables hold what is measured on a CPU, and nothing else."""

import pytest
import torch

from benchmarks.contestants import TITLES, make_contestants
from benchmarks.readings import Results
from benchmarks.tables import TRAINING_TITLES, bandwidth_table, times_table, training_table
from benchmarks.workloads import make_workload


@pytest.mark.parametrize("workload", ["bert-base", "1000x33"])
def test_a_table_has_a_row_for_each_contestant_on_the_cpu(workload):
    work = make_workload([(3,), (5,)], torch.float32)
    contestants = make_contestants(work)
    times = {name: {"median": 1000.0 * (i + 1)} for i, name in enumerate(contestants)}
    step = {"times_ns": times, "weights": 8, "tensors": 2, "ratios": {"ours": {}, "ours_p1": {}}}
    benches = [{"name": f"test_step[{workload}-float32-{threads}]", "extra_info": step} for threads in (2, 1)]
    results = Results(
        {
            "machine_info": {},
            "commit_info": {},
            "datetime": "2026-01-01T00:00:00",
            "benchmarks": [*benches, *({**b, "name": b["name"].replace("float32", "bfloat16")} for b in benches)],
        }
    )
    table = times_table(results, workload)
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        title for name, title in TITLES.items() if name in contestants
    ]
    assert {name for name in TITLES if name not in contestants} - {"deepspeed"} == {"ours_clipped", "fused_clipped"}


def report_of(**extras):
    benches = [{"name": f"test_{name}", "extra_info": noted} for name, noted in extras.items()]
    date = "2026-01-01T00:00:00"
    return Results({"machine_info": {}, "commit_info": {}, "datetime": date, "benchmarks": benches})


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]


def test_a_table_has_what_only_some_columns_measured_and_what_is_held_to_an_instruction_set():
    def step(**medians):
        times = {name: {"median": median} for name, median in medians.items()}
        return {"times_ns": times, "weights": 8, "tensors": 2, "ratios": {"ours": {"fused": {"median": 0.5}}}}

    columns = {
        "step[bert-base-float32-2]": step(ours=8.0, fused=16.0, naive=80.0, **{"ours@avx2": 24.0}),
        "step[bert-base-float16-2]": step(ours=4.0, fused=8.0),
    }
    assert cells_of(times_table(report_of(**columns), "bert-base")) == [
        [TITLES["ours"], "1", "", "0.5", ""],
        [TITLES["fused"], "2", "0.5", "1", "0.5"],
        [TITLES["naive"], "10", "", "", ""],
        [TITLES["ours"] + ", held to avx2", "3", "", "", ""],
    ]


def test_the_table_of_fine_tuning_has_ratios_and_shares():
    spread = {"q1": 0.9, "median": 1.0, "q3": 1.1}
    noted = {
        "tokens": 128,
        "times_ns": {name: {"median": 5e6} for name in TRAINING_TITLES},
        "ratios": {"ours": {"fused": spread}, "child": {"fused": spread}},
        "optimizer_share": {name: {"median": 0.125} for name in TRAINING_TITLES},
    }
    table = training_table(report_of(**{"training_step[minilm]": noted}))
    assert "128 tokens" in table
    assert [row[1:] for row in cells_of(table)] == [["5", "1.000 [0.900, 1.100]", "12.5 %"]] * 2 + [["5", "", "12.5 %"]]
    assert training_table(report_of()) == ""


def test_the_table_of_bandwidth_has_a_column_for_each_number_of_threads():
    noted = {"gb_per_s": {"reads": 1.0, "writes": 2.0, "mix": 3.0}}
    table = bandwidth_table(report_of(**{"bandwidth[1]": noted, "bandwidth[2]": noted}))
    assert [row[1:] for row in cells_of(table)] == [["1.0"] * 2, ["2.0"] * 2, ["3.0"] * 2]
    assert bandwidth_table(report_of()) == ""
