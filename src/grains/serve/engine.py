"""The thread that writes the texts of all requests, in one running batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from grains.decoding import Decoder, Row, Step, written
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.selfcheck import can_decode


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    max_rows: texts that are written together. max_waiting: texts that wait beside them.
    max_tokens: the longest answer. max_positions: rows times the tokens of the longest (see
    `Decoder`). max_bytes: the longest request.
    """

    max_rows: int = 64
    max_waiting: int = 256
    max_tokens: int = 1024
    max_positions: int = 65536
    max_bytes: int = 2**22


@dataclass(frozen=True)
class Token:
    """A token of a text: its log-probability, and the likeliest tokens with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Part:
    """What a text is longer by. ended: '' while it is written, otherwise see `Row.ended`."""

    text: str
    tokens: tuple[Token, ...] = ()
    ended: str = ""


@dataclass(eq=False)
class Job:
    """A text that a request asks for, and where its parts go.

    send: called from the engine's thread with each part, or with what went wrong.
    top: how many of the likeliest tokens are wanted beside each; None: no log-probabilities.
    """

    row: Row
    send: Callable[[Part | Exception], None]
    top: int | None = None
    sent: int = 0  # characters
    held: list[Token] = field(default_factory=list)


class Full(UserError):
    """No more texts can wait."""


class Engine:
    """Writes the texts of jobs in a thread of its own. Raises UserError for a model that it cannot.

    A `with` block stops the thread at its end.
    """

    def __init__(self, lm: LanguageModel, limits: Limits):
        if not can_decode(lm):
            raise UserError(
                f"{lm.name}: its cache holds more than keys and values, so its texts cannot be "
                "written in a running batch; use another model, or steering_generation.py"
            )
        self.lm, self.limits = lm, limits
        self.decoder = Decoder(lm, limits.max_positions, limits.max_rows)
        self.jobs: dict[Row, Job] = {}
        self.come: list[Job] = []
        self.gone: list[Row] = []
        self.changed = threading.Condition()
        self.stopped = False
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def __enter__(self) -> Engine:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()

    def submit(self, jobs: list[Job]) -> None:
        """Take some jobs, all or none. Raises Full if they cannot wait."""
        with self.changed:
            present = len(self.jobs) + len(self.come)
            if present + len(jobs) > self.limits.max_rows + self.limits.max_waiting:
                raise Full(f"{present} texts are being written or wait: try again later")
            self.come += jobs
            self.changed.notify()

    def cancel(self, rows: list[Row]) -> None:
        """Stop writing some texts; those that have ended are no mistake."""
        with self.changed:
            self.gone += rows
            self.changed.notify()

    @property
    def load(self) -> tuple[int, int]:
        """How many texts are written, and how many wait."""
        with self.changed:
            active = len(self.decoder.active)
            return active, len(self.jobs) + len(self.come) - active

    def _run(self) -> None:
        while True:
            with self.changed:
                while not (self.come or self.gone or self.jobs or self.stopped):
                    self.changed.wait()
                if self.stopped:
                    return
                for job in self.come:
                    self.jobs[job.row] = job
                    self.decoder.submit(job.row)
                for row in self.gone:
                    if self.jobs.pop(row, None):
                        self.decoder.cancel(row)
                self.come, self.gone = [], []
            try:
                steps = self.decoder.step()
            except Exception as error:  # out of memory, for example: the next requests can go on
                self._fail(error)
                continue
            for step in steps:
                self._tell(step)

    def _fail(self, error: Exception) -> None:
        """All texts end with an error, and the batch begins anew."""
        with self.changed:
            failed, self.jobs = [*self.jobs.values()], {}
            self.decoder = Decoder(self.lm, self.limits.max_positions, self.limits.max_rows)
        for job in failed:
            job.send(error)

    def _tell(self, step: Step) -> None:
        """Hand on what a text is longer by, as far as it is certain."""
        row = step.row
        job = self.jobs[row]
        if job.top is not None:
            job.held.append(_token(step, job.top))
        text = written(self.lm, row)
        if row.ended:
            end = len(text)
            with self.changed:
                self.jobs.pop(row, None)
        else:
            # The last characters may be half of one, or the beginning of a text that ends it.
            end = len(text.rstrip("\ufffd")) - max((len(stop) - 1 for stop in row.stop), default=0)
        if end > job.sent or row.ended:
            part = Part(text[job.sent : end], tuple(job.held), row.ended)
            job.sent, job.held = max(end, job.sent), []
            job.send(part)


def _token(step: Step, top: int) -> Token:
    logprobs = step.logits.float().log_softmax(-1)
    likeliest = torch.topk(logprobs, top)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return Token(step.token, logprobs[step.token].item(), tuple(pairs))
