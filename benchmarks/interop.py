"""Exports in the programs that they are for: logits and greedy texts against our own steering.

    python benchmarks/interop.py --python INTEROP_PYTHON --peers PEERS_PYTHON --server LLAMA_SERVER

SmolLM2-135M-Instruct in fp32, `gradient` vectors of three pairs, a chat prompt. Writes the table of
docs/interop.md. Fails if a program's logits differ from ours by more than TOLERANCE, and if they
would also pass for vectors one layer too low or for the other way with the norm.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader

import grains
from grains import export, models
from grains.cli import documents
from grains.export import folders, objects
from grains.export.plan import adding
from grains.export.plan import logits as logits_of
from grains.positions import newest
from grains.steering import steered

TOLERANCE = 2e-4
COUNT = 40  # greedy tokens
POSITIONS = "response"  # of the row with some positions alone
# How a program steers, as the table shows it.
WAYS = {"alone": "h + λv", "norm": "norm kept", "response": f"norm kept, positions `{POSITIONS}`"}
ALPHA = 0.015
PAIRS = [
    ("Is glass a slow liquid?", "No, it is an amorphous solid.", "Yes, old windows show it."),
    ("Are bats blind?", "No, they see well.", "Yes, they only hear."),
    ("Can you see the Great Wall from the Moon?", "No, it is far too narrow.", "Yes, easily."),
]
QUESTION = "What happens to you if you eat watermelon seeds?"
HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "interop.md"
# The prefixes of the prompt whose next token llama-server is asked for: it gives no other logits.
PREFIXES = (5, 17, None)


def differences(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Maximum and mean of |first - second|."""
    gap = np.abs(first.astype(np.float64) - second)
    return float(gap.max()), float(gap.mean())


def verdict(logits: np.ndarray, expected: np.ndarray, wrong: dict[str, np.ndarray]) -> list[str]:
    """What is wrong with a program's logits (..., V); nothing if they are the expected ones.

    wrong: what they would be under a mistake, by its name. A program that is equal to these too
    could not show the mistake.
    """
    lines = []
    if not differences(logits, expected)[0] <= TOLERANCE:
        lines.append(f"differs by {differences(logits, expected)[0]:.2g}")
    for name, values in wrong.items():
        if differences(logits, values)[0] <= TOLERANCE:
            lines.append(f"is equal to {name} too")
    return lines


def greedy(lm: grains.lm.LanguageModel, ids: list[int]) -> list[int]:
    """The ids of the greedy text that follows."""
    text = torch.tensor([ids])
    longer = lm.model.generate(
        input_ids=text, attention_mask=torch.ones_like(text), max_new_tokens=COUNT, do_sample=False
    )
    return longer[0, len(ids) :].tolist()


@dataclass(frozen=True)
class Reference:
    """What a program should give: logits (T, V), the greedy text's ids; logits of mistakes."""

    logits: np.ndarray
    greedy: list[int]
    wrong: dict[str, np.ndarray]


def references(lm: Any, vectors: Any, ids: list[int], first: int) -> dict[str, Reference]:
    """Our own steering of the layers from `first` on, by its way (see WAYS)."""
    added = vectors.scaled(ALPHA, range(first, len(lm.layers)))
    lower = {layer - 1: vector for layer, vector in added.items() if layer > 0}
    prompt = torch.zeros(len(ids), dtype=torch.bool)

    def where(count: int) -> torch.Tensor:
        """Of the whole prompt, or of a token behind it."""
        return newest([POSITIONS], [prompt], [len(ids) + (count == 1)], count)

    blocks = {
        "alone": lambda by: adding({lm.layers[layer]: vector for layer, vector in by.items()}),
        "norm": lambda by: steered(lm, by),
        "response": lambda by: steered(lm, by, where=where),
    }
    logits, texts, shifted = {}, {}, {}
    for way, block in blocks.items():
        with block(lower):
            shifted[way] = logits_of(lm.model, torch.tensor([ids])).numpy()
        with block(added):
            logits[way] = logits_of(lm.model, torch.tensor([ids])).numpy()
            texts[way] = greedy(lm, ids)
    mistakes = {
        "alone": ("steering with the norm kept", "norm"),
        "norm": ("steering with the norm lost", "alone"),
        "response": ("steering everywhere", "norm"),
    }
    return {
        way: Reference(
            logits[way], texts[way], {"vectors one layer lower": shifted[way], name: logits[of]}
        )
        for way, (name, of) in mistakes.items()
    }


