"""`python -m howyouseeme`, the same as `howyouseeme`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="howyouseeme")
