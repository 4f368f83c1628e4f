#!/usr/bin/env bash
# Stage 3 on images and text: answers about pictures, base and steered side by side, after
# run_steering_mc_vlm.sh with the same environment variables. The configuration that
# run_steering_mc_vlm.sh chose, unless flags name another one.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/vlm/run_steering_generation_vlm.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" steering_generation_vlm.py \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --num_test "${NUM_TEST:-500}" \
  --top_k "${TOP_K:-50}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
