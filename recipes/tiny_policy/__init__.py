"""How the tiny policy and the tiny reasoners of the embedded world are made; run from the repository's root."""
