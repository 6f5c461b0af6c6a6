"""The stand-in for the CUDA driver with faults seeded into the kernels, one of which may be on at a time."""

import shutil
import subprocess

from childtune_fast.native import build

STEP, CHILD, MASKED = "step of all weights", "step of a child network", "step of a random mask"
# What is wrong: the file, the right expression, the wrong one, and the kernel of a case that must fail. Where an
# expression cannot tell whether the fault is on, the wrong one does by ON.
FAULTS = {
    "lanes take the masks of their neighbours": (
        "cpp/emulated_gpu.h",
        "drawn[kWarp / 2 * half + 4 * (lane % 4) + i]",
        "drawn[(kWarp / 2 * half + 4 * (lane % 4) + i + 4) % kWarp]",
        MASKED,
    ),
    "the tail of a tensor is lost": (
        "cuda/step_kernel.h",
        "there < 4 ? (there > 0 ? static_cast<int>(there) : 0) : 4",
        "there < 4 ? 0 : 4",
        STEP,
    ),
    "a __syncwarp is dropped, so that slots are updated before all are listed": (
        "cpp/emulated_gpu.h",
        "      before += count_ones(step.word(lane));\n",
        "      before += count_ones(step.word(lane));\n      if (ON) step.update(lane, before, places);\n",
        CHILD,
    ),
    "the rank of a lane's first slot is off by one": (
        "cuda/child_kernel.h",
        "before + count_ones(word)",
        "before + count_ones(word) - (before > 0)",
        CHILD,
    ),
    "a product and a sum are contracted": (
        "core/adamw.h",
        "c.beta1 * exp_avg + c.one_minus_beta1 * g;",
        "std::fma(c.beta1, exp_avg, c.one_minus_beta1 * g);",
        STEP,
    ),
    "a lane does not vote": (
        "cpp/emulated_gpu.h",
        "for (int lane = 0; lane < kWarp; ++lane) votes |=",
        "for (int lane = 0; lane < kWarp - (ON); ++lane) votes |=",
        "selection",
    ),
    "a tie too many is taken": (
        "cuda/select_kernel.h",
        "count_ones(ties & ((1u << lane) - 1)) < left",
        "count_ones(ties & ((1u << lane) - 1)) <= left",
        "selection",
    ),
    "half of a warp is left out of the norm": (
        "cpp/emulated_gpu.h",
        "for (int half = kWarp / 2; half >= 1; half /= 2) {",
        "for (int half = kWarp / ((ON) ? 4 : 2); half >= 1; half /= 2) {",
        "squares",
    ),
    "an infinite gradient does not count": (
        "cuda/squares_kernel.h",
        "seen >> (8 * sizeof(seen) - 1) != 0",
        "false",
        "squares",
    ),
    "a step that GradScaler skips is taken": (
        "cuda/step_table.h",
        "header.found_inf != nullptr && *header.found_inf != 0.0f",
        "false",
        STEP,
    ),
    "counters stop at 32 bits": ("core/mask.h", "static_cast<uint32_t>(number >> 32)", "0u", MASKED),
    "large tables end after 256 tensors": (
        "cuda/launch.h",
        "int low = 0, high = n;",
        "int low = 0, high = (ON) && n > 256 ? 256 : n;",
        STEP,
    ),
    "weights that never had a gradient do not decay": (
        "core/adamw.h",
        "(param * c.decay_before - c.step_size * exp_avg) * c.decay_after;",
        "param;",
        STEP,
    ),
    "large tables ignore the steps that the GPU counts": (
        "cuda/step_table.h",
        "header.constants == nullptr",
        "header.constants == nullptr || header.items > 64",
        STEP,
    ),
    "a NaN keeps its sign": (
        "core/dtypes.h",
        "(bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded",
        "rounded",
        STEP,
    ),
    "the maximum is not kept": (
        "core/adamw.h",
        "exp_avg_sq <= max_exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;",
        "exp_avg_sq;",
        STEP,
    ),
    "groups have the constants of the first": (
        "cuda/step_kernel.h",
        "table.classes[item.step_class]",
        "table.classes[0]",
        STEP,
    ),
    "the last of a lane's values does not count in a block's scale": (
        "cuda/rounded_state.h",
        "(exist >> i & 1) != 0 && magnitude > most.of[a]",
        "(exist >> i & 2) != 0 && magnitude > most.of[a]",
        STEP,
    ),
    "codes of a block are made before all lanes know its scale": (
        "cpp/emulated_gpu.h",
        "tile.store(lane, half, most, words, quads[lane]);",
        "tile.store(lane, half, (ON) ? tile.most(lane, half, quads[lane]) : most, words, quads[lane]);",
        STEP,
    ),
    "both mask blocks of a tile are rounded by the words of the first": (
        "cpp/emulated_gpu.h",
        "tile.draw_words(kWarp / 2 * half)",
        "tile.draw_words(0)",
        MASKED,
    ),
    "slots are rounded by their places in the packed block": (
        "cuda/rounded_child_kernel.h",
        "static_cast<uint32_t>(place % kMaskBlock)",
        "static_cast<uint32_t>(place / kMaskBlock)",
        CHILD,
    ),
    "a shard is rounded as if it began the parameter": (
        "cuda/rounded_kernel.h",
        "item.first_mask_block + static_cast<uint64_t>(block_of(0));",
        "static_cast<uint64_t>(block_of(0));",
        STEP,
    ),
}


def build_driver(folder):
    """Makes a libcuda.so.1 in a folder; its function standin_set_fault(n) turns fault number n on, and 0 none."""
    sources = folder / "sources"
    for part in ("core", "cuda"):
        shutil.copytree(build.csrc() / part, sources / "csrc" / part)
    for part in ("cpp", "standin"):
        shutil.copytree(build.csrc().parent / "tests" / part, sources / "tests" / part)
    for number, (name, right, wrong, _) in enumerate(FAULTS.values(), 1):
        path = sources / ("tests" if name.startswith("cpp/") else "csrc") / name
        text, on = path.read_text(), f"(childtune_fault == {number})"
        assert text.count(right) == 1, f"{name} has {text.count(right)} times: {right}"
        end = right[-1] if right[-1] in ";\n" else ""
        either = f"({on} ? ({wrong.removesuffix(end)}) : ({right.removesuffix(end)})){end}"
        path.write_text(text.replace(right, wrong.replace("ON", on) if "(ON)" in wrong else either))
    emulated = sources / "tests/cpp/emulated_gpu.h"  # what a fault leaves unlisted must be a place all the same
    emulated.write_text(emulated.read_text().replace("    int slots = 0;\n", "    int slots = 0;\n    places = {};\n"))
    compiler = sources / "csrc/core/compiler.h"
    compiler.write_text(
        compiler.read_text().replace("namespace childtune {", "extern int childtune_fault;\nnamespace childtune {")
    )
    driver = sources / "tests/standin/libcuda.cpp"
    driver.write_text(
        driver.read_text() + "int childtune_fault = 0;\n"
        'extern "C" void standin_set_fault(int number) { childtune_fault = number; }\n'
    )
    files = [driver, sources / "csrc/cuda/launch_plan.cpp", sources / "csrc/cuda/score_plan.cpp"]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", f"-I{sources / 'csrc'}"]
    subprocess.run(["c++", *flags, *map(str, files), "-o", str(folder / "libcuda.so.1")], check=True)
    return folder
