"""The flags that several scripts share, and the settings that they set.

Nothing heavy is imported here: `--help` and a mistake in a flag need no library that takes seconds
to load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grains.data import DATASETS, default_split
from grains.errors import UserError
from grains.names import Names
from grains.settings import (
    ABLATE,
    BASELINES,
    DTYPES,
    EMBEDDED,
    EXPERTS,
    GRAD_METHODS,
    IMAGE_BASELINES,
    LAYER_MODES,
    LETTERED,
    MATMUL_PRECISIONS,
    METHOD_MEANINGS,
    METHODS,
    MODELS,
    MODES,
    NO_ATTRIBUTION,
    OBJECTIVES,
    QUANTIZE,
    REPLACEMENTS,
    SCOPES,
    SCORES,
    STYLES,
    TARGET_SCORES,
    TOPS,
    UNITS,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
    parse_positions,
)


@dataclass(frozen=True)
class Kind:
    """What differs between the scripts for text and those for images and text.

    name: the folder under data/ and results/.
    model, dataset, top_k, prompt_style: the defaults, as in the paper's experiments.
    images: whether there are pictures.
    """

    name: str
    model: str
    dataset: str
    top_k: int
    prompt_style: str
    images: bool


LLM = Kind("llm", "llama-3.1-8b-instruct", "truthfulqa", 10, "qa", False)
VLM = Kind("vlm", "llava-1.6-7b", "spa-vl", 50, "chat", True)
# The default grid of steering_mc.py. The experiment tries all methods and searches strengths.
GRID = GridSettings(
    ("mean", "pca", "gradient", "caa", "random", "shared_random", "rotated"),
    alphas=(0.005, 0.01, 0.02, 0.03),
)
UNSET = GridSettings(())  # fills nothing but the layers, which are then all


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults, except where a flag has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(description: str | None, kind: Kind | None = None) -> argparse.ArgumentParser:
    """A parser with --debug, which every script has. kind: kept as a default for `add_*`."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    flags.set_defaults(kind=kind)
    flags.add_argument("--debug", action="store_true", help="print the whole traceback of an error")
    return flags


def evaluation_parser(
    description: str | None, kind: Kind, chosen_by_default: bool = False
) -> argparse.ArgumentParser:
    """A parser for scripts that evaluate steering vectors. chosen_by_default: see `add_grid`."""
    flags = parser(description, kind)
    add_model(flags)
    add_data(flags)
    add_attribution(flags)
    add_states(flags)
    add_grid(flags, chosen_by_default)
    add_positions(flags)
    flags.add_argument(
        "--gate",
        action="store_true",
        help="steer only where hidden states look like those of the steering examples: a gate is "
        "fitted between them and other text, and scales all vectors at each position",
    )
    add_evaluation(flags)
    add_evaluate_on(flags)
    return flags


def add_positions(flags: argparse._ActionsContainer) -> None:
    flags.add_argument(
        "--positions",
        default=GridSettings.positions,
        type=positions,
        help="which positions are steered: all; prompt; response (those that an answer's tokens "
        "are predicted from); last (of the prompt); image; or a slice of the prompt such as 0:10 "
        "(with a minus: --positions=-5:)",
    )


def add_model(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("model and machine")
    group.add_argument(
        "--model_name",
        default=flags.get_default("kind").model,
        help=f"short name ({', '.join([EMBEDDED, *MODELS])}), hub id, local folder or GGUF file",
    )
    add_device(group)
    group.add_argument(
        "--trust_remote_code", action="store_true", help="run code from the model's repository"
    )
    group.add_argument(
        "--batch_tokens",
        type=positive,
        default=AblationSettings.batch_tokens,
        help="token positions computed at a time; smaller needs less memory",
    )
    group.add_argument(
        "--max_memory",
        type=positive_float,
        help="GiB that the activations of attribution may take beside the weights (default: "
        "80 %% of a GPU's free memory, half of a CPU's)",
    )
    add_overwrite(group)


def add_device(flags: argparse._ActionsContainer) -> None:
    flags.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto: the checkpoint's on an accelerator, float32 on a CPU",
    )
    flags.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="quantise the weights of linear layers: int8 (needs torchao) or int4 (NF4, needs "
        "bitsandbytes); checkpoints that are quantised already need no flag",
    )
    flags.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    flags.add_argument(
        "--device_map", choices=["auto"], help="auto: spread the layers over all devices"
    )


