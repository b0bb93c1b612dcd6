"""Rows of a dataset go in; groups of scored, weighted responses come out.

`pipeline` has the stages in order. Conversations become prompts, each file decoded once and a frozen vision tower run
once (`encoding`). Prompts become responses, read once for a whole group (`generation`, or vLLM by `vllm`). Groups whose
rewards are all equal are replaced (`dynamic_sampling`), and the others get their token weights (`token_weights`).
`timers` says where the time of a step went. `collectives` has all that processes do together.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
