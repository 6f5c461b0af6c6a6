"""The card of a delta on the Hub: what it is of, how its child network was chosen, and what it scores."""

import html
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..arguments import check_type

_USE = """
```python
from childtune_fast.integrations.hub import from_pretrained  # pip install childtune-fast[transformers]

model = from_pretrained("USER/NAME")  # of this repository, or the folder
```
"""


def settings_of(values: Any) -> dict[str, Any]:
    """Returns settings as JSON can hold them: functions go by their names, and what else it does not know by its text.

    Raises:
        TypeError: they are no ChildTuningConfig or other dataclass, no mapping, and not None.
    """
    if is_dataclass(values) and not isinstance(values, type):
        values = asdict(values)
    check_type("save_pretrained: settings", values, (Mapping, type(None)), "a ChildTuningConfig, a mapping or None")
    return {str(name): _plain(value) for name, value in (values or {}).items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return getattr(value, "__name__", str(value))


def scores_of(values: Mapping[str, float] | None) -> dict[str, float | str]:
    """Returns scores as JSON can hold them: numbers of any library as floats, those that are not finite as texts.

    Raises:
        TypeError: they are no mapping, or one is no number.
    """
    check_type("save_pretrained: scores", values, (Mapping, type(None)), "a mapping of names to numbers, or None")
    try:
        return {str(name): _plain(float(value)) for name, value in (values or {}).items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"save_pretrained: scores must be numbers ({error})") from None


def card(about: Mapping[str, Any]) -> ModelCard:
    """Returns the card for what `childtune.json` says, with the metadata that the Hub reads."""
    base, local = about["base"], os.path.isdir(about["base"])
    name = os.path.basename(os.path.abspath(base)) if local else base  # whose folders are nobody else's business
    data = ModelCardData(base_model=None if local else base, library_name="childtune_fast", tags=["child-tuning"])
    at = f" at {about['revision']}" if about["revision"] else ""
    child = about["child_network"]
    rows = {"base": f"{name}{at}", "weights": f"{child['kept']:,} of {child['maskable']:,} maskable ones"}
    tables = [_table("Child network", {**rows, "share": f"{child['reserve_p']:.4g}"})]
    tables += [_table("Settings", about["settings"])] if about["settings"] else []
    tables += [_table("Scores", about["scores"])] if about["scores"] else []
    text = (
        f"# {os.path.basename(name)}, Child-Tuned\n\n"
        "Child-Tuning (Xu, Luo et al., EMNLP 2021) trained the child network, chosen once, and what is not maskable, "
        "such as embeddings and head. This repository holds what differs from the base, bit for bit; every other "
        f"weight is the base's.\n{_USE}\n" + "\n".join(tables)
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {heading}\n", "| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    """Returns a value as one cell of a table shows it."""
    return " ".join(html.escape(str(value), quote=False).replace("|", "\\|").split())
