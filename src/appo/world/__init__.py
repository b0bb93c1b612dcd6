"""The embedded world: short clips with one-second events, questions about them, and a tiny policy.

Everything needed to try reinforcement learning on real video files within minutes on a CPU. `generate` writes mp4 clips
and their questions, `load_annotations` reads them back as `VideoQA`, `planned` gives them without files; `load_policy`
returns the shipped tiny Qwen2.5-VL and its processor, `policy_path` their folder.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
