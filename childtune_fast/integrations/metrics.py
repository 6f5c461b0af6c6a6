"""What a training loop can log of Child-Tuning: numbers by name, for any logger."""

from ..child import ChildNetwork

PREFIX = "child"


def metrics_of_choice(child: ChildNetwork, before: ChildNetwork | None = None) -> dict[str, float]:
    """Returns the numbers of a choice of a child network, {name: value}.

    Args:
        child: the child network that was chosen.
        before: the one in whose place it comes; None if it is the first (default: None).

    Returns:
        `child/weights`, how many maskable weights are in it; `child/density`, their share of all maskable weights;
        `child/density/LAYER`, the same of each layer by its name; and with `before` `child/overlap`, the share of the
        smaller child network's weights that are in both.
    """
    summary = child.summary()
    found = {f"{PREFIX}/weights": float(summary.total.count), f"{PREFIX}/density": summary.total.density}
    found |= {f"{PREFIX}/density/{row.name or 'outside of layers'}": row.density for row in summary.layers}
    return found if before is None else {**found, f"{PREFIX}/overlap": child.overlap(before)}
