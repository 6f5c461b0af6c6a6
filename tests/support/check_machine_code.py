"""Checks the machine code of the CUDA kernels, as nvdisasm prints it: python check_machine_code.py [--loose] CUBIN...

Fails if a kernel uses local memory, or if in a kernel of the step in float32, bfloat16 or float16

- registers are more than lets the intended number of blocks of threads share a multiprocessor;
- a loaded register is used before the last load of the same round has been issued;
- the main path has more instructions than it should.

**The main path** is what a warp executes in the usual case: the tile is whole and aligned, no number is special. It is
found in the graph of the kernel's basic blocks, as the way around a loop that passes at least the operations that the
work needs, never calls a function (special numbers go through calls), and has the fewest instructions of all such ways.
Instructions count whether or not their predicate holds, since they are issued anyway.

- A tile of 256 elements, eight a lane: the vectors of four streams read and of three written, eight square roots and
  sixteen quotients.
- A packed block of 1024 weights of which 30 % are in the child network, so 10 rounds of 32 slots: from the kernel's
  beginning to its end, the turns of the loop that lists slots (15: the most bits that 32 words of 32 are expected to
  have), and the rounds. An eighth of it is a piece of 128 weights, the unit of the bounds.

The bounds are what was counted when they were written, by nvcc 13.0 for sm_90, and else as the most by it and by NVRTC
13.5 for sm_75 to sm_120, and 3 % more.
"""

import argparse
import heapq
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

THREADS, REGISTERS = 256, 65536  # of a block of threads, of a multiprocessor
TILE = {"wide loads": 8, "wide stores": 6, "roots": 8, "quotients": 16}
TURN = {"slots listed": 1}
ROUND = {"slots read": 1, "loads": 4, "stores": 3, "roots": 1, "quotients": 2}
ROUNDS, TURNS, PIECES = 10, 15, 8  # of a packed block
# Instructions at most: {kernel: (by nvcc for sm_90, else)}.
BOUNDS = {
    "step_float32_masked": (595, 632),
    "step_bfloat16_masked": (685, 728),
    "step_float16_masked": (865, 913),
    "step_float32_child": (127, 138),
    "step_bfloat16_child": (138, 150),
    "step_float16_child": (164, 180),
}


class Instruction(NamedTuple):
    """One instruction: what it is predicated by, its name with all suffixes, and its operands."""

    predicate: str
    name: str
    operands: str

    @property
    def kind(self):
        """What the work's operations call it, or its name."""
        wide = ".128" in self.name or ".64" in self.name
        first = self.name.split(".")[0]
        if first in ("LDG", "STG"):
            return ("wide " if wide else "") + ("loads" if first == "LDG" else "stores")
        named = {"STS": "slots listed", "LDS": "slots read", "FCHK": "quotients"}
        return "roots" if self.name.startswith("MUFU.RSQ") else named.get(first, first)

    @property
    def target(self):
        """The label that it may jump to, or None. Some compilers leave a loop by a call to a label."""
        found = re.search(r"`\((\.L_\w+)\)", self.operands)
        return found[1] if found and self.name.startswith(("BRA", "CALL")) else None

    @property
    def always(self):
        """Whether nothing comes after it but its target."""
        conditional = self.predicate or ".DIV" in self.name or (self.target and not self.operands.startswith("`"))
        return not conditional

    def registers(self):
        """Returns the numbers of the registers that it names, with those that a width adds to them."""
        width = 4 if ".128" in self.name else 2 if ".64" in self.name else 1
        named = [(int(n), 2 if pair else 1) for n, pair in re.findall(r"\bR(\d+)(?:\.reuse)?(\.64)?", self.operands)]
        stored = self.name.startswith(("STG", "STS")) and named
        if stored:
            named[-1] = (named[-1][0], width)
        return {register + i for register, count in named for i in range(count)}

    def loaded(self):
        """Returns the numbers of the registers that a load from global memory fills."""
        found = re.match(r"R(\d+)", self.operands) if self.name.startswith("LDG") else None
        width = 4 if ".128" in self.name else 2 if ".64" in self.name else 1
        return {int(found[1]) + i for i in range(width)} if found else set()


