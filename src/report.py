"""A report of results: one HTML page that opens from disk without a network, and PNGs.

Finds what the three stages wrote in the given folders, and tells what was run, what steering
gained beside its controls and at what price, which words and image patches the model went by, and
what it says with and without steering.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import io
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from grains import cli, data, figures, runs, stats, vision
from grains.errors import UserError
from grains.scoring import layer_ranges
from grains.vectors import CONTROLS

SIGNIFICANT = 0.05
MINUS, NONE = "\N{MINUS SIGN}", "\N{EN DASH}"
WIDTH = 4.8  # inches: text of 9 points is legible on a phone and on a laptop
MAX_LAYER_GROUPS = 4
SCORES = figures.SCORES


@dataclass(frozen=True)
class Kind:
    """A kind of table: the script that writes it, and the columns that the report reads.

    optional: further columns of numbers, read where they are.
    """

    script: str
    text: tuple[str, ...]
    numbers: tuple[str, ...]
    optional: tuple[str, ...] = ()


def _per_score(*names: str) -> tuple[str, ...]:
    return tuple(name.format(score) for score in SCORES for name in names)


KINDS = {
    "attribution": Kind(
        "token_ablation.py", ("id", "top", "question", "chosen", "rejected", "selected_positions",
                              "tokens", "attributions"),
        ("f", "f_ablated", "k", "completeness_error_relative_worst", "gradients_computed")),
    "grid": Kind(
        "steering_mc.py", ("configuration", "method", "mode", "layers", "part"),
        ("alpha", "questions", *_per_score("accuracy_{}", "accuracy_{}_low", "accuracy_{}_high",
                                           "p_value_{}")),
        ("perplexity_increase", "unrelated_accuracy", "worse_token", "worse_sum")),
    "questions": Kind(
        "steering_mc.py", ("configuration", "part", "id", *_per_score("correct_{}")), ()),
    "front": Kind(
        "the experiment that measures the price of steering",
        ("dataset", "method", "mode", "is_control", "score", "configuration", "seeds"),
        ("max_ppl_increase", "accuracy", "accuracy_low", "accuracy_high", "base_accuracy", "gain",
         "gain_low", "gain_high", "p_value", "perplexity_increase", "unrelated_change")),
    "generation": Kind(
        "steering_generation.py", ("prompt", "id", "question", "configuration", "base", "steered",
                                   "reference"), ()),
}
ENDINGS = {"_grid": "grid", "_questions": "questions", "_front": "front"}
FOLDERS = {"token_attribution": "attribution", "steering_generation": "generation"}
STAGES = {"token_ablation": "attribution", "steering_generation": "generation"}


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS_DIR",
                        help="folder with results of the stages, such as results/llm")
    parser.add_argument("--output", type=Path,
                        help="HTML file (default: report.html in the first RESULTS_DIR); the PNGs "
                             "go into a folder beside it")
    parser.add_argument("--num_examples", type=cli.positive, default=6,
                        help="examples and prompts shown of each file, in its order")
    return parser


def main() -> None:
    args = flags().parse_args()
    output = args.output or args.results[0] / "report.html"
    page, pngs = build(args.results, output, args.num_examples)
    folder = figure_folder(output)
    for name, content in pngs.items():
        runs.write_whole(folder / name, lambda path, content=content: path.write_bytes(content))
    runs.write_whole(output, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"report:  {output}")
    print(f"figures: {folder} ({len(pngs)} PNG files)")


def figure_folder(output: Path) -> Path:
    return output.with_name(f"{output.stem}_figures")


def build(folders: list[Path], output: Path, count: int) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNGs by name.

    output: where the page will lie, for its links; count: examples shown of each file.
    """
    drawn = Figures()
    sections = [view(section, output.parent, drawn, count) for section in find(folders)]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined).get_template("report.html.j2")
    page = template.render(sections=sections, scores=SCORES, version=runs.versions()["grains"])
    return page, drawn.pngs


# --- finding and reading ---


@dataclass
class Section:
    """The files of one model on one data set. evaluations: stem -> its tables by kind."""

    model: str
    data: str
    attributions: list[Path] = field(default_factory=list)
    evaluations: dict[Path, dict[str, Path]] = field(default_factory=dict)
    generations: list[Path] = field(default_factory=list)


