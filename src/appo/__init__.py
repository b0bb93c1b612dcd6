"""appo: train video language models to see better, with reinforcement learning.

``from appo import APPOTrainer, APPOConfig`` is all a training script needs. Names are looked up when they are first
used, so that ``import appo`` loads neither torch nor transformers. Packages, in the order data flows: `method`,
`rewards`, `video`, `data`, `models`, `rollout`, `world`, `reports`, `training`, `evaluation`, `experiments`, `cli`.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
