"""What the text demo prints: every number is of the row, strength and data set that it names."""

import subprocess
import sys

import pandas as pd
import pytest

from demo import in_turn, text_figure
from grains import readable


def row(method, alpha, share, rise=None, part="test"):
    values = {"configuration": f"{method} x {alpha:g}", "method": method, "alpha": alpha}
    for score, more in (("sum", 0.0), ("token", 0.01)):
        values |= {
            f"accuracy_{score}": share + more,
            f"accuracy_{score}_low": share + more - 0.1,
            f"accuracy_{score}_high": share + more + 0.1,
        }
    return values | {"part": part} | ({} if rise is None else {"perplexity_increase": rise})


@pytest.fixture
def printed():
    grid = pd.DataFrame(
        [
            row("base", 0.0, 0.40, 0.0),
            row("gradient", -0.003, 0.20, 0.03),
            row("gradient", 0.003, 0.80, 0.01),
            row("gradient", 0.006, 0.85, 0.05),
            row("rotated", 0.003, 0.41, 0.015),
            row("rotated", 0.006, 0.42, 0.06),
        ]
    )
    beside = {
        "no context": pd.DataFrame(
            [row("base", 0.0, 0.50), row("gradient", -0.003, 0.51), row("gradient", 0.003, 0.52)]
        )
    }
    answers = pd.DataFrame(
        [
            (name, "Lyon", "Paris, of course.", said, f"{method} x 0.003")
            for method, texts in (
                ("gradient", ("It is LYON.", "Lyons?")),
                ("rotated", ("no", "No")),
            )
            for name, said in zip("ab", texts, strict=True)
        ],
        columns=["id", "reference", "base", "steered", "configuration"],
    )
    chosen = {"alpha": 0.003, "method": "gradient", "controls": ["rotated"]}
    chosen["configuration"] = "gradient x 0.003"
    lines = text_figure.table(grid, beside, answers, chosen).splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_names_what_it_shows(printed):
    head, _, *rows = printed
    assert head == [
        *("", "contrary contexts, summed", "per token", "free answers from the context"),
        *("no context", "prose"),
    ]
    assert rows == [
        [
            "base",
            "40.0 % [30.0, 50.0]",
            "41.0 % [31.0, 51.0]",
            "0 of 2",
            "51.0 % [41.0, 61.0]",
            "+0.0 %",
        ],
        [
            "steered, 0.003",
            "80.0 % [70.0, 90.0]",
            "81.0 % [71.0, 91.0]",
            "2 of 2",
            "53.0 % [43.0, 63.0]",
            "+1.0 %",
        ],
        [
            "sign turned, -0.003",
            "20.0 % [10.0, 30.0]",
            "21.0 % [11.0, 31.0]",
            "",
            "52.0 % [42.0, 62.0]",
            "+3.0 %",
        ],
        [
            "control `rotated`, 0.003",
            "41.0 % [31.0, 51.0]",
            "42.0 % [32.0, 52.0]",
            "0 of 2",
            "",
            "+1.5 %",
        ],
    ]


def test_scripts_run_in_turn_in_one_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "if __name__ == '__main__':\n"
        "    print(os.getpid(), *sys.argv[1:])\n"
        "    sys.exit('failed' if 'fail' in sys.argv else None)\n"
    )
    words = [script, "a", "--", script, "--b", "c", "--", script, "fail", "--", script, "never"]
    ran = subprocess.run(
        [sys.executable, in_turn.__file__, *words], capture_output=True, text=True, check=False
    )
    said = [line.split(" ", 1) for line in ran.stdout.splitlines()]
    assert [text for _, text in said] == ["a", "--b c", "fail"]
    assert len({process for process, _ in said}) == 1
    assert ran.returncode == 1 and ran.stderr == "failed\n"


def test_only_the_users_words_are_shown():
    tokens, scores = ["<s>", "user", "The", "cat", "sat", "</s>"], [0, 0, 0.5, 0, -0.1, 0]
    words = readable.words(tokens, scores)
    shown = readable.without_template(words)
    assert [(word.text, word.score) for word in shown] == [("The", 0.5), ("cat", 0), ("sat", -0.1)]
    assert readable.without_template(words[:2]) == words[:2]
