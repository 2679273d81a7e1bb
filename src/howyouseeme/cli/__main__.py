"""`python -m howyouseeme.cli`, the same as `howyouseeme`."""

from . import main

main()