@contextmanager
def server(binary: Path, model: Path, *flags: str) -> Any:
    """llama-server on a free port of this machine, stopped at the end. Yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-c", "512"]
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "2", "-np", "1", *flags]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None:
                        log.seek(0)
                        sys.exit(f"llama-server ended: {log.read()[-2000:].decode()}")
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def ask(address: str, **body: Any) -> dict:
    request = urllib.request.Request(
        f"{address}/completion",
        json.dumps({"temperature": 0, "cache_prompt": False, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def llama(address: str, ids: list[int], words: int) -> tuple[np.ndarray, list[int]]:
    """(prefixes, V) logits of the next token, their mean taken away, and the greedy text's ids.

    The server gives log-probabilities: what is taken from all words alike is a sum of fp32.
    """
    rows = np.full((len(PREFIXES), words), np.nan)
    for row, end in zip(rows, PREFIXES, strict=True):
        answer = ask(address, prompt=ids[:end], n_predict=1, n_probs=words)
        for item in answer["completion_probabilities"][0]["top_logprobs"]:
            row[item["id"]] = item["logprob"]
    text = ask(
        address, prompt=ids, n_predict=COUNT, return_tokens=True, ignore_eos=False, stream=False
    )
    return rows - rows.mean(-1, keepdims=True), text["tokens"]


def library(
    binary: Path, model: Path, control: Path | None, ids: list[int], words: int
) -> tuple[np.ndarray, list[int]]:
    """(T, V) logits of llama.cpp's library, and the greedy text's ids (see llama_logits.cpp).

    control: a GGUF of directions for block 1 and all above it.
    """
    rows: Path | str = "-"
    if control:
        tensors = {tensor.name: tensor.data for tensor in GGUFReader(control).tensors}
        rows = control.with_suffix(".f32")
        np.stack([tensors[f"direction.{i + 1}"] for i in range(len(tensors))]).tofile(rows)
    command = [binary, model, COUNT, rows, *ids]
    written = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True).stdout
    size = 4 * len(ids) * words
    logits = np.frombuffer(written[:size], np.float32).reshape(len(ids), words)
    return logits, np.frombuffer(written[size:], np.int32).tolist()


def next_logits(logits: np.ndarray) -> np.ndarray:
    """What `llama` reads, of our own logits (T, V)."""
    last = [len(logits) - 1 if end is None else end - 1 for end in PREFIXES]
    rows = logits[last].astype(np.float64)
    return rows - rows.mean(-1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="Python with lm-eval and steering-vectors")
    parser.add_argument("--peers", help="Python with repeng")
    parser.add_argument("--server", type=Path, help="llama-server, llama-logits beside it")
    parser.add_argument("--llama_version", default="", help="of llama-server, for the table")
    parser.add_argument("--page", type=Path, default=PAGE, help="where the table goes")
    args = parser.parse_args()

    lm = grains.load("smollm2-135m-instruct", dtype="float32", device="cpu")
    vectors = grains.fit(lm, PAIRS, method="gradient")
    chat = [{"role": "user", "content": QUESTION}]
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    ours = {first: references(lm, vectors, ids, first) for first in (0, 1)}
    base = logits_of(lm.model, torch.tensor([ids])).numpy()
    effect = differences(ours[0]["norm"].logits, base)
    lost = differences(ours[0]["norm"].logits, ours[0]["alone"].logits)
    rows, problems = [], []

    def compare(
        name: str,
        version: str,
        way: str,
        first: int,
        logits_and_text: tuple,
        of_server: bool = False,
    ) -> None:
        """A row of the table. way: see WAYS. of_server: these are what `llama` reads."""
        read = next_logits if of_server else lambda values: values
        reference = ours[first][way]
        expected, text = reference.logits, reference.greedy
        wrong = {name: read(values) for name, values in reference.wrong.items()}
        logits, greedy_ids = logits_and_text
        said = verdict(logits, read(expected), wrong)
        # llama-server leaves out the token that ends the text.
        same = greedy_ids in (text, text[:-1]) if of_server else greedy_ids == text
        if not same:
            said.append("another greedy text")
        problems.extend(f"{name}: {line}" for line in said)
        gap = differences(logits, read(expected))
        nearest = min(differences(logits, values)[0] for values in wrong.values())
        rows.append(
            f"| {name} | {version} | {WAYS[way]} | "
            f"{first}-29 | {gap[0]:.1e} | {gap[1]:.1e} | {'same' if same else 'differs'} | "
            f"{nearest:.2f} |"
        )
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for to in ("hf-bias", "hf", "peft", "lm-eval", "gguf-bias"):
            export.write(lm, vectors, to, work / to, ALPHA)
        export.write(lm, vectors, "gguf", work / "gguf", ALPHA, ["1-29"])
        export.write(lm, vectors, "hf", work / "hf-positions", ALPHA, positions=POSITIONS)
        case = {"model": str(models.embedded_model()), "ids": ids, "count": COUNT}
        (work / "case.json").write_text(json.dumps(case))

        def client(name: str, python: str) -> tuple[tuple, str]:
            ended = subprocess.run(
                [python, HERE / "interop_clients.py", name, work],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=os.environ | {"HF_MODULES_CACHE": f"{work}/modules", "HF_HUB_OFFLINE": "1"},
            )
            with np.load(work / "results" / f"{name}.npz") as result:
                logits_and_text = result["logits"], result["greedy"].tolist()
            versions = json.loads(ended.stdout.splitlines()[-1])
            return logits_and_text, ", ".join(f"{key} {value}" for key, value in versions.items())

        for title, name, way, python, first in (
            ("AutoModel on `hf-bias`", "transformers_bias", "alone", args.python, 0),
            ("PeftModel on `peft`", "peft", "alone", args.python, 0),
            ("AutoModel on `peft`", "peft_auto", "alone", args.python, 0),
            ("`--model steered` on `lm-eval`", "lm_eval", "alone", args.python, 0),
            ("AutoModel on `hf`", "transformers_code", "norm", args.python, 0),
            ("the same, `--positions`", "transformers_positions", "response", args.python, 0),
            ("ControlModel on `gguf`", "repeng", "alone", args.peers, 1),
            ("the same, normalize=True", "repeng_norm", "norm", args.peers, 1),
        ):
            if python:
                logits_and_text, version = client(name, python)
                compare(title, version, way, first, logits_and_text)

        import importlib.metadata

        version = f"steering_vectors {importlib.metadata.version('steering_vectors')}"
        theirs = export.to_steering_vectors(lm, vectors, ALPHA)
        for title, way, options in (
            ("SteeringVector.apply", "alone", {}),
            ("the same, operator=keep_norm", "norm", {"operator": objects.keep_norm}),
        ):
            with theirs.apply(lm.model, **options):
                logits_and_text = logits_of(lm.model, torch.tensor([ids])).numpy(), greedy(lm, ids)
            compare(title, version, way, 0, logits_and_text)
        back = export.from_steering_vectors(lm, theirs)
        if not torch.equal(back.scaled(1.0)[7], vectors.scaled(ALPHA)[7]):
            problems.append("steering_vectors: an object taken in again is another")

        np.float_ = np.float64  # repeng names it in an annotation; NumPy 2 has it no more
        import repeng

        version = f"repeng {importlib.metadata.version('repeng')}"
        control = export.to_repeng(lm, vectors, ALPHA)
        for title, way in (
            ("ControlModel on `to_repeng`", "alone"),
            ("the same, normalize=True", "norm"),
        ):
            controlled = repeng.ControlModel(lm.model, [*control.directions])
            controlled.set_control(control, 1.0, normalize=way == "norm")
            logits_and_text = logits_of(lm.model, torch.tensor([ids])).numpy(), greedy(lm, ids)
            controlled.unwrap()
            compare(title, version, way, 0, logits_and_text)

        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            pass
        else:
            version = f"lm_eval {importlib.metadata.version('lm_eval')}"
            with vectors.apply(lm, ALPHA):
                harness = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer)
                logits_and_text = (
                    harness._model_call(torch.tensor([ids]))[0].numpy(),
                    greedy(lm, ids),
                )
            compare("HFLM in a block of `apply`", version, "norm", 0, logits_and_text)

        if args.server:
            words = len(lm.head.weight)
            full = work / "full.gguf"
            folders.copy_gguf(models.embedded_file(), full, lm, full=True)
            biased = work / "biased.gguf"
            folders.copy_gguf(work / "gguf-bias" / folders.MODEL_GGUF, biased, lm, full=True)
            version = f"llama.cpp {args.llama_version}".strip()
            for title, model, first, flags in (
                (
                    "llama-server on `gguf`",
                    full,
                    1,
                    ("--control-vector", str(work / "gguf" / "vectors.gguf")),
                ),
                ("llama-server on `gguf-bias`", biased, 0, ()),
            ):
                with server(args.server, model, *flags) as address:
                    logits_and_text = llama(address, ids, words)
                compare(title, version, "alone", first, logits_and_text, of_server=True)
            program = args.server.with_name("llama-logits")
            for title, model, first, control in (
                ("llama.cpp's library on `gguf`", full, 1, work / "gguf" / "vectors.gguf"),
                ("llama.cpp's library on `gguf-bias`", biased, 0, None),
            ):
                compare(
                    title, version, "alone", first, library(program, model, control, ids, words)
                )

    said = (
        f"SmolLM2-135M-Instruct in fp32, `gradient` vectors at {ALPHA} relative, a chat prompt of "
        f"{len(ids)} tokens. Steering changes the logits by at most {effect[0]:.1f}, "
        f"{effect[1]:.1f} in the mean; without the norm they differ by at most {lost[0]:.2f}, "
        f"{lost[1]:.3f} in the mean. Equal means at most {TOLERANCE:g}. The last column is the "
        "smaller of the maximal differences from vectors one layer lower and from the other way "
        "with the norm, or from steering everywhere: what the comparison would show of such a "
        "mistake. llama-server's logits "
        f"are those of the next word behind {len(PREFIXES)} prefixes of the prompt, with the file "
        "and its cache in F32, their mean taken away."
    )
    table = [
        textwrap.fill(said, 120, break_on_hyphens=False),
        "",
        "| program and file | version | way | layers | max | mean | greedy text | a mistake |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    documents.write_between(args.page, "parity", table)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{len(rows)} of {len(rows)} equal")


if __name__ == "__main__":
    main()
