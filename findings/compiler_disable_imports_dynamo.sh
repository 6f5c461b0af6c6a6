#!/usr/bin/env bash
# Decorating a function with torch.compiler.disable imports all of torch._dynamo, at import time.
#
# One would assume: the decorator marks a function for a compiler that may never run, at the cost of an attribute; so a
#   library can put it on its optimizer's step without making its own import slower.
# What happens: torch.compiler.disable imports torch._dynamo when it is applied: hundreds of modules, and more time than
#   a small library's whole import. torch's own optimizers are decorated with the private torch._disable_dynamo, which
#   defers that import to the first call.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/decorate.py" <<'PY'
import sys
import time

import torch

before, begin = set(sys.modules), time.perf_counter()
decorator = {"public": torch.compiler.disable, "private": torch._disable_dynamo}[sys.argv[1]]


@decorator
def step():
    pass


added = set(sys.modules) - before
seconds = time.perf_counter() - begin
print(f"{sys.argv[1]}: {len(added)} modules, {seconds:.2f} s", file=sys.stderr)
print("imports" if any(name.startswith("torch._dynamo") for name in added) else "imports nothing")
PY
public=$("$folder/env/bin/python" "$folder/decorate.py" public)
private=$("$folder/env/bin/python" "$folder/decorate.py" private)
printf 'torch.compiler.disable %s of torch._dynamo; torch._disable_dynamo %s\n' "$public" "$private"
[ "$public/$private" = "imports/imports nothing" ]
