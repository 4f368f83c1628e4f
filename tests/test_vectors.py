"""Steering vectors: their definitions, their files, and what applying them does to a model."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.reference import layer_outputs, no_hooks, own_logits, relative, words

from grains import states as states_module
from grains.errors import UserError
from grains.runs import write_tensors
from grains.settings import MODES, STUDY_GRID
from grains.states import StatesFile
from grains.steering import SteeringVectors, parse_layers, steer, steered
from grains.vectors import make, mean_vector, pca_vector, random_rotation

W = words(40, seed=4)
N, L, D = 5, 4, 48
RESPONSES = ("hidden_pos_response", "hidden_neg_response")
INFO = {
    "stage": "token_ablation",
    "top": "pos",
    "seed": 0,
    "data": {"fingerprint": "f", "questions": [f"q{index}" for index in range(N)]},
    "settings": {},
    "model": {"model": "tiny-llama", "num_layers": L, "hidden_size": D, "dtype": "float32"},
}


def states(seed):
    """What stage 1 writes for N examples: (N, L+1, D) arrays and (N, L+1) norms."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, L + 1, D)
    plain = {name: torch.randn(shape, generator=generator) for name in RESPONSES}
    ablated = {
        f"{name}_ablated": plain[name] - torch.randn(shape, generator=generator) - 0.3
        for name in RESPONSES
    }
    return (
        plain
        | ablated
        | {
            "norms": torch.rand(N, L + 1, generator=generator) * 10 + 1,
            "gradients": torch.randn(shape, generator=generator),
        }
    )


@pytest.fixture
def files(tmp_path):
    """The states of each ablation, as tensors and as files of stage 1."""
    tensors, opened = {}, {}
    for seed, top in enumerate(("pos", "neg", "rand")):
        tensors[top] = states(seed)
        path = tmp_path / f"{top}.safetensors"
        write_tensors(path, tensors[top], INFO | {"top": top})
        opened[top] = StatesFile(path)
    return tensors, opened


def shifts(tensors, layer):
    """(2N, D) h(plain) - h(ablated) of both responses, after a layer."""
    return (
        torch.cat(
            [
                tensors[name][:, layer + 1] - tensors[f"{name}_ablated"][:, layer + 1]
                for name in RESPONSES
            ]
        )
        .double()
        .numpy()
    )


def first_component(rows):
    """By numpy's SVD, oriented along the mean."""
    component = np.linalg.svd(rows - rows.mean(0))[2][0]
    return component * np.sign(component @ rows.mean(0))


def test_mean_and_pca_of_the_pos_ablation(files):
    tensors, opened = files
    for method, reduce in [("mean", lambda rows: rows.mean(0)), ("pca", first_component)]:
        made = make(opened, method, "pos", 0)
        assert made.vectors.shape == (L, D)
        for layer in range(L):
            assert relative(made.vectors[layer], reduce(shifts(tensors["pos"], layer))) <= 1e-5


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_both_is_pos_minus_neg(files, method):
    _, opened = files
    pos, neg = (make({"pos": opened[top]}, method, "pos", 0).vectors for top in ("pos", "neg"))
    both = make(opened, method, "both", 0)
    assert relative(both.vectors, pos - neg) <= 1e-5
    assert both.info["mode"] == "both" and both.info["method"] == method


