"""Prompts with videos through vLLM, in this process or a server: what it is given, and checks of what it reads."""
