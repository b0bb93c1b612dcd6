"""`appo plan`: settings of a run -> bytes on each GPU in each phase of a step, and what to change if they do not fit.

Arithmetic only: `architecture` counts parameters and tokens, `memory` the parts of a step, `phases` what is there at
once, `planning` reads flags and a training YAML and prints.
"""
