"""Chat messages with videos -> model inputs, each file decoded once -> responses.

Shape suffixes: P prompt tokens, B rows, N response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from appo.models.families import family_or_generic
from appo.models.prompt import Prompt
from appo.models.prompt_cache import repeated_prompts
from appo.types import VideoSource
from appo.video.frame_cache import FrameCache
from appo.video.frame_sampling import lm_frame_timestamps, merged_frames
from appo.video.reader import Call, FrameSampling, SampledVideo, call_inline, read_video

Messages = list[dict[str, Any]]


class PromptError(ValueError):
    """A prompt's picture or text cannot be used. The message names it, what is wrong and the fix, in one line."""


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """The model without dropout meanwhile; afterwards it is in the mode that it was in before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class VideoCache:
    """Sampled videos by what they show, for one rollout: each is decoded once however often it is asked for.

    Attributes:
        decoded: number of videos (clips of one file count each) decoded so far.
        hits: number of videos found in the cache on disk instead.
    """

    def __init__(
        self, video_processor: Any, sampling: FrameSampling, cache: FrameCache | None = None, call: Call = call_inline
    ) -> None:
        self._video_processor = video_processor
        self._sampling = sampling
        self._videos: dict[VideoSource, SampledVideo] = {}
        self._timestamps: dict[VideoSource, tuple[float, ...]] = {}
        self._cache, self._call = cache, call
        self.decoded = self.hits = 0

    def read(self, source: VideoSource) -> SampledVideo:
        """The sampled video, decoded now if it has not been yet. Raises VideoError (typed, one line)."""
        if source not in self._videos:
            self._videos[source] = video = self._read(source)
            self._timestamps[source] = lm_frame_timestamps(video, merged_frames(self._video_processor))
        return self._videos[source]

    def _read(self, source: VideoSource) -> SampledVideo:
        if self._cache is None:
            video, found = read_video(source, self._video_processor, self._sampling, self._call), False
        else:
            video, found = self._cache.read(source, self._video_processor, self._sampling, self._call)
        self.hits += found
        self.decoded += not found
        return video

    def timestamps(self, messages: Messages) -> tuple[float, ...]:
        """Seconds of each frame the language model sees in a conversation whose videos have been read."""
        return tuple(time for source in video_sources(messages) for time in self._timestamps[source])

    def clear(self) -> None:
        """Forget the pixels; counts and timestamps stay."""
        self._videos.clear()


def clean_messages(messages: Messages) -> Messages:
    """Messages as lists of parts without the null fields a table adds to every part.

    Arrow gives all parts of a column the same fields, so a text part comes back as {"type": "text", "video": None};
    chat templates that ask `'video' in part` would then draw a second video.
    """
    cleaned = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = [{key: value for key, value in part.items() if value is not None} for part in parts]
        cleaned.append({"role": message["role"], "content": parts})
    return cleaned


def video_sources(messages: Messages) -> list[VideoSource]:
    """What the videos of a conversation show, in order. Raises VideoError where a part asks for no time."""
    return [VideoSource.from_part(part) for part in message_parts(messages) if part["type"] == "video"]


def has_video(messages: Any) -> bool:
    """Whether a dataset's ``prompt`` (a string, or messages) holds a video part."""
    return isinstance(messages, list) and any(part["type"] == "video" for part in message_parts(messages))


def pictures(messages: Any) -> list[Any]:
    """The images of a dataset's ``prompt``, in order: paths or PIL images; a string has none."""
    if not isinstance(messages, list):
        return []
    return [part["image"] for part in message_parts(messages) if part["type"] == "image"]


def has_vision(row: Mapping[str, Any]) -> bool:
    """Whether a dataset's row shows videos or pictures, in its prompt or in a column that TRL takes pictures from."""
    prompt = row.get("prompt")
    parts = message_parts(prompt) if isinstance(prompt, list) else ()
    return bool(row.get("images") or row.get("image")) or any(part["type"] in ("image", "video") for part in parts)


def message_parts(messages: Messages) -> Iterator[dict[str, Any]]:
    """All parts of a conversation's messages, in order; plain text messages have none."""
    for message in messages:
        if isinstance(message["content"], list):
            yield from message["content"]