def add_overwrite(flags: argparse._ActionsContainer) -> None:
    flags.add_argument(
        "--overwrite", action="store_true", help="replace outputs that exist from other settings"
    )


def add_data(
    flags: argparse.ArgumentParser,
    split: str = "split of the steering examples (default: the data set's)",
) -> None:
    """The data set and its steering examples. split: the help of that flag."""
    group = flags.add_argument_group("data")
    group.add_argument(
        "--dataset_name",
        default=flags.get_default("kind").dataset,
        help=f"short name ({', '.join(DATASETS)}), or any label together with --dataset_path",
    )
    group.add_argument(
        "--dataset_path",
        type=path,
        help="local file (JSON Lines, JSON, CSV, TSV, Parquet) or folder, in the data set's own "
        "columns, or prompt/chosen/rejected, question/choices/label and others (docs/data.md)",
    )
    group.add_argument(
        "--num_samples",
        type=positive,
        default=DataSettings.num_samples,
        help="steering examples, from which vectors are made",
    )
    group.add_argument("--split", help=split)
    add_prompt(flags)


def add_prompt(flags: argparse.ArgumentParser) -> None:
    """How examples are written as prompts (docs/prompts.md)."""
    group = flags.add_argument_group("prompts")
    group.add_argument(
        "--prompt_style",
        default=flags.get_default("kind").prompt_style,
        choices=STYLES,
        help="qa: 'Q: ...\\nA:'; chat: the model's chat template; plain: as it is; instruct: "
        "'### Instruction:\\n...\\n\\n### Response:\\n'",
    )
    group.add_argument(
        "--letters",
        choices=LETTERED,
        help="list the choices as A, B, C after the question; answers are scored by their letter "
        "or by their text (default: no list, by their text)",
    )
    group.add_argument(
        "--prompt_template",
        type=template_file,
        metavar="FILE",
        help="text (jinja2) in place of the style's, or in chat of the user's turn, with question, "
        "context, choices, letters, image, turns",
    )
    group.add_argument(
        "--preamble", type=text_or_file, metavar="TEXT|FILE", help="text before the prompt"
    )
    group.add_argument(
        "--shots",
        type=positive,
        metavar="N",
        help="questions with their answers before the prompt (in chat: earlier turns), drawn from "
        "the steering split; they neither steer nor are asked",
    )
    group.add_argument(
        "--system",
        type=text_or_file,
        metavar="TEXT|FILE",
        help="system prompt of examples without one of their own; none: no system prompt, not even "
        "the one that a chat template writes by itself",
    )
    group.add_argument(
        "--template_args",
        nargs="+",
        type=template_argument,
        metavar="NAME=VALUE",
        help="what the chat template is given by name, such as enable_thinking=false; values are "
        "JSON, or else text",
    )
    group.add_argument(
        "--chat_template",
        type=template_file,
        metavar="FILE",
        help="chat template (jinja2) in place of the model's own",
    )
    group.add_argument(
        "--allow_special_tokens",
        action="store_true",
        help="read words of the data that look like control tokens (<|im_end|>, </s>) as these "
        "tokens (default: they stay words)",
    )


def add_seed(flags: argparse._ActionsContainer) -> None:
    flags.add_argument("--seed", type=whole, default=0, help="seeds everything random")


def add_vectors(group: argparse._ActionsContainer) -> None:
    """A file of steering vectors, and where and in which units it steers."""
    group.add_argument(
        "--vectors", required=True, help="steering vectors, as steering_mc.py and others write them"
    )
    group.add_argument(
        "--alpha_units", choices=UNITS, default="relative", help="as in steering_mc.py"
    )
    group.add_argument(
        "--layers", nargs="+", help="decoder layers: numbers, ranges (10-29), all (default: all)"
    )


