"""``python -m hedgelab`` is the ``hedgelab`` command."""

import sys

from hedgelab.cli import main

if __name__ == "__main__":
    sys.exit(main())
