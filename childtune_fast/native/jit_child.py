"""The compile step of a just-in-time build, run by `jit.py` as a script in a process of its own.

A process of its own because it can be given a time limit and killed with all its compilers, keeps torch's long output
and its changes of state to itself, and is the one to die if the new binary crashes when it is first loaded.
"""

import json
import os
import signal
import sys
import threading


def die_with_parent() -> None:
    """Waits on the pipe that only the parent holds open, then ends this process and ninja, which ends its compilers."""
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)


def main() -> None:
    """Builds and loads what the command line describes; on failure the output ends with the compiler's."""
    job = json.loads(sys.argv[1])
    if hasattr(os, "killpg"):
        threading.Thread(target=die_with_parent, daemon=True).start()
    sys.path[:] = job["sys_path"]  # the parent's torch, wherever it found it
    try:
        from torch.utils.cpp_extension import load

        load(**job["load"])
    except Exception as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
