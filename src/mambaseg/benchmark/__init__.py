"""Speed and memory of scans, networks and training steps, as ratios within one run.

Numbers of two machines, or of one machine on two days, cannot be compared; what is measured side by
side in one process can. Everything here takes plain arguments and returns plain data: rows that
`tables` shows and that are written as JSON.
"""