def add_attribution(flags: argparse.ArgumentParser, top: bool = False) -> None:
    """The settings of stage 1; later stages find its files by the same flags.

    top: whether the script itself selects tokens.
    """
    kind, default = flags.get_default("kind"), AttributionSettings()
    group = flags.add_argument_group("attribution and ablation")
    group.add_argument(
        "--attribution",
        default=default.objective,
        choices=OBJECTIVES,
        help="the objective, contrastive: log P(y+) - log P(y-), or normal: each response on its "
        "own",
    )
    group.add_argument(
        "--grad_method",
        default=default.grad_method,
        choices=GRAD_METHODS,
        help="gradient method of the attribution, or none: no attribution and no ablation, which "
        "takes a small part of the time and is enough for methods that need neither",
    )
    group.add_argument("--top_k", type=positive, default=kind.top_k, help="tokens to ablate")
    if top:
        group.add_argument(
            "--top",
            nargs="+",
            default=["pos", "neg"],
            choices=TOPS,
            help="tokens to ablate: those with the largest scores, the smallest, the largest "
            "magnitudes, or random ones (the control); several share one attribution",
        )
    group.add_argument(
        "--ig_steps",
        type=ig_steps,
        default="auto",
        help="points of the Gauss-Legendre rule (the paper uses 20), or auto: an adaptive rule",
    )
    group.add_argument(
        "--ig_baseline",
        default=default.baseline,
        choices=BASELINES,
        help="the embedding at which the path starts (the paper uses zeros)",
    )
    group.add_argument(
        "--attribute",
        default=default.attribute,
        choices=SCOPES,
        help="the scope, positions that move along the path: content (the user's words and the "
        "picture), all (as in the paper), image or text only",
    )
    group.add_argument(
        "--ablate",
        default=AblationSettings.ablate,
        choices=ABLATE,
        help="which of the attributed positions may be ablated",
    )
    group.add_argument(
        "--ig_tolerance",
        type=positive_float,
        default=default.tolerance,
        help="for auto: the completeness error allowed, as a share of |f(x) - f(b)|",
    )
    group.add_argument(
        "--ig_max_points",
        type=positive,
        default=default.max_points,
        help="for auto: the most gradients computed for an example",
    )
    group.add_argument(
        "--ig_experts",
        choices=EXPERTS,
        help="fixed: the experts of a mixture that are chosen for the prompt stay chosen along the "
        "path (default: they are chosen anew at each point)",
    )
    group.add_argument(
        "--matmul_precision",
        default=default.matmul_precision,
        choices=MATMUL_PRECISIONS,
        help="of the gradients' matrix products, in torch's words: highest (fp32) or medium (of "
        "numbers rounded to bfloat16 on the way back, faster on CPUs with instructions for it)",
    )
    group.add_argument(
        "--replacement",
        default=AblationSettings.replacement,
        choices=REPLACEMENTS,
        help="the token whose embedding replaces an ablated token",
    )
    if kind.images:
        group.add_argument(
            "--image_baseline",
            default=default.image_baseline,
            choices=IMAGE_BASELINES,
            help="where an image token's path starts: at the features of a blank picture, the "
            "picture's mean feature, or zeros (as in the paper)",
        )
        group.add_argument(
            "--image_replacement",
            default=AblationSettings.image_replacement,
            choices=IMAGE_BASELINES,
            help="what replaces an ablated image token (see --image_baseline)",
        )


def add_states(flags: argparse.ArgumentParser) -> None:
    group = flags.add_argument_group("steering vectors")
    group.add_argument(
        "--hidden_states_path",
        type=path,
        help="stage 1's file of the 'pos' ablation (default: named by the flags above)",
    )
    group.add_argument(
        "--hidden_states_neg_path",
        type=path,
        help="stage 1's file of the 'neg' ablation, for mode 'both'",
    )
    group.add_argument(
        "--hidden_states_rand_path",
        type=path,
        help="stage 1's file of the 'rand' ablation, for the control rand_tokens",
    )
    add_seed(group)


def add_grid(flags: argparse.ArgumentParser, chosen_by_default: bool = False) -> None:
    """The grid of configurations.

    chosen_by_default: whether the grid is empty unless its flags are given, for scripts that then
        use a configuration chosen before.
    """
    group = flags.add_argument_group("configurations")
    default = GridSettings((), layers=()) if chosen_by_default else GRID
    group.add_argument(
        "--methods",
        nargs="+",
        default=[*default.methods] or None,
        choices=METHODS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in METHOD_MEANINGS.items()),
    )
    group.add_argument(
        "--mode",
        nargs="+",
        default=[*default.modes],
        choices=MODES,
        help="for mean and pca: pos, or both: pos - neg",
    )
    group.add_argument(
        "--layer_idxs",
        nargs="+",
        default=[*default.layers] or None,
        help="decoder layers: numbers, negative numbers, ranges (10-29), all",
    )
    group.add_argument(
        "--layer_mode",
        default=default.layer_mode,
        choices=LAYER_MODES,
        help="joint: one configuration steers all layers; each: one configuration per layer; "
        "from: one per layer, which steers it and all layers above",
    )
    group.add_argument(
        "--alphas",
        nargs="+",
        type=finite,
        default=[*default.alphas] or None,
        help="steering strengths to try",
    )
    group.add_argument(
        "--alpha_units",
        default=default.units,
        choices=UNITS,
        help="relative: shares of the median activation norm, along unit vectors; absolute: "
        "multiples of the vector as its method gives it (as in the paper)",
    )
    group.add_argument(
        "--steering_vectors_dir",
        type=path,
        help="folder for the vectors (default: data/.../steering_vectors)",
    )


