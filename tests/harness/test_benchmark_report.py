"""The report of `make bench`: its tables hold what is measured on a CPU, and nothing else."""

import pytest
import torch

from benchmarks.contestants import TITLES, make_contestants
from benchmarks.readings import Results
from benchmarks.tables import times_table
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
    assert {name for name in TITLES if name not in contestants} == {"ours_clipped", "fused_clipped"}
