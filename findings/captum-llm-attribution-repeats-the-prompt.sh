#!/usr/bin/env bash
# captum 0.9.0 with transformers 5.20.2: LLMAttribution, for FeatureAblation, Shapley values, Lime and so on, by default reads the target token by token
# behind a cache (use_cached_outputs=True). It counts on transformers to cut what is cached already from the input; 5.x does not do so for it. So at
# the second token the model sees the whole prompt once more behind the cached prompt, at the third again: all log-likelihoods but the first token's,
# and with them the attributions, are those of another text, with other signs, and nothing says so. use_cached_outputs=False or forward_in_tokens=False
# give the right values.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 captum==0.9.0

python -W ignore - <<'EOF'
import captum, torch, transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("captum", captum.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 100)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=100)
model = LlamaForCausalLM(config).eval()
for weights in model.parameters():
    weights.data *= 4
prompt, target = [1, 2, 3, 4, 5], [20, 21, 22]


@torch.no_grad()
def likelihoods(ids):
    """Of the target's tokens behind the prompt, by one plain forward."""
    logits = model(torch.tensor([ids + target])).logits[0].log_softmax(-1)
    return torch.stack([logits[len(ids) - 1 + place, token] for place, token in enumerate(target)])


def without(place):
    return prompt[:place] + [0] + prompt[place + 1:]


expected = torch.stack([likelihoods(prompt) - likelihoods(without(place)) for place in range(5)], dim=1)
text = TextTokenInput(tokenizer.decode(prompt), tokenizer)
found = {}
for options in ({}, {"use_cached_outputs": False}, {"forward_in_tokens": False}):
    found[str(options)] = LLMAttribution(FeatureAblation(model), tokenizer).attribute(text, target=tokenizer.decode(target), **options)
    print(f"{options!s:29}", [round(value, 3) for value in found[str(options)].seq_attr.tolist()])
print("plain forwards               ", [round(value, 3) for value in expected.sum(0).tolist()])
cached, *right = found.values()
assert all(torch.allclose(one.token_attr, expected, atol=1e-4) for one in right)
# Expected: the default too. Only the first token's row is right.
assert torch.allclose(cached.token_attr[0], expected[0], atol=1e-4)
assert all((cached.token_attr[1:] - expected[1:]).abs().amax(1) > 0.1), "changed: the default is right"
EOF
