"""Preference losses: a file each, whose name is what `preference.loss` may be. Docs: docs/how-to/add_an_objective.md."""
