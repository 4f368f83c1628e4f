"""The rows of the paper's vision-language tables: see paper_tables.py."""

import paper_tables
from demo import registered  # noqa: F401  the drawn scenes and their model, by their short names
from grains.cli import entry
from grains.cli.flags import VLM

if __name__ == "__main__":
    entry.run(lambda: paper_tables.main(VLM))
