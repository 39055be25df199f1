"""Routing as data: what every router chose for every token of a text, on disk, compared, and put back into a model."""
