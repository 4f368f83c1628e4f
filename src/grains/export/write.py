"""Writes an export, loads it back, and compares its logits with our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grains import models, runs, vision
from grains.errors import UserError
from grains.export import card, files, folders
from grains.export.plan import KEEPS_NORM, TEXT, Check, Plan, adding, logits, make
from grains.gguf_files import SUFFIX
from grains.lm import LanguageModel
from grains.settings import EMBEDDED, parse_positions
from grains.steering import SteeringVectors

Readers = dict[str, Callable[..., Tensor]]
WRITERS: dict[str, Callable[[Plan, Path], None]] = {
    "gguf": files.write_gguf,
    "peft": files.write_peft,
    "lm-eval": files.write_lm_eval,
    "hf-bias": folders.write_hf_bias,
    "hf": folders.write_hf,
}
READERS: Readers = {
    "gguf": files.gguf_logits,
    "peft": files.peft_logits,
    "lm-eval": files.lm_eval_logits,
    "hf-bias": folders.hf_bias_logits,
    "hf": folders.hf_logits,
    "gguf-bias": folders.gguf_bias_logits,
}
# How far the logits of what was written may be from ours, as a share of what steering changes.
EXACT, ROUNDED = 0.01, 0.1


def write(
    lm: LanguageModel,
    vectors: SteeringVectors,
    to: str,
    folder: str | Path,
    alpha: float,
    layers: Iterable[int | str] | None = None,
    units: str = "relative",
    *,
    positions: str = "all",
    gguf: str | Path | None = None,
    measured: dict | None = None,
    licence: str | None = None,
    text: str = TEXT,
    overwrite: bool = False,
) -> Check | None:
    """Write vectors at a strength for another program, into a folder with a model card.

    to: see `grains.settings.EXPORTS`. alpha, layers, units: see `SteeringVectors.scaled`.
    positions: those that are steered (see `grains.settings.parse_positions`).
    gguf: for gguf-bias, the model's GGUF file; None: the one that the model was loaded from.
    measured: a row of stage 2's table or of an experiment's, for the card (see `card.measured`).
    licence: of the model, for the card. text: on which logits are compared.
    Returns the differences; None if the folder is there already for the same vectors.
    Raises UserError for what the target cannot hold, and if what was written, loaded again, does
    not give the logits that it should: then nothing is left.
    """
    plan = make(lm, vectors, to, alpha, layers, units, positions)
    writers = dict(WRITERS)
    if to == "gguf-bias":
        source = _model_file(lm, gguf)
        writers[to] = lambda plan, path: folders.write_gguf_bias(plan, path, source)
    manifest = {
        "stage": "export",
        "to": to,
        "configuration": plan.label,
        "added": plan.digest(),
        "model": lm.identity(),
        "vectors": vectors.info,
        "measured": measured,
        "licence": licence,
        "text": text,
        "versions": runs.versions(),
        # Not in the manifests of older exports, which steer all positions.
        **({"positions": positions} if positions != "all" else {}),
    }
    checks: list[Check] = []

    def fill(temporary: Path) -> None:
        writers[to](plan, temporary)
        checks.append(check(plan, to, temporary, text))
        page = card.card(plan, to, checks[0], measured, licence)
        (temporary / "README.md").write_text(page, encoding="utf-8")

    return checks[0] if runs.write_folder(Path(folder), manifest, fill, overwrite) else None


def check(plan: Plan, to: str, folder: Path, text: str) -> Check:
    """Load what was written, and compare logits. Raises UserError if it is not what it should."""
    lm = plan.lm
    ids, more = _inputs(plan, to, text)
    base = logits(lm.model, ids, **more)
    length = _prompt_length(ids)
    image = torch.isin(ids[0, :length].cpu(), torch.tensor([lm.image_token_id or -1]))
    with plan.steer_text(image, ids.shape[1]):
        steered = logits(lm.model, ids, **more)
    expected = steered
    if to not in KEEPS_NORM:
        with adding({lm.layers[layer]: vector for layer, vector in plan.added.items()}):
            expected = logits(lm.model, ids)
    if plan.positions != "all":
        more |= {"prompt_length": torch.tensor([length])}
    loaded = READERS[to](lm, folder, ids, **more)
    result = Check(
        *(_difference(*pair) for pair in ((loaded, expected), (expected, steered), (steered, base)))
    )
    share = EXACT if lm.dtype == torch.float32 else ROUNDED
    if not result.written[1] <= share * result.effect[1]:
        raise UserError(
            f"{lm.name}: what was written for '{to}' changes the logits otherwise (by "
            f"{result.written[1]:.2g} in the mean, steering itself by {result.effect[1]:.2g}): "
            "this model cannot be exported so; nothing is left of it"
        )
    return result


def _inputs(plan: Plan, to: str, text: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The ids (1, T) of the text that logits are compared on, and the forward's other inputs.

    Of a model that reads pictures, the folder is compared on a picture too. A text that is shorter
    than the slice of a prompt that is steered is repeated.
    """
    lm = plan.lm
    if to in KEEPS_NORM and lm.processor is not None:
        inputs = vision.model_inputs(lm, [vision.placeholder(lm) + text], [_picture()])
        return inputs.pop("input_ids"), inputs
    ids = lm.tokenizer(text, return_tensors="pt").input_ids.to(lm.device)
    bounds = parse_positions(plan.positions)
    if isinstance(bounds, slice):
        farthest = max(abs(bound or 0) for bound in (bounds.start, bounds.stop))
        ids = ids.repeat(1, 1 + farthest // _prompt_length(ids))
    if lm.max_positions and ids.shape[1] > lm.max_positions:
        raise UserError(
            f"positions '{plan.positions}': {lm.name} was made for {lm.max_positions} positions"
        )
    return ids, {}


def _prompt_length(ids: Tensor) -> int:
    """How many of the T tokens of a text count as its prompt: three quarters."""
    return 3 * ids.shape[1] // 4


def _picture() -> Image.Image:
    """A picture of coloured stripes."""
    values = np.indices((96, 96)).sum(0)[..., None] * np.array([2, 5, 9]) % 256
    return Image.fromarray(values.astype(np.uint8))


def _difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    gap = (first - second).abs()
    return gap.max().item(), gap.mean().item()


def _model_file(lm: LanguageModel, gguf: str | Path | None) -> Path:
    if gguf is None and lm.name == EMBEDDED:
        return models.embedded_file()
    path = Path(gguf or lm.name)
    if path.suffix != SUFFIX or not path.is_file():
        raise UserError(
            f"'{path}' is no GGUF file: give the model's, to whose copy the biases are added"
        )
    return path
