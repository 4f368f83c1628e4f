#!/usr/bin/env bash
# The whole text pipeline on a laptop: SmolLM2-135M-Instruct and the embedded questions.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME=smollm2-135m-instruct DATASET_NAME=misconceptions NUM_SAMPLES=50
echo "1/3 attribution and hidden states of 50 steering questions"
bash scripts/llm/run_token_ablation.sh
echo
echo "2/3 steering vectors, chosen on validation questions, reported on test questions"
bash scripts/llm/run_steering_mc.sh
echo
echo "3/3 generation, base and steered"
bash scripts/llm/run_steering_generation.sh --num_prompts 8 --max_new_tokens 40
