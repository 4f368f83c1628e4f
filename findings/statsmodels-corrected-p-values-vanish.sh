#!/usr/bin/env bash
# statsmodels 0.15.0: one NaN among the p-values (what scipy's ttest_rel gives where two models answer all alike) makes multipletests with fdr_bh, fdr_by
# and simes-hochberg return NaN for every corrected value, yet reject=True for some, while holm and bonferroni return values and count the NaN as a
# test. A table of configurations then calls something significant that has no p-value. Drop NaN before correcting.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check statsmodels==0.15.0 scipy==1.17.1 numpy==2.4.6 pandas==3.1.1

python -W ignore - <<'EOF'
import numpy as np, scipy, statsmodels
from scipy.stats import ttest_rel
from statsmodels.stats.multitest import multipletests

print("statsmodels", statsmodels.__version__, "scipy", scipy.__version__)
base = np.array([0.0, 1, 0, 1, 1, 0])
same = ttest_rel(base, base).pvalue
print("p-value of two models that answer alike:", same)
assert np.isnan(same)
values = np.array([0.001, 0.02, same, 0.03])
seen = {}
for method in ("fdr_bh", "fdr_by", "simes-hochberg", "holm", "bonferroni"):
    reject, corrected = multipletests(values, method=method)[:2]
    without = multipletests(values[~np.isnan(values)], method=method)[1]
    seen[method] = reject.tolist(), corrected
    print(f"{method:15} reject {reject.tolist()} corrected {corrected.round(4).tolist()}; without the NaN {without.round(4).tolist()}")

# Expected: corrected values for the three others, or an error.
for method in ("fdr_bh", "fdr_by", "simes-hochberg"):
    reject, corrected = seen[method]
    assert np.isnan(corrected).all() and reject[0] is True, f"changed: {method}"
for method in ("holm", "bonferroni"):
    assert np.isclose(seen[method][1][0], 0.004), f"changed: {method}"
EOF
