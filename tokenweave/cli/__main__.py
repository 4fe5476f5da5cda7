"""`python -m tokenweave.cli`, and `torchrun ... -m tokenweave.cli`."""

import sys

from tokenweave.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
