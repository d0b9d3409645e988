"""The stylesheet of the methods: colour and dash of each, drawn from what it says of itself."""

import hashlib

from app.methods import METHODS

# Registered, so that scripts can read the colour in force as an rgb() value.
_HEAD = '@property --method { syntax: "<color>"; inherits: true; initial-value: #8d8d8d; }\n'
_RULE = (
    ".method-{key} {{ --method: light-dark({light}, {dark}); }}\n"
    ".method-{key} .mark-line {{ stroke-dasharray: {dash}; }}\n"
)


def _sheet() -> str:
    rules = [
        _RULE.format(key=one.key, light=one.light, dark=one.dark, dash=one.dash or "none")
        for one in METHODS.values()
    ]
    base = _RULE.format(key="base", light="#6f6f6f", dark="#a8a8a8", dash="1 3")
    return _HEAD + "".join(rules) + base


SHEET = _sheet()
ADDRESS = f"/methods.css?v={hashlib.sha256(SHEET.encode()).hexdigest()[:12]}"
