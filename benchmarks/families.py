"""Which model families are replayed right: tiny random models against their own forwards.

    python benchmarks/families.py        # writes docs/families.md

Every family of benchmarks/zoo.py is built twice. One model is loaded as the scripts load it, the
other stays untouched: what is expected comes from its own forward, one answer at a time, with hooks
of this file. A number in the table is the largest difference from that, in nats, or relative to
the size of what is compared.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
from helpers import tiny  # noqa: E402
from helpers.reference import hooked  # noqa: E402
from torch import Tensor  # noqa: E402

from grains import models, prompts  # noqa: E402
from grains.ablation import hidden_states  # noqa: E402
from grains.attribution import PromptFunction  # noqa: E402
from grains.calls import first_tensor  # noqa: E402
from grains.data import Example  # noqa: E402
from grains.errors import UserError  # noqa: E402
from grains.generation import generate  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.scoring import score  # noqa: E402
from grains.selfcheck import can_pad  # noqa: E402
from grains.steering import Configuration  # noqa: E402

DOCUMENT = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
# Prompts longer than the windows of the models; answers of different lengths.
ASKED = [
    Example("a", "Is glass a slow liquid, as old windows are said to show?", ("No, not", "Yes"), 0),
    Example("b", "Are bats blind?", ("No, they can see", "No, they", "All of them are"), 2),
]
TOKENS = 5
# What counts as the same in fp32, where models differ from themselves by the order of sums.
SAME = 2e-3


@dataclass(frozen=True)
class Family:
    """A family's model as it is loaded here, and the same model untouched."""

    name: str
    lm: LanguageModel
    model: torch.nn.Module

    def encode(self) -> list[Encoded]:
        return [prompts.encode(self.lm, example) for example in ASKED]

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The list of layers of the untouched model: its only one of that length at the top."""
        return next(
            module
            for module in self.model.modules()
            if isinstance(module, torch.nn.ModuleList) and len(module) == zoo.LAYERS
        )


def load(name: str) -> Family:
    """Raises UserError where the family is refused."""
    return Family(name, models.wrap(name, zoo.make(name), tiny.byte_tokenizer()), zoo.make(name))


def direction(layer: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(layer))


def steered(family: Family, layer: int | None) -> AbstractContextManager[None]:
    """The untouched model with `direction` added behind a layer, its norm kept."""

    def steer(states: Tensor) -> Tensor:
        shifted = states + direction(layer, states.shape[-1])
        return shifted * states.norm(dim=-1, keepdim=True) / shifted.norm(dim=-1, keepdim=True)

    return hooked({} if layer is None else {family.layers[layer]: steer})


def own_logits(family: Family, ids: list[int], layer: int | None = None) -> Tensor:
    with torch.no_grad(), steered(family, layer):
        return family.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def picked(logits: Tensor, prompt: int, response: list[int]) -> Tensor:
    """log P of each token of a response from the logits (T, V) of prompt and response."""
    log_probs = logits.log_softmax(-1)[prompt - 1 : -1]
    return log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def own_log_likelihood(
    family: Family, prompt: list[int], response: list[int], layer: int | None = None
) -> float:
    logits = own_logits(family, prompt + response, layer)
    return picked(logits, len(prompt), response).sum().item()


# --- what is compared: each gives the largest difference ---


def scores(family: Family) -> float:
    """Log-likelihoods of all answers of both questions in one batch, base and steered."""
    items, size = family.encode(), family.lm.hidden_size
    steered = (1, zoo.LAYERS - 1)
    grid = [Configuration("x", "", (n,), 1.0, {n: direction(n, size)}) for n in steered]
    results = score(family.lm, items, grid, 2048)
    worst = 0.0
    for item, rows in zip(items, results, strict=True):
        for column, response in enumerate(item.responses):
            for row, layer in enumerate((None, *steered)):
                expected = own_log_likelihood(family, item.prompt_ids, response, layer)
                worst = max(worst, abs(rows[row, column] - expected))
        if not abs(rows[1] - rows[0]).max() > 0.01:
            return float("nan")  # steering does nothing: this check cannot fail
    return worst


def gradients(family: Family) -> float:
    """Gradient of f by the prompt's embeddings, relative to its norm."""
    item = family.encode()[0]
    prompt = len(item.prompt_ids)
    function = PromptFunction(family.lm, item, [1.0, -1.0], 2048)
    _, grads = function.values_and_grads(function.prompt[None])
    expected = torch.zeros_like(grads[0])
    for sign, response in zip((1, -1), item.responses, strict=True):
        entering = []

        def keep(module, args, kwargs, entering=entering):
            entering.append(args[0].detach().requires_grad_())
            return (entering[0], *args[1:]), kwargs

        handle = family.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        ids = torch.tensor([item.prompt_ids + response])
        logits = family.model(input_ids=ids, use_cache=False).logits[0].float()
        handle.remove()
        (gradient,) = torch.autograd.grad(
            sign * picked(logits, prompt, response).sum(), entering[0]
        )
        expected += gradient[0, :prompt]
    return ((grads[0] - expected).norm() / expected.norm()).item()


