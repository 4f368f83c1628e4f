"""Stage 1: find the prompt tokens that push the model to one answer or the other, and what the
hidden states lose when those tokens are ablated.

For every steering example (a prompt with a preferred and a dispreferred answer) the prompt's
tokens are attributed once; for each --top the k selected tokens are ablated, and the last-position
hidden states of all layers are kept, plain and ablated.
"""

from __future__ import annotations

import json
from pathlib import Path

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from grains import ablation, cli, data, prompts, runs, vision
from grains.attribution import BASELINES, IMAGE_BASELINES, SCOPES, Settings, attribute, moved
from grains.errors import UserError

IMAGE_COLUMNS = (
    "positive_share_image",
    "positive_share_text",
    "negative_share_image",
    "negative_share_text",
    "image_positions",
    "image_boxes",
)
SUMMARISED = (
    "id",
    "top",
    "k",
    "f",
    "f_ablated",
    "completeness_error_relative_worst",
    "gradients_computed",
)


def flags(kind: cli.Kind):
    parser = cli.parser(__doc__, kind)
    cli.add_model_flags(parser)
    cli.add_data_flags(parser)
    cli.add_stage1_flags(parser)
    group = parser.add_argument_group("attribution in detail")
    group.add_argument(
        "--top",
        nargs="+",
        default=["pos", "neg"],
        choices=ablation.TOPS,
        help="tokens to ablate: largest, smallest, largest magnitude, or random "
        "ones (control); several share one attribution",
    )
    group.add_argument(
        "--ig_steps",
        default="auto",
        help="points of the Gauss-Legendre rule (the paper's: 20), or auto: refine until complete",
    )
    group.add_argument(
        "--ig_baseline",
        default=Settings.baseline,
        choices=BASELINES,
        help="embedding the path starts from (the paper's: zeros)",
    )
    group.add_argument(
        "--attribute",
        default=Settings.attribute,
        choices=SCOPES,
        help="positions that move along the path: content (the user's words and "
        "the picture), all (the paper's), image or text alone",
    )
    group.add_argument(
        "--ablate",
        default="all",
        choices=("all", "image", "text"),
        help="which of the attributed positions may be ablated",
    )
    group.add_argument(
        "--ig_tolerance",
        type=float,
        default=Settings.tolerance,
        help="auto: completeness error allowed, as a share of |f(x) - f(b)|",
    )
    group.add_argument(
        "--ig_max_points",
        type=int,
        default=Settings.max_points,
        help="auto: gradients spent on an example at most",
    )
    group.add_argument(
        "--replacement",
        default="pad",
        choices=("pad", "unk"),
        help="token whose embedding takes an ablated token's place",
    )
    if kind.images:
        group.add_argument(
            "--image_baseline",
            default=Settings.image_baseline,
            choices=IMAGE_BASELINES,
            help="where an image token's path starts: the features of a blank "
            "picture, the picture's mean feature, zeros (the paper's)",
        )
        group.add_argument(
            "--image_replacement",
            default="mean",
            choices=IMAGE_BASELINES,
            help="what takes an ablated image token's place",
        )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_path_meta",
        help="CSV of attributions and log-likelihoods "
        f"(default: results/{kind.name}/token_attribution/...)",
    )
    group.add_argument(
        "--output_path_hidden",
        help="safetensors file of hidden states (default: "
        f"data/{kind.name}/hidden_states/...); with several --top the selection is "
        "put before its ending",
    )
    return parser


def main(kind: cli.Kind = cli.LLM) -> None:
    run(flags(kind).parse_args())


