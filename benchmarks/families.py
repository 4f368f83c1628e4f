"""Which model families are replayed right: tiny random models against their own forwards.

    python benchmarks/families.py [FAMILY ...]      # writes docs/families.md

Every family of benchmarks/zoo.py is built, and copied. One model is loaded as the scripts load it,
the other stays untouched: what is expected comes from its own forward, one answer at a time, with
hooks of this file. A number in the table is the largest difference from that, in nats, or relative
to the size of what is compared. What is measured is kept in ROWS, so that a run that is stopped
goes on where it was; with other code or libraries it begins anew.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import transformers  # noqa: E402
import zoo  # noqa: E402
from helpers import picture_families, tiny, vlm_models  # noqa: E402
from helpers.reference import hooked  # noqa: E402
from PIL.Image import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from grains import models, prompts, vision  # noqa: E402
from grains.ablation import hidden_states  # noqa: E402
from grains.attribution import PromptFunction  # noqa: E402
from grains.calls import first_tensor  # noqa: E402
from grains.cli import documents  # noqa: E402
from grains.data import Example  # noqa: E402
from grains.errors import UserError  # noqa: E402
from grains.generation import generate  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.replay import capture, extend  # noqa: E402
from grains.scoring import score  # noqa: E402
from grains.selfcheck import can_pad, check_decoding  # noqa: E402
from grains.steering import Configuration  # noqa: E402

DOCUMENT = ROOT / "docs" / "families.md"
ROWS = ROOT / "benchmarks" / "families.jsonl"  # what is measured so far; git ignores it
SECONDS = 120  # for a family
# Prompts longer than the windows of the models; answers of different lengths.
ASKED = [
    Example("a", "Is glass a slow liquid, as old windows are said to show?", ("No, not", "Yes"), 0),
    Example("b", "Are bats blind?", ("No, they can see", "No, they", "All of them are"), 2),
]
TOKENS = 4
# Families whose models and processors tests/helpers/vlm_models.py makes; pictures that are painted.
BY_TYPE = {"llava_next": "llava-next", "qwen2_5_vl": "qwen2.5-vl", "gemma3": "gemma-3"}
SHAPES = [(84, 84), (160, 90), (120, 60), (40, 120), (18, 15)]
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
        """The layers of the untouched model."""
        name = next(n for n, module in self.lm.model.named_modules() if module is self.lm.layers)
        return self.model.get_submodule(name)


def load(name: str) -> Family:
    """Raises UserError where the family is refused."""
    model = zoo.make(name)
    untouched = copy.deepcopy(model)
    return Family(name, models.wrap(name, model, tiny.byte_tokenizer()), untouched)


def direction(layer: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(layer))


def steered(family: Family, layer: int | None) -> AbstractContextManager[None]:
    """The untouched model with `direction` added behind a layer, its norm kept.

    Hidden states that a token has side by side are steered as one.
    """
    lm = family.lm

    def steer(states: Tensor) -> Tensor:
        sizes, of_a_token = [1] * states.dim(), [-1]
        sizes[-1] = -1
        if lm.streams:
            place, sizes[lm.streams[0]] = lm.streams
            of_a_token.append(place)
        shifted = states + direction(layer, lm.hidden_size).view(sizes)
        before, after = (some.norm(dim=of_a_token, keepdim=True) for some in (states, shifted))
        return shifted * before / after

    return hooked({} if layer is None else {family.layers[layer]: steer})


def own_logits(
    family: Family, ids: list[int], prompt: int, layer: int | None = None, grad: bool = False
) -> Tensor:
    """Logits (T, V) of a sequence whose first `prompt` tokens are the prompt."""
    inputs = {"input_ids": torch.tensor([ids])}
    if family.lm.marks_prompts:
        inputs["token_type_ids"] = (torch.arange(len(ids)) >= prompt).long()[None]
    with torch.set_grad_enabled(grad), steered(family, layer):
        return family.model(**inputs, use_cache=False).logits[0].float()


def picked(logits: Tensor, prompt: int, response: list[int]) -> Tensor:
    """log P of each token of a response from the logits (T, V) of prompt and response."""
    log_probs = logits.log_softmax(-1)[prompt - 1 : -1]
    return log_probs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def own_log_likelihood(
    family: Family, prompt: list[int], response: list[int], layer: int | None = None
) -> float:
    logits = own_logits(family, prompt + response, len(prompt), layer)
    return picked(logits, len(prompt), response).sum().item()


# --- what is compared: each gives the largest difference ---


def scores(family: Family) -> float:
    """Log-likelihoods of all answers of both questions in one batch."""
    items = family.encode()
    results = score(family.lm, items, [], 2048)
    return max(
        abs(rows[0, column] - own_log_likelihood(family, item.prompt_ids, response))
        for item, rows in zip(items, results, strict=True)
        for column, response in enumerate(item.responses)
    )


def steered_scores(family: Family) -> float:
    """Log-likelihoods of all answers of both questions in one batch, three layers in turn."""
    items, size = family.encode(), family.lm.hidden_size
    count = len(family.lm.layers)
    layers = (0, count // 2, count - 1)  # what is above the first is computed again for the others
    grid = [Configuration("x", "", (n,), 1.0, {n: direction(n, size)}) for n in layers]
    results = score(family.lm, items, grid, 2048)
    worst = 0.0
    for item, rows in zip(items, results, strict=True):
        for column, response in enumerate(item.responses):
            for row, layer in enumerate(layers):
                expected = own_log_likelihood(family, item.prompt_ids, response, layer)
                worst = max(worst, abs(rows[1 + row, column] - expected))
        if not abs(rows[1:] - rows[0]).max() > 0.01:
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
        logits = own_logits(family, item.prompt_ids + response, prompt, grad=True)
        handle.remove()
        (gradient,) = torch.autograd.grad(
            sign * picked(logits, prompt, response).sum(), entering[0]
        )
        expected += family.lm.joined(gradient)[0, :prompt]
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
                lambda module, args, output, read=read: read.append(
                    family.lm.joined(first_tensor(output))[0, -1]
                )
            )
            for layer in family.layers
        ]
        own_logits(family, pair.prompt_ids + response, len(pair.prompt_ids))
        for handle in handles:
            handle.remove()
        expected = torch.stack(read)
        difference = replayed.last[0, column, 1:] - expected
        worst = max(worst, (difference.norm() / expected.norm()).item())
    return worst


def ablation(family: Family) -> float:
    """Log-likelihoods with two words replaced, against the prompt with the pad token in place.

    Nothing is compared for layers that also take embeddings of the token ids, which stay those of
    the words.
    """
    pair = prompts.encode(family.lm, ASKED[0].pair())
    if takes_ids(family):
        return 0.0
    ablated = hidden_states(family.lm, pair, [[3, 7]], 2048).log_likelihoods[1].tolist()
    ids = list(pair.prompt_ids)
    ids[3] = ids[7] = family.lm.replacement_id("pad")
    expected = [own_log_likelihood(family, ids, response) for response in pair.responses]
    return max(abs(a - b) for a, b in zip(ablated, expected, strict=True))


def takes_ids(family: Family) -> bool:
    """Whether the layers also take embeddings of the token ids (Gemma-3n, Gemma-4)."""
    return any("per_layer" in name for name, _ in family.model.named_modules())


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
                logits = own_logits(family, ids, len(item.prompt_ids), layer)
                ids.append(int(logits[-1].argmax()))
                if ids[-1] == family.lm.tokenizer.eos_token_id:
                    break
            written = ids[len(item.prompt_ids) :]
            expected = family.lm.tokenizer.decode(written, skip_special_tokens=True).strip()
            different += text != expected
    return different / (2 * len(items))


def largest(*differences: float) -> float:
    """NaN if one is: `max` would pass over it."""
    return float(torch.tensor(differences).max())


def attribution(family: Family) -> float:
    """The worst of `gradients` and `ablation`."""
    return largest(gradients(family), ablation(family))


def steering(family: Family) -> float:
    """The worst of `steered_scores` and `states`."""
    return largest(steered_scores(family), states(family))


def pictured_scores(name: str) -> float:
    """Log-likelihoods of answers about two pictures of other shapes in one batch."""
    lm, model = wrapped(name), pictured(name)
    shown = (vlm_models.picture(160, 90), vlm_models.picture(40, 120, seed=1))
    items = [prompts.encode(lm, vlm_models.asked(image), "plain") for image in shown]
    worst = 0.0
    for item, rows in zip(items, score(lm, items, [], 2048), strict=True):
        prompt = len(item.prompt_ids)
        for column, response in enumerate(item.responses):
            with torch.no_grad():
                logits = (
                    model(**extend(item.inputs, response, lm.marks_prompts), use_cache=False)
                    .logits[0]
                    .float()
                )
            expected = picked(logits, prompt, response).sum().item()
            worst = max(worst, abs(rows[0, column] - expected))
    return worst


def pictured(name: str) -> torch.nn.Module:
    """A family's untouched model that takes pictures."""
    if name in BY_TYPE:
        return vlm_models.parts(BY_TYPE[name])[0]
    return picture_families.parts(name)[0]


