#!/usr/bin/env bash
# Scores of what run_steering_generation.sh wrote with the same environment variables: overlap with
# the reference answers, repetition, length. No model is needed.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/llm/run_score_generations.sh
#   GENERATIONS=table.csv bash scripts/llm/run_score_generations.sh
#
# Also rated by a judge, on this machine or behind an OpenAI-compatible interface:
#   ... run_score_generations.sh --judge qwen-2.5-7b-instruct
#   OPENAI_API_KEY=... ... run_score_generations.sh --judge NAME --judge_url https://HOST/v1
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ -n "${GENERATIONS:-}" ]]; then
  exec "${PYTHON:-python}" score_generations.py --generations "$GENERATIONS" "$@"
fi
exec "${PYTHON:-python}" score_generations.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  --seed "${SEED:-0}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
