"""``python -m compressor`` is the console script."""

from compressor.cli import main

main()
