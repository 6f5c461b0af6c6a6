"""A small harness that fine-tunes one transformer with several optimizers and compares them fairly.

Reading order: `docstrings` (the default task), `data` (tasks in general), `model` (loading), `methods` (what is
compared), `train` (the loop they share), `report` (table and pictures). `examples/demo.py` is the command.
"""
