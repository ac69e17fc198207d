"""`python -m sharednorm_server` is the command line, as `sharednorm` is."""

import sys

from sharednorm_server.cli.main import main

sys.exit(main())
