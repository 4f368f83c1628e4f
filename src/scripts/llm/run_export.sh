#!/usr/bin/env bash
# Hands the vectors that run_steering_mc.sh made on to another program: llama.cpp, transformers,
# PEFT, lm-eval.
#
#   MODEL_NAME=... VECTORS=vectors.safetensors ALPHA=0.02 TO=gguf LAYERS=1-29 bash scripts/llm/run_export.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" export.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --vectors "${VECTORS:?give the file of the vectors}" \
  --alpha "${ALPHA:?give the strength}" \
  --to "${TO:-gguf}" \
  --layers ${LAYERS:-all} \
  "$@"
