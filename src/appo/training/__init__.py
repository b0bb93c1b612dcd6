"""A configuration, a model and rows in; a trained policy and its run folder out.

`APPOTrainer` is TRL's `GRPOTrainer` with the rollout pipeline; its bases resume exactly and go on after bad videos.
`train` is what `appo train` does.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