def test_gradient_caa_and_random(files):
    tensors, opened = files
    of = tensors["pos"]
    gradient = make(opened, "gradient", "", 0).vectors
    assert relative(gradient, of["gradients"][:, 1:].mean(0)) <= 1e-5
    caa = make(opened, "caa", "", 0).vectors
    expected = (of["hidden_pos_response"] - of["hidden_neg_response"])[:, 1:].mean(0)
    assert relative(caa, expected) <= 1e-5
    rand_tokens = make(opened, "rand_tokens", "", 0).vectors
    for layer in range(L):
        assert relative(rand_tokens[layer], shifts(tensors["rand"], layer).mean(0)) <= 1e-5
    repe = make(opened, "repe", "", 0).vectors
    for layer in range(L):
        rows = (of["hidden_pos_response"] - of["hidden_neg_response"])[:, layer + 1]
        assert relative(repe[layer], first_component(rows.double().numpy())) <= 1e-5
    one, same, other = (make(opened, "random", "", seed).vectors for seed in (1, 1, 2))
    assert torch.equal(one, same) and relative(one, other) > 0.5
    directions = torch.nn.functional.normalize(one, dim=-1)
    assert (directions @ directions.T - torch.eye(L)).abs().max() < 0.6


def test_icv_is_the_first_direction_of_all_layers_joined(files):
    tensors, opened = files
    of = tensors["pos"]
    rows = (of["hidden_pos_response"] - of["hidden_neg_response"])[:, 1:].double().flatten(1)
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    direction *= torch.sign(direction @ rows.mean(0))
    icv = make(opened, "icv", "", 0).vectors
    assert relative(icv, direction.view(L, D)) <= 1e-5
    assert icv.norm().item() == pytest.approx(1, abs=1e-5)  # over all layers, not for each
    assert relative(icv, make(opened, "repe", "", 0).vectors) > 0.1
    assert torch.equal(icv, make(opened, "icv", "", 1).vectors)


def cosines(vectors):
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return unit @ unit.T


def test_rotated_keeps_lengths_and_angles_between_layers(files):
    _, opened = files
    gradient = make(opened, "gradient", "", 0).vectors
    first, same, second = (make(opened, "rotated", "", seed).vectors for seed in (1, 1, 2))
    assert torch.equal(first, same) and relative(first, second) > 0.5
    for rotated in (first, second):
        assert relative(rotated.norm(dim=-1), gradient.norm(dim=-1)) <= 1e-6
        assert (cosines(rotated) - cosines(gradient)).abs().max() <= 1e-6
        assert torch.cosine_similarity(rotated, gradient, dim=-1).abs().max() < 0.9


def test_a_rotation_is_no_reflection_and_has_no_preferred_direction():
    rotations = [random_rotation(5, seed) for seed in range(400)]
    for rotation in rotations[:20]:
        assert np.abs(rotation @ rotation.T - np.eye(5)).max() <= 1e-12
        assert np.linalg.det(rotation) == pytest.approx(1)
    # Uniform over rotations: every entry has mean 0 and mean square 1/5.
    mean, square = np.mean(rotations, axis=0), np.mean(np.square(rotations), axis=0)
    assert np.abs(mean).max() < 0.1 and np.abs(square - 0.2).max() < 0.06


def test_shared_random_is_one_direction_at_all_layers(files):
    _, opened = files
    first, same, second = (make(opened, "shared_random", "", seed).vectors for seed in (1, 1, 2))
    assert torch.equal(first, same) and relative(first, second) > 0.5
    assert torch.equal(first, first[:1].expand(L, D))


def test_shuffled_swaps_the_answers_of_whole_examples(files):
    """One sign an example, the same at every layer, and not the same for all examples."""
    tensors, opened = files
    gradients = tensors["pos"]["gradients"][:, 1:].double()
    found = [make(opened, "shuffled", "", seed).vectors.double() for seed in range(5)]
    for vectors_of_seed in found:
        matches = [
            signs
            for signs in itertools.product([-1.0, 1.0], repeat=N)
            if relative(
                vectors_of_seed, (torch.tensor(signs).double()[:, None, None] * gradients).mean(0)
            )
            <= 1e-5
        ]
        assert len(matches) == 1
    assert any(
        relative(a, b) > 0.1 and relative(a, -b) > 0.1 for a, b in itertools.combinations(found, 2)
    )


