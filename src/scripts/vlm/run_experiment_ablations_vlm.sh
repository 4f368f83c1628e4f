#!/usr/bin/env bash
# The paper's ablations, each through the whole experiment: how tokens are attributed, the
# objective, how many tokens are ablated, how many examples steer. One setting at a time differs
# from the default; report.py shows all of them on one page.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/vlm/run_experiment_ablations_vlm.sh [flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

EXPERIMENT=scripts/vlm/run_experiment_vlm.sh TOP_KS="${TOP_KS:-10 25 100}" \
  exec bash scripts/llm/run_experiment_ablations.sh "$@"
