"""What the matrix of combinations trains on: rows whose questions tell them apart, and what each of them must show.

Everything is made once, in a folder: an untrained policy, clips, pictures, and for every row its prompt and its vision
features, encoded anew from the files and by no code of the trainer.

Shape suffixes: P prompt tokens, n placeholders of a prompt, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from recipes.tiny_policy.build import build_policy
from torch import Tensor

from appo.rollout.generation import clean_messages, encode_prompt, video_sources
from appo.types import VideoSource
from appo.video.frame_cache import FrameCache
from appo.video.reader import FrameSampling, SampledVideo
from tests.combinations.cases import DIMENSIONS
from tests.support.runs import clips

CLIPS = 6
GROUP = 4  # responses to a prompt
SAMPLING = FrameSampling(fps=2.0, max_frames=8, min_frames=8)
COLOURS = ("red", "lime", "blue", "white", "orange", "purple")
# Which video or picture (by number), or fault, each row shows. Two processes take two rows each at a time (or four): in
# some rollouts one has no vision where the other has, or the same video twice where the other has two.
MIXED = ("text", "text", "video 0", "picture 1", "memory 2", "video and picture 3", "video 4", "text")
REPEATED = ("video 0", "video 0", "video 1", "video 2", "video 1", "video 1", "video 3", "video 0")
FAULTY = ("no file", "video 1", "bad picture", "video 3", "placeholder", "video 0", "no file", "video 2")
SIX_AND_TWO = (0, 1, 2, 3, 4, 5, 1, 0)
KINDS = {
    "video": tuple(f"video {number}" for number in SIX_AND_TWO),
    "text": ("text",) * len(SIX_AND_TWO),
    "picture path": tuple(f"picture {number}" for number in SIX_AND_TWO),
    "picture in memory": tuple(f"memory {number}" for number in SIX_AND_TWO),
    "mixed": MIXED,
    "repeated video": REPEATED,
    "faulty": FAULTY,
}
assert KINDS.keys() == set(DIMENSIONS["rows"])
FAULTS = ("no file", "bad picture", "placeholder")


@dataclass(frozen=True)
class Shown:
    """What a row must show to the language model.

    Attributes:
        ids_P: its prompt, of which none is the beginning of another.
        features_nH: of its placeholders, in their order; empty for text.
    """

    ids_P: Tensor
    features_nH: Tensor


def number_of(prompt: Any) -> int:
    """Which row a conversation is about: its question begins with the number."""
    texts = [part["text"] for message in clean_messages(prompt) for part in message["content"] if "text" in part]
    return int(re.match(r"(\d+) :", texts[-1]).group(1))


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The folder of everything."""

    folder: Path

    @property
    def policy(self) -> Path:
        """An untrained policy that often ends a response, and its processor."""
        return self.folder / "policy"

    @property
    def frames(self) -> Path:
        """The frame cache, which has all clips."""
        return self.folder / "frames"

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """The rows of a kind; a picture in memory is in the column ``images``."""
        rows = [self._row(number, shown) for number, shown in enumerate(KINDS[kind])]
        pictures = any("images" in row for row in rows)
        return [{"images": None, **row} for row in rows] if pictures else rows

    def dataset(self, kind: str) -> Dataset:
        """The same as a table."""
        return Dataset.from_list(self.rows(kind))

    def oracle(self, kind: str) -> dict[int, Shown]:
        """What each row that can be shown must show."""
        return {number: Shown(*pair) for number, pair in torch.load(self.folder / "oracle.pt")[kind].items()}

    def _row(self, number: int, shown: str) -> dict[str, Any]:
        # A row shows what its own number is not tied to: the same picture stands under other questions elsewhere.
        which = int(shown.split()[-1]) if shown[-1].isdigit() else 0
        video = {"type": "video", "video": str(sorted((self.folder / "clips").glob("*.mp4"))[which])}
        picture = {"type": "image", "image": str(self.folder / "pictures" / f"{which}.png")}
        question = f"{number} : what colour is the star ?"
        parts: dict[str, list[dict[str, Any]]] = {
            "text": [],
            "video": [video],
            "picture": [picture],
            "memory": [{"type": "image"}],
            "video and picture": [video, picture],
            "no file": [{"type": "video", "video": str(self.folder / "gone.mp4")}],
            "bad picture": [{"type": "image", "image": str(self.folder / "bad.png")}],
            "placeholder": [video],
        }
        kind = shown.rstrip("0123456789 ")
        text = f"{question} <|video_pad|>" if kind == "placeholder" else question
        content = [*parts[kind], {"type": "text", "text": text}]
        row = {"id": f"row {number}", "number": number, "prompt": [{"role": "user", "content": content}]}
        return {**row, "images": [open_copy(picture["image"])]} if kind == "memory" else row


