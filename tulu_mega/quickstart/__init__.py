"""The quickstart: a task, a model and a run that a laptop makes by itself, with nothing to download."""
