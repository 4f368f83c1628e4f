#!/usr/bin/env bash
# lm-eval 0.4.13 with eai-sparsify 1.3.3: --model steered takes a CSV with a row for each feature of a sparse autoencoder. Rows at the same layer replace
# each other: only the last one steers, and nothing says so, so that ten features at one layer give the results of one. And the action "add", which the
# documented example rows have, ends in an AssertionError with every such autoencoder, as each brings a bias. Sum the decoder's rows yourself and give a
# .pt file of one vector a layer, whose action "add" works.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 datasets==5.2.0 accelerate==1.15.0 lm-eval==0.4.13 eai-sparsify==1.3.3

python - <<'EOF' 2> >(grep -i "error" >&2)
import csv
from importlib.metadata import version

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.hf_steered import SteeredModel
from sparsify import SparseCoder, SparseCoderConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("lm-eval", version("lm-eval"), "eai-sparsify", version("eai-sparsify"))
words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<pad>", "<s>", "</s>"] + [f"w{i}" for i in range(97)])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained("model")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)).save_pretrained("model")
coder = SparseCoder(32, SparseCoderConfig(num_latents=64, k=4))
coder.save_to_disk("coder/layers.1")


def likelihood(path):
    """The log-likelihood of a continuation behind what `path` steers with."""
    steered = SteeredModel(pretrained="model", steer_path=path, device="cpu", batch_size=1)
    request = Instance(request_type="loglikelihood", doc={}, arguments=("w1 w2 w3", " w4 w5"), idx=0)
    return round(steered.loglikelihood([request], disable_tqdm=True)[0][0], 5)


def of_rows(action, *features):
    with open("features.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow("loader action sparse_model hookpoint feature_index steering_coefficient head_index sae_id description".split())
        rows.writerows(["sparsify", action, "coder", "layers.1", feature, 8.0, "", "", ""] for feature in features)
    return likelihood("features.csv")


first, second, both, turned = (of_rows("clamp", *features) for features in ([3], [7], [3, 7], [7, 3]))
print(f"clamped: feature 3 {first}, feature 7 {second}, rows 3 and 7 {both}, rows 7 and 3 {turned}")
# Expected: rows 3 and 7 differ from each alone, and their order hardly matters.
assert both == second != first == turned, "changed: rows of one layer"
try:
    of_rows("add", 3)
except AssertionError as error:
    print("added: AssertionError,", error)
else:
    raise SystemExit("changed: the action add works")
torch.save({"layers.1": dict(steering_vector=8 * coder.W_dec[[3, 7]].sum(0).detach(), steering_coefficient=1.0, action="add")}, "sum.pt")
assert likelihood("sum.pt") not in (first, second)
EOF
