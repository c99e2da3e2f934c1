"""What runs inside the sandbox's processes, under ``python -I -S``: standard library alone, nothing of the rest of this package.

``entry`` is the supervisor of one program. Before it reads its job it forks ``starter``, whose memory so holds no test;
programs are forks of ``starter``, tests are evaluated in forks of ``entry``. Both kinds give up their rights (``confine``,
``calls``) before they run a line that is not ours. ``serve`` answers a test's calls in the program's process, ``evaluate``
asks them, ``values`` is the format in which values go over.
"""
