#!/usr/bin/env bash
# transformers 5.20.2 with tokenizers 0.23.3: a call of a fast tokenizer with truncation and padding leaves both in it, and save_pretrained writes them
# into tokenizer.json. transformers itself sets them anew in every call and does not notice; programs that read the file with the tokenizers library
# (and its bindings) cut every text to the length of that one call and pad it. After a processor's call with padding=True a saved image-text model has
# it too. Call backend_tokenizer.no_truncation() and no_padding() before saving.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check transformers==5.20.2 tokenizers==0.23.3 numpy==2.3.5

python - <<'EOF'
import json
from importlib.metadata import version

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print("transformers", version("transformers"), "tokenizers", version("tokenizers"))
words = Tokenizer(models.WordLevel({"<pad>": 0} | {f"w{i}": i for i in range(1, 20)}, unk_token="<pad>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
text = "w1 w2 w3 w4 w5 w6 w7 w8"
ids = {}
for when in ("before", "after", "cleared"):
    if when == "after":
        tokenizer([text, "w9"], truncation=True, max_length=4, padding="max_length")
    if when == "cleared":
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(when)
    read = Tokenizer.from_file(f"{when}/tokenizer.json")
    ids[when] = read.encode(text).ids, read.encode("w9").ids
    print(f"{when:7}: tokenizers {ids[when]}, transformers {AutoTokenizer.from_pretrained(when)(text).input_ids}")
    assert AutoTokenizer.from_pretrained(when)(text).input_ids == [1, 2, 3, 4, 5, 6, 7, 8]
# Expected: all the same.
assert ids["before"] == ids["cleared"] == ([1, 2, 3, 4, 5, 6, 7, 8], [9])
assert ids["after"] == ([1, 2, 3, 4], [9, 0, 0, 0]), "changed"
EOF
