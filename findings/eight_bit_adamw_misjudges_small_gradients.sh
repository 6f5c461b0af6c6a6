#!/usr/bin/env bash
# Two libraries' 8-bit AdamW move weights of small gradients a fifteenth as far, or fifteen times as far, as AdamW does.
#
# One would assume: AdamW divides by the root of the second moment, so how far a weight moves hardly depends on how large
#   its gradients are; and codes of 8 bits blur a step by some percent. Their tests use gradients of one size, where that
#   is so.
# What happens: a block of weights shares one scale, that of its largest value. Where a weight's gradients are 3e-4 of its
#   block's largest, its second moment is 1e-7 of the largest, less than the smallest number of either code.
#   bitsandbytes rounds it up to that number, so the divisor is too large, and the weight moves 0.07 of its way in 1000
#   steps. torchao's smallest number above 0 is larger still, and it rounds to 0: eps is left as the divisor now and
#   then, and the weight moves 16 times its way. Layers in which a few inputs are large have such blocks.
# Versions: bitsandbytes 0.50.2, torchao 0.18.0, torch 2.13.0 (CPU). Seen on 2026-11-29.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip=("$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 numpy packaging 2>/dev/null
"${pip[@]}" --no-deps bitsandbytes==0.50.2 torchao==0.18.0 2>/dev/null
cat >"$folder/way.py" <<'PY'
import sys

import torch
from bitsandbytes.optim import AdamW8bit as BitsAndBytes
from torchao.optim import AdamW8bit as TorchAO

torch.set_num_threads(1)
BLOCK = 256  # of both; the first weight of each has the large gradients
scale = torch.full((64 * BLOCK,), 3e-7)
scale[::BLOCK] = 1e-3
small = scale < 1e-4


def way(optimizer_class):
    weight = torch.nn.Parameter(torch.zeros(64 * BLOCK))
    optimizer = optimizer_class([weight], lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        weight.grad = (1 + torch.randn(len(scale), generator=generator)) * scale
        optimizer.step()
    return weight.detach()[small].mean().item()


plain = way(torch.optim.AdamW)
share = {kind.__module__.partition(".")[0]: way(kind) / plain for kind in (BitsAndBytes, TorchAO)}
print(share)
sys.exit(not (share["bitsandbytes"] < 0.2 and share["torchao"] > 5))
PY
"$folder/env/bin/python" "$folder/way.py" 2>/dev/null
