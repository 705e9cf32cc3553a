"""The `baton` command: start and supervise a service on this machine, talk to it, look into it."""
