"""What attribution and steering do to the small vision-language model, measured on drawn scenes.

1. Pointing game: for yes/no questions about an object that is there, and that the model answers
   right, does the image token with the largest attribution lie on that object?
2. Captions: how often the model names a square that is not there, and how many of the objects that
   are there it names, base and steered, beside controls of the same strength. The configuration is
   chosen on validation scenes, among those of steering_mc_vlm.py's grid.

Run after token_ablation_vlm.py and steering_mc_vlm.py, with their flags (see scripts/vlm/demo.sh).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry, flags
from grains.cli.flags import VLM


def parser() -> argparse.ArgumentParser:
    parser = flags.evaluation_parser(__doc__, VLM)
    group = parser.add_argument_group("demo")
    group.add_argument(
        "--num_questions",
        type=flags.positive,
        default=120,
        help="yes/no questions of the pointing game",
    )
    group.add_argument(
        "--num_scenes",
        type=flags.positive,
        default=200,
        help="validation scenes of each kind that are captioned; twice as many test scenes are",
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    grid = flags.grid_settings(args)

    entry.import_libraries()
    import pandas as pd

    from demo import measures
    from grains import runs
    from grains.cli import stages
    from grains.study import gates

    folder = Path(args.output_dir or "results/vlm/demo")
    tried = flags.names_of(args).multiple_choice(grid, flags.GRID, "token", args.output_dir)["grid"]
    lm = entry.load_model(args)

    asked = measures.questions(lm, args.num_questions, args.batch_tokens)
    pointing = measures.pointing_game(lm, asked, args.batch_tokens)
    runs.write_table(folder / "pointing_game.csv", pointing)

    states = stages.states_files(args, grid)
    configurations, _ = stages.configurations(args, lm, grid, states, gates.around)
    table, best = measures.captions(
        lm,
        configurations,
        pd.read_csv(tried, keep_default_na=False),
        args.num_scenes,
        args.batch_tokens,
    )
    runs.write_table(folder / "captions.csv", table)

    drawn = measures.draw(lm, asked, best, args.batch_tokens, folder / "demo.png")
    print("\nPointing game: the top image token lies on the object asked about")
    print(pointing.to_string(index=False))
    print("\nCaptions of test scenes; configuration chosen on validation scenes")
    print(table.to_string(index=False))
    print(f"\ntables:  {folder / 'pointing_game.csv'}, {folder / 'captions.csv'}")
    if drawn:
        print(f"picture: {folder / 'demo.png'}")
    else:
        print("no picture: in none of these scenes does the base model name a false square")


if __name__ == "__main__":
    entry.run(main)
