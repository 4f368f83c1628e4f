#!/usr/bin/env bash
# The paper's ablations on text, each through the whole experiment: how tokens are attributed,
# the objective, how many tokens are ablated, how many examples steer. One setting at a time
# differs from those given; a table compares them. Resumes on the same command.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/llm/run_experiment_ablations.sh [flags]
#
# Others than the default: ... --change top_k=3 top_k=30 attribution=normal
set -euo pipefail
cd "$(dirname "$0")/../.."

SCRIPT=ablations.py exec bash scripts/llm/run_experiment.sh "$@"
