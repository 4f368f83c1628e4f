"""Scores of generations for images and text: score_generations.py with the paper's vision-language
defaults."""

import score_generations
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: score_generations.main(VLM))
