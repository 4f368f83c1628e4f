"""`UserError`, the exception for a user's mistake, and what the hub's exceptions mean."""

from __future__ import annotations

from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in the input: the message says what was expected, what was found and what to do.

    Scripts print the message as one line and exit with a status that is not zero. Any other
    exception is a bug and keeps its traceback.
    """


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
