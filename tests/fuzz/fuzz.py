"""Calls the library with nonsense, a million times if asked, in child processes that may crash without harm.

    python tests/fuzz/fuzz.py --calls 1000000 --seed 1 --jobs 2
    python tests/fuzz/fuzz.py --seed 1 --only 12345        one case again, in this process; --until 12345 those before

A case is a short session of calls, which its seed and number determine; oracle.py says what must hold after each call.
A crash is counted with its case, and the run goes on behind it. Exit status 0 if nothing was found.
"""

import argparse
import collections
import faulthandler
import gc
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch

torch.set_num_threads(
    1
)  # a process that has started OpenMP's threads cannot be forked: its children would wait forever

import oracle  # noqa: E402

import childtune_fast  # noqa: E402

FAULTS = ("crashes", "hangs", "bare errors", "raised but wrote", "writes outside", "miscounted", "faults of the fuzzer")
COUNTED = ("calls", "refusals", *FAULTS, "foreign sentences")
NUMBERS = struct.Struct(f"{2 + len(COUNTED)}q")  # in shared memory: the case, the growth of memory in bytes, the counts
MOST_LINES = 40  # that are printed of a crash
OWN_FAULT = 70  # exit status of a process in which the fuzzer itself has failed
HANG = 30  # seconds after which a case that does not end is killed, and counted as a crash


def cases(planted):
    """{name: (weight, function)} of all kinds of cases, or of those with faults of the fuzzer's own, to be found."""
    if planted:
        from planted_cases import planted_case

        return {"planted": (1, planted_case)}
    from child_cases import child_case
    from native_cases import native_case
    from optimizer_cases import optimizer_case
    from thread_cases import thread_case

    return {
        "optimizer": (100, optimizer_case),
        "native": (80, native_case),
        "child": (50, child_case),
        "threads": (1, thread_case),
    }


def run_case(kinds, seed, number, report, counts):
    rng = random.Random(seed << 40 | number)
    name = rng.choices(list(kinds), [weight for weight, _ in kinds.values()])[0]
    judge = oracle.Oracle(lambda kind, what: report(number, kind, f"{name}: {what}"))
    judge.counts = counts
    kinds[name][1](rng, judge)


