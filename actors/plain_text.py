"""Text as a language model's tokens, without control tokens that the text itself spells out.

Tokenizers read `<|im_end|>` wherever it stands as the token that ends a turn. In a passage or in
what an LLM wrote it is text: otherwise whoever writes a web page writes the prompt. So no text is
trusted here, and the only control tokens of a prompt are those of the model's own chat template and
those that its tokenizer puts around every text.
"""

import itertools
import re
import uuid
from typing import Any

from cluster.errors import UserError

# Added tokens that are not flagged as special are control tokens too where they look like markup,
# as <think> or <tool_call>. Others are text: runs of spaces, line ends, technical terms.
_MARKUP = re.compile(r"\s*[<\[{].*\w.*[>\]}]\s*", re.DOTALL)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Returns what a Hugging Face tokenizer puts before and behind every text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


class PlainText:
    """Tokenises text for one model.

    A text in which no control token is spelt out has exactly the tokens that its tokenizer gives.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a Hugging Face tokenizer that gives its tokens' offsets in the text."""
        self._tokenizer = tokenizer
        self.control_ids = frozenset(
            id_
            for id_, token in tokenizer.added_tokens_decoder.items()
            if token.special or _MARKUP.fullmatch(token.content)
        )
        self._around = special_tokens(tokenizer)
        self._turn: tuple[str, str] | None = None

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Returns a text's tokens, between those that begin and end every text if `special`."""
        ids = self._bare(text)
        if not self.control_ids.isdisjoint(ids):
            ids = [id_ for id_, _ in self._split(text, 0, len(text))]
        return [*self._around[0], *ids, *self._around[1]] if special else ids

    def chat_ids(self, message: str) -> list[int]:
        """Returns the tokens of a user's turn by the model's chat template, ready to be answered.

        Without a template, those of the message alone.

        Raises:
            UserError: The template does not show the message as it is.
        """
        if not self._tokenizer.chat_template:
            return self.ids(message, special=True)
        before, after = self._template()
        text, end = f"{before}{message}{after}", len(before) + len(message)
        return [id_ for id_, _ in self._split(text, len(before), end)]

    def truncate(self, text: str, max_tokens: int) -> str:
        """Cuts a text to its first `max_tokens` tokens."""
        tokens = self._split(text, 0, len(text))
        return text if len(tokens) <= max_tokens else text[: tokens[max_tokens][1]].rstrip()

    def control_tokens(self, text: str) -> list[str]:
        """Returns the control tokens that a text spells out."""
        ids = [id_ for id_ in self._bare(text) if id_ in self.control_ids]
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(ids)]

    def _bare(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _template(self) -> tuple[str, str]:
        """Returns what the chat template puts before and after a message."""
        if self._turn is None:
            mark = uuid.uuid4().hex  # so that no template can act on what a message says
            turn = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
            )
            parts = str(turn).split(mark)
            if len(parts) != 2:
                raise UserError(
                    "the model's chat template does not show a message once and as it is: "
                    "set queries.chat to false, or take another llm.model"
                )
            self._turn = parts[0], parts[1]
        return self._turn

    def _split(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Returns each token and its place in the text, no control token from `start` to `end`.

        A control token that is spelt out there is cut after its first character, and the text on
        either side is tokenised by itself.
        """
        encoded = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        cuts: set[int] = set()
        for id_, (first, last) in tokens:
            if id_ in self.control_ids:
                token = text[first:last]  # with the spaces around it that some tokens take in
                first += len(token) - len(token.lstrip())
                last -= len(token) - len(token.rstrip())
                if first < end and last > start:
                    cuts |= {first + 1} if last - first > 1 else {first, last}
        if not cuts:
            return [(id_, first) for id_, (first, _) in tokens]
        if len(text) == 1:  # a control token of one character, which no other tokens could spell
            return []
        places = sorted({0, *cuts, len(text)})
        return [
            (id_, begin + place)
            for begin, stop in itertools.pairwise(places)
            for id_, place in self._split(text[begin:stop], start - begin, end - begin)
        ]
