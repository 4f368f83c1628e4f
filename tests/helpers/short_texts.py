"""Few and short neutral passages, and few unrelated questions.

For runs of the experiment whose check does not depend on what these are: reading them takes most
of a tiny model's time.
"""

PASSAGES, WORDS = 24, 12  # the first passages of a file, and words of each
QUESTIONS = 8  # every eighth


def install() -> None:
    """Have this process read only these."""
    from grains.study import costs

    texts, examples = costs.neutral_texts, costs.unrelated_examples

    def neutral_texts(path=costs.NEUTRAL):
        return [" ".join(text.split()[:WORDS]) for text in texts(path)[:PASSAGES]]

    def unrelated_examples(path=costs.UNRELATED):
        return examples(path)[::QUESTIONS]

    costs.neutral_texts, costs.unrelated_examples = neutral_texts, unrelated_examples
