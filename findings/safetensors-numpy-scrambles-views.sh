#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.numpy.save_file writes a transposed, strided or Fortran-ordered array in its order in memory under its own shape, so
# another matrix is read back, without an error (the torch function refuses such tensors). Steering vectors saved as `basis.T` or as columns of an SVD
# are scrambled but have plausible norms. Pass numpy.ascontiguousarray(array), and read back what was written.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6

python - <<'EOF'
import numpy as np, safetensors
from safetensors.numpy import load_file, save_file

print("safetensors", safetensors.__version__, "numpy", np.__version__)
basis = np.arange(6.0).reshape(2, 3)
arrays = {"transposed": basis.T, "every second column": basis[:, ::2], "Fortran order": np.asfortranarray(basis), "as it was": basis}
save_file(arrays, "views.safetensors")
save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, "copies.safetensors")
views, copies = load_file("views.safetensors"), load_file("copies.safetensors")
for name, array in arrays.items():
    print(f"{name:20} saved {array.tolist()} read {views[name].tolist()}")

# Expected: what is read equals what was saved.
assert np.array_equal(views["as it was"], basis)
assert all(np.array_equal(copies[name], array) for name, array in arrays.items())
wrong = [name for name, array in arrays.items() if not np.array_equal(views[name], array)]
assert wrong == ["transposed", "every second column", "Fortran order"], f"changed: {wrong}"
assert views["transposed"].shape == (3, 2) and views["transposed"].ravel().tolist() == basis.ravel().tolist()
EOF
