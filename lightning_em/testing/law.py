"""Laws of a contract: functions that raise if broken, named by the first line of their docstring."""

from collections.abc import Callable
from typing import TypeVar

Subject = TypeVar("Subject")


def enforce(law: Callable[[Subject], None], name: str, subject: Subject) -> None:
    """Check that `subject` obeys `law`.

    Args:
        law: Function that raises if `subject` breaks the law.
        name: Name of the plug-in, for the message.
        subject: Argument of `law`.

    Raises:
        AssertionError: If the law raises an exception; the message names the plug-in and the law.
    """
    try:
        law(subject)
    except Exception as error:
        assert law.__doc__
        title = law.__doc__.splitlines()[0].rstrip(".")
        raise AssertionError(f"{name} breaks the law '{title}': {error}") from error


def require(condition: bool, message: str) -> None:
    """Raise an AssertionError with `message` unless `condition` holds."""
    if not condition:  # not an assert: `python -O` must not switch the contract off
        raise AssertionError(message)
