#!/usr/bin/env bash
# The bits of a NaN that is converted to bfloat16 on the CPU depend on how the tensor lies in memory.
#
# One would assume: rounding float32 to bfloat16 is a function of the value, so that a NaN becomes one pattern wherever it
#   stands; tests that compare bits, digests of checkpoints and replicas may rely on it.
# What happens: of contiguous memory, which is converted in vectors, a NaN becomes 0xFFFF, with its sign set and all other
#   bits; of strided memory, which is converted one by one, 0x7FC0, as torch.full and torch.tensor give it too. float16 has
#   one pattern, but for the sign.
# Versions: torch 2.13.0 (CPU), x86-64 with AVX-512. Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy 2>/dev/null
cat >"$folder/convert.py" <<'PY'
import torch


def patterns(tensor):
    return "/".join(sorted({f"{bits & 0xFFFF:04X}" for bits in tensor.contiguous().view(torch.int16).tolist()}))


values = torch.full((40,), float("nan"))
for name in ("bfloat16", "float16"):
    dtype = getattr(torch, name)
    contiguous, strided = values.to(dtype), values[::2].to(dtype)
    print(name, patterns(contiguous), patterns(strided), patterns(torch.full((3,), float("nan"), dtype=dtype)))
PY
found=$("$folder/env/bin/python" "$folder/convert.py" | paste -sd';')
printf 'dtype, contiguous, strided, made so: %s\n' "$found"
[ "$found" = "bfloat16 FFFF 7FC0 7FC0;float16 7E00 7E00 7E00" ]
