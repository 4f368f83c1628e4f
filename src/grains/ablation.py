"""Top-k selection, token ablation, and hidden states with and without it (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grains.attribution import baseline_embeddings
from grains.lm import LanguageModel
from grains.logprobs import ResponseScorer, Targets, targets, token_log_probs
from grains.packing import pack
from grains.prompts import Encoded
from grains.replay import Capture, capture_pack, collate, gradient_rows, replay, without_prefix
from grains.settings import TOPS

# Positions before the first that is ablated: computing fewer alone takes longer than with each row.
WORTH_KEEPING = 8


def select(
    scores: Tensor, candidates: Tensor, k: int, top: str, generator: torch.Generator
) -> list[int]:
    """The k candidate positions that `top` ranks highest, in that order.

    scores: (P,) attributions. candidates: (P,) bool.
    top: pos (largest score), neg (smallest score), abs (largest magnitude) or rand (random ones
        from the generator: the control).
    Returns fewer than k positions if there are fewer candidates. Raises ValueError for another
    value of `top`.
    """
    if top not in TOPS:
        raise ValueError(f"unknown selection '{top}': expected {', '.join(TOPS)}")
    positions = candidates.nonzero()[:, 0]
    if top == "rand":
        order = torch.randperm(len(positions), generator=generator)
    else:
        keys = {"pos": -scores, "neg": scores, "abs": -scores.abs()}[top]
        order = keys.cpu()[positions].argsort(stable=True)
    return positions[order[:k]].tolist()


@dataclass(frozen=True)
class States:
    """The hidden states of R variants of an example with two responses; the first is unablated.

    last: (R, 2, L+1, D) hidden states at the last position of x y+ and of x y-; index 0 is the
        embedding, index l+1 the output of decoder layer l, before the final norm.
    log_likelihoods: (R, 2) log P of each response in nats, summed over its tokens.
    norms: (L+1,) median of ||h|| over all positions, unablated.
    gradients: (L+1, D) gradient of log P(y+)/|y+| - log P(y-)/|y-| with respect to the hidden
        states, summed over the prompt's positions, unablated; None if not wanted.
    """

    last: Tensor
    log_likelihoods: Tensor
    norms: Tensor
    gradients: Tensor | None


def hidden_states(
    lm: LanguageModel,
    encoded: Encoded,
    ablated: list[list[int]],
    max_tokens: int,
    text: str = "pad",
    image: str = "mean",
    gradients: bool = True,
) -> States:
    """Replay an example as it is, and with each set of prompt positions ablated.

    ablated: for each ablated variant, the prompt positions whose embeddings are replaced.
    max_tokens: the number of positions computed at a time.
    text, image: what replaces an ablated text or image token (see `baseline_embeddings`).
    gradients: whether the gradients at every layer are wanted.
    Returns `States` with R = 1 + len(ablated) variants, the unablated one first.
    """
    pair = _packed(lm, encoded)
    captured, terms = pair.captured, pair.terms
    (plain,) = _plain(lm, [pair], gradients, gradients and gradient_rows(lm, captured)[1])
    prompt = captured.embeds[0, : len(encoded.prompt_ids)]
    replacement = baseline_embeddings(lm, encoded, prompt, text, image)
    last, log_likelihoods = [plain.last], [plain.log_likelihoods]
    if ablated:
        first = min((min(positions) for positions in ablated if positions), default=0)
        moving = without_prefix(lm, captured, first if first >= WORTH_KEEPING else 0)
        rows = captured.embeds.repeat(len(ablated), 1, 1)
        for row, positions in enumerate(ablated):
            rows[row, positions] = replacement[positions]
        rows = rows[:, moving.start :]
        terms = replace(terms, nodes=terms.nodes - moving.start)
        with torch.inference_mode():
            for batch in rows.split(max(1, max_tokens // rows.shape[1])):
                reader = _Reader((pair.ends - moving.start).expand(len(batch), -1))
                reader(-1, batch)
                final = replay(lm, batch, moving.calls, after=reader)
                last.append(reader.stacked())
                log_likelihoods.append(_log_likelihoods(lm, final, terms).cpu())
    return States(torch.cat(last), torch.cat(log_likelihoods), plain.norms, plain.gradients)


def plain_states(lm: LanguageModel, encoded: list[Encoded], max_tokens: int) -> list[States]:
    """The hidden states of examples as they are, several at a time: `States` with R = 1 each.

    max_tokens: see `hidden_states`; a gradient's batches are smaller (see `gradient_rows`).
    """
    states: list[States] = []
    for members in batches_in_order([item.length for item in encoded], max_tokens):
        pairs = [_packed(lm, encoded[index]) for index in members]
        longest = max((pair.captured for pair in pairs), key=lambda item: int(item.lengths))
        rows, checkpointed = gradient_rows(lm, longest, max_tokens)
        for start in range(0, len(pairs), rows):
            states += _plain(lm, pairs[start : start + rows], True, checkpointed)
    return states


def last_states(
    lm: LanguageModel, encoded: list[Encoded], max_tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """The hidden states of examples as they are, without gradients and logits.

    That is a forward alone: all that methods need which compare hidden states.

    max_tokens: see `hidden_states`.
    Returns for each example what `States` calls last, of the plain variant (2, L+1, D), and norms.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    for members in batches_in_order([item.length for item in encoded], max_tokens):
        with torch.inference_mode():
            forward = _Forward(lm, [_packed(lm, encoded[index]) for index in members])
        kept += zip(forward.last, forward.norms, strict=True)
    return kept


