"""Gradient attribution: which prompt tokens push the model to the preferred answer.

Objective (paper, section 3.1): f(x) = log P(y+ | x) - log P(y- | x), a weighted sum of the
log-probabilities of the responses' tokens. Integrated Gradients (Sundararajan, Taly, Yan 2017)
moves the prompt's embeddings along a straight path from a baseline b to the input x, while the
responses keep their embeddings:

    a_i = sum_d (x_i - b_i)_d * integral_0^1 df/dx_{i,d} (b + alpha (x - b)) dalpha

Completeness, sum_i a_i = f(x) - f(b), holds for the exact integral. How far the scores are from it
tells how well the integral was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from grains import vision
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.logprobs import targets, token_log_probs
from grains.matmul import rounded_gradients
from grains.packing import pack
from grains.prompts import Encoded
from grains.replay import (
    Capture,
    capture,
    capture_pack,
    gradient_rows,
    replay,
    with_fixed_experts,
    without_prefix,
)
from grains.settings import EXPERTS, MATMUL_PRECISIONS, NO_ATTRIBUTION, AttributionSettings

Products = Callable[[], AbstractContextManager[None]]


class PromptFunction:
    """A weighted sum of response log-likelihoods as a function of the prompt's embeddings.

    f(x) = sum_c weights[c] * log P(response_c | x), for prompt embeddings x (P, D).
    Log-probabilities that cancel, of words with which two answers begin, are never computed.

    Positions before `first` never change, so they are computed once. With fixed_experts the experts
    of a mixture stay those that are chosen for the prompt as it is.

    products: the context in which gradients are computed.
    prompt: (P, D) the embeddings of the prompt as it is.
    rows: how many prompts are computed at a time (see `gradient_rows`).
    """

    def __init__(
        self,
        lm: LanguageModel,
        encoded: Encoded,
        weights: list[float],
        max_tokens: int,
        first: int = 0,
        fixed_experts: bool = False,
        products: Products = nullcontext,
    ):
        self.lm, self.products = lm, products
        packed = pack(encoded.sequences(without_last=True))
        whole = capture_pack(lm, encoded.inputs, packed)
        self.captured: Capture = without_prefix(lm, whole, first)
        if fixed_experts:
            self.captured = with_fixed_experts(lm, self.captured)
        self.rows, self.checkpointed = gradient_rows(lm, self.captured, max_tokens)
        length = len(encoded.prompt_ids)
        terms = targets(packed, length, encoded.responses)
        weight = torch.tensor(weights) @ terms.member
        keep = weight != 0
        device = self.captured.embeds.device
        self.nodes = terms.nodes[keep].to(device) - self.captured.start
        self.tokens = terms.tokens[keep].to(device)
        self.weight = weight[keep].to(device)
        self.prompt = whole.embeds[0, :length]
        self.fixed = whole.embeds[:, length:]

    def _values(self, prompts: Tensor) -> Tensor:
        """f (R,) of R prompts from the first position that is computed, (R, P - start, D)."""
        rows = len(prompts)
        if not len(self.nodes):  # the two answers are the same: f is 0
            return 0 * prompts.flatten(1).sum(dim=1)
        states = torch.cat([prompts, self.fixed.expand(rows, -1, -1)], dim=1)
        states = replay(
            self.lm,
            states,
            self.captured.calls,
            checkpointed=self.checkpointed and torch.is_grad_enabled(),
        )
        nodes = self.nodes.to(states.device)
        log_probs = token_log_probs(
            self.lm, states[:, nodes].flatten(0, 1), self.tokens.to(states.device).repeat(rows)
        )
        return log_probs.view(rows, -1) @ self.weight.to(log_probs.device)

    def values(self, prompts: Tensor) -> Tensor:
        """f (R,) in nats of R prompts (R, P, D), without gradients."""
        moving = prompts[:, self.captured.start :]
        with torch.inference_mode():
            return torch.cat([self._values(batch) for batch in moving.split(self.rows)]).cpu()

    def values_and_grads(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """f (R,) in nats and its gradient (R, P, D) at R prompts (R, P, D); R is at most `rows`.

        The gradient is 0 at the positions that never change.
        """
        start = self.captured.start
        moving = prompts[:, start:].detach().requires_grad_()
        with self.products():
            values = self._values(moving)
            (grads,) = torch.autograd.grad(values.sum(), moving)
        return values.detach().cpu(), pad(grads, (0, 0, start, 0))


class StraightPath:
    """f along x(alpha) = b + alpha (x - b); every computed point is kept.

    baseline: (P, D) b.
    points: alpha -> f at x(alpha), and the slopes (P,) <df/dx_i, x_i - b_i>: how much each prompt
        position contributes to df/dalpha.
    """

    def __init__(self, function: PromptFunction, baseline: Tensor):
        self.function, self.baseline = function, baseline
        self.step = function.prompt.float() - baseline.float()
        self.points: dict[float, tuple[float, np.ndarray]] = {}

    def compute(self, alphas: Iterable[float]) -> None:
        """Compute f and its slopes at those of these alphas that are not known yet."""
        missing = [a for a in dict.fromkeys(map(float, alphas)) if a not in self.points]
        for start in range(0, len(missing), self.function.rows):
            batch = missing[start : start + self.function.rows]
            alpha = torch.tensor(batch, device=self.step.device)  # bfloat16 has 8 bits for it
            prompts = (self.baseline + alpha[:, None, None] * self.step).to(self.baseline.dtype)
            values, grads = self.function.values_and_grads(prompts)
            slopes = (grads.float() * self.step).sum(-1).double().cpu().numpy()
            if 0.0 in batch:
                # At all-zero embeddings the slope overflows: every RMSNorm multiplies it by
                # 1 / sqrt(eps). A single point has no width, so it counts as zero; if the integral
                # suffers from that, the completeness error shows it.
                first = slopes[batch.index(0.0)]
                first[~np.isfinite(first)] = 0.0
            for a, value, slope in zip(batch, values.tolist(), slopes, strict=True):
                self.points[a] = (value, slope)

    def ends(self) -> tuple[float, float, float]:
        """f(x) - f(b) in nats, its rounding noise, and that of a difference of two points.

        Noise is two standard errors; 0 in fp32, where rounding does not show.

        In bfloat16 and float16 f is computed again at both ends, with embeddings whose last bit is
        drawn at random: what that changes is what rounding changes, anywhere in the model. The
        mean of all is less noisy than each.
        """
        dtype = self.function.prompt.dtype
        if dtype == torch.float32:
            return self.value(1.0) - self.value(0.0), 0.0, 0.0
        generator = torch.Generator().manual_seed(0)
        means, variance = [], 0.0
        for alpha, point in ((0.0, self.baseline), (1.0, self.function.prompt)):
            shape = (NOISE_REPEATS, *point.shape)
            bit = (torch.rand(shape, generator=generator) - 0.5) * torch.finfo(dtype).eps
            again = self.function.values((point.float() * (1 + bit.to(point.device))).to(dtype))
            values = np.array([self.value(alpha), *again.tolist()])
            means.append(values.mean())
            variance += values.var(ddof=1)
        noise = 2 * math.sqrt(variance)
        return float(means[1] - means[0]), noise / math.sqrt(NOISE_REPEATS + 1), noise

    def value(self, alpha: float) -> float:
        """f at a computed point."""
        return self.points[alpha][0]

    def slope(self, alpha: float) -> np.ndarray:
        """The slopes (P,) at a computed point."""
        return self.points[alpha][1]


@dataclass(frozen=True)
class Attribution:
    """The scores of a prompt's positions, and what their completeness is measured by.

    scores: (P,) in nats, positive towards the preferred answer.
    difference: f(x) - f(b) in nats, the sum of exact Integrated Gradients; NaN for smoothgrad and
        vanilla, which have no completeness.
    points: the number of gradients computed.
    noise: how far `difference` may be off by rounding, in nats; 0 in fp32 and where not measured.
    """

    scores: np.ndarray
    difference: float
    points: int
    noise: float = 0.0

    @property
    def completeness_error(self) -> float:
        """|sum_i a_i - (f(x) - f(b))| in nats."""
        return abs(float(self.scores.sum()) - self.difference)

    @property
    def relative_error(self) -> float:
        """The completeness error as a share of |f(x) - f(b)|."""
        return self.completeness_error / max(abs(self.difference), 1e-12)


def gauss_legendre(path: StraightPath, steps: int) -> Attribution:
    """Integrated Gradients by the Gauss-Legendre rule with `steps` points, as in the paper."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    alphas = ((1 + nodes) / 2).tolist()
    path.compute(alphas)
    terms = (w / 2 * path.slope(a) for w, a in zip(weights, alphas, strict=True))
    scores = sum(terms, start=np.zeros(len(path.step)))
    ends = path.function.values(torch.stack([path.baseline, path.function.prompt]))
    return Attribution(scores, float(ends[1] - ends[0]), steps)


