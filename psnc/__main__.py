"""``python -m psnc`` is ``psnc``."""

from psnc.cli import main

main()
