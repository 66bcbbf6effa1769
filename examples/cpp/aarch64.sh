#!/bin/sh
# Cross-compile the program for aarch64 on Debian, without root: aarch64.sh FOLDER
# Writes FOLDER/root with Debian's onnxruntime for arm64 and FOLDER/build/u2moe_transcribe. To run it here:
#     qemu-aarch64 -L FOLDER/root FOLDER/build/u2moe_transcribe BUNDLE FILE.wav
# Needs g++-aarch64-linux-gnu, cmake, and libonnxruntime-dev for the headers.
set -e
source=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && cd "$1"
folder=$(pwd)
if [ ! -d root ]; then
  mkdir -p apt/lists/partial apt/cache/archives/partial
  : > apt/status  # nothing is installed: every dependency is fetched
  cat > apt/apt.conf <<CONF
Dir::State "$folder/apt";
Dir::State::status "$folder/apt/status";
Dir::Cache "$folder/apt/cache";
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
CONF
  APT_CONFIG=$folder/apt/apt.conf
  export APT_CONFIG
  apt-get update -q > apt/log
  apt-get install -q -y --download-only --no-install-recommends '^libonnxruntime1\.[0-9]+$' >> apt/log
  for package in apt/cache/archives/*.deb; do dpkg-deb -x "$package" unpacked; done
  ln -sfn usr/lib unpacked/lib  # the loader's path
  mv unpacked root
fi
libraries=$folder/root/usr/lib/aarch64-linux-gnu
cmake -S "$source" -B build -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS="-Wl,-rpath-link,$libraries" \
  -DONNXRUNTIME_LIBRARY="$(ls "$libraries"/libonnxruntime.so.* | head -1)" > cmake.log
cmake --build build >> cmake.log
echo "built $folder/build/u2moe_transcribe"