def test_norms_are_medians_over_examples(files):
    tensors, opened = files
    expected = np.median(tensors["pos"]["norms"].numpy()[:, 1:], axis=0)
    for method, mode in itertools.product(STUDY_GRID.methods, MODES):
        made = make(opened, method, mode, 0)
        assert relative(made.norms, expected) <= 1e-6


def test_a_principal_component_points_along_the_mean_shift():
    generator = np.random.default_rng(0)
    for _ in range(20):
        direction = generator.normal(size=16)
        direction /= np.linalg.norm(direction)
        spread = generator.normal(size=(30, 1)) * 5 + generator.choice([-3, 3])
        rows = spread * direction + generator.normal(size=(30, 16))
        found = pca_vector([rows])
        assert np.linalg.norm(found) == pytest.approx(1)
        assert found @ rows.mean(0) > 0
        assert found == pytest.approx(first_component(rows), abs=1e-8)
        assert pca_vector([-rows]) == pytest.approx(-found, abs=1e-8)


@pytest.mark.parametrize("count", [5, 15, 16, 17, 400])
@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_rows_that_come_in_parts_reduce_as_all_at_once(count, at_a_time):
    """More rows than dimensions take another way than fewer; a large mean must not blur it."""
    generator = np.random.default_rng(count)
    rows = 100 + generator.normal(size=(count, 16)) * np.linspace(1, 3, 16)
    parts = [rows[start : start + at_a_time] for start in range(0, count, at_a_time)]
    assert mean_vector(parts) == pytest.approx(rows.mean(0), rel=1e-12)
    assert pca_vector(parts) == pytest.approx(first_component(rows), abs=1e-8)
    first = np.linalg.svd(rows)[2][0]  # not centred: near the mean, which is large
    as_they_are = pca_vector(parts, around_mean=False)
    assert as_they_are == pytest.approx(first * np.sign(first @ rows.mean(0)), abs=1e-8)
    assert not pca_vector([0 * part for part in parts], around_mean=False).any()


def test_a_file_read_in_parts_gives_the_same_vectors(files, monkeypatch):
    whole = {method: make(files[1], method, "both", 0).vectors for method in STUDY_GRID.methods}
    monkeypatch.setattr(states_module, "EXAMPLES_AT_A_TIME", 2)
    for method in STUDY_GRID.methods:
        assert relative(make(files[1], method, "both", 0).vectors, whole[method]) <= 1e-6


def test_a_principal_component_needs_two_shifts():
    with pytest.raises(UserError, match="at least two"):
        pca_vector([np.ones((1, 4))])


def test_not_a_number_is_refused(tmp_path):
    tensors = states(0)
    tensors["gradients"][2, 1, 3] = float("nan")
    write_tensors(tmp_path / "x.safetensors", tensors, INFO)
    with pytest.raises(UserError, match="NaN"):
        make({"pos": StatesFile(tmp_path / "x.safetensors")}, "gradient", "", 0)


def test_save_and_load(files, tmp_path):
    made = make(files[1], "mean", "pos", 0)
    made.save(tmp_path / "vectors.safetensors")
    loaded = SteeringVectors.load(tmp_path / "vectors.safetensors")
    assert torch.equal(loaded.vectors, made.vectors) and torch.equal(loaded.norms, made.norms)
    assert loaded.info == made.info
    assert loaded.info["stage"] == "steering_vectors" and loaded.info["top"] == "pos"


def test_other_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="no steering vectors"):
        SteeringVectors.load(files[1]["pos"].path)
    make(files[1], "mean", "pos", 0).save(tmp_path / "vectors.safetensors")
    with pytest.raises(UserError, match="no hidden states"):
        StatesFile(tmp_path / "vectors.safetensors")


