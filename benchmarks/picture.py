"""Draws the picture of a result: each contestant's time for a step on BERT-base, with the roof as a line."""

from pathlib import Path

from .contestants import TITLES
from .readings import Results

# Colours that colour-blind readers can tell apart (Okabe and Ito).
OURS, TORCH, DEEPSPEED, NAIVE, ROOF = "#D55E00", "#0072B2", "#009E73", "#7f7f7f", "#000000"
COLOURS = {
    "ours": OURS,
    "ours_p1": OURS,
    "fused": TORCH,
    "deepspeed": DEEPSPEED,
    "foreach": TORCH,
    "forloop": TORCH,
    "naive": NAIVE,
}
SCALE = 2.2  # the axis ends at this multiple of the longest bar of ours and torch's fused step; longer bars are cut


def draw(results: Results, machine: str, path: Path) -> Path | None:
    """Draws one panel for each dtype and number of threads that were measured.

    Args:
        results: results of the benchmarks.
        machine: name of the machine, for the title.
        path: file of the picture.

    Returns:
        `path`, or None if nothing that the picture shows was measured.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = list(_panels(results))
    if not panels:
        return None
    rows = (len(panels) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 0.7 + 2.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, times) in zip(axes.flat, panels, strict=False):
        _panel(axis, title, times)
    for axis in axes.flat[1::2]:
        axis.set_yticklabels([])
    figure.suptitle(f"Time of an optimizer step, BERT-base, ns per weight ({machine})", fontsize=12, weight="bold")
    figure.supxlabel(
        "dashed: a loop that only reads and writes the bytes of our step; broken bars: beyond the scale", fontsize=9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _panels(results: Results):
    """Yields the title of each panel and {contestant: median and quartiles of ns per weight}."""
    for title, step in results.steps("bert-base").items():
        times = {
            name: {key: spread[key] / step["weights"] for key in ("q1", "median", "q3")}
            for name, spread in step["times_ns"].items()
        }
        dtype, _, threads = title.partition(", ")
        yield title if dtype == "float32" else f"{dtype}, our state float32, torch's {dtype}, {threads}", times


def _panel(axis, title: str, times: dict[str, dict[str, float]]) -> None:
    names = [name for name in COLOURS if name in times]
    end = SCALE * max(times[name]["median"] for name in ("ours", "ours_p1", "fused"))
    for y, name in enumerate(names):
        median, q1, q3 = (times[name][key] for key in ("median", "q1", "q3"))
        axis.barh(y, median, color=COLOURS[name], height=0.72, alpha=0.55 if name == "ours_p1" else 1.0)
        if median > 0.9 * end:  # the bar is longer than the panel, so it is marked as broken
            for at in (0.955, 0.967):
                axis.plot([(at - 0.008) * end, (at + 0.008) * end], [y + 0.45, y - 0.45], color="white", linewidth=2)
            axis.text(0.93 * end, y, f"{median:.1f}", va="center", ha="right", color="white", fontsize=9, weight="bold")
            continue
        axis.plot([q1, q3], [y, y], color="black", linewidth=1.2, alpha=0.7)
        axis.text(max(median, q3) + 0.012 * end, y, f"{median:.2f}", va="center", fontsize=9)
    roof = times["roof"]["median"]
    axis.axvline(roof, color=ROOF, linestyle="--", linewidth=1.1)
    axis.text(roof + 0.012 * end, len(names) - 0.38, f"reading and writing alone: {roof:.2f}", fontsize=8)
    axis.set_xlim(0, end)
    axis.set_ylim(len(names) - 0.1, -0.6)
    axis.set_yticks(range(len(names)), [TITLES[name] for name in names], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
