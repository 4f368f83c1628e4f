#!/usr/bin/env bash
# safetensors 0.8.0: the keys of a file's metadata are written in a new random order at every save, so that the same tensors with the same metadata give files
# of different SHA-256: nothing to a reader, but checksums, caches by content and "did this change?" all say yes. Tensors alone, or with one key of
# metadata, always give the same bytes. Put everything into one key, as JSON with sorted keys. (Known: safetensors issue 584.)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

python - <<'EOF'
import hashlib, json
import numpy as np, safetensors
from safetensors.numpy import save

print("safetensors", safetensors.__version__)
tensors = {"layer.0": np.zeros(4, np.float32), "layer.1": np.ones(4, np.float32)}
about = {"model": "m", "method": "caa", "seed": "0", "layers": "0-1", "units": "relative", "made": "by hand"}
metadata = {"none": None, "one key": {"about": json.dumps(about, sort_keys=True)}, "six keys": about}
kinds = {}
for name, header in metadata.items():
    files = [save(tensors, metadata=header) for _ in range(20)]
    kinds[name] = len({hashlib.sha256(file).hexdigest() for file in files})
    length = int.from_bytes(files[0][:8], "little")
    contents = {json.dumps(json.loads(file[8 : 8 + length]), sort_keys=True) + str(file[8 + length :]) for file in files}
    print(f"metadata, {name:8}: 20 saves give {kinds[name]} different files, {len(contents)} different contents")
    assert len(contents) == 1  # header and tensors are the same but for the order of keys

# Expected: the same content gives the same file.
assert kinds["none"] == kinds["one key"] == 1
assert kinds["six keys"] > 1, kinds
EOF
