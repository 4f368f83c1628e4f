"""Stage 1: attribute the prompt's tokens, ablate the selected ones, keep the hidden states.

For every steering example (a prompt with a preferred and a dispreferred answer) the prompt's
tokens are attributed once. For each selection its k tokens are ablated. The hidden states of all
layers at the last position are kept, plain and ablated (paper, section 3.1).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from grains import ablation, data, manifests, prompts, runs
from grains.attribution import Attribution, attribute, attributed_positions
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.settings import NO_ATTRIBUTION, AblationSettings, DataSettings
from grains.states import NEG, NEG_ABLATED, POS, POS_ABLATED, stored

IMAGE_COLUMNS = (
    "positive_share_image",
    "positive_share_text",
    "negative_share_image",
    "negative_share_text",
    "image_positions",
    "image_boxes",
)
# Attributions by all that they depend on, so that runs with other selections need not repeat them.
Known = dict[tuple, list[Attribution]]


def run(
    lm: LanguageModel,
    examples: list[Example],
    source: DataSettings,
    settings: AblationSettings,
    attributions: Path,
    states: dict[str, Path],
    overwrite: bool = False,
    known: Known | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> bool:
    """Run stage 1 on examples with two answers each; one example is a resumable unit.

    source: where the examples come from, for the manifest.
    attributions: the CSV to write. states: selection -> the file of hidden states to write.
    overwrite: replace results of other settings.
    known: attributions of earlier runs in this process; new ones are added.
    say: takes a line that users should read.
    Returns False if the results of exactly this run exist already.
    Raises UserError for an example that the model cannot take, and as `runs.Run` does.
    """
    attributes = settings.attribution.grad_method != NO_ATTRIBUTION
    if not attributes and settings.tops != ("pos",):
        raise UserError(
            f"grad_method {NO_ATTRIBUTION} ablates nothing, so there is a single file of states, "
            f"pos: found the selections {', '.join(settings.tops)}; give another grad_method, or "
            "methods that need no ablation"
        )
    # A bad example should end the run now and not after days. Pictures would fill the memory, so
    # they are read again.
    state = runs.processes()
    own = range(state.process_index, len(examples), state.num_processes)
    read: dict[int, Encoded] = {}
    for unit in tqdm(own, "reading examples", leave=False, disable=not state.is_main_process):
        read[unit] = prompts.encode(lm, examples[unit], settings.prompt).without_picture()
    counts = runs.summed(prompts.tally(read.values()))
    for line in prompts.notes(counts):
        say(line)

    def encoded(unit: int) -> Encoded:
        if examples[unit].image is None:
            return read[unit]
        return prompts.encode(lm, examples[unit], settings.prompt)

    manifest = manifests.stage1(lm, examples, source, settings, counts)
    arrays = len(stored(attributes))
    size = arrays * (len(lm.layers) + 1) * lm.hidden_size * 4 * len(examples) * len(settings.tops)
    groups = ablation.batches_in_order([read[unit].length for unit in own], settings.batch_tokens)
    group_of = {own[index]: [own[i] for i in group] for group in groups for index in group}
    ready: dict[int, runs.Unit] = {}

    def make(unit: int) -> runs.Unit:
        if attributes:
            return one_example(lm, encoded(unit), settings, unit, {} if known is None else known)
        if unit not in ready:  # the units come in order, and so do the groups
            ready.clear()
            items = [encoded(member) for member in group_of[unit]]
            ready.update(zip(group_of[unit], plain(lm, items, settings), strict=True))
        return ready[unit]

    def write(units: runs.Units) -> None:
        for top, path in states.items():
            runs.write_stacked(
                path,
                {
                    name: f"{name}.{top}" if name in (POS_ABLATED, NEG_ABLATED) else name
                    for name in stored(attributes)
                },
                lambda: (tensors for tensors, _ in units()),
                len(examples),
                manifest | {"top": top},
            )
        runs.write_rows(attributions, (rows for _, rows in units()))

    return runs.resume(
        [attributions, *states.values()],
        manifest | {"top": list(settings.tops)},
        len(examples),
        make,
        write,
        "token ablation",
        overwrite,
        2 * size,
        inputs=[source.path],
    )


def one_example(
    lm: LanguageModel, encoded: Encoded, settings: AblationSettings, unit: int, known: Known
) -> runs.Unit:
    """Attribute and ablate one example, and read its hidden states.

    unit: the number of the example, from which its randomness is seeded.
    known: see `run`.
    Returns the tensors, (L+1, D) each but norms (L+1,), and a row of the CSV for each selection.
    Raises UserError if nothing is left to ablate, or for NaN or infinite hidden states.
    """
    attribution, tops = settings.attribution, settings.tops
    seed = settings.seed * 1_000_003 + unit
    noise, generator = (torch.Generator().manual_seed(seed) for _ in range(2))
    key = (
        data.question_key(encoded.example),
        data.fingerprint([encoded.example]),
        attribution,
        settings.prompt,
        settings.batch_tokens,
        attribution.grad_method == "smoothgrad" and seed,
    )
    if key not in known:
        known[key] = attribute(lm, encoded, attribution, settings.batch_tokens, noise)
    attributions = known[key]
    kinds = {"all": encoded.words | encoded.image, "image": encoded.image, "text": encoded.words}
    candidates = attributed_positions(encoded, attribution.attribute) & kinds[settings.ablate]
    if not candidates.any():
        raise UserError(
            f"example {encoded.example.id}: no position is left to ablate with "
            f"attribute {attribution.attribute} and ablate {settings.ablate}"
        )

    # Contrastive: one selection for both responses. Normal: one for each.
    chosen = {
        top: [
            ablation.select(
                torch.from_numpy(item.scores), candidates, settings.top_k, top, generator
            )
            for item in attributions
        ]
        for top in tops
    }
    variants = [positions for top in tops for positions in chosen[top]]
    states = ablation.hidden_states(
        lm,
        encoded,
        variants,
        settings.batch_tokens,
        settings.replacement,
        settings.image_replacement,
    )
    _check_finite(lm, encoded, states.last, states.log_likelihoods)
    tensors = _shared_tensors(states)
    rows = []
    tokens = lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids)
    pos_plain, neg_plain = states.log_likelihoods[0].tolist()
    for index, top in enumerate(tops):
        first = 1 + index * len(attributions)
        last = first + len(attributions) - 1  # the same variant if contrastive
        tensors[f"{POS_ABLATED}.{top}"] = states.last[first, 0]
        tensors[f"{NEG_ABLATED}.{top}"] = states.last[last, 1]
        pos = states.log_likelihoods[first, 0].item()
        neg = states.log_likelihoods[last, 1].item()
        rows.append(
            {
                **_columns(encoded, top),
                "f": pos_plain - neg_plain,
                "f_ablated": pos - neg,
                "log_likelihood_pos": pos_plain,
                "log_likelihood_neg": neg_plain,
                "log_likelihood_pos_ablated": pos,
                "log_likelihood_neg_ablated": neg,
                "k": len(chosen[top][0]),
                "selected_positions": json.dumps(chosen[top]),
                "selected_tokens": json.dumps(
                    [[tokens[i] for i in positions] for positions in chosen[top]],
                    ensure_ascii=False,
                ),
                "f_change_along_path": attributions[0].difference,
                "completeness_error": attributions[0].completeness_error,
                "completeness_error_relative": attributions[0].relative_error,
                "completeness_error_relative_worst": max(a.relative_error for a in attributions),
                **({} if lm.dtype == torch.float32 else {"f_noise": attributions[0].noise}),
                "gradients_computed": sum(item.points for item in attributions),
                **image_columns(lm, encoded, attributions[0].scores),
                "tokens": json.dumps(tokens, ensure_ascii=False),
                "attributions": json.dumps(
                    [np.round(item.scores, 6).tolist() for item in attributions]
                ),
            }
        )
    return tensors, rows


def plain(lm: LanguageModel, encoded: list[Encoded], settings: AblationSettings) -> list[runs.Unit]:
    """Examples without attribution or ablation: enough for methods that need neither.

    Returns for each its tensors and a row of the CSV, as `one_example` does.
    """
    made = []
    all_states = ablation.plain_states(lm, encoded, settings.batch_tokens)
    for item, states in zip(encoded, all_states, strict=True):
        _check_finite(lm, item, states.last, states.log_likelihoods)
        pos, neg = states.log_likelihoods[0].tolist()
        row = _columns(item, "pos") | {
            "f": pos - neg,
            "log_likelihood_pos": pos,
            "log_likelihood_neg": neg,
        }
        made.append((_shared_tensors(states), [row]))
    return made


def states_alone(
    lm: LanguageModel, encoded: list[Encoded], settings: AblationSettings
) -> list[dict[str, Tensor]]:
    """The tensors of `plain` without gradients, by a forward alone.

    Raises UserError for NaN or infinite hidden states.
    """
    tensors = []
    states = ablation.last_states(lm, encoded, settings.batch_tokens)
    for item, (last, norms) in zip(encoded, states, strict=True):
        _check_finite(lm, item, last)
        tensors.append({POS: last[0], NEG: last[1], "norms": norms})
    return tensors


def _columns(encoded: Encoded, top: str) -> dict[str, str]:
    example = encoded.example
    return {
        "id": example.id,
        "top": top,
        "question": example.question,
        "chosen": example.chosen,
        "rejected": example.rejected,
    }


def _check_finite(lm: LanguageModel, encoded: Encoded, *values: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in values):
        raise UserError(
            f"example {encoded.example.id}: {lm.name} gives NaN or infinite hidden "
            f"states in {lm.dtype}; use dtype float32 or bfloat16"
        )


def _shared_tensors(states: ablation.States) -> dict[str, Tensor]:
    assert states.gradients is not None  # `hidden_states` computes them unless told not to
    return {
        POS: states.last[0, 0],
        NEG: states.last[0, 1],
        "norms": states.norms,
        "gradients": states.gradients,
    }


def image_columns(lm: LanguageModel, encoded: Encoded, scores: np.ndarray) -> dict:
    """The picture's share of the attribution, and the boxes of its tokens (see docs/outputs.md).

    scores: (P,) attributions. Returns no columns for a text-only model.
    """
    if lm.processor is None:
        return {}
    image = encoded.image.numpy()
    if not image.any():
        return dict.fromkeys(IMAGE_COLUMNS)
    positive, negative = np.clip(scores, 0, None), np.clip(-scores, 0, None)
    boxes = prompts.boxes(lm, encoded)
    return dict(
        zip(
            IMAGE_COLUMNS,
            (
                positive[image].sum() / max(positive.sum(), 1e-12),
                positive[~image].sum() / max(positive.sum(), 1e-12),
                negative[image].sum() / max(negative.sum(), 1e-12),
                negative[~image].sum() / max(negative.sum(), 1e-12),
                json.dumps(np.flatnonzero(image).tolist()),
                json.dumps([box and [round(x, 2) for x in box] for box in boxes]),
            ),
            strict=True,
        )
    )
