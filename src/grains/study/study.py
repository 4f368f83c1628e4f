"""A study: one data set with one seed, its examples and the directions that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from grains import data, manifests, of_model, prompts, runs, splits, stage1, vectors
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.names import StudyNames
from grains.settings import AblationSettings, DataSettings, StudySettings
from grains.states import StatesFile
from grains.steering import Direction, directions
from grains.study.lora import LoraDirection


@dataclass(frozen=True, eq=False)
class Study:
    """One data set with one seed.

    splits: the examples by split: training (the pairs that steer), validation and test.
    states: the hidden states of the pairs.
    directions: what is tried, without strengths.
    manifest: all that scores and answers depend on beside what is scored or asked.
    overwrite: whether files of other settings are replaced.
    """

    settings: StudySettings
    source: DataSettings
    seed: int
    names: StudyNames
    splits: dict[str, list[Example]]
    states: StatesFile
    directions: Sequence[Direction | LoraDirection]
    manifest: dict
    overwrite: bool = False

    @property
    def name(self) -> str:
        return self.names.stem

    @property
    def ablation(self) -> AblationSettings:
        """The settings of stage 1, with this study's seed."""
        return replace(self.settings.ablation, seed=self.seed)

    def tested(self, examples: Sequence[Example]) -> list[Example]:
        """Those of another study's test questions that neither steered nor chose in this one."""
        used = {*self.states.info["data"]["questions"]}
        used |= {*map(data.question_key, self.splits["validation"])}
        used |= {shot.key for shot in self.ablation.prompt.shots}
        return [example for example in examples if data.question_key(example) not in used]


@dataclass(frozen=True)
class Drawn:
    """The examples of one data set and seed, and the settings with the shots drawn for them.

    pairs: those that steer. evaluated: split -> its questions.
    """

    settings: StudySettings
    pairs: list[Example]
    evaluated: dict[str, list[Example]]

    def fingerprints(self) -> dict[str, str]:
        """By split, and of all pictures: what tells these examples from others."""
        splits = {"training": self.pairs, **self.evaluated}
        every = [example for examples in splits.values() for example in examples]
        return {
            **{split: data.fingerprint(examples) for split, examples in splits.items()},
            "pictures": data.pictures_digest(every),
            "shots": runs.digest([shot.key for shot in self.settings.ablation.prompt.shots]),
        }


def draw(settings: StudySettings, source: DataSettings, seed: int) -> Drawn:
    """Draw the examples of a data set by a seed.

    Raises UserError for questions with a single answer, and where none are left to evaluate on.
    """
    ablation = replace(settings.ablation, seed=seed)
    pairs = [example.pair() for example in splits.steering_examples(source, seed)]
    steering = {
        "ids": [example.id for example in pairs],
        "questions": [data.question_key(example) for example in pairs],
    }
    prompt = splits.with_shots(ablation.prompt, source, seed, steering["questions"])
    shots = [shot.key for shot in prompt.shots]
    evaluated = splits.evaluation_examples(source, seed, steering, shots)
    for example in (example for examples in evaluated.values() for example in examples):
        if len(example.choices) < 2:
            raise UserError(
                f"example {example.id} has a single answer: the experiment compares answers"
            )
    return Drawn(replace(settings, ablation=replace(ablation, prompt=prompt)), pairs, evaluated)


def begin(
    lm: LanguageModel,
    settings: StudySettings,
    source: DataSettings,
    seed: int,
    names: StudyNames,
    overwrite: bool = False,
    attributed: stage1.Known | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Draw the examples, do stage 1 and make the vectors of every method of the grid.

    attributed: attributions that studies have in common, to which this one's are added.
    say: takes a line that says what is being done.
    Raises as `draw`.
    """
    drawn = draw(settings, source, seed)
    settings, pairs, evaluated = drawn.settings, drawn.pairs, drawn.evaluated
    ablation = settings.ablation
    if len(pairs) < source.num_samples:
        say(f"note: {source.num_samples} steering examples asked for, {len(pairs)} available")
    say(f"\n{source.name}, seed {seed}: attribution and hidden states")
    files = names.states(ablation.tops)
    stage1.run(lm, pairs, source, ablation, names.attributions(), files, overwrite, attributed, say)
    states = {top: StatesFile(path, top) for top, path in files.items()}

    def from_model(method: str) -> vectors.FromModel:
        return of_model.make(lm, pairs, ablation.prompt, seed, method)

    made: list[Direction | LoraDirection] = []
    for method, mode, steering_vectors in vectors.make_all(states, settings.grid, seed, from_model):
        if runs.processes().is_main_process:
            runs.write_shared(names.vectors(method, mode), *steering_vectors.content(), overwrite)
        made += directions(steering_vectors, method, mode, settings.grid)
    counts = prompts.tally(
        prompts.encode(lm, replace(example, image=None), ablation.prompt)
        for examples in evaluated.values()
        for example in examples
    )
    for line in prompts.notes(counts):
        say(line)
    manifest = manifests.evaluation(
        "experiment", lm, states["pos"], source, ablation, settings.grid, evaluated, counts
    )
    # What a configuration scores does not depend on what else is tried.
    kept = ("prompt_style", "prompt", "batch_tokens", "seed")
    shared = {name: value for name, value in manifest["flags"].items() if name in kept}
    return Study(
        settings,
        source,
        seed,
        names,
        {"training": pairs, **evaluated},
        states["pos"],
        made,
        manifest | {"flags": shared},
        overwrite,
    )
