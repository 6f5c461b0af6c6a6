"""The compile step of a just-in-time build, which `toolchain.py` runs as a script in a separate process.

A separate process can be given a time limit and killed with all its compilers. It keeps torch's long output and torch's
changes of global state away from the parent. If the new binary crashes when it is first loaded, only this process ends.
"""

import json
import logging
import os
import signal
import sys
import threading


def die_with_parent() -> None:
    """Ends this process and ninja, which ends its compilers, when the parent dies and so closes the pipe."""
    os.read(0, 1)
    os.killpg(0, signal.SIGTERM)


def main() -> None:
    """Builds and loads the extension that the command line describes; a failure prints the compiler's output last."""
    job = json.loads(sys.argv[1])
    if hasattr(os, "killpg"):
        threading.Thread(target=die_with_parent, daemon=True).start()
    logging.disable(logging.WARNING)  # torch's words on a toolkit that is not used would stand in our error
    sys.path[:] = job["sys_path"]  # so that this process imports the same torch as the parent
    try:
        from torch.utils.cpp_extension import load

        load(**job["load"])
    except Exception as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
