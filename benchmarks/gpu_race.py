"""How a GPU is timed: by events, contestants alternating in rounds."""

import random
import time

import torch

from .contestants import Contestant

WARMUP_ROUNDS = 3


class Clock:
    """Times a call: milliseconds on the device, and until it returned. On a CPU, to try this out, both are one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"

    def time(self, call) -> tuple[float, float]:
        """Returns both."""
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
    """Returns {name: its times in each round; None where it took no part}."""
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
