"""Files of hidden states that are not as stage 1 writes them are refused, in words that name the
file and what is wrong with it."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from grains.errors import UserError
from grains.runs import read_json, write_tensors
from grains.states import StatesFile
from grains.steering import Gate, SteeringVectors
from grains.vectors import make, pca_vector

N, L, D = 4, 3, 6
RESPONSES = ("hidden_pos_response", "hidden_neg_response")
ARRAYS = (*RESPONSES, *(f"{name}_ablated" for name in RESPONSES), "gradients")
INFO = {
    "stage": "token_ablation",
    "top": "pos",
    "seed": 0,
    "model": {"model": "tiny", "num_layers": L, "hidden_size": D, "dtype": "float32"},
    "data": {"fingerprint": "f", "questions": list("abcd")},
    "settings": {},
}


def arrays() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(N, L + 1, D, generator=generator) for name in ARRAYS}
    return made | {"norms": torch.rand(N, L + 1, generator=generator) + 1}


def opened(path, tensors=None, info=None, top=None):
    write_tensors(path, tensors or arrays(), INFO if info is None else info)
    return StatesFile(path, top)


def test_a_whole_file_is_read(tmp_path):
    states = opened(tmp_path / "s.safetensors", top="pos")
    assert (states.count, states.layers) == (N, L)


def test_the_selection_that_a_header_names_must_be_the_one_expected(tmp_path):
    path = tmp_path / "neg.safetensors"
    with pytest.raises(UserError, match="holds the 'neg' hidden states, expected the 'pos' ones"):
        opened(path, info=INFO | {"top": "neg"}, top="pos")
    assert StatesFile(path, "neg").info["top"] == "neg"


def without(*keys):
    info = deepcopy(INFO)
    place = info
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return info


@pytest.mark.parametrize(
    "name",
    [
        "top",
        "seed",
        "settings",
        "model",
        "model.num_layers",
        "model.hidden_size",
        "data",
        "data.questions",
        "data.fingerprint",
    ],
)
def test_a_header_that_lacks_something(tmp_path, name):
    with pytest.raises(UserError, match=f"its header lacks {name}"):
        opened(tmp_path / "s.safetensors", info=without(*name.split(".")))
    *parents, last = name.split(".")
    info = deepcopy(INFO)
    (info[parents[0]] if parents else info)[last] = None
    with pytest.raises(UserError, match=f"its header lacks {name}"):
        opened(tmp_path / "s.safetensors", info=info)


def changed(**changes):
    return arrays() | changes


CASES = {
    "fewer layers": ({name: array[:, :-1] for name, array in arrays().items()}, r"\[4, 3, 6\]"),
    "more layers": (
        {name: torch.cat([array, array[:, :1]], 1) for name, array in arrays().items()},
        r"\[4, 5, 6\], where its header says F32 \[4, 4, 6\]",
    ),
    "another size": (changed(gradients=torch.zeros(N, L + 1, D + 1)), r"gradients is F32 .*, 7\]"),
    "fewer examples": (changed(norms=torch.ones(N - 1, L + 1)), r"norms is F32 \[3, 4\]"),
    "unequal lengths": (
        changed(hidden_neg_response_ablated=torch.zeros(N + 2, L + 1, D)),
        r"hidden_neg_response_ablated is F32 \[6, 4, 6\]",
    ),
    "bfloat16": (
        {name: array.bfloat16() for name, array in arrays().items()},
        "is BF16 .*where its header says F32",
    ),
    "integers": (changed(gradients=torch.zeros(N, L + 1, D, dtype=torch.long)), "gradients is I64"),
    **{
        f"no {name}": ({k: v for k, v in arrays().items() if k != name}, f"{name} is missing")
        for name in (*ARRAYS, "norms")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_arrays_that_are_not_those_of_the_header(tmp_path, case):
    tensors, message = CASES[case]
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path / "s.safetensors", tensors)
    assert "s.safetensors" in str(error.value) and "make it again" in str(error.value)


def test_no_examples(tmp_path):
    info = INFO | {"data": INFO["data"] | {"questions": []}}
    with pytest.raises(UserError, match="says 0 examples"):
        opened(tmp_path / "s", {name: array[:0] for name, array in arrays().items()}, info)


NO_OBJECTS = {
    "{": "cannot be read",
    "none": "cannot be read",
    "[]": "expected a JSON object, found []",
    "5": "expected a JSON object, found 5",
    "null": "expected a JSON object, found None",
    '"x"': "expected a JSON object, found x",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("text", NO_OBJECTS, ids=lambda text: text[:6])
@pytest.mark.parametrize("kind", ["states", "vectors", "manifest"])
def test_what_is_no_json_object(tmp_path, kind, text):
    path = tmp_path / "x"
    if kind == "manifest":
        path.write_text(text)
        reads = read_json
    else:
        save_file(arrays(), path, {"grains": text})
        reads = StatesFile if kind == "states" else SteeringVectors.load
    with pytest.raises(UserError) as error:
        reads(path)
    message = str(error.value)
    assert NO_OBJECTS[text] in message and str(path) in message and len(message) < 400


@pytest.mark.parametrize("method, mode", [("pca", "pos"), ("mean", "both"), ("repe", "")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite(tmp_path, method, mode, value):
    """A principal component of them, too, is refused before the library that computes it ends."""
    broken = arrays()
    broken["hidden_pos_response"][2, 2, 3] = value
    states = {top: opened(tmp_path / top, broken, INFO | {"top": top}) for top in ("pos", "neg")}
    with pytest.raises(UserError, match=r"hidden_pos_response, layer 1\) hold NaN or infinite"):
        make(states, method, mode, 0)


@pytest.mark.parametrize("count", [3, 50])
def test_rows_that_are_all_the_same_have_no_principal_component(count):
    row = np.linspace(-1, 2, 8)
    with pytest.raises(UserError, match="no principal component"):
        pca_vector([np.tile(row, (count, 1))])
    with pytest.raises(UserError, match="no principal component"):
        pca_vector([np.zeros((count, 8))])
    apart = np.tile(row, (count, 1))
    apart[0, 5] += 1e-4
    assert np.abs(pca_vector([apart])) == pytest.approx(np.eye(8)[5], abs=1e-6)


def test_gates_and_types_of_vectors(tmp_path):
    vectors, norms = torch.ones(L, D), torch.ones(L)
    with pytest.raises(UserError, match=r"vectors are torch\.int64"):
        SteeringVectors(vectors.long(), norms, {})
    with pytest.raises(UserError, match=r"expected a gate's weights \(3, 6\)"):
        SteeringVectors(vectors, norms, {}, Gate(vectors[:2], norms[:2]))
    gate = Gate(vectors.clone(), norms.clone())
    gate.weights[1] = gate.biases[1] = torch.nan  # a layer without a gate
    gated = SteeringVectors(vectors, norms, {}, gate)
    assert list(gated.scaled(0.1, [0, 2])) == [0, 2]
    with pytest.raises(UserError, match="a gate of these layers is NaN"):
        gated.scaled(0.1, [0, 1])


def test_info_that_json_can_hold_reads_back(tmp_path):
    info = INFO | {"note": "ü \u2028 \x00"}
    assert opened(tmp_path / "s", info=info).info == json.loads(json.dumps(info))
