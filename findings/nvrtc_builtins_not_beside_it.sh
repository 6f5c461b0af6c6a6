#!/usr/bin/env bash
# NVRTC 13.0, loaded by its full path, cannot compile: it looks for its builtins by name alone.
#
# One would assume: a library opened by its absolute path finds the companion that its own wheel puts beside it, so that
#   ctypes.CDLL(".../nvidia/cu13/lib/libnvrtc.so.13") is all that a runtime compiler needs.
# What happens: nvidia-cuda-nvrtc 13.0.88 (the version that torch 2.14.1 requires) has no run path. It loads, reports its
#   version and creates programs, and fails only at the first compilation: "failed to open libnvrtc-builtins.so.13.0".
#   13.5.37 has the run path $ORIGIN and compiles. With 13.0.88 it works once the builtins have been loaded by their path.
# Versions: nvidia-cuda-nvrtc 13.0.88 and 13.5.37, Linux x86_64, no GPU needed. Seen on 2026-11-28.
# Exit status: 0 while this is so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/compile.py" <<'PY'
import ctypes
import pathlib
import sys

lib = pathlib.Path(sys.argv[1], "nvidia/cu13/lib")
if sys.argv[2] == "builtins first":
    ctypes.CDLL(str(next(lib.glob("libnvrtc-builtins.so.*"))))
nvrtc = ctypes.CDLL(str(lib / "libnvrtc.so.13"))
program, size = ctypes.c_void_p(), ctypes.c_size_t()
source = b'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"twice.cu", 0, None, None) == 0
options = (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_80")
failed = nvrtc.nvrtcCompileProgram(program, 1, options)
assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
log = ctypes.create_string_buffer(size.value)
assert nvrtc.nvrtcGetProgramLog(program, log) == 0
print("compiled" if not failed else "no builtins" if b"failed to open libnvrtc-builtins" in log.value else log.value)
PY
unset LD_LIBRARY_PATH
for version in 13.0.88 13.5.37; do
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/$version" \
    "nvidia-cuda-nvrtc==$version" 2>/dev/null
done
old=$(python3 "$folder/compile.py" "$folder/13.0.88" "as it is")
mended=$(python3 "$folder/compile.py" "$folder/13.0.88" "builtins first")
new=$(python3 "$folder/compile.py" "$folder/13.5.37" "as it is")
printf '13.0.88: %s; with its builtins loaded first: %s; 13.5.37: %s\n' "$old" "$mended" "$new"
[ "$old/$mended/$new" = "no builtins/compiled/compiled" ]
