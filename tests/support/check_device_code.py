"""Checks what a compiler made of the CUDA kernels: python check_device_code.py PTX <what `ptxas -v` says

Prints each kernel's registers, and fails if a kernel

- keeps anything in local memory: registers that are spilled, or arrays that are indexed by what is not known;
- of the step or of scores lacks the vectors that move four elements at a time: the compiler makes them of single
  accesses, or not;
- has an operation that is not rounded as IEEE 754 says, or that could become one (docs/numerics.md).
"""

import re
import sys
from pathlib import Path

KERNEL = re.compile(r"Function properties for (\w+)")
LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
ENTRY = re.compile(r"\.entry (\w+)\((.*?)^\}", re.DOTALL | re.MULTILINE)
LOCAL_ACCESS = re.compile(r"\b(?:ld|st)\.local")
INEXACT = re.compile(r"\b(?:fma|mad)\S*\.f(?:32|64)|\S*\.(?:approx|full|ftz)\S*|\b(?:add|sub|mul)\.f(?:32|64)")


def read_log(lines):
    """Returns {kernel: registers}, {function: the three kinds of local memory} and what is neither, such as errors."""
    kernel, registers, local, other = "", {}, {}, []
    for line in lines:
        if found := KERNEL.search(line):
            kernel = found[1]
        elif found := LOCAL.search(line):
            local[kernel] = [int(number) for number in found.groups()]
        elif found := REGISTERS.search(line):
            registers[kernel] = int(found[1])
        elif not line.startswith("ptxas info"):
            other.append(line)
    return registers, local, other


def faults_of_text(name, text):
    """Yields what is wrong with the PTX of one kernel."""
    inexact = sorted(set(INEXACT.findall(text)))
    if inexact:
        yield f"{name} has {', '.join(inexact)}"
    if LOCAL_ACCESS.search(text):
        yield f"{name} uses local memory unless ptxas finds a way without"
    for (access, vector), least in vectors_of(name).items():
        count = len(re.findall(rf"\b{access}\.global\.{vector}", text))
        if count < least:
            yield f"{name} has {count} of {least} {access}.global.{vector}".replace("\\", "")


FLOATS, DOUBLES, HALVES = r"v4\.[bfu]32", r"v2\.[bf]64", r"v(?:4\.[bu]16|2\.[bu]32)"
EIGHT_BYTES = rf"(?:{HALVES}|[bu]64)"  # the newer optimizer moves four halves as one number


def vectors_of(name):
    """Returns {(ld or st, vector): how many of them a kernel must have at least}."""
    if name == "add_squares":  # a thread has two quads of scores and of gradients; four doubles are two vectors
        return {("ld", FLOATS): 4 * 2 + 2, ("ld", DOUBLES): 4, ("ld", EIGHT_BYTES): 2 * 2, ("st", FLOATS): 4 * 2}
    if not name.startswith("step_"):
        return {}
    state = DOUBLES if "float64" in name else FLOATS
    param = HALVES if "float16" in name else state
    # A lane has two quads of each array; where a child network is trained, only weights that decay outside go by quads.
    arrays = {"ld": 1, "st": 1} if "child" in name else {"ld": 2, "st": 1}
    quads, states = (1, 0) if "child" in name else (2, 3 if "amsgrad" in name else 2)
    per_array = quads * (2 if "float64" in name else 1)
    wanted = {}
    for access, params in arrays.items():
        wanted[access, param] = params * per_array
        wanted[access, state] = wanted.get((access, state), 0) + states * per_array
    return wanted


def main() -> int:
    registers, local, other = read_log(sys.stdin)
    texts = dict(ENTRY.findall(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.stderr.writelines(other)
    for name in sorted(registers):
        print(f"  {name}: {registers[name]} registers")
    faults = [
        f"{name} uses local memory: stack, spill stores and loads: {local.get(name, 'not known')}"
        for name in sorted(local.keys() | registers.keys())
        if any(local.get(name, [1]))
    ]
    faults += [fault for name, text in sorted(texts.items()) for fault in faults_of_text(name, text)]
    if not registers or registers.keys() != texts.keys():
        faults.append("the kernels of the PTX are not those that ptxas saw")
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
