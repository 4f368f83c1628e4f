#!/usr/bin/env bash
# datasets 5.2.0: one unquoted number among the answers of a JSON Lines file, and every quoted answer of that column that happens to be valid JSON
# is decoded a second time: "007" comes back as 7, "2.50" as 2.5, "true" as True, "null" as None. An answer that is graded or scored as text is
# then another text, or missing. Quote every value before loading, or read the lines with json.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1

python - <<'EOF'
import json, datasets
from datasets import load_dataset

print("datasets", datasets.__version__)
quoted = ["Paris", "true", "null", "2.50", "1e3", "[1, 2]"]

def read(name, answers):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    return load_dataset("json", data_files=name, split="train")

alone, beside = read("alone.jsonl", quoted), read("beside.jsonl", quoted + [3])
print("written      :", quoted, "and, in the second file, 3")
print("text only    :", alone.features["answer"], alone["answer"][:])
print("with a number:", beside.features["answer"], beside["answer"][:])

# Expected: the quoted answers are the same text in both files.
assert alone["answer"][:] == quoted
got = beside["answer"][:]
assert got == ["Paris", True, None, 2.5, 1000.0, [1, 2], 3], f"changed: {got}"
EOF
