"""Tokens per second and time to the first token under 1, 8 and 32 clients: Headway, and two peers with the same model.

Headway is its real application on Ray Serve with an S3 server of its own. The peers are the server that a person would
write with FastAPI and ``generate`` (serving_plain.py), and ``transformers serve``. All of them have the same number of
threads for tensor operations, and stream greedy answers to the same prompts. They take turns, in each round in another
order, after one request each that does not count.

    make bench NAME=serving
    python -m tests.bench.serving --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import httpx
import tokenizers
import torch
import transformers

from orchestrator.targets.ports import is_free
from tests.bench.harness import at_least, at_most, finish, say, spread
from tests.bench.server import s3_store
from tests.integration.serving import promote, ray_with_serve, serving, wait_for
from tests.tiny_model import END_OF_TEXT, make_tokenizer, release_version

MODEL = "bench"
CLIENTS = {1: 4, 8: 1, 32: 1}
"""How many clients at once, and how many requests each of them makes, one after the other."""
PROMPT_TOKENS, MAX_TOKENS = 64, 32
LAYERS, HIDDEN, VOCABULARY, CONTEXT_TOKENS = 6, 384, 4096, 1024
MIN_RATES = {1: 0.95, 32: 2.0}
MAX_FIRST_TOKEN = 1.0
_START_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    name: str
    url: str
    model: str
    """As its requests name it."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One streamed answer."""

    first_s: float
    """From the request to the first piece of text."""
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2))
    asked = parser.parse_args()
    if asked.rounds < 2:
        parser.error("--rounds: quartiles need two or more")
    with tempfile.TemporaryDirectory(prefix="headway-bench-") as folder, contextlib.ExitStack() as stack:
        directory = save_model(Path(folder) / "model")
        prompts = make_prompts(directory)
        contenders = [
            stack.enter_context(headway(directory, Path(folder), num_threads=asked.threads)),
            stack.enter_context(plain(directory, Path(folder), num_threads=asked.threads)),
        ]
        try:
            contenders.append(stack.enter_context(transformers_serve(directory, Path(folder), asked.threads)))
        except RuntimeError as e:
            say(f"transformers serve does not run here: {e}")
        rounds = asyncio.run(measure(contenders, prompts, num_rounds=asked.rounds))
        equal = count_equal(contenders[0], directory, prompts[:8])
    report(rounds, num_threads=asked.threads, equal=equal)


