"""Wires that write into the peer's memory through a transfer library: one package, an engine per library.

`engine.py` says what a library must do, `nixl.py` and `mooncake.py` do it; `pump.py` is the one thread that owns an
engine; `memory.py` is what may be written from outside; `wire.py` makes a wire of them. Which protocol carries the
bytes (RDMA, NVLink, tcp, ...) is the library's choice by the devices it finds and by where the memory is.

A chunk's header does not travel with the write but on the link's channel, once the library says that the bytes are
visible at the peer. A notification of the library would come no earlier (it is sent after the flush, too), would have
to be polled for, is signed by nobody, and could be overtaken by the channel's `Sent` and `Abort`.
"""
