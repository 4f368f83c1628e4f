"""One other program on the case of interop.py, in an environment of its own.

    python interop_clients.py CLIENT FOLDER

FOLDER holds case.json (model, ids, count) and the exports. Writes FOLDER/results/CLIENT.npz: logits
(T, V) and the ids of the greedy text; and prints the versions of what computed them as JSON.
Nothing of GrAInS is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Forward = Callable[[torch.Tensor], torch.Tensor]  # ids (1, T) -> logits (1, T, V)
Continue = Callable[[torch.Tensor, int], torch.Tensor]  # ids (1, T), count -> ids (1, T + count)
Client = tuple[Forward, Continue]


def load(folder: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def plain(model: Any) -> Client:
    return (
        lambda ids: model(ids, use_cache=False).logits,
        lambda ids, count: model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
        ),
    )


def transformers_bias(folder: Path, model: str) -> Client:
    return plain(load(folder / "hf-bias"))


def transformers_code(folder: Path, model: str) -> Client:
    return plain(load(folder / "hf", trust_remote_code=True))


def transformers_positions(folder: Path, model: str) -> Client:
    """Where the prompt ends a forward must be told; generate knows."""
    loaded = load(folder / "hf-positions", trust_remote_code=True)
    _, go_on = plain(loaded)
    return lambda ids: loaded(ids, use_cache=False, prompt_length=ids.shape[1]).logits, go_on


def peft(folder: Path, model: str) -> Client:
    from peft import PeftModel

    return plain(PeftModel.from_pretrained(load(model), folder / "peft"))


def peft_auto(folder: Path, model: str) -> Client:
    """AutoModelForCausalLM on the adapter's folder, which names its base model."""
    config = folder / "peft" / "adapter_config.json"
    content = json.loads(config.read_text()) | {"base_model_name_or_path": model}
    config.write_text(json.dumps(content))
    return plain(load(folder / "peft"))


def lm_eval(folder: Path, model: str) -> Client:
    """lm-eval's `--model steered`, through the call that its tasks are scored by."""
    from lm_eval.models.hf_steered import SteeredModel

    steered = SteeredModel(
        pretrained=model,
        steer_path=str(folder / "lm-eval" / "steer.pt"),
        dtype="float32",
        device="cpu",
    )
    return (
        steered._model_call,
        lambda ids, count: steered._model_generate(ids, ids.shape[1] + count, stop=[]),
    )


def repeng(folder: Path, model: str, normalize: bool = False) -> Client:
    """repeng on the file that llama.cpp takes."""
    from repeng import ControlModel, ControlVector

    vector = ControlVector.import_gguf(folder / "gguf" / "vectors.gguf")
    controlled = ControlModel(load(model), [*vector.directions])
    controlled.set_control(vector, 1.0, normalize=normalize)
    return plain(controlled.model)


def repeng_norm(folder: Path, model: str) -> Client:
    return repeng(folder, model, normalize=True)


CLIENTS: dict[str, tuple[Callable[[Path, str], Client], tuple[str, ...]]] = {
    "transformers_bias": (transformers_bias, ("transformers",)),
    "transformers_code": (transformers_code, ("transformers",)),
    "transformers_positions": (transformers_positions, ("transformers",)),
    "peft": (peft, ("peft",)),
    "peft_auto": (peft_auto, ("peft", "transformers")),
    "lm_eval": (lm_eval, ("lm_eval",)),
    "repeng": (repeng, ("repeng",)),
    "repeng_norm": (repeng_norm, ("repeng",)),
}


@torch.no_grad()
def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    case = json.loads((folder / "case.json").read_text())
    make, packages = CLIENTS[name]
    forward, go_on = make(folder, case["model"])
    ids = torch.tensor([case["ids"]])
    logits = forward(ids)[0]
    greedy = go_on(ids, case["count"])[0, ids.shape[1] :]
    (folder / "results").mkdir(exist_ok=True)
    np.savez(folder / "results" / f"{name}.npz", logits=logits.numpy(), greedy=greedy.numpy())
    print(json.dumps({package: importlib.metadata.version(package) for package in packages}))


if __name__ == "__main__":
    main()
