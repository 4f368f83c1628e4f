"""The baseline of the benchmark: the three stages as one writes them first.

One sequence at a time through the model's own forward: captum's IntegratedGradients for each
selection anew, a forward for every log-likelihood and every hidden state, a forward per choice and
configuration with hooks, one `generate` per prompt and configuration. Only torch, transformers and
captum; nothing of the library but its token ids, so that it also checks the library's numbers.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from captum.attr import IntegratedGradients
from torch import Tensor


def embed(lm, inputs: dict) -> Tensor:
    """(1, T, D) what enters decoder layer 0, image features in their places."""
    read = []
    handle = lm.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0]), with_kwargs=True
    )
    with torch.no_grad():
        lm.model(**inputs)
    handle.remove()
    return read[0]


def log_likelihood(lm, embeds: Tensor, response: list[int]) -> Tensor:
    """(R,) log P(response | prompt), the prompt as embeddings (R, P, D)."""
    target = torch.tensor(response, device=embeds.device)
    behind = lm.model.get_input_embeddings()(target[None])
    sequence = torch.cat([embeds, behind.expand(len(embeds), -1, -1)], dim=1)
    decoder = lm.model.get_decoder()
    logits = lm.model.get_output_embeddings()(decoder(inputs_embeds=sequence).last_hidden_state)
    log_probs = logits[:, embeds.shape[1] - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(-1, target[None, :, None].expand(len(embeds), -1, 1)).sum((1, 2))


def attribution(lm, encoded, steps: int, at_once: int | None = None) -> np.ndarray:
    """(P,) Integrated Gradients of log P(y+) - log P(y-), zero baseline, by captum.

    at_once: captum's internal_batch_size; None computes all points in one batch.
    """
    prompt = embed(lm, encoded.inputs)
    chosen, rejected = encoded.responses

    def f(embeds):
        return log_likelihood(lm, embeds, chosen) - log_likelihood(lm, embeds, rejected)

    scores = IntegratedGradients(f).attribute(
        prompt, torch.zeros_like(prompt), n_steps=steps, internal_batch_size=at_once
    )
    return scores.float().sum(-1)[0].detach().cpu().numpy()


def token_ablation(
    lm,
    encoded,
    candidates: Tensor,
    k: int,
    steps: int,
    replacement: Tensor,
    at_once: int | None = 1,
) -> dict:
    """Stage 1 of one pair, both signs.

    candidates: (P,) bool; replacement: (P, D) what an ablated position becomes.
    Returns the scores, log-likelihoods (3, 2) and last hidden states (3, 2, L+1, D) of the plain
    prompt, of the one without its `pos` and of the one without its `neg` tokens.
    """
    values, states = [], []
    positions = candidates.nonzero()[:, 0].numpy()
    for sign in (1, -1):
        scores = attribution(lm, encoded, steps, at_once)
        chosen = positions[np.argsort(-sign * scores[positions], kind="stable")[:k]]
        plain = embed(lm, encoded.inputs)
        ablated = plain.clone()
        ablated[0, chosen] = replacement[chosen]
        for prompt in (plain, ablated) if sign == 1 else (ablated,):
            with torch.no_grad():
                values.append(
                    [log_likelihood(lm, prompt, response).item() for response in encoded.responses]
                )
                states.append(
                    torch.stack(
                        [last_states(lm, prompt, response) for response in encoded.responses]
                    )
                )
    return {"scores": scores, "log_likelihoods": np.array(values), "last": torch.stack(states)}


def last_states(lm, embeds: Tensor, response: list[int]) -> Tensor:
    """(L+1, D) hidden states at the last position, before the final norm."""
    read = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: read.append(output[0, -1]))
        for layer in lm.layers
    ]
    behind = lm.model.get_input_embeddings()(torch.tensor([response], device=embeds.device))
    sequence = torch.cat([embeds, behind], dim=1)
    lm.model.get_decoder()(inputs_embeds=sequence)
    for handle in handles:
        handle.remove()
    return torch.stack([sequence[0, -1], *read])


@contextmanager
def hooked(lm, vectors: dict[int, Tensor]):
    """h' = (h + v) ||h|| / ||h + v|| at the outputs of layers."""

    def steer(vector):
        def hook(module, args, output):
            shifted = output + vector.to(output)
            return shifted * output.norm(dim=-1, keepdim=True) / shifted.norm(dim=-1, keepdim=True)

        return hook

    handles = [
        lm.layers[layer].register_forward_hook(steer(vector)) for layer, vector in vectors.items()
    ]
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def steering_mc(lm, encoded, configurations) -> np.ndarray:
    """(1 + C, choices) log-likelihoods of one question, a forward per choice and configuration."""
    rows = []
    for vectors in ({}, *(configuration.vectors for configuration in configurations)):
        with hooked(lm, vectors):
            values = []
            for response in encoded.responses:
                ids = torch.tensor([encoded.prompt_ids + response], device=lm.device)
                inputs = encoded.inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                log_probs = lm.model(**inputs).logits[0].float().log_softmax(-1)
                before = torch.arange(len(encoded.prompt_ids) - 1, ids.shape[1] - 1)
                values.append(log_probs[before, torch.tensor(response)].sum().item())
            rows.append(values)
    return np.array(rows)


@torch.no_grad()
def generation(lm, encoded, configurations, max_new_tokens: int) -> list[str]:
    """1 + C greedy continuations of one prompt, a `generate` for each."""
    texts = []
    for vectors in ({}, *(configuration.vectors for configuration in configurations)):
        with hooked(lm, vectors):
            ids = lm.model.generate(
                **encoded.inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=lm.replacement_id("pad"),
            )
        texts.append(
            lm.tokenizer.decode(ids[0, len(encoded.prompt_ids) :], skip_special_tokens=True).strip()
        )
    return texts
