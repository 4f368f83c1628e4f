#!/usr/bin/env bash
# The whole vision-language pipeline on a laptop: a small model trained on drawn scenes, which
# names squares that are not there, and preference pairs against that.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME=shapes-vlm DATASET_NAME=shapes NUM_SAMPLES=150 TOP_K=20
grid=(--methods mean pca gradient caa random shared_random rotated rand_tokens --mode pos both
      --layer_mode from --layer_idxs all --alphas 0.1 0.15 0.2 0.25 0.3
      --num_validation 100 --num_test 200)

echo "1/3 attribution and hidden states of 150 pairs of captions"
bash scripts/vlm/run_token_ablation_vlm.sh --top pos neg rand
echo
echo "2/3 steering vectors, chosen on validation scenes, reported on test scenes"
bash scripts/vlm/run_steering_mc_vlm.sh "${grid[@]}"
echo
echo "3/3 pointing game and captions, base and steered"
PYTHONPATH=. "${PYTHON:-python}" demo/shapes_demo.py --model_name "$MODEL_NAME" \
  --dataset_name "$DATASET_NAME" --num_samples "$NUM_SAMPLES" --top_k "$TOP_K" "${grid[@]}"
"${PYTHON:-python}" report.py results/vlm --output results/vlm/report.html
