"""Benchmarks: LocoProp's local loops and training steps against what a user could run instead, and against the limit.

``python -m bench --help`` lists the commands. Nothing here is part of the installed packages.
"""
