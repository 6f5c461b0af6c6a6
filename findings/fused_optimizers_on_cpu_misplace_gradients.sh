#!/usr/bin/env bash
# On a CPU, torch's fused optimizers give the elements of a gradient to other weights if it is laid out unlike its parameter.
#
# One would assume: fused=True takes the steps of fused=False, or raises, as is reported of GPUs (pytorch/pytorch#110758).
# What happens: the kernel walks through the memory of weight, gradient and averages side by side, whatever their strides. The
#   backward pass gives `param.grad` its parameter's layout, so that most never meet it; torch.autograd.grad does not: of an einsum
#   "bi,oi->bo", or of a bmm with a transposed weight, the gradient is transposed in memory. Set as `param.grad` it trains the
#   wrong weights, without a word, and the loss rises. A contiguous copy of the gradient is right.
# Versions: torch 2.13.0 (CPU); the same in 2.14.1. Seen on 2026-11-30.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/fit.py" <<'PY'
import torch


def fitted(kind, fused, contiguous):
    """Returns the first and the last loss of a linear regression."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(4, 8))
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    optimizer, losses = kind([weight], lr=0.01, fused=fused), []
    for _ in range(200):
        loss = ((torch.einsum("bi,oi->bo", x, weight) - y) ** 2).mean()
        (grad,) = torch.autograd.grad(loss, [weight])
        weight.grad = grad.contiguous() if contiguous else grad
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


for kind in (torch.optim.AdamW, torch.optim.SGD):
    for fused, contiguous in ((False, False), (True, True), (True, False)):
        first, last = fitted(kind, fused, contiguous)
        print(f"{kind.__name__}, fused={fused}, contiguous={contiguous}: loss {'falls' if last < first else 'rises'}")
PY
found=$("$folder/env/bin/python" "$folder/fit.py" 2>/dev/null)
printf '%s\n' "$found"
[ "$(grep -c falls <<<"$found")" = 4 ] && [ "$(grep rises <<<"$found" | tr '\n' ' ')" = \
  "AdamW, fused=True, contiguous=False: loss rises SGD, fused=True, contiguous=False: loss rises " ]
