"""Searches for delta and child files that are neither refused nor make the right model; it ends at the first one.

    python tests/fuzz/fuzz_files.py [libFuzzer's options, such as -max_total_time=600]

With atheris installed, which is none of the project's requirements, the search is guided by the lines of
childtune_fast/child/ and its neighbours that a file reaches. Without it, mutations are drawn from a seeded generator:

    python tests/fuzz/fuzz_files.py [seconds [seed]]
"""

import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import atheris
except ImportError:
    atheris = None

import torch  # noqa: F401, E402  not among what is instrumented

if atheris is None:
    import mutated_files
else:
    with atheris.instrument_imports(include=["childtune_fast.child", "childtune_fast.ops.tensor_parts", "json"]):
        import mutated_files

CHECKS = (mutated_files.check_contents, mutated_files.check_bytes)


def guided(folder):
    """Lets libFuzzer choose."""
    files = mutated_files.Files(folder)

    def check(data):
        choices = atheris.FuzzedDataProvider(data)
        pick = lambda n: choices.ConsumeIntInRange(0, n - 1)  # noqa: E731
        mutated_files.one_of(pick, CHECKS)(files, pick)

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


def at_random(folder, seconds=60, seed=0):
    """Prints how many files were refused, and how many made the right model."""
    files, choices, end = mutated_files.Files(folder), random.Random(int(seed)), time.monotonic() + float(seconds)
    found = Counter()
    while time.monotonic() < end:
        check = choices.choice(CHECKS)
        found[check.__name__, "refused" if check(files, choices.randrange) else "right"] += 1
    for key, count in sorted(found.items()):
        print(*key, count)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        if atheris is None:
            at_random(Path(temporary), *sys.argv[1:])
        else:
            guided(Path(temporary))
