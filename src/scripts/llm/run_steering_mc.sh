#!/usr/bin/env bash
# Stage 2 on text: steering vectors and multiple choice, after run_token_ablation.sh with the same
# environment variables. Mode pos and both; the configuration is chosen on validation questions.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/llm/run_steering_mc.sh
#
# The paper's own single layer and strength: ... run_steering_mc.sh --layer_idxs 31 \
#   --layer_mode each --alphas 40 --alpha_units absolute --methods pca
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" steering_mc.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --mode pos both \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
