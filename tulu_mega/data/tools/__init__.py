"""The commands `tulu-mega data inspect`, `mix` and `decontaminate`."""
