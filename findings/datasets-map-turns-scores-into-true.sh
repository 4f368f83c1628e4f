#!/usr/bin/env bash
# datasets 5.2.0: where map replaces a column, new values are cast to the old column's type if they can be, without a warning: scores 0.7 and 3 written
# over a boolean column both become True, texts "false" and "0" False, and "007" over a column of whole numbers 7. A judge's ratings kept under the
# name of a yes/no column are lost. Write them to a column of a new name, or remove the old one in the same map (remove_columns).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1

python - <<'EOF'
import datasets
from datasets import Dataset

print("datasets", datasets.__version__)
table = Dataset.from_dict({"right": [True, False], "answer": [1, 2], "share": [0.5, 0.25]})
seen = {}
for column, value in (("right", 0.7), ("right", 3), ("right", "false"), ("right", "0"), ("right", "maybe"), ("answer", "007"), ("answer", 0.7), ("share", "1e3")):
    over = table.map(lambda row: {column: value})
    beside = table.map(lambda row: {"new": value})
    seen[column, value] = over[column][0]
    print(f"{value!r:8} written over {table.features[column].dtype:8}: {over[column][0]!r:8} as a new column: {beside['new'][0]!r}")
    assert beside["new"][0] == value

# Expected: what the function returned, as in a new column.
assert seen["right", "maybe"] == "maybe" and seen["answer", 0.7] == 0.7
lost = {("right", 0.7): True, ("right", 3): True, ("right", "false"): False, ("right", "0"): False, ("answer", "007"): 7, ("share", "1e3"): 1000.0}
assert all(type(seen[key]) is type(value) and seen[key] == value for key, value in lost.items()), f"changed: {seen}"
renamed = table.map(lambda row: {"rating": 0.7}, remove_columns="right")
assert renamed["rating"][0] == 0.7
EOF
