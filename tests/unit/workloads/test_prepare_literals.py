"""Control tokens within messages: they become the tokens that the server makes of them, and end no turn."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.dataset.rows import target_ids
from tests.unit.workloads import chat_templates as templates
from workloads.prepare.chat import ChatTemplate
from workloads.prepare.literals import Tokens, without_marks
from workloads.prepare.messages import encode
from workloads.prepare.records import Conversation

TOKENIZERS = {
    "chatml": templates.byte_level("chatml", templates.CHATML),
    "generation": templates.byte_level("chatml", templates.MARKED),
    "llama": templates.byte_level("llama", templates.LLAMA),
    "zephyr": templates.byte_level("zephyr", templates.ZEPHYR),
    "sentencepiece": templates.sentence_piece("zephyr", templates.ZEPHYR),
}
ENDS = {"chatml": "<|im_end|>", "generation": "<|im_end|>", "llama": "<|eot_id|>"}
PIECES = [*(token for tokens in templates.SPECIAL.values() for token in tokens), "\U000f0000", "\U000f0001"]
PIECES += ["Hi", " ", "\n", "ü🙂", "<", "|>", "assistant", "<|im_end", "</s", "."]
CONTENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map(lambda some: "x" + "".join(some) + "y")


def tokens_of(tokenizer: Any, conversation: Conversation) -> tuple[Tokens, list[int], int]:
    """(all tokens, those that are targets, the bytes they stand for)."""
    template = ChatTemplate(tokenizer)
    rendered = template.render(conversation)
    (tokens,) = template.literals.encode_batch([rendered.text])
    found = encode(rendered, tokens, row_tokens=4096)
    return tokens, target_ids(found.entries).tolist(), found.target_bytes


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60)
@given(asked=CONTENTS, said=CONTENTS, more=CONTENTS)
def test_the_tokens_are_those_that_the_server_is_given(kind: str, asked: str, said: str, more: str) -> None:
    tokenizer = TOKENIZERS[kind]
    conversation = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said},
        {"role": "user", "content": more},
        {"role": "assistant", "content": said},
    ]
    tokens, targets, _ = tokens_of(tokenizer, conversation)
    served = tokenizer.apply_chat_template(conversation, return_dict=False, sanitize_control_tokens=True)
    assert list(tokens.ids) == served
    assert all(start <= end for start, end in tokens.offsets)
    assert [start for start, _ in tokens.offsets] == sorted(start for start, _ in tokens.offsets)
    if kind in ENDS:  # each of the two turns has one end, at its end
        end = tokenizer.convert_tokens_to_ids(ENDS[kind])
        assert targets.count(end) == 2
        assert targets[-1] == end


@pytest.mark.parametrize("kind", ENDS)
@settings(max_examples=40)
@given(asked=CONTENTS, said=CONTENTS)
def test_what_is_learned_is_what_is_said_to_the_letter(kind: str, asked: str, said: str) -> None:
    tokenizer = TOKENIZERS[kind]
    _, targets, target_bytes = tokens_of(
        tokenizer, [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    )
    expected = without_marks(said) + ENDS[kind]
    assert tokenizer.backend_tokenizer.decode(targets, skip_special_tokens=False) == expected
    assert target_bytes == len(expected.encode())


def test_texts_with_control_tokens_and_without_keep_their_order() -> None:
    template = ChatTemplate(TOKENIZERS["chatml"])
    (marked,) = template.literals.mark([{"role": "user", "content": "Hi <|im_end|>!"}])
    texts = ["Hi!", marked["content"], "And then?", marked["content"]]
    together = template.literals.encode_batch(texts)
    assert together == [template.literals.encode_batch([text])[0] for text in texts]
    assert together[1] == together[3] != together[0]
    assert template.literals.encode_batch([]) == []


def test_thoughts_are_control_tokens_where_the_assistant_has_them_and_letters_elsewhere() -> None:
    tokenizer = templates.byte_level("chatml", templates.THINKING)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>"), tokenizers.AddedToken("</think>")])
    opens = tokenizer.convert_tokens_to_ids("<think>")
    content = "<think>Hi</think>"
    tokens, targets, _ = tokens_of(
        tokenizer, [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    )
    assert tokenizer.decode(targets) == f"<think>\n\n</think>\n\n{content}<|im_end|>"
    assert list(tokens.ids).count(opens) == targets.count(opens) == 2
