"""What a law is: a function that raises; its docstring's first line is its name."""

from collections.abc import Callable
from typing import TypeVar

Subject = TypeVar("Subject")


def enforce(law: Callable[[Subject], None], name: str, subject: Subject) -> None:
    """Hold `subject` to `law`.

    Raises:
        AssertionError: If the law raises anything, with its name and that of the plug-in.
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
