"""The pictures of a sweep's report: scores, differences to AdamW, learning curves, and where child networks lie."""

import math
from statistics import mean

from . import runs
from .compare import BASELINE, by_task, difference_to
from .methods import METHODS
from .report import COLOURS, colour, pyplot


def pictures(records, folder):
    """Draws a folder's pictures.

    scores.png and curves.png are of methods that are no variant of another, differences.png is of those among them that
    are paired with AdamW's, density.png is of child networks, shares.png of F and D with several p, and frozen.png of
    tasks on which a head was also trained too slowly.
    """
    reported = by_task(records, "report")
    main = {task: found for task, methods in reported.items() if (found := _of_main(methods))}
    if main:
        _scores_picture(main, folder / "scores.png")
        _curves_picture(main, folder / "curves.png")
    parts = [
        ("differences.png", _differences_picture, lambda methods: len(_differences(methods)) > 0),
        ("density.png", _density_picture, lambda methods: "d" in methods),
        ("shares.png", _shares_picture, lambda methods: any(len(of) > 1 for of in _shares(methods).values())),
        ("frozen.png", _frozen_picture, lambda methods: "frozen-slow" in methods),
    ]
    for name, draw, is_wanted in parts:
        wanted = {task: methods for task, methods in reported.items() if is_wanted(methods)}
        if wanted:
            draw(wanted, folder / name)


MAIN = [name for name, method in METHODS.items() if not (method.partner or method.settings)]
WIDEST = 8  # points that the picture of differences shows; what is beyond is written there


def _of_main(methods):
    return {name: group for name, group in methods.items() if name in MAIN}


def _panels(tasks, **size):
    plt = pyplot()
    figure, axes = plt.subplots(1, len(tasks), squeeze=False, layout="constrained", **size)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.set_title(task, fontsize=11)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _save(figure, path):
    figure.savefig(path, dpi=150)
    pyplot().close(figure)


def _scores_picture(reported, path):
    figure, axes = _panels(reported, figsize=(5 * len(reported), 4))
    for axis, methods in zip(axes, reported.values(), strict=True):
        scores = [[100 * runs.score(record) for record in group] for group in methods.values()]
        boxes = axis.boxplot(scores, orientation="horizontal", patch_artist=True, medianprops={"color": "black"})
        for box, method in zip(boxes["boxes"], methods, strict=True):
            box.set_facecolor(colour(method))
        for place, values in enumerate(scores, start=1):
            axis.plot(values, [place] * len(values), "k.", ms=4)
        axis.set_yticks(range(1, len(methods) + 1), methods)
        axis.invert_yaxis()
        axis.set_xlabel(f"dev {_metric(methods)}, times 100")
    _save(figure, path)


def _curves_picture(reported, path):
    figure, axes = _panels(reported, figsize=(5 * len(reported), 4))
    for axis, methods in zip(axes, reported.values(), strict=True):
        for method, group in methods.items():
            metric = next(iter(group[0]["curve"][-1][1]))
            steps = [step for step, _ in group[0]["curve"]]
            means = [100 * mean(r["curve"][i][1][metric] for r in group) for i in range(len(steps))]
            axis.plot(steps, means, color=colour(method), marker="o", ms=3, label=method)
            axis.set(xlabel="training step", ylabel=f"dev {metric}, times 100, mean over seeds")
    axes[0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _density_picture(reported, path):
    figure, axes = _panels(reported, figsize=(4 * len(reported), 3.5))
    for axis, methods in zip(axes, reported.values(), strict=True):
        kept, sizes = {}, {}
        for record in methods["d"]:
            for layer, _, count, numel in record["density"]:
                kept[layer] = kept.get(layer, 0) + count
                sizes[layer] = sizes.get(layer, 0) + numel
        layers = [layer.rpartition(".")[2] or "outside" for layer in kept]
        axis.bar(layers, [100 * kept[layer] / sizes[layer] for layer in kept], color=COLOURS["d"])
        axis.set(xlabel="layer", ylabel="weights in the child network of d, %")
    _save(figure, path)


def _differences(methods):
    """Returns {method: its `Difference` to AdamW}, of methods that are no variant of another."""
    baseline = methods.get(BASELINE, [])
    found = {name: difference_to(baseline, group) for name, group in _of_main(methods).items() if name != BASELINE}
    return {name: paired for name, paired in found.items() if paired}


def _differences_picture(reported, path):
    found = {task: _differences(methods) for task, methods in reported.items()}
    names = [name for name in METHODS if any(name in of for of in found.values())]
    figure, axes = _panels(found, figsize=(4.2 * len(found), 1.2 + 0.32 * len(names)), sharey=True)
    for axis, (task, of) in zip(axes, found.items(), strict=True):
        for place, name in enumerate(names):
            if name in of:
                middle, low, high, seeds = of[name]
                if abs(middle) > WIDEST:
                    at, to = (-WIDEST, "left") if middle < 0 else (WIDEST, "right")
                    axis.text(at, place, f" {middle:+.1f} ", ha=to, va="center", color=colour(name), weight="bold")
                else:
                    axis.plot([low, high], [place, place], color=colour(name), lw=2.5, solid_capstyle="butt")
                    axis.plot([middle], [place], "o", color=colour(name), ms=6)
                where = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 8, "color": "#555555"}
                axis.text(1.01, place, f"{seeds} seeds", **where)
        axis.axvline(0, color="black", lw=1)
        axis.set(xlim=(-WIDEST, WIDEST), xlabel=f"dev {_metric(reported[task])} x 100, difference to AdamW")
    axes[0].set_yticks(range(len(names)), [METHODS[name].title for name in names])
    axes[0].invert_yaxis()
    _save(figure, path)


