"""Tasks of EleutherAI's lm-eval on the base model and on the steered one, norm and gates kept."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grains import manifests, runs, stats
from grains.errors import UserError
from grains.export.plan import Plan
from grains.lm import LanguageModel
from grains.steering import BASE


def tasks(names: Sequence[str], include_path: str | None = None) -> Any:
    """lm-eval's task manager, which knows these tasks.

    include_path: a folder of tasks of one's own; nothing else is read if it has all of them.
    Raises UserError if lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "lm-eval is not installed: pip install -r requirements-harness.txt"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"'{include_path}' is no folder: give one with lm-eval's task files")
    unknown: list[str] = [*names]
    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise UserError(f"lm-eval knows no task {', '.join(unknown)}: give others, or their folder")


def evaluate(
    lm: LanguageModel,
    manager: Any,
    task: str,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[list[dict], float]:
    """What lm-eval measures of a task with the model as it is now: a row per example and metric.

    limit: examples of each task; shots: examples in the prompt (None: the task's own number).
    chat: whether prompts are in the chat template.
    Returns the rows (task, filter, metric, doc, value) and the seconds that it took. Metrics that
    are no number for each example, such as perplexities of whole texts, are left out.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    begun = time.perf_counter()
    results = simple_evaluate(
        model=HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size),
        tasks=[task],
        task_manager=manager,
        limit=limit,
        num_fewshot=shots,
        apply_chat_template=chat,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    seconds = time.perf_counter() - begun
    rows = [
        {
            "task": name,
            "filter": sample["filter"],
            "metric": metric,
            "doc": int(sample["doc_id"]),
            "value": float(sample[metric]),
        }
        for name, samples in results["samples"].items()
        for sample in samples
        for metric in sample["metrics"]
        if isinstance(sample[metric], (bool, int, float, np.number))
    ]
    if not rows:
        raise UserError(f"task {task} has no metric that is a number for each example")
    return rows, seconds


def definitions(manager: Any, names: Iterable[str]) -> dict[str, str]:
    """Task -> a digest of what it is, so that a task file that changes makes another run."""
    loaded = manager.load([*names])["tasks"]
    return {
        name: runs.digest(json.dumps(task.dump_config(), default=str, sort_keys=True))
        for name, task in loaded.items()
    }


def run(
    lm: LanguageModel,
    plans: Sequence[Plan],
    names: Sequence[str],
    output: Path,
    include_path: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> tuple[pd.DataFrame, bool]:
    """Every task with the base model and at every strength; a table of gains with intervals.

    plans: the vectors at each strength. output: the table; every example goes into a table beside
    it. options: those of `evaluate`. A task at one strength is a unit of the run: what is finished
    is kept, and never taken for another strength's.
    Returns the table, and whether anything was computed.
    """
    import importlib.metadata

    manager = tasks(names, include_path)
    steps = [(task, plan) for task in names for plan in (None, *plans)]

    def make(unit: int) -> runs.Unit:
        task, plan = steps[unit]
        with plan.steer() if plan else nullcontext():
            rows, seconds = evaluate(lm, manager, task, **options)
        label = plan.label if plan else BASE.label
        return {}, [{"configuration": label, **row, "seconds": seconds} for row in rows]

    samples = output.with_name(f"{output.stem}_samples.csv")

    def write(units: runs.Units) -> None:
        table = pd.DataFrame([row for _, rows in units() for row in rows])
        runs.write_table(samples, table.drop(columns="seconds"))
        runs.write_table(output, summary(table))

    manifest = {
        "stage": "harness",
        "model": manifests.model(lm),
        "steering": {plan.label: plan.digest() for plan in plans},
        "tasks": definitions(manager, names),
        "options": options,
        "versions": runs.versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
    }
    computed = runs.resume([output, samples], manifest, len(steps), make, write, "tasks", overwrite)
    return pd.read_csv(output, keep_default_na=False), computed


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per task, metric and configuration: mean, change against base, what it took.

    table: a row per example (see `evaluate`), with `configuration` and `seconds`.
    """
    keys = ["task", "filter", "metric"]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        values = part.pivot(index="doc", columns="configuration", values="value")
        for label in part.configuration.unique():
            own = values[label].to_numpy()
            change = own - values[BASE.label].to_numpy()
            low, high = stats.bootstrap_interval(change)
            rows.append(
                {
                    **dict(zip(keys, key, strict=True)),
                    "configuration": label,
                    "examples": len(own),
                    "value": own.mean(),
                    "change": change.mean(),
                    "change_low": low,
                    "change_high": high,
                    "p_value": stats.sign_flip_p_value(change),
                    "better": int((change > 0).sum()),
                    "worse": int((change < 0).sum()),
                    "seconds": part.loc[part.configuration == label, "seconds"].iloc[0],
                }
            )
    return pd.DataFrame(rows)
