"""Photographs through a GPU: a plain producer, a chord, a batched burst, and what ran where."""