def batches_in_order(lengths: list[int], max_tokens: int) -> list[range]:
    """Indices of consecutive examples that fill at most max_tokens positions with their padding."""
    groups: list[range] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if groups and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1] = range(groups[-1].start, index + 1)
        else:
            groups.append(range(index, index + 1))
            longest = length
    return groups


@dataclass(frozen=True)
class _Packed:
    """An example with both responses in one row.

    captured: B = 1. terms: of the log-likelihoods. ends: (2,) the responses' last nodes.
    """

    encoded: Encoded
    captured: Capture
    terms: Targets
    ends: Tensor


def _packed(lm: LanguageModel, encoded: Encoded) -> _Packed:
    packed = pack(encoded.sequences())
    return _Packed(
        encoded,
        capture_pack(lm, encoded.inputs, packed),
        targets(packed, len(encoded.prompt_ids), encoded.responses),
        torch.stack([path[-1] for path in packed.paths]),
    )


class _Forward:
    """A batch of N examples as they are, through all layers.

    final: (N, T, D) the last layer's output. last: (N, 2, L+1, D). norms: (N, L+1).
    outputs: the states that enter layer 0 and leave each layer, where gradients are wanted.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pairs: list[_Packed],
        with_gradients: bool = False,
        checkpointed: bool = False,
    ):
        batch = collate([pair.captured for pair in pairs])
        reader = _Reader(torch.stack([pair.ends for pair in pairs]))
        medians: list[Tensor] = []
        self.outputs: list[Tensor] = []

        def after(layer: int, states: Tensor) -> None:
            reader(layer, states)
            norms = states.detach().float().norm(dim=-1)
            rows = zip(norms, pairs, strict=True)
            medians.append(
                torch.stack([row[: int(pair.captured.lengths)].median() for row, pair in rows])
            )
            if with_gradients:
                self.outputs.append(states)

        embeds = batch.embeds.detach().clone().requires_grad_(with_gradients)
        after(-1, embeds)
        self.final = replay(lm, embeds, batch.calls, after=after, checkpointed=checkpointed)
        self.last = reader.stacked()
        self.norms = torch.stack([median.cpu() for median in medians], dim=1)


def _plain(
    lm: LanguageModel, pairs: list[_Packed], with_gradients: bool, checkpointed: bool
) -> list[States]:
    """The unablated variants of a batch, with gradients at every layer if they are wanted.

    checkpointed: see `replay`.
    """
    forward = _Forward(lm, pairs, with_gradients, checkpointed)
    read = ResponseScorer(lm, [pair.terms for pair in pairs])
    log_likelihoods = read(forward.final[None])[0].view(len(pairs), -1)
    # The examples of a batch do not see each other, so one backward pass serves all of them.
    gradients: tuple[Tensor, ...] = ()
    if with_gradients:
        lengths = torch.tensor(
            [[len(response) for response in pair.encoded.responses] for pair in pairs]
        )
        chosen, rejected = (log_likelihoods / lengths).sum(0)
        gradients = torch.autograd.grad(chosen - rejected, forward.outputs)
    detached = log_likelihoods.detach()
    states = []
    for row, pair in enumerate(pairs):
        prompt = len(pair.encoded.prompt_ids)
        summed = [gradient[row, :prompt].float().sum(0).cpu() for gradient in gradients]
        states.append(
            States(
                forward.last[row : row + 1],
                detached[row : row + 1],
                forward.norms[row],
                torch.stack(summed) if summed else None,
            )
        )
    return states


class _Reader:
    """Keeps each row's hidden states at its positions (R, n) after every layer; for `replay`."""

    def __init__(self, positions: Tensor):
        self.positions = positions
        self.read: list[Tensor] = []

    def __call__(self, layer: int, states: Tensor) -> None:
        rows = torch.arange(len(states), device=states.device)[:, None]
        self.read.append(states.detach()[rows, self.positions.to(states.device)].float().cpu())

    def stacked(self) -> Tensor:
        """The states that were kept, (R, n, L+1, D)."""
        return torch.stack(self.read, dim=2)


def _log_likelihoods(lm: LanguageModel, final: Tensor, terms: Targets) -> Tensor:
    """(R, C) log P of each response, summed over its tokens, from the last output (R, T, D)."""
    device = final.device
    log_probs = token_log_probs(
        lm,
        final[:, terms.nodes.to(device)].flatten(0, 1),
        terms.tokens.to(device).repeat(len(final)),
    )
    return log_probs.view(len(final), -1) @ terms.member.T.to(log_probs.device)
