#!/usr/bin/env bash
# Scores of what run_steering_generation_vlm.sh wrote with the same environment variables: overlap
# with the reference answers; where the data set tells what is in its pictures (mmhal-bench, shapes)
# objects named that are not; repetition, length. No model is needed.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/vlm/run_score_generations_vlm.sh
#   GENERATIONS=table.csv bash scripts/vlm/run_score_generations_vlm.sh
#
# Also rated by a judge, on this machine or behind an OpenAI-compatible interface:
#   ... run_score_generations_vlm.sh --judge qwen-2.5-7b-instruct
#   OPENAI_API_KEY=... ... run_score_generations_vlm.sh --judge NAME --judge_url https://HOST/v1
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -n "${GENERATIONS:-}" ]]; then
  exec "${PYTHON:-python}" score_generations_vlm.py --generations "$GENERATIONS" "$@"
fi
exec "${PYTHON:-python}" score_generations_vlm.py \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-50}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
