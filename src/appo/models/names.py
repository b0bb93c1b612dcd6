"""What a model is called: a folder, a hub id, or ``spotlight``; checked before libraries are loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

SPOTLIGHT = "spotlight"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # name, or owner/name


def policy_path() -> Path:
    """The folder of the shipped weights, tokenizer and processor files of the tiny policy."""
    return Path(__file__).parents[1] / "world" / "tiny_policy"


def checkpoint_of(model: str) -> str:
    """What a named model is loaded from: the folder or hub id itself, or the folder of the shipped ``spotlight``.

    Raises:
        FileNotFoundError: as :func:`source_of`.
    """
    return str(policy_path()) if model == SPOTLIGHT else source_of(model)


def source_of(source: str | os.PathLike[str]) -> str:
    """A folder or hub id as text. Whether the hub has such an id is found out when it is loaded.

    Raises:
        FileNotFoundError: it can only be a folder, and there is none, or none that a model was saved to.
    """
    name = os.fspath(source)
    folder = Path(name)
    if folder.is_dir():
        if not any(folder.glob("*config.json")):
            raise FileNotFoundError(
                f"{name}: no checkpoint (no config.json); give the folder that a model was saved to"
            )
    elif folder.exists():
        raise FileNotFoundError(f"model {name}: this is a file; give the folder that a model was saved to")
    elif not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"model {name}: no such folder; give the folder that a model was saved to, or a hub id")
    return name
