"""``python -m excite``: the same as the ``excite`` command."""

from excite.cli import main

main()
