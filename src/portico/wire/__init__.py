"""The protocol between agent and relay (``contracts/wire.md``): codec, session state machine, grants. No I/O, no clock."""
