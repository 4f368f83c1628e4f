"""One row of bench.py's comparison with an earlier checkout, on one side and once.

    python benchmarks/side.py chat --src CHECKOUT/src --output result.pt

It runs on both sides, so it calls only what both have, or asks what there is.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

K, MAX_TOKENS = 10, 2048
# Six shots, about 200 tokens, the same before every question.
SHOTS = """Q: What is the capital of France, and since when has it been the capital?
A: Paris has been the capital of France for most of the time since the tenth century.
Q: Which planet of the solar system is the largest one?
A: Jupiter is the largest planet, more than twice as heavy as all the others together.
Q: How many bones does an adult human being usually have?
A: An adult usually has two hundred and six bones, fewer than a newborn child.
Q: Who wrote the play about the prince of Denmark?
A: William Shakespeare wrote Hamlet, most likely between 1599 and 1601.
Q: What is water made of, and how is it written?
A: Water is made of hydrogen and oxygen, and it is written as two letters and a number.
Q: Why do the leaves of many trees turn red or yellow in autumn?
A: Because the green chlorophyll breaks down, and the other colours show."""
# row -> model, data, style, pairs for the baseline and for ours
ROWS: dict[str, tuple[str | None, str, str, int, int]] = {
    "chat": (None, "misconceptions", "chat", 2, 2),
    "shots": (None, "misconceptions", "qa", 1, 1),
    "qa": (None, "misconceptions", "qa", 6, 6),
    "published": (None, "misconceptions", "qa", 3, 3),
    "vectors": (None, "misconceptions", "qa", 2, 48),
    "vlm": ("shapes-vlm", "shapes", "chat", 12, 12),
    "llava": (None, "", "chat", 4, 4),  # the model is given, the data are made up
}


def examples(dataset: str, count: int) -> list:
    from grains import data

    try:
        split = data.default_split(dataset, "steering")
    except TypeError:  # the splits had numbers
        split = data.default_split(dataset, 0)
    rows, source = data.load(dataset, split)
    return [example.pair() for example in data.examples(rows, source, 0, count)]


def made_up(lm: Any, count: int) -> list:
    """Examples of random words about pictures of coloured noise."""
    import numpy as np
    from PIL import Image

    from grains import data

    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        noise = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((320, 320), Image.Resampling.BICUBIC)
        question, *answers = (
            " ".join(f"w{word}" for word in draw.integers(0, 500, length)) for length in (12, 8, 8)
        )
        made.append(data.Example(str(number), question, tuple(answers), 0, image=picture))
    return made


def encoded(lm: Any, row: str, count: int) -> list:
    from grains import prompts

    _, dataset, style, *_ = ROWS[row]
    items = []
    for example in examples(dataset, count) if dataset else made_up(lm, count):
        item = prompts.encode(lm, example, style)
        if row == "shots":  # a preamble that does not move, in the place of a context
            longer = prompts.encode(lm, replace(example, context=SHOTS), style)
            behind = item.content[-len(item.prompt_ids) :]
            content = longer.content & False
            content[-len(behind) :] = behind
            item = replace(longer, content=content)
        items.append(item)
    return items


def attributed(lm: Any, items: list, **changes: Any) -> list[dict]:
    """Stage 1 on pairs: attribution, both selections ablated, states and gradients."""
    import torch

    from grains import ablation, attribution

    settings_of = getattr(attribution, "Settings", None)
    if settings_of is None:
        from grains.settings import AttributionSettings as settings_of
    positions_of = getattr(attribution, "attributed_positions", None) or attribution.moved
    settings = settings_of(**changes)
    made = []
    for item in items:
        (result,) = attribution.attribute(lm, item, settings, MAX_TOKENS, torch.Generator())
        candidates = positions_of(item, settings.attribute) & (item.words | item.image)
        sets = [
            ablation.select(torch.from_numpy(result.scores), candidates, K, top, None)
            for top in ("pos", "neg")
        ]
        states = ablation.hidden_states(lm, item, sets, MAX_TOKENS)
        made.append(
            {
                "points": result.points,
                "scores": torch.from_numpy(result.scores),
                "last": states.last,
                "gradients": states.gradients,
            }
        )
    return made


def plain(lm: Any, items: list) -> list[dict]:
    """The states that need no attribution; where there is no such way, with all of stage 1."""
    from grains import ablation

    if not hasattr(ablation, "plain_states"):
        return [
            {"last": item["last"][:1], "gradients": item["gradients"]}
            for item in attributed(lm, items)
        ]
    return [
        {"last": states.last, "gradients": states.gradients}
        for states in ablation.plain_states(lm, items, MAX_TOKENS)
    ]


def memory() -> tuple[float, float]:
    """This process's memory now and its peak, MiB (Linux)."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(status.split(f"{key}:")[1].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now / 1024, peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--src", required=True, help="the folder src of a checkout")
    parser.add_argument("--model", help="a folder, for a row that names no model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--matmul_precision", help="of the attribution, if the side knows it")
    parser.add_argument("--count", type=int, required=True, help="pairs")
    parser.add_argument("--output", required=True, help="where the numbers go")
    args = parser.parse_args()
    sys.path.insert(0, args.src)
    import torch

    from grains import cpu, models

    with suppress(ImportError):  # where the demo's model and data are known without it
        import demo.registered  # noqa: F401

    cpu.keep_freed_memory()  # as the stages do
    lm = models.load(args.model or ROWS[args.row][0] or models.EMBEDDED, dtype=args.dtype)
    items = encoded(lm, args.row, args.count)
    loaded = memory()[0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    changes = {"matmul_precision": args.matmul_precision} if args.matmul_precision else {}
    if args.row == "published":
        changes |= {"baseline": "zeros", "attribute": "all", "ig_steps": 20}
    made = plain(lm, items) if args.row == "vectors" else attributed(lm, items, **changes)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    torch.save(made, args.output)
    print(
        json.dumps(
            {
                "pairs": len(items),
                "seconds": seconds,
                "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
                "peak": memory()[1] - loaded,
                "points": sorted(item.get("points", 0) for item in made)[len(made) // 2],
            }
        )
    )


if __name__ == "__main__":
    main()
