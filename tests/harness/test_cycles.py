"""benchmarks/cycles.py: which part of the machine code it counts."""

import pytest

from benchmarks.cycles import BLOCK, step_codes

LOOP = ["vmulps %ymm1,%ymm2,%ymm3", "vsqrtps %ymm3,%ymm4", "vmovaps %ymm4,(%rax)", "jne 4 <step>"]
DRAWN = "vpmuludq %ymm0,%ymm1,%ymm2"


def function(lines: list[str]) -> list[tuple[int, str]]:
    """Returns instructions of four bytes each."""
    return [(4 * i, line) for i, line in enumerate(lines)]


def test_the_innermost_loop_with_the_roots_is_taken():
    outer = function(["push %rbx", *LOOP, "add $1,%rax", "jne 0 <step>", "ret"])
    (code,) = step_codes({"void update_blocks<float, false, false, float>(...)": outer}, "float", masked=False)
    assert code.lines == LOOP
    assert code.times == BLOCK / 8


@pytest.mark.parametrize("loops", [False, True])
def test_drawing_that_is_a_function_of_its_own_is_added(loops):
    draw = function([DRAWN] * 80 + ["ret"]) if not loops else function([DRAWN] * 40 + ["jne 0 <draw>", "ret"])
    step = function(["push %rbx", *LOOP, "ret"])
    functions = {"update_blocks<float, true, false, float>(...)": step, "draw_block(MaskKeys const&)": draw}
    _, drawn = step_codes(functions, "float", masked=True)
    assert drawn.times == (2 if loops else 1)
    assert len(drawn.lines) == (41 if loops else 81)


def test_drawing_within_the_loop_is_not_added():
    step = function(["push %rbx", DRAWN, *LOOP, "ret"])
    step[-2] = (step[-2][0], "jne 4 <step>")
    functions = {"update_blocks<float, true, false, float>(...)": step, "draw_block(MaskKeys const&)": step}
    assert len(step_codes(functions, "float", masked=True)) == 1
