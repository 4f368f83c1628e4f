"""Stage 1 for images and text: token_ablation.py with the paper's vision-language defaults.

The decoder sees words and image features in one sequence, so the stage itself is the same.
"""

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import token_ablation
from grains import cli

if __name__ == "__main__":
    cli.main(lambda: token_ablation.main(cli.VLM))
