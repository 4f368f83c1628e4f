"""Stage 2 for images and text: steering_mc.py with the paper's vision-language defaults.

The decoder sees words and image features in one sequence, so the stage itself is the same.
"""

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import steering_mc
from grains import cli

if __name__ == "__main__":
    cli.main(lambda: steering_mc.main(cli.VLM))
