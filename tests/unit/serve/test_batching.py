"""Continuous batching, on tiny random models of several architectures."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.serve.batches import (
    ALONE,
    CONFIGS,
    CONTEXT_TOKENS,
    VOCAB_SIZE,
    follow,
    greedy,
    has_close_call,
    make_engine,
    make_model,
    text,
    together,
)
from workloads.serve import batching
from workloads.serve.batching import Batcher
from workloads.serve.batching_alone import OneByOne
from workloads.serve.engine import Generation, Piece
from workloads.serve.loading import NonFiniteLogits
from workloads.serve.transformers_engine import TransformersEngine

PROMPT = (5, 6, 7)


def wanted(prompt: tuple[int, ...] = PROMPT, max_tokens: int = 20, **fields: Any) -> Generation:
    return Generation(prompt=prompt, max_tokens=max_tokens, **{"temperature": 0.0, **fields})


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return make_engine(make_model("llama"))


class Seen:
    """The sizes of the batches that a model is called with, (rows, tokens)."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.fail_at: int | None = None
        """The number of the call that fails, counted from now."""
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _: Any, __: Any, arguments: dict[str, Any]) -> None:
        self.shapes.append(tuple(arguments["input_ids"].shape))
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0:
                self.fail_at = None
                raise RuntimeError("the model broke down")


PROMPTS = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=60).map(tuple)


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_is_transformers_own_whoever_joins_and_leaves(kind: str) -> None:
    model = make_model(kind)
    engine = make_engine(model, max_batch=3)
    assert isinstance(engine._runner, Batcher)

    @settings(max_examples=8 if kind == "llama" else 4, deadline=None)
    @given(st.lists(st.tuples(PROMPTS, st.integers(1, 30), st.integers(0, 25)), min_size=1, max_size=6))
    def check(drawn: list[tuple[tuple[int, ...], int, int]]) -> None:
        found = together(
            engine,
            [wanted(prompt, max_tokens) for prompt, max_tokens, _ in drawn],
            after=[wait for *_, wait in drawn],
        )
        for (prompt, max_tokens, _), pieces in zip(drawn, found, strict=True):
            expected = greedy(model, prompt, max_tokens)
            assert not isinstance(pieces, BaseException)
            assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("length", max_tokens)
            if text(pieces) != asyncio.run(engine.decode(expected)):
                assert has_close_call(model, prompt, expected)

    check()


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(engine: TransformersEngine) -> None:
    model = make_model("llama")
    seen = Seen(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "PREFILL_TOKENS", 16)
        engine = make_engine(model)
        seen.shapes.clear()
        long = tuple(number % VOCAB_SIZE for number in range(70))
        first, second = together(engine, [wanted(max_tokens=40), wanted(long, 10)], after=[0, 3])
    assert text(first) == asyncio.run(engine.decode(greedy(model, PROMPT, 40)))
    assert text(second) == asyncio.run(engine.decode(greedy(model, long, 10)))
    chunks = [number for number, shape in enumerate(seen.shapes) if shape in ((1, 16), (1, 6))]
    assert len(chunks) == 5
    assert seen.shapes[chunks[0] : chunks[-1]] == [(1, 16), (1, 1)] * 4  # a step between any two


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(engine: TransformersEngine) -> None:
    sampled = [
        wanted((5, number), 20, temperature=0.5 + number / 4, top_p=(1.0, 0.9)[number % 2], seed=number)
        for number in range(6)
    ]
    alone = [text(together(engine, [each])[0]) for each in sampled]
    beside = [sampled[0], wanted(), *sampled[1:], wanted((9,), 30), sampled[2]]
    found = [text(pieces) for pieces in together(engine, beside, after=[0, 1, 2, 3, 3, 5, 8, 9, 12])]
    assert [found[0], *found[2:7], found[8]] == [*alone, alone[2]]
    assert found[1] == text(together(engine, [wanted()])[0])
    assert len(set(alone)) == len(alone)


