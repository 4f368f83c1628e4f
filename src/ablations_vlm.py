"""The ablations for images and text: ablations.py with the paper's vision-language defaults."""

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import ablations
from grains import cli

if __name__ == "__main__":
    cli.main(lambda: ablations.main(cli.VLM))
