"""Stage 2 for images and text: steering_mc.py with the paper's vision-language defaults.

The decoder sees words and image features in one sequence, so the stage itself is the same.
"""

import steering_mc
from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: steering_mc.main(VLM))
