"""Learning methods: what a training step makes of labelled, partly labelled and unlabelled images.

A new method is a file here (or anywhere) and a config in the group `method`.
"""