def test_states_of_another_model_are_refused(files, make_tiny, tmp_path):
    lm = make_tiny("llama")
    with pytest.raises(UserError, match="another model"):
        files[1]["pos"].check_model(make_tiny("qwen2", num_hidden_layers=3))
    info = INFO | {"model": lm.identity() | {"dtype": "float32"}}
    write_tensors(tmp_path / "same.safetensors", states(0), info)
    StatesFile(tmp_path / "same.safetensors").check_model(lm)
    write_tensors(
        tmp_path / "moved.safetensors",
        states(0),
        info | {"model": info["model"] | {"weights": "0"}},
    )
    with pytest.raises(UserError, match="another model"):
        StatesFile(tmp_path / "moved.safetensors").check_model(lm)


def test_scaled(files):
    made = make(files[1], "mean", "pos", 0)
    relative_units = made.scaled(0.3, (layer for layer in (2, -4)))
    assert list(relative_units) == [0, 2]
    for layer, vector in relative_units.items():
        assert vector.norm().item() == pytest.approx(0.3 * made.norms[layer].item(), rel=1e-5)
        cosine = torch.cosine_similarity(vector, made.vectors[layer], dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(made.scaled(-4.0, [1], "absolute")[1], -4.0 * made.vectors[1])


@pytest.mark.parametrize("layer", [-5, 4, 100])
def test_a_layer_that_does_not_exist_is_refused(files, make_tiny, layer):
    made, lm = make(files[1], "mean", "pos", 0), make_tiny("llama")
    with pytest.raises(UserError, match="decoder layers 0 to 3"):
        made.scaled(1.0, [0, layer])
    with (
        pytest.raises(UserError, match="does not exist"),
        steered(lm, {0: torch.ones(D), layer: torch.ones(D)}),
    ):
        pass
    assert no_hooks(lm)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_vectors_of_another_shape_are_refused(files, make_tiny, changes):
    made = make(files[1], "mean", "pos", 0)
    with pytest.raises(UserError, match="these vectors are for 4 layers of size 48"):
        made.apply(make_tiny("llama", **changes), 1.0, [0])


# -- steering --


def test_steer_by_hand():
    states = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[1.0, 0.0], [-5.0, 12.0]]])
    found = steer(states, torch.tensor([1.0, -4.0]))
    expected = [
        [[5.0, 0.0], [2 / 5**0.5, -4 / 5**0.5]],
        [[2 / 20**0.5, -4 / 20**0.5], [-4 * 13 / 80**0.5, 8 * 13 / 80**0.5]],
    ]
    assert relative(found, torch.tensor(expected)) <= 1e-6


def batch(rows=3, length=9):
    return torch.tensor([W[row : row + length] for row in range(rows)])


@pytest.mark.parametrize("layers", [(0,), (3,), (0, 1, 2, 3)])
def test_every_row_and_position_moves_and_keeps_its_norm(tiny, layers):
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(D, generator=generator) for layer in layers}
    first = min(layers)
    with torch.no_grad(), layer_outputs(tiny) as plain:
        tiny.model(batch(), use_cache=False)
    with torch.no_grad(), steered(tiny, vectors), layer_outputs(tiny) as changed:
        tiny.model(batch(), use_cache=False)
    before, after = plain[first + 1], changed[first + 1]
    assert before.shape == (3, 9, D)
    distance = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert distance.min() > 1e-2
    norms = before.norm(dim=-1)
    assert ((after.norm(dim=-1) - norms).abs() / norms).max() <= 1e-4
    # the direction is that of h + v, at every row and position
    cosine = torch.cosine_similarity(after, before + vectors[first], dim=-1)
    assert (cosine - 1).abs().max() <= 1e-5


def test_every_layer_is_steered_on_what_it_gives_in_the_steered_model(tiny):
    """h' = (h + v) ||h|| / ||h + v|| at each of several layers, computed layer by layer."""
    generator = torch.Generator().manual_seed(1)
    vectors = {layer: torch.randn(D, generator=generator) for layer in (1, 3)}
    outputs = []
    handle = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in tiny.layers
    ]  # before the steering hooks: raw outputs
    try:
        with torch.no_grad(), steered(tiny, vectors), layer_outputs(tiny) as changed:
            tiny.model(batch(), use_cache=False)
    finally:
        for hook in handle:
            hook.remove()
    for layer, (raw, after) in enumerate(zip(outputs, changed[1:], strict=True)):
        if layer in vectors:
            moved = raw + vectors[layer]
            raw = moved * raw.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        assert relative(after, raw) <= 1e-6


