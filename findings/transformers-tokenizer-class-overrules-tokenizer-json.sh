#!/usr/bin/env bash
# transformers 5.20.2: where tokenizer_config.json names LlamaTokenizerFast, AutoTokenizer takes vocabulary and merges from tokenizer.json but builds
# its own pre-tokenizer and decoder, so a byte-level tokenizer.json silently loses every space: scores and activations are of another text. The library
# mends only the model types and names that it lists. Write "PreTrainedTokenizerFast" as the class, and compare decode(encode(text)) with the text.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check transformers==5.20.2 tokenizers==0.23.3

python - <<'EOF'
import json, os, tokenizers, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
raw = Tokenizer(models.BPE())
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
raw.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
raw.train_from_iterator(["the capital of France is Paris"] * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))

text = "The capital of France is Paris, since 1987."
print("tokenizer.json itself      ", raw.encode(text).tokens)
seen = {}
for name in ("PreTrainedTokenizerFast", "LlamaTokenizerFast"):
    os.mkdir(name)
    raw.save(f"{name}/tokenizer.json")
    with open(f"{name}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>"}, file)
    loaded = AutoTokenizer.from_pretrained(name)
    ids = loaded(text).input_ids
    seen[name] = loaded.decode(ids)
    print(f"{name:27}", loaded.convert_ids_to_tokens(ids), repr(seen[name]))

# Expected: both give back the text, since tokenizer.json says how to split and how to join.
assert seen["PreTrainedTokenizerFast"] == text
assert seen["LlamaTokenizerFast"] == text.replace(" ", ""), "changed: tokenizer.json's own parts are kept now"
EOF
