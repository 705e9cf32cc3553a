"""`python -m baton_decode`."""

from baton_decode.main import main

main()
