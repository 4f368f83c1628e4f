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
  files=("$GENERATIONS")
else
  dataset="${DATASET_NAME:-truthfulqa}" model="${MODEL_NAME:-llama-3.1-8b-instruct}"
  stem="${dataset##*/}_${model##*/}_n${NUM_SAMPLES:-50}_seed${SEED:-0}"
  stem="${stem}_${ATTRIBUTION:-contrastive}_${GRAD_METHOD:-integrated_gradients}_k${TOP_K:-10}"
  files=(results/"${KIND:-llm}"/steering_generation/"$stem"_*.csv)
fi

for file in "${files[@]}"; do
  "${PYTHON:-python}" score_generations.py --generations "$file" "$@"
done
