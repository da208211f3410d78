"""What starts the processes of a run: on this machine or on a cluster; the only package that may import submitit.

`ava_exp` finds a launcher by the name in its configuration and imports nothing from here.
"""
