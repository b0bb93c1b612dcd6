"""A model, settings and GPUs in; bytes at the peak of each phase and what lowers them out."""
