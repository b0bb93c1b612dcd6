"""`appo study`: any perceivers describe each video, any reasoners answer from the descriptions alone.

`words` says what both are asked and what of a response is a description, `scenes` and `rules` are the exact describer
and the exact reasoner of the embedded world, `members` reads who takes part, `folder` keeps what was said,
`describing`, `text_models` and `endpoints` ask, `gains` and `pages` say what the grid shows, `study` runs it all.
"""
