"""The four operations (step, sum of squares, Fisher squares, select): what each computes, and who computes it.

`reference.py` specifies all four in torch, and `foreach.py` is the step in few operations. `step.py`, `squares.py` and
`select.py` choose between the CPU's kernels, a GPU's and torch; no other folder makes that choice.
"""
