"""For a Python process whose PYTHONPATH has this folder: the stand-in for the CUDA driver is its GPUs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))

if not any("jit_child.py" in word for word in sys.orig_argv):  # which builds what install() needs
    import stand_in_gpu

    stand_in_gpu.install()
