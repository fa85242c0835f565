"""`python -m specengine` is the command `specengine`."""

from specengine.cli import main

if __name__ == "__main__":
    main()
