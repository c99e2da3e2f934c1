"""The built-in verifiers, one file each.

The file's name is the verifier's name in the ``dataset`` column, in lower case. ``VERIFIER`` in the file is its class. A file is
imported when its verifier is first used, because sympy and langdetect take a second each.
"""