START_CELLS = 4  # cells of the adaptive rule at first
SPLIT_AT_ONCE = 4  # cells that are halved in one step
NOISE_REPEATS = 4  # times that f is computed again at each end in bfloat16 and float16


def adaptive_simpson(path: StraightPath, tolerance: float, max_points: int) -> Attribution:
    """Integrated Gradients by Simpson's rule on cells of the path; the worst cells are halved.

    f is known at both ends of every cell, so the error of Simpson's rule on it is known exactly:
    |f(end) - f(start) - sum_i integral_i|. Halving a cell reuses all its points. It goes on until
    the completeness error of the whole path is at most `tolerance` (a share of |f(x) - f(b)|) or
    what rounding may make of it, or until `max_points` gradients are computed. A cell is not halved
    if rounding alone may make its error.
    Raises UserError if max_points is less than the first cells need.
    """
    edges = [i / (2 * START_CELLS) for i in range(2 * START_CELLS + 1)]
    if max_points < len(edges):
        raise UserError(
            f"ig_max_points {max_points}: the adaptive rule begins with {len(edges)} points; give "
            "at least as many, or use ig_steps"
        )
    path.compute(edges)
    cells = {cell: _simpson(path, *cell) for cell in zip(edges[:-1:2], edges[2::2], strict=True)}

    def miss(cell: tuple[float, float]) -> float:
        return path.value(cell[1]) - path.value(cell[0]) - cells[cell].sum()

    difference, noise, noise_of_cell = path.ends()
    while True:
        wrong = [cell for cell in cells if abs(miss(cell)) > noise_of_cell]
        worst = sorted(wrong, key=lambda cell: -abs(miss(cell)))[:SPLIT_AT_ONCE]
        error = difference - sum(integral.sum() for integral in cells.values())
        complete = abs(error) <= max(tolerance * abs(difference), noise)
        if complete or not worst or len(path.points) + 2 * len(worst) > max_points:
            scores = sum(cells.values(), start=np.zeros(len(path.step)))
            return Attribution(scores, difference, len(path.points), noise)
        halves = []
        for low, high in worst:
            middle = (low + high) / 2
            halves += [(low, middle), (middle, high)]
            del cells[low, high]
        path.compute([(low + high) / 2 for low, high in halves])
        cells.update({half: _simpson(path, *half) for half in halves})


