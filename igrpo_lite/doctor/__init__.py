"""What ``igrpo-lite doctor`` knows of this machine: the facts, and which back ends really work (each is tried in a
process of its own)."""
