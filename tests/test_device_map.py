"""A model that accelerate has split gives the numbers of the same model in one piece: with layers
put off to the disk, and over two devices that refuse each other's tensors."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers import tiny
from helpers.reference import relative
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grains import models, prompts
from grains.ablation import hidden_states
from grains.attribution import attribute
from grains.data import Example
from grains.generation import generate
from grains.scoring import score
from grains.settings import AttributionSettings
from grains.steering import Configuration

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line",)

LAYERS, TOKENS = 4, 512
QUESTIONS = [
    Example(str(i), question, (true, false), 0)
    for i, (question, true, false) in enumerate(tiny.QUESTIONS[:2])
]


SETTINGS = [
    AttributionSettings(max_points=11),
    AttributionSettings(objective="normal", ig_steps=2, baseline="pad"),
    AttributionSettings(grad_method="smoothgrad", baseline="zeros", smooth_samples=2),
]


def grid(lm: models.LanguageModel) -> list[Configuration]:
    """Steered from a layer of each half on, at the last layer alone, at all."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LAYERS, lm.hidden_size, generator=generator)
    return [
        Configuration("some", "", layers, 1.0, {layer: vectors[layer] for layer in layers})
        for layers in [(1,), (2,), (3,), (0, 1, 2, 3)]
    ]


def encode_all(lm: models.LanguageModel) -> list:
    return [prompts.encode(lm, question, "qa") for question in QUESTIONS]


def stage_1(lm: models.LanguageModel, count: int = len(SETTINGS)) -> list[np.ndarray]:
    """Hidden states and their gradients, and what `count` of the settings attribute."""
    item = encode_all(lm)[0]
    states = hidden_states(lm, item, [[3, 4], [5]], TOKENS)
    results = [states.last, states.log_likelihoods, states.norms, states.gradients]
    for settings in SETTINGS[:count]:
        generator = torch.Generator().manual_seed(0)
        results += [found.scores for found in attribute(lm, item, settings, TOKENS, generator)]
    return [*map(np.asarray, results)]


def stage_2(lm: models.LanguageModel) -> list[np.ndarray]:
    return score(lm, encode_all(lm), grid(lm), TOKENS)


def check_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for values, right in zip(found, expected, strict=True):
        assert relative(values, right) < 1e-4


def check_all(lm: models.LanguageModel, expected: tuple) -> None:
    numbers, scores, texts = expected
    check_same(stage_1(lm), numbers)
    check_same(stage_2(lm), scores)
    assert generate(lm, encode_all(lm), grid(lm), 3) == texts


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied head"])
def folder(request, tmp_path_factory):
    return tiny.save_model(
        tmp_path_factory.mktemp("model"), layers=LAYERS, tie_word_embeddings=request.param
    )


@pytest.fixture(scope="module")
def whole(folder):
    """The model in one piece, and what the three stages compute with it."""
    lm = models.load(str(folder), dtype="float32", device="cpu")
    return lm, (stage_1(lm), stage_2(lm), generate(lm, encode_all(lm), grid(lm), 3))


# --- the disk ---


PART = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.layers.3": "cpu",
    "model.norm": "disk",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.mark.parametrize("device_map", [PART, "auto"], ids=["part", "auto"])
def test_layers_on_the_disk(folder, whole, monkeypatch, device_map):
    # "auto" goes by the memory that there is: as much as two thirds of this model.
    monkeypatch.setattr(
        "transformers.integrations.accelerate.get_max_memory",
        lambda max_memory=None: {"cpu": 150_000},
    )
    lm = models.load(str(folder), dtype="float32", device_map=device_map)
    offloaded = [parameter.is_meta for parameter in lm.model.parameters()]
    assert any(offloaded)
    forwards = [layer.forward for layer in lm.layers]
    check_all(lm, whole[1])
    # With no memory beside the logits, which only gradients ask for, the layers are computed again,
    # so fetched again.
    check_same(stage_1(dataclasses.replace(lm, memory=2**25)), whole[1][0])

    assert [parameter.is_meta for parameter in lm.model.parameters()] == offloaded
    assert [layer.forward for layer in lm.layers] == forwards
    assert all(layer.forward.func.__module__ == "accelerate.hooks" for layer in lm.layers)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )


def test_a_split_model_is_known_by_the_same_weights(folder, whole):
    split = models.load(str(folder), dtype="float32", device_map={"": "disk"})
    assert split.identity() == whole[0].identity()


@pytest.mark.parametrize("folder", [False], indirect=True, ids=["head"])
def test_device_map_of_a_script(commands, folder, tmp_path):
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.question_rows(4))
    made = []
    for name, flags in (("whole", []), ("split", ["--device_map", "auto"])):
        (tmp_path / name).mkdir()
        commands.run(
            "token_ablation.py",
            "--model_name",
            folder,
            "--dataset_name",
            "questions",
            "--dataset_path",
            questions,
            "--num_samples",
            2,
            "--ig_steps",
            3,
            "--output_path_meta",
            tmp_path / name / "tokens.csv",
            "--output_path_hidden",
            tmp_path / name / "states.safetensors",
            *flags,
        ).ok()
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1]


