#!/usr/bin/env bash
# transformers 5.24.0: the forward of Llama4ForConditionalGeneration raises AttributeError on any input, words alone too: it asks the output of its language model for
# `image_outputs`, which only outputs with pictures have. 5.20.2 returns logits, which the pin of this project keeps. Llama4ForCausalLM works in both.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
cat > forward.py <<'PY'
import torch, transformers
from transformers import Llama4Config, Llama4ForConditionalGeneration

print("torch", torch.__version__, "transformers", transformers.__version__)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
text = sizes | {"vocab_size": 64, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_local_experts": 2}
vision = sizes | {"image_size": 28, "patch_size": 7, "intermediate_size": 128}
vision |= dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision)).eval()
words = torch.arange(4, 12)[None]
with torch.no_grad():
    print("language model:", tuple(model.language_model(words).logits.shape))
    try:
        print("whole model:", tuple(model(words).logits.shape))
    except AttributeError as error:
        print("whole model: AttributeError:", error)
PY
for version in 5.20.2 5.24.0; do
  pip install -q --disable-pip-version-check torch==2.13.0 transformers==$version
  python forward.py 2>/dev/null | tee said-$version
done
grep -q "whole model: (1, 8, 64)" said-5.20.2 || { echo "5.20.2 does not work either"; exit 1; }
grep -q "no attribute 'image_outputs'" said-5.24.0 || { echo "changed: 5.24.0 works"; exit 1; }
