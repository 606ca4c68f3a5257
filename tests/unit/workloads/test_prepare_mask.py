"""The loss mask from a file of conversations to the labels that the loss is computed from, against masks by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.spec import DataSpec
from tests.unit.fakes import MemoryStore
from tests.unit.workloads import chat_templates as templates
from tests.unit.workloads.preparing import Prepared, json_lines, prepare_here
from workloads.prepare.chat import ChatTemplate
from workloads.prepare.literals import without_marks
from workloads.prepare.records import Unusable
from workloads.prepare.vocabulary import load_tokenizer
from workloads.tasks import Samples, TaskContext
from workloads.tasks.causal_lm import IGNORED, CausalLM

LENGTH = 127
CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello there, friend."},
    {"role": "user", "content": "And then?"},
    {"role": "assistant", "content": "Good bye."},
]
BY_HAND = [
    # (tokens that the model is given, whether it is to predict each)
    ("<|im_start|> system Ċ You Ġare Ġterse . <|im_end|> Ċ", False),
    ("<|im_start|> user Ċ Hi ! <|im_end|> Ċ <|im_start|> assistant Ċ", False),
    ("Hello Ġthere , Ġfriend . <|im_end|>", True),
    ("Ċ <|im_start|> user Ċ And Ġthen ? <|im_end|> Ċ <|im_start|> assistant Ċ", False),
    ("Good Ġbye . <|im_end|>", True),
    ("Ċ", False),
]
# What models carry that are served with <|im_end|> for the end of a turn while their tokenizer's eos is another token.
OTHER_EOS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
TOKENIZERS = {
    "chatml": templates.byte_level("chatml", templates.CHATML),
    "llama": templates.byte_level("llama", templates.LLAMA),
}
PIECES = ["Hi", " ", "\n", "🙂", "<|im_start|>assistant\n", "<|im_end|>", "<|eot_id|>", "assistant\n", "."]
CONTENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(lambda some: "x" + "".join(some))

Records = list[dict[str, Any]]


def base_of(folder: Path, template: str, **special: str) -> Path:
    tokenizer = templates.byte_level("chatml", template)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    return templates.save(folder, tokenizer)


def made_of(records: Records, base: Path, *, length: int = LENGTH, **fields: Any) -> Prepared:
    store = MemoryStore()
    store.at("corpus").upload("all.jsonl", json_lines(records))
    data = DataSpec(train="s3://corpus/**", format="messages", sequence_length=length, eval_fraction=0.3, **fields)
    return prepare_here(data, store, base)


def batches_of(made: Prepared, folder: Path) -> list[dict[str, Any]]:
    """All of the dataset as the task gives it to the model, a batch for each split."""
    manifest = made.manifest
    length = (manifest.row_tokens or 0) - 1
    context = TaskContext(
        architecture={"model_type": "llama"},
        vocab_size=manifest.tokenizer.vocab_size,
        end_of_text_id=manifest.tokenizer.end_of_text_id,
        sequence_length=length,
        sample_kind="packed",
    )
    task = CausalLM(context)
    batches = []
    for split in (manifest.train, manifest.eval):
        rows = made.rows(split, folder)
        samples = Samples(rows=rows, num_real=len(rows["tokens"]), row_rng=np.random.default_rng)
        batches.append(task.collate(samples))
        assert task.num_targets(batches[-1]) == split.num_targets
    return batches


def num_targets(made: Prepared, folder: Path) -> int:
    """What the loss is divided by over all of the dataset."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches_of(made, folder))


def filler(count: int) -> Records:
    return [
        {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"Hi {n}!"}]}
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("template", "special"),
    [(templates.CHATML, {}), (templates.MARKED, {}), (templates.CHATML, OTHER_EOS), (templates.MARKED, OTHER_EOS)],
    ids=["plain", "generation", "plain, another eos", "generation, another eos"],
)
def test_labels_are_token_by_token_those_written_by_hand(tmp_path: Path, template: str, special: Any) -> None:
    base = base_of(tmp_path / "base", template, **special)
    made = made_of([*filler(20), {"messages": CONVERSATION}, *filler(30)[20:]], base)
    tokenizer = load_tokenizer(base)
    expected = [(token, is_target) for tokens, is_target in BY_HAND for token in tokens.split()]
    ids = tokenizer.convert_tokens_to_ids([token for token, _ in expected])
    labels = [token if is_target else IGNORED for token, (_, is_target) in zip(ids, expected, strict=True)]
    found = []
    for batch in batches_of(made, tmp_path / "cache"):
        columns = (batch[name].tolist() for name in ("input_ids", "labels", "position_ids"))
        for inputs, targets, positions in zip(*columns, strict=True):
            for start in [place for place, position in enumerate(positions) if position == 0]:
                if inputs[start : start + len(ids)] == ids:
                    # What is predicted from a token is the token behind it: labels are one ahead of the inputs.
                    found.append([IGNORED, *targets[start : start + len(ids) - 1]])
                    assert positions[start : start + len(ids)] == list(range(len(ids)))
    assert found == [labels]


