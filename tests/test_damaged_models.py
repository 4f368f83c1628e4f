"""Model folders that are damaged, or whose files do not belong together: one line says what is
wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file

from grains import models, prompts
from grains.data import Example
from grains.errors import UserError

ASKED = Example("one", "Do cats land on their feet?", ("No", "Yes"), 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        models.load(str(folder), device="cpu")
    message = str(error.value)
    assert f"'{folder}'" in message or message.startswith(f"{folder}: ")
    assert len(message) < 900
    return message


def change_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_with_fewer_layers_than_the_weights(folder):
    """transformers passes over the others without a word."""
    change_config(folder, num_hidden_layers=2)
    message = refusal(folder)
    assert "hold layers that its config leaves out" in message
    assert "model.layers.2.input_layernorm.weight, 9 weights in all" in message


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_hidden_layers": 0}, "its config says 0 layers, expected at least one"),
        ({"num_hidden_layers": -1}, "its config says -1 layers, expected at least one"),
        ({"num_hidden_layers": 4}, "9 of its weights are not in its files"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers' expected int"),
        ({"hidden_size": 64}, "its weights are of other sizes than its config says"),
        ({"vocab_size": 100}, "its weights are of other sizes than its config says"),
        ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
        ({"model_type": "none"}, "model type `none`"),
        ({"rms_norm_eps": "x"}, "expected float, got str"),
    ],
)
def test_a_config_that_does_not_fit(folder, changes, expected):
    change_config(folder, **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", ["[]", "5", "null", "[" * 100_000, '{"a":' * 100_000], ids=lambda text: text[:6]
)
def test_json_that_is_no_such_file(folder, name, content):
    (folder / name).write_text(content)
    assert "could not be loaded" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100])
def test_weights_that_are_none(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    assert "could not be loaded" in refusal(folder)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_not_opened(folder, tmp_path):
    """And the advice that torch gives, to open it all the same, is not repeated."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    plain = models.load(str(folder), device="cpu")  # tensors alone are read
    assert torch.equal(plain.embed.weight, weights["model.embed_tokens.weight"])
    torch.save(weights | {"x": Hostile(tmp_path / "ran")}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "a pickle that holds more than tensors" in message and "safetensors" in message
    assert "weights_only" not in message and "trust" not in message
    assert not (tmp_path / "ran").exists()


# --- tokenizer and template ---


def test_a_tokenizer_with_more_tokens_than_the_weights(folder):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": len(tiny.byte_tokenizer()), "content": "cats"}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    content["added_tokens"].append(token | flags)
    path.write_text(json.dumps(content))
    lm = models.load(str(folder), device="cpu")
    prompts.encode(lm, Example("two", "Do dogs?", ("No", "Yes"), 0))  # has no such token
    for example in (ASKED, Example("three", "Which?", ("cats", "dogs"), 0)):
        with pytest.raises(UserError, match=rf"the token 'cats' has the number {token['id']}"):
            prompts.encode(lm, example)


@pytest.mark.parametrize(
    "template, expected",
    [
        ("{% for", "refuses its turns (user): unexpected"),
        ("{{ raise_exception('no way') }}", "refuses its turns (user): no way"),
        ("{{ missing.one.two }}", "refuses its turns (user): 'missing' is undefined"),
        ("{{ 1 / 0 }}", "refuses its turns (user): division by zero"),
        ("{{ 'a' + 1 }}", "refuses its turns (user): can only concatenate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "(user): maximum recursion depth"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
        ("Hello", "leaves its question out; give another chat_template"),
        ("", "has no chat template: use prompt_style qa or plain"),
    ],
)
def test_chat_templates(folder, template, expected):
    (folder / "chat_template.jinja").write_text(template)
    lm = models.load(str(folder), device="cpu")
    prompts.encode(lm, ASKED, "qa")
    with pytest.raises(UserError) as error:
        prompts.encode(lm, ASKED, "chat")
    assert expected in str(error.value)
