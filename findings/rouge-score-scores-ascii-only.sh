#!/usr/bin/env bash
# rouge_score 0.1.2: its default tokenizer deletes every character but a-z and 0-9, so an answer in Russian or Chinese scores 0 against itself, and
# answers that differ only in deleted characters ("-5" and "5", "C++" and "C", "Łódź" and "d") score 1. A steered model that changes language or sign
# seems much worse, or unchanged. Pass tokenizer= an object with a tokenize method of your own, and score each reference against itself first.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check rouge-score==0.1.2

python - <<'EOF'
from importlib.metadata import version
from rouge_score import rouge_scorer

print("rouge-score", version("rouge-score"))

class Words:
    def tokenize(self, text):
        return text.lower().split()

plain, words = rouge_scorer.RougeScorer(["rouge1"]), rouge_scorer.RougeScorer(["rouge1"], tokenizer=Words())
score = lambda scorer, one, other: round(scorer.score(one, other)["rouge1"].fmeasure, 3)
same = {text: (score(plain, text, text), score(words, text, text)) for text in ("Paris", "Москва", "巴黎 是 首都", "भारत")}
different = {pair: (score(plain, *pair), score(words, *pair)) for pair in (("-5", "5"), ("C++", "C"), ("Łódź", "d"), ("café", "caf"))}
for key, (default, own) in (same | different).items():
    print(f"{str(key):22} default tokenizer {default}, words {own}")

# Expected: 1 for a text against itself, less than 1 for two different answers.
assert same.pop("Paris") == (1, 1)
assert all(pair == (0, 1) for pair in same.values()), "changed: other scripts count now"
assert all(pair == (1, 0) for pair in different.values()), "changed: these differ now"
EOF
