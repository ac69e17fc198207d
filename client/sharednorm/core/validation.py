"""Checks of names, switches and numbers. Local layers, handles and the server use the same ones."""

from __future__ import annotations

import enum
import math
import unicodedata
from typing import TypeGuard, TypeVar

import numpy as np

from sharednorm.core.limits import (
    DEFAULT_NAMESPACE,
    MAX_DOMAIN_NAME_CHARACTERS,
    MAX_GROUP_NAME_CHARACTERS,
    MAX_NAME_BYTES,
    MAX_NAMESPACE_CHARACTERS,
)
from sharednorm.errors import InvalidConfiguration, InvalidName


def check_name(name: object) -> str:
    """Check a layer's name and return it.

    Raises:
        InvalidName: Not a string, empty or blank, over 512 bytes of UTF-8, or with control characters.
    """
    if not isinstance(name, str) or not name.strip():
        raise InvalidName(
            f"a remote layer is shared by its name: pass name='...' (expected: a non-empty string, got {brief(name)})"
        )
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > MAX_NAME_BYTES:
        raise InvalidName(f"the layer's name has {size} bytes of UTF-8 (expected: at most {MAX_NAME_BYTES})")
    _check_characters("layer", name)
    return name


def check_group_name(what: str, name: object) -> str:
    """Check the name of a group, or of one of its members, and return it.

    Raises:
        InvalidName: Not a string, empty or blank, over 256 characters, or with control characters.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_GROUP_NAME_CHARACTERS:
        raise InvalidName(
            f"the {what}'s name is {brief(name)} (expected: a string of 1 to {MAX_GROUP_NAME_CHARACTERS} characters)"
        )
    _check_characters(what, name)
    return name


def check_domain(domain: object) -> str:
    """Check the name of a domain and return it; "" stands for a layer's own statistics.

    Raises:
        InvalidName: Not a string, blank, over 256 characters, or with control characters.
    """
    if not isinstance(domain, str) or (domain and not domain.strip()) or len(domain) > MAX_DOMAIN_NAME_CHARACTERS:
        raise InvalidName(
            f"the domain's name is {brief(domain)} (expected: a string of 1 to {MAX_DOMAIN_NAME_CHARACTERS} "
            "characters; '' for the layer's own statistics)"
        )
    _check_characters("domain", domain)
    return domain


def check_namespace(namespace: object) -> str:
    """Check a namespace and return it; the empty one is "default".

    Raises:
        InvalidName: Not a string, over 128 characters, or with control characters.
    """
    if not isinstance(namespace, str):
        raise InvalidName(f"a namespace is a string, got {brief(namespace)}")
    if len(namespace) > MAX_NAMESPACE_CHARACTERS:
        raise InvalidName(
            f"the namespace has {len(namespace)} characters (expected: at most {MAX_NAMESPACE_CHARACTERS})"
        )
    _check_characters("namespace", namespace)
    return namespace or DEFAULT_NAMESPACE


def check_flag(name: str, value: object) -> bool:
    """Check a switch, Python's True or False or NumPy's, and return it.

    Raises:
        InvalidConfiguration: It is something else; "eval", for one, would pass for True.
    """
    require(isinstance(value, (bool, np.bool_)), name, value, "True or False")
    return bool(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer, Python's or NumPy's; True and False are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value is a real number that a float can hold; True and False are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _check_characters(what: str, text: str) -> None:
    # Cc is control characters; Cs is lone surrogates, which have no UTF-8. What is printable has neither.
    if text.isprintable():
        return
    bad = [c for c in text if unicodedata.category(c) in {"Cc", "Cs"}]
    if bad:
        raise InvalidName(
            f"the {what}'s name has the control character U+{ord(bad[0]):04X} "
            f"(expected: printable characters, any script): {brief(text)}"
        )


def require(fine: bool, name: str, value: object, expected: str) -> None:
    """Raise InvalidConfiguration, which names the value and what was expected, unless the value is `fine`."""
    if not fine:
        raise InvalidConfiguration(f"{name} is {brief(value)} (expected: {expected})")


_Choice = TypeVar("_Choice", bound=enum.Enum)


def choice_of(choices: type[_Choice], name: str, value: object) -> _Choice:
    """Return the member of an enumeration that a value is, or is the name of.

    Raises:
        InvalidConfiguration: It is none of them.
    """
    for choice in choices:
        if value is choice or (isinstance(value, str) and value == choice.value):
            return choice
    expected = " or ".join(repr(choice.value) for choice in choices)
    raise InvalidConfiguration(f"{name} is {brief(value)} (expected: {expected})")


def brief(value: object) -> str:
    """Return a value as an error message shows it: ASCII, at most 120 characters."""
    text = ascii(value)
    return text if len(text) <= 120 else text[:117] + "..."