def run(args, lm=None, known: dict | None = None) -> dict[str, Path]:
    """Do the stage, with a model that is loaded already if there is one.

    known: attributions that runs with other selections or seeds have in common, which are added.
    Returns the files of hidden states by their selection.
    """
    tops = list(dict.fromkeys(args.top))
    settings = Settings(
        args.attribution,
        args.grad_method,
        args.ig_baseline,
        getattr(args, "image_baseline", Settings.image_baseline),
        args.attribute,
        ig_steps(args.ig_steps),
        args.ig_tolerance,
        args.ig_max_points,
    )
    meta, hidden = cli.stage1_paths(args, tops)

    examples = [example.pair() for example in cli.steering_examples(args)]
    lm = lm or cli.load_model(args)
    # What cannot be read is better known now than after days; pictures do not stay in memory.
    state = runs.processes()
    for example in tqdm(
        examples[state.process_index :: state.num_processes],
        "reading examples",
        leave=False,
        disable=not state.is_main_process,
    ):
        prompts.encode(lm, example, args.prompt_style)

    manifest = cli.stage1_manifest(args, lm, examples, settings)
    size = 6 * (len(lm.layers) + 1) * lm.hidden_size * 4 * len(examples) * len(tops)
    work = runs.Run([meta, *hidden.values()], manifest | {"top": tops}, args.overwrite, 2 * size)
    if work.finished:
        work.state.print("nothing to do: these results are already there")
    else:
        for unit in work.todo(len(examples), "token ablation"):
            encoded = prompts.encode(lm, examples[unit], args.prompt_style)
            work.save(
                unit,
                *one_example(
                    lm, encoded, settings, tops, args, unit, {} if known is None else known
                ),
            )
        if work.all_done():
            write(work, len(examples), meta, hidden, manifest)
        work.finish()
    if work.state.is_main_process:
        summary(meta, hidden, settings, args.top_k)
    return hidden


def ig_steps(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--ig_steps {text}: expected a whole number of at least 1, or auto")
    return int(text)


def one_example(lm, encoded, settings, tops, args, unit, known):
    """Attribute, ablate and read one example: its tensors, and a row for each selection."""
    seed = args.seed * 1_000_003 + unit
    noise, generator = (torch.Generator().manual_seed(seed) for _ in range(2))
    key = (
        data.question_key(encoded.example),
        data.fingerprint([encoded.example]),
        settings,
        args.prompt_style,
        args.batch_tokens,
        settings.grad_method == "smoothgrad" and seed,
    )
    if key not in known:
        known[key] = attribute(lm, encoded, settings, args.batch_tokens, noise)
    attributions = known[key]
    kinds = {"all": encoded.words | encoded.image, "image": encoded.image, "text": encoded.words}
    candidates = moved(encoded, settings.attribute) & kinds[args.ablate]
    if not candidates.any():
        raise UserError(
            f"example {encoded.example.id}: no position is left to ablate with "
            f"--attribute {settings.attribute} --ablate {args.ablate}"
        )

    # Contrastive: one selection for both responses. Normal: one for each.
    chosen = {
        top: [
            ablation.select(torch.from_numpy(item.scores), candidates, args.top_k, top, generator)
            for item in attributions
        ]
        for top in tops
    }
    variants = [positions for top in tops for positions in chosen[top]]
    states = ablation.hidden_states(
        lm,
        encoded,
        variants,
        args.batch_tokens,
        args.replacement,
        getattr(args, "image_replacement", "mean"),
    )
    if not torch.isfinite(states.log_likelihoods).all() or not torch.isfinite(states.last).all():
        raise UserError(
            f"example {encoded.example.id}: {lm.name} gives NaN or infinite hidden "
            f"states in {lm.dtype}; use --dtype float32 or bfloat16"
        )

    tensors = {
        "hidden_pos_response": states.last[0, 0],
        "hidden_neg_response": states.last[0, 1],
        "norms": states.norms,
        "gradients": states.gradients,
    }
    rows = []
    tokens = lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids)
    plain = states.log_likelihoods[0].tolist()
    for index, top in enumerate(tops):
        first = 1 + index * len(attributions)
        last = first + len(attributions) - 1  # the same variant if contrastive
        tensors[f"hidden_pos_response_ablated.{top}"] = states.last[first, 0]
        tensors[f"hidden_neg_response_ablated.{top}"] = states.last[last, 1]
        pos = states.log_likelihoods[first, 0].item()
        neg = states.log_likelihoods[last, 1].item()
        rows.append(
            {
                "id": encoded.example.id,
                "top": top,
                "question": encoded.example.question,
                "chosen": encoded.example.chosen,
                "rejected": encoded.example.rejected,
                "f": plain[0] - plain[1],
                "f_ablated": pos - neg,
                "log_likelihood_pos": plain[0],
                "log_likelihood_neg": plain[1],
                "log_likelihood_pos_ablated": pos,
                "log_likelihood_neg_ablated": neg,
                "k": len(chosen[top][0]),
                "selected_positions": json.dumps(chosen[top]),
                "selected_tokens": json.dumps(
                    [[tokens[i] for i in positions] for positions in chosen[top]],
                    ensure_ascii=False,
                ),
                "f_change_along_path": attributions[0].difference,
                "completeness_error": attributions[0].completeness_error,
                "completeness_error_relative": attributions[0].relative_error,
                "completeness_error_relative_worst": max(a.relative_error for a in attributions),
                "gradients_computed": sum(item.points for item in attributions),
                **image_columns(lm, encoded, attributions[0].scores),
                "tokens": json.dumps(tokens, ensure_ascii=False),
                "attributions": json.dumps(
                    [np.round(item.scores, 6).tolist() for item in attributions]
                ),
            }
        )
    return tensors, rows


