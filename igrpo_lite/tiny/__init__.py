"""The bundled model: about 0.86 million weights, made from nothing by ``tools/build_tiny.py``.

It solves some of the two-step word problems of :mod:`igrpo_lite.problems.synthetic`, so that reinforcement learning has
something to improve, without a download and within a minute of one CPU core.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder of the bundled model: what ``AutoModelForCausalLM`` and ``AutoTokenizer`` take in ``from_pretrained``."""
