"""The page beside an export: what it is, what it does, what it cannot hold, how it is used."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from grains.errors import UserError
from grains.export.folders import auto_class
from grains.export.plan import KEEPS_NORM, Check, Plan
from grains.settings import EMBEDDED, EXPORTS, MODELS
from grains.steering import BASE

USE = {
    "gguf": "llama-server -m MODEL.gguf --control-vector vectors.gguf",
    "gguf-bias": "llama-server -m model.gguf",
    "hf-bias": 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
    "peft": 'PeftModel.from_pretrained(model, "THIS_FOLDER")',
    "lm-eval": "lm_eval --model steered --model_args pretrained=MODEL,steer_path=steer.pt",
    "hf": '{}.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
}
HUB_IDS = MODELS | {EMBEDDED: "HuggingFaceTB/SmolLM2-135M-Instruct"}
LIBRARY = {"peft": "peft", "hf": "transformers", "hf-bias": "transformers"}


def use(plan: Plan, to: str) -> str:
    """How what was written is loaded, in a line."""
    return USE[to].format(auto_class(plan.lm))


def measured(path: Path, plan: Plan) -> dict:
    """The row of a table of stage 2 or of an experiment that holds this configuration, on test.

    Returns gain and cost as text. Raises UserError if the table has no such row.
    """
    table = pd.read_csv(path, keep_default_na=False, dtype={"layers": str})
    if missing := {"configuration", "method", "layers", "alpha", "part"} - {*table.columns}:
        raise UserError(
            f"'{path}' has no columns {', '.join(sorted(missing))}: give a ..._grid.csv"
        )
    layers = " ".join(map(str, plan.added))
    info = plan.vectors.info
    rows = table[
        (table.method == info.get("method"))
        & (table.layers == layers)
        & (table.alpha.astype(float) == plan.alpha)
        & (table.configuration.map(_positions) == plan.positions)
        & table.part.isin(["test", "all"])
    ]
    base = table[(table.method == BASE.method) & table.part.isin(["test", "all"])]
    if "alpha_units" in table.columns:
        rows = rows[rows.alpha_units == plan.units]
    if rows.empty or base.empty:
        raise UserError(f"'{path}' has no row of {plan.label} on test questions")
    row, base_row = rows.iloc[0], base.iloc[0]
    known = {
        "questions": int(row.questions),
        "accuracy per token": _interval(row),
        "accuracy per token, base": _interval(base_row),
    }
    for column, name in (
        ("perplexity_increase", "rise of perplexity of prose"),
        ("answers_increase", "rise of perplexity of the base model's own answers"),
        ("unrelated_change", "change of accuracy on unrelated questions"),
    ):
        if column in table.columns and row[column] != "":
            known[name] = f"{float(row[column]):+.1%}"
    return known


def _positions(label: str) -> str:
    """The positions that a configuration's label ends in (see `Configuration.label`)."""
    return label[label.rindex("(") + 1 : -1] if label.endswith(")") else "all"


def _interval(row: pd.Series) -> str:
    values = (row.accuracy_token, row.accuracy_token_low, row.accuracy_token_high)
    share, low, high = (f"{float(value):.1%}" for value in values)
    return f"{share} [{low}, {high}]"


def where(positions: str) -> str:
    """What the folder's model needs to know to steer at some positions alone."""
    if positions == "image":
        return "Steered at the tokens of a picture alone; a text without one is refused."
    return (
        f"Steered at positions `{positions}` alone: `generate()` takes all it is given as the "
        "prompt. A forward cannot know where the prompt ends: give it `prompt_length`, the number "
        "of the prompt's tokens in each row without padding, as in `model(input_ids, "
        "prompt_length=12)`. Without it a forward is refused, and so is a cache of fixed size."
    )


def card(plan: Plan, to: str, check: Check, measured: dict | None, licence: str | None) -> str:
    """A model card in Markdown, with a header that hubs read."""
    info = plan.vectors.info
    model = info.get("model") or {}
    name = model.get("model") or plan.lm.name
    base = HUB_IDS.get(name, name)  # hubs link what they know by its id
    data = (info.get("data") or {}).get("name")
    header = ["---", f"base_model: {base}"]
    header += [f"license: {licence}"] if licence else []
    header += [f"library_name: {LIBRARY[to]}"] if to in LIBRARY else []
    header += ["tags:", *(f"- {tag}" for tag in ("steering", "activation-steering", "grains"))]
    header += ["---", ""]
    examples = (info.get("data") or {}).get("num_samples")
    lines = [
        f"# Steering vectors for {base}",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base} |",
        f"| data | {data or 'not known'}{f', {examples} steering pairs' if examples else ''} |",
        f"| configuration | {plan.label} |",
        f"| kept here | {EXPORTS[to]} |",
        "| effect on the logits of a text | "
        f"max {check.effect[0]:.2g}, mean {check.effect[1]:.2g} |",
        f"| what was written, against that | max {check.written[0]:.2g}, mean "
        f"{check.written[1]:.2g} |",
    ]
    if to not in KEEPS_NORM:
        lines.append(
            "| lost, as the norm of the state is not kept | "
            f"max {check.lost[0]:.2g}, mean {check.lost[1]:.2g} |"
        )
    lines += [f"| measured: {name} | {value} |" for name, value in (measured or {}).items()]
    lines += [f"| licence | {licence or 'that of the base model'} |"]
    lines += ["", "```", use(plan, to), "```", ""]
    if plan.positions != "all":
        lines += [where(plan.positions), ""]
    if to not in KEEPS_NORM:
        lines += [
            "The vectors are added, and the length of the hidden states is not restored: at large "
            "strengths this differs from what was measured.",
            "",
        ]
    lines += [
        "Made with [GrAInS](https://arxiv.org/abs/2507.18043): gradient-based attribution for "
        "inference-time steering. Steering changes more than it is made for: try it on your own "
        "texts.",
        "",
    ]
    return "\n".join([*header, *lines])
