#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: layers whose weights accelerate keeps elsewhere (cpu_offload, disk_offload, a device map with "cpu" or "disk")
# and fetches for each call, under torch.utils.checkpoint without re-entrance (its recommended form). When a layer is computed again in the backward
# pass, torch stops as soon as the last saved tensor is there, inside the layer's last linear; accelerate's hook that gives the weights back runs
# after the forward that never ends. So after backward that weight of every layer is still in memory, until its next call: a model that is offloaded
# because it does not fit grows by a good part of its weights. Run forward and backward under torch.utils.checkpoint.set_checkpoint_early_stop(False).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 accelerate==1.15.0 numpy==2.3.5

python - <<'EOF'
import accelerate, torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256, bias=False), nn.Linear(256, 64, bias=False)

    def forward(self, states):
        return states + self.down(torch.relu(self.up(states)))


def resident(layers):
    """Names of the weights that are in memory, not with accelerate."""
    return [name for name, weight in layers.named_parameters() if weight.device.type != "meta"]


print("accelerate", accelerate.__version__, "torch", torch.__version__)
kept = {}
for early in (True, False):
    layers = nn.ModuleList(Layer() for _ in range(4)).requires_grad_(False)
    accelerate.cpu_offload(layers, execution_device="cpu")
    states = inputs = torch.randn(2, 64, requires_grad=True)
    with set_checkpoint_early_stop(early):
        for layer in layers:
            states = checkpoint(layer, states, use_reentrant=False)
        assert resident(layers) == []
        states.sum().backward()
    assert inputs.grad is not None
    kept[early] = resident(layers)
    print(f"early stop {early!s:5}: in memory after forward [], after backward {kept[early]}")
# Expected: nothing in either case.
assert kept[False] == [] and kept[True] == [f"{index}.down.weight" for index in range(4)], "changed"
EOF
