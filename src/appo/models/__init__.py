"""A model and encoded prompts go in; log-probabilities, hidden states and attention to frames come out.

What differs between model families is one class a family (`families`). `score_group` scores a prompt's responses in one
forward pass: packed behind the prompt (`prefix_packing`), with the attention of their tokens to each video frame
(`frame_attention`, `frame_tokens`). They are sampled behind one copy of the prompt's keys (`prompt_cache`). Beside it:
checkpoints and adapters (`loading`, `names`), parameters and vision towers on several processes (`sharding`,
`vision_tower`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
