"""What is said of a model that transformers reads otherwise than its files, or cannot read."""

import json

import pytest
import transformers
from helpers import tiny
from packaging import version

from grains import models
from grains.errors import UserError


def with_class(folder, name):
    """A tiny model whose byte-level tokenizer.json has another class in its config."""
    tiny.save_model(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = name
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.skipif(
    version.parse(transformers.__version__) >= version.parse("5.24"),
    reason="this transformers reads it as the file says",
)
def test_a_tokenizer_that_loses_spaces_is_refused(tmp_path):
    source = with_class(tmp_path, "LlamaTokenizerFast")
    with pytest.raises(UserError, match="loses parts of a text that its tokenizer"):
        models.load(source)


def test_a_tokenizer_that_cuts_otherwise_is_warned_of(tmp_path, recwarn):
    source = with_class(tmp_path, "PreTrainedTokenizerFast")
    tokenizer = models.load(source).tokenizer
    assert not [warning for warning in recwarn if "tokenizer.json" in str(warning.message)]
    tokenizer.add_tokens(["km;"])
    with pytest.warns(UserWarning, match=r"cuts texts otherwise .*\['Ġ', 'km;'"):
        models.check_tokenizer("changed", source, tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "\nPixtralProcessor requires the Torchvision library but it was not found",
        "Could not load it. You can install it with pip: `pip install torchvision`.",
        "No module named 'torchvision'",
    ],
)
def test_a_missing_package_is_named_with_the_command(text):
    message = models._why_not_loaded("m", "m", ImportError(text))
    assert "pip install torchvision" in message and "\n" not in message
