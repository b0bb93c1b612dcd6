"""A model and a benchmark in; replies, official scores with intervals and tables out.

`evaluate` is what `appo eval` does, `predict` answers a list of questions, `inspect_question` samples a group about one
question and measures its frame attention.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
