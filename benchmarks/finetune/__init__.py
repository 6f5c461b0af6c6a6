"""A harness that fine-tunes one transformer with several methods and compares them fairly; README.md says how.

Reading order: `docstrings` (the default task), `definitions` (two more), `sources` (others), `data` (tasks in general),
`metrics`, `model` (loading), `methods` (what is compared), `train` (the loop they share), `report` (the demo's table
and pictures); then `sweep`, `runs`, `worker`, `transfer`, `compare` and `pictures`, which make an experiment of it.
`__main__` is the command.
"""
