"""Records of a source: a conversation, or a labelled text, and why another gives no sample."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.spec import DataSpec
from workloads.prepare.clean import clean, is_empty

Conversation = list[dict[str, str]]
"""Messages, each a ``role`` and its ``content``."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NONE_OF_THEM: tuple[object, ...] = (None, [], {}, "", "[]")  # how a record says that it has no tools
_DETAIL = 100  # characters that are told of a value

REASONS = {
    "not_utf8": "is not UTF-8",
    "not_json": "is not JSON",
    "not_an_object": "is no object with fields",
    "not_text": "holds half a surrogate pair, which is no text",
    "no_messages": "has neither messages nor prompt and completion",
    "bad_message": "has a message without a role and a content that are text",
    "unknown_role": f"has a message of a role other than {', '.join(_ROLES)}",
    "tools": "offers tools or calls them, which is not learned",
    "no_assistant_turn": "has no message of the assistant",
    "empty_answer": "has an empty message of the assistant",
    "assistant_first": "starts with the assistant, which the chat template has no prompt for",
    "template_refuses": "is refused by the chat template",
    "template_rewrites_turns": "has a turn that does not begin with the prompt that the chat template asks for it by",
    "template_marks_nothing": "holds nothing that the chat template marks as generated",
    "no_target_left": "holds nothing to predict",
    "no_text": "has no text",
    "no_label": "has no class that is text or a whole number",
}
"""What is said of a bad record, by the word that it is counted under."""


class Unusable(Exception):
    """A record that gives no sample.

    Args:
        reason: one of :data:`REASONS`.
        detail: what is said of this record beyond that; may be empty.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def conversation_of(record: object) -> Conversation:
    """A record's messages, up to the assistant's last turn: nothing is learned from what comes behind it.

    Raises:
        Unusable: it is no conversation, or one that cannot be learned from.
    """
    if not isinstance(record, dict):
        raise Unusable("not_an_object")
    if record.get("tools") not in _NONE_OF_THEM:
        raise Unusable("tools")
    if record.get("messages") is not None:
        messages = record["messages"]
    elif record.get("prompt") is not None and record.get("completion") is not None:
        messages = _turns(record["prompt"], "user") + _turns(record["completion"], "assistant")
    else:
        raise Unusable("no_messages")
    if not isinstance(messages, list) or not messages:
        raise Unusable("no_messages")
    conversation = [_message(message) for message in messages]
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()
    if not conversation:
        raise Unusable("no_assistant_turn")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in conversation):
        raise Unusable("empty_answer")
    return conversation


def _turns(said: object, role: str) -> list[object]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _message(message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise Unusable("bad_message")
    if message.get("tool_calls") not in _NONE_OF_THEM:
        raise Unusable("tools")
    role, content = message.get("role"), _content(message.get("content"))
    if not isinstance(role, str):
        raise Unusable("bad_message")
    if role not in _ROLES:
        raise Unusable("unknown_role", repr(role[:_DETAIL]))
    _require_text(content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(content: object) -> str:
    """A text, or a list of parts of which all are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise Unusable("bad_message")
    return "".join(map(str, texts))


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    text: str
    label: str
    is_number: bool
    """Whether the class is a whole number, which sorts as one."""


def labelled_of(record: object, data: DataSpec) -> LabelledText:
    """A record's text and class.

    Raises:
        Unusable: it lacks one of them.
    """
    if not isinstance(record, dict):
        raise Unusable("not_an_object")
    text, label = record.get(data.text_field), record.get(data.label_field or "")
    if isinstance(text, str) and data.clean:
        text = clean(text)
    if not isinstance(text, str) or is_empty(text):
        raise Unusable("no_text")
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise Unusable("no_label")
    _require_text(text)
    _require_text(str(label))
    return LabelledText(text=text, label=str(label), is_number=isinstance(label, int))


def text_of(record: object, data: DataSpec) -> str | None:
    """The text of a record of a stream; None where its field is null.

    Raises:
        Unusable: it has none.
    """
    if not isinstance(record, dict):
        raise Unusable("not_an_object")
    if data.text_field not in record:
        raise Unusable("no_text", f"it has no field {data.text_field!r}")
    text = record[data.text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise Unusable("no_text", f"its field {data.text_field!r} holds {type(text).__name__}")
    _require_text(text)
    return text


def _require_text(value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise Unusable("not_text") from e
