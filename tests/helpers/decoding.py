"""Greedy decoding of one prompt by the model's own forward, and vectors to steer it by."""

import torch

from grains.steering import Configuration, steered


def greedy(lm, prompt_ids, vectors, count):
    """Greedy token ids from one unpadded prompt, by the model's forward and its own cache."""
    stop = lm.model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [stop]
    new, ids, past = [], torch.tensor([prompt_ids]), None
    with torch.no_grad(), steered(lm, vectors):
        for _ in range(count):
            output = lm.model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            if int(ids) in stop:
                break
            new.append(int(ids))
    return new


def text_of(lm, ids):
    return lm.tokenizer.decode(ids, skip_special_tokens=True).strip()


def random_configuration(lm, layers, strength, seed):
    generator = torch.Generator().manual_seed(seed)
    return Configuration(
        "some",
        "",
        layers,
        strength,
        {layer: strength * torch.randn(lm.hidden_size, generator=generator) for layer in layers},
    )
