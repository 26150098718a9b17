"""`python -m nvr_tasks` is `nvr`."""

import sys

from nvr_tasks.cli import main

sys.exit(main())