def wrapped(name: str, local: bool = False) -> LanguageModel:
    """The same as it is loaded, with its real processor.

    local: without attention in its vision tower, so that a token shows its own patch alone.
    """
    if name in BY_TYPE:
        return vlm_models.make(BY_TYPE[name], local=local)
    return picture_families.make(name, local)


def boxes(name: str) -> str:
    """In how many of SHAPES the token that changes most with a painted spot has it in its box."""
    lm = wrapped(name, local=True)
    right, tried = 0, 0
    for width, height in SHAPES:
        plain, inputs = seen(lm, vlm_models.with_object((width, height), ()))
        places = vision.token_boxes(lm, inputs, (width, height), len(plain))
        if not any(places):
            return "none"
        for x, y in ((0.1, 0.15), (0.5, 0.5), (0.85, 0.8)):
            spot = (x * width, y * height, x * width + width / 12, y * height + height / 12)
            if name in ("llava", "vipllava") and not any(_meet(box, spot) for box in places):
                continue  # outside of the square that it sees
            box = tuple(map(round, spot))
            shown, _ = seen(lm, vlm_models.with_object((width, height), box))
            most = int((shown - plain).norm(dim=-1).argmax())
            tried += 1
            right += _meet(places[most], spot)
    return f"{right} of {tried}"


