"""Stage 3: free generation, base and steered side by side from the same prompts.

Without --methods, --layer_idxs and --alphas the configuration that steering_mc.py chose is used,
with the controls of the same strength beside it.
"""

from __future__ import annotations

import argparse
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.errors import UserError
from grains.settings import (
    ABLATION_METHODS,
    CONTROLS,
    GENERATION_CONFIGS,
    METHODS,
    MODES,
    STYLES,
    UNITS,
    DecodingSettings,
    GridSettings,
)

if TYPE_CHECKING:
    import pandas as pd

    from grains.data import Example
    from grains.generation import Written
    from grains.names import Names
    from grains.steering import Configuration
    from grains.thinking import Thoughts

SHOWN = 3
LARGEST = 1e300  # of a strength; beyond it is no finite number
NUM_PROMPTS, MAX_NEW_TOKENS, TEMPERATURE = 32, 64, 0.0


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = flags.evaluation_parser(__doc__, kind, chosen_by_default=True)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--chosen_path",
        type=flags.path,
        help="the configuration that steering_mc.py chose, used where no flag gives another "
        "(default: found by the flags)",
    )
    group.add_argument(
        "--num_prompts", type=flags.positive, default=NUM_PROMPTS, help="test questions used"
    )
    group.add_argument(
        "--generation_style",
        choices=STYLES,
        help="prompt style (default: chat where the model has a chat template, "
        "otherwise --prompt_style)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=flags.positive,
        default=MAX_NEW_TOKENS,
        help="longest answer, in tokens",
    )
    group.add_argument(
        "--generation_config",
        choices=GENERATION_CONFIGS,
        default=DecodingSettings.generation_config,
        help="greedy: nothing acts on the choice of a token but these flags; model: what the "
        "model's own generation config sets acts too, for base and steered alike",
    )
    group.add_argument(
        "--temperature",
        type=flags.not_negative,
        help="of the sampling; 0 decodes greedily (default: 0, or with --generation_config model "
        "the model's)",
    )
    group.add_argument(
        "--top_p",
        type=flags.positive_float,
        help="draw of the likeliest tokens that hold this share of the probability (default: all, "
        "or with --generation_config model the model's)",
    )
    group.add_argument(
        "--num_return",
        type=flags.positive,
        default=DecodingSettings.num_return,
        help="texts drawn for each prompt, each in a row of its own",
    )
    group.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer"
    )
    return parser


