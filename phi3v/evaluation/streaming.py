"""An answer shown while it is generated, in pieces that never have to be taken back."""

import re
from collections.abc import Callable, Collection

from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token that is one byte of a character
INCOMPLETE = "\ufffd"  # what stands for the first bytes of a character whose others are to come


class TextPieces(BaseStreamer):
    """Shows the text of the tokens that `generate` hands it; the prompt and stop tokens are not.

    Held back are bytes until another kind of token ends them (the tokenizer decodes a run of them
    as one), and white space until something follows it (an answer ends without).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: Collection[int],
        show: Callable[[str], None],
    ) -> None:
        self._tokenizer, self._stop_ids, self._show = tokenizer, stop_ids, show
        self._ids: list[int] = []
        self._has_prompt = self._has_ended = False
        self._shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, or the next tokens of the answer."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        for token in value.flatten().tolist():
            self._has_ended = self._has_ended or token in self._stop_ids
            if not self._has_ended:
                self._ids.append(token)
        self._show_more(self._certain())

    def end(self) -> None:
        """Nothing: what was held back is shown by `finish`, which knows the whole answer."""

    def finish(self, text: str) -> None:
        """Show the rest of the answer."""
        self._show_more(text)

    def _certain(self) -> str:
        """The text that no further token changes."""
        end = len(self._ids)
        while end and self._is_open(self._ids[end - 1]):
            end -= 1
        return str(self._tokenizer.decode(self._ids[:end])).strip().rstrip(INCOMPLETE).rstrip()

    def _is_open(self, token: int) -> bool:
        """Whether it is a byte, or beyond the vocabulary: decoding passes over it."""
        text = self._tokenizer.convert_ids_to_tokens(token)
        return text is None or bool(BYTE.fullmatch(text))

    def _show_more(self, text: str) -> None:
        piece = text[len(self._shown) :]
        if piece:
            self._show(piece)
            self._shown = text
