"""``python -m sdrt`` is ``sdrt``."""

from sdrt.cli import main

main()
