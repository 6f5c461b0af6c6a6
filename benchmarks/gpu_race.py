"""Times contestants on a GPU by events, in rounds in which they alternate."""

import random
import time

import torch

from .contestants import Contestant

WARMUP_ROUNDS = 3


class Clock:
    """Times calls on a device. On a CPU, which serves only to try the benchmarks, both times are the same."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def time(self, call) -> tuple[float, float]:
        """Returns the milliseconds that a call takes on the device, and those until it returns on the host."""
        if self.on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
        start = time.perf_counter()
        call()
        host = 1e3 * (time.perf_counter() - start)
        if not self.on_gpu:
            return host, host
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end), host


def race(contestants: dict[str, Contestant], clock: Clock, rounds: int) -> dict[str, list[tuple[float, float] | None]]:
    """Returns {name: what Clock.time returned in each round, or None for a round that the contestant left out}."""
    order, shuffle = list(contestants), random.Random(0).shuffle
    samples = {name: [] for name in contestants}
    for number in range(-WARMUP_ROUNDS, rounds):
        shuffle(order)
        for name in order:
            contestant = contestants[name]
            if number > 0 and number % contestant.every:
                samples[name].append(None)
                continue
            if contestant.before is not None:
                contestant.before()
            measured = clock.time(contestant.step)
            if number >= 0:
                samples[name].append(measured)
    return samples
