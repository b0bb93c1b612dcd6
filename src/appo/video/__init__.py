"""A video file, a clip of it or a folder of frames in; sampled frames with their true times out.

`read_video` chooses frames by the model's own processor and decodes them; every failure is a `VideoError` of one line.
Frames can be cached on disk (`FrameCache`) and decoded in a process that may hang or die (`Decoder`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
