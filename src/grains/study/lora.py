"""LoRA trained on the preference pairs: the fine-tuning that steering is compared with.

LoRA (Hu et al. 2021, arXiv 2106.09685) leaves the weights W of the decoder's linear layers as
they are and learns a product of low rank r beside each:

    W x + (alpha / r) B A x,   A (r, in) random and B (out, r) zero at first,   alpha = 2 r

DPO (Rafailov et al. 2023, arXiv 2305.18290) trains it on pairs of responses, against the model
without it as the reference:

    -log sigmoid(beta ((log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log pi_ref(y-))))

and SFT, supervised fine-tuning, on the preferred responses alone: -log pi(y+) / |y+|.

An adapter is a dict of tensors: <layer>.<module>.lora_A.weight (r, in) and .lora_B.weight
(out, r), in fp32 on the CPU, named from the decoder's list of layers on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.packing import pack
from grains.prompts import Encoded
from grains.replay import capture_pack, gradient_rows, replay
from grains.runs import read_tensors, write_tensors
from grains.scoring import batches, packed_batch
from grains.settings import LORA_OBJECTIVES
from grains.steering import Configuration

# peft is imported in the functions that use it: most experiments train no LoRA.

BETA = 0.1
PAIRS_PER_STEP = 8
RANK, LEARNING_RATE, EPOCHS = 16, 1e-4, 3
RECIPE = {"rank": RANK, "learning_rate": LEARNING_RATE, "epochs": EPOCHS}
ADAPTER = "default"  # peft's name for a single adapter


@dataclass(frozen=True)
class LoraConfiguration(Configuration):
    """The model with LoRA in place of vectors; its strength is the adapter's scale."""

    adapter: dict[str, Tensor] = field(compare=False, repr=False, default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method} x {self.alpha:g}"


@dataclass(frozen=True, eq=False)
class LoraDirection:
    """An adapter at every scale: for LoRA what `Direction` is for vectors."""

    adapter: dict[str, Tensor]
    method: str = "lora"

    def at(self, alpha: float, units: str = "relative") -> LoraConfiguration:
        """The adapter at a scale; the units of a grid do not apply."""
        return LoraConfiguration(self.method, "", (), alpha, adapter=self.adapter)


