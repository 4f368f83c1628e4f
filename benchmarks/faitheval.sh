#!/usr/bin/env bash
# FaithEval's way from the hub to the tables, without the hub: a stand-in on this machine serves the
# texts of src/data/faithfulness.jsonl in FaithEval's own form (a context, a question, four answers
# with letters), one for each fact. The experiment loads them as `faitheval`; what follows is given
# to it:
#
#   bash benchmarks/faitheval.sh --model_name gemma-3-270m --methods gradient random --seeds 0
#
# PORT: of the stand-in. The figures are of these texts; they are no results on FaithEval.
set -euo pipefail

python=${PYTHON:-python} port=${PORT:-8765}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'kill $! 2>/dev/null || true; rm -rf "$folder"' EXIT

PYTHONPATH=$root "$python" - "$root/src/data/faithfulness.jsonl" "$port" "$folder/ready" <<'END' &
import io, pathlib, random, sys, threading

import pandas as pd
from tests.helpers.hub_stub import Hub

path, port, ready = sys.argv[1:]
texts = pd.read_json(path, lines=True).drop_duplicates("fact")
draw, rows = random.Random(0), []
for text in texts.itertuples():
    named = {text.context_answer, text.common_answer}
    others = texts[texts.topic == text.topic][["context_answer", "common_answer"]].to_numpy()
    answers = [*sorted(named), *draw.sample(sorted({*others.ravel()} - named), 2)]
    draw.shuffle(answers)
    key = "ABCD"[answers.index(text.context_answer)]
    choices = {"label": [*"ABCD"], "text": answers}
    rows.append(
        {"context": text.context, "question": text.question, "choices": choices, "answerKey": key}
    )
table = io.BytesIO()
pd.DataFrame(rows).to_parquet(table)
with Hub(int(port)) as hub:
    files = {"data/test-00000-of-00001.parquet": table.getvalue()}
    hub.add("datasets", "Salesforce/FaithEval-counterfactual-v1.0", files)
    pathlib.Path(ready).touch()
    threading.Event().wait()
END

while [ ! -e "$folder/ready" ]; do
  kill -0 $!
  sleep 0.2
done
HF_ENDPOINT=http://127.0.0.1:$port HF_HOME=$folder/home \
  "$python" "$root/src/experiment.py" --datasets faitheval "$@"
