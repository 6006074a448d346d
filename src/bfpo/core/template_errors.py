"""Errors of chat templates, which are programs that come with a model."""

from jinja2.exceptions import TemplateError

TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    ValueError,
)
"""What a template raises that refuses a conversation, expects another one, or is wrong. Where these are caught, a
`BfpoError` must go through: it is a ValueError or a RuntimeError, too."""
