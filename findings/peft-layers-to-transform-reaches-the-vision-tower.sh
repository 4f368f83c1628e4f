#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.20.2: LoraConfig(target_modules=["q_proj"], layers_to_transform=[2]) on an image-text model adapts layer 2 of the
# language model and layer 2 of the vision tower too, as both name their lists of layers alike; nothing says so, and layers_pattern="layers" does not tell
# them apart. An index that only one of them has adapts that one. Give target_modules as a regular expression with the language model's name.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 numpy==2.3.5
pip install -q --disable-pip-version-check --no-deps peft==0.21.2

python - <<'EOF'
import peft, transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print("peft", peft.__version__, "transformers", transformers.__version__)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
config = LlavaConfig(
    vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=28, patch_size=14, projection_dim=32),
    text_config=LlamaConfig(**sizes, num_hidden_layers=6, num_key_value_heads=2, vocab_size=100),
    image_token_index=99,
)


def adapted(**options):
    model = peft.get_peft_model(LlavaForConditionalGeneration(config), peft.LoraConfig(r=2, **options))
    names = [name.removeprefix("base_model.model.") for name, part in model.named_modules() if hasattr(part, "lora_A")]
    print(options, "->", names)
    return names


TOWER, LANGUAGE = "model.vision_tower.encoder.layers.{}.self_attn.q_proj", "model.language_model.layers.{}.self_attn.q_proj"
for pattern in ({}, {"layers_pattern": "layers"}):
    # Expected: an error, or the language model's layer alone.
    assert adapted(target_modules=["q_proj"], layers_to_transform=[2], **pattern) == [TOWER.format(2), LANGUAGE.format(2)], "changed"
    assert adapted(target_modules=["q_proj"], layers_to_transform=[4], **pattern) == [LANGUAGE.format(4)], "changed"
assert adapted(target_modules=r".*language_model\.layers\.2\..*q_proj") == [LANGUAGE.format(2)]
EOF