def states(family: Family) -> float:
    """Last-position hidden states of all layers, relative to their norm."""
    pair = prompts.encode(family.lm, ASKED[1].pair())
    replayed = hidden_states(family.lm, pair, [[4]], 2048)
    worst = 0.0
    for column, response in enumerate(pair.responses):
        read: list[Tensor] = []
        handles = [
            layer.register_forward_hook(
                lambda module, args, output, read=read: read.append(first_tensor(output)[0, -1])
            )
            for layer in family.layers
        ]
        own_logits(family, pair.prompt_ids + response)
        for handle in handles:
            handle.remove()
        expected = torch.stack(read)
        difference = replayed.last[0, column, 1:] - expected
        worst = max(worst, (difference.norm() / expected.norm()).item())
    return worst


def ablation(family: Family) -> float:
    """Log-likelihoods with two words replaced, against the prompt with the pad token in place.

    NaN for layers that also take embeddings of the token ids, which stay those of the words.
    """
    pair = prompts.encode(family.lm, ASKED[0].pair())
    if any("per_layer" in name for name, _ in family.model.named_modules()):
        return float("nan")
    ablated = hidden_states(family.lm, pair, [[3, 7]], 2048).log_likelihoods[1].tolist()
    ids = list(pair.prompt_ids)
    ids[3] = ids[7] = family.lm.replacement_id("pad")
    expected = [own_log_likelihood(family, ids, response) for response in pair.responses]
    return max(abs(a - b) for a, b in zip(ablated, expected, strict=True))


def generation(family: Family) -> float:
    """Share of greedy texts, base and steered in one batch, that differ from one at a time."""
    items, size = family.encode(), family.lm.hidden_size
    item = Configuration("x", "", (2,), 1.0, {2: direction(2, size)})
    texts = generate(family.lm, items, [item], TOKENS)
    different = 0
    for row, layer in enumerate((None, 2)):
        for item, text in zip(items, texts[row], strict=True):
            ids = list(item.prompt_ids)
            for _ in range(TOKENS):
                ids.append(int(own_logits(family, ids, layer)[-1].argmax()))
                if ids[-1] == family.lm.tokenizer.eos_token_id:
                    break
            written = ids[len(item.prompt_ids) :]
            expected = family.lm.tokenizer.decode(written, skip_special_tokens=True).strip()
            different += text != expected
    return different / (2 * len(items))


CHECKS = {check.__name__: check for check in (scores, gradients, states, ablation, generation)}


def row(name: str) -> list[str]:
    """A line of the table."""
    try:
        family = load(name)
    except UserError as error:
        return [name, "refused", *[""] * len(CHECKS), str(error)]
    lm = family.lm
    ways = ["packed" if lm.packs else "one by one" if lm.batches else "one by one, a row at a time"]
    ways += ["own head"] * lm.own_head + ["own embeddings"] * lm.own_embeddings
    ways += ["equal lengths decoded"] * (not can_pad(lm))
    cells = [f"{check(family):.0e}".replace("nan", "-") for check in CHECKS.values()]
    return [name, "right" if _is_right(cells) else "WRONG", *cells, ", ".join(ways)]


def _is_right(cells: list[str]) -> bool:
    return all(cell == "-" or float(cell) <= SAME for cell in cells)


def main() -> None:
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, fp32, CPU; "
        f"{zoo.LAYERS} layers, windows and chunks of {zoo.WINDOW} tokens.",
        "",
        "| family | verdict | " + " | ".join(CHECKS) + " | how it is replayed |",
        "|" + "---|" * (3 + len(CHECKS)),
    ]
    for name in zoo.FAMILIES:
        lines.append("| " + " | ".join(row(name)) + " |")
        print(lines[-1], flush=True)
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text("\n".join([before + BEGIN, *lines, END]) + after, encoding="utf-8")
    print(f"table: {DOCUMENT}")


if __name__ == "__main__":
    main()
