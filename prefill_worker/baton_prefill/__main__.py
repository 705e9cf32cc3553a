"""`python -m baton_prefill`."""

from baton_prefill.main import main

main()
