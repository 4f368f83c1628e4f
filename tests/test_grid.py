"""The grid of configurations that the flags ask for."""

import pytest
import torch

from grains.runs import write_tensors
from grains.settings import GridSettings
from grains.states import StatesFile
from grains.steering import directions
from grains.vectors import make_all

EXAMPLES = 3
NAMES = (
    "hidden_pos_response",
    "hidden_neg_response",
    "hidden_pos_response_ablated",
    "hidden_neg_response_ablated",
    "gradients",
)


@pytest.fixture
def states(make_tiny, tmp_path):
    """A tiny model with 4 layers, and files of stage 1 of it."""
    lm = make_tiny("llama")
    shape = (EXAMPLES, len(lm.layers) + 1, lm.hidden_size)
    info = {
        "stage": "token_ablation",
        "model": lm.identity() | {"dtype": "float32"},
        "data": {"fingerprint": "f", "questions": ["q"] * EXAMPLES},
        "settings": {},
        "seed": 0,
    }
    files = {}
    for seed, top in enumerate(("pos", "neg")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator) for name in NAMES}
        norms = torch.rand(shape[:2], generator=torch.Generator().manual_seed(9))
        write_tensors(tmp_path / top, tensors | {"norms": norms}, info | {"top": top})
        files[top] = StatesFile(tmp_path / top)
    return lm, files


def grid(states, methods, layers, alphas, **options):
    _, files = states
    settings = GridSettings(methods, layers=layers, alphas=alphas, **options)
    return [
        direction.at(alpha, settings.units)
        for method, mode, made in make_all(files, settings, seed=0)
        for direction in directions(made, method, mode, settings)
        for alpha in settings.alphas
    ]


@pytest.mark.parametrize(
    "mode, layers, expected",
    [
        ("joint", ["all"], [(0, 1, 2, 3)]),
        ("joint", ["0", "-1"], [(0, 3)]),
        ("each", ["1-2"], [(1,), (2,)]),
        ("from", ["1", "3"], [(1, 2, 3), (3,)]),
    ],
)
def test_layers_that_are_steered_together(states, mode, layers, expected):
    found = grid(states, ("mean",), tuple(layers), (0.1,), layer_mode=mode)
    assert [item.layers for item in found] == expected
    assert [tuple(item.vectors) for item in found] == expected


def test_the_grid_is_methods_modes_layers_and_strengths(states):
    found = grid(
        states,
        ("mean", "gradient"),
        ("1", "2"),
        (0.1, 0.2),
        modes=("pos", "both"),
        layer_mode="each",
    )
    assert len(set(found)) == len(found) == (2 + 1) * 2 * 2
    files = states[1]
    norms = files["pos"].norms()
    for item in found:
        (layer,) = item.layers
        assert item.vectors[layer].norm().item() == pytest.approx(
            item.alpha * norms[layer].item(), rel=1e-5
        )
