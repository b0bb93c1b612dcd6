"""appo: train video language models to see better, with reinforcement learning."""

__version__ = "0.1.0"
