"""Flags that several scripts share, and how a script ends."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets.utils.logging as datasets_logging
import huggingface_hub
import torch
import transformers

from grains import cpu, ctrl_c, data, models, runs, vectors
from grains.ablation import TOPS
from grains.attribution import GRAD_METHODS, OBJECTIVES
from grains.errors import UserError
from grains.prompts import STYLES
from grains.scoring import Configuration, Direction, layer_ranges

SRC = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Kind:
    """What differs between the scripts for text and those for images and text.

    name: the folder under data/ and results/; model, dataset, top_k, prompt_style: the defaults
    (the paper's experiment).
    """

    name: str
    model: str
    dataset: str
    top_k: int
    prompt_style: str
    images: bool


LLM = Kind("llm", "llama-3.1-8b-instruct", "truthfulqa", 10, "qa", False)
VLM = Kind("vlm", "llava-1.6-7b", "spa-vl", 50, "chat", True)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that are simply not given."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description: str, kind: Kind) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    flags.set_defaults(kind=kind)
    return flags


def evaluation_parser(
    description: str, kind: Kind, chosen_by_default: bool = False
) -> argparse.ArgumentParser:
    """The flags of every script that tries steering vectors (see `add_grid_flags`)."""
    flags = parser(description, kind)
    add_model_flags(flags)
    add_data_flags(flags)
    add_stage1_flags(flags)
    add_vector_flags(flags)
    add_grid_flags(flags, chosen_by_default)
    add_evaluation_flags(flags)
    return flags


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("model and machine")
    group.add_argument(
        "--model_name",
        default=flags.get_default("kind").model,
        help="short name ("
        + ", ".join([models.EMBEDDED, *models.MODELS])
        + "), hub id or local folder",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *models.DTYPES],
        help="auto: the checkpoint's on an accelerator, float32 on a CPU",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator if any)")
    group.add_argument(
        "--device_map", choices=["auto"], help="auto: spread the layers over all devices"
    )
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code from the model's repository"
    )
    group.add_argument(
        "--batch_tokens",
        type=positive,
        default=2048,
        help="positions computed at a time: the internal batch limit",
    )
    group.add_argument(
        "--max_memory",
        type=positive_float,
        help="GiB that the activations of attribution may take beside the weights "
        "(default: 80 %% of what is free on a GPU, half of a CPU's)",
    )
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="do a run anew whose outputs exist from other settings",
    )


def add_data_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default=flags.get_default("kind").dataset,
        help="short name (" + ", ".join(data.DATASETS) + "), or any label "
        "together with --dataset_path",
    )
    group.add_argument(
        "--dataset_path",
        help="local file (.jsonl, .csv, .parquet) or folder, in "
        "the data set's own columns, or prompt/chosen/rejected, or "
        "question/choices/label",
    )
    group.add_argument(
        "--num_samples",
        type=positive,
        default=50,
        help="steering examples: those that vectors are made from",
    )
    group.add_argument("--split", help="split of the steering examples (default: the data set's)")
    group.add_argument(
        "--prompt_style",
        default=flags.get_default("kind").prompt_style,
        choices=STYLES,
        help="qa: 'Q: ...\\nA:'; chat: the model's chat template; plain: as it is",
    )


def add_stage1_flags(flags: argparse.ArgumentParser) -> None:
    """What a stage-1 run is known by; the later stages find its files by the same flags."""
    group = flags.add_argument_group("attribution and ablation")
    group.add_argument(
        "--attribution",
        default="contrastive",
        choices=OBJECTIVES,
        help="contrastive: log P(y+) - log P(y-); normal: each response on its own",
    )
    group.add_argument("--grad_method", default="integrated_gradients", choices=GRAD_METHODS)
    group.add_argument(
        "--top_k", type=positive, default=flags.get_default("kind").top_k, help="tokens to ablate"
    )


def add_vector_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("steering vectors")
    group.add_argument(
        "--hidden_states_path",
        help="stage 1's file of the 'pos' ablation (default: found by the flags above)",
    )
    group.add_argument(
        "--hidden_states_neg_path", help="stage 1's file of the 'neg' ablation, for mode 'both'"
    )
    group.add_argument(
        "--hidden_states_rand_path",
        help="stage 1's file of the 'rand' ablation, for the control rand_tokens",
    )
    group.add_argument(
        "--steering_vectors_dir",
        help="folder the vectors are written to (default: data/.../steering_vectors)",
    )


METHODS = ["mean", "pca", "gradient", "caa", "random"]
LAYERS, ALPHAS = ["all"], [0.005, 0.01, 0.02, 0.03]


def add_grid_flags(flags: argparse.ArgumentParser, chosen_by_default: bool = False) -> None:
    """The grid of configurations; with `chosen_by_default` none is given unless asked for."""
    group = flags.add_argument_group("configurations")
    group.add_argument(
        "--methods",
        nargs="+",
        default=None if chosen_by_default else METHODS,
        choices=vectors.METHODS,
        help="mean, pca: of the ablation shifts; gradient: mean gradient; caa: "
        "mean difference of the responses' states; repe: its first principal "
        "component; controls: random directions, rand_tokens (ablation of "
        "random tokens), shuffled (gradients, answers swapped at random)",
    )
    group.add_argument(
        "--mode",
        nargs="+",
        default=["pos"],
        choices=vectors.MODES,
        help="of mean and pca: pos, or both = pos - neg",
    )
    group.add_argument(
        "--layer_idxs",
        nargs="+",
        default=None if chosen_by_default else LAYERS,
        help="decoder layers: numbers, negative numbers, ranges (10-29), all",
    )
    group.add_argument(
        "--layer_mode",
        default="joint",
        choices=("each", "from", "joint"),
        help="each: one configuration per layer; from: one per layer, that layer "
        "and all above it; joint: all of them at once",
    )
    group.add_argument(
        "--alphas",
        nargs="+",
        type=finite,
        default=None if chosen_by_default else ALPHAS,
        help="strengths",
    )
    group.add_argument(
        "--alpha_units",
        default="relative",
        choices=("relative", "absolute"),
        help="relative: shares of the median activation norm, along unit vectors; "
        "absolute: multiples of the vector as reduced (the paper's)",
    )
    if chosen_by_default:
        group.add_argument(
            "--chosen_path",
            help="the configuration that steering_mc.py chose, "
            "used where none of these flags is given (default: found by the flags)",
        )


def add_evaluation_flags(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("evaluation")
    group.add_argument(
        "--evaluate_on",
        default="held_out",
        choices=("held_out", "all"),
        help="held_out: choose on validation, report on test questions; all: every "
        "question, the steering examples included (the authors' way)",
    )
    group.add_argument("--num_validation", type=positive, default=150, help="validation questions")
    group.add_argument("--num_test", type=positive, help="test questions (default: the rest)")
    group.add_argument("--validation_split", help="their split (default: the data set's)")
    group.add_argument("--test_split", help="their split (default: the data set's)")
    group.add_argument(
        "--score",
        default="token",
        choices=("sum", "token"),
        help="what the choice of a configuration goes by: accuracy of the summed "
        "or of the per-token log-likelihood (both are reported)",
    )
    group.add_argument("--output_dir", help="folder of the tables (default: results/...)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least 1")
    return value


def positive_float(text: str) -> float:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return value


def not_negative(text: str) -> float:
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return value


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def parse_layers(items: list[str], count: int) -> list[int]:
    """Layer numbers, negative numbers, ranges ('10-29') and 'all' -> sorted layers of `count`."""
    layers: set[int] = set()
    for item in items:
        if item == "all":
            layers |= set(range(count))
        elif match := re.fullmatch(r"(\d+)-(\d+)", item):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise UserError(f"layers '{item}': the range runs backwards")
            layers |= set(range(first, last + 1))
        elif re.fullmatch(r"-?\d+", item):
            layer = int(item)
            layers.add(layer + count if -count <= layer < 0 else layer)
        else:
            raise UserError(f"layers '{item}': expected a number, a range like 10-29, or all")
    wrong = sorted(layer for layer in layers if not 0 <= layer < count)
    if wrong:
        raise UserError(
            f"--layer_idxs: layer {', '.join(map(str, wrong))} does not exist; the "
            f"model has decoder layers 0 to {count - 1} (or -{count} to -1)"
        )
    return sorted(layers)


def load_model(args: argparse.Namespace) -> models.LanguageModel:
    runs.processes()  # of several processes every one takes a device of its own
    lm = models.load(
        args.model_name,
        args.dtype,
        args.device,
        args.device_map,
        args.trust_remote_code,
        max_memory=args.max_memory,
    )
    if lm.device.type == "cpu":
        cpu.keep_freed_memory()
    return lm


def steering_examples(args: argparse.Namespace) -> list[data.Example]:
    """The examples that vectors are made from, drawn by --seed."""
    rows, source = load_split(args, part=0)
    found = data.examples(rows, source, args.seed, args.num_samples)
    if len(found) < args.num_samples:
        print(f"note: {args.num_samples} steering examples asked for, {len(found)} are there")
    return found


def load_split(args: argparse.Namespace, part: int):
    """The rows for steering (part 0), validation (1) or test (2), and how to read them."""
    default = data.default_split(args.dataset_name, part)
    # Only the evaluating stages have flags for the other two.
    flag = ("split", "validation_split", "test_split")[part]
    wanted = getattr(args, flag, None)
    rows, source = data.load(args.dataset_name, wanted or default, args.dataset_path)
    if (
        wanted
        and args.dataset_path
        and not Path(args.dataset_path).is_dir()
        and "split" not in rows.column_names
    ):
        raise UserError(
            f"'{args.dataset_path}' has no split '{wanted}': it has no column 'split'; "
            f"leave out --{flag}, or add that column"
        )
    return rows, source


def stage1_paths(args: argparse.Namespace, tops: list[str]) -> tuple[Path, dict[str, Path]]:
    """The CSV and, for each selection, the hidden-states file of a stage-1 run."""
    split = args.split or data.default_split(args.dataset_name, 0)
    stem = "_".join(
        [
            runs.slug(args.dataset_name),
            runs.slug(args.model_name),
            split,
            f"n{args.num_samples}",
            f"seed{args.seed}",
            args.prompt_style,
            args.attribution,
            args.grad_method,
            f"k{args.top_k}",
        ]
    )
    meta = Path(
        getattr(args, "output_path_meta", None)
        or SRC / "results" / args.kind.name / "token_attribution" / f"{stem}.csv"
    )
    given = getattr(args, "output_path_hidden", None)
    if given and len(tops) == 1:
        return meta, {tops[0]: Path(given)}
    base = Path(given or SRC / "data" / args.kind.name / "hidden_states" / f"{stem}.safetensors")
    return meta, {top: base.with_name(f"{base.stem}_{top}{base.suffix}") for top in tops}


def stage1_manifest(args, lm, examples, settings) -> dict:
    """What the results of stage 1 depend on."""
    return {
        "stage": "token_ablation",
        "model": lm.identity() | {"dtype": str(lm.dtype).removeprefix("torch.")},
        "data": {
            "name": args.dataset_name,
            "path": args.dataset_path,
            "split": args.split,
            "num_samples": args.num_samples,
            "fingerprint": data.fingerprint(examples),
            "ids": [example.id for example in examples],
            "questions": [data.question_key(example) for example in examples],
        },
        "settings": dataclasses.asdict(settings)
        | {
            "prompt_style": args.prompt_style,
            "top_k": args.top_k,
            "ablate": args.ablate,
            "replacement": args.replacement,
            "image_replacement": getattr(args, "image_replacement", None),
            "batch_tokens": args.batch_tokens,
        },
        "seed": args.seed,
        "versions": runs.versions(),
    }


def hidden_states_files(args) -> dict[str, vectors.StatesFile]:
    """Stage 1's files by selection: pos, and neg and rand where a method or mode needs them."""
    needed = ["pos"]
    if "both" in args.mode and any(m in args.methods for m in vectors.ABLATION_METHODS):
        needed.append("neg")
    if "rand_tokens" in args.methods:
        needed.append("rand")
    found = stage1_paths(args, list(TOPS))[1]
    files = {}
    for top in needed:
        flag = "hidden_states_path" if top == "pos" else f"hidden_states_{top}_path"
        path = Path(getattr(args, flag) or found[top])
        if not path.is_file():
            raise UserError(
                f"hidden states '{path}' do not exist: run token_ablation.py with the "
                f"same model, data and --num_samples and --top {top} first, or give "
                f"--{flag}"
            )
        files[top] = vectors.StatesFile(path)
        different = runs.differences(
            files["pos"].info | {"top": None}, files[top].info | {"top": None}
        )
        if different:
            raise UserError(
                f"the 'pos' and the '{top}' hidden states are of different runs: "
                + "; ".join(different[:4])
            )
    return files


def directions(
    args, lm, states: dict[str, vectors.StatesFile]
) -> tuple[list[Direction], dict[Path, vectors.SteeringVectors]]:
    """The grid without strengths (methods x modes x layers), and the vectors by their files."""
    for file in states.values():
        file.check_model(lm)
    layers = parse_layers(args.layer_idxs, len(lm.layers))
    groups = {
        "joint": [tuple(layers)],
        "each": [(layer,) for layer in layers],
        "from": [tuple(range(layer, len(lm.layers))) for layer in layers],
    }[args.layer_mode]
    found, files = [], {}
    for method in dict.fromkeys(args.methods):
        modes = dict.fromkeys(args.mode) if method in vectors.ABLATION_METHODS else [""]
        for mode in modes:
            made = vectors.make(states, method, mode, args.seed)
            seed = f"seed{args.seed}" if method == "random" else ""
            name = "_".join(filter(None, [states["pos"].path.stem, method, seed, mode]))
            files[vectors_dir(args) / f"{name}.safetensors"] = made
            found += [Direction(method, mode, group, made) for group in groups]
    return found, files


def configurations(
    args, lm, states: dict[str, vectors.StatesFile]
) -> tuple[list[Configuration], dict[Path, vectors.SteeringVectors]]:
    """The grid (methods x modes x layers x strengths), and the vectors by their files."""
    found, files = directions(args, lm, states)
    return [
        direction.at(alpha, args.alpha_units)
        for direction in found
        for alpha in dict.fromkeys(args.alphas)
    ], files


def evaluation_parts(args, states: dict[str, vectors.StatesFile]) -> dict[str, list[data.Example]]:
    """part -> its questions; the steering examples are in none but 'all'."""
    if args.evaluate_on == "all":
        every = {}
        for part in range(3):  # often the same split: each question counts once
            rows, source = load_split(args, part)
            every |= {example.id: example for example in data.examples(rows, source, args.seed)}
        return {"all": list(every.values())}
    steering = states["pos"].info["data"]
    used = {*steering["ids"], *steering["questions"]}
    rows, source = load_split(args, part=1)
    validation = data.examples(rows, source, args.seed, args.num_validation, frozenset(used))
    used |= {example.id for example in validation} | set(map(data.question_key, validation))
    rows, source = load_split(args, part=2)
    test = data.examples(rows, source, args.seed, args.num_test, frozenset(used))
    if not validation or not test:
        raise UserError(
            f"{len(validation)} validation and {len(test)} test questions are left beside the "
            "steering examples: use a smaller --num_validation, fewer --num_samples, more data, "
            "or --evaluate_on all"
        )
    return {"validation": validation, "test": test}


def evaluation_manifest(args, stage: str, lm, states, parts: dict) -> dict:
    """What the results of an evaluation depend on."""
    names = (
        "methods",
        "mode",
        "layer_idxs",
        "layer_mode",
        "alphas",
        "alpha_units",
        "evaluate_on",
        "score",
        "prompt_style",
        "batch_tokens",
        "seed",
    )
    return {
        "stage": stage,
        "model": lm.identity() | {"dtype": str(lm.dtype).removeprefix("torch.")},
        "hidden_states": {
            "settings": states["pos"].info["settings"],
            "seed": states["pos"].info["seed"],
            "examples": states["pos"].info["data"]["fingerprint"],
        },
        "data": {
            "name": args.dataset_name,
            "path": args.dataset_path,
            **{part: data.fingerprint(examples) for part, examples in parts.items()},
        },
        "flags": {name: getattr(args, name) for name in names},
        "versions": runs.versions(),
    }


def evaluation_stem(args: argparse.Namespace) -> str:
    """What the files of an evaluation are called: data, model, where vectors are from, layers."""
    return "_".join(
        [
            runs.slug(args.dataset_name),
            runs.slug(args.model_name),
            f"n{args.num_samples}",
            f"seed{args.seed}",
            args.attribution,
            args.grad_method,
            f"k{args.top_k}",
            args.layer_mode,
            "+".join(args.layer_idxs),
        ]
    )


def mc_paths(args: argparse.Namespace) -> dict[str, Path]:
    """What steering_mc.py writes: the grid, every question, the chosen configuration."""
    folder = Path(args.output_dir or SRC / "results" / args.kind.name / "steering")
    stem = evaluation_stem(args)
    return {
        "grid": folder / f"{stem}_grid.csv",
        "questions": folder / f"{stem}_questions.csv",
        "chosen": folder / f"{stem}_chosen.json",
    }


def take_chosen_configuration(args: argparse.Namespace) -> Path | None:
    """Fill in the configuration that steering_mc.py chose, where none is given by flags.

    Returns the file it is from. Raises UserError if it was not run with these flags.
    """
    if args.methods or args.layer_idxs or args.alphas:
        args.methods, args.layer_idxs = args.methods or METHODS, args.layer_idxs or LAYERS
        args.alphas = args.alphas or ALPHAS
        return None
    args.layer_idxs = LAYERS
    folder, args.output_dir = args.output_dir, None
    path = Path(args.chosen_path or mc_paths(args)["chosen"])
    args.output_dir = folder
    if not path.is_file():
        raise UserError(
            f"no configuration is chosen yet ('{path}' does not exist): run "
            "steering_mc.py with the same model, data and --num_samples first, or "
            "give --methods, --layer_idxs and --alphas"
        )
    best = runs.read_json(path)
    args.methods = list(dict.fromkeys([best["method"], *best["controls"]]))
    args.mode = [best["mode"] or "pos"]
    args.layer_idxs = layer_ranges(best["layers"])
    args.layer_mode, args.alphas = "joint", [best["alpha"]]
    args.alpha_units = best["alpha_units"]
    return path


def output_dir(args: argparse.Namespace, stage: str) -> Path:
    return Path(args.output_dir or SRC / "results" / args.kind.name / stage)


def vectors_dir(args: argparse.Namespace) -> Path:
    return Path(args.steering_vectors_dir or SRC / "data" / args.kind.name / "steering_vectors")


def main(run: Callable[[], None]) -> None:
    """Run a script; a user's mistake is one line and exit status 1, Ctrl-C says how to go on."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets_logging.disable_progress_bar()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)  # it logs what it then raises
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        ctrl_c.end_imports()
        run()
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: out of memory ({str(error).splitlines()[0]}); use a smaller "
            "--batch_tokens, --dtype bfloat16 or --device_map auto, and run the same "
            "command again: what is finished is kept"
        )
    except KeyboardInterrupt:
        print(f"\n{ctrl_c.INTERRUPTED}", file=sys.stderr)
        sys.exit(130)
