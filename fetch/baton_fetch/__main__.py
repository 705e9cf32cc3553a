"""`python -m baton_fetch`."""

import sys

from baton_fetch.main import main

sys.exit(main())
