#!/bin/sh
# Cross-compile the program for aarch64 with PyPI's onnxruntime: [PYTHON=python3] aarch64.sh FOLDER
# PyPI's library runs on a Raspberry Pi 4. Debian's has instructions that a cortex-a72 lacks.
# Writes FOLDER/build/u2moe_transcribe and FOLDER/wheel. To run it here:
#     qemu-aarch64 -L /usr/aarch64-linux-gnu FOLDER/build/u2moe_transcribe BUNDLE FILE.wav
# Needs g++-aarch64-linux-gnu and cmake.
set -e
source=$(cd "$(dirname "$0")" && pwd)
python=$(command -v "${PYTHON:-python3}")
case $python in /*) ;; *) python=$(pwd)/$python ;; esac
mkdir -p "$1" && cd "$1"
if [ ! -d wheel ]; then
  "$python" -m pip download -q --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 --python-version 3.12 -d packed onnxruntime
  "$python" -m zipfile -e packed/onnxruntime-*.whl unpacked
  mv unpacked wheel
fi
cmake -S "$source" -B build -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DONNXRUNTIME_ROOT="$(pwd)/wheel/onnxruntime" > cmake.log
cmake --build build >> cmake.log
echo "built $(pwd)/build/u2moe_transcribe"
