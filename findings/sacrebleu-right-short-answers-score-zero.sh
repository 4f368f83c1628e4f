#!/usr/bin/env bash
# sacrebleu 2.6.0: corpus_bleu of answers that are all right but shorter than four words is 0.0, while the mean of sentence_bleu over the same answers is
# 100, as only the latter lowers the n-gram order to what is there; one long answer among them lifts the corpus to 100. Steering that makes answers
# shorter seems to destroy them. Use chrF or exact match for short answers, or BLEU(effective_order=True) for each and the mean.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check sacrebleu==2.6.0

python - <<'EOF'
import sacrebleu

print("sacrebleu", sacrebleu.__version__)
short = ["Paris", "in 1969", "the red planet", "yes"]
longer = short + ["it opened in the spring"]
seen = {}
for name, answers in (("short answers", short), ("and a longer one", longer)):
    corpus = sacrebleu.corpus_bleu(answers, [answers]).score
    mean = sum(sacrebleu.sentence_bleu(answer, [answer]).score for answer in answers) / len(answers)
    chrf = sacrebleu.corpus_chrf(answers, [answers]).score
    seen[name] = corpus
    print(f"{name:17} against themselves: corpus_bleu {corpus:.1f}, mean of sentence_bleu {mean:.1f}, corpus_chrf {chrf:.1f}")
    assert round(mean, 6) == 100 and round(chrf, 6) == 100

# Expected: 100, since every answer equals its reference.
assert round(seen["and a longer one"], 6) == 100
assert seen["short answers"] == 0, "changed: short answers count now"
EOF
