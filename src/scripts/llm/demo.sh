#!/usr/bin/env bash
# The whole text pipeline on a laptop: SmolLM2-135M-Instruct and the embedded questions.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME=smollm2-135m-instruct DATASET_NAME=misconceptions NUM_SAMPLES=50
stage=(--model_name "$MODEL_NAME" --dataset_name "$DATASET_NAME" --num_samples "$NUM_SAMPLES"
       --top_k "${TOP_K:-10}" --attribution "${ATTRIBUTION:-contrastive}"
       --grad_method "${GRAD_METHOD:-integrated_gradients}" --seed "${SEED:-0}")
grid=(--methods mean gradient random --mode pos both --alphas 0.01 0.02)
# The program says where its files are: results/ may hold others, of other settings.
where() { "${PYTHON:-python}" -m grains.cli.where llm "$@" "${stage[@]}" "${grid[@]}"; }
attributions=$(where attributions)
accuracies=$(where grid)
chosen=$(where chosen)

echo "1/3 attribution and hidden states of 50 steering questions"
bash scripts/llm/run_token_ablation.sh
echo
echo "2/3 steering vectors, chosen on validation questions, reported on test questions"
bash scripts/llm/run_steering_mc.sh "${grid[@]}"
echo
echo "3/3 generation, base and steered"
bash scripts/llm/run_steering_generation.sh --chosen_path "$chosen" \
  --num_prompts 6 --max_new_tokens 40
PYTHONPATH=. "${PYTHON:-python}" demo/text_figure.py "$attributions" "$accuracies" \
  results/llm/demo.png
"${PYTHON:-python}" report.py results/llm --output results/llm/report.html
