#!/usr/bin/env bash
# The paper's ablations on images and text, each through the whole experiment: how tokens are attributed, the
# objective, how many tokens are ablated, how many examples steer. One setting at a time differs
# from those given; a table compares them. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/vlm/run_experiment_ablations_vlm.sh [flags]
#
# Others than the default: ... --change top_k=3 top_k=30 attribution=normal
set -euo pipefail
cd "$(dirname "$0")/../.."

exec "${PYTHON:-python}" ablations_vlm.py \
  --model_name "${MODEL_NAME:-llava-1.6-7b}" \
  --dataset_name "${DATASET_NAME:-spa-vl}" \
  --num_samples "${NUM_SAMPLES:-50}" \
  --num_test "${NUM_TEST:-500}" \
  --top_k "${TOP_K:-50}" \
  --attribution "${ATTRIBUTION:-contrastive}" \
  --grad_method "${GRAD_METHOD:-integrated_gradients}" \
  ${DATASET_PATH:+--dataset_path "$DATASET_PATH"} \
  "$@"
