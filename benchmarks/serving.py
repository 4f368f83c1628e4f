"""How fast the server is: clients at the same time against one after the other, and for minutes.

    python benchmarks/serving.py                 # 16 clients against one at a time, then 64
    python benchmarks/serving.py --minutes 0     # without the 64

A server of the embedded model runs as a process of its own. Every request asks another question of
`misconceptions`, greedily; every second is steered, at strengths that all differ. Each phase begins
with the same requests, and a sample of the answers is asked for again alone, to be compared. The
table goes into RESULTS.md. Processor seconds are the server's, of all its threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from bench import machine  # noqa: E402

from grains import data  # noqa: E402
from grains.cli import documents  # noqa: E402

MODEL = "smollm2-135m-instruct"
TOKENS = 64
CLIENTS, MANY = 16, 64
AGAIN = 16  # answers that are asked for again


@dataclass(frozen=True)
class Phase:
    """What was measured. latencies: seconds of each request. tokens: written in all."""

    name: str
    latencies: list[float]
    tokens: int
    seconds: float
    processor: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def work(self) -> float:
        return self.tokens / self.processor

    def row(self) -> str:
        p50, p95 = (statistics.quantiles(self.latencies, n=20)[place] for place in (9, 18))
        return (
            f"| {self.name} | {len(self.latencies)} | {self.rate:.0f} | "
            f"{self.work:.0f} | {p50:.1f} | {p95:.1f} |"
        )


class Asker:
    """Asks a server, question after question."""

    def __init__(self, port: int):
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0
        )
        rows, source = data.load("misconceptions", "test")
        self.questions = [data.read(rows, source, index).question for index in range(len(rows))]

    def ask(self, number: int) -> tuple[str, int, float]:
        """The answer to a question, its tokens, and the seconds it took."""
        steering = {"vectors": "gradient", "alpha": 0.005 + 0.00001 * number}
        begin = time.perf_counter()
        answer = self.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": self.questions[number % len(self.questions)]}],
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"steering": steering} if number % 2 else None,
        )
        seconds = time.perf_counter() - begin
        return answer.choices[0].message.content, answer.usage.completion_tokens, seconds


def phase(
    name: str, server: psutil.Process, clients: int, ask: Callable, numbers: range, seconds: float
) -> tuple[Phase, dict[int, str]]:
    """Ask all numbers by so many clients; then, until the seconds are over, those that follow.

    Returns the answers by the number too.
    """
    before, begin = sum(server.cpu_times()[:2]), time.perf_counter()

    def work(client: int) -> list[tuple[int, tuple[str, int, float]]]:
        own = []
        number = numbers.start + client
        while number < numbers.stop or time.perf_counter() - begin < seconds:
            own.append((number, ask(number)))
            number += clients
        return own

    with ThreadPoolExecutor(clients) as pool:
        given = dict(pair for own in pool.map(work, range(clients)) for pair in own)
    answers = given.values()
    measured = Phase(
        name,
        [seconds for *_, seconds in answers],
        sum(tokens for _, tokens, _ in answers),
        time.perf_counter() - begin,
        sum(server.cpu_times()[:2]) - before,
    )
    return measured, {number: text for number, (text, *_) in given.items()}


def started(port: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "serve.py", "--port", str(port), "--fit", "gradient"],
        cwd=ROOT / "src",
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "Uvicorn running" in line:
            return process
    sys.exit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--requests", type=int, default=32, help="of the phases that are compared")
    parser.add_argument("--minutes", type=float, default=3, help="with 64 clients")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "RESULTS.md")
    args = parser.parse_args()
    process = started(args.port)
    try:
        # Its log is read, or its pipe would fill.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(process.stderr.read)
            text = measure(psutil.Process(process.pid), Asker(args.port), args)
            process.terminate()
    finally:
        process.kill()
    documents.write_between(args.output, "serving", [text])
    print(text)


def measure(server: psutil.Process, asker: Asker, args: argparse.Namespace) -> str:
    numbers = range(args.requests)
    asker.ask(0), asker.ask(1)
    alone, texts = phase("one at a time", server, 1, asker.ask, numbers, 0)
    together, same = phase(f"{CLIENTS} clients", server, CLIENTS, asker.ask, numbers, 0)
    phases = [alone, together]
    equal = f"{sum(texts[number] == same[number] for number in numbers)} of {len(texts)}"
    lasting = ""
    if args.minutes:
        many, answers = phase(
            f"{MANY} clients", server, MANY, asker.ask, range(MANY), 60 * args.minutes
        )
        phases.append(many)
        asked = sorted(answers)[:: max(1, len(answers) // AGAIN)]
        right = sum(asker.ask(number)[0] == answers[number] for number in asked)
        lasting = (
            f" {MANY} clients asked for {many.seconds / 60:.1f} minutes without an error; of "
            f"{len(asked)} of their answers, {right} are to the letter what each gets alone."
        )
    lines = [
        f"Measured {time.strftime('%Y-%m-%d')} on {machine()}, load average "
        f"{os.getloadavg()[0]:.1f} at the end.",
        "",
        f"{MODEL}, fp32, {TOKENS} tokens at most, every second request steered, each at a strength "
        "of its own.",
        "",
        "| | requests | tokens per second | tokens per processor second | p50, s | p95, s |",
        "|---|---|---|---|---|---|",
        *(item.row() for item in phases),
        "",
        f"{CLIENTS} clients have {together.rate / alone.rate:.1f}x the throughput of one at a time "
        f"({together.work / alone.work:.1f}x per processor second), and {equal} answers are the "
        f"same to the letter.{lasting}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
