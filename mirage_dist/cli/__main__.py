"""`python -m mirage_dist.cli`, which is `mirage`."""

import sys

from mirage_dist.cli import main

sys.exit(main())
