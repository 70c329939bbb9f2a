"""The command line, as `python -m lowmem`."""

from lowmem.cli import main

if __name__ == "__main__":
    main()
