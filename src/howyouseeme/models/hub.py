"""Hugging Face's hub: whether it answers, and what was downloaded from it before.

Its client tries each file six times, which takes half a minute and prints a line each time: good while a
connection comes and goes, and of no use where there is none. So it is asked once before anything else.
"""

from __future__ import annotations

__all__ = ["answers", "downloaded", "silence"]


def answers() -> bool:
    """Whether the hub can be reached, over the proxy and at the address that the user has set.

    >>> answers()                                                # False in HF_HUB_OFFLINE=1
    """
    from huggingface_hub import constants, get_session  # noqa: PLC0415

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    # Of requests, or of httpx since huggingface_hub 1.0; or it is set to be offline.
    except Exception:
        return False
    return True


def silence() -> str:
    """The reason to give where the hub does not answer.

    >>> silence()                                            # "https://huggingface.co does not answer"
    """
    from huggingface_hub import constants  # noqa: PLC0415

    return f"{constants.ENDPOINT} does not answer"


def downloaded(repository: str, file: str) -> str | None:
    """Where a file of a repository is that was downloaded before; None if it was not.

    >>> downloaded("timm/resnet18.a1_in1k", "model.safetensors")
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415

    found = try_to_load_from_cache(repository, file)
    return found if isinstance(found, str) else None  # it also marks what is known not to exist
