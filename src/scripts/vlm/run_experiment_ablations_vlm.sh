#!/usr/bin/env bash
# The paper's ablations on images and text, each through the whole experiment: how tokens are attributed,
# the objective, how many tokens are ablated, how many examples steer. One setting at a time
# differs from those given; a table compares them. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/vlm/run_experiment_ablations_vlm.sh [flags]
#
# Others than the default: ... --change top_k=3 top_k=30 attribution=normal
set -euo pipefail
cd "$(dirname "$0")/../.."

SCRIPT=ablations_vlm.py exec bash scripts/vlm/run_experiment_vlm.sh "$@"