def test_each_row_ends_where_it_asked_to(engine: TransformersEngine) -> None:
    said = greedy(engine._model, PROMPT, 30)
    whole = asyncio.run(engine.decode(said))
    at = next(number for number, token in enumerate(said) if number >= 3 and token not in said[:number])
    stop = whole[len(whole) // 2 :][:3]
    by_token, by_text, by_length, untouched = together(
        engine,
        [wanted(max_tokens=30, end_tokens=(said[at],)), wanted(max_tokens=30, stop=(stop,)), wanted(max_tokens=2),
         wanted(max_tokens=30)],
    )  # fmt: skip
    assert text(by_token) == asyncio.run(engine.decode(said[:at]))
    assert text(by_text) == whole[: whole.index(stop)]
    assert text(untouched) == whole
    ends = [pieces[-1] for pieces in (by_token, by_text, by_length, untouched) if not isinstance(pieces, BaseException)]
    assert [piece.finish_reason for piece in ends] == ["stop", "stop", "length", "length"]
    assert [ends[0].num_tokens, *(end.num_tokens for end in ends[2:])] == [at + 1, 2, 30]


def test_one_rows_nan_stays_its_own() -> None:
    """Also when its place in the cache is another row's later: 0 times NaN is NaN."""
    model = make_model("llama")
    plain = make_engine(model)
    others = [wanted((5, number), 40) for number in range(4)]
    expected = [text(pieces) for pieces in together(plain, others)]
    used = {token for number in range(4) for token in (5, number, *greedy(model, (5, number), 40))}
    late, bad = next(
        ((start,), token)
        for start in range(VOCAB_SIZE)
        for token in greedy(model, (start,), 12)[4:]
        if token not in {*used, start, *greedy(model, (start,), 4)}
    )
    engine = make_engine(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
    found = together(engine, [others[0], wanted((bad,)), wanted((8, bad, 9)), wanted(late, 40), *others[1:]])
    assert [type(each) for each in found[1:4]] == [NonFiniteLogits] * 3
    assert [text(found[0]), *(text(pieces) for pieces in found[4:])] == expected
    joined = together(engine, [others[0], wanted(late, 40), *others[1:]], after=[0, 1, 20, 25, 30])
    assert isinstance(joined[1], NonFiniteLogits)
    assert [text(joined[0]), *(text(pieces) for pieces in joined[2:])] == expected


@pytest.mark.parametrize("call", [0, 5])
def test_a_model_that_fails_fails_what_it_was_at(call: int) -> None:
    model = make_model("llama")
    seen = Seen(model)
    engine = make_engine(model)
    expected = text(together(engine, [wanted()])[0])
    seen.fail_at = call
    found = together(engine, [wanted(), wanted((8, 9))])
    assert [str(each) for each in found] == ["the model broke down"] * 2
    assert text(together(engine, [wanted()])[0]) == expected


def test_what_fails_in_a_prompt_leaves_the_batch_alone() -> None:
    model = make_model("llama")
    engine = make_engine(model)
    expected = text(together(engine, [wanted(max_tokens=40)])[0])

    def refuse(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        if 99 in arguments["input_ids"]:
            raise RuntimeError("the model broke down")

    assert 99 not in greedy(model, PROMPT, 40)
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    first, second = together(engine, [wanted(max_tokens=40), wanted((98, 99))], after=[0, 5])
    assert text(first) == expected
    assert str(second) == "the model broke down"


def test_closing_takes_the_row_out_of_the_batch() -> None:
    model = make_model("llama")
    seen = Seen(model)
    engine = make_engine(model)

    async def leave_early() -> list[Piece]:
        staying = asyncio.create_task(follow(engine, wanted(max_tokens=120)))
        stream = engine.generate(wanted((8, 9), 120))
        async with contextlib.aclosing(stream):
            async for piece in stream:
                if piece.num_tokens == 3:
                    break
        return await staying

    assert text(asyncio.run(leave_early())) == asyncio.run(engine.decode(greedy(model, PROMPT, 120)))
    widths = [rows for rows, tokens in seen.shapes if tokens == 1]
    assert 2 in widths
    assert widths[-1] == 1


def test_what_waits_and_closes_is_never_computed() -> None:
    model = make_model("llama")
    seen = Seen(model)
    engine = make_engine(model, max_batch=1)

    async def leave() -> None:
        first = engine.generate(wanted(max_tokens=100))
        await anext(first)
        second = asyncio.create_task(follow(engine, wanted((8, 9, 10, 11))))
        await anext(first)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        async for _ in first:
            pass

    asyncio.run(leave())
    text(together(engine, [wanted()])[0])
    assert (1, 4) not in seen.shapes


@pytest.mark.parametrize(
    ("limits", "most"), [({"max_batch": 2}, 2), ({"max_batch_tokens": 3 * 23 + 1}, 3), ({"max_batch_tokens": 23}, 1)]
)
def test_no_more_are_in_the_batch_than_may(limits: dict[str, int], most: int) -> None:
    model = make_model("llama")
    seen = Seen(model)
    engine = make_engine(model, **limits)
    seen.shapes.clear()
    found = together(engine, [wanted((5, 6, number)) for number in range(7)])
    for number, pieces in enumerate(found):
        assert text(pieces) == asyncio.run(engine.decode(greedy(model, (5, 6, number), 20)))
    assert max(rows for rows, _ in seen.shapes) == most


def test_what_never_fits_is_refused_by_the_length_that_the_api_checks() -> None:
    engine = make_engine(make_model("llama"), max_batch_tokens=50)
    assert engine.context_tokens == 50
    assert make_engine(make_model("llama")).context_tokens == CONTEXT_TOKENS
    (found,) = together(engine, [wanted(max_tokens=48)])
    assert isinstance(found, ValueError)


def test_an_engine_that_nobody_holds_is_freed_with_its_thread() -> None:
    before = set(threading.enumerate())
    model = make_model("llama")
    engine = make_engine(model)
    assert text(together(engine, [wanted(), wanted((8,))])[0])
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started if thread.name.startswith("generate")] == ["generate_0"]
    freed = weakref.ref(model)
    del engine, model
    gc.collect()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()
    gc.collect()  # once more: the thread may have held it until its end
    assert freed() is None


def test_an_engine_that_is_dropped_while_it_generates_ends_what_it_does() -> None:
    before = set(threading.enumerate())
    engines = [make_engine(make_model("llama"))]
    freed = weakref.ref(engines[0]._model)
    expected = asyncio.run(engines[0].decode(greedy(engines[0]._model, PROMPT, 60)))

    async def drop() -> str:
        stream = engines[0].generate(wanted(max_tokens=60))
        pieces = [await anext(stream)]
        engines.clear()
        pieces += [piece async for piece in stream]
        return text(pieces)

    assert asyncio.run(drop()) == expected
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("kind", ALONE)
def test_a_model_that_cannot_be_batched_generates_one_by_one(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(kind)
    engine = make_engine(model)
    assert isinstance(engine._runner, OneByOne)
    assert "The model generates one sequence at a time" in caplog.text
    prompts = [(5, 6, 7), tuple(range(20)), (9,)]
    sampled = wanted(temperature=1.0, seed=3)
    found = together(engine, [*(wanted(prompt) for prompt in prompts), sampled, sampled])
    for prompt, pieces in zip(prompts, found[:3], strict=True):
        assert text(pieces) == asyncio.run(engine.decode(greedy(model, prompt, 20)))
    assert text(found[3]) == text(found[4])
    assert [piece.num_tokens for piece in asyncio.run(follow(engine, wanted(max_tokens=3)))] == [1, 2, 3]


def test_a_model_whose_batch_answers_otherwise_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")

    def shift(_: Any, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """As a model would that counts positions by itself."""
        if arguments["input_ids"].shape == (3, 1):
            arguments["position_ids"] = arguments["position_ids"].max().expand(3, 1)
        return {**arguments}

    model.register_forward_pre_hook(lambda *given: ((), shift(*given)), with_kwargs=True)
    assert isinstance(make_engine(model)._runner, OneByOne)
    assert "it answers otherwise in a batch than alone" in caplog.text