def open_copy(path: str) -> Image.Image:
    """A picture that knows of no file."""
    with Image.open(path) as opened:
        return opened.convert("RGB")


# --- making it --------------------------------------------------------------------------------------------------------


def build_world(folder: Path) -> World:
    """Make everything in a folder."""
    world = World(folder)
    model, processor = build_policy(0)
    # Every sixth word ends a response, else none of an untrained policy's would end.
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *range(10, len(processor.tokenizer), 6)]
    model.save_pretrained(world.policy)
    processor.save_pretrained(world.policy)
    clips(folder / "clips", CLIPS)
    (folder / "pictures").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (56, 56) if number % 2 else (140, 28), colour).save(folder / "pictures" / f"{number}.png")
    (folder / "bad.png").write_text("no picture\n")
    cache = FrameCache(world.frames)

    def read(source: VideoSource) -> SampledVideo:
        return cache.read(source, processor.video_processor, SAMPLING)[0]

    oracle = {kind: _oracle_of(world.rows(kind), KINDS[kind], model, processor, read) for kind in KINDS}
    torch.save(oracle, folder / "oracle.pt")
    return world


def _oracle_of(
    rows: Sequence[dict[str, Any]],
    kinds: Sequence[str],
    model: Any,
    processor: Any,
    read: Callable[[VideoSource], SampledVideo],
) -> dict[int, tuple[Tensor, Tensor]]:
    good = [row for row, kind in zip(rows, kinds, strict=True) if kind not in FAULTS]
    return {row["number"]: _shown(row, model, processor, read) for row in good}


@torch.no_grad()
def _shown(row: dict[str, Any], model: Any, processor: Any, read: Callable[[VideoSource], SampledVideo]) -> Any:
    """The prompt's ids and, at its placeholders, the output of the model's own tower for this row alone."""
    messages = row["prompt"]
    if row.get("images"):
        content = [
            part | {"image": row["images"][0]} if part["type"] == "image" else part for part in messages[0]["content"]
        ]
        messages = [{**messages[0], "content": content}]
    inputs = encode_prompt(processor, messages, [read(source) for source in video_sources(messages)])
    ids_P = inputs.ids_1P[0]
    features_PH = torch.zeros(len(ids_P), model.config.text_config.hidden_size)
    if inputs.pixel_values is not None:
        found = model.model.get_image_features(inputs.pixel_values, inputs.image_grid_thw, return_dict=True)
        features_PH[ids_P == model.config.image_token_id] = torch.cat(list(found.pooler_output))
    if inputs.pixel_values_videos is not None:
        found = model.model.get_video_features(inputs.pixel_values_videos, inputs.video_grid_thw, return_dict=True)
        features_PH[ids_P == model.config.video_token_id] = torch.cat(list(found.pooler_output))
    return ids_P, features_PH[is_placeholder(ids_P, model.config)]


def is_placeholder(ids: Tensor, config: Any) -> Tensor:
    """Where a picture's or video's features stand."""
    return (ids == config.image_token_id) | (ids == config.video_token_id)
