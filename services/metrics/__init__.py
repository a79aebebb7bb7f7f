"""What a process of the service counts, and who may read it: Prometheus, by a port of the process's
own and by that of Ray on its node.

`table` names every metric. `registry` holds a process's, `decode_meter` counts what an engine
decides. `endpoint` and `ray_gauges` show a registry to others.
"""
