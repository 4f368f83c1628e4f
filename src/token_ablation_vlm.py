"""Stage 1 for images and text: token_ablation.py with the paper's vision-language defaults.

The decoder sees words and image features in one sequence, so the stage itself is the same.
"""

import token_ablation
from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: token_ablation.main(VLM))