def decoding_settings(args: argparse.Namespace) -> DecodingSettings:
    return DecodingSettings(
        args.generation_config,
        args.temperature,
        args.top_p,
        args.num_return,
        tuple(args.stop),
        args.seed,
    )


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    source, settings = flags.data_settings(args), flags.ablation_settings(args, ("pos",))
    decoding = decoding_settings(args)

    entry.import_libraries()
    from tqdm import tqdm

    from grains import generation, manifests, prompts, rendering, runs, sampling, thinking
    from grains.cli import stages
    from grains.study import gates

    names = flags.names_of(args)
    grid, chosen = configured(args, names)
    output = names.generations(grid, flags.GRID, decoding_parts(args), args.output_dir)
    states = stages.states_files(args, grid)
    settings, examples = stages.questions(source, settings, states["pos"])
    questions = examples["test" if "test" in examples else "all"][: args.num_prompts]
    lm = entry.load_model(args)
    generation.check_limit(lm, args.max_new_tokens)
    how = sampling.choosing(lm, decoding)
    configurations, _ = stages.configurations(args, lm, grid, states, gates.around)
    prompt = settings.prompt
    has_template = bool(rendering.chat_template(lm, prompt))
    style = args.generation_style or ("chat" if has_template else prompt.style)
    prompt = replace(prompt, style=style)
    entry.say_prompt(lm, prompt)
    # That answers are written in another style than vectors are made from is nothing unusual.
    stages.say_other_prompts(states["pos"], prompt, compare_styles=False)

    encoded = [prompts.encode(lm, example, prompt, free=True) for example in questions]
    counts = prompts.tally(encoded)
    for line in prompts.notes(counts):
        entry.say(line)
    texts = args.num_return * (1 + len(configurations))  # of each prompt

    thoughts = thinking.thoughts(lm, prompt)

    def make(missing: list[int]) -> Iterator[tuple[int, runs.Unit]]:
        written: dict[int, list[generation.Written]] = {unit: [] for unit in missing}
        with tqdm(
            total=len(missing) * texts * args.max_new_tokens,
            desc="generating",
            unit="token",
            disable=not (missing and runs.processes().is_main_process),
        ) as bar:
            for item in generation.write(
                lm,
                [encoded[unit] for unit in missing],
                configurations,
                args.max_new_tokens,
                decoding,
                settings.batch_tokens,
                bar.update,
            ):
                bar.total -= args.max_new_tokens - item.tokens  # it ended before
                unit = missing[item.prompt]
                written[unit].append(item)
                if len(written[unit]) == texts:
                    done = written.pop(unit)
                    yield unit, ({}, rows(unit, questions[unit], configurations, style, done))

    def write(units: runs.Units) -> None:
        import pandas as pd  # takes long, and only the end of a run needs it

        table = pd.DataFrame([row for _, rows in units() for row in rows])
        if thoughts and (note := split_thoughts(table, thoughts)):
            entry.say(f"warning: {note}")
        runs.write_table(output, table.sort_values(["prompt", "configuration", "draw"]))

    manifest = manifests.evaluation(
        "steering_generation",
        lm,
        states["pos"],
        source,
        settings,
        grid,
        {"prompts": questions},
        counts,
    ) | {
        "generation_style": style,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature or 0.0,
        "decoding": {
            "generation_config": args.generation_config,
            "acts": how.acting,
            "num_return": args.num_return,
            "stop": args.stop,
        },
    }
    if more := manifests.prompt(lm, prompt, counts).get("prompt"):
        manifest["generation_prompt"] = more
    entry.say(f"next token: {how}")
    if not runs.resume_together(
        [output], manifest, len(encoded), make, write, args.overwrite, inputs=[source.path, chosen]
    ):
        entry.say("nothing to do: these results are already there")
    if runs.processes().is_main_process:
        show(output)
        if chosen:
            print(f"configuration: as chosen in {chosen}")
        print(f"generations: {output}")


def configured(args: argparse.Namespace, names: Names) -> tuple[GridSettings, Path | None]:
    """The grid that the flags give, or the configuration that steering_mc.py chose and its file.

    Raises UserError if there is none, or several.
    """
    if args.methods or args.layer_idxs or args.alphas:
        return flags.grid_settings(args, default=flags.GRID), None
    candidates = [Path(args.chosen_path)] if args.chosen_path else names.chosen()
    if len(candidates) > 1:
        raise UserError(
            f"{len(candidates)} configurations were chosen with these settings of stage 1: give "
            f"one of them with --chosen_path ({', '.join(map(str, candidates))})"
        )
    if not candidates or not candidates[0].is_file():
        missing = f" ({candidates[0]} does not exist)" if candidates else ""
        raise UserError(
            f"no configuration is chosen yet{missing}: run steering_mc.py with the same model, "
            "data and --num_samples first, or give --methods, --layer_idxs and --alphas"
        )
    return chosen_grid(candidates[0]), candidates[0]


