#!/bin/sh
# Compile the core to runtime/web/core.wasm or FILE: PYTHON=env/bin/python sh runtime/cpp/wasm.sh [FILE]. `make web` runs it.
# The same compiler version produces the same bytes in any folder. Another version produces different bytes.
COMPILER=ziglang==0.17.1
set -e
out=$(realpath "${1:-$(dirname "$0")/../web/core.wasm}")
python=$(command -v "${PYTHON:-python3}")
cd "$(dirname "$0")/../.."
"$python" -m ziglang version >/dev/null 2>&1 || "$python" -m pip install --quiet --disable-pip-version-check $COMPILER
core=$(sed -n 's|source/|runtime/cpp/source/|g; s/^set(core \(.*\))/\1/p' runtime/cpp/CMakeLists.txt)
"$python" -m ziglang c++ -target wasm32-wasi -mexec-model=reactor -mcpu=generic+simd128 -std=c++17 -Os -flto -fno-exceptions \
  -fno-rtti -ffp-contract=off -Wall -Wextra -s -Wl,--export=malloc,--export=free,--export=__stack_pointer,-z,stack-size=1048576 \
  -Iruntime/cpp/source -Iruntime/cpp/include runtime/web/core.cpp tests/cpp/cases.cpp \
  $core -o "$out"
chmod 644 "$out"