class Kernel:
    """A kernel's basic blocks: `blocks[i]` is its instructions, `after[i]` the blocks that may come after them."""

    def __init__(self, lines):
        instructions, labels = read_instructions(lines)
        starts = {0} | set(labels.values())
        starts |= {n + 1 for n, one in enumerate(instructions) if one.target or ends(one)}
        bounds = sorted(start for start in starts if start < len(instructions)) + [len(instructions)]
        number = {start: i for i, start in enumerate(bounds[:-1])}
        self.blocks = [instructions[a:b] for a, b in itertools.pairwise(bounds)]
        self.after = []
        for i, block in enumerate(self.blocks):
            last, follow = block[-1], []
            if last.target in labels:
                follow.append(number[labels[last.target]])
            if not (last.always and (last.target or ends(last))) and i + 1 < len(self.blocks):
                follow.append(i + 1)
            self.after.append(follow)

    def loops(self):
        """Yields (first block, all blocks) of what jumps back enclose."""
        before = [[] for _ in self.blocks]
        for i, follow in enumerate(self.after):
            for to in follow:
                before[to].append(i)
        for last, follow in enumerate(self.after):
            for head in (to for to in follow if to <= last):
                body, left = {head}, [last]
                while left:
                    block = left.pop()
                    left += before[block] if block not in body else []
                    body.add(block)
                yield head, body

    def shortest(self, work, start, within, *, loop):
        """Returns the instructions of the shortest way that passes the work's operations.

        Args:
            work: {kind of operation: how many of it, at least}.
            start: block to begin with.
            within: the blocks that it may pass.
            loop: whether the way ends where it began, and not where the kernel ends.

        Returns:
            The instructions in order, or None if there is no such way.
        """
        kinds = list(work)
        gain = [[sum(one.kind == kind for one in block) for kind in kinds] for block in self.blocks]
        nothing = (0,) * len(kinds)
        best, came, queue = {(start, nothing): 0}, {}, [(0, start, nothing)]
        while queue:
            length, at, done = heapq.heappop(queue)
            if length > best[at, done]:
                continue
            now = tuple(min(d + g, work[k]) for d, g, k in zip(done, gain[at], kinds, strict=True))
            all_done = now == tuple(work.values())
            ending = any(to == start for to in self.after[at]) if loop else self.blocks[at][-1].name == "EXIT"
            if all_done and ending:
                return self.way(came, (at, done))
            for to in within.intersection(self.after[at]):
                state, total = (to, now), length + len(self.blocks[at])
                if total < best.get(state, sys.maxsize) and not (loop and to == start):
                    best[state], came[state] = total, (at, done)
                    heapq.heappush(queue, (total, *state))
        return None

    def way(self, came, state):
        """Returns the instructions on the way to a state, and those of its block."""
        blocks = [state[0]]
        while state in came:
            state = came[state]
            blocks.append(state[0])
        return [one for block in reversed(blocks) for one in self.blocks[block]]

    def around(self, work):
        """Returns the instructions of the shortest way around a loop that passes the work's operations."""
        ways = []
        for head, body in self.loops():
            kinds = [one.kind for block in body for one in self.blocks[block]]
            if all(kinds.count(kind) >= least for kind, least in work.items()):
                ways.append(self.shortest(work, head, body, loop=True))
        return min(filter(None, ways), key=len, default=None)


def ends(one):
    """Returns whether an instruction ends what comes before it: nothing follows, unless it is predicated."""
    return one.name.split(".")[0] in ("EXIT", "RET", "CALL", "BRX", "JMP")


