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
from transformers import Trainer
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from appo import __version__
from appo.files import atomic_write
from appo.training.atomic_checkpoint import PARTIAL, checkpoint_name

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Paper:
    """Who introduced a method: BibTeX's ``key``, ``author`` and ``year``, and the number of the paper at arXiv."""

    key: str
    title: str
    author: str
    year: int
    arxiv: str
    note: str = ""

    @property
    def bibtex(self) -> str:
        """The entry to cite."""
        note = f"\n  note   = {{{self.note}}}," if self.note else ""
        return (
            f"@article{{{self.key},\n  title  = {{{{{self.title}}}}},\n  author = {{{self.author}}},\n"
            f"  year   = {{{self.year}}},{note}\n  eprint = {{arXiv:{self.arxiv}}},\n}}"
        )


PAPERS = {
    "appo": Paper(
        "du2026appo",
        "APPO: Attention-guided Perception Policy Optimization for Video Reasoning",
        "Henghui Du and Chang Zhou and Xi Chen and Di Hu",
        2026,
        "2602.23823",
        "CVPR 2026",
    ),
    "dapo": Paper(
        "yu2025dapo",
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "Qiying Yu and Zheng Zhang and Ruofei Zhu and Yufeng Yuan and Xiaochen Zuo and Yu Yue and others",
        2025,
        "2503.14476",
    ),
    "grpo": Paper(
        "shao2024deepseekmath",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Mingchuan Zhang and Y. K. Li "
        "and Y. Wu and Daya Guo",
        2024,
        "2402.03300",
    ),
}  # a supervised model has no paper to cite
_TRL = """\
@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020},
}"""  # noqa: E501
_START = """\
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video  # decodes with PyAV: pip install av

checkpoint = "{checkpoint}"
model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(checkpoint)

frames, metadata = load_video("video.mp4", fps={fps:g}, backend="pyav")
content = [{{"type": "video", "video": frames}}, {{"type": "text", "text": "What happens in this video?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={{"video_metadata": [metadata], "do_sample_frames": False}},
).to(model.device)
answer = model.generate(**inputs, max_new_tokens=1024)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])"""


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a model.

    Attributes:
        name: of the model.
        checkpoint: hub id or folder, from which it is loaded.
        method: by which it was trained; one of `appo.training.config.METHODS`.
        fps: frames sampled a second while it was trained.
        base: hub id of the model that was trained; None if it has none.
        dataset: hub id of the data; None if it is not known.
        is_adapter: whether these are PEFT's weights, on top of the base.
        tags: for the Hub.
        pages: (name, address) of pages on which the run was followed.
    """

    name: str
    checkpoint: str
    method: str
    fps: float = 2.0
    base: str | None = None
    dataset: str | None = None
    is_adapter: bool = False
    tags: Sequence[str] = ()
    pages: Sequence[tuple[str, str]] = ()


def card_text(facts: CardFacts) -> str:
    """The card: YAML for the Hub, then Markdown."""
    data = ModelCardData(
        base_model=facts.base,
        datasets=facts.dataset,
        library_name="peft" if facts.is_adapter else "transformers",
        model_name=facts.name,
        pipeline_tag="video-text-to-text",
        tags=sorted({"generated_from_trainer", *facts.tags}),
    )
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {facts.name}\n",
        _opening(facts),
        f"## Quick start\n\n```python\n{_START.format(checkpoint=facts.checkpoint, fps=facts.fps)}\n```\n",
        "This code numbers the positions behind a video as transformers does. The model was trained with those of\n"
        "Qwen-VL's pre-training, as `model, processor = appo.models.loading.load_model(checkpoint)` has them; in long\n"
        "videos they differ.\n",
        _training(facts),
        _citations(facts.method),
    ]
    return "\n".join(sections)


def _opening(facts: CardFacts) -> str:
    kind = "an adapter of" if facts.is_adapter else "a fine-tuned version of"
    what = f"{kind} [{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "fine-tuned"
    data = f" on [{facts.dataset}](https://huggingface.co/datasets/{facts.dataset})" if facts.dataset else ""
    return f"This video language model is {what}{data}.\n"


def _training(facts: CardFacts) -> str:
    paper = PAPERS.get(facts.method)
    source = f", a method introduced in [{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper else ""
    others = ((name, version(name)) for name in ("trl", "transformers", "torch"))
    versions = "\n".join(f"- {name}: {number}" for name, number in (("appo", __version__), *others))
    pages = "".join(f"\n\n[The run at {name}]({address})" for name, address in facts.pages)
    return f"## Training\n\nIt was trained with {facts.method.upper()}{source}.{pages}\n\n{versions}\n"


def _citations(method: str) -> str:
    entries = [PAPERS[method].bibtex] if method in PAPERS else []
    return "## Citations\n\n```bibtex\n" + "\n\n".join([*entries, _TRL]) + "\n```\n"


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
