"""Template and chat format -> the text and the tokens a model sees; one way for web and worker."""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from tokenizers import Tokenizer

from app.chat import Chat, chat, read_json, special_tokens
from app.errors import Invalid
from app.examples import Example
from app.storage import Path

LONGEST_TEMPLATE = 10_000  # characters
_PLACE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_NAMES = ("input", "labels")


class Task(NamedTuple):
    """What kind of answer is wanted, and a template to start from."""

    label: str
    template: str
    help: str


TASKS = {
    "classification": Task(
        "Classification",
        "Classify the text. Answer with one of these labels only: {{labels}}.\n\n"
        "Text: {{input}}\nLabel:",
        "Each output is one of a few labels.",
    ),
    "generation": Task(
        "Generation", "{{input}}", "Outputs are free text; the input says what is wanted."
    ),
    "summarization": Task(
        "Summarization",
        "Summarize the text in a few words.\n\nText: {{input}}",
        "Each output says shortly what its input says at length.",
    ),
    "extraction": Task(
        "Extraction",
        "Extract the facts from the text. Answer with one line of JSON.\n\nText: {{input}}",
        "Each output holds facts of its input, as JSON or as lines of name: value.",
    ),
    "question_answering": Task(
        "Question answering",
        "Answer the question in a few words.\n\n{{input}}",
        "Inputs ask something, with or without a text to find it in; outputs answer shortly.",
    ),
}


def check_template(template: str) -> str:
    """The template with line breaks as models know them. Raises Invalid, field "template"."""
    tidy = template.replace("\r\n", "\n")
    names = _PLACE.findall(tidy)
    problem = ""
    if len(tidy) > LONGEST_TEMPLATE:
        problem = f"The template has more than {LONGEST_TEMPLATE:,} characters; shorten it."
    elif unknown := [name for name in names if name not in _NAMES]:
        problem = (
            f"The template names {{{{{unknown[0][:40]}}}}}, which stands for nothing. It may name "
            "{{input}} and {{labels}}."
        )
    elif "input" not in names:
        problem = "The template needs {{input}}, the place where each example's input goes."
    elif "\0" in tidy or any("\ud800" <= letter <= "\udfff" for letter in tidy):
        problem = "The template holds characters that are no text (NUL or half a character)."
    if problem:
        raise Invalid(problem, field="template")
    return tidy


def fill(template: str, input: str, labels: Sequence[str]) -> str:
    """The template with {{input}} and {{labels}} replaced; what is put in stays as it is."""
    values = {"input": input, "labels": ", ".join(labels)}
    return _PLACE.sub(lambda match: values.get(match[1], match[0]), template)


class Row(NamedTuple):
    """One example in tokens. `cut`: how many tokens of its input, then its output, did not fit."""

    prompt_ids: list[int]
    answer_ids: list[int]
    cut: int


