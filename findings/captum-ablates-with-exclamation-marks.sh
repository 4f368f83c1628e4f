#!/usr/bin/env bash
# captum 0.9.0: TextTokenInput replaces left-out tokens by id 0, "commonly used for unknown token" by its documentation; in a byte-level vocabulary without
# special tokens in front id 0 is "!", so perturbation scores of a language model compare the prompt with one full of exclamation marks, and another
# order of tokens of importance comes out than with padding. Pass baselines=tokenizer.pad_token_id (or a token of your choice).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 captum==0.9.0 transformers==5.20.2 tokenizers==0.23.3

python -W ignore - <<'EOF'
import captum, torch, transformers
from captum.attr import FeatureAblation, LLMAttribution, TextTokenInput
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("captum", captum.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
raw = Tokenizer(models.BPE())
raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
raw.train_from_iterator(["The capital of France is Paris, of course"] * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
raw.add_special_tokens(["<|pad|>"])  # behind the vocabulary, as in byte-level models
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer))).eval()
for weights in model.parameters():
    weights.data *= 4
prompt, scores = "The capital of France is", {}
for name, more in (("default", {}), ("padding", dict(baselines=tokenizer.pad_token_id))):
    text = TextTokenInput(prompt, tokenizer, **more)
    without = tokenizer.decode(text.to_model_input(torch.zeros(1, text.n_itp_features))[0])
    scores[name] = LLMAttribution(FeatureAblation(model), tokenizer).attribute(text, target=" Paris", show_progress=False).seq_attr
    order = [text.values[i].replace("Ġ", " ") for i in scores[name].argsort(descending=True)]
    print(f"{name}: all tokens left out gives {without!r}; scores {[round(s, 2) for s in scores[name].tolist()]}, most important first {order}")
    if name == "default":
        assert set(without) == {"!"}, "changed: the default is no longer id 0"

# Expected: a neutral token by default, such as the tokenizer's own pad token.
assert tokenizer.convert_ids_to_tokens(0) == "!"
assert scores["default"].argsort().tolist() != scores["padding"].argsort().tolist()
EOF
