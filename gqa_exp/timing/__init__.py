"""Decode time: the protocol, the memory-bandwidth probe, the record of the environment and the host lock."""
