"""`sharednorm doctor`: whether a server is well, or what this machine lacks to run one.

`command` is the command line, `ask` asks a server, `machine` and `gpus` look at this machine. What could crash, hang or
leave something behind happens in processes of its own, which `child` starts and which run `probe`.
"""
