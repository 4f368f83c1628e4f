#!/usr/bin/env bash
# The experiment on images and text: gain on held-out questions, and its cost in perplexity, three
# seeds, controls beside every method. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/vlm/run_experiment_vlm.sh [flags]
#
# Several data sets, each also tried with the others' vectors: ... --datasets spa-vl mine=m.parquet
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" "${SCRIPT:-experiment_vlm.py}" \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --num_test "${NUM_TEST:-500}" \
  --top_k "${TOP_K:-50}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
