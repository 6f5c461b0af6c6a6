"""Fails unless the installed package has a native backend that was built ahead, and that passes the self-check."""

import sys

from childtune_fast import __main__
from childtune_fast.native import load

native = load.find_native()
if native.origin != "prebuilt":
    sys.exit(f"the native backend must be prebuilt (got {native.origin or 'none'}: {'; '.join(native.notes)})")
sys.exit(__main__.main())
