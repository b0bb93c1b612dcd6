"""Perceivers and reasoners in; who moves the score out: answers are given from descriptions alone."""
