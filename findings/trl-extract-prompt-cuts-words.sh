#!/usr/bin/env bash
# trl 1.16.0: of a pair without a prompt, DPOTrainer and KTOTrainer take the characters that both texts begin with as the prompt. Answers that begin
# alike are cut inside a word, the shared letters end up in the prompt, and the answers that are compared are no words any more. Where the preferred
# text is the beginning of the other, its last letter becomes the answer. Give prompts explicitly, or cut at the last turn or between words yourself.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 datasets==5.2.0 accelerate==1.15.0 numpy==2.3.5
pip install -q --disable-pip-version-check --no-deps trl==1.16.0

python - <<'EOF'
from importlib.metadata import version
from trl import extract_prompt

print("trl", version("trl"))
asked = "\n\nHuman: May I mix bleach and vinegar?\n\nAssistant:"
pairs = {
    "both begin with No": (" No, it makes a poisonous gas.", " Nothing speaks against it."),
    "the preferred text is the other's beginning": (" Never", " Never mind the smell, do it."),
}
for name, (chosen, rejected) in pairs.items():
    got = extract_prompt({"chosen": asked + chosen, "rejected": asked + rejected})
    print(f"{name}:\n  prompt ends with {got['prompt'][-16:]!r}\n  chosen {got['chosen']!r}\n  rejected {got['rejected']!r}")
    # Expected: the prompt ends with 'Assistant:', the answers are whole.
    assert not got["prompt"].endswith("Assistant:"), "changed: the answers stay whole"
    assert got["prompt"] + got["rejected"] == asked + rejected
    last = got
assert got["chosen"] == "r"
EOF
