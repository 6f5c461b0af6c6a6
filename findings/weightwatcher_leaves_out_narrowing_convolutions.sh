#!/usr/bin/env bash
# weightwatcher leaves out a convolution with 1,024 eigenvalues, for having more than 15,000.
#
# One would assume: N is the longer and M the shorter side of a layer's matrices, in each kernel's place [out, in]; analyze()
#   leaves out layers whose number of eigenvalues, M times the number of places, is below min_evals=8 or above
#   max_evals=15000; and a kernel of 4x4 is treated as one of 3x3 is.
# What happens: conv2D_Wmats exchanges N and M at each place of a kernel with more inputs than outputs. It starts from
#   N = outputs, so that after an even number of places N < M, and Q = N / M < 1. Both limits are then compared with the
#   longer side, and the rank's tolerance is computed from the shorter. So Conv2d(1024, 64, 4) is left out without a word,
#   Conv2d(1024, 64, 3) is not; and Conv2d(64, 1, 2) is fitted to its 4 eigenvalues, Conv2d(64, 1, (1, 3)) left out.
# Versions: weightwatcher 0.7.7, torch 2.13.0 (CPU). Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy weightwatcher==0.7.7 2>/dev/null
cat >"$folder/convolutions.py" <<'PY'
import torch
import weightwatcher

torch.manual_seed(0)
for sizes in ((1024, 64, 3), (1024, 64, 4), (64, 16, 3), (64, 16, 4), (16, 64, 4), (64, 1, (1, 3)), (64, 1, 2)):
    model = torch.nn.Sequential(torch.nn.Conv2d(*sizes))
    rows = weightwatcher.WeightWatcher(model=model).analyze().to_dict("records")
    shown = "left out" if not rows else "N {N}, M {M}, Q {Q:.3g}, {num_evals} eigenvalues, {status}".format(**rows[0])
    print(f"Conv2d{sizes}: {shown}")
PY
found=$(CUDA_VISIBLE_DEVICES='' "$folder/env/bin/python" "$folder/convolutions.py" 2>/dev/null | grep '^Conv2d')
printf '%s\n' "$found"
[ "$found" = "Conv2d(1024, 64, 3): N 1024, M 64, Q 16, 576 eigenvalues, success
Conv2d(1024, 64, 4): left out
Conv2d(64, 16, 3): N 64, M 16, Q 4, 144 eigenvalues, success
Conv2d(64, 16, 4): N 16, M 64, Q 0.25, 256 eigenvalues, success
Conv2d(16, 64, 4): N 64, M 16, Q 4, 256 eigenvalues, success
Conv2d(64, 1, (1, 3)): left out
Conv2d(64, 1, 2): N 1, M 64, Q 0.0156, 4 eigenvalues, success" ]
