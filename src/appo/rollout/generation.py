"""Chat messages with videos -> model inputs, each file decoded once -> responses.

Shape suffixes: P prompt tokens, B rows, N response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from appo.models.frame_tokens import check_time_advances
from appo.models.prefix_packing import VISION_KEYS, join_vision, prompt_positions, prompt_spans, unwrap
from appo.types import VideoSource
from appo.video.frame_cache import FrameCache
from appo.video.reader import Call, FrameSampling, SampledVideo, here, lm_frame_timestamps, read_video

Messages = list[dict[str, Any]]
# Model inputs of one prompt: input_ids (1, P), attention_mask, mm_token_type_ids, and its vision tensors or features.
PromptInputs = dict[str, Any]


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
        self, video_processor: Any, sampling: FrameSampling, cache: FrameCache | None = None, call: Call = here
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
            self._timestamps[source] = lm_frame_timestamps(video, self._video_processor.temporal_patch_size)
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


def encode_prompt(
    processor: Any, messages: Messages, videos: Sequence[SampledVideo], **template_kwargs: Any
) -> PromptInputs:
    """One conversation as model inputs, through the processor's own chat template and video processor. Source: ours.

    Args:
        processor: the model's processor.
        messages: one conversation; image parts hold ``image`` (a path or a PIL image).
        videos: the sampled videos of its video parts, in order; their true fps goes along as metadata.
        template_kwargs: passed to the chat template.

    Returns:
        Tensors; ``input_ids`` is (1, P) with all placeholders expanded.

    Raises:
        PromptError: a picture cannot be read, or a text holds a placeholder.
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
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **vision)
    return {key: torch.as_tensor(value) for key, value in inputs.items() if key in _MODEL_KEYS}


_MODEL_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", *VISION_KEYS)


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


def check_time(model: Any, prompt: Mapping[str, Tensor]) -> None:
    """Assert that the model will see the frames of this prompt at different times.

    Raises:
        ValueError: frames share a temporal position (the fps metadata was lost or is too high).
    """
    cpu = {key: value.cpu() for key, value in prompt.items() if not key.startswith("pixel_values")}
    check_time_advances(prompt_positions(model, cpu)[:, 0], prompt_spans(model, cpu))


def without_pixels(prompt: Mapping[str, Any]) -> PromptInputs:
    """The same prompt about blank frames."""
    return {key: torch.zeros_like(value) if key.startswith("pixel_values") else value for key, value in prompt.items()}


def vision_token_ids(config: Any) -> list[int]:
    """Ids of the vision placeholders, which a policy must never sample.

    A sampled placeholder asks for features that no video has: the next forward pass fails, or reads another row's.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def generate(
    model: Any,
    processor: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    responses: int = 1,
    temperature: float = 1.0,
) -> list[list[Tensor]]:
    """Responses of a Hugging Face model to encoded prompts, in one left-padded batch.

    Args:
        model: the policy.
        processor: its processor; names the padding token.
        prompts: one :func:`encode_prompt` result a prompt.
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
        suppress_tokens=vision_token_ids(model.config),
        **sampling,
    )


def respond(
    model: Any, pad_token_id: int, prompts: Sequence[Mapping[str, Any]], responses: int, **generation: Any
) -> list[list[Tensor]]:
    """The same with transformers' own generation settings. Each prompt, with its video, is read once. Source: ours.

    Stock generation copies a prompt G times and reads every copy; here its cache is made once and repeated.

    Args:
        model: the policy.
        pad_token_id: fills prompts from the left.
        prompts: encoded prompts, pixels or features (:func:`appo.models.prefix_packing.encode_vision`).
        responses: G.
        generation: what transformers' ``generate`` takes (``generation_config``, ``max_new_tokens``,
            ``eos_token_id``, ...).
    """
    device = next(model.parameters()).device
    pads = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {
        key: torch.cat([_left_pad(prompt[key], longest, pad) for prompt in prompts]).to(device)
        for key, pad in pads.items()
        if key in prompts[0]
    }
    with torch.no_grad():
        inner = unwrap(model).base_model
        inner.rope_deltas = None  # of some earlier batch; text-only prompts would go on from it
        cache = _prefill(model, batch, to_device(join_vision(prompts), device))
        cache.batch_repeat_interleave(responses)
        # Where text goes on after the video: the model keeps it from the prefill, one number a prompt.
        if inner.rope_deltas is not None:
            inner.rope_deltas = inner.rope_deltas.repeat_interleave(responses, dim=0)
        sequences = model.generate(
            input_ids=batch["input_ids"].repeat_interleave(responses, dim=0),
            attention_mask=batch["attention_mask"].repeat_interleave(responses, dim=0),
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


def to_device(prompt: Mapping[str, Any], device: torch.device) -> PromptInputs:
    """The tensors of a prompt on another device; features stay where the model made them."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in prompt.items()}


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
