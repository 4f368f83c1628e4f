#!/usr/bin/env bash
# The paper's ablations, each through the whole experiment: how tokens are attributed, the
# objective, how many tokens are ablated, how many examples steer. One setting at a time differs
# from the default; report.py shows all of them on one page.
#
#   MODEL_NAME=... DATASET_NAME=... bash scripts/llm/run_experiment_ablations.sh [flags]
set -euo pipefail
cd "$(dirname "$0")/../.."

experiment="${EXPERIMENT:-scripts/llm/run_experiment.sh}"
run() {
  bash "$experiment" --methods mean pca --no-train_vectors --max_ppl_increase 0.1 "$@"
}

run "$@"
for method in vanilla smoothgrad; do GRAD_METHOD=$method run "$@"; done
ATTRIBUTION=normal run "$@"
for k in ${TOP_KS:-1 5 20}; do TOP_K=$k run "$@"; done
for n in 10 25 100; do NUM_SAMPLES=$n run "$@"; done