def _shares(methods):
    """Returns {"f" or "d": [(p, `Difference` to AdamW)]} of each p that has two seeds, over those that all p have."""
    keys = {"f": "reserve_p", "d": "reserve_p_d"}
    of = {name: group for name, group in methods.items() if name.partition("-p")[0] in keys and len(group) > 1}
    seeds = [{record["seed"] for record in group} for group in of.values()]
    baseline = [record for record in methods.get(BASELINE, []) if all(record["seed"] in one for one in seeds)]
    found = {}
    for method, group in of.items():
        name = method.partition("-p")[0]
        settings = dict(map(tuple, group[0]["spec"]["settings"])) | METHODS[method].settings
        paired = difference_to(baseline, group)
        if paired:
            found.setdefault(name, []).append((settings[keys[name]], paired))
    return {name: sorted(by_share) for name, by_share in found.items()}


def _shares_picture(reported, path):
    figure, axes = _panels(reported, figsize=(5 * len(reported), 4))
    for axis, methods in zip(axes, reported.values(), strict=True):
        for name, of in _shares(methods).items():
            middles = [paired.mean for _, paired in of]
            halves = [paired.high - paired.mean for _, paired in of]
            look = {"color": colour(name), "capsize": 3, "label": f"{METHODS[name].title}, {of[0][1].seeds} seeds"}
            axis.errorbar([p for p, _ in of], middles, halves, fmt="o-", **look)
        axis.axhline(0, color="black", lw=1)
        axis.set(xlabel="p, the share that is trained", ylabel=f"dev {_metric(methods)} x 100, difference to AdamW")
        axis.legend(frameon=False)
    _save(figure, path)


def _metric(methods):
    return next(iter(next(iter(methods.values()))[0]["curve"][-1][1]))


def _frozen_picture(reported, path):
    """Draws the main score and both losses against epochs, a line a method, for each task in a row of its own."""
    plt = pyplot()
    size = (11, 4.7 * len(reported))
    figure, axes = plt.subplots(len(reported), 2, figsize=size, squeeze=False, layout="constrained")
    for (left, right), (task, methods) in zip(axes, reported.items(), strict=True):
        for name, group in methods.items():
            epoch = math.ceil(group[0]["data"]["train"] / dict(map(tuple, group[0]["spec"]["settings"]))["batch_size"])
            epochs = [step / epoch for step, _ in group[0]["curve"]]
            scores = [100 * mean(next(iter(r["curve"][i][1].values())) for r in group) for i in range(len(epochs))]
            look = {"color": colour(name), "lw": 1.8}
            left.plot(
                epochs,
                scores,
                label=f"{METHODS[name].title}, lr {group[0]['lr']:.2g}: at the end {scores[-1]:.1f}",
                **look,
            )
            known = all("losses" in record for record in group)  # older runs have none
            for column, style in ((1, "--"), (2, "-")) if known else ():
                right.plot(
                    epochs, [mean(r["losses"][i][column] for r in group) for i in range(len(epochs))], style, **look
                )
        left.set(title=task, ylabel=f"dev {_metric(methods)}, times 100")
        right.set(title="loss: dev, and dashed in training", ylabel="loss")
        left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))  # below
    for axis in axes.flat:
        axis.set(xscale="log", xlabel="epochs")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
