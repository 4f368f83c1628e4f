"""What can be set: the words that an option may take, and the settings of each stage.

Nothing heavy is imported here, so that a script can check its flags before it loads a library that
takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from grains.errors import UserError

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
EMBEDDED = "smollm2-135m-instruct"  # its weights come in a package (requirements-demo.txt)
DTYPES = ("float32", "bfloat16", "float16")
STYLES = ("qa", "chat", "plain")

# Stage 1: how tokens are attributed, and which of them are ablated.
OBJECTIVES = ("contrastive", "normal")
GRAD_METHODS = ("integrated_gradients", "smoothgrad", "vanilla")
BASELINES = ("mean", "pad", "unk", "zeros")
IMAGE_BASELINES = ("blank", "mean", "zeros")
SCOPES = ("content", "all", "image", "text")
TOPS = ("pos", "neg", "abs", "rand")
ABLATE = ("all", "image", "text")
REPLACEMENTS = ("pad", "unk")

# Stages 2 and 3: which vectors, where, how strongly, and how answers are compared.
METHODS = ("mean", "pca", "gradient", "caa", "repe", "random", "rand_tokens", "shuffled")
# The last: random directions as long as trained ones, which an experiment makes of them.
CONTROLS = ("random", "rand_tokens", "shuffled", "trained_random")
# Only these are made from ablation shifts, and so know the modes pos and both.
ABLATION_METHODS = ("mean", "pca")
MODES = ("pos", "both")
LAYER_MODES = ("joint", "each", "from")
UNITS = ("relative", "absolute")
SCORES = ("token", "sum")  # log-likelihoods per token, or summed

# The experiment: the selections that its methods need, and how LoRA is trained beside them.
STUDY_TOPS = ("pos", "neg", "rand")
LORA_OBJECTIVES = ("dpo", "sft")


@dataclass(frozen=True)
class AttributionSettings:
    """How to attribute (paper, section 3.1).

    objective: contrastive (log P(y+) - log P(y-)) or normal (each response on its own).
    grad_method: integrated_gradients, smoothgrad or vanilla.
    baseline: where the path of a word starts: the mean of the embedding matrix, the pad or unk
        token's embedding, or zeros (the paper's).
    image_baseline: where the path of an image token starts: the features of a blank picture, the
        mean feature of its own picture, or zeros (the paper's).
    attribute: which positions move: content (the user's words and the picture; template and
        special tokens keep their embeddings), all (the paper's), the image alone, the text (the
        user's words) alone.
    ig_steps: points of the Gauss-Legendre rule, or None for the adaptive rule.
    tolerance, max_points: of the adaptive rule: the completeness error allowed, as a share of
        |f(x) - f(b)|, and the gradients spent at most.
    smooth_samples, smooth_noise: smoothgrad's number of noisy copies, and their noise as a share
        of the standard deviation of the prompt's embeddings.
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


@dataclass(frozen=True)
class AblationSettings:
    """What stage 1 does with an example, beside the attribution.

    tops: selections of tokens that are ablated, each on its own: those with the largest (pos) or
        smallest (neg) score, the largest magnitude (abs), or random ones (rand, the control).
    top_k: tokens of a selection.
    ablate: which of the attributed positions may be selected: all, the image's or the text's.
    replacement: token whose embedding takes an ablated word's place (pad or unk).
    image_replacement: what takes an ablated image token's place (see `AttributionSettings`).
    prompt_style: qa, chat or plain.
    batch_tokens: positions computed at a time.
    """

    attribution: AttributionSettings = AttributionSettings()
    tops: tuple[str, ...] = ("pos", "neg")
    top_k: int = 10
    ablate: str = "all"
    replacement: str = "pad"
    image_replacement: str = "mean"
    prompt_style: str = "qa"
    batch_tokens: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class DataSettings:
    """Which examples steer, choose and test.

    name: a short name of `grains.data.DATASETS`, or any label together with a path.
    path: a local file or folder in the data set's place.
    num_samples: steering examples, which vectors are made from.
    split, validation_split, test_split: where steering, validation and test examples come from
        (None: the data set's own).
    evaluate_on: held_out (validation and test questions) or all (every question, the steering
        examples included: the published way).
    num_validation, num_test: questions of each (None: all that are left).
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
    """The configurations that are tried: methods x modes x layers x strengths.

    layers: numbers, negative numbers, ranges ('10-29') or 'all', as text.
    layer_mode: joint (all of them at once), each (one configuration a layer) or from (one a layer:
        that layer and all above it).
    alphas: strengths; units: relative (shares of the median activation norm, along unit vectors)
        or absolute (multiples of the vector as reduced, the paper's).
    """

    methods: tuple[str, ...]
    modes: tuple[str, ...] = ("pos",)
    layers: tuple[str, ...] = ("all",)
    layer_mode: str = "joint"
    alphas: tuple[float, ...] = ()
    units: str = "relative"


@dataclass(frozen=True)
class StudySettings:
    """What an experiment tries, by which examples, and how it chooses.

    sources: the data sets; with several, the vectors of each are also tested on the others.
    seeds: each draws its own steering, validation and test questions.
    ablation: stage 1 with the selections STUDY_TOPS; each of the seeds takes its seed's place.
    grid: where it has no alphas, strengths are searched that cost `strengths_at`.
    budgets: how much the perplexity of neutral text may rise, 0.1 for 10 %.
    strengths_at: rises of perplexity that the search aims at (none: every second budget).
    max_unrelated_loss: accuracy on unrelated questions that the stricter constraints allow to lose.
    gated: methods of the grid that are also tried behind a gate.
    train_vectors: whether vectors are trained as well; lora: dpo, sft or none.
    num_generations: questions of a split that are answered freely, with max_new_tokens at most.
    Raises UserError for data sets of one name, and for a gated method that the grid lacks.
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
    lora: str = "none"
    num_generations: int = 24
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len({*names}) < len(names):
            raise UserError(
                f"datasets: {' '.join(names)} are not all different: give each a name of its own"
            )
        missing = [method for method in self.gated if method not in self.grid.methods]
        if missing:
            raise UserError(
                f"gated: {', '.join(missing)} is not among the methods "
                f"({', '.join(self.grid.methods)}): add it to them"
            )
