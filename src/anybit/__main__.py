"""`python -m anybit` is the command `anybit`."""

import sys

from anybit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
