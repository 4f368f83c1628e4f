#!/usr/bin/env bash
# Stage 2 on images and text: steering vectors, and which of two answers to a question about a
# picture is preferred, after run_token_ablation_vlm.sh with the same environment variables. Mode
# pos and both; the configuration is chosen on validation questions. Of SPA-VL's 7,000 validation
# questions 500 are the test (NUM_TEST).
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/vlm/run_steering_mc_vlm.sh
#
# The paper's own single layer and strength: ... run_steering_mc_vlm.sh --layer_idxs 31 \
#   --layer_mode each --alphas 100 --alpha_units absolute --methods pca
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" steering_mc_vlm.py \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --num_test "${NUM_TEST:-500}" \
  --top_k "${TOP_K:-50}" \
  --mode pos both \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