def image_columns(lm, encoded, scores) -> dict:
    """What the picture takes of the attribution, and where its tokens lie in it."""
    if lm.processor is None:
        return {}
    image = encoded.image.numpy()
    if not image.any():
        return dict.fromkeys(IMAGE_COLUMNS)
    positive, negative = np.clip(scores, 0, None), np.clip(-scores, 0, None)
    size = vision.open_image(encoded.example).size
    boxes = vision.token_boxes(lm, encoded.inputs, size, int(image.sum()))
    return dict(
        zip(
            IMAGE_COLUMNS,
            (
                positive[image].sum() / max(positive.sum(), 1e-12),
                positive[~image].sum() / max(positive.sum(), 1e-12),
                negative[image].sum() / max(negative.sum(), 1e-12),
                negative[~image].sum() / max(negative.sum(), 1e-12),
                json.dumps(np.flatnonzero(image).tolist()),
                json.dumps([box and [round(x, 2) for x in box] for box in boxes]),
            ),
            strict=True,
        )
    )


def write(run, count, meta, hidden, manifest) -> None:
    """Merge the finished examples into the CSV and one file of hidden states per selection."""
    shared = ("hidden_pos_response", "hidden_neg_response", "norms", "gradients")
    ablated = ("hidden_pos_response_ablated", "hidden_neg_response_ablated")
    for top, path in hidden.items():
        names = {name: name for name in shared} | {name: f"{name}.{top}" for name in ablated}
        runs.write_stacked(
            path,
            names,
            lambda: (tensors for tensors, _ in run.units(count)),
            count,
            manifest | {"top": top},
        )
    runs.write_rows(meta, (rows for _, rows in run.units(count)))


def summary(meta, hidden, settings, top_k) -> None:
    table = pd.read_csv(meta, usecols=SUMMARISED)
    once = table.drop_duplicates("id")
    if settings.grad_method == "integrated_gradients":
        errors = once.completeness_error_relative_worst
        above = int((errors > settings.tolerance).sum())
        print(
            f"completeness error |sum a - (f(x) - f(b))| / |f(x) - f(b)|: median "
            f"{errors.median():.1%}, {above} of {len(errors)} examples above "
            f"{settings.tolerance:.0%}; gradients an example: median "
            f"{once.gradients_computed.median():.0f}"
        )
    short = int((once.k < top_k).sum())
    if short:
        print(
            f"warning: {short} prompts have fewer candidate tokens than --top_k; all of theirs "
            "were ablated"
        )
    for top, part in table.groupby("top", sort=False):
        change = (part.f_ablated - part.f).mean()
        print(f"ablating top '{top}': mean change of f = log P(y+) - log P(y-): {change:+.3f}")
    print(f"attributions:  {meta}")
    for top, path in hidden.items():
        print(f"hidden states: {path} ({top})")


if __name__ == "__main__":
    cli.main(main)
