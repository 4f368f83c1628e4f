#!/usr/bin/env bash
# The whole text pipeline on a laptop: SmolLM2-135M-Instruct and the embedded questions.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME=smollm2-135m-instruct DATASET_NAME=misconceptions NUM_SAMPLES=50
stem=misconceptions_smollm2-135m-instruct

echo "1/3 attribution and hidden states of 50 steering questions"
bash scripts/llm/run_token_ablation.sh
echo
echo "2/3 steering vectors, chosen on validation questions, reported on test questions"
bash scripts/llm/run_steering_mc.sh --methods mean gradient random --alphas 0.01 0.02
echo
echo "3/3 generation, base and steered"
bash scripts/llm/run_steering_generation.sh --num_prompts 6 --max_new_tokens 40
PYTHONPATH=. "${PYTHON:-python}" demo/text_figure.py \
  results/llm/token_attribution/${stem}_steering_n50_*_k10.csv \
  results/llm/steering/${stem}_n50_*_grid.csv results/llm/demo.png
"${PYTHON:-python}" report.py results/llm --output results/llm/report.html