def test_strength_zero_and_a_removed_hook_leave_logits_bit_identical(tiny, files):
    made = make(files[1], "mean", "pos", 0)
    every = [0, 1, 2, 3]
    plain = own_logits(tiny, W[:12])
    for units in ("relative", "absolute"):
        with made.apply(tiny, 0.0, every, units):
            assert torch.equal(own_logits(tiny, W[:12]), plain)
        with made.apply(tiny, 0.5, every, units):
            assert not torch.allclose(own_logits(tiny, W[:12]), plain, atol=1e-2)
        assert torch.equal(own_logits(tiny, W[:12]), plain)
    assert no_hooks(tiny)


def test_a_state_of_zeros_stays_one():
    """As padding's may be: nothing turns into NaN."""
    states = torch.zeros(1, 2, 4)
    assert torch.equal(steer(states, torch.zeros(4)), states)
    assert torch.equal(steer(states, torch.ones(4)), states)


def test_an_exception_in_the_block_removes_the_hooks(family):
    plain = own_logits(family, W[:8])
    with pytest.raises(RuntimeError, match="inside"), steered(family, {1: torch.ones(D)}):
        raise RuntimeError("inside")
    assert no_hooks(family)
    assert torch.equal(own_logits(family, W[:8]), plain)


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_block_steers_its_own_thread_alone(family):
    """Two threads that steer do not add up, and a third one's plain forward stays plain."""

    def logits():
        return own_logits(family, W[:8])

    def steered_logits(vector):
        with steered(family, {1: vector}):
            return logits()

    first, second = torch.ones(D), -torch.ones(D)
    plain, one, two = logits(), steered_logits(first), steered_logits(second)
    assert not torch.equal(one, plain) and not torch.equal(one, two)
    with steered(family, {1: first}):
        assert torch.equal(logits(), one)
        assert torch.equal(in_a_thread(logits), plain)
        assert torch.equal(in_a_thread(lambda: steered_logits(second)), two)
        assert torch.equal(logits(), one)


def test_a_block_in_which_only_other_threads_compute_is_an_error(family):
    with pytest.raises(UserError, match="nothing was steered"), steered(family, {1: torch.ones(D)}):
        in_a_thread(lambda: own_logits(family, W[:8]))
    with pytest.raises(RuntimeError, match="inside"), steered(family, {1: torch.ones(D)}):
        in_a_thread(lambda: own_logits(family, W[:8]))
        raise RuntimeError("inside")
    assert no_hooks(family)


def test_a_thread_of_autograd_steers_as_the_block_that_began_it(family):
    """On a GPU, checkpointed layers are computed again in a thread that Python did not begin."""
    import _thread

    found, done = [], threading.Event()

    def outside():
        found.append(own_logits(family, W[:8]))
        done.set()

    with steered(family, {1: torch.ones(D)}):
        own = own_logits(family, W[:8])
        _thread.start_new_thread(outside, ())
        assert done.wait(60)
    assert torch.equal(found[0], own)


def test_weights_do_not_change(family):
    before = {name: weight.clone() for name, weight in family.model.state_dict().items()}
    with steered(family, {layer: torch.ones(D) for layer in range(4)}):
        own_logits(family, W[:8])
    assert all(
        torch.equal(before[name], weight) for name, weight in family.model.state_dict().items()
    )


