#!/usr/bin/env bash
# The experiment on text: gain on held-out questions, and its cost in perplexity, three seeds,
# controls beside every method. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/llm/run_experiment.sh [flags]
#
# Several data sets, each also tried with the other's vectors: ... --datasets truthfulqa faitheval
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" "${SCRIPT:-experiment.py}" \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
