#!/usr/bin/env bash
# bitsandbytes 0.50.2, on a CPU with AVX512-BF16: the first call of a 4-bit layer without gradients (eval mode) packs its weights for a bfloat16 kernel. From then
# on the layer gives no gradient to its input, also where one is asked for: backward() through a residual network runs and its result is wrong (here the layer's
# share is missing); torch warns of an unregistered kernel, no error comes. Set `layer.support_avx512bf16_for_cpu = False` on each Linear4bit before its first call: values and gradients are then exact.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 bitsandbytes==0.50.2

python - <<'PY' 2> >(grep -v kernels >&2)
import bitsandbytes, torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit, Params4bit

print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
assert has_avx512bf16(), "not shown: this processor has no AVX512-BF16"


def made(packs):
    torch.manual_seed(0)
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(64, 64) / 8, requires_grad=False, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = packs
    return layer.to("cpu").eval()


def gradient(layer, x):
    x = x.clone().requires_grad_()
    (x + layer(x)).sum().backward()  # as in a residual network
    return x.grad


x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
layer = made(packs=True)
weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
right = 1 + weight.sum(0).expand_as(x)
before = gradient(layer, x)
with torch.no_grad():
    layer(x)
after = gradient(layer, x)
print("gradient, first row:     right", [round(v, 2) for v in right[0, :4].tolist()])
print("before a call without:        ", [round(v, 2) for v in before[0, :4].tolist()])
print("after a call without gradients", [round(v, 2) for v in after[0, :4].tolist()])
assert torch.allclose(before, right, atol=1e-5)
assert torch.equal(after, torch.ones_like(x)), "changed: the gradient is kept"

layer = made(packs=False)
with torch.no_grad():
    plain = layer(x)
assert torch.allclose(plain, x @ weight.T, atol=1e-5)
assert torch.allclose(gradient(layer, x), right, atol=1e-5)
PY
