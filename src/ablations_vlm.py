"""The ablations for images and text: ablations.py with the paper's vision-language defaults."""

import ablations
from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: ablations.main(VLM))
