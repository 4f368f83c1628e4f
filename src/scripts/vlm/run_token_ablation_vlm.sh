#!/usr/bin/env bash
# Stage 1 on images and text: attribution, ablation, hidden states. The paper's experiment by
# default: LLaVA-1.6-7B, SPA-VL, 50 examples, k = 50, Integrated Gradients. Image tokens and words
# are attributed, and compete for the k places, alike.
#
#   MODEL_NAME=qwen-2.5-vl-7b-instruct bash scripts/vlm/run_token_ablation_vlm.sh
#
# Further flags are handed on: ... run_token_ablation_vlm.sh --ablate image --ig_steps 20
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" token_ablation_vlm.py \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-50}" \
  --top pos neg \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
