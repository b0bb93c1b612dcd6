"""A run folder in, pages and terminal pictures of it out.

`RunFolder` writes what a run was and did, line by line; `load_run` reads it back, whole or damaged; `write_page` makes
one self-contained HTML file of it. Loads neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
