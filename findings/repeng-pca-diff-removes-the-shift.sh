#!/usr/bin/env bash
# repeng 0.4.0: the default method "pca_diff" fits scikit-learn's PCA, which subtracts the mean, to the differences of the pairs, and that mean is the
# shift one is after: the more alike the pairs' differences, the more the "control vector" is what is left, noise at nearly a right angle to it. It has
# unit length and looks like any other. Use method="pca_center", or the mean difference, and check the cosine with the mean difference.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 numpy==1.26.4 scikit-learn==1.7.2 gguf==0.19.0
pip install -q --disable-pip-version-check --no-deps repeng==0.4.0

python - <<'EOF' 2> >(grep -v "it/s" >&2)
import numpy as np, sklearn, torch, transformers
from importlib.metadata import version
from repeng import ControlVector, DatasetEntry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("repeng", version("repeng"), "scikit-learn", sklearn.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["<pad>"] + [f"w{i}" for i in range(199)])}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, vocab_size=200)).eval()
draw = np.random.default_rng(0)
pairs = [DatasetEntry(f"w{a} w{b} w{c} w1", f"w{a} w{b} w{c} w2") for a, b, c in draw.integers(3, 199, (64, 3))]  # one word differs, always the same

def states(texts):
    with torch.no_grad():
        out = model(**tokenizer(texts, return_tensors="pt"), output_hidden_states=True).hidden_states
    return np.stack([layer[:, -1].numpy() for layer in out[1:]])

shift = states([pair.positive for pair in pairs]) - states([pair.negative for pair in pairs])
cosines = {}
for method in ("pca_diff", "pca_center"):
    vectors = ControlVector.train(model, tokenizer, pairs, hidden_layers=[0, 1], method=method).directions
    cosines[method] = [float(vectors[layer] @ shift[layer].mean(0) / np.linalg.norm(vectors[layer]) / np.linalg.norm(shift[layer].mean(0))) for layer in (0, 1)]
    print(f"{method:10}: cosine with the mean difference at layers 0, 1:", [round(value, 3) for value in cosines[method]])
alike = [float(np.linalg.norm(shift[layer].mean(0)) / np.sqrt((shift[layer] ** 2).sum(1).mean())) for layer in (0, 1)]
print("length of the mean difference, as a share of the differences' own:", [round(value, 3) for value in alike])

# Expected: a vector along the shift that all pairs share.
assert min(alike) > 0.95 and min(cosines["pca_center"]) > 0.95
assert max(map(abs, cosines["pca_diff"])) < 0.6, "changed: pca_diff keeps the shift now"
EOF
