"""Marks of answers in chat templates."""

from __future__ import annotations

import logging

_log = logging.getLogger(__name__)


def has_marks(source: str) -> bool:
    """Whether a template marks answers by ``{% generation %}`` where the marks can be followed.

    Within a macro, a call, a filter or the block of a ``set``, transformers counts the characters of the block alone,
    so that its marks lie too early.

    Example:
        >>> answer = "{% generation %}{{ x }}{% endgeneration %}"
        >>> has_marks(answer), has_marks("{# " + answer + " #}"), has_marks("{% set y %}" + answer + "{% endset %}")
        (True, False, False)
    """
    from jinja2 import Environment, TemplateSyntaxError

    try:
        tokens = [(kind, word) for _, kind, word in Environment().lex(source) if kind != "whitespace"]
    except TemplateSyntaxError:  # told with the first row that it refuses
        return False
    depth, marks = 0, []
    for place, (kind, _word) in enumerate(tokens):
        if kind != "block_begin":
            continue
        until = next((end for end in range(place, len(tokens)) if tokens[end][0] == "block_end"), None)
        if until is None:  # an open tag, told with the first row too
            return False
        tag = tokens[place + 1][1]
        is_block = tag in ("macro", "call", "filter") or (tag == "set" and ("operator", "=") not in tokens[place:until])
        depth += is_block - (tag in ("endmacro", "endcall", "endfilter", "endset"))
        marks += [depth] if tag == "generation" else []
    if any(marks):
        _log.warning(
            "the chat template's {% generation %} marks lie within a macro, call, filter or set block, where they "
            "cannot be followed; answers are found by what the template writes before and after them"
        )
    return bool(marks) and not any(marks)
