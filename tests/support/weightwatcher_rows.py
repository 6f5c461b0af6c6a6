"""Prints what weightwatcher tells of the models of the tests, as JSON in its last line.

It is run in a process of its own: the import of weightwatcher silences all warnings and sets up the root logger.
"""

import json

import weightwatcher
from spectra_models import MODELS, checksum

if __name__ == "__main__":
    found = {}
    for name, make in MODELS.items():
        model = make()
        details = weightwatcher.WeightWatcher(model=model).analyze()
        found[name] = {"checksum": checksum(model), "rows": details.to_dict("records")}
    print(json.dumps(found))