def find(folders: list[Path]) -> list[Section]:
    """The results in folders, a section for each model and data set, or experiment.

    Of an experiment's many stage-1 tables the first of each data set is taken.
    Raises UserError for a folder without any.
    """
    sections: dict[tuple[str, str], Section] = {}
    seen: set[Path] = set()
    shown: set[tuple] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is not a folder: give one with results, such as "
                            "results/llm")
        found = [(kind_of(path), path) for path in sorted(folder.rglob("*.csv"))]
        if not any(kind not in (None, "questions") for kind, _ in found):
            raise UserError(f"'{folder}' holds no results: expected token_attribution/*.csv, "
                            "*_grid.csv, *_front.csv or steering_generation/*.csv; run "
                            "token_ablation.py and steering_mc.py first (bash "
                            "scripts/llm/run_token_ablation.sh, bash scripts/llm/run_steering_mc.sh"
                            "), or give another folder")
        for kind, path in found:
            if kind is None or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            stem = path.with_name(re.sub("_(grid|questions|front)$", "", path.stem))
            model, name = subject(manifest_of(path))
            key = (model or "", name or stem.name)
            if path.parent.name.endswith("_parts"):  # of an experiment, many times alike
                key = ("", path.parent.name.removesuffix("_parts"))
                if (key, name) in shown:
                    continue
                shown.add((key, name))
            section = sections.setdefault(key, Section(*key))
            if kind == "attribution":
                section.attributions.append(path)
            elif kind == "generation":
                section.generations.append(path)
            else:
                section.evaluations.setdefault(stem, {})[kind] = path
    return [section for section in sections.values()
            if section.attributions or section.generations or section.evaluations]


def chosen_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_chosen.json")


def kind_of(path: Path) -> str | None:
    for ending, kind in ENDINGS.items():
        if path.stem.endswith(ending):
            return kind
    if path.parent.name in FOLDERS:
        return FOLDERS[path.parent.name]
    return STAGES.get(manifest_of(path).get("stage"))


def manifest_of(path: Path) -> dict:
    """The manifest beside a table, or {}. That of a grid goes for its whole evaluation."""
    stem = re.sub("_(grid|questions|front)$", "", path.stem)
    for name in (f"{path.stem}.manifest.json", f"{stem}_grid.manifest.json"):
        if (file := path.with_name(name)).is_file():
            return read_object(file)
    return {}


def read_object(path: Path) -> dict:
    content = runs.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"'{path}': expected a JSON object; was it changed?")
    return content


def subject(manifest: dict) -> tuple[str | None, str | None]:
    """Model and data set of a manifest."""
    parts = [(manifest.get("model"), "model"), (manifest.get("data"), "name")]
    return tuple(part.get(key) if isinstance(part, dict) else part for part, key in parts)


def read_table(path: Path, name: str) -> pd.DataFrame:
    """A table of a kind; text stays text, so that an answer 'None' or '1.0' is one.

    Raises UserError, naming the file and the column, where it is not what its name says.
    """
    kind = KINDS[name]
    again = f"was it cut short or changed? make it again with {kind.script}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a CSV ({error}): {again}") from error
    missing = [column for column in (*kind.text, *kind.numbers) if column not in table]
    if missing:
        raise UserError(f"'{path}': column{'s' * (len(missing) > 1)} {', '.join(missing)} missing, "
                        f"found {', '.join(table.columns)}; {again}")
    if table.empty:
        raise UserError(f"'{path}' has no rows: {again}")
    for column in (*kind.numbers, *(name for name in kind.optional if name in table)):
        try:
            table[column] = pd.to_numeric(table[column])  # an empty cell is a NaN
        except ValueError as error:
            raise UserError(f"'{path}', column {column}: expected numbers ({error}); {again}"
                            ) from error
    return table


def from_json(path: Path, column: str, cell: str):
    try:
        return json.loads(cell)
    except ValueError as error:
        raise UserError(f"'{path}', column {column}: expected a JSON list, found '{cell[:40]}'"
                        ) from error


# --- numbers as text ---


def percent(value: float) -> str:
    return NONE if np.isnan(value) else f"{100 * value:.1f}\u00a0%"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return NONE if np.isnan(value) else f"{100 * value:+.1f}".replace("-", MINUS)


def signed_percent(value: float) -> str:
    return NONE if np.isnan(value) else f"{points(value)}\u00a0%"


