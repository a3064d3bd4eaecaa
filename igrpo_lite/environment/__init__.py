"""What works on this machine and in this Python environment, and what does not.

Facts are collected once (:mod:`igrpo_lite.doctor`), everything that is concluded from them is a pure function of them.
"""