def test_smollm2(smollm2):
    """Bit-identical at strength zero and after the block; every norm kept in it."""
    generator = torch.Generator().manual_seed(0)
    ids = smollm2.tokenizer("Why is the sky blue? Because").input_ids
    made = SteeringVectors(torch.randn(30, 576, generator=generator), torch.full((30,), 20.0), {})
    with layer_outputs(smollm2) as outputs:
        plain = own_logits(smollm2, ids)
    with made.apply(smollm2, 0.0, list(range(30))):
        assert torch.equal(own_logits(smollm2, ids), plain)
    with made.apply(smollm2, 0.3, [14]), layer_outputs(smollm2) as changed:
        assert not torch.allclose(own_logits(smollm2, ids), plain, atol=0.1)
    norms, kept = outputs[15].norm(dim=-1), changed[15].norm(dim=-1)
    assert ((kept - norms).abs() / norms).max() <= 1e-4
    assert ((changed[15] - outputs[15]).norm(dim=-1) / norms).min() > 1e-4
    assert torch.equal(own_logits(smollm2, ids), plain)


@pytest.mark.parametrize(
    "layers, expected",
    [
        (None, [0, 1, 2, 3]),
        (["all"], [0, 1, 2, 3]),
        (["1-2", -1], [1, 2, 3]),
        ((layer for layer in (3, 0)), [0, 3]),
        (range(1, 3), [1, 2]),
        ("2-3", [2, 3]),
    ],
)
def test_layers_as_a_user_gives_them(layers, expected):
    assert parse_layers(layers, 4) == expected


@pytest.mark.parametrize(
    "layers, message",
    [
        ([1.5], "whole numbers"),
        ([True], "whole numbers"),
        (["first"], "whole numbers"),
        (["3-1"], "runs backwards"),
        (["0-99999999999"], "does not exist"),
        (["0-" + "1" * 5000], "whole numbers"),
        (["1" * 5000], "whole numbers"),
        (iter(()), "no layers are given"),
    ],
)
def test_what_is_no_layer_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        parse_layers(layers, 4)


@pytest.mark.parametrize(
    "alpha, units, message",
    [
        (float("nan"), "relative", "finite number"),
        (float("inf"), "absolute", "finite number"),
        (1e20, "relative", "leaves nothing of them"),
        (3e38, "absolute", "leaves nothing of them"),
        (0.1, "relativ", "unknown units"),
    ],
)
def test_a_strength_that_would_erase_the_states_is_refused(files, alpha, units, message):
    made = make(files[1], "mean", "pos", 0)
    with pytest.raises(ValueError, match=message):
        made.scaled(alpha, None, units)


@pytest.mark.parametrize("broken", ["vectors", "norms"])
def test_vectors_that_are_no_numbers_are_refused(files, broken):
    made = make(files[1], "mean", "pos", 0)
    values = {"vectors": made.vectors.clone(), "norms": made.norms.clone()}
    values[broken][1] = torch.nan
    with pytest.raises(ValueError, match=f"the {broken} hold NaN"):
        SteeringVectors(**values, info={})


def test_vectors_of_another_model_are_refused(files, make_tiny):
    made = make(files[1], "mean", "pos", 0)
    lm, other = make_tiny("llama"), make_tiny("llama", seed=1, weights=0.5)
    own = SteeringVectors(made.vectors, made.norms, {"model": lm.identity()})
    with own.apply(lm, 0.1):
        pass
    with pytest.raises(ValueError, match="of another model"):
        own.apply(other, 0.1)


def test_blocks_take_a_models_identity_once(files, make_tiny, monkeypatch):
    made, lm = make(files[1], "mean", "pos", 0), make_tiny("llama", seed=2)
    own = SteeringVectors(made.vectors, made.norms, {"model": lm.identity()})
    taken, identity = [], type(lm).identity
    monkeypatch.setattr(type(lm), "identity", lambda model: (taken.append(1), identity(model))[1])
    for _ in range(3):
        own.apply(lm, 0.1)
    assert len(taken) == 1
