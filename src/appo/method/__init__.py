"""The method of the paper, in its order: attention to frames and log-probabilities in, one weight a token out.

`token_weights` is steps 2 to 8 for one group; its parts are functions of their own, with the paper's names. Beside it
is what is not in the paper: attention compared with a running mean (`FrameShares`). Loads torch only.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
