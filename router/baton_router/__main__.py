"""`python -m baton_router`."""

import sys

from baton_router.main import main

sys.exit(main())
