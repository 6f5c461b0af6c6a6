#!/usr/bin/env bash
# One NVRTC (and one nvcc) has two optimizers: an old one up to compute capability 9.0, a new one from 10.0 on.
#
# One would assume: a release of CUDA has one compiler, so that PTX of plain CUDA C++, which uses nothing of a newer
#   GPU, differs between architectures in its ".target" line alone; and that what was checked for 9.0 (spills, vector
#   accesses, registers) tells of 10.0 too.
# What happens: PTX for 7.5, 8.0 and 9.0 is the same program, made by "NVVM 7.0.1", in 13.0.88 as in 13.5.37. PTX for
#   10.0 and 12.0 is another program, made by NVVM 20 and 23: other branches, other arithmetic of addresses, other loads
#   of parameters. So what is shipped for both must be looked at for both.
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, Linux x86_64, no GPU needed. 12.8.93 and nvcc 13.0.88 do the same.
#   Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/compile.py" <<'PY'
import ctypes
import pathlib
import re
import sys

lib = pathlib.Path(sys.argv[1], "nvidia/cu13/lib")
ctypes.CDLL(str(next(lib.glob("libnvrtc-builtins.so.*"))))  # 13.0 does not find it
nvrtc = ctypes.CDLL(str(lib / "libnvrtc.so.13"))
SOURCE = b"""extern "C" __global__ void affine(float* x, const int* n) {
  for (int i = threadIdx.x; i < *n; i += 128) x[i] = x[i] * 2 + 1;
}"""


def ptx_for(architecture):
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"affine.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=compute_%d" % architecture)
    assert nvrtc.nvrtcCompileProgram(program, 1, options) == 0
    assert nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)) == 0
    text = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetPTX(program, text) == 0
    return text.value.decode()


kinds = {}  # {the program without its target: the architectures that have it}
for architecture in (75, 80, 90, 100, 120):
    text = ptx_for(architecture)
    (optimizer,) = re.findall(r"Based on (NVVM \S+)", text)
    instructions = re.sub(r"//.*|\.target.*", "", text)
    kinds.setdefault((instructions, optimizer), []).append(str(architecture))
print("; ".join(f"{optimizer}: {' '.join(architectures)}" for (_, optimizer), architectures in kinds.items()))
PY
for version in 13.0.88 13.5.37; do
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" \
    "nvidia-cuda-nvrtc==$version" 2>/dev/null
done
old=$(python3 "$folder/compile.py" "$folder/13.0.88")
new=$(python3 "$folder/compile.py" "$folder/13.5.37")
printf '13.0.88: %s\n13.5.37: %s\n' "$old" "$new"
[ "$old" = "NVVM 7.0.1: 75 80 90; NVVM 20.0.0: 100 120" ] && [ "$new" = "NVVM 7.0.1: 75 80 90; NVVM 23.0.0: 100 120" ]
