#!/usr/bin/env bash
# The paper's ablations, each through the whole experiment: how tokens are attributed, the
# objective, how many tokens are ablated, how many examples steer. One setting at a time differs
# from those given; a table compares them. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/llm/run_experiment_ablations.sh [flags]
#
# Others than the default: ... --change top_k=3 top_k=30 attribution=normal
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" ablations.py \
  --model_name "${MODEL_NAME:-llama-3.1-8b-instruct}" \
  --dataset_name "${DATASET_NAME:-truthfulqa}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --top_k "${TOP_K:-10}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
