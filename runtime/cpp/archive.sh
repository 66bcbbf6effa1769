#!/bin/sh
# Build an archive of the shared library for release: archive.sh NAME ONNXRUNTIME_ROOT [SETTING...] writes
# build/archives/u2moe-VERSION-NAME.tar.gz. It contains headers, onnxruntime, files for CMake and pkg-config, and licences.
# release.yml runs it for each system.
set -e
name=$1 root=$2
shift 2
cd "$(dirname "$0")/../.."
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml | head -1)
build=build/archive-$name folder=u2moe-$version-$name
rm -rf "$build"
cmake -S runtime/cpp -B "$build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DCMAKE_INSTALL_LIBDIR=lib -DONNXRUNTIME_ROOT="$root" "$@"
cmake --build "$build" --config Release --target u2moe
cmake --install "$build" --config Release --strip --prefix "$build/$folder"
mkdir -p "$build/$folder/licenses/onnxruntime" build/archives
cp LICENSE "$build/$folder/licenses/u2moe.txt"
cp runtime/kernels/third_party/onnxruntime/LICENSE "$build/$folder/licenses/onnxruntime"
for notices in "$root/ThirdPartyNotices.txt" "$root/../onnxruntime/ThirdPartyNotices.txt"; do
  if [ -f "$notices" ]; then cp "$notices" "$build/$folder/licenses/onnxruntime"; fi
done
tar -C "$build" -czf "build/archives/$folder.tar.gz" "$folder"
echo "build/archives/$folder.tar.gz"
