"""What others move on this machine in the same minute: the ceilings and the rivals of the rows.

`host`: memmove, one TCP socket with vectors, process_vm_writev. `nixl` and `mooncake`: these libraries without us, one
descriptor per page, as they come and with the best settings we know. A missing one fails to start, with its words.
"""
