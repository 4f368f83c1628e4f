"""The experiment for images and text: experiment.py with the paper's vision-language defaults."""

import experiment
from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: experiment.main(VLM))
