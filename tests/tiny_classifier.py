"""A tiny random classifier, BERT or Llama, that reads bytes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.tiny_model import END_OF_TEXT, make_tokenizer

CLASSES = ("bad", "good", "odd")
CONTEXT_TOKENS = 64


def save_classifier(directory: Path, *, seed: int, model_type: str = "bert") -> Path:
    """A Hugging Face directory."""
    tokenizer = make_tokenizer()
    pad = tokenizer.token_to_id(END_OF_TEXT)
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
        pad_token_id=pad,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
        problem_type="single_label_classification",
    )
    torch.manual_seed(seed)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=CONTEXT_TOKENS
    )
    fast.save_pretrained(directory)
    return directory
