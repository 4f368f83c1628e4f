#!/usr/bin/env bash
# interpreto 0.5.2 with transformers 5.20.2: its IntegratedGradients are not Integrated Gradients. Each gradient on the path is multiplied by the embedding
# at that point instead of by the input minus the baseline, and the mean of the absolute values over the hidden size is taken. So scores have no sign (a
# token that pushes away from the target looks like one that pushes towards it), do not add up to the change of the logit, and rank tokens otherwise.
# captum's LayerIntegratedGradients or inseq 0.7.1 give the right values.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 nnsight==0.7.0 jaxtyping==0.2.36 beartype nltk einops scipy matplotlib scikit-learn
pip install -q --disable-pip-version-check --no-deps interpreto==0.5.2

python -W ignore - <<'EOF'
from importlib.metadata import version

import torch
from interpreto import Granularity, IntegratedGradients
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("interpreto", version("interpreto"), "transformers", version("transformers"), "torch", torch.__version__)
words = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 100)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)
model = LlamaForCausalLM(config).eval()
for weights in model.parameters():
    weights.data *= 4
PROMPT, TARGET, POINTS, BASELINE = [1, 2, 3, 4, 5], 20, 200, 1.0

explainer = IntegratedGradients(model, tokenizer, granularity=Granularity.ALL_TOKENS, n_perturbations=POINTS, baseline=BASELINE)
found = explainer.explain(tokenizer.decode(PROMPT), f"w{TARGET}")[0].attributions[0, : len(PROMPT)]

inputs = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
baseline = torch.full_like(inputs, BASELINE)
steps = ((torch.arange(POINTS) + 0.5) / POINTS)[:, None, None]
path = (baseline + steps * (inputs - baseline)).requires_grad_()
logits = model(inputs_embeds=path).logits[:, -1, TARGET]
gradients = torch.autograd.grad(logits.sum(), path)[0]
expected = (gradients.mean(0) * (inputs - baseline)[0]).sum(-1)
with torch.no_grad():
    change = (model(inputs_embeds=inputs).logits - model(inputs_embeds=baseline).logits)[0, -1, TARGET].item()

def rounded(values):
    return [round(value, 3) for value in values.tolist()]

print(f"interpreto                         {rounded(found)}, sum {found.sum():.2f}")
print(f"by hand                            {rounded(expected)}, sum {expected.sum():.2f}, change of the logit {change:.2f}")
# Expected: both alike.
assert abs(expected.sum().item() - change) < 0.1 * abs(change) and expected.min() < 0 < expected.max()
assert (found >= 0).all() and found.argsort().tolist() != expected.argsort().tolist(), "changed: they have a sign"
assert torch.allclose(found, (gradients * path).abs().mean(-1).mean(0), atol=1e-2)
EOF
