"""The method of comparison: contestants alternate within rounds, and ratios are taken within rounds.

A machine's speed drifts by far more than contestants differ, but it drifts little within a round. Each round therefore
gives one ratio for each pair of contestants, and the result for the pair is the median of its ratios.
"""

import random
import resource
import statistics
import time

from .contestants import Contestant

WARMUP_ROUNDS = 2


class Race:
    """Times contestants in rounds; pytest-benchmark times the first one at the end of each round.

    Attributes:
        rounds: number of timed rounds.
        interruptions_per_s: how often per second other processes took a core from this one, as a measure of quiet.
        samples: {name: ns in each timed round, or None for a round that the contestant left out}.
    """

    def __init__(self, contestants: dict[str, Contestant], rounds: int, untimed_step: bool) -> None:
        """Sets up the race.

        Args:
            contestants: {name: contestant}; the benchmark fixture times the first of them.
            rounds: number of timed rounds.
            untimed_step: whether an untimed step of the same contestant precedes each timed step, so that small tensors
                and the code are in the caches, as in a loop of steps.
        """
        self.rounds = rounds
        self._first, *_ = contestants
        self._contestants = contestants
        self._untimed_step = untimed_step
        self._order = random.Random(0)
        self._round = -WARMUP_ROUNDS
        self.interruptions_per_s = 0.0
        self.samples: dict[str, list[int | None]] = {name: [] for name in contestants}

    def run(self, benchmark) -> None:
        """Runs all rounds through pytest-benchmark's fixture."""
        first = self._contestants[self._first]
        start, before = time.perf_counter(), _interruptions()
        benchmark.pedantic(first.step, setup=self._others, rounds=self.rounds, warmup_rounds=WARMUP_ROUNDS)
        self.interruptions_per_s = (_interruptions() - before) / (time.perf_counter() - start)
        self.samples[self._first] = [round(1e9 * seconds) for seconds in benchmark.stats.stats.data]

    def _others(self) -> None:
        others = [name for name in self._contestants if name != self._first]
        self._order.shuffle(others)
        for name in others:
            contestant = self._contestants[name]
            part = self._round == -1 or (self._round >= 0 and self._round % contestant.every == 0)
            sample = self._time(contestant) if part else None
            if self._round >= 0:
                self.samples[name].append(sample)
        self._round += 1
        if self._untimed_step:
            self._contestants[self._first].step()

    def _time(self, contestant: Contestant) -> int:
        if self._untimed_step:
            contestant.step()
        if contestant.before is not None:
            contestant.before()
        start = time.perf_counter_ns()
        contestant.step()
        return time.perf_counter_ns() - start

    def times(self) -> dict[str, dict[str, float]]:
        """Returns {name: spread of the contestant's time in ns}."""
        return {name: spread([s for s in samples if s is not None]) for name, samples in self.samples.items()}

    def ratios(self, name: str) -> dict[str, dict[str, float]]:
        """Returns {other: spread of the ratio of the time of `name` to the other's, in the rounds of both}."""
        ours = self.samples[name]
        pairs = {other: zip(ours, samples, strict=True) for other, samples in self.samples.items() if other != name}
        return {other: spread([a / b for a, b in pair if a and b]) for other, pair in pairs.items()}


def _interruptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def spread(samples: list[float]) -> dict[str, float]:
    """Returns median ("median"), quartiles ("q1", "q3") and number ("count") of samples."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"q1": quartiles[0], "median": quartiles[1], "q3": quartiles[2], "count": len(samples)}
