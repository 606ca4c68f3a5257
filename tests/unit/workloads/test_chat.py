"""Which tokens of a conversation are targets, against masks written by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.rows import target_ids
from tests.unit.workloads import chat_templates as templates
from workloads.prepare.chat import ChatTemplate, target_mask
from workloads.prepare.messages import Encoded, encode
from workloads.prepare.records import Conversation, Unusable
from workloads.prepare.vocabulary import load_backend

CONVERSATION: Conversation = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello there, friend."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Good bye."},
]


def masked(tokenizer: Any, conversation: Conversation) -> list[tuple[str, bool]]:
    """Each token of the whole conversation as the vocabulary spells it, and whether it is a target."""
    rendered = ChatTemplate(tokenizer).render(conversation)
    encoding = load_backend(tokenizer.backend_tokenizer.to_str().encode()).encode(
        rendered.text, add_special_tokens=False
    )
    mask = target_mask(encoding.offsets, rendered.spans)
    return list(zip(encoding.tokens, mask.tolist(), strict=True))


def by_hand(*pieces: tuple[str, bool]) -> list[tuple[str, bool]]:
    """(tokens with blanks between them, whether they are targets)."""
    return [(token, is_target) for tokens, is_target in pieces for token in tokens.split()]


def test_the_mask_of_chatml() -> None:
    assert masked(templates.byte_level("chatml", templates.CHATML), CONVERSATION) == by_hand(
        ("<|im_start|> system Ċ You Ġare Ġterse . <|im_end|> Ċ", False),
        ("<|im_start|> user Ċ Hi ! <|im_end|> Ċ <|im_start|> assistant Ċ", False),
        ("Hello Ġthere , Ġfriend . <|im_end|>", True),
        ("Ċ <|im_start|> user Ċ And Ġthen ? <|im_end|> Ċ <|im_start|> assistant Ċ", False),
        ("Good Ġbye . <|im_end|>", True),
        ("Ċ", False),
    )


def test_the_mask_of_llama_3() -> None:
    assert masked(templates.byte_level("llama", templates.LLAMA), CONVERSATION) == by_hand(
        ("<|begin_of_text|> <|start_header_id|> system <|end_header_id|> Ċ Ċ You Ġare Ġterse . <|eot_id|>", False),
        ("<|start_header_id|> user <|end_header_id|> Ċ Ċ Hi ! <|eot_id|>", False),
        ("<|start_header_id|> assistant <|end_header_id|> Ċ Ċ", False),
        ("Hello Ġthere , Ġfriend . <|eot_id|>", True),
        ("<|start_header_id|> user <|end_header_id|> Ċ Ċ And Ġthen ? <|eot_id|>", False),
        ("<|start_header_id|> assistant <|end_header_id|> Ċ Ċ", False),
        ("Good Ġbye . <|eot_id|>", True),
    )


def test_the_mask_of_zephyr_whose_headers_are_no_special_tokens() -> None:
    assert masked(templates.byte_level("zephyr", templates.ZEPHYR), CONVERSATION) == by_hand(
        ("<| system |> Ċ You Ġare Ġterse . </s> Ċ <| user |> Ċ Hi ! </s> Ċ <| assistant |> Ċ", False),
        ("Hello Ġthere , Ġfriend . </s>", True),
        ("Ċ <| user |> Ċ And Ġthen ? </s> Ċ <| assistant |> Ċ", False),
        ("Good Ġbye . </s>", True),
        ("Ċ", False),
    )


def test_the_mask_of_a_template_without_a_generation_prompt() -> None:
    tokenizer = templates.byte_level("zephyr", templates.MISTRAL)
    conversation = [
        {**message, "content": " a" if number % 2 else "b"} for number, message in enumerate(CONVERSATION[1:])
    ]
    assert masked(tokenizer, conversation) == by_hand(
        ("<s> [ INST ] Ġb Ġ[/ INST ]", False),
        ("Ġa </s>", True),
        ("[ INST ] Ġb Ġ[/ INST ]", False),
        ("Ġa </s>", True),
    )


def test_a_system_prompt_that_the_template_adds_is_no_target() -> None:
    found = masked(templates.byte_level("chatml", templates.CHATML), CONVERSATION[1:3])
    targets = [token for token, is_target in found if is_target]
    assert targets == ["Hello", "Ġthere", ",", "Ġfriend", ".", "<|im_end|>"]
    assert "<|im_start|>" in [token for token, is_target in found if not is_target]


def test_a_template_that_marks_what_is_generated_is_believed_but_for_the_end_of_the_turn() -> None:
    tokenizer = templates.byte_level("chatml", templates.MARKED)
    plain = templates.byte_level("chatml", templates.CHATML)
    assert masked(tokenizer, CONVERSATION) == masked(plain, CONVERSATION)
    theirs = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    ours = masked(tokenizer, CONVERSATION)
    assert theirs["input_ids"] == tokenizer.convert_tokens_to_ids([token for token, _ in ours])
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert theirs["assistant_masks"] == [int(is_target and token != "<|im_end|>") for token, is_target in ours]
    assert theirs["input_ids"].count(ends) == 5


def test_the_tokens_are_those_of_the_whole_text() -> None:
    """Not those of the turns one after the other: a model is served the whole text's."""
    for style, template in (("chatml", templates.CHATML), ("llama", templates.LLAMA), ("zephyr", templates.ZEPHYR)):
        for tokenizer in (templates.byte_level(style, template), templates.byte_level(style, template, vocab_size=300)):
            ids = tokenizer.convert_tokens_to_ids([token for token, _ in masked(tokenizer, CONVERSATION)])
            assert ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)


