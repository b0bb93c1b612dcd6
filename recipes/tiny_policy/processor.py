"""The word-level tokenizer and the Qwen2.5-VL processor of the tiny policy, from a fixed vocabulary.

The vocabulary must stay that of the files in `tiny_policy/`, or words would silently get other ids: a test compares.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from appo.world import teacher
from appo.world.world import COLOURS, DISTRACTORS, MAX_SECONDS, SHAPES

PLACEHOLDERS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *PLACEHOLDERS)
UNKNOWN = "<unk>"
# Words of questions and chat roles, and some spare ones, so that new tasks need no new tokenizer.
PROMPT_WORDS = """
system user assistant what colour is the shape one which came first , or when does appear ? . : ; ! yes no
a b c d think answer question video clip frame second about then between and tags inside put word your reasoning
step by last before after how many there are not image true false left right up down middle none
"""
FRAME_PIXELS = 56 * 56  # 2 x 2 merged tokens of 28 x 28 pixels each

CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }} {% if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content -%}
{%- if part.type == "video" %}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif "text" in part %}{{ part.text }}{% endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def vocabulary() -> dict[str, int]:
    """Word -> id: special tokens, then content words, then the words of teacher and prompts in order."""
    seconds = [str(second) for second in range(MAX_SECONDS + 1)]
    content = [*SHAPES, *COLOURS, *DISTRACTORS, *seconds]
    other = sorted((all_words() | set(PROMPT_WORDS.split())) - set(content))
    return {word: index for index, word in enumerate([*SPECIAL, UNKNOWN, *content, *other])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words between spaces, punctuation apart; decoding joins words by spaces, so known words survive."""
    core = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[.,?!:;]"), "isolated")]
    )
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN,
        extra_special_tokens=[token for token in SPECIAL if token not in ("<|im_end|>", "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """The tokenizer with Qwen's image and video processors, set to give 56 x 56 pixels to every frame."""
    size = {"shortest_edge": FRAME_PIXELS, "longest_edge": FRAME_PIXELS}
    shared: dict[str, Any] = {"size": size, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    video = Qwen2VLVideoProcessor(
        **shared, cap_pixels_per_frame=False, do_sample_frames=False, fps=2.0, min_frames=4, max_frames=48
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=build_tokenizer(),
        video_processor=video,
        chat_template=CHAT_TEMPLATE,
    )


def all_words() -> set[str]:
    """Every word that a response may contain, apart from names of shapes, colours and seconds."""
    tables = (
        teacher.OPENINGS,
        teacher.COMMITMENTS,
        *teacher.REPORTS.values(),
        teacher.CHECKS,
        teacher.WANDERERS,
        teacher.OTHERS,
        teacher.FILLERS,
        teacher.CONCLUSIONS,
    )
    words = {word for table in tables for line in table for word in line.split() if "{" not in word}
    return words | {"<think>", "</think>", "<answer>", "</answer>", "one"}
