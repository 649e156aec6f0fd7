"""Keep secrets out of text that others may read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from psnc.stages import Stage, constructor_arguments, secret_arguments

__all__ = ["masked", "secret_texts"]

# What is shorter is in any text by chance.
_SHORTEST = 4


def masked(text: str, secrets: Iterable[str]) -> str:
    """Return a text with three stars in place of each secret, however it is quoted in it.

    Examples
    --------
    >>> masked("the token s3cret is wrong", ["s3cret"])
    'the token *** is wrong'
    """
    forms = {form for secret in secrets for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def secret_texts(stages: Iterable[Stage]) -> tuple[str, ...]:
    """Return the texts among the arguments of stages that are marked as secret."""
    found = {text for stage in stages for text in _of_stage(stage)}
    return tuple(sorted(text for text in found if len(text.strip()) >= _SHORTEST))


def _forms(secret: str) -> Iterator[str]:
    """Yield a secret as it is, stripped, on one line, and as ``repr`` writes it."""
    for text in (secret, secret.strip(), " ".join(secret.split())):
        if text:
            yield text
            yield repr(text)[1:-1]


def _of_stage(stage: Stage) -> Iterator[str]:
    secret = secret_arguments(stage)
    for name, value in constructor_arguments(stage).items():
        yield from _texts(value, is_secret=name in secret)


def _texts(value: Any, *, is_secret: bool) -> Iterator[str]:
    """Yield the text in a value, if it is secret, and in any case that of the stages in it."""
    if isinstance(value, Stage):
        yield from _of_stage(value)
    elif isinstance(value, str):
        if is_secret:
            yield value
    elif isinstance(value, bytes):
        if is_secret:
            yield value.decode("utf-8", "backslashreplace")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _texts(item, is_secret=is_secret)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item, is_secret=is_secret)