def chosen_grid(path: Path) -> GridSettings:
    """The configuration in a file of steering_mc.py, and its controls, as a grid.

    Raises UserError for a file with other content.
    """
    from grains import runs
    from grains.steering import layer_ranges

    best = runs.read_json(path)
    modes = MODES if best.get("method") in ABLATION_METHODS else ("",)
    controls = [method for method in CONTROLS if method in METHODS]

    def is_number(value: object) -> bool:
        return type(value) in (int, float) and -LARGEST < value < LARGEST

    def are_layers(value: object) -> bool:
        whole = isinstance(value, list) and all(type(item) is int for item in value)
        return whole and bool(value) and value == sorted(set(value)) and value[0] >= 0

    def are_controls(value: object) -> bool:
        return isinstance(value, list) and all(item in controls for item in value)

    for name, fits, expected in (
        ("method", METHODS.__contains__, f"one of {', '.join(METHODS)}"),
        ("controls", are_controls, f"a list of some of {', '.join(controls)}"),
        ("mode", modes.__contains__, " or ".join(modes) or "an empty text"),
        ("layers", are_layers, "a list of different layers in ascending order"),
        ("alpha", is_number, "a finite number"),
        ("alpha_units", UNITS.__contains__, " or ".join(UNITS)),
    ):
        if not fits(best.get(name)):
            raise UserError(
                f"'{path}', {name}: expected {expected}, found {str(best.get(name))[:40]!r}; was "
                "it changed? make it again with steering_mc.py"
            )
    return GridSettings(
        tuple(dict.fromkeys([best["method"], *best["controls"]])),
        (best["mode"] or "pos",),
        tuple(layer_ranges(best["layers"])),
        "joint",
        (best["alpha"],),
        best["alpha_units"],
        best.get("positions", "all"),
        bool(best.get("gate")),
    )


def decoding_parts(args: argparse.Namespace) -> list[str]:
    """What of the decoding differs from the defaults, for the file's name."""
    return [
        f"{label}-{value}"
        for label, value, default in (
            ("prompts", args.num_prompts, NUM_PROMPTS),
            ("style", args.generation_style, None),
            ("tokens", args.max_new_tokens, MAX_NEW_TOKENS),
            ("temperature", args.temperature or 0.0, TEMPERATURE),
            ("top_p", args.top_p, None),
            ("config", args.generation_config, DecodingSettings.generation_config),
            ("return", args.num_return, DecodingSettings.num_return),
            ("stop", f"{zlib.crc32(repr(args.stop).encode()):08x}" if args.stop else None, None),
        )
        if value != default
    ]


def rows(
    index: int,
    example: Example,
    configurations: list[Configuration],
    style: str,
    written: list[Written],
) -> list[dict]:
    """A prompt's rows of the table, from all its texts."""
    texts = {(item.configuration, item.draw): item for item in written}
    return [
        row(index, example, configurations[number - 1], style, texts[0, draw], item)
        for (number, draw), item in sorted(texts.items())
        if number
    ]


def row(
    index: int,
    example: Example,
    configuration: Configuration,
    style: str,
    base: Written,
    steered: Written,
) -> dict:
    return {
        "prompt": index,
        "id": example.id,
        "question": example.question,
        "prompt_style": style,
        "configuration": configuration.label,
        "method": configuration.method,
        "alpha": configuration.alpha,
        "base": base.text,
        "steered": steered.text,
        "reference": example.chosen,
        "changed": base.text != steered.text,
        "draw": steered.draw,
        "base_ended": base.ended,
        "steered_ended": steered.ended,
    }


def split_thoughts(table: pd.DataFrame, thoughts: Thoughts) -> str:
    """Put the thoughts in texts, base and steered, into columns of their own.

    Returns what `thinking.cut_off` says of these texts.
    """
    from grains import thinking

    every = []
    for name in ("base", "steered"):
        split = [thoughts.split(text) for text in table[name]]
        every += split
        table.insert(table.columns.get_loc(name), f"{name}_thinking", [item for item, _ in split])
        table[name] = [answer for _, answer in split]
    return thinking.cut_off(every)


TEXTS = ("question", "base", "steered")  # also where they look like numbers


def show(path: Path) -> None:
    """Print the first prompts of a table with what the base and the steered models answer."""
    import pandas as pd

    table = pd.read_csv(path, keep_default_na=False, dtype=dict.fromkeys(TEXTS, str))
    print()
    for _, answers in list(table[table.draw == 0].groupby("prompt"))[:SHOWN]:
        print(f"question: {answers.question.iloc[0]}")
        texts = {"base": answers.base.iloc[0]} | dict(
            zip(answers.configuration, answers.steered, strict=True)
        )
        for name, text in texts.items():
            print(textwrap.indent(textwrap.fill(f"{name}: {text!r}", 96), "  "))
        print()


if __name__ == "__main__":
    entry.run(main)
