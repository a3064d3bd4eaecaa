"""What this machine and this Python environment can do, and what stands in the way: ``igrpo-lite doctor``.

Facts are collected once (:mod:`collect`), everything that is concluded from them is a pure function of them.
"""
