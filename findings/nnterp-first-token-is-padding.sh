#!/usr/bin/env bash
# nnterp 1.3.0 with nnsight 0.7.0 and transformers 5.20.2: model.steer(..., token_positions=0), which its README gives for "first token only" with two prompts
# in a batch, adds the vector at column 0; shorter prompts are padded on the left, so theirs lands on padding, which nothing reads, and they are answered
# unsteered, without an error. (Its helper that collects activations refuses positive positions with left padding.) Also, within model.generate a plain
# model.steer, by its docstring at all positions, steers the prompt alone. Count positions from the end, or trace one prompt at a time, and steer new
# tokens under `with tracer.all():`.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 nnsight==0.7.0 nnterp==1.3.0

cat > steer.py <<'EOF'
from importlib.metadata import metadata, version
import torch, transformers
from nnterp import StandardizedTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print("nnterp", version("nnterp"), "nnsight", version("nnsight"), "transformers", transformers.__version__)
readme = metadata("nnterp").get_payload() or metadata("nnterp")["Description"]
assert "token_positions=0)  # first token only" in readme

torch.manual_seed(0)
prompts = ["Hello, how are you?", "Goodbye, world!"]
words = "[PAD] [EOS] Hello Goodbye how are you world , ? !".split()
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]").save_pretrained("tiny")
config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=len(words))
LlamaForCausalLM(LlamaConfig(**config, pad_token_id=0, eos_token_id=1, bos_token_id=None)).save_pretrained("tiny")
model = StandardizedTransformer("tiny", device_map="cpu", dispatch=True)
vector = torch.linspace(-2, 2, 32)


def last_logits(texts, **steered):
    with torch.no_grad(), model.trace(texts):
        if steered:
            model.steer(layers=1, steering_vector=vector, **steered)
        logits = model.logits.save()
    return logits[:, -1]


def change(texts, **steered):
    return [round(value, 4) for value in (last_logits(texts, **steered) - last_logits(texts)).abs().amax(1).tolist()]


def generated(intervene):
    with torch.no_grad(), model.generate("Hello, how", max_new_tokens=3, do_sample=False, eos_token_id=None) as tracer:
        intervene(tracer)
        ids = model.generator.output.save()
    return ids[0].tolist()


def once(tracer):
    model.steer(layers=1, steering_vector=vector)


def at_every_step(tracer):
    with tracer.all():
        model.steer(layers=1, steering_vector=vector)


def by_hook(new_tokens_too):
    handle = model._model.model.layers[1].register_forward_hook(
        lambda module, args, output: output + vector if new_tokens_too or output.shape[1] > 1 else output
    )
    ids = model._model.generate(torch.tensor([[2, 8, 4]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    handle.remove()
    return ids[0].tolist()


alone = [change([prompt], token_positions=0)[0] for prompt in prompts]
together = change(prompts, token_positions=0)
print("tokens of the prompts:", [len(model.tokenizer(prompt).input_ids) for prompt in prompts])
print("change of the next token's logits, token_positions=0, each prompt alone:", alone)
print("change of the next token's logits, token_positions=0, both in a batch  :", together)
print("generated, steer          :", generated(once), "a hook on the prompt alone:", by_hook(False))
print("generated, steer in all() :", generated(at_every_step), "a hook on every token     :", by_hook(True))

# Expected: the first token of both prompts is steered, or an error; and all positions of a generation.
assert min(alone) > 0.01 and together[0] > 0.01
assert together[1] == 0, "changed: the shorter prompt is steered too"
assert generated(at_every_step) == by_hook(True) != by_hook(False)
assert generated(once) == by_hook(False), "changed: new tokens are steered too"
EOF
python steer.py
