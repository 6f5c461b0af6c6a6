#!/usr/bin/env bash
# Importing weightwatcher silences the warnings of all code in the process, and sets up its logging.
#
# One would assume: the import changes nothing outside of the package; if it hides the warnings of its own fits, it does so
#   while it fits.
# What happens: WW_powerlaw.py calls warnings.simplefilter("ignore") unless the interpreter was started with -W or
#   PYTHONWARNINGS, so no warning of any module is shown from then on, such as a deprecation in the caller's own code.
#   weightwatcher.py calls logging.basicConfig(level=INFO). In a program that has not set up its logging yet, the INFO
#   messages of all libraries go to stderr, and the program's own basicConfig, later on, does nothing.
# Versions: weightwatcher 0.7.7. Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONWARNINGS
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check weightwatcher==0.7.7 2>/dev/null
cat >"$folder/program.py" <<'PY'
import logging
import sys
import warnings

if sys.argv[1] == "with":
    import weightwatcher  # noqa: F401

warnings.warn("a warning of the program", UserWarning)
logging.getLogger("library").info("a detail of a library")
logging.basicConfig(level=logging.ERROR, format="%(levelname)s")
logging.getLogger("library").warning("a message that the program does not ask for")
PY
found=$(for import in without with; do
  "$folder/env/bin/python" "$folder/program.py" "$import" 2>&1 |
    grep -oE 'a (warning of the program|detail of a library|message that the program does not ask for)$|UserWarning' |
    sort -u | paste -sd, | sed "s/^/$import: /"
done)
printf 'what is shown, without the import and with it\n%s\n' "$found"
[ "$found" = "without: UserWarning,a warning of the program
with: a detail of a library,a message that the program does not ask for" ]
