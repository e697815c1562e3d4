"""``fastmp bench``: the kernels and the whole step against the best that there is beside them.

``harness`` times, ``results`` writes, ``pictures`` draws; each other file is one subject and gives
its cases for a device. One rule for all: what is timed is checked, and the baseline is the fastest.
"""
