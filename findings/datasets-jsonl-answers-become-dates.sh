#!/usr/bin/env bash
# datasets 5.2.0 (with pyarrow 26.0.1): in a JSON Lines file whose quoted answers are all ISO dates, load_dataset("json") gives datetime objects
# instead of the text, also inside lists of choices; one answer in words anywhere in the column and all stay text. Even features that ask for strings
# get "1951-01-05 00:00:00", which is then what a model is scored on. Read the lines with json and use Dataset.from_list instead.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1

cat > dates.jsonl <<'EOF'
{"question": "When did it open?", "answer": "1951-01-05", "choices": ["1951-01-05", "1952-03-04"]}
{"question": "When did they land?", "answer": "1969-07-20", "choices": ["1969-07-20", "1970-01-01"]}
EOF
cat dates.jsonl > mixed.jsonl
echo '{"question": "When is it hot?", "answer": "in summer", "choices": ["in summer", "in winter"]}' >> mixed.jsonl

python - <<'EOF'
import datetime, json, datasets, pyarrow
from datasets import Dataset, Features, List, Value, load_dataset

print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
read = lambda name, **kw: load_dataset("json", data_files=name, split="train", **kw)
dates, mixed = read("dates.jsonl"), read("mixed.jsonl")
print("all answers are dates :", dates.features["answer"], dates[0]["answer"].__repr__(), dates[0]["choices"])
print("one answer is in words:", mixed.features["answer"], repr(mixed[0]["answer"]), mixed[0]["choices"])
print("as a model would see it:", f"A: {dates[0]['answer']}")

# Expected: the first answer of both files is the text '1951-01-05', as JSON says.
assert dates[0]["answer"] == datetime.datetime(1951, 1, 5), "changed: quoted dates stay text now"
assert dates[0]["choices"][0] == datetime.datetime(1951, 1, 5), "changed: quoted dates in lists stay text now"
assert mixed[0]["answer"] == "1951-01-05"
assert f"{dates[0]['answer']}" == "1951-01-05 00:00:00"

text = Features({"question": Value("string"), "answer": Value("string"), "choices": List(Value("string"))})
asked = read("dates.jsonl", features=text)
print("strings asked for     :", asked.features["answer"], repr(asked[0]["answer"]), asked[0]["choices"])
assert asked[0]["answer"] == "1951-01-05 00:00:00", "changed: features of strings give back what was written"

with open("dates.jsonl") as file:
    right = Dataset.from_list([json.loads(line) for line in file])
print("json, then from_list  :", right.features["answer"], repr(right[0]["answer"]))
assert right[0]["answer"] == "1951-01-05"
EOF
