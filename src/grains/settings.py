"""The settings of each stage as dataclasses, and the values that each setting may take.

Nothing heavy is imported here: a script checks its flags before it imports libraries that take
seconds to load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from grains.errors import UserError

# Short name -> hub id. Any other hub id or local folder is taken as it is.
MODELS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen-2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen-2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "llava-1.6-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen-2.5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
}
EMBEDDED = "smollm2-135m-instruct"  # its weights are a Python package (requirements-demo.txt)
# GGUF files in the cache, where benchmarks/real_models.sh puts them.
FETCHED = ("gemma-3-270m", "qwen-2.5-coder-0.5b-instruct")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZE = ("int8", "int4")
STYLES = ("qa", "chat", "plain", "instruct")
LETTERED = ("letter", "text")  # how the answers to choices with letters are scored

# Stage 1: how tokens are attributed, and which of them are ablated (paper, section 3.1).
OBJECTIVES = ("contrastive", "normal")
NO_ATTRIBUTION = "none"
GRAD_METHODS = ("integrated_gradients", "smoothgrad", "vanilla", NO_ATTRIBUTION)
BASELINES = ("mean", "pad", "unk", "zeros")
IMAGE_BASELINES = ("blank", "mean", "zeros")
SCOPES = ("content", "all", "image", "text")
TOPS = ("pos", "neg", "abs", "rand")
ABLATE = ("all", "image", "text")
EXPERTS = ("fixed",)
MATMUL_PRECISIONS = ("highest", "medium")
REPLACEMENTS = ("pad", "unk")

# Stages 2 and 3: which vectors are added where and how strongly, and how answers are compared
# (paper, sections 3.2 and 3.3).
METHOD_MEANINGS = {
    "mean": "mean of the ablation shifts (the paper's)",
    "pca": "first principal component of the ablation shifts (the paper's)",
    "gradient": "mean gradient",
    "caa": "mean difference of the responses' states",
    "repe": "first principal component of the differences of caa",
    "icv": "in-context vectors: first direction of these differences, all layers joined",
    "iti": "mean difference at attention heads that tell the responses apart (asked for by name)",
    "nl_iti": "the same of several tokens' mean, with non-linear probes (asked for by name)",
    "vti": "as icv, layer by layer, and directions in the vision tower (asked for by name)",
    "random": "control: random directions",
    "shared_random": "control: one random direction at all layers",
    "rotated": "control: gradient under one random rotation of the hidden space",
    "rand_tokens": "control: mean shift when random tokens are ablated",
    "shuffled": "control: gradients with answers swapped at random",
}
METHODS = tuple(METHOD_MEANINGS)
# What an experiment trains: vectors, random directions of their length, the vectors under a random
# rotation, and LoRA.
TRAINED_RANDOM, TRAINED_ROTATED = "trained_random", "trained_rotated"
TRAINED_METHODS = ("trained", TRAINED_RANDOM, TRAINED_ROTATED, "lora")
# Methods that hold no information of interest.
CONTROLS = (
    *("random", "shared_random", "rotated", "rand_tokens", "shuffled"),
    *(TRAINED_RANDOM, TRAINED_ROTATED),
)
# The paper's methods, which reduce ablation shifts: only they have the modes pos and both.
ABLATION_METHODS = ("mean", "pca")
# Methods that shift single attention heads, for models whose heads are known by name.
OF_HEADS = ("iti", "nl_iti")
# The method that steers the vision tower too, of models that read pictures.
OF_TOWER = "vti"
# They are made from the model and the examples, not from hidden states alone, and are tried where
# they are asked for.
OF_MODEL = (*OF_HEADS, OF_TOWER)
# Methods made from gradients with respect to hidden states.
NEED_GRADIENTS = ("gradient", "rotated", "shuffled")
# Methods that need ablated states, and so an attribution or random tokens.
NEED_ABLATION = (*ABLATION_METHODS, "rand_tokens")
MODES = ("pos", "both")
LAYER_MODES = ("joint", "each", "from")
UNITS = ("relative", "absolute")
# Where vectors are handed on to, and what of the steering arrives.
EXPORTS = {
    "gguf": "control vector for llama.cpp; adds alone, and not behind block 0",
    "gguf-bias": "copy of a GGUF model with the vectors as biases (Llama layouts); adds alone",
    "hf-bias": "folder of a model with the vectors as biases (Llama layouts); adds alone",
    "peft": "BEFT adapter on down_proj; adds alone",
    "lm-eval": ".pt file for lm-eval's `steered` model; adds alone",
    "hf": "folder of a model with code of its own; keeps norm, gates and positions",
}
# Which positions are steered. A slice of a prompt, such as 0:10 or -5:, may be given as well.
POSITIONS = ("all", "prompt", "response", "last", "image")
# An answer's log-likelihood, per token or summed over its tokens, and the title of its accuracy.
SCORE_TITLES = {"token": "per-token", "sum": "summed"}
SCORES = tuple(SCORE_TITLES)
TARGET_SCORES = ("mc1", "mc2")  # TruthfulQA's own, for data that says which choices are right

# Stage 3: what chooses the next token.
GENERATION_CONFIGS = ("greedy", "model")

# The experiment: how LoRA is trained beside the methods.
LORA_OBJECTIVES = ("dpo", "sft")
# How far trained vectors may change what the model itself answers (see `grains.study.trained`).
OWN_ANSWERS = ("change", "keep")


def selections(methods: Iterable[str], modes: Iterable[str]) -> tuple[str, ...]:
    """Whose hidden states of stage 1 methods in these modes are made from, in the order of TOPS.

    Methods that use no ablation take the plain states, which every selection's file holds: pos.
    """
    methods, modes = [*methods], [*modes]
    needed = {"rand" if method == "rand_tokens" else "pos" for method in methods}
    if "both" in modes and any(method in ABLATION_METHODS for method in methods):
        needed.add("neg")
    return tuple(top for top in TOPS if top in needed)


def parse_positions(positions: str) -> str | slice:
    """A word of POSITIONS as it is, or a slice of a prompt's positions such as 0:10 or -5: .

    all: every position. prompt: those of the prompt. response: those that a response's tokens are
    predicted from: the last of the prompt, and the response's own. last: the last of the prompt.
    image: those of the picture. A slice counts as Python does, from the end if negative.
    Raises UserError for anything else.
    """
    if positions in POSITIONS:
        return positions
    if match := re.fullmatch(r"(-?\d+)?:(-?\d+)?", positions):
        start, stop = (None if bound is None else int(bound) for bound in match.groups())
        return slice(start, stop)
    raise UserError(
        f"positions '{positions}': expected {', '.join(POSITIONS)}, or a slice of the prompt such "
        "as 0:10 or -5:"
    )


@dataclass(frozen=True)
class Shot:
    """A question with its answer that stands before the prompt.

    choices: all choices, the answer among them, for prompts that list them.
    key: of the question (`data.question_key`), which is then not asked.
    Raises UserError for an answer that is none of the choices.
    """

    question: str
    answer: str
    context: str = ""
    choices: tuple[str, ...] = ()
    key: str = ""

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise UserError(
                f"shot '{self.question[:40]}': its answer '{self.answer[:40]}' is none of its "
                "choices"
            )


@dataclass(frozen=True)
class PromptSettings:
    """How an example becomes the text that the model reads (docs/prompts.md).

    style: qa, chat, plain or instruct (see `grains.rendering.render`).
    system: the system prompt of examples that bring none of their own. None: the one that the chat
        template writes by itself, if it does; "": none, not even that one.
    template_args: what the chat template is given by name, as a dict (kept as name and JSON).
    chat_template: a chat template (jinja2) in place of the model's own.
    allow_special_tokens: whether words of the data that look like control tokens are read as such.
    preamble: a text before the prompt.
    num_shots: how many `shots` scripts draw from the steering split.
    shots: questions with their answers before the prompt; earlier turns in a chat.
    letters: whether the prompt lists the choices as A, B, C, and what is scored then: letter or
        text; None: it lists none.
    prompt_template: a text (jinja2) in place of the style's; in a chat, of the user's turn.
    """

    style: str = "qa"
    system: str | None = None
    template_args: Mapping[str, Any] | tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    allow_special_tokens: bool = False
    preamble: str = ""
    num_shots: int = 0
    shots: tuple[Shot, ...] = ()
    letters: str | None = None
    prompt_template: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.template_args, Mapping):  # a dict cannot be hashed
            pairs = sorted((name, json.dumps(value)) for name, value in self.template_args.items())
            object.__setattr__(self, "template_args", tuple(pairs))

    @property
    def arguments(self) -> dict[str, Any]:
        """The `template_args` by name."""
        return {name: json.loads(value) for name, value in dict(self.template_args).items()}

    def changed(self) -> dict[str, Any]:
        """The settings beside the style that are not at their default, as plain values."""
        default, values = PromptSettings(), asdict(self) | {"template_args": self.arguments}
        return {
            field.name: values[field.name]
            for field in fields(self)
            if field.name != "style" and getattr(self, field.name) != getattr(default, field.name)
        }


@dataclass(frozen=True)
class AttributionSettings:
    """How to attribute (paper, section 3.1).

    objective: contrastive (log P(y+ | x) - log P(y- | x)) or normal (each response on its own).
    grad_method: integrated_gradients, smoothgrad, vanilla (gradient times input) or none: nothing
        is attributed or ablated, which is enough for methods that need neither.
    baseline: the embedding at which the path of a text token starts: mean (of the embedding
        matrix), pad or unk (that token's embedding) or zeros (as in the paper).
    image_baseline: the feature at which the path of an image token starts: blank (the features of
        a blank picture), mean (over the features of its own picture) or zeros (as in the paper).
    attribute: the positions that move along the path: content (the user's words and the picture;
        template and special tokens keep their embeddings), all (as in the paper), image (the
        picture only) or text (the user's words only).
    ig_steps: points of the Gauss-Legendre rule, or None for the adaptive rule.
    tolerance: for the adaptive rule, the completeness error that is allowed, as a share of
        |f(x) - f(b)|.
    max_points: for the adaptive rule, the largest number of gradients.
    smooth_samples: for smoothgrad, the number of noisy copies.
    smooth_noise: for smoothgrad, the standard deviation of the noise, as a share of that of the
        prompt's embeddings.
    experts: fixed: the experts of a mixture that are chosen for the prompt stay chosen along the
        path; None: they are chosen anew at each point.
    matmul_precision: of the gradients' matrix products, in torch's words: highest (fp32) or medium
        (of numbers rounded to bfloat16 on the way back).
    """

    objective: str = "contrastive"
    grad_method: str = "integrated_gradients"
    baseline: str = "mean"
    image_baseline: str = "blank"
    attribute: str = "content"
    ig_steps: int | None = None
    tolerance: float = 0.05
    max_points: int = 200
    smooth_samples: int = 20
    smooth_noise: float = 0.1
    experts: str | None = None
    matmul_precision: str = "highest"


@dataclass(frozen=True)
class AblationSettings:
    """How stage 1 ablates tokens, and how it attributes them first (paper, section 3.1).

    tops: the selections; each is ablated separately: tokens with the largest scores (pos), the
        smallest (neg), the largest magnitudes (abs), or random tokens (rand, the control).
    top_k: the number of tokens in a selection.
    ablate: which of the attributed positions may be selected: all, image or text.
    replacement: the token whose embedding replaces an ablated text token: pad or unk.
    image_replacement: what replaces an ablated image token: blank, mean or zeros (see
        `AttributionSettings.image_baseline`).
    prompt: how examples are written as prompts.
    batch_tokens: the number of token positions that are computed at a time.
    seed: seeds the rand selection and smoothgrad's noise.
    """

    attribution: AttributionSettings = AttributionSettings()
    tops: tuple[str, ...] = ("pos", "neg")
    top_k: int = 10
    ablate: str = "all"
    replacement: str = "pad"
    image_replacement: str = "mean"
    prompt: PromptSettings = PromptSettings()
    batch_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class DecodingSettings:
    """How the tokens of a text are chosen, and what ends it beside the model's own end tokens.

    generation_config: greedy (nothing acts but what is set here) or model (what the model's own
        generation config sets acts too: penalties, forced tokens, temperature, ...).
    temperature: 0 takes the likeliest token; None: the model's with `model`, otherwise 0.
    top_p: tokens are drawn of the likeliest that hold this share of the probability.
    num_return: texts drawn for each prompt.
    stop: texts that end the answer; they are not part of it.
    seed: of what is drawn.
    Raises UserError for values that no text can be drawn with.
    """

    generation_config: str = "greedy"
    temperature: float | None = None
    top_p: float | None = None
    num_return: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.generation_config not in GENERATION_CONFIGS:
            raise UserError(
                f"unknown generation_config '{self.generation_config}': expected "
                f"{' or '.join(GENERATION_CONFIGS)}"
            )
        if self.temperature is not None and not (
            self.temperature == 0 or 0.001 <= self.temperature <= 1000
        ):
            raise UserError(
                f"temperature {self.temperature}: expected 0 (greedy), or 0.001 to 1000"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: expected more than 0 and at most 1")
        if self.num_return < 1:
            raise UserError(f"num_return {self.num_return}: expected at least 1")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every answer at once; leave it out")


@dataclass(frozen=True)
class DataSettings:
    """Which examples vectors are made from, and which questions choose and test them.

    name: a short name of `grains.data.DATASETS`, or any label together with a path.
    path: a local file or folder to read instead of the data set's own source.
    num_samples: the number of steering examples, from which vectors are made.
    split, validation_split, test_split: the split that steering, validation and test examples
        come from; None: the data set's default.
    evaluate_on: held_out (validation and test questions) or all (every question, also those that
        the vectors were made from, as the published scripts do).
    num_validation, num_test: the number of questions; None: all that remain.
    """

    name: str
    path: str | None = None
    num_samples: int = 50
    split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    evaluate_on: str = "held_out"
    num_validation: int = 150
    num_test: int | None = None


@dataclass(frozen=True)
class GridSettings:
    """The configurations that are tried: methods x modes x groups of layers x strengths.

    methods, modes: see `grains.vectors.make`.
    layers: layer numbers (negative ones count from the end), ranges ('10-29') or 'all', as text.
    layer_mode: joint (one configuration steers all layers), each (one configuration per layer) or
        from (one configuration per layer, which steers that layer and all above it).
    alphas: the strengths.
    units: relative (alpha times the median activation norm, along the unit vector) or absolute
        (alpha times the vector as its method gives it, as in the paper).
    positions: the positions that are steered (see `parse_positions`).
    gate: whether all vectors, the controls' too, steer behind a gate (see `grains.study.gates`).
    Raises UserError for a gate or some positions with a method that steers the vision tower too.
    """

    methods: tuple[str, ...]
    modes: tuple[str, ...] = ("pos",)
    layers: tuple[str, ...] = ("all",)
    layer_mode: str = "joint"
    alphas: tuple[float, ...] = ()
    units: str = "relative"
    positions: str = "all"
    gate: bool = False

    def __post_init__(self) -> None:
        if OF_TOWER in self.methods and (self.gate or self.positions != "all"):
            raise UserError(
                f"method {OF_TOWER} steers the vision tower too, where no gate and no positions of "
                "the text act: leave it out, or give no gate and all positions"
            )


STUDY_SEEDS = (0, 1, 2)
STUDY_GRID = GridSettings(tuple(method for method in METHODS if method not in OF_MODEL))


@dataclass(frozen=True)
class StudySettings:
    """What an experiment tries, by which examples, and how it chooses.

    sources: the data sets; with several, the vectors of each are also tested on the others.
    seeds: each draws its own steering, validation and test questions.
    ablation: stage 1 with the selections that all methods need; each of the seeds takes its
        seed's place.
    grid: where it has no alphas, strengths are searched that cost `strengths_at`.
    budgets: how much the perplexity of neutral text may rise, 0.1 for 10 %.
    strengths_at: rises of perplexity that the search aims at (none: every second budget).
    max_unrelated_loss: accuracy on unrelated questions that the stricter constraints allow to lose.
    gated: methods of the grid that are also tried behind a gate.
    train_vectors: whether vectors are trained as well; own_answers: whether they may change the
        model's own answers, or keep them. lora: dpo, sft or none.
    num_generations: questions of a split that are answered freely, with max_new_tokens at most.
    Raises UserError for data sets of one name, for a gated method that the grid lacks or that takes
    no gate, for methods that need an ablation without one, and for some positions without
    strengths.
    """

    sources: tuple[DataSettings, ...]
    seeds: tuple[int, ...]
    ablation: AblationSettings
    grid: GridSettings
    budgets: tuple[float, ...] = (0.02, 0.05, 0.1, 0.25, 1.0)
    strengths_at: tuple[float, ...] = ()
    max_unrelated_loss: float = 0.02
    gated: tuple[str, ...] = ()
    train_vectors: bool = True
    own_answers: str = "change"
    lora: str = "none"
    num_generations: int = 24
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len({*names}) < len(names):
            raise UserError(
                f"datasets: {' '.join(names)} are not all different: give each a name of its own"
            )
        ablating = [method for method in self.grid.methods if method in NEED_ABLATION]
        if self.ablation.attribution.grad_method == NO_ATTRIBUTION and ablating:
            raise UserError(
                f"grad_method {NO_ATTRIBUTION} ablates nothing, which {', '.join(ablating)} need: "
                "give another grad_method, or leave these methods out"
            )
        if not self.grid.alphas and self.grid.positions not in ("all", "response"):
            raise UserError(
                f"positions {self.grid.positions}: of prose they are the first token at most, so "
                "its perplexity says nothing of their cost and no strengths can be searched by it: "
                "give alphas"
            )
        if OF_TOWER in self.gated:
            raise UserError(
                f"gated: {OF_TOWER} steers the vision tower too, where no gate acts: leave it out"
            )
        missing = [method for method in self.gated if method not in self.grid.methods]
        if missing:
            raise UserError(
                f"gated: {', '.join(missing)} is not among the methods "
                f"({', '.join(self.grid.methods)}): add it to them"
            )


# What an experiment tries by default.
STUDY_DEFAULT = StudySettings((), STUDY_SEEDS, AblationSettings(), STUDY_GRID)
