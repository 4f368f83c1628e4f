"""Names of files: every setting that makes other results makes another name."""

from dataclasses import replace
from pathlib import Path

import pytest

import ablations
import experiment
from grains.cli.flags import GRID, LLM
from grains.names import LONGEST_NAME, ExperimentNames, Names, stem
from grains.settings import (
    STUDY_DEFAULT,
    STUDY_GRID,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    PromptSettings,
)

NAMES = Names(
    "llm", "meta/tiny llama", DataSettings("x", "/data/x.jsonl"), AblationSettings(), "train"
)


def test_the_defaults_make_a_short_name():
    assert str(NAMES.attributions()) == (
        "results/llm/token_attribution/"
        "x_tiny-llama_train_n50_seed0_qa_contrastive_integrated_gradients_k10.csv"
    )
    assert NAMES.multiple_choice(GRID, GRID, "token")["grid"].name == (
        "x_tiny-llama_n50_seed0_qa_contrastive_integrated_gradients_k10_joint_all_grid.csv"
    )


ATTRIBUTION = AttributionSettings()
STAGE_1 = [
    {"ablation": AblationSettings(replace(ATTRIBUTION, ig_steps=20))},
    {"ablation": AblationSettings(replace(ATTRIBUTION, ig_steps=30))},
    {"ablation": AblationSettings(replace(ATTRIBUTION, baseline="zeros"))},
    {"ablation": AblationSettings(replace(ATTRIBUTION, attribute="all"))},
    {"ablation": AblationSettings(replace(ATTRIBUTION, tolerance=0.01))},
    {"ablation": AblationSettings(replace(ATTRIBUTION, grad_method="vanilla"))},
    {"ablation": AblationSettings(top_k=5)},
    {"ablation": AblationSettings(ablate="text")},
    {"ablation": AblationSettings(replacement="unk")},
    {"ablation": AblationSettings(image_replacement="zeros")},
    {"ablation": AblationSettings(prompt=PromptSettings("chat"))},
    {"ablation": AblationSettings(seed=1)},
    {"data": DataSettings("x", num_samples=10)},
    {"data": DataSettings("x", split="dev")},
    {"model": "other"},
]


def test_every_setting_of_stage_1_makes_another_name():
    names = [NAMES, *(replace(NAMES, **change) for change in STAGE_1)]
    paths = [str(item.attributions()) for item in names]
    assert len(set(paths)) == len(paths)
    states = [str(path) for item in names for path in item.states(("pos", "neg")).values()]
    assert len(set(states)) == len(states) == 2 * len(paths)


def test_every_setting_of_the_grid_makes_another_name():
    grids = [
        GRID,
        replace(GRID, alphas=(0.01,)),
        replace(GRID, alphas=(0.02,)),
        replace(GRID, methods=("mean",)),
        replace(GRID, modes=("pos", "both")),
        replace(GRID, layers=("10-29",)),
        replace(GRID, layer_mode="each"),
        replace(GRID, units="absolute"),
    ]
    named = [NAMES.multiple_choice(grid, GRID, "token")["grid"] for grid in grids]
    named += [NAMES.multiple_choice(GRID, GRID, "sum")["grid"]]
    named += [NAMES.multiple_choice(GRID, GRID, "token", None, x)["grid"] for x in (0.02, 0.1)]
    named += [
        replace(NAMES, data=replace(NAMES.data, **change)).multiple_choice(GRID, GRID, "token")[
            "grid"
        ]
        for change in (
            {"evaluate_on": "all"},
            {"num_validation": 10},
            {"num_test": 10},
            {"validation_split": "dev"},
            {"test_split": "dev"},
        )
    ]
    assert len(set(named)) == len(named)
    assert len({NAMES.generations(GRID, GRID, parts) for parts in ((), ("tokens-5",))}) == 2


STUDY = replace(STUDY_DEFAULT, sources=(DataSettings("x"),))


def test_experiments_that_try_something_else_share_parts_and_have_other_tables():
    studies = [
        STUDY,
        replace(STUDY, seeds=(0,)),
        replace(STUDY, budgets=(0.1,)),
        replace(STUDY, strengths_at=(0.1,)),
        replace(STUDY, max_unrelated_loss=0.1),
        replace(STUDY, gated=("mean",)),
        replace(STUDY, train_vectors=False),
        replace(STUDY, own_answers="keep"),
        replace(STUDY, lora="dpo"),
        replace(STUDY, num_generations=3),
        *(
            replace(STUDY, grid=replace(STUDY_GRID, **change))
            for change in (
                {"methods": ("mean",)},
                {"modes": ("pos", "both")},
                {"alphas": (0.1,)},
                {"units": "absolute"},
                {"positions": "response"},
            )
        ),
    ]
    names = [ExperimentNames("llm", "m", study) for study in studies]
    assert len({item.parts for item in names}) == 1
    tables = [path for item in names for path in (*item.tables().values(), item.ablations())]
    assert len({*tables}) == len(tables) == 4 * len(studies)
    assert len({names[0].ablations(change) for change in ((), ["top_k=1"], ["top_k=2"])}) == 3
    shared = "x_m_n50_qa_contrastive_integrated_gradients_k10_joint_all"
    assert names[0].tables()["front"] == Path(f"results/llm/experiment/{shared}_front.csv")
    every = replace(STUDY, seeds=tuple(range(99)), budgets=tuple(n / 99 for n in range(1, 99)))
    assert len(ExperimentNames("llm", "m", every).tables()["generations"].name) < 240


def test_the_flags_own_defaults_are_not_in_the_names_of_tables():
    for module in (experiment, ablations):
        settings = experiment.study_settings(module.parser(LLM).parse_args([]))
        names = ExperimentNames("llm", "m", settings, default=settings)
        if module is experiment:
            names = ExperimentNames("llm", "m", settings)
        assert names.tables()["grid"].name == f"{names.stem}_grid.csv"


def test_what_is_found_again_is_of_these_settings_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = [NAMES, *(replace(NAMES, **change) for change in STAGE_1)]
    written = []
    for item in variants:
        for alphas in ((0.01,), (0.02,)):
            grid = replace(GRID, alphas=alphas)
            path = item.multiple_choice(grid, GRID, "token")["chosen"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            written.append(path)
    assert len(set(written)) == 2 * len(variants)
    for item in variants:
        assert len(item.chosen()) == 2


@pytest.mark.parametrize("length", [10, LONGEST_NAME, LONGEST_NAME + 1, 1000])
def test_a_long_name_is_shortened_and_stays_its_own(length):
    names = {stem(["é" * (length // 2), end]) for end in ("a", "b")}
    assert len(names) == 2 and all(len(name.encode()) <= LONGEST_NAME for name in names)


def test_a_choice_with_long_names_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = replace(NAMES, model="m" * 150)
    grid = replace(GRID, alphas=tuple(n / 1000 for n in range(1, 60)))
    path = names.multiple_choice(grid, GRID, "token")["chosen"]
    path.parent.mkdir(parents=True)
    path.touch()
    assert names.chosen() == [path] and len(path.name.encode()) < 240
