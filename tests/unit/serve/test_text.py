from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_model import make_tokenizer
from workloads.serve.text import Detokenizer, StopSequences

TOKENIZER = make_tokenizer()


def decode(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=True)


def pieces(tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.flush()]


def byte_tokens(text: str) -> list[int]:
    """One token per byte: every character outside ASCII is split."""
    return [token for char in text for token in _alphabet(char)]


def _alphabet(char: str) -> list[int]:
    encoded = TOKENIZER.pre_tokenizer.pre_tokenize_str(char)
    return [TOKENIZER.token_to_id(byte) for part, _ in encoded for byte in part]


@given(st.text())
def test_pieces_of_any_text_join_and_break_no_character(text: str) -> None:
    for tokens in (TOKENIZER.encode(text).ids, byte_tokens(text)):
        got = pieces(tokens)
        assert "".join(got) == decode(tokens)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in got)


@given(st.lists(st.integers(0, TOKENIZER.get_vocab_size() - 1)))
def test_pieces_of_any_tokens_join_to_their_decoding(tokens: list[int]) -> None:
    """A model may well generate what is no UTF-8."""
    assert "".join(pieces(tokens)) == decode(tokens)


def test_a_character_comes_with_its_last_byte() -> None:
    tokens = byte_tokens("a🙂b")
    assert pieces(tokens) == ["a", "", "", "", "🙂", "b", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    assert pieces(byte_tokens("a漢")[:-1]) == ["a", "", "", "\ufffd"]


texts = st.text(alphabet="ab\n", max_size=30)


@given(texts, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4), st.data())
def test_stop_cuts_where_the_whole_text_would_be_cut(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stopper = StopSequences(stops)
    got = ""
    for part in parts:
        got += stopper.add(part)
        if stopper.hit:
            break
    got += stopper.flush()
    at = [text.find(stop) for stop in stops if stop in text]
    if not at:
        assert got == text
        assert not stopper.hit
    else:
        assert stopper.hit
        # Fed in pieces, the first stop sequence that is complete wins, as in a stream.
        assert text.startswith(got)
        assert any(text.startswith(stop, len(got)) for stop in stops)
        assert not any(stop in got for stop in stops)


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        ((), ["a", "b"], ["a", "b", ""]),
        (("\n\n",), ["a\n", "\nb"], ["a", "", ""]),
        (("\n\n",), ["a\n", "b"], ["a", "\nb", ""]),
        (("xyz",), ["wxy"], ["w", "xy"]),
        (("ab", "b"), ["ab"], ["", ""]),
    ],
)
def test_stop_sequences(stops: tuple[str, ...], parts: list[str], expected: list[str]) -> None:
    stopper = StopSequences(stops)
    assert [*(stopper.add(part) for part in parts), stopper.flush()] == expected
