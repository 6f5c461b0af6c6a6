"""Counts instructions and cycles of the compiled steps for processors that need not be at hand.

    python -m benchmarks.cycles

compiles the kernels of each x86 instruction set, takes the inner loop of a step out of the machine code, and asks
llvm-mca how many cycles a processor takes for it if all data is in its first-level cache. It needs g++, objdump and
llvm-mca (Debian's packages binutils and llvm).
"""

import os
import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from childtune_fast.native import build

from .markdown import markdown

BLOCK = 128  # weights that share a draw of random numbers
MODELS = {"baseline": ("x86-64", "znver3"), "avx2": ("haswell", "znver3"), "avx512": ("icelake-server",)}
TYPES = {"float32": "float", "bfloat16": "childtune::BFloat16", "float16": "childtune::Float16"}
_ROOTS = {"xmm": 4, "ymm": 8, "zmm": 16}  # floats in a register, whose roots an instruction takes at once
_PRODUCTS = 320  # of a block: two in each of ten rounds of 16 counters
_COUNTERS = {"xmm": 2, "ymm": 4, "zmm": 8}


@dataclass(frozen=True)
class Code:
    """Machine code that is run `times` times for a block of 128 weights."""

    lines: list[str]
    times: float


def main() -> None:
    """Prints the table, as Markdown."""
    rows = []
    for name, models in MODELS.items():
        functions = disassemble(name)
        for dtype, type_name in TYPES.items():
            for masked in (True, False):
                codes = step_codes(functions, type_name, masked)
                count = sum(len(code.lines) * code.times for code in codes)
                cycles = [
                    f"{model}: {sum(mca(code.lines, model) * code.times for code in codes):.0f}" for model in models
                ]
                rows.append([name, f"{'F' if masked else 'p = 1'}, {dtype}", f"{count:.0f}", ", ".join(cycles)])
    print(markdown(["instruction set", "step", "instructions", "cycles"], rows))


def disassemble(name: str) -> dict[str, list[tuple[int, str]]]:
    """Returns {function: [(address, instruction)]} of an instruction set's kernels."""
    source = build.csrc() / "cpu" / f"isa_{name}.cpp"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernels.o")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = [*build.UNIX_FLAGS, f"-I{build.csrc()}", "-c", str(source), "-o", str(binary)]
        subprocess.run([*compiler, *flags], check=True)
        listing = subprocess.run(
            ["objdump", "-dC", "--no-show-raw-insn", binary], check=True, capture_output=True, text=True
        ).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    lines: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = functions.setdefault(heading[1], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
            lines.append((int(instruction[1], 16), instruction[2]))
    return functions


def step_codes(functions: dict[str, list[tuple[int, str]]], type_name: str, masked: bool) -> list[Code]:
    """Returns what runs for a block of 128 weights: the loop of the update, and the drawing, if that is apart."""
    wanted = f"update_blocks<{type_name}, {str(masked).lower()}, false"
    (function,) = (lines for name, lines in functions.items() if wanted in name)
    loop = max((found for found in inner_loops(function) if elements(found, "sqrtps", _ROOTS)), key=len)
    codes = [Code(loop, BLOCK / elements(loop, "sqrtps", _ROOTS))]
    if masked and not elements(loop, "pmuludq", _COUNTERS):
        (draw,) = (lines for name, lines in functions.items() if "draw_block(" in name)
        loops = inner_loops(draw)  # of some counters each, where registers do not hold all
        if loops:
            body = max(loops, key=len)
            codes.append(Code(body, _PRODUCTS / elements(body, "pmuludq", _COUNTERS)))
        else:
            codes.append(Code([text for _, text in draw], 1))
    return codes


def inner_loops(function: list[tuple[int, str]]) -> list[list[str]]:
    """Returns the instructions of each loop in which there is no other one."""
    places = {address: i for i, (address, _) in enumerate(function)}
    jumps = ((i, re.match(r"j\w+\s+([0-9a-f]+)", text)) for i, (_, text) in enumerate(function))
    spans = [(places[at], i) for i, jump in jumps if jump and (at := int(jump[1], 16)) in places and places[at] < i]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for _, text in function[begin : end + 1]] for begin, end in inner]


def elements(lines: list[str], operation: str, widths: dict[str, int]) -> int:
    """Returns how many numbers the loop's instructions of one kind compute."""
    found = (re.match(rf"v?{operation}\s.*%(.mm)", line) for line in lines)
    return sum(widths[match[1]] for match in found if match)


def mca(lines: list[str], model: str) -> float:
    """Returns the cycles that llvm-mca says one pass takes, in a long run of them."""
    plain = (re.sub(r"\s*[#<].*", "", line) for line in lines)
    text = "\n".join(line for line in plain if not re.match(r"j|call|ret|nop|data16|cs |prefetch|push|pop", line))
    passes = 100
    command = ["llvm-mca", "-mtriple=x86_64", f"-mcpu={model}", f"-iterations={passes}"]
    answer = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"Total Cycles:\s+(\d+)", answer)[1]) / passes


if __name__ == "__main__":
    main()