def read_instructions(lines):
    """Returns a function's instructions, and {label: number of the instruction after it}."""
    instructions, labels = [], {}
    for line in lines:
        if found := re.match(r"(\.L_\w+):", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    return instructions, labels


def kernels_of(text):
    """Returns {kernel: Kernel} of what nvdisasm prints."""
    parts = re.split(r"^\.text\.(\w+):\n", text, flags=re.MULTILINE)
    return {name: Kernel(code.splitlines()) for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def used_early(way):
    """Returns a loaded register that is used, and so waited for, before the way's last load is issued; or None."""
    last = max(n for n, one in enumerate(way) if one.loaded())
    loaded = set()
    for one in way[:last]:
        if early := loaded & one.registers():
            return f"R{min(early)} in {one.name} {one.operands}"
        loaded |= one.loaded()
    return None


def main_paths(name, kernel):
    """Returns what a loop does at a time, as instructions, and the instructions of the unit of BOUNDS; None without."""
    if "child" not in name:
        way = kernel.around(TILE)
        return way, way and len(way)
    amsgrad = "amsgrad" in name
    rounds, way = 2, None  # of a turn, as kSlotRounds in cuda/child_kernel.h
    work = {kind: rounds * (n + (amsgrad if kind in ("loads", "stores") else 0)) for kind, n in ROUND.items()}
    way, turn = kernel.around(work), kernel.around(TURN)
    whole = kernel.shortest({**work, **TURN}, 0, set(range(len(kernel.blocks))), loop=False)
    if not (way and turn and whole):
        return None, None
    return way, (len(whole) + (TURNS - 1) * len(turn) + (ROUNDS / rounds - 1) * len(way)) / PIECES


def blocks_wanted(name):
    """Returns how many blocks of threads must fit into a multiprocessor."""
    return 3 if "amsgrad" in name or "rounded" in name else 4


def faults_of_kernel(name, kernel, registers, column):
    """Yields what is wrong with a kernel, and prints its main path's instructions."""
    blocks = REGISTERS // (THREADS * -(-registers // 8) * 8)
    if blocks < blocks_wanted(name):
        yield f"{name}: {blocks} blocks of {blocks_wanted(name)}, {registers} registers"
    if not re.search("(masked|child)(_amsgrad)?_large", name):  # smaller tables have the same code
        return
    kind = name.removesuffix("_large")
    way, count = main_paths(name, kernel)
    if way is None:
        yield f"{name}: there is no main path"
        return
    if early := used_early(way):
        yield f"{name}: a load is waited for before the last one is issued: {early}"
    if kind in BOUNDS:
        print(f"  {name}: {count:.0f} instructions")
        if count > BOUNDS[kind][column]:
            yield f"{name}: {count:.0f} instructions of {BOUNDS[kind][column]}"


def tool(name):
    """Returns the path of one of CUDA's binary tools, from its wheel or the PATH, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(at) / "cu13" / "bin" for at in spec.submodule_search_locations] if spec else []
    return next(filter(None, (shutil.which(name, path=at) for at in [*folders, None])), None)


def output_of(name, *arguments):
    """Returns what one of CUDA's binary tools prints."""
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


def faults(cubin, column):
    """Yields what is wrong with the kernels of a cubin."""
    text = output_of("nvdisasm", "-c", cubin)
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", output_of("cuobjdump", "--dump-resource-usage", cubin)
    )
    registers = {name: int(number) for name, number, _ in usage}
    yield from (f"{name}: {stack} bytes of stack" for name, _, stack in usage if stack != "0")
    checked = {name: kernel for name, kernel in kernels_of(text).items() if re.match("step_b?float(16|32)", name)}
    if not checked or not checked.keys() <= registers.keys():
        yield f"{cubin}: no kernels, or not their registers"
    for name, kernel in checked.items():
        yield from faults_of_kernel(name, kernel, registers.get(name, 0), column)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--loose", action="store_true", help="the bounds of other architectures than sm_90, and NVRTC")
    parser.add_argument("cubins", nargs="+")
    arguments = parser.parse_args()
    if not (tool("nvdisasm") and tool("cuobjdump")):
        print("machine code is not checked: needs nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump")
        return 0
    found = [fault for cubin in arguments.cubins for fault in faults(cubin, int(arguments.loose))]
    for fault in found:
        print(f"FAILED: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