def _simpson(path: StraightPath, low: float, high: float) -> np.ndarray:
    middle = (low + high) / 2
    return (path.slope(low) + 4 * path.slope(middle) + path.slope(high)) * (high - low) / 6


def attribute(
    lm: LanguageModel,
    encoded: Encoded,
    settings: AttributionSettings,
    max_tokens: int,
    generator: torch.Generator,
) -> list[Attribution]:
    """Attribute an example with two responses (paper, section 3.1).

    max_tokens: the number of positions computed at a time.
    generator: draws smoothgrad's noise.
    Returns one result for the contrastive objective, two (of y+ and of y-) for the normal one.
    Raises UserError for the method none, for fixed experts of a model without experts, and for a
    matmul_precision below the highest if the weights are not fp32.
    """
    if settings.grad_method == NO_ATTRIBUTION:
        raise UserError(
            f"grad_method {NO_ATTRIBUTION} attributes nothing: give integrated_gradients, "
            "smoothgrad or vanilla"
        )
    if settings.experts not in (None, *EXPERTS):
        raise UserError(
            f"unknown ig_experts '{settings.experts}': expected {', '.join(EXPERTS)} or None"
        )
    products = _products(lm, settings)
    terms = [[1.0, -1.0]] if settings.objective == "contrastive" else [[1.0, 0.0], [0.0, 1.0]]
    # Gradient times input is taken at every position; a path leaves some where they are.
    along_path = settings.grad_method == "integrated_gradients"
    first = first_moved(attributed_positions(encoded, settings.attribute)) if along_path else 0
    return [
        _attribute(
            PromptFunction(
                lm, encoded, weights, max_tokens, first, settings.experts == "fixed", products
            ),
            lm,
            encoded,
            settings,
            generator,
        )
        for weights in terms
    ]


def _products(lm: LanguageModel, settings: AttributionSettings) -> Products:
    """The context for the `matmul_precision`.

    Values of f stay as they are. Rounded on the way forward too, they are noisy by a tenth of a nat
    and the adaptive rule halves cells in vain; from zero even the scores are others.
    """
    precision = settings.matmul_precision
    if precision not in MATMUL_PRECISIONS:
        raise UserError(
            f"unknown matmul_precision '{precision}': expected {' or '.join(MATMUL_PRECISIONS)}"
        )
    if precision == AttributionSettings.matmul_precision:
        return nullcontext
    weights = lm.quantization or str(lm.dtype).removeprefix("torch.")
    if weights != "float32":
        raise UserError(
            f"matmul_precision {precision} is for weights in float32: those of {lm.name} are in "
            f"{weights}; leave it out"
        )
    return partial(rounded_gradients, lm.layers)