def _meet(box: vision.Box | None, spot: vision.Box) -> bool:
    return box is not None and all(
        min(box[2 + axis], spot[2 + axis]) - max(box[axis], spot[axis]) > -1 for axis in (0, 1)
    )


def seen(lm: LanguageModel, image: Image) -> tuple[Tensor, dict]:
    """(image tokens, D) what the decoder sees of a picture, and the model's inputs."""
    item = prompts.encode(lm, vlm_models.asked(image), "plain")
    return capture(lm, item.inputs).embeds[0, item.image], item.inputs


def picture_cells(name: str, cells: dict[str, str]) -> None:
    """Add what is measured with pictures to a family's cells."""
    known = name in BY_TYPE or name in picture_families.FAMILIES
    if not known or not picture_families.available(name):
        cells["boxes"] = "not tried"
        return
    try:
        worst = max(float(cells["scores"]), pictured_scores(name))
        cells |= {"scores": f"{worst:.0e}", "boxes": boxes(name)}
    except UserError as error:
        cells["boxes"] = "refused"
        cells["note"] = "with a picture: " + one_line(error).removeprefix(f"tiny-{name}: ")


CHECKS = {check.__name__: check for check in (scores, attribution, steering, generation)}


# --- the table ---


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """TimeoutError in the block when the seconds are over."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: Exception) -> str:
    """The error's text as it stands in a cell."""
    return " ".join(f"{error}".split()).replace("|", "/")[:200] or type(error).__name__