def encode_messages(processor: Any, messages: Messages, videos: VideoCache, **template_kwargs: Any) -> Prompt:
    """`encode_prompt` of a conversation whose videos are read now. Raises VideoError or PromptError for a bad file."""
    shown = [videos.read(source) for source in video_sources(messages)]
    return encode_prompt(processor, messages, shown, **template_kwargs)


def encode_prompt(processor: Any, messages: Messages, videos: Sequence[SampledVideo], **template_kwargs: Any) -> Prompt:
    """One conversation as a model reads it, by the processor's own chat template and video processor.

    Args:
        processor: the model's processor.
        messages: one conversation; image parts hold ``image`` (a path or a PIL image).
        videos: the sampled videos of its video parts, in order; their true fps goes along as metadata.
        template_kwargs: passed to the chat template.

    Raises:
        PromptError: a picture cannot be read, a text holds a placeholder, or the processor cannot have these videos
            and pictures in one prompt.
    """
    messages = clean_messages(messages)
    check_text(messages, placeholders(processor))
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
    images = [open_image(image) for image in pictures(messages)]
    vision: dict[str, Any] = {"images": images} if images else {}
    if videos:
        vision |= {
            "videos": [video.frames_THWC for video in videos],
            "video_metadata": [video.metadata for video in videos],
            "do_sample_frames": False,
        }
    names = getattr(getattr(processor, "video_processor", None), "model_input_names", ())
    if vision and "video_grid_thw" not in names:
        _check_mixture(processor, names, len(images), {len(video.frames_THWC) for video in videos})
        vision["return_text_replacement_offsets"] = True
    output = processor(text=[text], return_tensors="pt", add_special_tokens=False, **vision)
    prompt, replaced = Prompt.of(output), output.get("text_replacement_offsets")
    if not replaced:
        return prompt
    frames = [-(-len(video.frames_THWC) // merged_frames(processor.video_processor)) for video in videos]
    return replace(prompt, video_spans=_video_spans(processor, prompt, replaced[0], frames))


def _check_mixture(processor: Any, names: Sequence[str], images: int, lengths: set[int]) -> None:
    """Refuse what processors without grids make nothing, or no tensor, of. Raises PromptError."""
    name = type(processor).__name__
    if images and lengths and "pixel_values" in names:
        raise PromptError(f"{name} loses pictures beside videos: ask about one of them")
    if len(lengths) > 1 and not {"pixel_values", "num_frames_per_video"} & set(names):
        raise PromptError(
            f"{name} takes videos of equally many frames only, not {sorted(lengths)}: set video_min_frames and "
            "video_max_frames to one number"
        )


def _video_spans(
    processor: Any, prompt: Prompt, replacements: Sequence[Mapping[str, Any]], frames: Sequence[int]
) -> Tensor:
    """int64 (videos, 3): first placeholder, one past the last, and frames of each video.

    Args:
        replacements: by transformers' ``return_text_replacement_offsets``, what stands for each picture and video.
        frames: of the language model, of each video.
    """
    texts, count = placeholders(processor), iter(frames)
    ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(texts)))
    places, end, spans = torch.isin(prompt.ids_1P[0].cpu(), ids).nonzero()[:, 0].tolist(), 0, []
    for one in replacements:
        start, end = end, end + sum(one["replacement"].count(text) for text in texts)
        if one["type"] == "video":
            spans.append((places[start], places[end - 1] + 1, next(count)))
    return torch.tensor(spans, dtype=torch.long).view(-1, 3)


def open_image(image: Any) -> Any:
    """An image part's picture: a file is opened, a picture stays as it is. Raises PromptError for a bad file."""
    if not isinstance(image, str):
        return image
    from PIL import Image

    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PromptError(f"{image}: cannot be read as an image ({error}); replace the file") from error


def placeholders(processor: Any) -> tuple[str, ...]:
    """The texts that a processor replaces by the tokens of a picture or a video, wherever they stand."""
    names = ("image_token", "video_token")
    return tuple(filter(None, (getattr(processor, name, None) for name in names)))


