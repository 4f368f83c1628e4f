"""Scores of every generated text, and their summary for each configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from grains import stats
from grains.data import Example
from grains.judge import judges
from grains.judge.metrics import Objects, bleu, margin, overlap, rouge_l
from grains.steering import BASE

MEANINGS = {
    "f1": "words shared with a right answer, 0 to 1 (SQuAD's F1)",
    "f1_margin": "f1, minus that with a wrong answer",
    "bleu_margin": "BLEU with the nearest right answer, minus that with the nearest wrong one",
    "rouge_l_margin": "the same with ROUGE-L",
    "object_hallucination": "share of the objects named that are not in the picture",
    "text_hallucination": "share of the texts that name such an object",
    "repetition": "share of three-word sequences that occurred before in the text",
    "words": "length of the text",
    "judge_rating": "0 to 6, by the judge",
    "judge_hallucination": f"share of the texts that it rates below {judges.HALLUCINATION_BELOW}",
}


def score_texts(
    texts: pd.DataFrame, examples: dict[str, Example], objects: Objects, answers: dict[str, str]
) -> pd.DataFrame:
    """A row per text with its scores; NaN where it has none.

    texts: as `generations.texts` gives them, with the column prompt_of_judge if there are answers.
    answers: of the judge, by its prompts. Scores that need wrong answers, known objects or a judge
    have columns only where the data set or the run has those.
    """
    rows = []
    for row in texts.itertuples():
        example = examples[row.id]
        f1, f1_margin = overlap(example, row.text)
        scores: dict[str, Any] = {"f1": f1}
        if len(example.choices) > 1:
            scores |= {
                "f1_margin": f1_margin,
                "bleu_margin": margin(bleu, example, row.text),
                "rouge_l_margin": margin(rouge_l, example, row.text),
            }
        if example.objects is not None:
            named, false = objects.count(row.text, example.objects)
            scores |= {
                "objects_named": named,
                "objects_false": false,
                "text_hallucination": float(false > 0),
            }
        scores |= {"repetition": stats.repetition(row.text), "words": len(row.text.split())}
        if answers:
            answer = answers[row.prompt_of_judge]
            rating = judges.rating(answer)
            below = float(rating < judges.HALLUCINATION_BELOW)
            scores |= {
                "judge_rating": rating,
                "judge_answer": answer,
                "judge_hallucination": np.nan if np.isnan(rating) else below,
            }
        rows.append(
            {
                "prompt": row.prompt,
                "id": row.id,
                "configuration": row.configuration,
                "method": row.method,
                "alpha": row.alpha,
                **scores,
                "text": row.text,
                "draw": row.draw,
            }
        )
    return pd.DataFrame(rows)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per score and configuration.

    mean over n texts, with a bootstrap interval; difference: of the texts that have the score from
    the base's to the same prompts (pairs of them), with a bootstrap interval and the p-value of a
    paired permutation test. Several texts drawn for a prompt count as one, with their mean scores.
    """
    tables = {
        name: _by_prompt(table) for name, table in scores.groupby("configuration", sort=False)
    }
    rows = []
    for score in MEANINGS:
        if score not in scores and not (
            score == "object_hallucination" and "objects_named" in scores
        ):
            continue
        values = {name: values_of(table, score) for name, table in tables.items()}
        for name, table in tables.items():
            known = values[name].dropna().to_numpy()
            low, high = stats.bootstrap_interval(known)
            row = {
                "score": score,
                "configuration": name,
                "method": table.method.iloc[0],
                "alpha": table.alpha.iloc[0],
                "n": len(known),
                "mean": known.mean() if len(known) else np.nan,
                "low": low,
                "high": high,
            }
            if name != BASE.label:
                gains = (values[name] - values[BASE.label]).dropna().to_numpy()
                low, high = stats.bootstrap_interval(gains)
                row |= {
                    "pairs": len(gains),
                    "difference": gains.mean() if len(gains) else np.nan,
                    "difference_low": low,
                    "difference_high": high,
                    "p_value": stats.sign_flip_p_value(gains) if len(gains) else np.nan,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def _by_prompt(table: pd.DataFrame) -> pd.DataFrame:
    """One configuration's scores, a row per prompt."""
    if "draw" not in table or table.draw.nunique() == 1:
        return table.set_index("prompt")
    prompts = table.groupby("prompt", sort=False)
    return prompts.mean(numeric_only=True).assign(method=prompts.method.first())


def values_of(table: pd.DataFrame, score: str) -> pd.Series:
    """A value per text whose mean is the score of a configuration.

    The share of false objects is that of all objects named, in whatever text (CHAIR's): a ratio of
    two sums. Its value per text is the share, plus the text's own part in it to first order.
    """
    if score != "object_hallucination":
        return table[score].astype(float)
    false, named = table.objects_false.astype(float), table.objects_named.astype(float)
    if not named.sum():
        return named * np.nan
    share = false.sum() / named.sum()
    return share + (false - share * named) / named.mean()
