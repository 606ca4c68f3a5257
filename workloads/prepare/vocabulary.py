"""The tokenizer of a dataset: trained on its source, or that of the pretrained model."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.dataset.format import DatasetManifest, Tokenizer, TokenizerFile, is_held_out
from orchestrator.dataset.given import GivenTokenizer
from orchestrator.dataset.rows import MAX_TOKENS
from orchestrator.dataset.source import SourceFile
from orchestrator.errors import NotFound, SpecError
from orchestrator.spec import DataSpec
from orchestrator.store import Store, layout
from workloads.prepare.cutting import slices_of
from workloads.prepare.documents import NotInFormat, read_records, texts
from workloads.prepare.once import create_alike
from workloads.prepare.records import Unusable, labelled_of

if TYPE_CHECKING:
    from workloads.tasks.base_context import BaseContext

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SAMPLE_BYTES = 32 * 2**20
FILE = "tokenizer.json"
_loaded: dict[str, Any] = {}
"""The newest in this process, by its digest."""


def store_trained(data: DataSpec, files: list[SourceFile], store: Store, prefix: str, *, by_record: bool) -> Tokenizer:
    """Train a tokenizer on the training split and keep it in the store; one that an earlier try left there is taken.

    No digest of that one is recorded before the manifest is. It stands under the fingerprint of all that it follows
    from and was created in one piece, and each part is made with its digest from here on.
    """
    import tokenizers

    try:
        content = store.get(prefix + FILE)
    except NotFound:
        content = train_tokenizer(data, files, store, by_record=by_record)
        create_alike(store, prefix + FILE, content)
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    return Tokenizer(
        file=FILE,
        vocab_size=tokenizer.get_vocab_size(),
        end_of_text_id=tokenizer.token_to_id(END_OF_TEXT) or 0,
        **_digest(content).model_dump(),
    )


def train_tokenizer(data: DataSpec, files: list[SourceFile], store: Store, *, by_record: bool) -> bytes:
    """A byte-level BPE trained on a fixed sample of the training split, as tokenizer.json.

    For labelled texts it puts the end-of-text mark before and after each: a classifier reads its answer off the first
    or the last token, which is then the same one always.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(data, files, store, by_record=by_record), trainer)
    if data.kind == "labelled":
        mark = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT) or 0)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[mark]
        )
    return str(tokenizer.to_str()).encode()


def _sample(data: DataSpec, files: list[SourceFile], store: Store, *, by_record: bool) -> Iterator[str]:
    """Texts of the training split, from files in the order of a hash, until there are enough of them."""
    by_hash = sorted(files, key=lambda file: hashlib.sha256(file.path.encode("utf-8", "surrogatepass")).digest())
    if not by_record:
        by_hash = [file for file in by_hash if not is_held_out(file.path, data.eval_fraction)]
    total = 0
    for text in _texts(data, by_hash, store):
        if by_record and is_held_out(text, data.eval_fraction):
            continue
        yield text
        total += len(text.encode())
        if total >= TOKENIZER_SAMPLE_BYTES:
            return


def _texts(data: DataSpec, files: list[SourceFile], store: Store) -> Iterator[str]:
    """The source's texts; what is none is counted where it is tokenized."""
    slices = slices_of(files, data)
    if data.kind == "stream":
        for _, _, documents in texts(data, slices, store):
            with contextlib.suppress(NotInFormat):
                yield from documents
        return
    fields = [data.text_field, data.label_field or ""]
    for _, records in read_records(data, slices, store, fields=fields, bad=lambda _file, _why: None):
        for _, record in records:
            with contextlib.suppress(Unusable):
                yield labelled_of(record, data).text


def store_given(given: GivenTokenizer, store: Store, prefix: str) -> Tokenizer:
    """Keep the tokenizer that the run file gives in the store.

    Raises:
        SpecError: it is no tokenizer.json that ``tokenizers`` loads.
    """
    import tokenizers

    try:
        loaded = tokenizers.Tokenizer.from_str(given.content.decode())
    except Exception as e:  # tokenizers raises nothing narrower
        raise SpecError(
            f"data.tokenizer: {given.uri} cannot be loaded: {e}.",
            next_step="Save it again with the version of tokenizers that Headway has.",
        ) from e
    create_alike(store, prefix + FILE, given.content)
    return Tokenizer(
        file=FILE,
        vocab_size=max(given.vocab_size, loaded.get_vocab_size()),
        end_of_text_id=given.end_of_text_id,
        **_digest(given.content).model_dump(),
    )


