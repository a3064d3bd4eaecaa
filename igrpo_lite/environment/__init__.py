"""What this machine and this Python environment can do, and what stands in the way.

Facts are collected once (:mod:`igrpo_lite.doctor`), everything that is concluded from them is a pure function of them.
"""
