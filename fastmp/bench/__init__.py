"""``fastmp bench``: the kernels and the whole step against the fastest baseline.

``clocks`` and ``harness`` time, ``results`` writes, ``pictures`` draws; the other files are one
subject each and give its cases for a device. Timed results are checked.
"""