def add_evaluation(flags: argparse.ArgumentParser) -> None:
    add_questions(flags).add_argument(
        "--output_dir", type=path, help="folder of the tables (default: results/...)"
    )


def add_questions(flags: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The validation and test questions."""
    group = flags.add_argument_group("evaluation")
    group.add_argument(
        "--num_validation",
        type=positive,
        default=DataSettings.num_validation,
        help="validation questions",
    )
    group.add_argument("--num_test", type=positive, help="test questions (default: the rest)")
    group.add_argument(
        "--validation_split", help="split of the validation questions (default: the data set's)"
    )
    group.add_argument("--test_split", help="split of the test questions (default: the data set's)")
    return group


class Scores(argparse.Action):
    """Several scores: `scores`, and the first of them as `score`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        namespace.scores = [*dict.fromkeys(values)]
        namespace.score = values[0]


def add_score(flags: argparse.ArgumentParser) -> None:
    flags.set_defaults(scores=None)
    flags.add_argument(
        "--score",
        nargs="+",
        action=Scores,
        default="token",
        choices=(*SCORES, *TARGET_SCORES),
        help="the accuracies that are printed, each with interval and paired test, of which the "
        "first chooses the configuration: of the per-token or of the summed log-likelihood, or "
        "TruthfulQA's MC1 or MC2 (without the flag all that the data allows are printed; the "
        "tables hold these in any case)",
    )
    flags.add_argument(
        "--max_ppl_increase",
        type=positive_float,
        help="how much the perplexity of neutral prose may rise, 0.02 for 2 %%: it is measured, "
        "and only configurations within it can be chosen (default: not measured)",
    )


def add_evaluate_on(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--evaluate_on",
        default=DataSettings.evaluate_on,
        choices=("held_out", "all"),
        help="held_out: choose on validation questions, report on test questions; all: every "
        "question, steering examples included (as the published scripts do)",
    )


# --- settings from flags ---


def names_of(args: argparse.Namespace, dataset: str | None = None) -> Names:
    """The names of the files of a stage by its flags. dataset: replaces --dataset_name."""
    data = data_settings(args)
    if dataset is not None:
        data = replace(data, name=dataset)
    split = default_split(data.name, "steering")
    return Names(args.kind.name, args.model_name, data, ablation_settings(args, TOPS), split)


def data_settings(args: argparse.Namespace) -> DataSettings:
    """From the flags of `add_data`, `add_questions` and `add_evaluate_on`."""
    settings = DataSettings(args.dataset_name, args.dataset_path, args.num_samples, args.split)
    if not hasattr(args, "num_test"):  # stage 1 evaluates nothing
        return settings
    return replace(
        settings,
        validation_split=args.validation_split,
        test_split=args.test_split,
        evaluate_on=getattr(args, "evaluate_on", settings.evaluate_on),
        num_validation=args.num_validation,
        num_test=args.num_test,
    )


def named_sources(source: DataSettings, texts: Sequence[str]) -> list[DataSettings]:
    """The data sets of a flag that takes NAME[=PATH], each with the other settings of `source`."""
    named = [text.partition("=") for text in texts]
    return [replace(source, name=name, path=path(at) or None) for name, _, at in named]


def ablation_settings(args: argparse.Namespace, tops: tuple[str, ...] = ()) -> AblationSettings:
    """From the flags of `add_attribution`. tops: replaces --top where a script has no such flag.

    Without attribution there is one selection, pos, whatever is asked for.
    """
    default = AblationSettings()
    attribution = AttributionSettings(
        args.attribution,
        args.grad_method,
        args.ig_baseline,
        getattr(args, "image_baseline", default.attribution.image_baseline),
        args.attribute,
        None if args.ig_steps == "auto" else args.ig_steps,
        args.ig_tolerance,
        args.ig_max_points,
        experts=args.ig_experts,
        matmul_precision=args.matmul_precision,
    )
    return AblationSettings(
        attribution,
        ("pos",) if args.grad_method == NO_ATTRIBUTION else tops or tuple(dict.fromkeys(args.top)),
        args.top_k,
        args.ablate,
        args.replacement,
        getattr(args, "image_replacement", default.image_replacement),
        prompt_settings(args),
        args.batch_tokens,
        getattr(args, "seed", default.seed),
    )


def prompt_settings(args: argparse.Namespace) -> PromptSettings:
    """From the flags of `add_prompt`."""
    return PromptSettings(
        args.prompt_style,
        args.system,
        dict(args.template_args or ()),
        args.chat_template,
        args.allow_special_tokens,
        args.preamble or "",
        args.shots or 0,
        letters=args.letters,
        prompt_template=args.prompt_template,
    )


def grid_settings(args: argparse.Namespace, default: GridSettings = UNSET) -> GridSettings:
    """From the flags of `add_grid`. default: takes the place of methods, layers and strengths that
    are None."""
    return GridSettings(
        tuple(dict.fromkeys(args.methods or default.methods)),
        tuple(dict.fromkeys(args.mode)),
        tuple(args.layer_idxs or default.layers),
        args.layer_mode,
        tuple(dict.fromkeys(args.alphas or default.alphas)),
        args.alpha_units,
        getattr(args, "positions", default.positions),
        getattr(args, "gate", default.gate),
    )


# --- types of flags ---


def ig_steps(text: str) -> int | str:
    if text == "auto":
        return text
    return positive(text)


def positions(text: str) -> str:
    try:
        parse_positions(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def positive(text: str) -> int:
    return _whole(text, 1)


def text_or_file(text: str) -> str:
    """A text, or that of the file it names; none is the empty text."""
    if text in ("", "none"):
        return ""
    path = Path(text)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a path, or with a character that no path has
        is_file = False
    if is_file:
        return file_text(text)
    if path.suffix in (".txt", ".md", ".jinja", ".j2") and not re.search(r"\s", text):
        raise argparse.ArgumentTypeError(f"file '{text}' does not exist")
    return text.strip()


def file_text(text: str) -> str:
    """The text of a file, without white space around it."""
    try:
        content = Path(text).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"file '{text}' cannot be read: {reason}") from error
    if not content:
        raise argparse.ArgumentTypeError(f"file '{text}' is empty")
    return content


def template_file(text: str) -> str:
    """The text of a file with a jinja2 template."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        content = Path(text).read_text(encoding="utf-8")
        # Chat templates have two things more: break and continue, and blocks that mark answers.
        environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", content))
    except TemplateSyntaxError as error:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no jinja2 template: line {error.lineno}: {error.message}"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(f"file '{text}' cannot be read: {reason}") from error
    if not content.strip():
        raise argparse.ArgumentTypeError(f"file '{text}' is empty")
    return content


# Names that the chat template has already, or that say how it is called.
OWN_ARGUMENTS = {
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "strftime_now",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "tokenizer_kwargs",
    "processor_kwargs",
}


def template_argument(text: str) -> tuple[str, Any]:
    """'enable_thinking=false' -> ('enable_thinking', False)."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=VALUE")
    if name in OWN_ARGUMENTS:
        raise argparse.ArgumentTypeError(f"{name} is set here already: leave it out")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def whole(text: str) -> int:
    return _whole(text, 0)


def port(text: str) -> int:
    value = _whole(text, 0)
    if value >= 2**16:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 65535")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:  # also for more than 4300 digits
        value = least - 1
    if not least <= value < 2**31:
        raise argparse.ArgumentTypeError(
            f"{text[:40]}: expected a whole number from {least} to 2147483647"
        )
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
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected a finite number")
    return value


def path(text: str) -> str:
    """A path that is read, or a folder that is written into; ~ is the user's home."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # safetensors reads and writes no others
        raise argparse.ArgumentTypeError(
            f"{text.encode(errors='replace').decode()}: expected a name in UTF-8"
        ) from error
    return os.path.expanduser(text)


def file(text: str) -> str:
    """The path of a file that is written."""
    if text and os.path.basename(text) in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text}: expected a file, not a folder")
    return path(text)
