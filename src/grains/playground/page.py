"""The page itself: what stands where, and what happens at a click. Built with gradio."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Read when gradio is imported: it would report its use to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI

from grains import vision
from grains.data import Example
from grains.errors import UserError
from grains.playground import views
from grains.playground.bench import Bench, Question, Steering, table_pairs
from grains.settings import METHODS, UNITS
from grains.steering import SteeringVectors

TITLE = "GrAInS playground"
BUILT_IN, OWN, ABOVE, FILE = "built-in pairs", "my pairs", "the question above", "a file"
NOT_YET = {
    "words": "Run: the words of the prompt, coloured by how far each pushes the model to one of "
    "the answers.",
    "answers": "Then: the base model's answer and the steered one, side by side.",
    "curve": "Then: how far the model prefers one answer, over the strength.",
}
QUIET = {"show_progress": "hidden", "api_visibility": "private"}
# One computation at a time: the model's layers are steered while it computes.
ALONE = {"concurrency_limit": 1, "concurrency_id": "model", **QUIET}

Update = dict[Any, Any]


def build(
    benches: dict[str, Bench], vectors: dict[str, SteeringVectors], folder: Path
) -> gr.Blocks:
    """The page for some models by their names, and the vectors that each begins with.

    folder: where files to be downloaded are written.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(
            f"# {TITLE}\nWhich words of a prompt push a model to one of two answers? And what does "
            "it write when it is steered?"
        )
        for number, (name, bench) in enumerate(benches.items()):
            with gr.Tab(name):
                _Panel(number, bench, vectors[name], folder).lay_out()
    return blocks


def application(blocks: gr.Blocks) -> FastAPI:
    """A server of the page. Nothing in it asks another host."""
    fonts = ["system-ui", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks.queue(max_size=64, api_open=False),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="64mb",
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(
            primary_hue="blue",
            neutral_hue="gray",
            font=[gr.themes.Font(name) for name in fonts],
            font_mono=[gr.themes.Font(name) for name in mono],
        ),
        css_paths=Path(__file__).with_name("style.css"),
    )


