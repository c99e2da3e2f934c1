"""Answers of mathematics: where a reply gives one, how LaTeX is read, and what counts as equal."""
