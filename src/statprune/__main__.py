"""`python -m statprune`."""

import sys

from statprune.commands.cli import main

sys.exit(main())