def _attribute(
    function: PromptFunction,
    lm: LanguageModel,
    encoded: Encoded,
    settings: AttributionSettings,
    generator: torch.Generator,
) -> Attribution:
    if settings.grad_method == "integrated_gradients":
        path = StraightPath(function, _start(function, lm, encoded, settings))
        if settings.ig_steps:
            return gauss_legendre(path, settings.ig_steps)
        return adaptive_simpson(path, settings.tolerance, settings.max_points)
    # Gradient times input: the gradient at the prompt, or its mean under Gaussian noise.
    prompt = function.prompt[None]
    if settings.grad_method == "smoothgrad":
        scale = settings.smooth_noise * prompt.float().std()
        shape = (settings.smooth_samples, *prompt.shape[1:])
        noise = torch.randn(shape, generator=generator).to(prompt)
        inputs = prompt + scale.to(prompt.dtype) * noise
    else:
        inputs = prompt
    total = torch.zeros_like(prompt[0], dtype=torch.float32)
    for batch in inputs.split(function.rows):
        total += function.values_and_grads(batch)[1].float().sum(0)
    scores = (total / len(inputs) * prompt[0].float()).sum(-1).double().cpu().numpy()
    return Attribution(scores, float("nan"), len(inputs))


def attributed_positions(encoded: Encoded, attribute: str) -> Tensor:
    """(P,) bool: the prompt positions whose embeddings change along the path.

    attribute: content, all, image or text (see `AttributionSettings`).
    """
    return {
        "content": encoded.content | encoded.image,
        "all": torch.ones_like(encoded.content),
        "image": encoded.image,
        "text": encoded.content,
    }[attribute]


def first_moved(moves: Tensor) -> int:
    """The first of the prompt's positions (P,) that moves; the last position if none does."""
    return int(moves.nonzero()[0]) if moves.any() else len(moves) - 1


def _start(
    function: PromptFunction, lm: LanguageModel, encoded: Encoded, settings: AttributionSettings
) -> Tensor:
    """The start of the path (P, D): the baseline, or the prompt at positions that do not move."""
    moves = attributed_positions(encoded, settings.attribute).to(function.prompt.device)[:, None]
    baseline = baseline_embeddings(
        lm, encoded, function.prompt, settings.baseline, settings.image_baseline
    )
    return torch.where(moves, baseline, function.prompt)


def baseline_embeddings(
    lm: LanguageModel, encoded: Encoded, prompt: Tensor, text: str, image: str
) -> Tensor:
    """(P, D): for each position of the prompt an embedding that carries no information.

    The baseline of attribution, and what replaces ablated tokens.

    prompt: (P, D) embeddings of text and features of the picture.
    text: mean, pad, unk or zeros (see `text_baseline`).
    image: blank (the features of a blank picture of the same size), mean (over the features of
        this picture) or zeros.
    """
    baseline = text_baseline(lm, text, len(prompt)).to(prompt).expand_as(prompt).clone()
    is_image = encoded.image.to(prompt.device)
    if is_image.any():
        if image == "blank":
            picture = vision.blank_like(vision.open_image(encoded.example))
            inputs = vision.model_inputs(lm, [encoded.text], [picture], [encoded.guard])
            baseline[is_image] = capture(lm, inputs).embeds[0, is_image].to(prompt)
        elif image == "mean":
            baseline[is_image] = prompt[is_image].mean(dim=0)
        else:
            baseline[is_image] = 0
    return baseline


@lru_cache(maxsize=4)
def text_baseline(lm: LanguageModel, kind: str, length: int = 1) -> Tensor:
    """An embedding (D,) that stands for no word: zeros, mean (of the matrix), pad or unk.

    Of a model that does more to embeddings than look them up (scales, norms, learned positions):
    (length, D), what enters layer 0 at each position.
    """
    with torch.no_grad():
        if kind == "zeros":
            return torch.zeros(lm.hidden_size, device=lm.device)
        if lm.own_embeddings:
            return _own_baseline(lm, kind, length)
        if kind == "mean":
            ids = torch.arange(lm.embed.weight.shape[0], device=lm.device)
            total = torch.zeros(lm.hidden_size, dtype=torch.float64, device=lm.device)
            for batch in ids.split(8192):
                total += lm.embed(batch).double().sum(0)
            return (total / len(ids)).float()
        return lm.embed(torch.tensor([lm.replacement_id(kind)], device=lm.device))[0].float()


def _own_baseline(lm: LanguageModel, kind: str, length: int) -> Tensor:
    """(length, D): a token's embedding, or the mean of all, as the model makes it to enter layer 0.

    What a position adds is the same for every token.
    """

    def entering(ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return capture(lm, inputs).embeds.float()

    token = torch.full((1, length), lm.replacement_id("pad" if kind == "mean" else kind))
    at_positions = entering(token.to(lm.device))[0]
    if kind != "mean":
        return at_positions
    ids = torch.arange(lm.embed.weight.shape[0], device=lm.device)
    total = torch.zeros(lm.hidden_size, dtype=torch.float64, device=lm.device)
    for batch in ids.split(1024):
        total += entering(batch[:, None])[:, 0].double().sum(0)
    return (total / len(ids)).float() + at_positions - at_positions[0]