def test_a_token_of_which_the_assistant_says_a_part_is_a_target() -> None:
    # Characters 4 to 9 are said. The token on either border holds one that is.
    offsets = [(0, 2), (2, 5), (5, 8), (8, 11), (11, 12)]
    assert target_mask(offsets, ((4, 9),)).tolist() == [False, True, True, True, False]
    assert target_mask(offsets, ((5, 8),)).tolist() == [False, False, True, False, False]
    # One character in three tokens, as byte-level vocabularies spell an emoji.
    assert target_mask([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], ((1, 2),)).tolist() == [False, True, True, True, False]
    assert target_mask(offsets, ()).tolist() == [False] * 5


# -- what no mask can be had of


def test_a_template_that_writes_earlier_turns_anew_is_told() -> None:
    template = ChatTemplate(templates.byte_level("chatml", templates.THINKING))
    with pytest.raises(Unusable, match="template_rewrites_turns"):
        template.render(CONVERSATION)


def test_its_single_turns_are_learned_with_the_thoughts_that_it_adds() -> None:
    found = masked(templates.byte_level("chatml", templates.THINKING), CONVERSATION[:3])
    targets = "".join(token for token, is_target in found if is_target)
    assert targets == "<think>ĊĊ</think>ĊĊHelloĠthere,Ġfriend.<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_told() -> None:
    template = ChatTemplate(templates.byte_level("zephyr", templates.MISTRAL))
    with pytest.raises(Unusable, match="template_refuses"):
        template.render(CONVERSATION)


def test_a_conversation_that_the_assistant_starts_is_told() -> None:
    template = ChatTemplate(templates.byte_level("chatml", templates.CHATML))
    with pytest.raises(Unusable, match="assistant_first"):
        template.render([{"role": "assistant", "content": "Hello"}, *CONVERSATION[1:]])


def test_a_template_that_marks_nothing_here_is_told() -> None:
    only_last = templates.MARKED.replace("{% if message['role'] == 'assistant' %}", "{% if message['role'] == 'x' %}")
    with pytest.raises(Unusable, match="template_marks_nothing"):
        ChatTemplate(templates.byte_level("chatml", only_last)).render(CONVERSATION)


def test_the_day_does_not_shape_the_rows() -> None:
    rendered = ChatTemplate(templates.byte_level("chatml", templates.DATED)).render(CONVERSATION)
    assert rendered.text.startswith("<|im_start|>system\nToday is 26 Jul 2024.<|im_end|>\n<|im_start|>system")


# -- any conversation

WORDS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(bool)
)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4)
TOKENIZERS = [
    (templates.byte_level("chatml", templates.CHATML, vocab_size=300), "<|im_end|>"),
    (templates.byte_level("llama", templates.LLAMA), "<|eot_id|>"),
    (templates.byte_level("zephyr", templates.ZEPHYR), "</s>"),
    (templates.sentence_piece("zephyr", templates.ZEPHYR), "</s>"),
]


def conversation_from(turns: list[tuple[str, str]]) -> Conversation:
    pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in turns]
    return [message for pair in pairs for message in pair]


def encoded(tokenizer: Any, conversation: Conversation, *, row_tokens: int = 4096) -> Encoded:
    rendered = ChatTemplate(tokenizer).render(conversation)
    encoding = tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False)
    return encode(rendered, encoding, row_tokens=row_tokens)


@pytest.mark.parametrize(("tokenizer", "end"), TOKENIZERS, ids=["chatml", "llama", "zephyr", "sentencepiece"])
@settings(max_examples=60)
@given(turns=TURNS)
def test_the_targets_are_what_the_assistant_says(tokenizer: Any, end: str, turns: list[tuple[str, str]]) -> None:
    found = encoded(tokenizer, conversation_from(turns))
    text = tokenizer.backend_tokenizer.decode(target_ids(found.entries).tolist(), skip_special_tokens=False)
    said = "".join(answer + end for _, answer in turns)
    # SentencePiece puts a blank behind a special token when it decodes.
    assert text.replace(" ", "") == said.replace(" ", "")
    assert found.target_bytes == len(said.encode())


@settings(max_examples=40)
@given(turns=TURNS, other=WORDS)
def test_what_the_user_says_changes_no_target(turns: list[tuple[str, str]], other: str) -> None:
    tokenizer, _ = TOKENIZERS[0]
    asked_otherwise = [(other, answer) for _, answer in turns]
    first, second = (encoded(tokenizer, conversation_from(each)) for each in (turns, asked_otherwise))
    assert target_ids(first.entries).tolist() == target_ids(second.entries).tolist()
    assert first.target_bytes == second.target_bytes


@given(turns=TURNS, row_tokens=st.integers(2, 120))
def test_a_cut_conversation_is_the_beginning_of_the_whole(turns: list[tuple[str, str]], row_tokens: int) -> None:
    tokenizer, _ = TOKENIZERS[0]
    whole, part = (encoded(tokenizer, conversation_from(turns), row_tokens=n) for n in (4096, row_tokens))
    assert part.entries.tolist() == whole.entries[:row_tokens].tolist()
    assert part.target_bytes <= whole.target_bytes
