"""The card of a delta on the Hub: what it is of, how its child network was chosen, and what it scores."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

_USE = """
```python
from childtune_fast.integrations.hub import from_pretrained  # pip install childtune-fast[transformers]

model = from_pretrained("USER/NAME")  # of this repository, or the folder
```
"""


def plain(values: Any) -> Any:
    """Returns a mapping or a dataclass as JSON can hold it: functions go by their names, others by their texts."""
    if is_dataclass(values) and not isinstance(values, type):
        values = asdict(values)
    return json.loads(json.dumps(values, default=lambda value: getattr(value, "__name__", str(value))))


def card(about: Mapping[str, Any]) -> ModelCard:
    """Returns the card for what `childtune.json` says, with the metadata that the Hub reads."""
    child, base = about["child_network"], about["base"]
    on_hub = None if os.path.isdir(base) else base
    data = ModelCardData(base_model=on_hub, library_name="childtune_fast", tags=["child-tuning"])
    at = f" at {about['revision']}" if about["revision"] else ""
    rows = {"base": f"{base}{at}", **{n: f"{number:,}" for n, number in child.items()}, **(about["settings"] or {})}
    tables = [_table("Child network", rows)]
    tables += [_table("Scores", about["scores"])] if about["scores"] else []
    text = (
        f"# {os.path.basename(base.rstrip('/'))}, Child-Tuned\n\n"
        "Child-Tuning (Xu, Luo et al., EMNLP 2021) trained the child network, chosen once, and what is not maskable, "
        "such as embeddings and head. This repository holds what differs from the base, bit for bit; every other "
        f"weight is the base's.\n{_USE}\n" + "\n".join(tables)
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _table(heading: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"## {heading}\n", "| | |", "|---|---|", *lines, ""])
