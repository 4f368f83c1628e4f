#!/usr/bin/env bash
# Stage 1 on text: attribution, ablation, hidden states. The paper's experiment by default:
# Llama-3.1-8B-Instruct, TruthfulQA, 50 examples, k = 10, Integrated Gradients.
#
#   MODEL_NAME=qwen-2.5-7b-instruct DATASET_NAME=faitheval bash scripts/llm/run_token_ablation.sh
#
# Further flags are handed on: ... run_token_ablation.sh --ig_steps 20 --ig_baseline zeros
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" token_ablation.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --top pos neg \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