class Worker:
    """A forked process that runs every `jobs`-th case, and notes in shared memory which one it is at."""

    def __init__(self, kinds, arguments, job):
        self.kinds, self.arguments, self.job = kinds, arguments, job
        self.shared = mmap.mmap(-1, NUMBERS.size)
        self.next = job
        self.pid, self.seen, self.since = None, -1, 0.0
        self.log = os.path.join(os.environ["FUZZ_FOLDER"], f"problems-{job}")
        self.errors = os.path.join(os.environ["FUZZ_FOLDER"], f"errors-{job}")  # what a crash prints
        self.counts = collections.Counter()  # of the processes that have ended

    def start(self):
        self.tell(self.next, 0, {})
        self.seen, self.since = -1, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(os.open(self.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            faulthandler.enable(2)
            torch.set_num_threads(2)
            status = OWN_FAULT
            try:
                self._run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def tell(self, case, growth, counts):
        NUMBERS.pack_into(self.shared, 0, case, growth, *(counts.get(name, 0) for name in COUNTED))

    def told(self):
        case, growth, *counts = NUMBERS.unpack(self.shared[:])
        return case, growth, dict(zip(COUNTED, counts, strict=True))

    def share(self):
        return -(-self.arguments.calls // self.arguments.jobs)

    def _run(self):
        counts, told, growth = collections.Counter(), collections.Counter(), Growth(self.share())
        with open(self.log, "a", buffering=1) as log:

            def report(case, kind, what):
                key = kind, place(what)
                told[key] += 1
                if told[key] <= 3:
                    log.write(json.dumps([case, kind, what]) + "\n")

            case, before = self.next, self.counts["calls"]
            while before + counts["calls"] < self.share() and case < self.arguments.first + self.arguments.cases:
                self.tell(case, growth.bytes, counts)
                run_case(self.kinds, self.arguments.seed, case, report, counts)
                growth.look(before + counts["calls"])
                case += self.arguments.jobs
            self.tell(case, growth.bytes, counts)

    def poll(self):
        """Looks whether the process has ended or hangs; starts anew behind a case that ended it.

        Returns:
            (kind of fault, case, exit status, what it printed), or None.
        """
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        case, _, counts = self.told()
        if pid == 0:
            if case != self.seen:
                self.seen, self.since = case, time.monotonic()
            elif time.monotonic() - self.since > HANG:
                os.kill(self.pid, signal.SIGABRT)  # of which faulthandler prints where it was
            return None
        self.counts.update(counts)
        self.pid = None
        if status == 0:
            return None
        status = os.waitstatus_to_exitcode(status)
        hung = status == -signal.SIGABRT and time.monotonic() - self.since > HANG
        kind = "faults of the fuzzer" if status == OWN_FAULT else "hangs" if hung else "crashes"
        printed = self._printed()
        self.next = case + self.arguments.jobs
        self.start()
        return kind, case, status, printed

    def _printed(self):
        """What the process has printed, a sanitizer's report or the Python frames, as far as it is of interest."""
        with open(self.errors, errors="replace") as file:
            lines = file.read().splitlines()
        return "\n".join([line for line in lines if line and not line.startswith("Extension modules")][:MOST_LINES])


class Growth:
    """How much the process grew between 20 % of its calls and now."""

    def __init__(self, calls):
        self.from_calls, self.first, self.bytes, self.next = calls // 5, None, 0, 0

    def look(self, calls):
        if calls < max(self.from_calls, self.next):
            return
        self.next = calls + 500
        gc.collect()
        with open("/proc/self/status") as file:  # of anonymous memory: the pages of a library come when they are used
            size = next(int(line.split()[1]) << 10 for line in file if line.startswith("RssAnon"))
        self.first = size if self.first is None else self.first
        self.bytes = size - self.first


def warm_up():
    """Imports what steps need, so that a process that is forked after a crash does not."""
    for backend in ("native", "torch"):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        childtune_fast.ChildAdamW([param], backend=backend).step()


def run(arguments):
    start, crashes, kinds = time.monotonic(), [], cases(arguments.planted)
    warm_up()
    workers = [Worker(kinds, arguments, arguments.first + job) for job in range(arguments.jobs)]
    for worker in workers:
        worker.start()
    while any(worker.pid for worker in workers):
        time.sleep(0.02)
        for worker in workers:
            if worker.pid and (crash := worker.poll()) is not None:
                kind, case, status, printed = crash
                crashes.append(kind)
                print(f"{kind}, exit status {status}\n    {replay(arguments.seed, case)}\n{printed}", flush=True)
    counts = sum((worker.counts for worker in workers), collections.Counter(crashes))
    told = {}
    for worker in workers:
        with open(worker.log) as file:
            for case, kind, what in map(json.loads, file):
                told.setdefault((kind, place(what)), (case, what))
    for (kind, _), (case, what) in sorted(told.items()):
        if kind in FAULTS or arguments.verbose:
            print(f"{kind}: {what}\n    {replay(arguments.seed, case)}")
    growth, seconds = max(worker.told()[1] for worker in workers), time.monotonic() - start
    calls = counts["calls"]
    print(f"{calls} calls, {counts['refusals']} refusals in {seconds:.0f} s ({calls / seconds:.0f} a second)")
    print(", ".join(f"{counts[kind]} {kind}" for kind in (*FAULTS, "foreign sentences")))
    print(f"memory grew by {growth / 2**20:.1f} MB after the first fifth")
    return any(counts[kind] for kind in FAULTS)


def place(what):
    """What is told of a problem without the text of the error: what was called, and where it failed."""
    return ": ".join(what.split(": ")[:3])


def replay(seed, case):
    return f"python tests/fuzz/fuzz.py --seed {seed} --only {case}"


def run_here(arguments, numbers):
    """Runs cases in this process, and prints what is found."""
    torch.set_num_threads(2)
    counts, kinds = collections.Counter(), cases(arguments.planted)
    for number in numbers:
        run_case(kinds, arguments.seed, number, lambda *problem: print(*problem), counts)
    print(dict(counts))
    return any(counts[kind] for kind in FAULTS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=1 << 40, help="the most cases to run")
    parser.add_argument("--only", type=int, help="run this case alone, in this process")
    parser.add_argument("--until", type=int, help="run the cases up to this one, in this process")
    parser.add_argument(
        "--planted", action="store_true", help="cases with faults that must be found, not the library's"
    )
    parser.add_argument("--verbose", action="store_true", help="print foreign sentences too, each once")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="childtune-fuzz-", dir=in_memory) as folder:
        os.environ["FUZZ_FOLDER"] = folder
        if arguments.only is not None:
            return run_here(arguments, [arguments.only])
        if arguments.until is not None:
            return run_here(arguments, range(arguments.first, arguments.until + 1))
        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
