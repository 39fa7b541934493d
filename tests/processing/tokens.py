"""A small tokenizer of the published kind."""

from functools import cache

from transformers import PreTrainedTokenizerFast

from phi3v.samples.tiny import CHAT_TEMPLATE, train_tokenizer

TEXTS = ["What is this?", "A red cat, 12.50 EUR.", "user assistant end image"]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    trained = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS, 60))
    trained.chat_template = CHAT_TEMPLATE
    return trained
