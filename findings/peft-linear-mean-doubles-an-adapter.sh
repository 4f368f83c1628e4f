#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter with combination_type="linear" is not linear. It adds the two factors A and B of the adapters separately, so their
# product has a term for each pair of adapters: the mean of an adapter and itself is twice the adapter, and that of two seeds is both halves plus
# one's A times the other's B. combination_type="cat" gives the weighted sum of the changes, "svd" the part of it that its rank can hold.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 numpy==2.3.5
pip install -q --disable-pip-version-check --no-deps peft==0.21.2

python - <<'EOF'
import peft, torch

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), config, adapter_name="seed0")
model.add_adapter("seed1", config)
layer = model.base_model.model[0]
first, second = (layer.get_delta_weight(name).detach() for name in ("seed0", "seed1"))
gap = {}
for kind in ("linear", "cat", "svd"):
    model.add_weighted_adapter(["seed0", "seed0"], [0.5, 0.5], f"same-{kind}", combination_type=kind)
    model.add_weighted_adapter(["seed0", "seed1"], [0.5, 0.5], f"mean-{kind}", combination_type=kind)
    same, mean = (layer.get_delta_weight(f"{name}-{kind}").detach() for name in ("same", "mean"))
    factor = float((same / first).median())
    gap[kind] = float((mean - (first + second) / 2).norm() / ((first + second) / 2).norm())
    print(f"{kind:6}: mean of an adapter and itself / the adapter = {factor:.3f}; mean of two, distance to the mean of their changes {gap[kind]:.0%}")
    # Expected: a factor of 1 and no distance.
    assert abs(factor - (2 if kind == "linear" else 1)) < 1e-3, f"changed: {kind}"
assert gap["cat"] < 1e-4 and gap["linear"] > 0.5
EOF
