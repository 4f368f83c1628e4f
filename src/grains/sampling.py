"""How each next token is chosen: greedily, drawn, or as the model's own generation config says."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import DecodingSettings

# What of a generation config changes which token comes next, with the values that change nothing.
DRAWING = {
    "temperature": (1.0,),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
CHANGING = {
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
}
# What other ways of decoding are asked for with, and what is not done here: values that ask for it.
OTHER_WAYS = {
    "num_beams": lambda value: value > 1,
    "guidance_scale": lambda value: value != 1,
    "watermarking_config": bool,
    "stop_strings": bool,
    "prompt_lookup_num_tokens": bool,
}


def end_tokens(lm: LanguageModel) -> list[int]:
    """The tokens that end a text, by the model's generation config."""
    ids = lm.model.generation_config.eos_token_id
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


@dataclass(frozen=True, eq=False)
class Choosing:
    """How the tokens of all texts of a run are chosen.

    acting: what acts on the choice, by its name in a generation config; empty: greedy.
    config: the same as a generation config.
    """

    acting: dict[str, Any]
    config: GenerationConfig

    def __str__(self) -> str:
        """What acts, in words."""
        if not self.acting:
            return "the likeliest, nothing else acts"
        return ", ".join(f"{name} {value}" for name, value in self.acting.items())

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.acting.get("do_sample"))


def choosing(lm: LanguageModel, settings: DecodingSettings) -> Choosing:
    """What the settings, and the model's generation config if they say so, make of the choice.

    Raises UserError if the model's config asks for a way of decoding that is not supported.
    """
    own = lm.model.generation_config
    of_model = settings.generation_config == "model"
    source = own if of_model else GenerationConfig()
    for name, asks in OTHER_WAYS.items() if of_model else ():
        value = getattr(own, name, None)
        if value is not None and asks(value):
            raise UserError(
                f"{lm.name}: its generation config sets {name} to {value}, which is not supported; "
                "give generation_config 'greedy' and the settings that you want"
            )
    values = {name: getattr(source, name, None) for name in (*DRAWING, *CHANGING)}
    draws = bool(source.do_sample)
    if settings.temperature is not None:
        draws, values["temperature"] = settings.temperature > 0, settings.temperature
    if settings.top_p is not None:
        values["top_p"] = settings.top_p
    acting: dict[str, Any] = {"do_sample": True} if draws else {}
    for name, neutral in ((DRAWING if draws else {}) | CHANGING).items():
        if values[name] is not None and values[name] not in neutral:
            acting[name] = copy.deepcopy(values[name])
    if settings.num_return > 1 and not draws:
        raise UserError(
            f"num_return {settings.num_return}: without a temperature all texts would be the same; "
            "give a temperature above 0, or num_return 1"
        )
    config = GenerationConfig(**acting)
    ends = end_tokens(lm)
    config.eos_token_id = ends or None
    config._eos_token_tensor = torch.tensor(ends, device=lm.device) if ends else None
    return Choosing(dict(sorted(acting.items())), config)


@contextmanager
def nothing_else_acts(lm: LanguageModel) -> Iterator[None]:
    """The model's generation config holds its special tokens alone within the block."""
    own = lm.model.generation_config
    kept = {
        name: getattr(own, name)
        for name in ("bos_token_id", "eos_token_id", "cache_implementation")
    }
    lm.model.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        lm.model.generation_config = own


def generator(seed: int, name: str, draw: int = 0) -> torch.Generator:
    """The random numbers of one text: the same in every batch, under every configuration.

    name: the question's id. draw: the text's number among those of the same question.
    """
    digest = hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


class Choice:
    """Chooses the tokens of one text, by the text's own tokens: it never sees padding.

    prompt_ids: (P,) the prompt's token ids. limit: the number of new tokens at most.
    numbers: what is drawn with (see `generator`).
    """

    def __init__(
        self,
        lm: LanguageModel,
        how: Choosing,
        prompt_ids: list[int],
        limit: int,
        numbers: torch.Generator | None = None,
    ):
        self.numbers = numbers if how.draws else None
        self.processors = LogitsProcessorList()
        if how.acting:
            config = copy.copy(how.config)
            config.max_length = len(prompt_ids) + limit
            self.processors = lm.model._get_logits_processor(
                config,
                input_ids_seq_length=len(prompt_ids),
                encoder_input_ids=torch.tensor([prompt_ids], device=lm.device),
                device=lm.device,
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the token is simply the likeliest."""
        return not self.processors and self.numbers is None

    def token(self, logits: Tensor, ids: list[int]) -> int:
        """The next token. logits: (V,) of the model. ids: the prompt's tokens and those behind."""
        scores = self.processors(torch.tensor([ids], device=logits.device), logits[None].float())[0]
        if self.numbers is None:
            return int(scores.argmax())
        # By one uniform number on the CPU: the same draw on every device.
        weights = scores.cpu().double().softmax(-1).cumsum(-1)
        place = torch.rand((), generator=self.numbers, dtype=torch.float64) * weights[-1]
        return int(torch.searchsorted(weights, place, right=True).clamp_max(len(weights) - 1))