# --- two devices ---
#
# A machine of one device cannot show that a tensor was left on the wrong one. So here are two that
# keep their values on the CPU, but say that they are elsewhere and refuse what a GPU refuses:
# tensors of two devices in one operation. To torch they are "meta" devices, which autograd knows.


class Elsewhere(torch.Tensor):
    """A tensor on the device ipu:0 or ipu:1."""

    @staticmethod
    def __new__(cls, value: torch.Tensor, place: torch.device):
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                value.shape,
                strides=value.stride(),
                dtype=value.dtype,
                storage_offset=value.storage_offset(),
                device=torch.device("meta", place.index),
            )
        tensor.value, tensor.place = value, place
        return tensor

    device = property(lambda self: self.place)
    is_meta = False

    def untyped_storage(self):
        return self.value.untyped_storage()

    def tolist(self):
        return self.value.tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, dict(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, dict(kwargs or {}))


class Made(TorchFunctionMode):
    """torch.tensor puts its values on a device without asking dispatch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function is torch.tensor else None
        result = function(*args, **kwargs)
        return result if device is None else result.to(device)


def replaced(items, change):
    """Tensors of nested lists, tuples and dicts through a function; torch's own takes longer."""
    if isinstance(items, torch.Tensor):
        return change(items)
    if isinstance(items, (list, tuple)):
        return type(items)(replaced(item, change) for item in items)
    if isinstance(items, dict):
        return {key: replaced(item, change) for key, item in items.items()}
    return items


@cache
def is_made_of_others(operation) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        operation.name(), "CompositeImplicitAutograd"
    )


def compute(operation, args, kwargs):
    """Compute on the CPU; the result is where the arguments are, or where it is asked to be."""
    if is_made_of_others(operation):
        with Dispatched():
            return operation.decompose(*args, **kwargs)
    name = operation.overloadpacket.__name__
    tensors = []
    replaced((args, kwargs), tensors.append)
    # As on a GPU, a number may lie on the CPU, and so may an index.
    bound = [item for item in tensors if item.device.type != "cpu" or item.dim()]
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        bound = [item for item in bound if item.device.type != "cpu" or item is args[0]]
    places = list(dict.fromkeys(item.device for item in bound))
    if len(places) > 1 and name not in ("_to_copy", "copy_"):
        raise RuntimeError(f"{name}: tensors on {', '.join(map(str, places))}")
    asked = kwargs.get("device")
    if asked is None or asked == torch.device("meta"):
        place = places[0] if places else torch.device("cpu")
    else:
        place = torch.device("ipu", asked.index) if asked.type == "meta" else asked
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")

    def value(item):
        return item.value if isinstance(item, Elsewhere) else item

    result = operation(*replaced(args, value), **replaced(kwargs, value))
    if args and result is value(args[0]):  # in place
        return args[0]
    if place.type == "cpu":
        return result
    return replaced(result, lambda item: Elsewhere(item, place))


@pytest.fixture
def two_devices():
    with Made(), Dispatched():
        yield torch.device("ipu", 0), torch.device("ipu", 1)


def put(model, places: dict[str, torch.device]) -> None:
    """Put the parts of a model on devices, with the hooks that accelerate moves their inputs by."""
    for name, place in places.items():
        part = model.get_submodule(name)
        for module in part.modules():
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[key] = torch.nn.Parameter(
                        Elsewhere(tensor.detach(), place), requires_grad=False
                    )
            for key, tensor in module._buffers.items():
                module._buffers[key] = Elsewhere(tensor, place)
        add_hook_to_module(part, AlignDevicesHook(execution_device=place))
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=next(iter(places.values())), io_same_device=True)
    )


def test_the_devices_refuse_each_other(two_devices):
    first, second = (torch.arange(3.0, device=device) for device in two_devices)
    with pytest.raises(RuntimeError, match="ipu:0, ipu:1"):
        first + second
    with pytest.raises(RuntimeError, match="ipu:0, ipu:1"):
        first[torch.tensor([1], device=two_devices[1])]
    first.requires_grad_()
    total = (first.to(two_devices[1]) * second).sum()
    (gradient,) = torch.autograd.grad(total, first)
    assert total.device == two_devices[1] and gradient.device == two_devices[0]
    assert total.item() == 5 and gradient.tolist() == [0, 1, 2]


def test_two_devices(folder, whole, two_devices):
    first, second = two_devices
    model = tiny.llama(
        len(whole[0].tokenizer),
        layers=LAYERS,
        attn_implementation="eager",
        tie_word_embeddings=whole[0].model.config.tie_word_embeddings,
    )
    places = {
        "model.embed_tokens": first,
        "model.rotary_emb": first,
        "model.layers.0": first,
        "model.layers.1": first,
        "model.layers.2": second,
        "model.layers.3": second,
        "model.norm": second,
        "lm_head": second,
    }
    model.requires_grad_(False)
    put(model, places)
    lm = models.wrap(str(folder), model, whole[0].tokenizer)
    assert lm.device == first and lm.identity() == whole[0].identity()
    check_all(lm, whole[1])
    # As for a model that makes its logits in a way of its own, in which all write texts.
    numbers, scores, _ = whole[1]
    own = stage_1(dataclasses.replace(lm, own_head=True), 1)
    check_same(own, numbers[: len(own)])
    check_same(stage_2(dataclasses.replace(lm, own_head=True)), scores)
