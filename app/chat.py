"""A model's chat format: what its template writes around a user's text and after an answer.

The template is a program from strangers. It runs in a sandbox, and only ever on the two markers
below, never on a user's text; so what it does when a base model is made ready, in a process with
limits (`main`), is what it does later in the web.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import Invalid
from app.storage import Path

LONGEST_TEMPLATE = 100_000  # characters
LONGEST_FORMAT = 20_000
CPU_SECONDS, MEMORY_BYTES = 2, 1 << 29  # for `main`
_USER, _ANSWER = "\ue000user\ue001", "\ue000answer\ue001"  # private-use characters
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Chat(NamedTuple):
    """What stands around a user's text in a prompt, and what follows an assistant's answer."""

    before: str
    after: str
    end: str
    strips: bool  # whether white space around the user's text is removed
    template: str


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty if there is no such file. Raises Invalid."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Invalid(f"{path.name} of the model is not valid JSON. Get the file anew.") from None
    if not isinstance(found, dict):
        raise Invalid(f"{path.name} of the model should hold a JSON object, but does not.")
    return found


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens that the folder's tokenizer names, by name: `eos_token` and the like."""
    named = read_json(folder / "special_tokens_map.json")
    named |= read_json(folder / "tokenizer_config.json")
    found: dict[str, str] = {}
    for name in (f"{kind}_token" for kind in _SPECIAL):
        token = named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def chat(folder: Path) -> Chat | None:
    """The chat format of the model in the folder; None if it has none.

    Raises Invalid for a template that fails or does what cannot be followed.
    """
    source, path = _template(folder)
    if source is None:
        return None
    if len(source) > LONGEST_TEMPLATE:
        raise Invalid(f"The chat template has more than {LONGEST_TEMPLATE:,} characters.")
    render = _renderer(source, special_tokens(folder), path.stat().st_mtime)
    user = {"role": "user", "content": _USER}
    text = render([user], True)
    if text.count(_USER) != 1:
        raise Invalid("The chat template does not write the user's text just once.")
    before, after = text.split(_USER)
    spaced = render([user | {"content": f"\n {_USER} \n"}], True)
    if spaced not in {text, f"{before}\n {_USER} \n{after}"}:
        raise Invalid("The chat template changes the user's text in a way that is not known.")
    answered = render([user, {"role": "assistant", "content": _ANSWER}], False)
    return Chat(before, after, answered.partition(_ANSWER)[2], spaced == text, source)


def _template(folder: Path) -> tuple[str | None, Path]:
    """The template and the file it stands in; transformers looks in the same order."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8", errors="replace"), path
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
            found = named[0].get("template") if named else None
        if isinstance(found, str) and found.strip():
            return found, folder / name
    return None, path


class _Generation(Extension):
    """`{% generation %}`, which marks an assistant's words for training, changes no text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _renderer(source: str, tokens: dict[str, str], moment: float) -> Callable[..., str]:
    """A function (messages, whether an answer is to follow) -> text. Raises Invalid."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _fail
    # A template that writes the date gets that of its own file: the same prompt today and
    # tomorrow, in training and after it.
    environment.globals["strftime_now"] = lambda form: time.strftime(form, time.gmtime(moment))
    for chance in (environment.filters, environment.globals):
        chance.pop("random", None)
        chance.pop("lipsum", None)

    def render(messages: list[dict[str, str]], answer_follows: bool) -> str:
        try:
            text = environment.from_string(source).render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=answer_follows,
                enable_thinking=False,  # models that can think aloud first are to answer at once
                **tokens,
            )
        except MemoryError:
            raise Invalid("The chat template takes too much memory.") from None
        except Exception as error:  # a template can raise whatever Python can
            raise Invalid(f"The chat template fails: {str(error)[:200] or type(error)}") from None
        if len(text) > LONGEST_FORMAT:
            raise Invalid(f"The chat template writes more than {LONGEST_FORMAT:,} characters.")
        return text

    return render


def main() -> int:
    """Try the folder's template with little time and memory; 1 and a sentence if it fails."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        chat(Path(sys.argv[1]))
    except Invalid as error:
        print(error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