@pytest.mark.parametrize("template", [templates.CHATML, templates.MARKED], ids=["plain", "generation"])
def test_other_prompts_leave_the_denominator_of_the_loss_as_it_is(tmp_path: Path, template: str) -> None:
    base = base_of(tmp_path / "base", template)

    def asked(words: str) -> Records:
        return [
            {
                "messages": [
                    {"role": "system", "content": f"You are {words}."},
                    {"role": "user", "content": f"{words} {number}?"},
                    {"role": "assistant", "content": f"Hello {number}, friend."},
                    {"role": "user", "content": words},
                    {"role": "assistant", "content": "Good bye." * (1 + number % 3)},
                ]
            }
            for number in range(40)
        ]

    totals, said = set(), set()
    for words in ("terse", "And then, 🙂 there?", "Hi! " * 9, "<|im_end|>\n<|im_start|>assistant\nHello"):
        made = made_of(asked(words), base, length=511)
        assert made.manifest.counts["train.samples"] + made.manifest.counts["eval.samples"] == 40
        totals.add(num_targets(made, tmp_path / "cache"))
        labels = [batch["labels"] for batch in batches_of(made, tmp_path / "cache")]
        said.add(tuple(sorted(token for part in labels for token in part[part != IGNORED].tolist())))
    assert len(totals) == len(said) == 1
    assert totals.pop() > 0


def test_a_prompt_beyond_the_models_view_changes_nothing(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", templates.CHATML)
    seen = "You are there, friend. " * 30

    def going_on(words: str) -> Records:
        later = [{"role": "user", "content": seen + words}, {"role": "assistant", "content": words}]
        return [{"messages": [*one["messages"], *later]} for one in filler(40)]

    rows, totals = [], []
    for words in ("And then?", "Good bye, friend. " * 20, "🙂"):
        made = made_of(going_on(words), base)
        counts = made.manifest.counts
        assert counts["train.truncated"] + counts["eval.truncated"] == 40
        totals.append(num_targets(made, tmp_path / "cache"))
        batches = batches_of(made, tmp_path / "cache")
        rows.append(
            sorted(
                (inputs, labels)
                for batch in batches
                for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
            )
        )
    assert totals[0] == totals[1] == totals[2] > 0
    assert rows[0] == rows[1] == rows[2]


def test_where_a_template_writes_earlier_turns_anew_each_turn_is_a_sample(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", templates.THINKING)
    made = made_of([{"messages": CONVERSATION}, *filler(30)], base, length=511)
    counts = made.manifest.counts
    assert counts["train.samples"] + counts["eval.samples"] == 32
    assert counts.get("train.divided", 0) + counts.get("eval.divided", 0) == 1
    tokenizer, thoughts = load_tokenizer(base), "<think>\n\n</think>\n\n"
    found = []
    for batch in batches_of(made, tmp_path / "cache"):
        labels = batch["labels"]
        found += tokenizer.decode(labels[labels != IGNORED]).split("<|im_end|>")
    assert {f"{thoughts}Hello there, friend.", f"{thoughts}Good bye."} < set(found)
    # As the second turn is asked for, the first one stands there without its thoughts.
    first, second = ChatTemplate(tokenizer).samples(CONVERSATION)
    assert first.text in tokenizer.apply_chat_template(CONVERSATION[:3], tokenize=False)
    asked = tokenizer.apply_chat_template(CONVERSATION[:4], tokenize=False, add_generation_prompt=True)
    assert second.text.startswith(asked)
    assert second.spans == ((len(asked), len(asked) + len(f"{thoughts}Good bye.<|im_end|>")),)


def test_a_template_that_asks_with_what_it_does_not_write_is_told(tmp_path: Path) -> None:
    """As those do that open a block of thoughts for the model, and leave it out of every turn that is over."""
    opening = templates.CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    template = ChatTemplate(load_tokenizer(base_of(tmp_path / "base", opening)))
    for conversation in (CONVERSATION, CONVERSATION[:3]):
        with pytest.raises(Unusable, match="template_rewrites_turns"):
            template.samples(conversation)


# -- many turns


@pytest.mark.parametrize(
    ("style", "template", "end"),
    [("chatml", templates.CHATML, "<|im_end|>"), ("llama", templates.LLAMA, "<|eot_id|>")],
)
@settings(max_examples=40)
@given(contents=st.lists(CONTENTS, min_size=8, max_size=16).filter(lambda all_of_them: len(all_of_them) % 2 == 0))
def test_of_many_turns_each_is_found_as_by_itself(style: str, template: str, end: str, contents: list[str]) -> None:
    tokenizer = TOKENIZERS[style]
    conversation = [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]
    rendered = ChatTemplate(tokenizer).render(conversation)
    said = [rendered.text[start:end_] for start, end_ in rendered.spans]
    trimmed = str.strip if template is templates.LLAMA else str
    assert [without_marks(text) for text in said] == [trimmed(text) + end for text in contents[1::2]]
    for number, (start, _) in zip(range(1, len(contents), 2), rendered.spans, strict=True):
        asked = tokenizer.apply_chat_template(conversation[:number], tokenize=False, add_generation_prompt=True)
        assert without_marks(rendered.text[:start]) == asked


def test_many_turns_that_are_not_alike_are_looked_at_one_by_one() -> None:
    """Here the template puts words of its own before the second answer."""
    second = "{% if message['role'] == 'assistant' and loop.index0 == 3 %}{{ 'once more: ' }}{% endif %}"
    header = "{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    template = templates.CHATML.replace(
        header, f"{{{{'<|im_start|>' + message['role'] + '\n' }}}}{second}{{{{ message['content']"
    )
    conversation = [{"role": "assistant" if number % 2 else "user", "content": f"{number}"} for number in range(10)]
    rendered = ChatTemplate(templates.byte_level("chatml", template)).render(conversation)
    said = [rendered.text[start:end].removesuffix("<|im_end|>") for start, end in rendered.spans]
    assert said == ["1", "once more: 3", "5", "7", "9"]
