#!/usr/bin/env bash
# Installing opacus makes another project's `python -m examples.demo` and `python -m benchmarks.race` fail.
#
# One would assume: a library for training with differential privacy installs the package `opacus`, and its own example
#   and benchmark scripts stay in its repository; and `python -m examples.demo`, run in a project's root, runs that
#   project's examples/demo.py, since the current folder comes first in sys.path.
# What happens: opacus's wheel has top-level packages `examples` and `benchmarks` beside `opacus`. A folder without
#   __init__.py is only a part of a namespace package, and any regular package of its name wins over it, wherever that
#   is in sys.path. So the project's examples, its benchmarks, and tests that run them say "No module named
#   examples.demo" as soon as opacus is installed beside them. An empty __init__.py in the project's folder helps.
# Versions: opacus 1.6.0. Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
mkdir -p "$folder/project/examples"
echo 'print("ran")' >"$folder/project/examples/demo.py"
cd "$folder/project"
demo() { "$folder/env/bin/python" -m examples.demo 2>&1 | tail -n 1; }
before=$(demo || true)
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps opacus==1.6.0 2>/dev/null
after=$(demo || true)
touch examples/__init__.py
mended=$(demo || true)
printf 'before opacus: %s\nwith opacus: %s\nwith __init__.py too: %s\n' "$before" "$after" "$mended"
[ "$before" = ran ] && [ "$mended" = ran ] && [[ $after == *"No module named examples.demo" ]]
