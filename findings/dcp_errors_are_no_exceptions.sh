#!/usr/bin/env bash
# What torch.distributed.checkpoint raises is no Exception.
#
# One would assume: a checkpoint that is missing or does not fit raises some Exception, so that
#   `try: dcp.load(...) except Exception: begin_anew()` starts a run that has nothing to resume from.
# What happens: errors that any rank meets while it plans or reads are wrapped in a CheckpointException, which derives
#   from BaseException, like KeyboardInterrupt: the handler is passed by and the process ends. This is so on one process
#   without a process group, too, and for a folder that does not exist.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/load.py" <<'PY'
import sys
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.simplefilter("ignore")
dcp.save({"weight": torch.zeros(3)}, checkpoint_id=sys.argv[1] + "/saved")
for folder, size in (("saved", 4), ("missing", 3)):
    try:
        dcp.load({"weight": torch.zeros(size)}, checkpoint_id=sys.argv[1] + "/" + folder)
        print(folder, "loaded")
    except Exception as error:
        print(folder, "Exception", type(error).__name__)
    except BaseException as error:
        print(folder, "no Exception", type(error).__name__)
PY
raised=$("$folder/env/bin/python" "$folder/load.py" "$folder" 2>/dev/null | paste -sd';')
printf '%s\n' "$raised"
[ "$raised" = "saved no Exception CheckpointException;missing no Exception CheckpointException" ]