def row(name: str) -> dict[str, str]:
    """A line of the table: loads, how it is replayed, a cell for each check, a note."""
    with limited(SECONDS):
        try:
            untouched = zoo.make(name)
        except Exception as error:
            return {"loads": "not built", "note": f"{type(error).__name__}: {one_line(error)}"}
        try:
            own = own_forward(untouched)
        except Exception as error:
            reason = f"its own forward fails on words: {type(error).__name__}: {one_line(error)}"
            return {"loads": "not built", "note": reason}
        if not own.isfinite().all():
            return {"loads": "not built", "note": "its own forward gives NaN with random weights"}
        try:
            family = load(name)
        except UserError as error:
            return {"loads": "refused", "note": one_line(error).removeprefix(f"{name}: ")}
        cells = {"loads": "yes", "replay": replayed(family.lm), "note": notes(family)}
        for title, check in CHECKS.items():
            try:
                cells[title] = f"{check(family):.0e}"
            except UserError as error:
                cells[title] = "refused"
                cells["note"] = one_line(error).removeprefix(f"{name}: ")
        if name in zoo.picture_families():
            picture_cells(name, cells)
    return cells


def own_forward(model: torch.nn.Module) -> Tensor:
    """The untouched model's logits of a few words."""
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits


def replayed(lm: LanguageModel) -> str:
    ways = ["packed" if lm.packs else "rows" if lm.batches else "rows, one at a time"]
    ways += ["own head"] * lm.own_head + ["own embeddings"] * lm.own_embeddings
    return ", ".join(ways)


def notes(family: Family) -> str:
    try:
        check_decoding(family.lm)
        texts = ["equal lengths decoded"] * (not can_pad(family.lm))
    except UserError:  # the check of generation says why
        texts = []
    texts += ["its layers take the token ids too"] * takes_ids(family)
    return ", ".join(texts)


def verdict(cells: dict[str, str]) -> str:
    """yes, refused, not built; WRONG for a value that differs, TRACEBACK for an exception."""
    numbers = [cells[title] for title in CHECKS if cells.get(title, "refused") != "refused"]
    wrong = any(not float(number) <= SAME for number in numbers)
    return "WRONG" if wrong else cells["loads"]


def table(rows: dict[str, dict[str, str]], known: dict[str, str]) -> list[str]:
    titles = ["family", "known as", "loads", "packed or rows", *CHECKS, "boxes", "note"]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, cells in rows.items():
        middle = [cells.get(title, "") for title in ("replay", *CHECKS, "boxes", "note")]
        lines.append("| " + " | ".join([name, known.get(name, ""), verdict(cells), *middle]) + " |")
    return lines


def measured_with() -> dict[str, str]:
    """What the rows depend on: the libraries and the code."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("src/grains/*.py"), *ROOT.glob("benchmarks/*zoo*.py")]):
        digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "code": digest.hexdigest()[:16],
    }


def measure(names: list[str], measured: Callable[[str], dict[str, str]]) -> dict[str, dict]:
    """The rows of these families; those that the last run measured with the same code are kept."""
    header = measured_with()
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    known = [json.loads(line) for line in lines]
    rows = {item["family"]: item["cells"] for item in known[1:]} if known[:1] == [header] else {}
    with ROWS.open("a" if rows else "w", encoding="utf-8") as file:
        if not rows:
            print(json.dumps(header), file=file, flush=True)
        for name in names:
            if name in rows:
                continue
            try:
                rows[name] = measured(name)
            except Exception as error:
                text = f"{type(error).__name__}: {one_line(error)}"
                rows[name] = {"loads": "TRACEBACK", "note": text}
            print(json.dumps({"family": name, "cells": rows[name]}), file=file, flush=True)
            print(f"{name}: {verdict(rows[name])} {rows[name]}", flush=True)
    return {name: rows[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="measure these alone and write no document")
    names = parser.parse_args().families
    transformers.logging.set_verbosity_error()
    if names:
        for name in names:
            print(name, row(name))
        return
    rows = measure(zoo.text_families() + zoo.picture_families(), row)
    built = {name: cells for name, cells in rows.items() if cells["loads"] != "not built"}
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, fp32, CPU; "
        f"{zoo.LAYERS} layers, windows and chunks of {zoo.WINDOW} tokens.",
        "",
        *table(built, zoo.KNOWN),
    ]
    documents.write_between(DOCUMENT, "families", lines)
    print(f"table: {DOCUMENT}")


if __name__ == "__main__":
    main()
