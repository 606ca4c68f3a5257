"""A tokenizer that the run file gives, as ``data.tokenizer``: read for its digest and its size, without tokenizing.

``tokenizer.json`` is the file of Hugging Face's ``tokenizers``: ``model.vocab`` (an object of token to id, or for
Unigram a list of pairs of token and score, whose place is the id) and ``added_tokens``, each with ``id`` and
``content``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import NotFound, SpecError
from orchestrator.spec import DataSpec, canonical_json
from orchestrator.store.s3 import Store, split_uri

END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "[SEP]",
)
"""What the token that ends a text is usually called, the first that there is being taken."""

_NEXT_STEP = "Name a tokenizer.json as Hugging Face's tokenizers saves it, by a path or s3://bucket/key."


@dataclass(frozen=True, kw_only=True)
class GivenTokenizer:
    """A ``tokenizer.json`` and what of it matters before a text is tokenized."""

    uri: str
    content: bytes
    vocab_size: int
    """Ids are below it."""
    end_of_text_id: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all of it that the tokens depend on."""
        facts = {"sha256": self.sha256, "end_of_text_id": self.end_of_text_id}
        return hashlib.sha256(canonical_json(facts)).hexdigest()[:16]


def read_given(data: DataSpec, store: Store | None) -> GivenTokenizer | None:
    """The tokenizer that ``data.tokenizer`` names; None where it names none.

    Args:
        store: how S3 is reached; None will do for a path.

    Raises:
        SpecError: it is missing, is no tokenizer.json, or has no token that ends a text. StoreError: S3 cannot be
            reached.
    """
    if data.tokenizer is None:
        return None
    content = _read(data.tokenizer, store)
    ids = _token_ids(content, data.tokenizer)
    return GivenTokenizer(
        uri=data.tokenizer,
        content=content,
        vocab_size=max(ids.values()) + 1,
        end_of_text_id=_end_of_text(ids, data),
    )


def _read(uri: str, store: Store | None) -> bytes:
    try:
        if uri.startswith("s3://"):
            if store is None:
                raise SpecError(f"data.tokenizer: {uri} cannot be read without a store.")
            bucket, key = split_uri(uri)
            return store.at(bucket).get(key)
        return Path(uri).expanduser().read_bytes()
    except NotFound as e:
        raise SpecError(f"data.tokenizer: there is no {uri}.", next_step=_NEXT_STEP) from e
    except OSError as e:
        raise SpecError(f"data.tokenizer: {uri} cannot be read: {e.strerror or e}.", next_step=_NEXT_STEP) from e


def _token_ids(content: bytes, uri: str) -> dict[str, int]:
    """Every token's id, those that were added included."""
    try:
        document: Any = json.loads(content)
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in document["added_tokens"]}
        ids = {**vocabulary, **added}
        if not ids or not all(
            isinstance(token, str) and isinstance(id_, int) and id_ >= 0 for token, id_ in ids.items()
        ):
            raise ValueError("its vocabulary is not one of tokens and ids")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise SpecError(
            f"data.tokenizer: {uri} is not a tokenizer.json: {type(e).__name__}: {e}.", next_step=_NEXT_STEP
        ) from e
    return ids


def _end_of_text(ids: dict[str, int], data: DataSpec) -> int:
    if data.end_of_text is not None:
        if data.end_of_text not in ids:
            raise SpecError(
                f"data.end_of_text: {data.tokenizer} has no token {data.end_of_text!r}.",
                next_step="Name a token of the tokenizer, as its added_tokens write it.",
            )
        return ids[data.end_of_text]
    found = next((ids[token] for token in END_OF_TEXT if token in ids), None)
    if found is None:
        raise SpecError(
            f"data.tokenizer: {data.tokenizer} has none of the tokens that usually end a text: "
            f"{', '.join(END_OF_TEXT)}.",
            next_step="Name the token that ends a text in data.end_of_text.",
        )
    return found
