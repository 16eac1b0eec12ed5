"""The Hugging Face hub: what was fetched before needs no network, and a missing network is an error at once."""

from __future__ import annotations

import contextlib
import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path

from hybridnas.errors import DataError


def why_offline() -> str | None:
    """Return in words why the hub cannot be reached, or None where a request is worth its time.

    The hub's own client retries for half a minute before it says so.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the environment's HF_HUB_OFFLINE forbids the network"
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    if urllib.request.getproxies() or os.environ.get("ALL_PROXY"):
        return None  # the proxy knows names that this machine does not
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"there is no network: {host} cannot be found"
    return None


def fetch_tokenizer(name: str) -> Path:
    """Return the folder of a hub tokenizer, fetched now or before; raises DataError saying why it cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def fetch(file: str, *, local: bool) -> Path:
        return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=local))

    try:
        return fetch("tokenizer.json", local=True).parent
    except HFValidationError:
        raise DataError("it is not a name that the Hugging Face hub allows") from None
    except (OSError, EntryNotFoundError):
        pass
    if reason := why_offline():
        raise DataError(f"it could not be fetched from the Hugging Face hub, because {reason}")
    try:
        found = fetch("tokenizer.json", local=False)
    except RepositoryNotFoundError:
        raise DataError("the Hugging Face hub has nothing of that name (or it needs a login)") from None
    except EntryNotFoundError:
        raise DataError("its Hugging Face repository has no tokenizer.json") from None
    except (OSError, HfHubHTTPError) as error:
        raise DataError(f"it could not be fetched from the Hugging Face hub: {' '.join(str(error).split())}") from None
    with contextlib.suppress(OSError, HfHubHTTPError, EntryNotFoundError):
        fetch("tokenizer_config.json", local=False)  # it names the end-of-text token
    return found.parent