class Formatter:
    """Writes prompts for the model in one folder. Reads its tokenizer and chat template once.

    Nothing in a user's text becomes a special token. A model without a chat format gets the filled
    template and a line break. Raises Invalid for files it cannot use.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = _tokenizer(folder)
        found = chat(folder)
        self.has_chat = found is not None
        self._chat = found or Chat("", "\n", "", strips=False, template="")
        self._control, self._unknown = self._special_ids()
        self._around = [self._encoded(text) for text in (self._chat.before, self._chat.after)]
        self._lead = [] if self.has_chat else self._lead_ids()
        ends = _end_ids(folder, self._tokenizer)
        self._end = self._end_of_turn() or ends[:1]
        self.stop_ids = frozenset([*ends, *self._end[-1:]])
        if not self.stop_ids:
            raise Invalid("The model's files name no token that ends an answer (eos_token).")

    def prompt(self, template: str, input: str, labels: Sequence[str]) -> str:
        """The exact text the model sees, chat format included."""
        return self._chat.before + self._content(template, input, labels) + self._chat.after

    def prompt_ids(self, template: str, input: str, labels: Sequence[str]) -> list[int]:
        """The prompt in tokens, as transformers' `apply_chat_template` has them."""
        content = self._content(template, input, labels)
        ids = self._encoded(self._chat.before + content + self._chat.after)
        own = sum(self._num_control(part) for part in self._around)
        if self._num_control(ids) != own or any(text in content for text in self._unknown):
            # The user's text spells special tokens: apart from the format's it is plain text.
            ids = [*self._around[0], *self._plain(content), *self._around[1]]
        return [*self._lead, *ids]

    def answer_ids(self, output: str) -> list[int]:
        """What the model is to answer, and the tokens that end its turn."""
        return [*self._text_ids(output), *self._end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of the ids piece by piece, and whether a piece is the format's own tokens."""
        return [
            (self._tokenizer.decode([*run], skip_special_tokens=False), own)
            for own, run in groupby(ids, self._control.__contains__)
        ]

    def row(
        self,
        template: str,
        labels: Sequence[str],
        example: Example,
        max_length: int,
        virtual_tokens: int = 0,
    ) -> Row:
        """The example in at most `max_length` tokens, the virtual ones included.

        The input loses its end; an output does so only where it takes more than half of what the
        template leaves, and then has no end of turn. Raises Invalid if the template does not fit.
        """
        prompt = self.prompt_ids(template, example.input, labels)
        answer = self.answer_ids(example.output)
        room = max_length - virtual_tokens
        if len(prompt) + len(answer) <= room:
            return Row(prompt, answer, 0)
        places = self._tokenizer.encode(example.input, add_special_tokens=False).offsets
        empty = self.prompt_ids(template, "", labels)
        free = room - len(empty)
        if free < 2:
            raise Invalid(
                f"The template alone takes {len(empty)} tokens, and {room} are there for the "
                "whole example. Shorten the template or raise the maximum length.",
                field="template",
            )
        short = answer[: max(free // 2, free - len(places))]
        lost = len(answer) - len(short)
        kept = len(places)
        while (over := len(prompt) + len(short) - room) > 0 and kept > 0:
            kept = max(0, kept - over)
            text = example.input[: places[kept - 1][1]] if kept else ""
            prompt = self.prompt_ids(template, text, labels)
        return Row(prompt, short, len(places) - kept + lost)

    def _content(self, template: str, input: str, labels: Sequence[str]) -> str:
        content = fill(template, input, labels)
        return content.strip() if self._chat.strips else content

    def _encoded(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _text_ids(self, text: str) -> list[int]:
        ids = self._encoded(text)
        spelled = self._num_control(ids) or any(token in text for token in self._unknown)
        return self._plain(text) if spelled else ids

    def _plain(self, text: str) -> list[int]:
        """Tokens of the text as if there were no special ones."""
        normalizer, splitter = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        parts = [part for part, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        ids = [token.id for part in parts for token in self._tokenizer.model.tokenize(part)]
        return [id for id in ids if id not in self._control]

    def _num_control(self, ids: Sequence[int]) -> int:
        return sum(id in self._control for id in ids)

    def _special_ids(self) -> tuple[frozenset[int], list[str]]:
        """Ids that only the format may write: special tokens, and added ones its template names.

        Apart from them the text of the token for unknown characters, which text may lead to.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        control = {
            id
            for id, token in added.items()
            if token.special or (token.content.strip() and token.content in self._chat.template)
        }
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        id = self._tokenizer.token_to_id(unknown) if unknown else None
        return frozenset(control - {id}), [unknown] if id in added and unknown else []

    def _lead_ids(self) -> list[int]:
        """What the tokenizer puts before a text without chat format, such as a start token."""
        plain, whole = self._encoded("a"), self._tokenizer.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return list(whole[:start])

    def _end_of_turn(self) -> list[int]:
        ids = self._encoded(self._chat.end)
        first = next((place for place, id in enumerate(ids) if id in self._control), None)
        return [] if first is None else ids[: first + 1]


def _tokenizer(folder: Path) -> Tokenizer:
    try:
        found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exceptions
        raise Invalid(f"The model's tokenizer.json cannot be used: {str(error)[:200]}") from None
    found.no_truncation()
    found.no_padding()
    return found


def _end_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a text: the tokenizer's own first, then what the configurations name."""
    found = [tokenizer.token_to_id(special_tokens(folder).get("eos_token", ""))]
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    return list(dict.fromkeys(id for id in found if type(id) is int))


# Kept: a base model's files never change.
formatter = lru_cache(maxsize=4)(Formatter)
