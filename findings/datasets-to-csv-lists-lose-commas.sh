#!/usr/bin/env bash
# datasets 5.2.0: Dataset.to_csv writes a list as NumPy prints it: no commas between the answers of a question, and of more than 1,000 items only the
# first and last three. It is no JSON, and as a Python literal ['yes' 'no'] is one text, "yesno". Nothing warns, and load_dataset("csv") gives back
# that text. Write lists with to_json or to_parquet.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check datasets==5.2.0 pandas==2.3.3 numpy==2.3.5

python - <<'EOF' 2> >(grep -v "split" >&2)
import ast, csv, json
import datasets, numpy, pandas

print("datasets", datasets.__version__, "pandas", pandas.__version__, "numpy", numpy.__version__)
answers = ["It's a myth", "the Moon", "cheese"]
rows = datasets.Dataset.from_list([{"question": "What is it made of?", "choices": answers, "ids": list(range(1500))}])
rows.to_csv("rows.csv")
with open("rows.csv", newline="") as file:
    (row,) = csv.DictReader(file)
print("choices in the file:", row["choices"])
print("1,500 numbers in the file:", row["ids"])
again = datasets.load_dataset("csv", data_files="rows.csv", split="train")[0]["choices"]
print("as load_dataset gives it back:", type(again).__name__, again)
print("as a Python literal:", ast.literal_eval(row["choices"]))
# Expected: something that gives the three answers back.
try:
    json.loads(row["choices"])
    raise SystemExit("changed: lists are JSON now")
except json.JSONDecodeError:
    pass
assert ast.literal_eval(row["choices"]) == ["".join(answers)] and "..." in row["ids"]
rows.to_json("rows.jsonl")
assert datasets.load_dataset("json", data_files="rows.jsonl", split="train")[0]["choices"] == answers
EOF
