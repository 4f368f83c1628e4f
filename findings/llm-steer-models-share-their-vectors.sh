#!/usr/bin/env bash
# llm-steer 2.0.1 with transformers 5.20.2: all Steer objects of a process share one table of vectors. Two copies of a model that are to be compared
# (Steer(..., copyModel=True)), or two models, are not steered apart: the second is steered by the first one's vectors too, and its layer runs the first
# model's weights. Reset one before the next is made, or use a process for each.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 numpy==2.3.5 llm-steer==2.0.1

python -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from llm_steer import Steer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("llm-steer", version("llm-steer"), "transformers", version("transformers"))
words = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 100)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
prompt = torch.tensor([[1, 2, 3]])


def model(seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)
    made = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for weights in made.parameters():
        weights.data *= 4
    return made


@torch.no_grad()
def logits(steered):
    return steered.model(prompt).logits[0, -1]


def alone(seed, text):
    steered = Steer(model(seed), tokenizer)
    steered.add(layer_idx=1, coeff=0.5, text=text)
    result = logits(steered)
    steered.reset_all()
    return result


for name, seed in (("a copy of the same model", 0), ("another model", 1)):
    expected = alone(seed, "w7 w8 w9")
    first, second = Steer(model(0), tokenizer, copyModel=True), Steer(model(seed), tokenizer, copyModel=True)
    first.add(layer_idx=1, coeff=0.5, text="w4 w5 w6")
    second.add(layer_idx=1, coeff=0.5, text="w7 w8 w9")
    gap = (logits(second) - expected).abs().max().item()
    print(f"second model, {name}: logits differ by {gap:.2f} from those of the same steering alone; vectors it has: {len(second.get_all())}")
    # Expected: no difference, and one vector.
    assert gap > 0.1 and len(second.get_all()) == 2, "changed"
    first.reset_all()
    assert torch.equal(logits(Steer(model(seed), tokenizer)), model(seed)(prompt).logits[0, -1])
EOF
