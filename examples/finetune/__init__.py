"""A small harness that fine-tunes one transformer with several optimizers and compares them fairly.

Reading order: `docstrings` (the default task), `data` (tasks in general), `model` (loading), `train` (methods and the
loop they share), `report` (table and picture). `examples/demo.py` is the command.
"""
