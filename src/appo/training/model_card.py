"""The card of a trained model, README.md in its folder: what it is, code that asks it about a video, whom to cite.

TRL's own card is of language models and cites the paper of its GRPO for every trainer derived from it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import Trainer
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from appo import __version__
from appo.files import atomic_write
from appo.training.atomic_checkpoint import PARTIAL, checkpoint_name

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a model."""

    name: str  # of the model
    checkpoint: str  # hub id or folder, from which it is loaded
    method: str  # by which it was trained; one of `appo.training.config.METHODS`.
    fps: float = 2.0  # frames sampled a second while it was trained
    base: str | None = None  # hub id of the model that was trained; None if it has none
    dataset: str | None = None  # hub id of the data; None if it is not known
    is_adapter: bool = False  # whether these are PEFT's weights, on top of the base
    tags: Sequence[str] = ()  # for the Hub
    pages: Sequence[tuple[str, str]] = ()  # (name, address) of pages on which the run was followed


def card_text(facts: CardFacts) -> str:
    """The card: YAML for the Hub, then Markdown; its text is in model_card.md.jinja."""
    data = ModelCardData(
        base_model=facts.base,
        datasets=facts.dataset,
        library_name="peft" if facts.is_adapter else "transformers",
        model_name=facts.name,
        pipeline_tag="video-text-to-text",
        tags=sorted({"generated_from_trainer", *facts.tags}),
    )
    versions = [("appo", __version__), *((name, version(name)) for name in ("trl", "transformers", "torch"))]
    loader = PackageLoader("appo.training", "")
    environment = Environment(loader=loader, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    card: str = environment.get_template("model_card.md.jinja").render(
        data=data.to_yaml(), facts=facts, versions=versions
    )
    return card


class CardWriter(Trainer):
    """A trainer that writes its own card: into ``output_dir``, as TRL does, and beside the weights of every model.

    It stands before TRL's trainer in a class's bases.
    """

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card into ``output_dir``; the parameters are TRL's."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        holds_model = any(folder.glob("*.safetensors"))
        place = folder if holds_model else folder / checkpoint_name(self.state.global_step)
        folder.mkdir(parents=True, exist_ok=True)
        more = [tags] if isinstance(tags, str) else list(tags or ())
        atomic_write(folder / CARD, card_text(self._card_facts(place, model_name, dataset_name, more)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, then its card beside it, in the place of PEFT's empty form."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        final = folder.parent.parent / folder.name if folder.parent.name == PARTIAL else folder
        atomic_write(folder / CARD, card_text(self._card_facts(final)))

    def _card_facts(
        self, place: Path, name: str | None = None, dataset: str | None = None, tags: Sequence[str] = ()
    ) -> CardFacts:
        """Of the model that lies, or is going to lie, in a folder."""
        hub_id = self.hub_model_id
        method = getattr(self.args, "method", "sft")
        base = getattr(self.model.config, "_name_or_path", "") or ""
        trackio = get_trackio_space_url()
        own = ["trl", "appo", method, *([f"trackio:{trackio}"] if trackio else [])]
        run = getattr(sys.modules.get("wandb"), "run", None)
        pages = {"Weights & Biases": run and run.url, "Trackio": trackio, "Comet": get_comet_experiment_url()}
        return CardFacts(
            name=name or (hub_id.split("/")[-1] if hub_id else Path(self.args.output_dir).resolve().name),
            checkpoint=hub_id or place.as_posix(),
            method=method,
            fps=getattr(self.args, "video_fps", CardFacts.fps),
            base=base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None,
            dataset=dataset,
            is_adapter=hasattr(self.model, "peft_config"),
            tags=[*own, *(tag for tag in tags if not tag.startswith("trackio:"))],
            pages=[(title, address) for title, address in pages.items() if address],
        )
