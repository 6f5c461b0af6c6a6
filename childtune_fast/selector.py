"""How parameters are named in an argument: a predicate over names, or a regular expression that is searched in them."""

import re
from collections.abc import Callable

Selector = str | re.Pattern[str] | Callable[[str], bool] | None


def predicate(selector: Selector, what: str) -> Callable[[str], object]:
    """Returns a selector that is not None as a function of a name; `what` is the argument's.

    Raises:
        ValueError: it is no regular expression.
        TypeError: it is of another kind.
    """
    if isinstance(selector, (str, re.Pattern)):
        try:
            return re.compile(selector).search
        except re.error as error:
            raise ValueError(f"{what} must be a regular expression (got {selector!r}: {error})") from None
    if not callable(selector):
        raise TypeError(
            f"{what} must be a predicate over parameter names, a regex or None (got {type(selector).__name__})"
        )
    return selector
