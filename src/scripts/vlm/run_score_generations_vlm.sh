#!/usr/bin/env bash
# Scores of what run_steering_generation_vlm.sh wrote with the same environment variables: overlap
# with the reference answers; where the data set tells what is in its pictures (mmhal-bench, shapes)
# objects named that are not; repetition, length. No model is needed.
#
#   MODEL_NAME=... DATASET_NAME=... NUM_SAMPLES=... bash scripts/vlm/run_score_generations_vlm.sh
#   GENERATIONS=table.csv bash scripts/vlm/run_score_generations_vlm.sh
#
# Also rated by a judge, on this machine or behind an OpenAI-compatible interface:
#   ... run_score_generations_vlm.sh --judge qwen-2.5-7b-instruct
#   OPENAI_API_KEY=... ... run_score_generations_vlm.sh --judge NAME --judge_url https://HOST/v1
set -euo pipefail
cd "$(dirname "$0")/../.."

export KIND=vlm DATASET_NAME="${DATASET_NAME:-spa-vl}" MODEL_NAME="${MODEL_NAME:-llava-1.6-7b}"
TOP_K="${TOP_K:-50}" exec bash scripts/llm/run_score_generations.sh "$@"
