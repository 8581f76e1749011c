"""`python -m mambalm` is the `mambalm` command."""

from mambalm_cli import main

if __name__ == "__main__":
    main()
