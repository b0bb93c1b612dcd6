"""Responses in, numbers out: the prompts' formats, their strict and lenient parsers, and the reward functions.

Training and evaluation score an answer by the same function, `appo.rewards.functions.score_answer`. Standard library
only (and rouge-score, when an answer is compared by ROUGE).
"""
