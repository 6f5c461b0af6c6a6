"""The four operations (step, sum of squares, Fisher squares, select): what each computes, and who computes it.

`reference.py` specifies all four in torch. `step.py`, `squares.py` and `select.py` choose between the CPU's kernels, a
GPU's and that specification; no other folder makes that choice.
"""