def store_pretrained(
    data: DataSpec, directory: Path, store: Store, prefix: str, *, trust_remote_code: bool = False
) -> Tokenizer:
    """Keep the pretrained model's tokenizer in the store, as transformers reads it.

    What is kept is what transformers makes of the files, so that it is the same wherever it is loaded, without the
    model's config or code beside it.

    Raises:
        SpecError: it cannot be loaded, or lacks what the data needs of it.
    """
    tokenizer = _load_pretrained(directory, trust_remote_code)
    _require_usable(data, tokenizer)
    with tempfile.TemporaryDirectory(prefix="headway-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        contents = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    for name, content in contents.items():
        create_alike(store, prefix + name, content)
    main = contents.pop(FILE)
    return Tokenizer(
        file=FILE,
        vocab_size=vocab_size_of(tokenizer),
        end_of_text_id=_end_of_text(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        files={name: _digest(content) for name, content in contents.items()},
        **_digest(main).model_dump(),
    )


def require_vocabulary_of(base: BaseContext, dataset: DatasetManifest, store: Store) -> None:
    """Refuse a dataset whose ids mean other tokens to the pretrained model.

    Raises:
        SpecError: its tokenizer has another vocabulary than the model's. IntegrityError: it is damaged.
    """
    theirs = backend_of(dataset.tokenizer, layout.dataset(dataset.name, dataset.fingerprint), store).get_vocab()
    ours = _load_pretrained(base.directory, base.trust_remote_code).get_vocab()
    if theirs != ours:
        token = min(set(theirs.items()) ^ set(ours.items()), key=lambda item: (item[1], item[0]))[0]
        raise SpecError(
            f"data.dataset: {dataset.name}@{dataset.fingerprint} was prepared with another tokenizer than that of "
            f"{base.manifest.uri}: {token!r} is {theirs.get(token, 'no token')} there and "
            f"{ours.get(token, 'no token')} here.",
            next_step="Give data.train, the source, so that it is prepared with the pretrained model's tokenizer.",
        )


def load_tokenizer(directory: Path) -> Any:
    """A dataset's tokenizer as a transformers one, whatever class the model's config would name."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)


def backend_of(tokenizer: Tokenizer, prefix: str, store: Store) -> Any:
    """A dataset's tokenizer.json as :func:`load_backend` gives it, loaded once a process: that takes longer than some
    small parts do.

    Raises:
        IntegrityError: it is not what was recorded.
    """
    backend = _loaded.get(tokenizer.sha256)
    if backend is None:
        content = store.get_verified(prefix + tokenizer.file, sha256=tokenizer.sha256, size_bytes=tokenizer.size_bytes)
        backend = load_backend(content)
        _loaded.clear()
        _loaded[tokenizer.sha256] = backend
    return backend


def load_backend(content: bytes) -> Any:
    """A dataset's tokenizer.json as a ``tokenizers.Tokenizer``, which neither cuts nor pads."""
    import tokenizers

    return whole(tokenizers.Tokenizer.from_str(content.decode()))


def whole(backend: Any) -> Any:
    """The same ``tokenizers.Tokenizer``, told not to cut and not to pad, whatever its file says."""
    backend.no_truncation()
    backend.no_padding()
    return backend


def vocab_size_of(tokenizer: Any) -> int:
    """The tokenizer's length; more only where its ids have gaps."""
    highest: int = max(tokenizer.get_vocab().values())
    return max(len(tokenizer), highest + 1)


def _load_pretrained(directory: Path, trust_remote_code: bool) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as e:  # transformers raises what its many tokenizers raise
        first_line = (str(e).splitlines() or [""])[0]
        raise SpecError(
            f"model.pretrained: its tokenizer cannot be loaded: {type(e).__name__}: {first_line}",
            next_step="It takes tokenizer.json, or what transformers makes one of, beside the weights.",
        ) from e
    if not getattr(tokenizer, "is_fast", False):
        raise SpecError(
            f"model.pretrained: its tokenizer {type(tokenizer).__name__} is written in Python and cannot say where in "
            "the text a token lies.",
            next_step="Convert it to tokenizer.json and put that beside the weights.",
        )
    return tokenizer


def _require_usable(data: DataSpec, tokenizer: Any) -> None:
    if data.kind == "packed" and not _has_template(tokenizer):
        raise SpecError(
            "data.format: messages needs a chat template, and the pretrained model has none.",
            next_step="Put chat_template.jinja beside its weights, or use a model made for chat.",
        )
    if data.kind == "stream" and tokenizer.eos_token_id is None:
        raise SpecError(
            "model.pretrained: its tokenizer has no eos token to put between documents.",
            next_step="Name one in tokenizer_config.json, as eos_token.",
        )
    if data.kind != "stream" and vocab_size_of(tokenizer) > MAX_TOKENS:
        raise SpecError(f"model.pretrained: its tokenizer has {vocab_size_of(tokenizer)} tokens, above {MAX_TOKENS}.")


def _has_template(tokenizer: Any) -> bool:
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:
        return False


def _end_of_text(tokenizer: Any) -> int:
    """The eos token's id; an encoder, which has none, ends its texts with another."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
    return next((int(found) for found in ends if found is not None), 0)


def _digest(content: bytes) -> TokenizerFile:
    return TokenizerFile(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
