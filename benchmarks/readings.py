"""Reads results: what each benchmark noted, and ratios with what is needed to judge them."""

from dataclasses import dataclass, replace
from typing import Any

from .workloads import DTYPES

Record = dict[str, Any]  # a part of pytest-benchmark's JSON

# Limit of interruptions per second. Two threads on two idle cores saw at most 50, and with one busy process beside them
# 250. At 250, torch's fused step, which waits for its slowest thread, takes ten times as long, so that every promise
# would seem kept.
QUIET = 80
INSTRUCTION_SETS = ["baseline", "avx2", "avx512"]


class Results:
    """The benchmarks in one JSON file of pytest-benchmark."""

    def __init__(self, data: Record) -> None:
        self.machine: Record = data["machine_info"]
        self.commit: Record = data["commit_info"]
        self.date: str = data["datetime"][:10]
        self._by_name = {bench["name"]: bench["extra_info"] for bench in data["benchmarks"]}

    @property
    def instruction_sets(self) -> list[str]:
        """The processor's instruction sets, the widest last; older results name that one, which implies the others."""
        native = self.machine["native"]
        if "supported_instruction_sets" in native:
            return native["supported_instruction_sets"]
        return INSTRUCTION_SETS[: INSTRUCTION_SETS.index(native["instruction_set"]) + 1]

    def interruptions(self) -> list[float]:
        """Returns the interruptions per second of each benchmark that counts them."""
        key = "interruptions_per_s"
        return [noted[key] for noted in self._by_name.values() if key in noted]

    def cost(self, name: str) -> Record:
        """Returns what test_<name> noted; raises KeyError if it was not run."""
        return self._by_name[f"test_{name}"]

    def find(self, name: str) -> Record:
        """Returns what test_<name> noted; {} if it was not run."""
        return self._by_name.get(f"test_{name}", {})

    def by_threads(self, name: str, dtype: str = "") -> dict[str, Record]:
        """Returns {title: what test_<name> noted} for each number of threads that it was run with, in that dtype."""
        of = f"{dtype}-" if dtype else ""
        noted = {threads: self._by_name.get(f"test_{name}[{of}{threads}]") for threads in (2, 1)}
        return {f"{threads} thread{'s' * (threads > 1)}": record for threads, record in noted.items() if record}

    def steps(self, workload: str) -> dict[str, Record]:
        """Returns {title: what test_step noted} for each dtype and number of threads that were measured."""
        return {
            f"{dtype}, {threads} thread{'s' * (threads > 1)}": self._by_name[name]
            for dtype in DTYPES
            for threads in (2, 1)
            if (name := f"test_step[{workload}-{dtype}-{threads}]") in self._by_name
        }


@dataclass(frozen=True)
class Ratio:
    """Reads the ratio of one contestant's time to another's; raises KeyError if it was not measured.

    Attributes:
        bench: the benchmark, without "test_".
        other: the contestant that the ratio is to.
        ours: the contestant whose time it is; "" where a benchmark has the ratios of one contestant alone.
    """

    bench: str
    other: str
    ours: str = ""

    def __call__(self, results: Results) -> Record:
        """Returns median and quartiles, whether others "disturbed" it, and "to_roof", if there is a roof."""
        noted = results.cost(self.bench)
        ratios = noted["ratios"][self.ours] if self.ours else noted["ratios"]
        roof = ratios.get("roof_p0.1" if self.ours.startswith("ours_p0.1") else "roof", {})
        disturbed = noted.get("interruptions_per_s", 0.0) >= QUIET
        return {**ratios[self.other], "to_roof": roof.get("median"), "disturbed": disturbed}

    def held_to(self, instruction_set: str) -> "Ratio":
        """Returns the same with our contestant in a narrower instruction set."""
        return replace(self, ours=f"{self.ours}@{instruction_set}")
