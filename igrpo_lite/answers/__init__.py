"""The answer checker: finds the final answer in a completion and compares it with the gold answer.

``checker``, which asks math-verify in a subprocess where exact comparison cannot tell, is imported by its own name.
"""

from igrpo_lite.answers.answers import Verdict, find_answer, gold_answer, verdict
from igrpo_lite.answers.equality import same_answer

__all__ = ["Verdict", "find_answer", "gold_answer", "same_answer", "verdict"]
