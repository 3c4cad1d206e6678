"""What the hub's refusals mean, in one line each, whichever library met them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")

_TOKEN = "log in (hf auth login), or set HF_TOKEN to a token"
_BY_STATUS = {
    401: f"it is not there, is private, or the token is not valid (401); check the name, or {_TOKEN} that may see it",
    403: "access is refused (403): it asks for its terms to be accepted on its page, or the token has no right to it; "
    f"{_TOKEN} that has",
    404: "there is no such repository, revision or file, or it is private (404); check the name",
    408: "the hub did not answer in time (408); try again",
    429: "the hub asks to send less for now (429{wait}); try again later",
}
_PASSING = (429, 500, 502, 503, 504)
_WAITS, _LONGEST_WAIT = (1, 4, 16), 120
_FAULT = "the hub has a fault ({status}{wait}); try again later"


def hub_refusal(error: BaseException) -> str | None:
    """Why the hub did not give, or take, what was asked for, and what to do; None where it is no error of the hub's.

    Args:
        error: of huggingface_hub, or what another library made of one.
    """
    from huggingface_hub import errors

    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, errors.HfHubHTTPError) and each.response is not None:
            return _of_response(each)
        if isinstance(each, errors.HFValidationError):
            return f"it is no id of the hub: {' '.join(str(each).split())[:200]}"
    is_offline = any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain)
    if is_offline or (_says_offline() and any(isinstance(each, errors.LocalEntryNotFoundError) for each in chain)):
        return (
            "it is not in the local cache, and HF_HUB_OFFLINE is set; unset it, or fill the cache where there is a hub"
        )
    if any(isinstance(each, errors.FileMetadataError) for each in chain):
        return f"what answers is no hub: {' '.join(str(error).split())[:200]}; check HF_ENDPOINT"
    lost = (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if any(isinstance(each, lost) for each in chain):
        return "the hub did not answer, or broke off; check the network and try again: what has come whole is kept"
    return None


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub refuses, breaks off, or is not there."""
    from huggingface_hub.errors import HTTPError

    return (OSError, ValueError, HTTPError)


def patiently(call: Callable[[], _T]) -> _T:
    """What ``call`` gives, asked again a few times while the hub is busy or has a fault, as long as it says to wait.

    huggingface_hub itself asks again for some requests only.
    """
    for wait in _WAITS:
        try:
            return call()
        except hub_errors() as error:
            response = _response(error)
            if response is None or response.status_code not in _PASSING:
                raise
            after = str(response.headers.get("Retry-After", ""))
            seconds = int(after) if after.isdigit() else wait
            if seconds > _LONGEST_WAIT:
                raise
        time.sleep(seconds)
    return call()


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer behind an error; None where there is none."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _response(error: BaseException) -> Any:
    from huggingface_hub.errors import HfHubHTTPError

    return next((each.response for each in _chain(error) if isinstance(each, HfHubHTTPError)), None)


def _of_response(error: object) -> str:
    from huggingface_hub import errors

    response = error.response  # type: ignore[attr-defined]
    after = response.headers.get("Retry-After", "")
    wait = f", Retry-After {after} s" if after.isdigit() else ""
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision (404); give a branch, a tag or a commit of it"
    if isinstance(error, errors.GatedRepoError):
        return _BY_STATUS[403]
    told = _BY_STATUS.get(response.status_code, _FAULT if response.status_code >= 500 else "the hub refuses ({status})")
    return told.format(status=response.status_code, wait=wait)


def _says_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
