"""The figure of docs/results.md: points gained over the rise of perplexity, a row a model.

Reads the tables of gains in docs/tables/faithfulness.md and faithfulness_own_answers.md (SmolLM2,
three seeds) and docs/models.md (the others), and draws nothing that they do not hold.

    python benchmarks/gain_figure.py docs/img/gain_over_cost.png
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from faithfulness import CONTROLS  # noqa: E402

from grains import runs  # noqa: E402
from grains.cli import entry  # noqa: E402
from grains.errors import UserError  # noqa: E402
from grains.settings import TRAINED_RANDOM, TRAINED_ROTATED  # noqa: E402

SCORES = ("summed", "per token")
GAINED = "points gained over base"
NUMBER = r"([+-]?\d+\.\d)"
CELL = re.compile(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]")
FAR = 20  # rises of perplexity, in %, beyond which the axis is logarithmic
OPPOSITE = "sign turned"
LOOKS = {
    "gradient": ("#0072b2", "o"),
    "trained": ("#b8860b", "D"),
    OPPOSITE: ("#d55e00", "v"),
    "caa": ("#009e73", "^"),
    "mean, pca (the paper's)": ("#7d63c8", "s"),
    "controls": ("#808080", "x"),
}
# Configuration -> score -> gain, and the ends of its interval; rise of perplexity in %.
Gains = dict[str, tuple[float, dict[str, tuple[float, float, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("figure", type=Path, help="PNG to write")
    parser.add_argument("--faithfulness", type=Path, default=ROOT / "docs/tables/faithfulness.md")
    parser.add_argument(
        "--trained", type=Path, default=ROOT / "docs/tables/faithfulness_own_answers.md"
    )
    parser.add_argument("--models", type=Path, default=ROOT / "docs/models.md")
    args = parser.parse_args()
    drawn = gains(args.faithfulness)
    if not drawn:
        raise UserError(f"'{args.faithfulness}' has no table of {GAINED}")
    trained, others = (
        gains(document) if document.exists() else {} for document in (args.trained, args.models)
    )
    drawn = {name: of | trained.get(name, {}) for name, of in drawn.items()}
    draw(drawn | {name: of for name, of in others.items() if name not in drawn}, args.figure)


def gains(document: Path) -> dict[str, Gains]:
    """Model -> its gains on contrary contexts, from the table of gains in a document.

    The columns are those of one model, or begin with a model's name. Empty without such a table.
    """
    lines = document.read_text(encoding="utf-8").splitlines()
    titles = [place for place, line in enumerate(lines) if line.startswith("**") and GAINED in line]
    if not titles:
        return {}
    rows = []
    for line in lines[titles[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *body = rows
    own = lines[titles[0]].strip("*").partition(",")[0]
    by_model: dict[str, Gains] = {}
    for column, title in enumerate(header):
        name, _, score = title.rpartition(": ")
        score = score.removeprefix("contrary contexts, ")
        if score not in SCORES:
            continue
        rise = next(i for i in range(column, len(header)) if header[i].endswith("prose, %"))
        for row in body:
            if match := CELL.fullmatch(row[column]):
                kept = by_model.setdefault(name or own, {})
                _, by_score = kept.setdefault(row[0], (float(row[rise]), {}))
                by_score[score] = tuple(map(float, match.groups()))
    return by_model


def look_of(configuration: str) -> str:
    """Which of LOOKS a configuration has."""
    method, _, how = configuration.partition(", ")
    if how == OPPOSITE:
        return OPPOSITE
    if method in (*CONTROLS, TRAINED_RANDOM, TRAINED_ROTATED):
        return "controls"
    return method if method in LOOKS else "mean, pca (the paper's)"


def draw(models: dict[str, Gains], path: Path) -> None:
    """A row for each model, a column for each score; intervals are 95 %."""
    figure = Figure(figsize=(9.0, 1.1 + 2.6 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(SCORES), sharey=True, sharex="row", squeeze=False)
    handles = {}
    for row, (name, configurations) in enumerate(models.items()):
        for column, score in enumerate(SCORES):
            axis = axes[row, column]
            axis.axhline(0, color="0.75", linewidth=0.8)
            axis.axvline(2, color="0.75", linewidth=0.8, linestyle=":")
            for configuration, (rise, by_score) in configurations.items():
                gain, low, high = by_score[score]
                look = look_of(configuration)
                colour, marker = LOOKS[look]
                handles[look] = axis.errorbar(
                    rise,
                    gain,
                    [[gain - low], [high - gain]],
                    fmt=marker,
                    color=colour,
                    markersize=6,
                    linewidth=1.2,
                )
            axis.set_title(f"{name}, {score}", fontsize=10)
            if max(rise for rise, _ in configurations.values()) > FAR:
                axis.set_xscale("symlog", linthresh=FAR)
    for axis in axes[-1]:
        axis.set_xlabel("rise of perplexity of prose, % (dotted: the budget)")
    for axis in axes[:, 0]:
        axis.set_ylabel("points gained")
    legend = [look for look in LOOKS if look in handles]
    figure.legend(
        [handles[look] for look in legend], legend, loc="outside lower center", ncols=len(legend)
    )
    runs.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


if __name__ == "__main__":
    entry.run(main)
