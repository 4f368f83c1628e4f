"""What the library must agree with: every sequence on its own, through the model's own forward."""

from contextlib import contextmanager

import torch

from grains.calls import first_tensor, with_first
from grains.data import Example
from grains.prompts import Encoded
from helpers.families import WORDS


def example(question, *choices, label=0, id="one", context=""):
    return Example(id, question, tuple(choices), label, context)


def encoded(lm, prompt_ids, responses, content=None):
    """An Encoded of given token ids; `content`: positions of the user's words (default: all)."""
    ids = torch.tensor([prompt_ids], device=lm.device)
    everywhere = torch.ones(len(prompt_ids), dtype=torch.bool)
    mask = torch.zeros_like(everywhere)
    mask[slice(None) if content is None else content] = True
    return Encoded(
        example=example("?", *(" ".join(map(str, response)) for response in responses)),
        text="?",
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        responses=responses,
        content=mask,
        words=everywhere,
        image=torch.zeros_like(everywhere),
    )


def words(count, seed=0):
    """Token ids that are ordinary words of SmolLM2's vocabulary and of the tiny models'."""
    generator = torch.Generator().manual_seed(seed)
    return (300 + torch.randperm(WORDS - 300, generator=generator)[:count]).tolist()


def own_logits(lm, ids):
    """(T, V) logits of one sequence of token ids."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def embeds(lm, ids):
    """(T, D) embeddings that enter layer 0."""
    with torch.no_grad():
        return lm.model.get_input_embeddings()(torch.tensor(ids))


def log_likelihood(lm, prompt, response):
    """sum log P(response | prompt) from the prompt's embeddings (P, D), differentiable.

    prompt: (P, D) or (R, P, D); returns () or (R,).
    """
    single = prompt.dim() == 2
    prompt = prompt[None] if single else prompt
    behind = embeds(lm, response)[None].expand(len(prompt), -1, -1)
    scores = lm.model(
        inputs_embeds=torch.cat([prompt, behind], 1),
        use_cache=False,
        logits_to_keep=len(response) + 1,
    ).logits.float()
    log_probs = scores[:, :-1].log_softmax(-1)
    targets = torch.tensor(response)[None, :, None].expand(len(prompt), -1, 1)
    values = log_probs.gather(-1, targets).sum((1, 2))
    return values[0] if single else values


def own_loss_log_likelihood(lm, prompt_ids, response):
    """The same sum from transformers' own loss, the prompt's labels masked."""
    ids = torch.tensor([prompt_ids + response])
    labels = ids.clone()
    labels[:, : len(prompt_ids)] = -100
    with torch.no_grad():
        return -lm.model(input_ids=ids, labels=labels).loss.item() * len(response)


@contextmanager
def hooked(changes):
    """Modules whose output is changed within the block.

    changes: module -> function from its hidden states to others.
    """
    handles = [
        module.register_forward_hook(
            lambda module, args, output, change=change: with_first(
                output, change(first_tensor(output))
            )
        )
        for module, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layer_outputs(lm):
    """A list that a forward fills: what enters layer 0, then every layer's output."""
    read = []
    handles = [
        lm.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: read.append(args[0]), with_kwargs=True
        )
    ]
    handles += [
        layer.register_forward_hook(lambda module, args, output: read.append(output))
        for layer in lm.layers
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def no_hooks(lm):
    """Whether the model is as it came: no hooks, no replaced forwards, no gradients."""
    return all(
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in module.__dict__
        for module in lm.model.modules()
    ) and all(parameter.grad is None for parameter in lm.model.parameters())


def relative(found, expected):
    """||found - expected|| / ||expected||."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    return ((found - expected).norm() / expected.norm()).item()
