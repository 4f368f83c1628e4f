#!/usr/bin/env bash
# The whole text pipeline on a laptop: SmolLM2-135M-Instruct answers from texts that contradict what
# it remembers. Steered towards the text and, with the sign turned, away from it, behind a gate that
# keeps the vectors off other text; beside a control behind the same gate, texts that agree with
# memory, no text at all, and unrelated questions.
set -euo pipefail
cd "$(dirname "$0")/../.."

export MODEL_NAME=smollm2-135m-instruct DATASET_NAME=faithfulness NUM_SAMPLES=80
export TOP_K="${TOP_K:-5}" GRAD_METHOD="${GRAD_METHOD:-none}"
model=(--model_name "$MODEL_NAME" --prompt_style chat --top_k "$TOP_K"
       --attribution "${ATTRIBUTION:-contrastive}" --seed "${SEED:-0}")
stage=("${model[@]}" --dataset_name "$DATASET_NAME" --num_samples "$NUM_SAMPLES"
       --grad_method "$GRAD_METHOD")
questions=(--num_validation 16 --num_test 60)
steering=(--layer_idxs 8-24 --alphas -0.01 -0.005 0.005 0.01 --gate)
grid=(--methods gradient rotated --mode pos
      "${steering[@]}" "${questions[@]}" --max_ppl_increase 0.02)
# The program says where its files are: results/ may hold others, of other settings.
where() { "${PYTHON:-python}" -m grains.cli.where llm "$@"; }
# Scripts of one step share a process: importing their libraries takes longer than loading the model.
in_turn() { PYTHONPATH=. "${PYTHON:-python}" demo/in_turn.py "$@"; }
states=$(where states --top pos "${stage[@]}")
accuracies=$(where grid "${stage[@]}" "${grid[@]}")
chosen=$(where chosen "${stage[@]}" "${grid[@]}")
# For colours in a picture: scores that add up within 10 % take a third fewer gradients than within 5 %.
shown=("${model[@]}" --dataset_name "$DATASET_NAME" --num_samples 2 --ig_tolerance 0.1
       --grad_method integrated_gradients)

echo "1/4 hidden states of 80 steering questions; which words two of the answers depend on"
in_turn token_ablation.py "${stage[@]}" -- token_ablation.py "${shown[@]}" --top pos
echo
echo "2/4 steering vectors and their gate: the strength is chosen on validation questions, within +2 % perplexity"
bash scripts/llm/run_steering_mc.sh --prompt_style chat "${grid[@]}"
echo
echo "3/4 the same vectors: texts that agree with memory, no text, unrelated questions"
beside=() commands=()
for data in faithfulness-agreeing faithfulness-bare unrelated; do
  others=("${model[@]}" --dataset_name "$data" --grad_method "$GRAD_METHOD" --num_samples "$NUM_SAMPLES"
          --hidden_states_path "$states" --methods gradient "${steering[@]}" --num_validation 4)
  if [ "$data" = unrelated ]; then
    others+=(--dataset_path data/unrelated.jsonl --num_test 60)
  else
    others+=(--num_test 40)
  fi
  commands+=(-- steering_mc.py "${others[@]}")
  beside+=("$data=$(where grid "${others[@]}")")
done
in_turn "${commands[@]}" > /dev/null
echo
echo "4/4 free answers, base and steered"
bash scripts/llm/run_steering_generation.sh --prompt_style chat --chosen_path "$chosen" \
  "${questions[@]}" --num_prompts 24 --max_new_tokens 24 --output_dir results/llm/demo
answers=$(where generations "${stage[@]}" --output_dir results/llm/demo | xargs -r ls -t | head -n 1)
in_turn demo/text_figure.py "$(where attributions "${shown[@]}")" \
  "$accuracies" "$chosen" "$answers" results/llm/demo.png --beside "${beside[@]}" \
  -- report.py results/llm --output results/llm/report.html
