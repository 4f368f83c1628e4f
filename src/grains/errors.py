"""`UserError`, the exception for a user's mistake, and what the hub's exceptions mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the input: the message says what was expected, what was found and what to do.

    Scripts print the message as one line and exit with a status that is not zero. Any other
    exception is a bug and keeps its traceback. Characters that would end the line or command a
    terminal (they may come from a data file) are written as escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(
            "".join(
                character
                if character.isprintable()
                else character.encode("unicode_escape").decode()
                for character in message
            )
        )


@contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """Whatever is raised in the block becomes one UserError, its cause kept.

    For what may raise anything, such as the forward of a model family that nobody has tried.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what} ({type(error).__name__}: {reason}); {advice}") from error


def hub_trouble(error: BaseException) -> str:
    """Why loading from the hub failed: gated, missing, network, or '' if the hub is not the reason.

    error: what was raised; the exceptions that caused it are looked at too.
    """
    # Imported late: these libraries take seconds, and scripts check their flags before that.
    import httpx2
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors as hub

    kinds = {
        "gated": (hub.GatedRepoError,),
        "missing": (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, DatasetNotFoundError),
        "network": (
            hub.LocalEntryNotFoundError,
            hub.OfflineModeIsEnabled,
            httpx2.TransportError,
            ConnectionError,
            TimeoutError,
        ),
    }
    if "is a gated dataset" in str(error):  # `datasets` does not chain the hub's exception
        return "gated"
    for cause in _causes(error):
        for trouble, classes in kinds.items():
            if isinstance(cause, classes):
                return trouble
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the exceptions that it was raised from, the innermost first."""
    inner = error.__cause__ or error.__context__
    if inner is not None:
        yield from _causes(inner)
    yield error