class _Panel:
    """The part of the page for one model. number: its place, in the ids of its elements."""

    def __init__(self, number: int, bench: Bench, vectors: SteeringVectors, folder: Path):
        self.number, self.bench, self.first, self.folder = number, bench, vectors, folder
        self.has_pictures = bench.lm.processor is not None

    def _id(self, name: str) -> str:
        return f"{name}-{self.number}"

    def _html(self, name: str, text: str = "") -> gr.HTML:
        return gr.HTML(text, elem_id=self._id(name), padding=False)

    def lay_out(self) -> None:
        """The components, and what they do."""
        self.vectors, self.response = gr.State(self.first), gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self._question()
                self._steering()
            with gr.Column(min_width=320):
                self.words, self.answers, self.curve = (
                    self._html(name, views.empty(text)) for name, text in NOT_YET.items()
                )
        with gr.Accordion("Other vectors", open=False, elem_id=self._id("other")):
            self._making()
        self._act()

    def _question(self) -> None:
        shown = self.bench.shown
        self.chooser = gr.Dropdown(
            [(f"{place + 1}. {item.question}", place) for place, item in enumerate(shown)],
            value=0,
            label="Example",
            elem_id=self._id("example"),
        )
        self.image = gr.State(None)
        if self.has_pictures:
            self.image = gr.Image(
                shown[0].image,
                label="Picture",
                elem_id=self._id("picture"),
                type="filepath",
                format="png",
                image_mode=None,
                sources=["upload", "clipboard"],
                height=220,
                buttons=[],
            )
            # As it is, broken or not: grains says in a line what is wrong with a picture.
            self.image.preprocess = lambda file: file.path if file else None
        self.prompt = gr.Textbox(
            _text(shown[0]), label="Prompt", lines=3, max_lines=12, elem_id=self._id("prompt")
        )
        with gr.Row():
            self.chosen, self.rejected = (
                gr.Textbox(text, label=label, min_width=220, elem_id=self._id(label.split()[0]))
                for text, label in (
                    (shown[0].chosen, "Preferred answer"),
                    (shown[0].rejected, "Dispreferred answer"),
                )
            )
        self.run = gr.Button("Run", variant="primary", elem_id=self._id("run"))
        self.status = self._html("status")

    def _steering(self) -> None:
        bench = self.bench
        self.about = self._html("about", views.vectors(self.first))
        self.alpha = gr.Slider(
            -bench.reach,
            bench.reach,
            value=bench.strength,
            step=bench.reach / 50,
            label="Strength",
            info="0: base. Above 0: towards the vectors; below: away from them.",
            elem_id=self._id("strength"),
        )
        with gr.Accordion("Layers, units, length", open=False, elem_id=self._id("more")):
            self.layers = gr.Textbox(
                bench.layers,
                label="Layers",
                info="Such as 8-24, 3 5, or all",
                elem_id=self._id("layers"),
            )
            self.units = gr.Radio(
                list(UNITS),
                value="relative",
                label="Units",
                info="relative: to the length of a hidden state; absolute: trained vectors",
            )
            self.reach = gr.Number(bench.reach, label="Largest strength", elem_id=self._id("reach"))
            self.tokens = gr.Slider(4, 200, value=32, step=1, label="Tokens of an answer")

    def _making(self) -> None:
        # A table holds no pictures.
        sources = [BUILT_IN, *([] if self.has_pictures else [OWN]), ABOVE, FILE]
        self.source = gr.Radio(
            sources, value=BUILT_IN, label="Made from", elem_id=self._id("source")
        )
        self.method = gr.Dropdown(list(METHODS), value=self.bench.method, label="Method")
        first = [[_text(pair), pair.chosen, pair.rejected] for pair in self.bench.pairs[:3]]
        self.table = gr.Dataframe(
            first,
            headers=["prompt", "preferred", "dispreferred"],
            datatype="str",
            type="array",
            column_count=3,
            wrap=True,
            visible=False,
            label="Pairs",
        )
        self.file = gr.File(
            label="Vectors (.safetensors)", type="filepath", visible=False, elem_id=self._id("file")
        )
        with gr.Row():
            self.make = gr.Button("Make vectors", variant="primary", elem_id=self._id("make"))
            self.download = gr.DownloadButton(
                "Download vectors", self._written(self.first), elem_id=self._id("download")
            )
        self.made = self._html("made")

    def _act(self) -> None:
        question = [self.prompt, self.chosen, self.rejected, self.image]
        steering = [self.vectors, self.layers, self.units]
        strength = [self.alpha, self.reach, self.tokens]
        shown = [self.status, self.words, self.answers, self.curve, self.response]
        filled = [self.prompt, self.chosen, self.rejected]
        if self.has_pictures:
            filled.append(self.image)
        outdated = [self.response, self.curve]
        self.chooser.input(self._fill, self.chooser, [*outdated, *filled], **QUIET)
        # The user's own input alone: `change` also comes when the page itself sets a value.
        gr.on(
            [item.input for item in (*filled, self.layers, self.units, self.reach)],
            self._forget,
            None,
            outdated,
            **QUIET,
        )
        gr.on(
            [self.run.click, self.chosen.submit, self.rejected.submit],
            self._run,
            [*question, *steering, *strength],
            shown,
            **ALONE,
        )
        self.alpha.change(
            self._mark,
            [self.response, self.alpha],
            self.curve,
            **QUIET,
            trigger_mode="always_last",
            queue=False,
        )
        self.alpha.change(
            self._answer,
            [*question, *steering, *strength],
            shown,
            trigger_mode="always_last",
            **ALONE,
        )
        self.reach.input(self._stretch, self.reach, self.alpha, **QUIET, trigger_mode="always_last")
        self.source.input(
            lambda source: (gr.update(visible=source == OWN), gr.update(visible=source == FILE)),
            self.source,
            [self.table, self.file],
            **QUIET,
        )
        self.make.click(
            self._make,
            [self.source, self.method, self.table, self.file, *question],
            [self.made, self.about, self.vectors, self.response, self.curve, self.download],
            **ALONE,
        )

    # --- at a click ---

    def _forget(self) -> tuple:
        """No curve: it would be of another question or other steering."""
        return None, views.empty(NOT_YET["curve"])

    def _fill(self, place: int) -> list:
        example = self.bench.shown[place]
        texts = [*self._forget(), _text(example), example.chosen, example.rejected]
        return [*texts, example.image] if self.has_pictures else texts

    def _run(self, *values: Any) -> Iterator[Update]:
        """Words, answers and curve, one after the other as they are computed."""
        yield from self._guarded(self.status, lambda: self._everything(*values))

    def _everything(
        self, prompt: str, chosen: str, rejected: str, image: str | None, *others: Any
    ) -> Iterator[Update]:
        question = Question(prompt, chosen, rejected, image)
        vectors, layers, units, alpha, reach, tokens = others
        steering = Steering(vectors, layers, units)
        steering.at(alpha)  # raises before the long computations if it cannot be
        yield {self.status: views.note("Which words push it where: gradients are computed …")}
        scored = self.bench.attribute(question)
        picture = vision.open_image(Example("", "", (), 0, image=image)) if image else None
        yield {self.words: views.attribution(scored, picture)}
        yield from self._write(question, steering, alpha, tokens)
        yield {self.status: views.note("The preference over the strength is computed …")}
        response = self.bench.response(question, steering, reach)
        yield {self.status: "", self.response: response, self.curve: views.curve(response, alpha)}

    def _write(
        self, question: Question, steering: Steering, alpha: float, tokens: float
    ) -> Iterator[Update]:
        yield {self.status: views.note("Both answers are written …")}
        for texts in self.bench.answers(question, steering, alpha, int(tokens)):
            yield {self.answers: views.answers(texts, alpha)}

    def _answer(
        self, prompt: str, chosen: str, rejected: str, image: str | None, *others: Any
    ) -> Iterator[Update]:
        """The answers alone, at another strength."""
        vectors, layers, units, alpha, _, tokens = others

        def write() -> Iterator[Update]:
            question = Question(prompt, chosen, rejected, image)
            yield from self._write(question, Steering(vectors, layers, units), alpha, tokens)
            yield {self.status: ""}

        yield from self._guarded(self.status, write)

    def _mark(self, response: Any, alpha: float) -> Any:
        return views.curve(response, alpha) if response else gr.skip()

    def _stretch(self, reach: float | None) -> Any:
        if not reach or reach <= 0:
            return gr.skip()
        return gr.update(minimum=-reach, maximum=reach, step=reach / 50)

    def _make(
        self, source: str, method: str, table: Sequence, file: str | None, *question: Any
    ) -> Iterator[Update]:
        """Vectors from where the page says, in place of those before."""

        def make() -> Iterator[Update]:
            if source == FILE:
                made = self.bench.load(file)
            else:
                pairs: Sequence = self.bench.pairs
                if source == OWN:
                    pairs = table_pairs(table)
                elif source == ABOVE:
                    asked = Question(*question)
                    answers = asked.chosen, asked.rejected
                    pairs = [Example("of the page", asked.prompt, answers, 0, image=asked.image)]
                yield {self.made: views.note(f"Vectors are made of {views.pairs_of(len(pairs))} …")}
                made = self.bench.fit(pairs, method)
            yield {
                self.made: views.note("Made. Run shows what they do."),
                self.about: views.vectors(made),
                self.vectors: made,
                self.response: None,
                self.curve: views.empty(NOT_YET["curve"]),
                self.download: self._written(made),
            }

        yield from self._guarded(self.made, make)

    def _guarded(self, place: Any, work: Callable[[], Iterator[Update]]) -> Iterator[Update]:
        """What some work shows; a mistake of the user is a line in a place of the page."""
        try:
            yield from work()
        except UserError as error:
            yield {place: views.trouble(str(error))}

    def _written(self, vectors: SteeringVectors) -> str:
        """The path of a file of these vectors."""
        method = str(vectors.info.get("method", ""))[:40]  # a file may say anything
        name = "".join(letter for letter in method if letter.isalnum() or letter in "-_")
        path = self.folder / uuid.uuid4().hex / f"{name or 'vectors'}.safetensors"
        vectors.save(path)
        return str(path)


def _text(example: Example) -> str:
    """What the prompt's box holds of an example: its context and its question."""
    return "\n".join(filter(None, (example.context, example.question)))
