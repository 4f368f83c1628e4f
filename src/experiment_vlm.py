"""The experiment for images and text: experiment.py with the paper's vision-language defaults."""

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import experiment
from grains import cli

if __name__ == "__main__":
    cli.main(lambda: experiment.main(cli.VLM))