def check_text(messages: Messages, forbidden: Sequence[str]) -> None:
    """Assert that no text of a conversation holds a placeholder: it would ask for a picture that is not there.

    Raises:
        PromptError: one does.
    """
    for message in clean_messages(messages):
        for part in message["content"]:
            for text in forbidden:
                if text in (part.get("text") or ""):
                    raise PromptError(f"a question holds {text} as text, which stands for a picture; take it out")


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    responses: int = 1,
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """Responses of a Hugging Face model to encoded prompts, in one left-padded batch.

    Args:
        model: the policy.
        processor: its processor; names the padding token.
        prompts: encoded prompts, with pixels or features.
        max_new_tokens: longest response.
        responses: G, responses to each prompt.
        temperature: 0: greedy; else sampled from softmax(logits / temperature), nothing cut off.

    Returns:
        For each prompt its G responses as int64 tensors, up to and including the end-of-sequence token.
    """
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return respond(
        model,
        processor.tokenizer.pad_token_id,
        prompts,
        responses,
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        suppress_tokens=family_or_generic(model).banned_ids,
        **sampling,
    )


def respond(
    model: Any, pad_token_id: int, prompts: Sequence[Prompt], responses: int, **generation: Any
) -> list[list[Tensor]]:
    """The same with transformers' own generation settings. Each prompt, with its video, is read once. Not in the paper.

    Stock generation copies a prompt G times and reads every copy; here all responses attend to one.

    Args:
        model: the policy.
        pad_token_id: fills prompts from the left.
        prompts: encoded prompts, with pixels or features.
        responses: G.
        generation: what transformers' ``generate`` takes (``generation_config``, ``max_new_tokens``,
            ``eos_token_id``, ...).
    """
    device = next(model.parameters()).device
    prompts = [prompt.to(device) for prompt in prompts]
    longest = max(prompt.length for prompt in prompts)
    ids_BP = torch.cat([_left_pad(prompt.ids_1P, longest, pad_token_id) for prompt in prompts])
    mask_BP = torch.cat([_left_pad(torch.ones_like(prompt.ids_1P), longest, 0) for prompt in prompts])
    family = family_or_generic(model)
    family.prepare()
    batch = {"input_ids": ids_BP, "attention_mask": mask_BP}
    if (positions_BP := family.generation_positions(mask_BP)) is not None:
        batch["position_ids"] = positions_BP
    types = [prompt.types_1P for prompt in prompts if prompt.types_1P is not None]
    if types:
        batch["mm_token_type_ids"] = torch.cat([_left_pad(types_1P, longest, 0) for types_1P in types])
    with torch.no_grad():
        family.start_generation()
        cache = _prefill(model, batch, family.vision_inputs(prompts))
        family.repeat_generation(responses)
        with repeated_prompts(family.base, cache, len(prompts), responses):
            sequences = model.generate(
                input_ids=ids_BP.repeat_interleave(responses, dim=0),
                attention_mask=mask_BP.repeat_interleave(responses, dim=0),
                past_key_values=cache,
                **generation,
            ).cpu()
    ends = _end_tokens(model, generation)
    rows = [_until_end(row, ends) for row in sequences[:, longest:]]
    return [rows[start : start + responses] for start in range(0, len(rows), responses)]


def _prefill(model: Any, batch: Mapping[str, Tensor], vision: Mapping[str, Any]) -> Any:
    """The key/value cache of left-padded prompts but their last token, which ``generate`` then reads itself."""
    but_last = {key: value[:, :-1] for key, value in batch.items()}
    return model(**but_last, **vision, use_cache=True, logits_to_keep=1).past_key_values


def _left_pad(x_1P: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(x_1P, (length - x_1P.shape[1], 0), value=value)


def _end_tokens(model: Any, generation: Mapping[str, Any]) -> Tensor:
    """int64 (E,), ids that end a response; transformers looks at the argument, the settings passed, then the model."""
    given, own = generation.get("generation_config"), model.generation_config.eos_token_id
    configured = own if given is None or given.eos_token_id is None else given.eos_token_id
    ends = generation.get("eos_token_id", configured)
    return torch.as_tensor([] if ends is None else ends, dtype=torch.long).reshape(-1).cpu()


def _until_end(ids_N: Tensor, ends: Tensor) -> Tensor:
    """The response up to and including its first end-of-sequence token."""
    found = torch.isin(ids_N, ends).nonzero()
    return ids_N[: int(found[0]) + 1] if len(found) else ids_N
