#!/usr/bin/env bash
# datasets 5.2.0: Dataset.from_list and from_generator take the columns of the first row as all there are, and drop every other key of later rows without
# a warning, while load_dataset("json") of the same rows keeps them. Where the first question has no "context" or "image", no question has. Give the
# first row all keys (None where empty), or pass features, and check column_names.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1

python - <<'EOF'
import json, datasets
from datasets import Dataset, load_dataset

print("datasets", datasets.__version__)
rows = [{"question": "What is 2 + 2?"}, {"question": "Who wrote it?", "context": "The play was written by Shakespeare."}]
with open("rows.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)

def give():
    yield from rows

seen = {
    "from_list": Dataset.from_list(rows),
    "from_generator": Dataset.from_generator(give),
    "load_dataset json": load_dataset("json", data_files="rows.jsonl", split="train"),
    "from_list, None in the first row": Dataset.from_list([dict(rows[0], context=None), rows[1]]),
}
for name, table in seen.items():
    print(f"{name:33}", table.column_names, table[1])

# Expected: question and context in all four, or an error.
assert seen["load_dataset json"].column_names == seen["from_list, None in the first row"].column_names == ["question", "context"]
assert seen["from_list"].column_names == seen["from_generator"].column_names == ["question"], "changed: later keys are kept now"
EOF
