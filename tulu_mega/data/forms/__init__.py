"""Rows as data sets have them, read into the one form that is encoded: `messages`, or `chosen` and `rejected`."""
