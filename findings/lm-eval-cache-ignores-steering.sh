#!/usr/bin/env bash
# lm-eval 0.4.13: use_cache keys an answer by the request alone, not by the model or by steer_path, so with --model steered a second run with another
# vector (or none) and the same cache reads the first run's log-likelihoods and reports them as its own: two vectors seem to do exactly the same.
# Give every vector, strength and model a cache path of its own, or none.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 datasets==5.2.0 accelerate==1.15.0 lm-eval==0.4.13

python - <<'EOF' 2> >(grep -i "error" >&2)
import json, torch, transformers, lm_eval
from importlib.metadata import version
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm-eval", version("lm-eval"), "transformers", transformers.__version__, "torch", torch.__version__)
words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(97)])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100, max_position_embeddings=64))
for weights in model.parameters():
    weights.data *= 3
model.save_pretrained("model")
for name, value in (("up", 8.0), ("down", -8.0)):
    torch.save({"layers.1": dict(steering_vector=torch.linspace(-1, 1, 32), steering_coefficient=value, action="add")}, f"{name}.pt")
with open("questions.jsonl", "w") as file:
    for i in range(12):
        file.write(json.dumps({"question": f"w{i} w{i + 20}", "choices": ["w90", "w91", "w92"], "label": i % 3}) + "\n")
task = dict(task="questions", dataset_path="json", dataset_kwargs=dict(data_files={"test": "questions.jsonl"}), test_split="test", output_type="multiple_choice",
            doc_to_text="{{question}}", doc_to_choice="{{choices}}", doc_to_target="label", metric_list=[dict(metric="acc")])

def scores(vector, cache):
    out = lm_eval.simple_evaluate(model="steered", model_args=dict(pretrained="model", steer_path=f"{vector}.pt"), tasks=[task], use_cache=cache,
                                  device="cpu", batch_size=4, bootstrap_iters=0)
    return [round(float(answer[0][0]), 4) for row in out["samples"]["questions"] for answer in row["resps"]]

fresh = {vector: scores(vector, None) for vector in ("up", "down")}
cached = {vector: scores(vector, "cache") for vector in ("up", "down")}
for vector in fresh:
    print(f"vector {vector:4}: no cache {fresh[vector][:4]}, one cache for both {cached[vector][:4]}")

# Expected: the cache changes nothing.
assert fresh["up"] == cached["up"] != fresh["down"]
assert cached["down"] == cached["up"], "changed: the cache knows the vector now"
EOF
