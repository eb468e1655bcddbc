"""The limits of a processor by name, as the command line and the file of a training run give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import PromptError
from ..media.options import Limits, check_positive_int

NAMES = (*(field.name for field in fields(Limits)), "max_characters")


def limit_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `Processor.from_pretrained` for limits that are given by their names, those of `Limits` and
    "max_characters".

    Raises:
        PromptError: a name is none of them.
        MediaError: a value is no positive number, or no positive integer where one is wanted.
    """
    if unknown := [name for name in given if name not in NAMES]:
        raise PromptError(f"{unknown[0]!r} is no limit; there are {', '.join(NAMES)}")
    values = dict(given)
    characters = (
        {}
        if "max_characters" not in values
        else {"max_characters": check_positive_int("max_characters", values.pop("max_characters"))}
    )
    return {"limits": Limits(**values), **characters}
