#!/usr/bin/env bash
# Stage 3 on text: generation, base and steered side by side, after run_steering_mc.sh with the
# same environment variables. The configuration that run_steering_mc.sh chose, unless flags name
# another one.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/llm/run_steering_generation.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" steering_generation.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
