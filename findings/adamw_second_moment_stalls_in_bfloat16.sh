#!/usr/bin/env bash
# AdamW's second moment in bfloat16 stops at a quarter of its limit when fused, and at half of it when not.
#
# One would assume: AdamW on bfloat16 weights is AdamW with rounded averages, so that under a constant gradient g the second
#   moment comes near g * g, within some percent, whichever implementation is chosen; fused=True is only faster.
# What happens: the average is stored in bfloat16, and beta2 = 0.999 adds a thousandth of what is missing, which is soon less
#   than half a unit in its last place. The fused step rounds once and stops at 0.25; foreach and the loop multiply and add
#   in two roundings and stop at 0.5. The denominator is its root, so later steps are two and 1.41 times as large as
#   those of float32 averages, and the two implementations differ by as much from each other.
# Versions: torch 2.13.0 (CPU). Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/look.py" <<'PY'
import torch

for options in ({"fused": True}, {"foreach": True}, {"foreach": False, "fused": False}):
    param = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([param], lr=0.0, **options)
    for _ in range(8000):
        param.grad = torch.ones_like(param)
        optimizer.step()
    print(next(iter(options)), optimizer.state[param]["exp_avg_sq"].unique().tolist())
PY
found=$(HF_HUB_OFFLINE=1 "$folder/env/bin/python" "$folder/look.py")
printf '%s\n' "$found"
[ "$found" = "fused [0.25]
foreach [0.5]
foreach [0.5]" ]
