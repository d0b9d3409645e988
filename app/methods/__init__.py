"""The tuning methods: every module of this folder that defines one. A fifth is one more file."""

import importlib
import inspect
import pkgutil

from app.errors import Invalid
from app.methods.base import Method, Params

__all__ = ["METHODS", "Method", "Params", "get"]


def _found() -> dict[str, Method]:
    methods: list[Method] = []
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        methods += [
            value()
            for _, value in inspect.getmembers(loaded, inspect.isclass)
            if issubclass(value, Method)
            and value.__module__ == loaded.__name__
            and "key" in vars(value)
        ]
    return {method.key: method for method in sorted(methods, key=lambda method: method.order)}


METHODS = _found()


def get(key: str) -> Method:
    """The method of that key.

    Raises Invalid with the keys there are.
    """
    if key not in METHODS:
        raise Invalid(f"There is no method {key!r}. Choose from: {', '.join(METHODS)}.")
    return METHODS[key]