def train(
    lm: LanguageModel,
    pairs: list[Encoded],
    objective: str = "dpo",
    rank: int = RANK,
    learning_rate: float = LEARNING_RATE,
    epochs: int = EPOCHS,
    seed: int = 0,
    max_tokens: int = 2048,
) -> dict[str, Tensor]:
    """Train an adapter; the model leaves as it came.

    pairs: examples with two responses, the preferred one first. objective: dpo or sft.
    max_tokens: positions computed at a time, which changes no more than rounding: a step of AdamW
        always takes the mean gradient of PAIRS_PER_STEP pairs, drawn anew in every epoch.
    Returns the adapter. Raises UserError if there are no pairs, or if the loss becomes NaN or
    infinite.
    """
    from peft import get_peft_model_state_dict

    if objective not in LORA_OBJECTIVES:
        raise ValueError(f"unknown objective '{objective}': expected {', '.join(LORA_OBJECTIVES)}")
    if not pairs:
        raise UserError("LoRA needs pairs to be trained on, found none: give more examples")
    if objective == "sft":
        pairs = [replace(item, responses=item.responses[:1]) for item in pairs]
    answers = torch.tensor([len(item.responses[0]) for item in pairs])
    reference = base_log_likelihoods(lm, pairs, max_tokens) if objective == "dpo" else None
    generator = torch.Generator().manual_seed(seed)
    with (
        _injected(lm, rank, seed),
        tqdm(total=epochs * len(pairs), desc=f"LoRA ({objective})", unit="pair") as bar,
    ):
        parameters = [tensor for tensor in lm.layers.parameters() if tensor.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        width, checkpointed = fitting(lm, pairs, max_tokens)
        for epoch in range(epochs):
            for step in torch.randperm(len(pairs), generator=generator).split(PAIRS_PER_STEP):
                total = 0.0
                for members in batches([pairs[index].length for index in step], width):
                    batch = step[members]
                    values = log_likelihoods(lm, [pairs[index] for index in batch], checkpointed)
                    losses = (
                        -values[:, 0] / answers[batch]
                        if reference is None
                        else dpo_losses(values, reference[batch])
                    )
                    loss = losses.sum() / len(step)
                    loss.backward(inputs=parameters)
                    total += loss.item()
                if not math.isfinite(total):
                    raise UserError(
                        f"the loss of LoRA ({objective}) became {total} in epoch "
                        f"{epoch + 1}: give a smaller learning rate than "
                        f"{learning_rate:g}, or dtype float32"
                    )
                optimizer.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{total:.3f}", refresh=False)
                bar.update(len(step))
        state = get_peft_model_state_dict(lm.layers, save_embedding_layers=False)
        return {name: tensor.detach().float().cpu().clone() for name, tensor in state.items()}


@contextmanager
def adapted(lm: LanguageModel, adapter: dict[str, Tensor]) -> Iterator[Callable[[float], None]]:
    """The model computes with the adapter within the block, and leaves as it came.

    Yields a function that sets its scale: 1 (also at first) is the adapter as trained, 0 the model
    without it.
    Raises UserError if the adapter is of another model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    def set_scale(scale: float) -> None:
        for module in lm.layers.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(ADAPTER, scale)

    ranks = {len(tensor) for name, tensor in adapter.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise UserError(
            "these tensors are no LoRA adapter: expected lora_A and lora_B of one "
            f"rank, found {', '.join(sorted(adapter)[:3]) or 'nothing'}; train it anew"
        )
    with _injected(lm, ranks.pop()):
        state = get_peft_model_state_dict(lm.layers, save_embedding_layers=False)
        if {name: tensor.shape for name, tensor in state.items()} != {
            name: tensor.shape for name, tensor in adapter.items()
        }:
            raise UserError(
                f"this LoRA adapter is of another model than {lm.name}: its layers "
                "have other names or sizes; train it on this model"
            )
        set_peft_model_state_dict(lm.layers, adapter)
        lm.layers.requires_grad_(False)
        yield set_scale


@contextmanager
def _injected(lm: LanguageModel, rank: int, seed: int = 0) -> Iterator[None]:
    """Within the block, new LoRA layers around all linear layers of the decoder.

    Only these are trainable.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = {
        name: module for name, module in lm.layers.named_modules() if isinstance(module, nn.Linear)
    }
    trainable = [(tensor, tensor.requires_grad) for tensor in lm.layers.parameters()]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=[*linear])
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, lm.layers, ADAPTER)
        for tensor in lm.layers.parameters():
            if tensor.requires_grad:  # small steps of AdamW would be lost in bfloat16
                tensor.data = tensor.data.float()
        yield
    finally:
        for name, module in linear.items():
            lm.layers.set_submodule(name, module)
        vars(lm.layers).pop("peft_config", None)
        for tensor, flag in trainable:
            tensor.requires_grad_(flag)


def log_likelihoods(
    lm: LanguageModel, encoded: list[Encoded], checkpointed: bool = False
) -> Tensor:
    """(n, C) summed log P of each of C responses to n examples of one batch, differentiable.

    checkpointed: see `replay`.
    """
    batch, read = packed_batch(lm, encoded)
    final = replay(lm, batch.embeds, batch.calls, checkpointed=checkpointed)
    return read(final[None])[0].view(len(encoded), -1)


def dpo_losses(values: Tensor, reference: Tensor) -> Tensor:
    """(n,) DPO's loss of each pair.

    values, reference: (n, 2) log-likelihoods of y+ and y-, with the adapter and without.
    """
    chosen, rejected = (values - reference).unbind(dim=1)
    return -logsigmoid(BETA * (chosen - rejected))


@torch.no_grad()
def base_log_likelihoods(lm: LanguageModel, items: list[Encoded], max_tokens: int) -> Tensor:
    """(N, C) log-likelihoods of any number of items, each of C responses, as the model is."""
    values = torch.empty(len(items), len(items[0].responses))
    for group in batches([item.length for item in items], max_tokens):
        values[group] = log_likelihoods(lm, [items[index] for index in group])
    return values


def fitting(lm: LanguageModel, pairs: list[Encoded], max_tokens: int) -> tuple[int, bool]:
    """The positions that can be computed at a time, and whether with checkpoints."""
    longest = max(pairs, key=lambda item: item.length)
    packed = pack(longest.sequences(without_last=True))
    rows, checkpointed = gradient_rows(lm, capture_pack(lm, longest.inputs, packed))
    return min(max_tokens, rows * longest.length), checkpointed


def save(path: str | Path, adapter: dict[str, Tensor], info: dict) -> None:
    """Write a safetensors file, `info` in its header."""
    write_tensors(Path(path), adapter, info | {"stage": "lora"})


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The adapter and the info that `save` wrote. Raises UserError if it is no such file."""
    adapter, info = read_tensors(Path(path))
    if info.get("stage") != "lora":
        raise UserError(f"'{path}' holds no LoRA adapter: give a file that the training wrote")
    return adapter, info
