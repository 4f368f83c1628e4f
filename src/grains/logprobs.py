"""Log-probabilities of response tokens, and the responses' log-likelihoods, their sums.

The logits of the whole vocabulary are never held at once: the head is applied to slices of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx

from grains import cpu
from grains.calls import own_logits
from grains.lm import LanguageModel, LogitShape
from grains.packing import Pack

# Logits held at a time, positions x words: in fp32 16 MiB, however large the vocabulary.
LOGIT_ROWS, VOCABULARY_SLICE = 1024, 4096
# Positions whose logits the model's own forward makes at a time, of the whole vocabulary.
OWN_HEAD_ROWS = 64


def logits(lm: LanguageModel, hidden_states: Tensor) -> Tensor:
    """What follows the layers: outputs of the last one (..., D) -> logits (..., V) in fp32."""
    if lm.own_head:
        rows = hidden_states.flatten(0, -2).split(OWN_HEAD_ROWS)
        joined = torch.cat([own_logits(lm, states) for states in rows])
        return joined.view(*hidden_states.shape[:-1], -1)
    plain = lm.head(lm.norm(hidden_states)).float()
    return lm.logit_shape(plain) if lm.logit_shape else plain


class _TokenLogProbs(torch.autograd.Function):
    """log P of given tokens from the normed hidden states, by slices of the vocabulary.

    A log-softmax over the vocabulary needs only the running maximum and sum of the logits. Its
    gradient needs the running mean of the head's rows, weighted by the softmax. What was summed
    before is rescaled when the maximum rises. So each (rows, slice) piece of the logits is
    computed once and dropped, and is small enough for the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        product: cpu.Product,
        wants_grad: bool,
        shape: LogitShape | None,
    ) -> Tensor:
        count = len(states)
        highest = torch.full((count,), -torch.inf, device=states.device)
        total = torch.zeros(count, device=states.device)
        picked = torch.zeros(count, device=states.device)
        mean = torch.zeros_like(states, dtype=torch.float32) if wants_grad else None
        slope = torch.ones(count, device=states.device)  # of the target's logit
        for start in range(0, len(weight), VOCABULARY_SLICE):
            rows = weight[start : start + VOCABULARY_SLICE]
            scores = product(
                states, rows, None if bias is None else bias[start : start + VOCABULARY_SLICE]
            ).float()
            inside = (targets >= start) & (targets < start + len(rows))
            slopes = None
            if shape:
                scores = shape(scores)
                slopes = shape.slope(scores) if wants_grad else None
            picked[inside] = scores[inside, targets[inside] - start]
            before, highest = highest, torch.maximum(highest, scores.amax(-1))
            rescale = (before - highest).exp_()
            scores.sub_(highest[:, None]).exp_()
            total.mul_(rescale).add_(scores.sum(-1))
            if slopes is not None:
                slope[inside] = slopes[inside, targets[inside] - start]
                scores.mul_(slopes)
            if mean is not None:
                mean.mul_(rescale[:, None]).add_(product(scores.to(rows.dtype), rows.t()).float())
        if mean is not None:
            own = weight[targets].float()
            own = slope[:, None] * own if shape else own
            ctx.save_for_backward(own - mean / total[:, None])
        return picked - highest - total.log()

    @staticmethod
    def backward(
        ctx: BackwardCFunction, grad: Tensor
    ) -> tuple[Tensor, None, None, None, None, None, None]:
        (by_states,) = ctx.saved_tensors
        return grad[:, None] * by_states, None, None, None, None, None, None


def token_log_probs(lm: LanguageModel, hidden_states: Tensor, targets: Tensor) -> Tensor:
    """log P(target | everything before it) in nats, from the last layer's output.

    hidden_states: (n, D) outputs of the last layer at the positions that predict the targets: the
        logits at position t predict the token at t+1.
    targets: (n,) token ids.
    Returns (n,) in fp32, differentiable with respect to hidden_states.
    """
    if lm.own_head:
        log_probs = []
        for states, wanted in zip(
            hidden_states.split(OWN_HEAD_ROWS), targets.split(OWN_HEAD_ROWS), strict=True
        ):
            given = logits(lm, states).log_softmax(-1)
            log_probs.append(given.gather(-1, wanted.to(given.device)[:, None])[:, 0])
        return torch.cat(log_probs)
    wants_grad = torch.is_grad_enabled() and hidden_states.requires_grad
    states = lm.norm(hidden_states)
    with align_module_device(lm.head):  # loads the head if accelerate keeps it on disk
        weight, bias = lm.head.weight, lm.head.bias
        states, targets = states.to(weight.device), targets.to(weight.device)
        product = cpu.product_of(lm.head)
        return torch.cat(
            [
                _TokenLogProbs.apply(
                    rows, row_targets, weight, bias, product, wants_grad, lm.logit_shape
                )
                for rows, row_targets in zip(
                    states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True
                )
            ]
        )


@dataclass(frozen=True)
class Targets:
    """The n log-probabilities that the log-likelihoods of C responses are sums of.

    nodes, tokens: (n,) the node of the trie that predicts, and the token that it predicts. A
        log-probability that several responses share is listed once.
    member: (C, n) 1 where a log-probability belongs to a response, else 0, so that
        member @ log_probs are the C log-likelihoods.
    """

    nodes: Tensor
    tokens: Tensor
    member: Tensor


def targets(packed: Pack, prompt_length: int, responses: list[list[int]]) -> Targets:
    """The log-probabilities of the responses: each token is predicted by the node before it.

    packed: the trie of prompt and responses; prompt_length: P tokens; responses: C lists of ids.
    """
    index: dict[tuple[int, int], int] = {}
    owners = []
    for path, response in zip(packed.paths, responses, strict=True):
        before = path[prompt_length - 1 :].tolist()
        owners.append(
            [index.setdefault((before[j], token), len(index)) for j, token in enumerate(response)]
        )
    member = torch.zeros(len(responses), len(index))
    for row, columns in enumerate(owners):
        member[row, columns] = 1.0
    pairs = torch.tensor(list(index), dtype=torch.long)
    return Targets(pairs[:, 0], pairs[:, 1], member)


class ResponseScorer:
    """Computes the choices' log-likelihoods from the last layer's output.

    Only the positions that predict a token of a choice pass through the norm and the head.
    terms: for each question of a batch, its `Targets`.
    """

    def __init__(self, lm: LanguageModel, terms: list[Targets]):
        self.lm = lm
        rows = torch.cat([torch.full_like(term.nodes, row) for row, term in enumerate(terms)])
        self.rows, self.nodes = rows, torch.cat([term.nodes for term in terms])
        self.tokens = torch.cat([term.tokens for term in terms])
        self.member = torch.block_diag(*[term.member for term in terms])

    def behind(self, first: int) -> ResponseScorer:
        """The same for states that begin at position `first` of every question."""
        shifted = copy.copy(self)
        shifted.nodes = self.nodes - first
        return shifted

    def __call__(self, states: Tensor, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The summed log-likelihoods, (c, choices of all Q questions), for c configurations.

        states: (c, Q, T, D) outputs of the last layer; or (Q, T, D) if `change` turns the n scored
        states (n, D) into those of c configurations (c, n, D).
        """
        device = states.device
        picked = states[..., self.rows.to(device), self.nodes.to(device), :]
        picked = change(picked) if change else picked
        log_probs = token_log_probs(
            self.lm, picked.flatten(0, 1), self.tokens.to(device).repeat(len(picked))
        )
        return log_probs.view(len(picked), -1).cpu() @ self.member.T
