"""Placement on Ray Serve and Ray Train, the wire, and the command line. Imports s2t_shared, never
the other way.

`client` and `wire` need grpcio and protobuf only.
"""