def save_model(directory: Path) -> Path:
    """A random Llama that ends at no token, with a tokenizer of the standard library's text."""
    tokenizer = make_tokenizer(VOCABULARY, texts=_corpus())
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    say(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    model.save_pretrained(directory)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(directory)
    return directory


def make_prompts(directory: Path) -> list[str]:
    """One for each client, of as many tokens each, whichever way they are split."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode("".join(_corpus())).ids
    return [tokenizer.decode(ids[at : at + PROMPT_TOKENS]) for at in range(0, max(CLIENTS) * 500, 500)]


def _corpus() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [(root / name).read_text() for name in ("argparse.py", "ast.py", "datetime.py", "inspect.py", "typing.py")]


@contextlib.contextmanager
def headway(directory: Path, folder: Path, *, num_threads: int) -> Iterator[Contender]:
    from ray import serve

    from workloads.serve.app import build

    with s3_store(folder) as store, ray_with_serve(folder / "cache") as port:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Ray has set its own, which leaves the servers
        promote(store, MODEL, release_version(store, MODEL, directory).number)
        serve.run(
            build({"model": MODEL, "store": store.uri, "num_threads": num_threads}), name="bench", route_prefix="/"
        )
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: serving(url) == 1)
        yield Contender(name="headway", url=url, model=MODEL)


@contextlib.contextmanager
def plain(directory: Path, folder: Path, *, num_threads: int) -> Iterator[Contender]:
    port = _free_port()
    command = [sys.executable, "-m", "tests.bench.serving_plain", str(directory), str(port), str(num_threads)]
    with _server(command, port, folder / "plain.log", num_threads):
        yield Contender(name="plain", url=f"http://127.0.0.1:{port}", model=MODEL)


@contextlib.contextmanager
def transformers_serve(directory: Path, folder: Path, num_threads: int) -> Iterator[Contender]:
    """
    Raises:
        RuntimeError: it ended at once, and what it said last.
    """
    port = _free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(directory), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with _server(command, port, folder / "transformers.log", num_threads):
        yield Contender(name="transformers serve", url=f"http://127.0.0.1:{port}", model=str(directory))


@contextlib.contextmanager
def _server(command: Sequence[str], port: int, log: Path, num_threads: int) -> Iterator[None]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + _START_S
        while not _is_up(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)}: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _is_up(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    return next(port for port in range(33000 + os.getpid() % 5000, 60000) if is_free(port))


async def measure(
    contenders: Sequence[Contender], prompts: Sequence[str], *, num_rounds: int
) -> list[dict[tuple[str, int], dict[str, float]]]:
    """Of each round, by contender and clients: tokens per second, and the clients' median time to the first token."""
    rounds: list[dict[tuple[str, int], dict[str, float]]] = []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        for contender in contenders:
            await ask(session, contender, prompts[0])
        for number in range(num_rounds):
            found = {}
            for num_clients in CLIENTS:
                shift = number % len(contenders)
                for contender in [*contenders[shift:], *contenders[:shift]]:
                    figures = await load(session, contender, prompts, num_clients)
                    found[contender.name, num_clients] = figures
                    say(
                        f"round {number + 1}, {num_clients:2} clients, {contender.name:18}: "
                        f"{figures['tokens_per_s']:6.1f} tokens/s, first after {figures['first_token_s']:.3f} s"
                    )
            rounds.append(found)
    return rounds


async def load(
    session: aiohttp.ClientSession, contender: Contender, prompts: Sequence[str], num_clients: int
) -> dict[str, float]:
    async def client(number: int) -> list[Answered]:
        return [await ask(session, contender, prompts[number]) for _ in range(CLIENTS[num_clients])]

    started = time.perf_counter()
    answers = [each for found in await asyncio.gather(*map(client, range(num_clients))) for each in found]
    took_s = time.perf_counter() - started
    return {
        "tokens_per_s": len(answers) * MAX_TOKENS / took_s,
        "first_token_s": median(answer.first_s for answer in answers),
    }


async def ask(session: aiohttp.ClientSession, contender: Contender, prompt: str) -> Answered:
    body = {"model": contender.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    started, first_s, texts = time.perf_counter(), 0.0, []
    async with session.post(f"{contender.url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                text = choices[0].get("text") if choices else None
                if text:
                    first_s = first_s or time.perf_counter() - started
                    texts.append(text)
    assert texts, f"{contender.name} answered nothing"
    return Answered(first_s=first_s, text="".join(texts))


def count_equal(contender: Contender, directory: Path, prompts: Sequence[str]) -> dict[str, int]:
    """How many of Headway's answers, asked for at once, are those of ``generate`` alone."""

    async def answers() -> list[Answered]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(ask(session, contender, prompt) for prompt in prompts))

    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    num_equal = 0
    for prompt, answer in zip(prompts, asyncio.run(answers()), strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS)
        num_equal += answer.text == tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return {"equal": num_equal, "asked": len(prompts)}


def report(
    rounds: Sequence[dict[tuple[str, int], dict[str, float]]], *, num_threads: int, equal: dict[str, int]
) -> None:
    names = list(dict.fromkeys(name for name, _ in rounds[0]))
    figures: dict[str, Any] = {"threads": num_threads, "answers_as_generate": equal}
    targets: dict[str, dict[str, Any]] = {"answers as generate": at_least(equal["equal"], equal["asked"])}
    say(f"{'clients':>7}  {'server':18}  {'tokens/s':>22}  {'first token, s':>22}")
    for num_clients in CLIENTS:
        for name in names:
            found = {
                figure: spread([each[name, num_clients][figure] for each in rounds])
                for figure in ("tokens_per_s", "first_token_s")
            }
            figures[f"{name}, {num_clients}"] = found
            say(f"{num_clients:7}  {name:18}  {_shown(found['tokens_per_s'], 1)}  {_shown(found['first_token_s'], 3)}")
        ratios = {
            figure: spread(
                [each["headway", num_clients][figure] / each["plain", num_clients][figure] for each in rounds]
            )
            for figure in ("tokens_per_s", "first_token_s")
        }
        figures[f"headway over plain, {num_clients}"] = ratios
        if num_clients in MIN_RATES:
            name = f"tokens/s over plain, {num_clients} clients"
            targets[name] = at_least(ratios["tokens_per_s"]["median"], MIN_RATES[num_clients])
        name = f"first token over plain, {num_clients} clients"
        targets[name] = at_most(ratios["first_token_s"]["median"], MAX_FIRST_TOKEN)
    finish("serving", figures, targets)


def _shown(value: dict[str, float], digits: int) -> str:
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f} – {value['q3']:.{digits}f})".rjust(22)


if __name__ == "__main__":
    main()