def number(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def p_text(p: float) -> str:
    return NONE if np.isnan(p) else "<\u00a00.0001" if p < 0.0001 else f"{p:.2g}"


def p_is(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.0001 else f"p = {p_text(p)}"


def interval(row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", MINUS)


def joined(items) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


# --- figures ---


class Figures:
    """Draws figures light and dark for the page, and keeps the light ones as PNGs.

    pngs: file name -> content.
    """

    def __init__(self):
        self.pngs: dict[str, bytes] = {}

    def add(self, name: str, draw: Callable[[Figure], None], height: float, alt: str) -> dict:
        """What the template needs for one figure. draw: fills a Figure; height: inches."""
        light = self.keep(name, draw, height)
        return self._item(alt, height, light, rendered(draw, height, "dark"))

    def add_picture(self, name: str, draw: Callable[[Figure], None], height: float, alt: str
                    ) -> dict:
        """As `add`, for a figure without text on a clear ground: one variant goes for both."""
        return self._item(alt, height, self.keep(name, draw, height, transparent=True), None)

    def keep(self, name: str, draw: Callable[[Figure], None], height: float, **options) -> bytes:
        """A light figure that becomes a PNG file, under this name or one like it."""
        base = re.sub(r"[^\w+-]+", "-", name)
        file = next(file for file in (f"{base}{end}.png" for end in ("", *map(str, range(2, 999))))
                    if file not in self.pngs)
        self.pngs[file] = rendered(draw, height, "light", **options)
        return self.pngs[file]

    @staticmethod
    def _item(alt: str, height: float, *variants: bytes | None) -> dict:
        light, dark = (png and "data:image/png;base64," + base64.b64encode(png).decode()
                       for png in variants)
        # CSS pixels of the figure as drawn: 96 an inch.
        return {"light": light, "dark": dark, "alt": alt,
                "width": round(96 * WIDTH), "height": round(96 * height)}


def rendered(draw: Callable[[Figure], None], height: float, theme: str, **options) -> bytes:
    """A figure as a PNG. options: of Figure.savefig."""
    with figures.style(theme), warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page has them as text.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def accuracy_figure(drawn: Figures, name: str, grid: pd.DataFrame, label: str) -> dict:
    steered, base = grid[grid.method != "base"], grid[grid.method == "base"].iloc[0]
    said = []
    for score, title in SCORES.items():
        best = steered.loc[steered[f"accuracy_{score}"].idxmax()]
        said.append(f"{title} accuracy: base {percent(base[f'accuracy_{score}'])}, highest "
                    f"{percent(best[f'accuracy_{score}'])} with {best.configuration}")
    alt = (f"Accuracy on {label} over strength with 95 % intervals, for base, {series(steered)}. "
           f"{'. '.join(said)}.")
    return drawn.add(name, lambda figure: figures.fill_accuracy(figure, grid), 5.4, alt)


def layers_figure(drawn: Figures, name: str, grid: pd.DataFrame, score: str) -> dict:
    steered, value = grid[grid.method != "base"], f"accuracy_{score}"
    gains = steered[value] - grid[grid.method == "base"][value].iloc[0]
    layers = steered.layers.astype(int)
    alt = (f"Heat-map of the gain in {SCORES[score]} accuracy at single layers {layers.min()} to "
           f"{layers.max()} by strength. Largest: {points(gains.max())} points with "
           f"{steered.configuration[gains.idxmax()]}; smallest: {points(gains.min())} points with "
           f"{steered.configuration[gains.idxmin()]}.")
    rows = -(-steered.groupby(["method", "mode"]).ngroups // 2)
    return drawn.add(name, lambda figure: figures.fill_layers(figure, grid, score),
                     0.5 + rows * min(3.6, 1.2 + 0.17 * layers.nunique()), alt)


def front_figure(drawn: Figures, name: str, front: pd.DataFrame) -> dict:
    alt = (f"Gain in accuracy over the increase of perplexity that is allowed, for "
           f"{series(front)}; the tables below have every number.")
    return drawn.add(name, lambda figure: figures.fill_front(figure, front),
                     0.8 + 2.4 * front.score.nunique(), alt)


def cost_figure(drawn: Figures, name: str, grid: pd.DataFrame) -> dict:
    rise = grid.perplexity_increase[grid.method != "base"]
    alt = (f"Gain in accuracy over the increase of perplexity, a point for each of {len(rise)} "
           f"configurations; perplexity changes by {signed_percent(rise.min())} to "
           f"{signed_percent(rise.max())}.")
    return drawn.add(name, lambda figure: figures.fill_cost(figure, grid), 5.4, alt)


def series(table: pd.DataFrame) -> str:
    """The methods of a table, each with its mode."""
    return joined(dict.fromkeys(f"{row.method} {row.mode}".strip() for row in table.itertuples()))


# --- what a section shows ---


def view(section: Section, folder: Path, drawn: Figures, count: int) -> dict:
    """A section for the template. folder: where the page lies, for links."""
    name = f"{section.data}_{runs.slug(section.model)}".strip("_")
    evaluations = [item for stem, files in section.evaluations.items()
                   for item in evaluation_views(stem, files, section.data, drawn, name)]
    attributions = [attribution_view(path, drawn, name, count) for path in section.attributions]
    tables = [*section.attributions, *(path for files in section.evaluations.values()
                                       for path in files.values()), *section.generations]
    beside = [path.with_suffix(".manifest.json") for path in tables]
    beside += [chosen_path(stem) for stem in section.evaluations]
    examples = [f"{item['total']} attributed" for item in attributions]
    examples += [f"{asked} {part} questions" for item in evaluations
                 for part, asked in item["counts"].items()]
    return {
        "title": " · ".join(filter(None, (section.data, runs.slug(section.model)))),
        "anchor": re.sub(r"[^\w-]+", "-", name),
        "known": any(manifest_of(path) for path in tables),
        "run": what_was_run([manifest_of(path) for path in tables],
                            ", ".join(dict.fromkeys(examples)),
                            [seed for item in evaluations for seed in item["seeds"]]),
        "evaluations": evaluations, "attributions": attributions,
        "generations": [generation_view(path, count) for path in section.generations],
        "files": [(f"{path.parent.name}/{path.name}",
                   quote(Path(os.path.relpath(path, folder)).as_posix()))
                  for path in [*tables, *beside] if path.is_file()],
    }


LEFT_OUT = ("ids", "questions", "fingerprint", "validation", "test", "all", "prompts",
            "final_norm_sum", "batch_tokens")


def what_was_run(manifests: list[dict], examples: str, seeds: list) -> list[tuple[str, list]]:
    """Terms and their (name, value) pairs, as far as the manifests say; what is said twice stands
    once."""
    lines: dict[tuple, None] = {}

    def say(term: str, values: dict) -> None:
        pairs = tuple((name.replace("_", " "), " ".join(map(str, np.atleast_1d(value))))
                      for name, value in values.items() if value is not None
                      and name not in LEFT_OUT)
        if pairs:
            lines[term, pairs] = None

    def part(manifest: dict, key: str) -> dict:
        return manifest[key] if isinstance(manifest.get(key), dict) else {}

    for manifest in manifests:
        say("Model", {"model": None} | part(manifest, "model"))
    given: dict[str, dict] = {}  # only stage 1 says how many examples were taken, and whence
    for manifest in reversed(manifests):
        found = {key: value for key, value in part(manifest, "data").items() if value is not None}
        given.setdefault(found.get("name", ""), {}).update(found)
    for name, found in given.items():
        if "num_samples" in found:
            found.setdefault("split", data.default_split(name, 0))
        say("Data", {"name": None, "split": None} | found)
    say("Examples", {"": examples or None})
    for manifest in manifests:
        say("Attribution", part(manifest, "settings"))
    for manifest in manifests:
        decoding = {name: manifest.get(name) for name in ("generation_style", "max_new_tokens",
                                                          "temperature")}
        say({"steering_mc": "Multiple choice", "steering_generation": "Generation"}.get(
            manifest.get("stage"), "Steering"), part(manifest, "flags") | decoding)
    seeds += [manifest.get("seed", part(manifest, "flags").get("seed")) for manifest in manifests]
    known = dict.fromkeys(str(seed) for seed in seeds if seed is not None)
    say("Seed", {"": ", ".join(sorted(known)) or None})
    for manifest in manifests:
        say("Versions", part(manifest, "versions"))
    return [(term, list(pairs)) for term, pairs in lines]


# --- stage 2 ---


def evaluation_views(stem: Path, files: dict[str, Path], named: str, drawn: Figures, prefix: str
                     ) -> list[dict]:
    """A block for each data set that an evaluation's grid and front speak of.

    named: the data set if the tables do not say; prefix: of the figures' names.
    """
    grid = read_table(files["grid"], "grid") if "grid" in files else None
    front = read_table(files["front"], "front") if "front" in files else None
    if grid is None and front is None:
        return []
    if grid is not None:
        grid = grid.assign(dataset=grid.get("dataset", named), seed=grid.get("seed", ""))
        for column in {*EXTRAS}.intersection(grid):  # measured once, whatever the questions
            grid[column] = grid.groupby(["dataset", "seed", "configuration"])[column].transform(
                lambda values: values.fillna(values.mean()))
    asked = read_table(files["questions"], "questions") if "questions" in files else None
    score = manifest_of(next(iter(files.values()))).get("flags", {}).get("score", "token")
    chosen = chosen_path(stem)
    best = read_object(chosen).get("configuration") if chosen.is_file() else None

    blocks = {}
    for kind, table in (("grid", grid), ("front", front)):
        if table is not None:
            tested = table.get("evaluated_on", table.dataset)
            title = table.dataset.where(tested == table.dataset,
                                        table.dataset + ", tested on " + tested)
            for name, rows in table.groupby(title, sort=False):
                blocks.setdefault(name, {})[kind] = rows
    views = []
    for title, tables in blocks.items():
        name = prefix if len(blocks) == 1 else f"{prefix}_{title}"
        item = dict.fromkeys(("summary", "figures", "omitted", "layers", "every", "front", "cost"))
        item |= {"title": title if [*blocks] != [named] else "", "stem": stem.name, "counts": {},
                 "seeds": [seed for seed in dict.fromkeys(tables["grid"].seed) if seed]
                 if "grid" in tables else []}
        if "grid" in tables:
            item |= grid_view(files["grid"], tables["grid"], best, asked, score, drawn, name)
        if "front" in tables:
            item["front"] = front_view(tables["front"], drawn, name)
        views.append(item)
    return views


def grid_view(path, grid, best, asked, score, drawn, name) -> dict:
    """What a grid says, of the test questions where every configuration was tried on them."""
    every = {*zip(grid.seed, grid.configuration, strict=True)}
    part = next((part for part in ("test", "all", "validation") if every == {*zip(
        *grid.loc[grid.part == part, ["seed", "configuration"]].to_numpy().T, strict=True)}), None)
    counts = {part: int(rows.questions.iloc[0]) for part, rows in grid.groupby("part", sort=False)}
    if part is None:
        return {"counts": counts}
    here = grid[grid.part == part]
    if not (here.method == "base").any():
        raise UserError(f"'{path}': no row of the base model among the {part} questions; make it "
                        "again with steering_mc.py")
    seeds = list(dict.fromkeys(here.seed))
    keys = ["configuration", "method", "mode", "layers", "alpha", "part"]
    mean = here.groupby(keys, sort=False).mean(numeric_only=True).reset_index()
    if len(seeds) > 1:  # a mean of p-values is none
        mean = mean.assign(**{f"p_value_{score}": np.nan for score in SCORES})
    base, steered = mean[mean.method == "base"], mean[mean.method != "base"]

    groups = list(dict.fromkeys([*steered.layers[steered.configuration == best], *steered.layers]))
    shown = groups if len(groups) <= MAX_LAYER_GROUPS else groups[:1]
    single = steered[steered.layers.str.fullmatch(r"\d+")]
    label = f"{part} questions" + f" (means over {len(seeds)} seeds)" * (len(seeds) > 1)
    cost = "perplexity_increase" in mean and steered.perplexity_increase.notna().any()
    return {
        "counts": counts, "label": label, "extras": extras(mean),
        "summary": summary(here, best, asked, score, part) if best else None,
        "every": [cells(row) | {
            "name": row.configuration + " (control)" * (row.method in CONTROLS),
            "configuration": "", "base": row.method == "base"} for _, row in mean.iterrows()],
        "figures": [accuracy_figure(
            drawn, f"{name}_accuracy" + f"_layers-{ranges(layers)}" * (len(shown) > 1),
            pd.concat([base, steered[steered.layers == layers]]), label)
            | {"layers": ranges(layers)} for layers in shown],
        "omitted": len(groups) - len(shown),
        "layers": layers_figure(drawn, f"{name}_layers", pd.concat([base, single]), score)
        if single.layers.nunique() > 1 else None,
        "cost": cost_figure(drawn, f"{name}_cost", mean) if cost else None,
    }


def ranges(layers: str) -> str:
    """'0 1 2 5' -> '0-2, 5'."""
    return ", ".join(layer_ranges([int(layer) for layer in layers.split()]))


EXTRAS = {"perplexity_increase": ("perplexity", signed_percent),
          "unrelated_accuracy": ("unrelated accuracy", percent),
          "worse_token": ("lost, per-token", percent), "worse_sum": ("lost, summed", percent)}


def extras(table: pd.DataFrame) -> list[str]:
    return [title for column, (title, _) in EXTRAS.items() if column in table]


def cells(row) -> dict:
    """A configuration's accuracies, p-values and prices as text."""
    return {"scores": [(percent(row[f"accuracy_{score}"]), interval(row, f"accuracy_{score}"),
                        p_text(row[f"p_value_{score}"])) for score in SCORES],
            "extras": [form(row[column]) for column, (_, form) in EXTRAS.items()
                       if column in row.index]}


def summary(here, best, asked, score, part) -> dict | None:
    """Base, the chosen configuration and its controls, and what they say in a sentence or two."""
    seeds, count = list(dict.fromkeys(here.seed)), int(here.questions.iloc[0])
    rows, pairs = [], []
    for seed in seeds:
        ours = here[here.seed == seed]
        chosen = ours[ours.configuration == best]
        if chosen.empty:
            continue
        base, chosen = ours[ours.method == "base"].iloc[0], chosen.iloc[0]
        same = ours[(ours.layers == chosen.layers) & (ours.alpha == chosen.alpha)]
        controls = [row for _, row in same[same.method.isin(CONTROLS)].iterrows()]
        pairs.append((base, chosen, controls))
        named = [("base", base), ("steered (chosen)", chosen),
                 *((f"control: {row.method}", row) for row in controls)]
        suffix = f", seed {seed}" if len(seeds) > 1 else ""
        rows += [cells(row) | {"name": title + suffix, "base": title == "base",
                               "configuration": "" if title == "base" else row.configuration}
                 for title, row in named]
    if not pairs:
        return None
    says = (over_seeds(pairs, count, part, best) if len(pairs) > 1
            else verdict(*pairs[0][:2], count, part))
    if len(pairs) == 1 and pairs[0][2]:
        says += " " + beside_controls(*pairs[0][1:], asked, score, part)
    if "True" in set(here.get("includes_steering_examples", ())):
        says += (" The steering examples are among these questions and the configuration was "
                 "chosen on them: this is no held-out result.")
    return {"rows": rows, "extras": extras(here), "says": says}


def verdict(base, chosen, count: int, part: str) -> str:
    """One sentence: what steering changed, and whether it can be told from chance."""
    changes, kinds = [], []
    for score, title in SCORES.items():
        before, after = base[f"accuracy_{score}"], chosen[f"accuracy_{score}"]
        p = chosen[f"p_value_{score}"]
        changes.append(f"{title} accuracy from {percent(before)} to {percent(after)} ({p_is(p)})")
        kinds.append("chance" if not p < SIGNIFICANT else "gain" if after > before else "loss")
    if kinds == ["chance"] * 2:
        end = "neither difference can be told from chance"
    elif kinds[0] == kinds[1]:
        end = ("both gains are" if kinds[0] == "gain" else "both losses are") + (
            " more than chance explains")
    else:
        end = ", and ".join(
            f"the {title} " + ("difference cannot be told from chance" if kind == "chance"
                               else f"{kind} is more than chance explains")
            for title, kind in zip(SCORES.values(), kinds, strict=True))
    return (f"On {count} {part} questions, steering with {chosen.configuration} changes "
            f"{joined(changes)}: {end}.")


def over_seeds(pairs, count: int, part: str, best: str) -> str:
    changes = []
    for score, title in SCORES.items():
        before, after = (np.mean([pair[i][f"accuracy_{score}"] for pair in pairs]) for i in (0, 1))
        told = sum(pair[1][f"p_value_{score}"] < SIGNIFICANT for pair in pairs)
        changes.append(f"{title} accuracy from {percent(before)} to {percent(after)}, a difference "
                       f"that can be told from chance (p < {SIGNIFICANT:g}) in {told} of "
                       f"{len(pairs)} seeds")
    return (f"On {count} {part} questions and on average over {len(pairs)} seeds, steering with "
            f"{best} changes {joined(changes)}.")


def beside_controls(chosen, controls, asked, score: str, part: str) -> str:
    """One sentence: the strongest control, and whether steering is told from it."""
    value = f"accuracy_{score}"
    control = max(controls, key=lambda row: row[value])
    lead = chosen[value] - control[value]
    said = (f"The {'strongest ' * (len(controls) > 1)}control at the same layers and strength, "
            f"{control.method}, reaches {percent(control[value])} ({SCORES[score]})")
    if asked is None:
        return f"{said}, {points(lead)} points from steering to it."
    for key in ("dataset", "seed"):
        if key in asked:
            asked = asked[asked[key] == chosen[key]]
    steered, other = (asked[(asked.configuration == row.configuration) & (asked.part == part)
                            ].set_index("id")[f"correct_{score}"] == "True"
                      for row in (chosen, control))
    p = stats.paired_p_value(steered.to_numpy(), other.reindex(steered.index).to_numpy())
    told = ("is more than chance explains" if p < SIGNIFICANT else "cannot be told from chance")
    return (f"{said}; the difference of {points(lead)} points between steering and it {told} "
            f"({p_is(p)}).")


def front_view(front: pd.DataFrame, drawn: Figures, prefix: str) -> dict:
    """Gain over price: the figure, a table of methods by price, and a sentence."""
    budgets = sorted(front.max_ppl_increase.unique())
    front = front.assign(control=front.is_control.str.lower().isin(("true", "1")),
                         name=(front.method + " " + front["mode"]).str.strip())
    front["name"] += np.where(front.control, " (control)", "")

    def cell(row) -> dict:
        return {"gain": points(row.gain), "interval": interval(row, "gain"), "p": p_is(row.p_value),
                "told": row.p_value < SIGNIFICANT, "name": row["name"],
                "budget": signed_percent(row.max_ppl_increase),
                "accuracy": f"{percent(row.accuracy)} {interval(row, 'accuracy')}",
                "perplexity": signed_percent(row.perplexity_increase),
                "unrelated": points(row.unrelated_change), "configuration": row.configuration}

    tables = []
    for score, rows in front.groupby("score", sort=False):
        found = {(row["name"], row.max_ppl_increase): cell(row) for _, row in rows.iterrows()
                 if not np.isnan(row.gain)}
        tables.append({
            "title": SCORES.get(score, score), "base": percent(rows.base_accuracy.iloc[0]),
            "every": list(found.values()),
            "rows": [(name, [found.get((name, budget)) for budget in budgets])
                     for name in dict.fromkeys(rows["name"])]})
    return {"figure": front_figure(drawn, f"{prefix}_front", front), "tables": tables,
            "budgets": [f"+{100 * budget:g}\u00a0%" for budget in budgets],
            "seeds": joined(dict.fromkeys(front.seeds)),
            "says": [text for score in SCORES if (text := front_says(front, score))]}


def front_says(front: pd.DataFrame, score: str) -> str:
    """One sentence: the cheapest gain that can be told from chance, beside the controls."""
    part = front[(front.score == score) & front.gain.notna()].sort_values("max_ppl_increase")
    if part.empty:
        return ""
    told = part[~part.control & (part.gain > 0) & (part.p_value < SIGNIFICANT)]
    if told.empty:
        return (f"By {SCORES[score]} accuracy, no method gains more than chance explains at any of "
                "these prices.")
    budget = told.max_ppl_increase.iloc[0]
    best = told[told.max_ppl_increase == budget].sort_values("gain").iloc[-1]
    controls = part[part.control & (part.max_ppl_increase == budget)].sort_values("gain")
    beside = "" if controls.empty else (
        f"; the best control there, {controls.iloc[-1].method}, gains "
        f"{points(controls.iloc[-1].gain)} ({p_is(controls.iloc[-1].p_value)})")
    return (f"By {SCORES[score]} accuracy, the lowest price at which a gain can be told from "
            f"chance is perplexity up by at most {100 * budget:g}\u00a0%: {best['name']} gains "
            f"{points(best.gain)} points ({p_is(best.p_value)}){beside}.")


# --- stage 1 ---


def attribution_view(path, drawn, name, count) -> dict:
    """What ablation does on the whole, and the first examples with their attributions."""
    table = read_table(path, "attribution")
    ids = list(dict.fromkeys(table.id))
    shown = [table[table.id == identity] for identity in ids[:count]]
    pictures, note = {}, ""
    if "image_boxes" in table and (table.image_boxes != "").any():
        try:
            pictures = examples_of(manifest_of(path))
        except UserError as error:
            note = f"The pictures are not shown, their data cannot be read again: {error}"
    once = table.drop_duplicates("id")
    lines = [example_lines(path, rows) for rows in shown]
    drawn.keep(f"{name}_words", lambda figure: words_figure(figure, path, shown, lines), 1.0,
               bbox_inches="tight")
    return {
        "name": path.name, "note": note, "total": len(ids),
        "error": percent(once.completeness_error_relative_worst.median()),
        "worst": percent(once.completeness_error_relative_worst.max()),
        "gradients": f"{once.gradients_computed.median():.0f}",
        "tops": [{"top": top, "before": number(rows.f.mean()),
                  "after": number(rows.f_ablated.mean()),
                  "change": number((rows.f_ablated - rows.f).mean()),
                  "lower": int((rows.f_ablated < rows.f).sum()), "of": len(rows)}
                 for top, rows in table.groupby("top", sort=False)],
        "examples": [example_view(path, rows, line, pictures, drawn, name)
                     for rows, line in zip(shown, lines, strict=True)],
    }


def words_figure(figure: Figure, path, shown, lines) -> None:
    """The prompts' words in colour, without the pictures' tokens; underlined: ablated as pos."""
    prompts = []
    for rows, line in zip(shown, lines, strict=True):
        first, image = rows.iloc[0], image_positions(path, rows.iloc[0])
        prompts.append(([word for word in line[0].words if word.positions[0] not in image],
                        f"preferred: {first.chosen}\ndispreferred: {first.rejected}"))
    figures.draw_words(figure.subplots(), prompts,
                       [frozenset(line[0].ablated.get("pos", ())) for line in lines])


@dataclass(frozen=True)
class Line:
    """The prompt once: contrastive attribution has one line, 'normal' one for each response.

    scores: of every position; ablated: selection -> positions. The words are those of the prompt
    without its template at both ends, which has no attribution.
    """

    words: list[figures.Word]
    scores: list[float]
    ablated: dict[str, set[int]]


def example_lines(path: Path, rows: pd.DataFrame) -> list[Line]:
    first = rows.iloc[0]
    tokens = from_json(path, "tokens", first.tokens)
    selected = {row.top: from_json(path, "selected_positions", row.selected_positions)
                for row in rows.itertuples()}
    lines = []
    for index, scores in enumerate(from_json(path, "attributions", first.attributions)):
        if len(scores) != len(tokens):
            raise UserError(f"'{path}', column attributions: {len(scores)} scores for "
                            f"{len(tokens)} tokens of example {first.id}")
        found = figures.words(tokens, scores)
        moved = [i for i, word in enumerate(found) if word.score] or [0, len(found) - 1]
        lines.append(Line(found[moved[0]:moved[-1] + 1], scores,
                          {top: set(sets[index]) for top, sets in selected.items()}))
    return lines


def example_view(path, rows, lines, pictures, drawn, name) -> dict:
    first = rows.iloc[0]
    image = image_positions(path, first)
    heat, note = None, ""
    if image and first.id in pictures:
        try:
            heat = heat_view(path, first, lines[0], sorted(image), pictures[first.id], drawn, name)
        except UserError as error:
            note = str(error)
    return {
        "id": first.id, "question": first.question, "chosen": first.chosen,
        "rejected": first.rejected, "heat": heat, "note": note,
        "lines": [line_view(line, image, heat["largest"] if heat and index == 0 else 0)
                  for index, line in enumerate(lines)],
        "f": number(first.f),
        "ablated": [{"top": row.top, "k": int(row.k), "f": number(row.f_ablated)}
                    for row in rows.itertuples()],
        "error": percent(first.completeness_error_relative_worst),
        "gradients": int(first.gradients_computed),
    }


def image_positions(path: Path, row) -> set[int]:
    """Positions of the picture's tokens; none for text."""
    return set(from_json(path, "image_positions", row.get("image_positions") or "[]"))


def line_view(line: Line, image: set[int], largest: float) -> list[dict]:
    """The words of a line for the template; a picture's tokens are one item.

    largest: what has full colour at least (the picture's largest attribution).
    """
    largest = max([largest, *(abs(word.score) for word in line.words)]) or 1.0
    items = []
    for in_picture, group in groupby(line.words, lambda word: word.positions[0] in image):
        if in_picture:
            items.append({"picture": sum(len(word.positions) for word in group)})
            continue
        for word in group:
            tops = [top for top, cut in line.ablated.items() if cut.intersection(word.positions)]
            items.append({
                "picture": 0, "space": word.text[:1].isspace(),
                "text": word.text.strip() or ("↵" if "\n" in word.text else "␣"),
                "sign": "pos" if word.score > 0 else "neg" if word.score < 0 else "none",
                "strength": f"{abs(word.score) / largest:.3f}", "score": number(word.score),
                "tops": tops})
    return items


def examples_of(manifest: dict) -> dict[str, data.Example]:
    """The examples of a stage-1 run by id, read again from where its manifest says."""
    given = manifest.get("data")
    if not isinstance(given, dict) or "ids" not in given:
        raise UserError("no manifest says where they are")
    split = given["split"] or data.default_split(given["name"], 0)
    rows, source = data.load(given["name"], split, given["path"])
    found = data.examples(rows, source, manifest["seed"], given["num_samples"])
    if [example.id for example in found] != given["ids"]:
        raise UserError(f"{source.path} has other examples now than in this run")
    return {example.id: example for example in found}


def heat_view(path, row, line, positions, example, drawn, name) -> dict:
    """The picture beside its heat-map."""
    boxes = from_json(path, "image_boxes", row.image_boxes)
    placed = [(position, box) for position, box in zip(positions, boxes, strict=True) if box]
    if not placed:
        raise UserError("It is not known where in the picture this model's image tokens lie: no "
                        "heat-map")
    picture = vision.open_image(example)
    scores = [line.scores[position] for position in positions]
    heat = figures.heat_map(boxes, scores, picture.size)
    largest = max(np.abs(heat).max(), *(abs(word.score) for word in line.words
                                        if word.positions[0] not in positions), 1e-12)
    cut = {top: [box for position, box in placed if position in line.ablated[top]]
           for top in ("pos", "neg") if top in line.ablated}

    def draw(figure):
        plain, mapped = figure.subplots(1, 2)
        plain.imshow(picture)
        plain.set_axis_off()
        figures.draw_heat(mapped, picture, heat, largest, cut)

    strongest = [f"{'for' if sign > 0 else 'against'} the preferred answer strongest at the "
                 f"{place(max(placed, key=lambda item: sign * line.scores[item[0]])[1], picture)}"
                 for sign in (1, -1) if max(sign * np.array(scores)) > 0]
    outlined = [f"{len(boxes)} patches ablated as {top}" for top, boxes in cut.items()]
    alt = (f"Picture of example {row.id}, plain and with its heat-map: attribution "
           f"{joined(strongest) if strongest else 'nowhere'}"
           + (f"; outlined: {joined(outlined)}" if outlined else "") + ".")
    item = drawn.add_picture(f"{name}_heat_{row.id}", draw,
                             min(WIDTH / 2 * picture.height / picture.width, 5.0), alt)
    return item | {"largest": largest, "scale": number(largest).lstrip("+"),
                   "shares": joined(f"{percent(float(row[f'{sign}_share_image']))} of the {sign}"
                                    for sign in ("positive", "negative"))}


def place(box, picture) -> str:
    """Where in a picture a box lies, in words: 'top left', 'centre'."""
    x, y = (box[0] + box[2]) / 2 / picture.width, (box[1] + box[3]) / 2 / picture.height
    words = [("top", "", "bottom")[min(int(3 * y), 2)], ("left", "", "right")[min(int(3 * x), 2)]]
    return " ".join(filter(None, words)) or "centre"


# --- stage 3 ---


def generation_view(path: Path, count: int) -> dict:
    """Base and steered texts of the first prompts, with what differs."""
    table = read_table(path, "generation")
    prompts = list(table.groupby("prompt", sort=False))
    changed = table.base != table.steered
    return {
        "name": path.name, "total": len(prompts),
        "says": [f"{configuration} changes {int(changed[rows.index].sum())} of {len(rows)} texts"
                 for configuration, rows in table.groupby("configuration", sort=False)],
        "prompts": [{
            "id": rows.id.iloc[0], "question": rows.question.iloc[0],
            "reference": rows.reference.iloc[0],
            "pairs": [{"configuration": row.configuration, "same": row.base == row.steered,
                       "texts": word_difference(row.base, row.steered)}
                      for row in rows.itertuples()]}
            for _, rows in prompts[:count]],
    }


def word_difference(base: str, steered: str) -> tuple[list, list]:
    """Both texts as runs of words (text, whether the other text lacks them)."""
    one, two = (re.findall(r"\s*\S+", text) for text in (base, steered))
    matcher = difflib.SequenceMatcher(None, [word.strip() for word in one],
                                      [word.strip() for word in two], autojunk=False)
    runs_of = ([], [])
    for tag, i, j, k, m in matcher.get_opcodes():
        for found, text in zip(runs_of, ("".join(one[i:j]), "".join(two[k:m])), strict=True):
            words = text.lstrip()
            found += [(text[:len(text) - len(words)], False), (words, tag != "equal")]
    return runs_of


if __name__ == "__main__":
    cli.main(main)
