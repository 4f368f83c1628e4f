"""The work of GrAInS done with other packages, for benchmarks against them.

Runs in an environment of its own (requirements-peers.txt), on the same model folder and the same
preference pairs, and writes how long it took:

    python benchmarks/peers.py captum --model FOLDER --pairs pairs.json --output out.json

pairs.json: a list of {"prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids",
"moves"}; the responses carry their leading space, and moves says which positions of the prompt
captum moves from zero, the others stay.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str):
    """The model in fp32 with frozen weights, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder)


def captum_scores(args):
    """Integrated Gradients of f = log P(y+ | x) - log P(y- | x): the quantity of GrAInS.

    From a baseline of zeros (where the pair's positions move) to the prompt's embeddings, responses
    fixed, all steps in one batch.
    Gives (P,) scores of each pair.
    """
    from captum.attr import IntegratedGradients

    model, _ = load(args.model)
    embed = model.get_input_embeddings()

    def log_likelihood(prompts: Tensor, response: Tensor) -> Tensor:
        """log P(response | prompt) (R,) of prompt embeddings (R, P, D)."""
        fixed = embed(response[:-1]).expand(len(prompts), -1, -1)
        logits = model(
            inputs_embeds=torch.cat([prompts, fixed], dim=1),
            use_cache=False,
            logits_to_keep=len(response),
        ).logits
        chosen = response.expand(len(prompts), -1)[..., None]
        return logits.log_softmax(-1).gather(-1, chosen).sum(dim=(1, 2))

    def scores(pair: dict) -> Tensor:
        prompt, chosen, rejected = (
            torch.tensor(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")
        )
        method = IntegratedGradients(
            lambda x: log_likelihood(x, chosen) - log_likelihood(x, rejected)
        )
        inputs = embed(prompt)[None]
        start = torch.where(torch.tensor(pair["moves"])[None, :, None], 0.0, inputs)
        return method.attribute(inputs, start, n_steps=args.steps)[0].sum(-1)

    return lambda pairs: {str(i): scores(pair) for i, pair in enumerate(pairs)}


def inseq_scores(args):
    """Contrastive Integrated Gradients, one attribution for each token of the chosen response.

    Gives (P,) scores of each pair, summed over the tokens y+_t of the chosen response. This is
    not the quantity of GrAInS: inseq attributes
    log P(y+_t | x, y+_<t) - log P(y-_t | x, y+_<t), both after the *chosen* prefix, so y-_t is
    never read after its own prefix; where y- is the shorter one its last token is taken again,
    where it is the longer one the rest is left out. The prefix y+_<t moves along with the prompt
    and takes a share of the scores, and the path starts at the unk token's embedding.
    """
    import inseq

    model = inseq.load_model(args.model, "integrated_gradients")

    def scores(pair: dict) -> Tensor:
        start, chosen, rejected = (
            len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")
        )
        result = model.attribute(
            pair["prompt"],
            pair["prompt"] + pair["chosen"],
            attributed_fn="contrast_prob_diff",
            logprob=True,
            # inseq needs a contrast for each row of captum's batch, which holds all steps.
            contrast_targets=[pair["prompt"] + pair["rejected"]] * args.steps,
            contrast_targets_alignments=[
                (start + i, start + min(i, rejected - 1)) for i in range(chosen)
            ],
            n_steps=args.steps,
            show_progress=False,
        )
        return result.sequence_attributions[0].target_attributions[:start].sum(dim=(1, 2))

    return lambda pairs: {str(i): scores(pair) for i, pair in enumerate(pairs)}


def steering_vectors_mean(args):
    """The mean of h(x y+) - h(x y-) at the last token, after each layer: `caa` of GrAInS.

    Gives "vectors" (L, D).
    """
    from steering_vectors import train_steering_vector

    model, tokenizer = load(args.model)

    def run(pairs: list[dict]) -> dict[str, Tensor]:
        vector = train_steering_vector(
            model,
            tokenizer,
            [(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) for p in pairs],
            read_token_index=-1,
            batch_size=args.batch_size,
        )
        layers = vector.layer_activations
        return {"vectors": torch.stack([layers[i] for i in sorted(layers)])}

    return run


def repeng_pca(args):
    """The first principal component of h(x y+) - h(x y-) at the last token, after each layer.

    Gives "vectors" (L, D), of unit length. The differences are centred first, so what they have in
    common, their mean, does not count; the last layer is read after the final norm.
    """
    from repeng import ControlModel, ControlVector, DatasetEntry

    model, tokenizer = load(args.model)
    layers = range(model.config.num_hidden_layers)
    model = ControlModel(model, layers)

    def run(pairs: list[dict]) -> dict[str, Tensor]:
        dataset = [
            DatasetEntry(p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) for p in pairs
        ]
        vector = ControlVector.train(
            model,
            tokenizer,
            dataset,
            hidden_layers=layers,
            method="pca_diff",
            batch_size=args.batch_size,
        )
        return {"vectors": torch.stack([torch.from_numpy(vector.directions[i]) for i in layers])}

    return run


def nnsight_mean(args):
    """The mean of h(x y+) - h(x y-) at the last token, as `steering_vectors_mean`.

    Gives "vectors" (L, D).
    """
    from nnsight import LanguageModel

    lm = LanguageModel(args.model, device_map="cpu", dtype=torch.float32, dispatch=True)
    lm.tokenizer.padding_side = "left"
    count = lm.config.num_hidden_layers

    def last(texts: list[str]) -> Tensor:
        """(texts, L, D)"""
        with torch.no_grad(), lm.trace(texts):
            states = [lm.model.layers[index].output[:, -1] for index in range(count)]
            stacked = torch.stack(states, dim=1).save()
        return stacked

    def run(pairs: list[dict]) -> dict[str, Tensor]:
        total = torch.zeros(count, lm.config.hidden_size)
        for start in range(0, len(pairs), args.batch_size):
            some = pairs[start : start + args.batch_size]
            chosen = last([p["prompt"] + p["chosen"] for p in some])
            total += (chosen - last([p["prompt"] + p["rejected"] for p in some])).sum(0)
        return {"vectors": total / len(pairs)}

    return run


# job -> how to prepare it, and the packages it measures
JOBS = {
    "captum": (captum_scores, ["captum"]),
    "inseq": (inseq_scores, ["inseq", "captum"]),
    "steering-vectors-mean": (steering_vectors_mean, ["steering-vectors"]),
    "repeng-pca": (repeng_pca, ["repeng"]),
    "nnsight-mean": (nnsight_mean, ["nnsight"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--pairs", required=True, help="the preference pairs (JSON)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="points of Integrated Gradients")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="pairs (steering-vectors, nnsight) or texts (repeng) in a batch",
    )
    parser.add_argument("--output", required=True, help="where the measurements go (JSON)")
    parser.add_argument("--save", help="where the results go (safetensors)")
    args = parser.parse_args()

    prepare, packages = JOBS[args.job]
    pairs = json.loads(Path(args.pairs).read_text())
    run = prepare(args)
    torch.set_num_threads(args.threads)
    threadpool_limits(args.threads)
    run(pairs[:2])  # warm-up; a principal component needs two
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        results = run(pairs)
        seconds.append(time.perf_counter() - begin)

    # Linux gives kibibytes, macOS bytes
    unit = 1 if sys.platform == "darwin" else 1024
    Path(args.output).write_text(
        json.dumps(
            {
                "job": args.job,
                "seconds": seconds,
                "pairs": len(pairs),
                "versions": {name: version(name) for name in [*packages, "torch", "transformers"]},
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            },
            indent=2,
        )
        + "\n"
    )
    if args.save:
        save_file(
            {name: tensor.float().contiguous() for name, tensor in results.items()}, args.save
        )


if __name__ == "__main__":
    main()
