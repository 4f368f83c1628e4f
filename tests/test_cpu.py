"""Products by oneDNN are the products: values and gradients against float64, and only in fp32."""

import copy
import ctypes
import platform

import pytest
import torch
from helpers.families import tiny_model
from helpers.reference import embeds, encoded, example, log_likelihood, relative, words
from torch import nn

from grains import cpu, models, prompts
from grains.attribution import PromptFunction
from grains.cpu import OneDnnLinear, is_faster, use_onednn
from grains.scoring import score
from grains.study import lora

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)
W = words(40)


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr("grains.cpu.is_faster", lambda: True)


@pytest.fixture
def both(tokenizer, faster, monkeypatch):
    """The same tiny model twice, multiplied by torch and by oneDNN, in its narrow layers too."""
    monkeypatch.setattr("grains.cpu.FEWEST_INPUTS", 0)
    model = tiny_model("qwen2")  # its query, key and value layers have a bias
    one, two = (models.wrap("tiny", copy.deepcopy(model), tokenizer) for _ in range(2))
    use_onednn(two.model)
    assert not any(isinstance(module, OneDnnLinear) for module in one.model.modules())
    assert {type(module) for module in two.model.modules() if isinstance(module, nn.Linear)} == {
        OneDnnLinear
    }
    return one, two


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (3, 1, 96), (2, 5, 96), (2, 0, 96)])
def test_values_and_gradients_are_those_of_float64(faster, shape, bias):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 64, bias=bias)).requires_grad_(False)
    exact = copy.deepcopy(module).double()
    use_onednn(module)
    states = torch.randn(shape, requires_grad=True)
    doubled = states.detach().double().requires_grad_()
    found, expected = module(states), exact(doubled)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    assert found.shape == expected.shape
    if states.numel():  # in bfloat16 or TF32 they would differ by 1e-3
        assert relative(found.detach(), expected.detach()) <= 1e-6
        assert relative(states.grad, doubled.grad) <= 1e-6


def test_states_that_lie_apart_in_memory(faster):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(96, 64)).requires_grad_(False)
    exact = copy.deepcopy(module).double()
    use_onednn(module)
    for states in (
        torch.randn(96, 7).t(),
        torch.randn(4, 9, 96)[:, 2:5],
        torch.randn(5, 192)[:, ::2],
    ):
        assert relative(module(states), exact(states.double())) <= 1e-6


def test_weights_that_are_trained_have_gradients(faster):
    module = nn.Sequential(nn.Linear(96, 64))
    use_onednn(module)
    module(torch.ones(2, 96)).sum().backward()
    assert torch.equal(module[0].weight.grad, torch.full((64, 96), 2.0))


def test_a_bias_that_is_trained_alone_has_gradients(faster):
    module = nn.Sequential(nn.Linear(96, 64))
    module[0].weight.requires_grad_(False)
    use_onednn(module)
    module(torch.ones(2, 96)).sum().backward()
    assert torch.equal(module[0].bias.grad, torch.full((64,), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_multiplied_by_torch(faster, dtype):
    plain = nn.Linear(96, 64, dtype=dtype).requires_grad_(False)
    module = copy.deepcopy(nn.Sequential(plain))
    use_onednn(module)
    states = torch.randn(3, 96, dtype=dtype)
    assert torch.equal(module(states), plain(states))


def test_a_second_derivative_is_refused(faster):
    module = nn.Sequential(nn.Linear(96, 64)).requires_grad_(False)
    use_onednn(module)
    states = torch.ones(2, 96, requires_grad=True)
    (grad,) = torch.autograd.grad(module(states).sin().sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "capability, vendor, expected",
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
    ],
)
def test_it_is_for_amds_avx512(monkeypatch, capability, vendor, expected):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("grains.cpu.Path.read_text", lambda path: f"vendor_id : {vendor}\n")
    monkeypatch.setattr("grains.cpu.platform.system", lambda: "Linux")
    module = nn.Sequential(nn.Linear(96, 64))
    use_onednn(module)
    assert is_faster() == expected
    assert type(module[0]) is (OneDnnLinear if expected else nn.Linear)


def test_layers_of_few_inputs_are_multiplied_by_torch(faster):
    module = nn.Sequential(*(nn.Linear(inputs, 64) for inputs in (32, 63, 64)))
    use_onednn(module)
    assert [*map(type, module)] == [nn.Linear, nn.Linear, OneDnnLinear]


class Account(ctypes.Structure):
    """glibc's own account of its memory."""

    _fields_ = [
        (field, ctypes.c_size_t)
        for field in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="another C library, or a glibc before 2.33",
)
def test_memory_that_is_freed_is_kept_or_returned():
    """How many blocks are mapped by themselves, which go back to the system when they are freed,
    with a tensor of 1,000 MiB and after it: larger than any hole that other tests left, and never
    written. (How many pages the system gave is no measure: some sandboxes count none.)"""
    glibc = ctypes.CDLL("libc.so.6")
    glibc.mallinfo2.restype = Account
    if not glibc.mallopt(cpu.M_MMAP_THRESHOLD, 2**30):
        pytest.skip("this glibc maps every such block by itself")
    found = []
    try:
        for setting in (cpu.return_freed_memory, cpu.keep_freed_memory):
            setting()
            before = glibc.mallinfo2().hblks
            block = torch.empty(250 * 2**20)
            held = glibc.mallinfo2().hblks
            del block
            found.append((held - before, glibc.mallinfo2().hblks - before))
    finally:
        cpu.keep_freed_memory()  # as conftest does
    assert found == [(1, 0), (0, 0)]


def test_attribution_and_scores_are_the_models_own(both):
    one, two = both
    prompt, responses = W[:9], [W[10:14], W[20:23]]
    item = encoded(one, prompt, responses)
    (plain,), (found,) = (score(lm, [item], [], 64) for lm in both)
    assert relative(found, plain) <= 1e-5
    states = embeds(one, prompt).requires_grad_()
    chosen, rejected = (log_likelihood(one, states, response) for response in responses)
    (chosen - rejected).backward()
    function = PromptFunction(two, item, [1.0, -1.0], 64)
    values, grads = function.values_and_grads(states.detach()[None])
    assert relative(values, plain[0, :1] - plain[0, 1:]) <= 1e-4
    assert relative(grads[0], states.grad) <= 1e-4


def test_lora_trains_around_them(both, tokenizer):
    one, two = both
    pairs = [prompts.encode(one, example("What is it?", "a true thing", "a false one"), "qa")]
    plain, found = (lora.train(lm, pairs, seed=1) for lm in both)
    assert plain.keys() == found.keys()
    for name, tensor in plain.items():
        assert relative(found[name], tensor) <= 1e-3, name
    assert {type(module) for module in two.layers.modules() if isinstance(module, nn.Linear)} == {
        OneDnnLinear
    }


def test_a_model_that_is_loaded_has_them_where_they_are_faster(smollm2):
    kinds = {type(module) for module in smollm2.model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {OneDnnLinear if is_faster() else nn.Linear}
